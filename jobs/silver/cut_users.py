"""All sessions anew by slices of users, in tasks: for native sessions, which are local in no time.

Three rounds over Arrow files, in which each record batch is for one task of the next round: events by
slice of users, sessions (cut) by slice of time, data files. (Spark's own shuffle, with the same cut
in the middle, converts every row between the two several times: LAB_LOG.md.)
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import SESSIONS
from jobs.lake import filesystem
from jobs.lake.time_slices import micros, read
from jobs.silver.cut_arrow import Cut, cut

PATH_DDL = "path string"


def parted(rows: pa.Table, place: np.ndarray, parts: int, folder: str) -> list[dict[str, Any]]:
    """Write an Arrow file with a record batch for each part.

    Args:
        place: the part of each row, from 0.
    """
    order = np.argsort(place, kind="stable")
    ends = np.searchsorted(place[order], np.arange(parts + 1))
    out = f"{folder}/{uuid.uuid4().hex}.arrow"
    nothing = [pa.array([], kind) for kind in rows.schema.types]
    with filesystem.open_new(out) as stream, pa.ipc.new_file(stream, rows.schema) as writer:
        for part in range(parts):
            some = rows.take(pa.array(order[ends[part] : ends[part + 1]])).combine_chunks()
            batches = some.to_batches()
            batch = (
                batches[0] if batches else pa.RecordBatch.from_arrays(nothing, rows.schema.names)
            )
            writer.write_batch(batch)
    return [{"path": out}]


def gathered(paths: tuple[str, ...], part: int, schema: pa.Schema) -> pa.Table:
    """The rows of a part, from all files."""

    def found() -> Iterator[pa.Table]:
        yield schema.empty_table()
        for path in paths:
            with filesystem.open_seekable(path) as stream:
                batch = pa.ipc.open_file(stream).get_batch(part)
                yield pa.Table.from_batches([batch])

    return pa.concat_tables(found()).combine_chunks()


@dataclass(frozen=True)
class ByUser:
    """The first round's task: a file of `bronze.events` -> its events by slices of users."""

    how: Cut
    parts: int
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        columns = {name: self.how.events[name] for name in ("user_id", *self.how.reads)}
        rows = read([path], columns, None, None)
        users = pc.dictionary_encode(rows["user_id"].combine_chunks())
        names = users.dictionary.to_pylist()
        slices = np.array([zlib.crc32(name.encode()) % self.parts for name in names], np.int64)
        return parted(rows, slices[users.indices.to_numpy()], self.parts, self.folder)


@dataclass(frozen=True)
class CutUsers:
    """The second round's task: a slice of users -> their sessions by slices of time."""

    how: Cut
    paths: tuple[str, ...]
    edges: tuple[int, ...]
    """Times (us) at which a slice begins, rising; the first one has no edge."""
    folder: str

    def __call__(self, part: int) -> list[dict[str, Any]]:
        names = ("user_id", *self.how.reads)
        schema = arrow_schema({name: self.how.events[name] for name in names})
        sessions, _ = cut(gathered(self.paths, part, schema), self.how)
        place = np.searchsorted(
            np.array(self.edges, np.int64), micros(sessions["start_ts"]), "right"
        )
        return parted(sessions, place, len(self.edges) + 1, self.folder)


@dataclass(frozen=True)
class LayOut:
    """The third round's task: a slice of time -> a data file of `silver.sessions`."""

    paths: tuple[str, ...]
    folder: str

    def __call__(self, part: int) -> list[dict[str, Any]]:
        rows = gathered(self.paths, part, arrow_schema(SESSIONS.columns))
        if not rows.num_rows:
            return []
        out = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        rows = rows.take(pc.sort_indices(rows["start_ts"]))
        filesystem.write_parquet(out, rows, SESSIONS.group)
        return [{"path": out}]
