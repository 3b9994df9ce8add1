"""The suite of `silver.sessions` under the gap rule, over the arrays of data files."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from expectations.session_rule import SessionRule
from jobs.audit.arrow_columns import dates, fingerprint, micros_array, one_array, words_of
from jobs.lake import filesystem
from jobs.silver.cut_nightly import near

SESSIONS_DDL = "holds boolean, events bigint, digest_xor bigint, digest_sum bigint, bounds string"


@dataclass(frozen=True)
class SessionsHold:
    """A task: a file of sessions, of the table or of a candidate.

    Its answer says whether each session keeps the checks that speak of it alone, the print of the
    events, and where the `bounds` are: for each session the hashes of its user and its id, and its
    first and last time (us), for `sessions_apart`.
    """

    rule: SessionRule
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        rows = read_sessions(path)
        if "change" in rows.column_names:
            rows = rows.filter(pc.not_equal(rows["change"], "retired")).combine_chunks()
        made = {"holds": True, "events": 0, "digest_xor": 0, "digest_sum": 0, "bounds": None}
        if not rows.num_rows:
            return [made]
        lists = one_array(rows["events"])
        flat = lists.flatten()
        flat_columns = ("session_id", "user_id", "start_ts", "end_ts", "start_date", "event_count")
        if any(rows[name].null_count for name in flat_columns) or lists.null_count:
            return [made | {"holds": False}]
        if flat.null_count or any(flat.field(n).null_count for n in ("event_id", "event_ts")):
            return [made | {"holds": False}]
        count = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        users = words_of(one_array(rows["user_id"]))
        start, end = micros_array(rows["start_ts"]), micros_array(rows["end_ts"])
        bounds = f"{self.folder}/{uuid.uuid4().hex}.parquet"
        ids = words_of(one_array(rows["session_id"]))
        filesystem.write_parquet(
            bounds, pa.table({"user": users, "id": ids, "start": start, "end": end})
        )
        return [
            made | fingerprint(np.repeat(users, count), words_of(flat.field("event_id")))
            | {"holds": self._hold(rows, flat, count, start, end), "bounds": bounds}
        ]  # fmt: skip

    def _hold(
        self, rows: pa.Table, flat: Any, count: np.ndarray, start: np.ndarray, end: np.ndarray
    ) -> bool:
        if count.min() < 1 or not np.array_equal(count, rows["event_count"].to_numpy()):
            return False
        times = micros_array(flat.field("event_ts"))
        first = np.cumsum(count) - count
        flags = one_array(rows["runaway"]).to_numpy(zero_copy_only=False)
        rule = self.rule.arrays
        inside = np.ones(len(times), bool)
        inside[first] = False
        before, after = times[:-1][inside[1:]], times[1:][inside[1:]]
        if not (
            np.array_equal(times[first], start)
            and np.array_equal(times[first + count - 1], end)
            and dates(rows["start_ts"]).equals(one_array(rows["start_date"]))
            and rule.flagged(flags, end - start, count).all()
            and ((before <= after) & rule.near(before, before, after, after)).all()
        ):
            return False
        tied = np.flatnonzero(inside[1:] & (np.diff(times) == 0))
        ties = (
            {n: flat.field(n).take(pa.array(at)) for n in self.rule.ties} for at in (tied, tied + 1)
        )
        return bool(rule.rise(*ties).all())


def read_sessions(path: str) -> pa.Table:
    """What the checks need of a file of sessions."""
    wanted = ("event_id", "event_ts", "tie_break")
    names = {"session_id", "user_id", "start_ts", "end_ts", "start_date", "event_count", "runaway"}
    with filesystem.open_seekable(path) as stream:
        file = filesystem.DataParquet(stream)
        columns = []
        for at in range(file.metadata.num_columns):
            place = file.metadata.schema.column(at).path.split(".")
            if place[0] in names | {"change"} or (place[0] == "events" and place[3] in wanted):
                columns.append(".".join(place))
        return file.read(columns, use_threads=False).combine_chunks()


@dataclass(frozen=True)
class Around:
    """A task: of a data file of `silver.sessions`, the bounds of the sessions that stand near
    those of a candidate and are none of it; see `SessionsHold`."""

    keys: str
    """A Parquet file, as `cut_nightly.keys_of` makes it: what the candidate touches."""
    ids: str
    """A Parquet file: `session_id` of the candidate's rows, retired ones too."""
    rule: SessionRule
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        rows = filesystem.read_parquet(path, ["session_id", "user_id", "start_ts", "end_ts"])
        keys = filesystem.read_parquet(self.keys)
        rows = rows.filter(pa.array(near(rows, keys, self.rule)))
        rows = rows.filter(
            pc.invert(pc.is_in(rows["session_id"], filesystem.read_parquet(self.ids)["session_id"]))
        ).combine_chunks()
        if not rows.num_rows:
            return []
        bounds = f"{self.folder}/{uuid.uuid4().hex}.parquet"
        made = {
            "user": words_of(one_array(rows["user_id"])), "id": words_of(one_array(rows["session_id"])),
            "start": micros_array(rows["start_ts"]), "end": micros_array(rows["end_ts"]),
        }  # fmt: skip
        filesystem.write_parquet(bounds, pa.table(made))
        return [{"bounds": bounds}]


def sessions_apart(bounds: list[str], rule: SessionRule) -> bool:
    """Whether sessions, by their bounds, are further apart than the gap, and their ids differ:
    surely not if this says so, and by the chance of a 64-bit hash if not."""
    if not bounds:
        return True
    rows = pa.concat_tables([filesystem.read_parquet(path) for path in bounds])
    user, ids, start, end = (rows[name].to_numpy() for name in ("user", "id", "start", "end"))
    ids = np.sort(ids)
    order = np.lexsort((start, user))
    user, start, end = user[order], start[order], end[order]
    silent = ~rule.arrays.near(start[:-1], end[:-1], start[1:], end[1:])
    return bool((ids[1:] != ids[:-1]).all() and (silent | (user[1:] != user[:-1])).all())
