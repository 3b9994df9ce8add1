"""A first load of events by slices of time: repeats are neighbours, one task writes one file."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs.bronze import file_order
from jobs.core.arrays import rows_at, run_starts
from jobs.core.arrow_types import arrow_schema
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.lake import filesystem

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
from jobs.lake.time_slices import CLOCK, micros, read


def without_repeats(events: pa.Table) -> tuple[pa.Table, int]:
    """Sort the lines of one slice of time by time, and keep one of each event: of lines that are
    one event, the first by anonymous id and boundary values (none last), file and line.

    Args:
        events: `event_id` (equal ids have equal times), `event_ts`, `anonymous_id`, `boundary_values`,
            `file`, `line`, and others.

    Returns:
        The events, and how many lines were repeats.
    """
    times = events["event_ts"].combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
    order = np.argsort(times, kind="stable")
    times = times[order]
    first = run_starts(times)
    same = ~first[1:]
    tied = np.zeros(len(order), bool)
    tied[1:] |= same
    tied[:-1] |= same
    at = np.flatnonzero(tied)
    keep = np.ones(len(order), bool)
    if len(at):
        rows = events.select(
            ["event_id", "anonymous_id", *which_of(events, BOUNDARY_VALUES), "file", "line"]
        ).take(pa.array(order[at]))
        rows = rows.cast(_texts(rows.schema))
        run = np.cumsum(first)[at]
        keys = [("run", "ascending"), *((name, "ascending") for name in rows.column_names)]
        places = pc.sort_indices(rows.append_column("run", pa.array(run)), keys)
        order[at] = order[at][places.to_numpy()]
        ids = pc.dictionary_encode(rows["event_id"].take(places).combine_chunks()).indices
        codes = ids.to_numpy(zero_copy_only=False)
        keep[at] = run_starts(codes, run)
    return rows_at(events, order[keep]), int((~keep).sum())


def _texts(schema: pa.Schema) -> pa.Schema:
    """A schema with texts in place of dictionaries: these cannot be sorted by."""
    kinds = [one.value_type if pa.types.is_dictionary(one) else one for one in schema.types]
    return pa.schema(list(zip(schema.names, kinds, strict=True)))


def which_of(rows: pa.Table, name: str) -> list[str]:
    """The column, if it is there and not null throughout: sorting by it costs."""
    there = name in rows.column_names and rows[name].null_count < rows.num_rows
    return [name] if there else []


@dataclass(frozen=True)
class AtTimes:
    """A task: of a file of `bronze.events`, the events at some times, in the columns asked for.

    Ids are hashes that no codec shortens: two thirds of the table's bytes. Where they follow from
    other columns, they are better made again for the few events found than read for all.
    """

    times: str
    """A Parquet file: `event_ts`, rising, each once."""
    columns: tuple[str, ...]
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        wanted = micros(filesystem.read_parquet(self.times)["event_ts"])
        found = []
        with filesystem.data_file(path) as file:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number, ["event_ts"], use_threads=False)
                hit = at_times(micros(rows["event_ts"]), wanted)
                if len(hit):
                    rows = file.read_row_group(number, list(self.columns), use_threads=False)
                    found.append(rows.take(pa.array(hit)))
        if not found:
            return []
        out = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        filesystem.write_parquet(out, pa.concat_tables(found))
        return [{"path": out}]


def at_times(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64[N]: the places at which `times` has one that is wanted (rising, each once)."""
    if not len(times):
        return np.zeros(0, np.int64)
    low, high = np.searchsorted(wanted, [times.min(), times.max() + 1])
    near = wanted[low:high]  # few: they stay in the cache
    if not len(near):
        return np.zeros(0, np.int64)
    place = np.minimum(np.searchsorted(near, times), len(near) - 1)
    return np.flatnonzero(near[place] == times)


def _coded(schema: pa.Schema, rows: pa.Table) -> pa.Schema:
    """A schema with dictionaries where rows have them."""
    for at, name in enumerate(schema.names):
        kind = rows.schema.field(name).type
        if pa.types.is_dictionary(kind):
            schema = schema.set(at, pa.field(name, kind))
    return schema


LISTED = "exposed_with_listed"


def without_null_lists(events: DataFrame) -> DataFrame:
    """Null lists as empty ones, marked by a column of their own: a null list costs Spark's way to
    Python time in proportion to its place in the batch (LAB_LOG.md)."""
    from pyspark.sql import functions as F

    shown = F.col("exposed_with")
    return events.withColumn(LISTED, shown.isNotNull()).withColumn(
        "exposed_with", F.coalesce(shown, F.array().cast("array<string>"))
    )


def with_null_lists(events: pa.Table) -> pa.Table:
    at = events.column_names.index("exposed_with")
    lists = pc.if_else(events[LISTED], events["exposed_with"], None)
    return events.set_column(at, "exposed_with", lists)


CODED = ("file", "feedback")
"""Columns of a line that are moved as dictionaries, because they have few values in a slice
(LAB_LOG.md)."""

LAID_DDL = "path string, rows long, repeats long"


@dataclass(frozen=True)
class Layer:
    """Writes the lines of one slice of time as one file of `bronze.events`."""

    columns: dict[str, str]
    """Of `bronze.events`, with their types."""
    folder: str
    when: datetime
    """`ingest_ts` of the events."""
    file_order: bool = False
    """Whether events of one user and time are in the order of their files."""

    @property
    def lines(self) -> dict[str, str]:
        """The columns of a line that are read."""
        own = {n: kind for n, kind in self.columns.items() if not n.startswith("ingest_")}
        return own | {"file": "string", "line": "bigint", "reason": "string"}

    def lay(self, lines: pa.Table) -> pa.RecordBatch:
        """Writes one file; returns a row of `LAID_DDL`.

        A file's name is made up anew by each attempt, so that two attempts never write the same.
        """
        events, repeats = without_repeats(lines)
        if self.file_order:
            events = file_order.placed(events)
        path = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        stamps = pa.repeat(pa.scalar(self.when, CLOCK), events.num_rows)
        events = events.append_column("ingest_file", events["file"])
        events = events.append_column("ingest_ts", stamps)
        schema = arrow_schema(self.columns)
        filesystem.write_parquet(path, events.select(schema.names).cast(_coded(schema, events)))
        return pa.RecordBatch.from_pydict(
            {"path": [path], "rows": [events.num_rows], "repeats": [repeats]}
        )

    def of_lines(self, batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        """For `mapInArrow` over lines of which each partition is a slice."""
        lines = list(batches)
        if lines:
            # (Rows are taken from one chunk many times faster than from many.)
            yield self.lay(with_null_lists(pa.Table.from_batches(lines).combine_chunks()))

    def of_files(self, batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        """For `mapInArrow` over slices, as `frame` has them, of files of lines."""
        usable = ds.field("reason").is_null()
        for batch in batches:
            for one in batch.to_pylist():
                coded = () if self.file_order else CODED
                lines = read(one["paths"], self.lines, one["low"], one["high"], usable, coded)
                if lines.num_rows:
                    yield self.lay(lines)
