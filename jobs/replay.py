"""`bronze.rejects` -> `bronze.events`, after a fix of the source file: lines get a second chance.

Each rejected line is read again, from its stored text, by the source file as it is now. What is
usable lands as if it had been good the first time (`late` is judged by the night on which it was
read, `ingest_file` is its own) and leaves `bronze.rejects`, after the events' commit; what is not
stays, under the reason that holds now.

Not replayed: lines whose bytes were no text (their stored text is escaped; correct
`source.encoding` and deliver the file again), lines of which the table has only the beginning (a
note names the first), and lines of files that the ledger does not know (the next ingest reads those
anyway).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs import exposures, ingest, landing
from jobs.context import Candidate, Context, Result
from jobs.errors import SchemaError
from jobs.privacy import privacy_of
from jobs.reading import record_of
from jobs.records import CUT, LONGEST_TEXT, RECORD_DDL, RECORD_SCHEMA, Format, missing_column
from jobs.tables import EVENTS, FILES, REJECTS
from jobs.typing_rules import typed_events

KEPT = {"raw": "kept_raw", "raw_hash": "kept_hash", "reason": "kept_reason"}
"""What of a reject's own row travels along: typing makes `raw`, `raw_hash` and `reason` anew."""


def parser(
    fmt: Format, columns: dict[str, dict[str, str]]
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """For `mapInArrow` over rejects: each stored line as a record, beside what is kept of its row.

    Args:
        columns: per file, the names (and kinds) of its columns, as the ledger has them.
    """

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = [
                record_of(fmt, raw, file, line, columns[file])
                for raw, file, line in zip(
                    *(batch[name].to_pylist() for name in ("raw", "file", "line")), strict=True
                )
            ]
            made = pa.RecordBatch.from_pylist(rows, schema=RECORD_SCHEMA)
            kept = [*KEPT, "run_day", "first_seen_ts"]
            yield pa.RecordBatch.from_arrays(
                [*made.columns, *(batch[name] for name in kept)],
                names=[*made.schema.names, *(KEPT.get(name, name) for name in kept)],
            )

    return read


def is_cut() -> Column:
    """Whether the table has only the beginning of a rejected line."""
    mark = F.substring("raw", LONGEST_TEXT + 1, len(CUT))
    return F.coalesce((F.length("raw") > LONGEST_TEXT) & (mark == CUT), F.lit(False))


def cut_lines(context: Context, base: int) -> list[str]:
    """What to say of rejects that cannot be read again."""
    cut = context.lake.read(REJECTS, base).where(is_cut())
    found = cut.agg(
        F.count("*").alias("lines"), F.min(F.struct("file", "line")).alias("first")
    ).first()  # fmt: skip
    if found is None or not found["lines"]:
        return []
    first = found["first"]
    return [
        f"{found['lines']} rejected lines were not read again: they are longer than "
        f"{LONGEST_TEXT:,} characters, and bronze.rejects has only their beginning. The first is "
        f"line {first['line']} of {first['file']}. To read them again, touch the file (its "
        f"modification time tells that it changed): python -m jobs run --source "
        f"{context.source.name} then reads it whole; lines that are known are duplicates"
    ]


def rejected_lines(context: Context, base: int) -> DataFrame:
    """The rejects as typed lines, with `run_day`, `first_seen_ts` and the `kept_…` columns.

    Raises:
        SchemaError: the source file names a column that a rejected line's file does not have.
    """
    lake, source = context.lake, context.source
    ledger = lake.small(FILES).select(["file", "columns"]).to_pylist()
    columns = {row["file"]: dict(row["columns"] or ()) for row in ledger}
    rejects = lake.read(REJECTS, base).where(F.col("file").isin(list(columns)) & ~is_cut())
    fmt = replace(landing.file_format(source), privacy=privacy_of(context))
    if fmt.format in ("csv", "parquet"):
        for row in rejects.select("file").distinct().collect():
            for ours, theirs in fmt.mapped.items():
                if theirs not in columns[row["file"]]:
                    raise SchemaError(
                        missing_column(row["file"], ours, theirs, columns[row["file"]])
                    )
    kept = "".join(f", {name} string" for name in KEPT.values())
    records = rejects.select(*REJECTS.columns).mapInArrow(
        parser(fmt, columns), RECORD_DDL + kept + ", run_day date, first_seen_ts timestamp"
    )
    lines = typed_events(records, source)
    return lines.withColumns({"raw": F.col("kept_raw"), "raw_hash": F.col("kept_hash")})


def oldest_date(context: Context) -> Column:
    """Per line: the oldest date that was not late on the night that read it; null: none was."""
    return F.date_sub("run_day", context.source.sessions.lateness_days)


def compute(context: Context) -> Candidate:
    lake, candidate = context.lake, context.candidate(EVENTS)
    for table in (EVENTS, REJECTS, FILES):
        lake.create(table)
    version = lake.version(REJECTS)
    assert version is not None
    base = {EVENTS.full_name: lake.version(EVENTS), REJECTS.full_name: version}
    manifest: dict[str, Any] = {
        "batch": context.batch, "day": None, "base": base, "empty": lake.rows(REJECTS) == 0,
        "counts": {"read": 0}, "rejects": {}, "files": [], "notes": [],
    }  # fmt: skip
    if not manifest["empty"]:
        context.expect(lake.rows(REJECTS), lake.rows(EVENTS))
        lines = exposures.joined(context, candidate, rejected_lines(context, version))
        lines = candidate.write("lines", lines)
        manifest["counts"]["read"] = candidate.row_count("lines")
        manifest["notes"] += exposures.told(context, candidate) + cut_lines(context, version)
        ingest.fill_events(context, candidate, manifest, oldest_date(context))
        unusable = ingest.unusable(candidate).select(*REJECTS.columns, "kept_reason")
        still = candidate.write("rejects", unusable)
        ingest.count_rejects(candidate, manifest)
        key = list(REJECTS.key)
        good = lines.join(still.select(*key), key, "left_anti").select(*REJECTS.columns)
        other = still.where("reason <> kept_reason").select(*REJECTS.columns)
        change = good.withColumn("gone", F.lit(True)).unionByName(
            other.withColumn("gone", F.lit(False))
        )
        candidate.write("change", change)
        manifest["rejects_changed"] = candidate.row_count("change")
    candidate.save(manifest)
    return candidate


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored. The share of rejects is no question here."""
    manifest = candidate.manifest()
    if not manifest["empty"]:
        ingest.audit_events(context, candidate, manifest)


def publish(context: Context, candidate: Candidate) -> Result:
    """Events, then the rejects that came good or have another reason now.

    Raises:
        Conflict: another run changed `bronze.events` since the candidate was computed.
    """
    lake, manifest = context.lake, candidate.manifest()
    result = Result(
        **manifest["counts"], rejects=manifest["rejects"], notes=manifest.get("notes", [])
    )
    if not manifest["empty"]:
        ingest.publish_events(context, candidate, manifest)
        if manifest["rejects_changed"]:
            ingest.change_rejects(context, candidate, "change")
        if result.events_new or result.events_replaced:
            result.notes.append(
                f"{EVENTS.full_name} has grown: python -m jobs run --source "
                f"{context.source.name} takes the sessions along (so does the next night)"
            )
    for table in (EVENTS, REJECTS):
        result.tables[table.full_name] = lake.told(table)
    return result
