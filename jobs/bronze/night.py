"""A night that one process takes: its lines read, typed and compared with the stored events, without a JVM.

Taken are text files of at most `Thresholds.read_bytes` of which every line is an everyday one, late, or
no event for a reason that is sure (`typed_arrow`). A line that is not is left to Spark, and with it
the run. What becomes of lines is what `stored_events.judge` and `ranked` say, where ids are hashes
of their lines and nobody is known by an anonymous id: so no line replaces a stored event, and a
stored event is the line's if all columns agree that the id is a hash of. The generated histories
compare both with the oracle.

Decision 2 in docs/design/decisions.md.
"""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from jobs.bronze import first_load, landing
from jobs.bronze.manifest import IngestManifest
from jobs.bronze.stored_events import files_at_times
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import CHANGED_EVENTS, DELIVERIES, EVENTS, FILTERED, REJECTS
from jobs.lake import filesystem
from jobs.lake.context import Candidate, Context
from jobs.lake.data_files import staging
from jobs.reading.readers import reader
from jobs.reading.typed_arrow import ASIDE, WRITTEN, Typer, Typing
from jobs.reading.typed_events import hashed
from jobs.records import ranges
from jobs.records.records import Format
from jobs.sources import tables

LINES = WRITTEN | ASIDE
LINES_DDL = ", ".join(f"{name} {kind}" for name, kind in LINES.items())
PART = "here"  # the file of lines


def possible(context: Context, files: list[str]) -> bool:
    """Whether this source, its tables and these files are such that one process can say what becomes of
    lines."""
    source, lake = context.source, context.lake
    columns = source.columns
    others = (
        columns.event_id is not None
        or columns.file_order
        or "anonymous_id" in source.mapped()
        or source.boundary_reads_log
        or source.leaves_out
        or source.agents is not None
        or source.source.redelivery == "replace"
        or any(lake.version(one) is not None for one in (FILTERED, DELIVERIES))
        or lake.rows(CHANGED_EVENTS) > 0
        or lake.only_spark(EVENTS)
        or lake.only_spark(REJECTS)
    )
    return not (others or landing.rejected_before(context, files))


def parse(context: Context, candidate: Candidate, chosen: list[tuple[str, int, int]]) -> bool:
    """`landing.parse` in this process, if it can take these files; False: it cannot, and nothing is
    kept."""
    if not context.thresholds.read_here(sum(size for _, size, _ in chosen)):
        return False
    typing = Typing.of(context.source, landing.oldest_day(context), aside=True)
    if typing is None or not typing.aside or not possible(context, [path for path, *_ in chosen]):
        return False
    fmt = replace(landing.reading_format(context), table=tables.schema_of(context.source))
    filesystem.remove(candidate.path(landing.TASKS_FACTS))  # (of an attempt that was killed)
    if not read(candidate, fmt, typing, chosen):
        return False
    landing.remember(context, candidate, landing.facts_of_tasks(context, candidate, chosen))
    return True


def is_here(candidate: Candidate) -> bool:
    """Whether the lines of a candidate were read so."""
    return filesystem.exists(f"{candidate.path('lines')}/{PART}.parquet")


def read(
    candidate: Candidate, fmt: Format, typing: Typing, chosen: list[tuple[str, int, int]]
) -> bool:
    """Read and type files; False: a line is not an everyday one, and nothing is kept."""
    rows = [astuple(ranges.Range(path)) for path, *_ in chosen]
    names = [one.split(" ")[0] for one in ranges.DDL.split(", ")]
    asked = pa.RecordBatch.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
    typer = Typer(typing, candidate.path("lines"), PART)
    for left in reader(fmt, candidate.path(landing.TASKS_FACTS), lambda _: typer)([asked]):
        if left.num_rows:
            typer.close()
            filesystem.remove(candidate.path("lines"))
            return False
    if not candidate.files("lines"):
        filesystem.write_parquet(typer.path, typing.schema.empty_table())
    candidate.adopt("lines", LINES_DDL)
    return True


def fill(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Stage the events and the rejects of the candidate's lines, and count."""
    lake, oldest = context.lake, landing.oldest_day(context)
    lines = candidate.arrow("lines")
    usable = lines.filter(pc.is_null(lines["reason"]))
    stored = is_stored(context, candidate, manifest, usable)
    early = pc.less(usable["event_date"], oldest) if oldest else pa.nulls(len(usable), pa.bool_())
    early = pc.fill_null(early, False)
    fresh = usable.filter(pc.and_not(pc.invert(stored), early))
    late = usable.filter(pc.and_(pc.invert(stored), early))
    folder = staging(context.run_id)
    layer = first_load.Layer(EVENTS.columns, f"{lake.path(EVENTS)}/{folder}", context.started)
    manifest.staged, repeats = [], 0
    if fresh.num_rows:
        [done] = layer.lay(fresh.select(list(layer.lines))).to_pylist()
        manifest.staged = lake.entries(EVENTS, folder, [done["path"]])
        manifest.counts.events_new, repeats = done["rows"], done["repeats"]
    manifest.counts.duplicates = (pc.sum(stored).as_py() or 0) + repeats
    aside = pa.concat_tables([lines.filter(pc.is_valid(lines["reason"])), _as_late(late)])
    fill_rejects(context, candidate, manifest, aside)


def _as_late(lines: pa.Table) -> pa.Table:
    at = lines.column_names.index("reason")
    return lines.set_column(at, "reason", pa.repeat("late", len(lines)).cast(pa.string()))


def is_stored(
    context: Context, candidate: Candidate, manifest: IngestManifest, usable: pa.Table
) -> pa.ChunkedArray:
    """bool[N]: whether `bronze.events` has the event of a line: one that agrees with it in all columns
    that ids are hashes of."""
    nothing = pa.chunked_array([pa.repeat(False, len(usable))])
    found = files_at_times(context, candidate, usable["event_ts"], manifest.base[EVENTS.full_name])
    if not found:
        return nothing
    names = [one for one in hashed(context.source) if one != "anonymous_id"]
    stored = pa.concat_tables([filesystem.read_parquet(path) for path in found])
    places = pa.array(range(len(usable)))
    same = " AND ".join(f"l.{one} IS NOT DISTINCT FROM s.{one}" for one in names)
    with duckdb.connect(config={"threads": 1}) as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("usable", usable.select(names).append_column("place", places))
        db.register("stored", stored)
        sql = f"SELECT place FROM usable l WHERE EXISTS (SELECT 1 FROM stored s WHERE {same})"
        there = db.sql(sql).to_arrow_table()["place"]
    return pa.chunked_array([pc.is_in(places, there.combine_chunks())])


def fill_rejects(
    context: Context, candidate: Candidate, manifest: IngestManifest, lines: pa.Table
) -> None:
    """Stage lines that make no event; none of their files has rejects yet."""
    headers = {one.file: one.header for one in landing.facts_read(candidate)}
    files = lines["file"].to_pylist()
    count = len(files)
    made: dict[str, Any] = {
        name: lines[name] for name in ("raw", "reason", "file", "line", "raw_hash", "element")
    } | {
        "run_day": pa.array([context.day] * count, pa.date32()),
        "first_seen_ts": pa.array([context.started] * count, pa.timestamp("us", "UTC")),
        "file_columns": pa.array(
            [list(header) if (header := headers[one]) else None for one in files],
            pa.list_(pa.string()),
        ),
    }
    schema = arrow_schema(REJECTS.columns)
    rows = pa.table([made[one.name] for one in schema], names=schema.names).cast(schema)
    filesystem.write_parquet(f"{candidate.path('rejects')}/part-0.parquet", rows)
    candidate.adopt("rejects", REJECTS.ddl)
    counted = pc.value_counts(rows["reason"].combine_chunks()).to_pylist()
    manifest.rejects = {one["values"]: one["counts"] for one in counted}
    if not count:
        return
    key = [rows[name].to_pylist() for name in REJECTS.key]
    first = {one: at for at, one in reversed(list(enumerate(zip(*key, strict=True))))}
    folder = staging(context.run_id)
    path = f"{context.lake.path(REJECTS)}/{folder}/part-0.parquet"
    filesystem.write_parquet(path, rows.take(pa.array(sorted(first.values()))))
    manifest.rejects_staged = context.lake.entries(REJECTS, folder, [path])
