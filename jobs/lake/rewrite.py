"""Rows of a table replaced by their key: files that hold some are written anew, in Arrow.

What Delta's MERGE does, without its join, its two passes over whole rows and its planning: the keys
are known, so each task looks at the key column of one file and leaves it alone if there is none of
them. New rows come in files of their own. One commit takes the old files out and puts the new ones
in; where the table has a change feed, it says row by row what became of what.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.arrow_types import arrow_schema
from jobs.lake import filesystem
from jobs.lake.change_feed import AFTER, BEFORE, TYPE

CHANGE_FEED = "_change_data"
DDL = "old string, new string, feed string"


def _with_type(rows: pa.Table, change: pa.ChunkedArray, words: dict[str, str]) -> pa.Table:
    kinds = pa.array(list(words), pa.string())
    said = pa.array(list(words.values()), pa.string()).take(pc.index_in(change, kinds))
    return rows.append_column(TYPE, said)


@dataclass(frozen=True)
class Rewrite:
    """A task: a data file, without the rows of the keys; nothing, if it has none of them."""

    columns: dict[str, str]
    key: str
    keys: str
    """A Parquet file: the key, and its `change` (changed, retired)."""
    folder: str
    """Of the new files."""
    feed: str | None
    """Of the change feed's files; None: the table has none."""
    group: int | None
    """Rows of a row group; None: the writer's."""

    def __call__(self, path: str) -> list[dict[str, Any]]:
        keys = filesystem.read_parquet(self.keys)
        place = pc.index_in(filesystem.read_parquet(path, [self.key])[self.key], keys[self.key])
        if place.null_count == len(place):
            return []
        schema = arrow_schema(self.columns)
        rows = filesystem.read_parquet(path, schema.names).cast(schema)
        hit = pc.is_valid(place)
        kept = rows.filter(pc.invert(hit))
        new, told = None, None
        if kept.num_rows:
            new = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
            filesystem.write_parquet(new, kept, self.group)
        if self.feed is not None:
            told = f"{self.feed}/cdc-{uuid.uuid4().hex}.parquet"
            change = keys["change"].take(place.drop_null())
            filesystem.write_parquet(told, _with_type(rows.filter(hit), change, BEFORE))
        return [{"old": path, "new": new, "feed": told}]


@dataclass(frozen=True)
class Put:
    """A task: a file of a candidate, with a column `change`, as a data file of the table."""

    columns: dict[str, str]
    folder: str
    feed: str | None

    def __call__(self, path: str) -> list[dict[str, Any]]:
        schema = arrow_schema(self.columns)
        rows = filesystem.read_parquet(path, [*schema.names, "change"])
        rows = rows.filter(pc.is_in(rows["change"], pa.array(list(AFTER))))
        if not rows.num_rows:
            return []
        new = f"{self.folder}/part-{uuid.uuid4().hex}.parquet"
        put, told = rows.select(schema.names).cast(schema), None
        filesystem.write_parquet(new, put)
        if self.feed is not None:
            told = f"{self.feed}/cdc-{uuid.uuid4().hex}.parquet"
            filesystem.write_parquet(told, _with_type(put, rows["change"], AFTER))
        return [{"old": None, "new": new, "feed": told}]
