"""What identification asks of data files, in tasks that take a file each: logins, events with their
persons, events whose person is another one now; and the audit of such rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core import person_ids
from jobs.core.arrow_types import arrow_schema
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.core.tables import PERSON_EVENTS
from jobs.lake import filesystem
from jobs.lake.change_feed import RETIRED
from jobs.lake.time_slices import micros
from jobs.silver import links

PATH_DDL = "path string, rows bigint"
PART_ROWS = 1_000_000
"""Ours: about so many rows of a file are looked at a time."""
SCHEMA = arrow_schema(PERSON_EVENTS.columns)


def parts_of(path: str, columns: list[str]) -> Iterator[pa.Table]:
    """Some columns of a file, a number of row groups at a time; those that it lacks are null."""
    with filesystem.data_file(path) as file:
        groups: list[int] = []
        rows, meta = 0, file.metadata
        for number in range(meta.num_row_groups):
            groups.append(number)
            rows += meta.row_group(number).num_rows
            if rows >= PART_ROWS or number == meta.num_row_groups - 1:
                found = file.read_row_groups(groups, columns, use_threads=False)
                yield found.combine_chunks()
                groups, rows = [], 0


def column_of(rows: pa.Table, name: str) -> pa.Array:
    """A column of texts as one array; null where an earlier version wrote the file without it."""
    if name not in rows.column_names:
        return pa.nulls(rows.num_rows, pa.string())
    found = rows[name].combine_chunks()
    return found.chunk(0) if isinstance(found, pa.ChunkedArray) else found


def written(folder: str, rows: pa.Table) -> list[dict[str, Any]]:
    """Write rows as a file of a folder; nothing where there are none."""
    if not rows.num_rows:
        return []
    path = f"{folder}/part-{uuid.uuid4().hex}.parquet"
    filesystem.write_parquet(path, rows)
    return [{"path": path, "rows": rows.num_rows}]


def ids_of(path: str | None) -> pa.Array | None:
    """The texts of a file with one column; None: no file was named."""
    if path is None:
        return None
    rows = filesystem.read_parquet(path)
    return column_of(rows, rows.column_names[0])


@dataclass(frozen=True)
class Logins:
    """A task: the logins in a file of events, as spans (`links.SPANS`)."""

    folder: str
    user: str
    """The column of the log's user."""
    only: str | None = None
    """A file: the anonymous ids that are asked for. None: all."""
    without: str | None = None
    """A file: ids of events that are gone. None: none is."""
    alone: bool = False
    """Whether each login is a span of its own."""

    def __call__(self, path: str) -> list[dict[str, Any]]:
        only, without = ids_of(self.only), ids_of(self.without)
        columns = ["anonymous_id", self.user, "event_ts"]
        columns += [] if without is None else ["event_id"]
        found = []
        for rows in parts_of(path, columns):
            names, users = column_of(rows, "anonymous_id"), column_of(rows, self.user)
            keep = pc.and_(pc.is_valid(names), pc.is_valid(users))
            if only is not None:
                keep = pc.and_(keep, pc.is_in(names, only))
            if without is not None:
                keep = pc.and_(keep, pc.invert(pc.is_in(column_of(rows, "event_id"), without)))
            times = pa.array(micros(rows["event_ts"]))
            names, users, times = (one.filter(keep) for one in (names, users, times))
            found.append(links.spans_of(names, users, times, alone=self.alone))
        spans = pa.concat_tables([links.SPANS.empty_table(), *found])
        return written(self.folder, spans)


def persons(users: pa.Array, names: pa.Array, times: np.ndarray, given: pa.Table) -> pa.Array:
    """The person of each event.

    Args:
        users, names: the log's user and anonymous id.
        times: of the events (us); given: links.
    """
    anonymous = pc.is_null(users)
    whose = person_ids.of_users(users)
    if not users.null_count:
        return whose
    at = np.flatnonzero(anonymous.to_numpy(zero_copy_only=False))
    theirs = names.take(pa.array(at))
    found = person_ids.of_users(links.linked(given, theirs, times[at]))
    found = pc.coalesce(found, person_ids.of_anonymous(theirs))
    return pc.replace_with_mask(whose, anonymous, found)


def placed(events: pa.Table, given: pa.Table) -> pa.Table:
    """Events of the log as rows of `silver.events`.

    Args:
        events: `user_id` is the log's.
    """
    users, names = column_of(events, "user_id"), column_of(events, "anonymous_id")
    whose = persons(users, names, micros(events["event_ts"]), given)
    made = {"user_id": whose, "log_user_id": users, "anonymous_id": names}
    made[BOUNDARY_VALUES] = column_of(events, BOUNDARY_VALUES)
    columns = [made[name] if name in made else events[name] for name in SCHEMA.names]
    return pa.table(columns, names=SCHEMA.names).cast(SCHEMA)


@dataclass(frozen=True)
class Place:
    """A task: a file of `bronze.events` -> files of `silver.events`."""

    links: str
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        given = filesystem.read_parquet(self.links)
        columns = [name for name in SCHEMA.names if name != "log_user_id"]
        parts = (placed(rows, given) for rows in parts_of(path, columns))
        return [one for part in parts for one in written(self.folder, part)]


@dataclass(frozen=True)
class Moved:
    """A task: the rows of a file of `silver.events` whose person is another one now, with that one."""

    links: str
    folder: str
    only: str | None = None
    """A file: the anonymous ids whose links changed. None: any may have."""

    def __call__(self, path: str) -> list[dict[str, Any]]:
        given, only = filesystem.read_parquet(self.links), ids_of(self.only)
        found = []
        with filesystem.data_file(path) as file:
            for number in range(file.num_row_groups):
                keys = ["log_user_id", "anonymous_id", "event_ts", "user_id"]
                rows = file.read_row_group(number, keys, use_threads=False).combine_chunks()
                mask = pc.is_null(rows["log_user_id"])
                if only is not None:
                    mask = pc.and_(mask, pc.is_in(rows["anonymous_id"], only))
                at = np.flatnonzero(mask.to_numpy())
                some = rows.take(pa.array(at)).combine_chunks()
                users, names = (column_of(some, one) for one in keys[:2])
                whose = persons(users, names, micros(some["event_ts"]), given)
                moved = pc.not_equal(whose, column_of(some, "user_id"))
                if not pc.any(moved).as_py():
                    continue
                at = at[moved.to_numpy(zero_copy_only=False)]
                rows = file.read_row_group(number, SCHEMA.names, use_threads=False)
                rows = rows.take(pa.array(at))
                made = [
                    column_of(rows, BOUNDARY_VALUES) if name == BOUNDARY_VALUES else rows[name]
                    for name in SCHEMA.names
                ]
                rows = pa.table(made, names=SCHEMA.names).cast(SCHEMA)
                place = SCHEMA.get_field_index("user_id")
                found.append(rows.set_column(place, SCHEMA.field(place), whose.filter(moved)))
        return written(self.folder, pa.concat_tables(found)) if found else []


def counted(path: str, given: str, wrong: str, broken: tuple[str, ...]) -> dict[str, Any]:
    """How many rows of a file of `silver.events`, or of a candidate, some SQL gives.

    Args:
        given: a file of links, `identities`; the rows are `events`.
        wrong, broken: counted apart.
    """
    found = {"wrong": 0, "broken": 0}
    with duckdb.connect(config={"threads": 1}) as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("identities", filesystem.read_parquet(given))
        for rows in parts_of(path, [*AUDITED, "change"]):
            if "change" in rows.column_names:
                rows = rows.filter(pc.not_equal(rows["change"], RETIRED))
            db.register("events", rows.select(AUDITED))
            for name, query in (("wrong", wrong), *(("broken", one) for one in broken)):
                row = db.execute(f"SELECT count(*) FROM ({query})").fetchone()
                assert row is not None
                found[name] += int(row[0])
    return found


AUDITED = ["event_id", "user_id", "log_user_id", "anonymous_id", "event_ts"]
