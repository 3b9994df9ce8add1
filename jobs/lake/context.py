"""What one run of a job carries: its source, its lake, its day, and the candidate it works on."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.dataset as ds

from jobs.core.batches import folder_name
from jobs.core.errors import SettingsError
from jobs.core.plan import Engine, Plan, Thresholds
from jobs.core.settings import settings
from jobs.core.source_file import Source
from jobs.core.tables import EVENTS, Table
from jobs.lake import filesystem, time_slices
from jobs.lake.delta import Lake
from jobs.lake.manifest import Manifest
from jobs.lake.time_slices import Spans

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SomeManifest = TypeVar("SomeManifest", bound=Manifest)
SAFE_BATCH = re.compile(r"[A-Za-z0-9_.:+-]{1,200}")


def checked_batch(text: str | None) -> str:
    """The name that ties compute, audit and publish of one run; made up where none is given."""
    if text is None:
        return f"hand-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    if not SAFE_BATCH.fullmatch(text) or text in (".", ".."):
        raise SettingsError(
            f"--batch {text!r}: use 1 to 200 letters, digits and _ . : + - (it names a folder)"
        )
    return folder_name(text)


@dataclass
class Context:
    """One run of a job.

    Args:
        day: the night's day, or None: whatever is new, nothing is late.
        batch: names the candidate's folder; the same for compute, audit and publish.
        thresholds: the sizes at which a job goes another way.
        explain_plan: whether plans are printed as they are made.
    """

    source: Source
    lake: Lake
    day: date | None
    batch: str
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    thresholds: Thresholds = field(
        default_factory=lambda: Thresholds(short_jobs=settings().short_jobs)
    )
    explain_plan: bool = False
    plans: dict[str, Plan] = field(default_factory=dict)
    """By job: how it does its work, as far as that is known."""
    lists: dict[str, str] = field(default_factory=dict)
    """Lists of others that the run used, with their versions, for `ops.runs`."""

    @property
    def spark(self) -> SparkSession:
        return self.lake.spark

    def enter(self, engine: Engine) -> SparkSession:
        """The Spark session, on this engine: it is started if it was not, and its plans are compiled
        or interpreted from here on. (Columns, too, need a session that was started.)"""
        from jobs.lake.spark import compile_plans

        spark = self.spark
        compile_plans(spark, engine is Engine.COMPILED)
        return spark

    def tasks(self, engine: Engine) -> Callable[[], SparkSession] | None:
        """Where tasks run on this engine, as `jobs/lake/tasks.py` takes it."""
        return None if engine is Engine.HERE else lambda: self.enter(engine)

    def decide(self, plan: Plan) -> None:
        """Record how a job does its work, for `ops.runs`; printed if asked for."""
        if self.explain_plan and self.plans.get(plan.job) != plan:
            print(f"plan of {plan.job}: {plan.in_words()}", flush=True)
        self.plans[plan.job] = plan

    def upsert(
        self, table: Table, candidate: Candidate, part: str, base: int, app_id: str, version: int,
        stored: str | None = None,
    ) -> None:  # fmt: skip
        """Put a part of the candidate into the table by its key, in one commit: `Lake.upsert`; by
        Spark, where it is more than one process should hold.

        Args:
            part: the table's columns, and `gone` or `change`, as `Lake.upsert` takes them.
            base: the table's version that the part was computed from.
            app_id, version: the progress that the commit carries.
            stored: the part's column that has the stored row's time (the table's `order`), by which
                files are left out.

        Raises:
            Conflict: another run changed the table since `base`.
        """
        lake, rows = self.lake, candidate.row_count(part)
        if not rows:
            lake.commit(table, [], base, app_id, version, self.run_id)
            return
        spans = candidate.spans(part, stored) if stored else None
        few = self.thresholds.in_one_process(rows, None if spans else lake.bytes(table))
        if few and not lake.only_spark(table):
            put = candidate.stream(part, [*table.columns, "gone", "change"])
            lake.upsert(table, put, base, app_id, version, self.run_id, spans)
        else:
            lake.unchanged(table, base)
            self.enter(self.thresholds.spark(rows, lake.rows(table)))
            with lake.transaction(table, app_id, version, self.run_id):
                lake.merge(table, candidate.part(part), spans)
            if app_id != lake.guard(table):
                lake.mark(table, base, self.run_id)

    def candidate(self, table: Table) -> Candidate:
        return Candidate(self.lake, self.lake.folder("_candidates", self.batch, table.full_name))


SCHEMA = "/_schema.json"  # Spark would start a job to find out what we know
DDL_FILE = "/_schema.ddl"  # the same, of parts that were written without it
BATCH = 8_192  # rows; ours


class Candidate:
    """The rows that would change, with what they were computed from: not yet seen by any reader.

    `manifest.json` is written last, so a candidate without one was never finished. It records the
    versions of target and inputs, and the counts.
    """

    def __init__(self, lake: Lake, folder: str) -> None:
        self.lake, self.folder = lake, folder

    def path(self, part: str) -> str:
        return f"{self.folder}/{part}"

    def write(self, part: str, rows: DataFrame, options: dict[str, str] | None = None) -> DataFrame:
        """Write a part of the candidate and read it back: computed once, whatever comes after."""
        rows.write.options(**(options or {})).mode("overwrite").parquet(self.path(part))
        filesystem.write_text(self.path(part) + SCHEMA, rows.schema.json())
        return self.part(part)

    def part(self, name: str) -> DataFrame:
        from pyspark.sql.types import StructType

        reader = self.lake.spark.read
        if filesystem.exists(self.path(name) + DDL_FILE):
            reader = reader.schema(filesystem.read_text(self.path(name) + DDL_FILE))
        else:
            known = json.loads(filesystem.read_text(self.path(name) + SCHEMA))
            reader = reader.schema(StructType.fromJson(known))
        return reader.parquet(self.path(name))

    def files(self, name: str) -> list[str]:
        """The data files of a part."""
        return [path for path, *_ in filesystem.glob(f"{self.path(name)}/*.parquet")]

    def arrow(
        self, name: str, columns: list[str] | None = None, where: ds.Expression | None = None
    ) -> pa.Table:
        """A part, or some of its columns and rows, read without Spark. Columns that some of its files
        lack are null there."""
        rows = self._rows(name)
        if columns is not None and not {*columns} <= {*rows.schema.names}:
            kinds = [one.physical_schema for one in rows.get_fragments()]
            rows = rows.replace_schema(pa.unify_schemas(kinds))
        return rows.to_table(columns=columns, filter=where)

    def stream(self, name: str, columns: list[str]) -> pa.RecordBatchReader:
        """Those of some columns that a part has, batch by batch, read without Spark."""
        rows = self._rows(name)
        there = [one for one in columns if one in rows.schema.names]
        return rows.scanner(there, batch_size=BATCH, fragment_readahead=1).to_reader()

    def spans(self, name: str, column: str) -> Spans | None:
        """Where the times of a column lie; None: an earlier version wrote the part without it."""
        rows = self._rows(name)
        known = column in rows.schema.names
        return time_slices.spans(rows.to_table([column])[column]) if known else None

    def _rows(self, name: str) -> ds.Dataset:
        system, inner = filesystem.located(self.path(name))
        return ds.dataset(inner, format="parquet", filesystem=system)

    def adopt(self, part: str, ddl: str) -> None:
        """Make a part of files that were written into its folder without Spark."""
        filesystem.write_text(self.path(part) + DDL_FILE, ddl)

    def has(self, name: str) -> bool:
        """Whether a part was written."""
        return any(filesystem.exists(self.path(name) + one) for one in (SCHEMA, DDL_FILE))

    def row_count(self, name: str) -> int:
        """Rows of a part, from its files' footers."""
        return int(self._rows(name).count_rows())

    @property
    def finished(self) -> bool:
        return filesystem.exists(self.path("manifest.json"))

    def save(self, manifest: Manifest) -> None:
        filesystem.write_text(self.path("manifest.json"), manifest.to_json())

    def manifest(self, kind: type[SomeManifest]) -> SomeManifest:
        """What the compute step found.

        Raises:
            SettingsError: the candidate was never finished, or not by this job.
        """
        if not self.finished:
            raise SettingsError(
                f"there is no finished candidate in {self.folder}: run the compute step of this "
                "--batch first"
            )
        return kind.of_json(filesystem.read_text(self.path("manifest.json")), self.folder)

    def remove(self) -> None:
        filesystem.remove(self.folder)


@dataclass
class Result:
    """What a job did; the JSON that others may rely on (ARCHITECTURE.md)."""

    read: int = 0
    events_new: int = 0
    events_replaced: int = 0
    duplicates: int = 0
    waiting: int = 0
    """Last lines without a line end, left for the next reading of their file."""
    events_removed: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    """By reason, the lines that `source.keep` and `[bots]` left out."""
    sessions_new: int = 0
    sessions_changed: int = 0
    sessions_retired: int = 0
    sessions_merged: int = 0
    sessions_relinked: int = 0
    """Of the new, changed and retired ones: those with an event that is another person's now."""
    runaways: int = 0
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables_in: dict[str, int] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By table: how many `checks` its suite has, how many `held`, and which `failed`, `warned` or
    were `not_evaluated` (check -> why)."""
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    COUNTS = (
        "read", "events_new", "events_replaced", "duplicates", "waiting", "events_removed",
        "sessions_new", "sessions_changed", "sessions_retired", "sessions_merged",
        "sessions_relinked", "runaways",
    )  # fmt: skip

    def add(self, other: Result) -> None:
        for name in self.COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.rejects, other.rejects), (self.filtered, other.filtered)):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count
        self.tables |= other.tables
        self.tables_in |= other.tables_in
        self.checks |= other.checks
        self.files += other.files
        self.notes += other.notes

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.COUNTS}


def require_tables(context: Context) -> None:
    """Raises: SettingsError: the lake has nothing of this source. (Nothing is written into a lake that was
    mistyped.)"""
    name = context.source.name
    if context.lake.version(EVENTS) is None:
        raise SettingsError(
            f"there are no tables of {name} in SESSIONMILL_LAKE = {context.lake.root!r}: name the folder "
            f"or URI that the jobs write to, or make them: python -m jobs run --source {name}"
        )
