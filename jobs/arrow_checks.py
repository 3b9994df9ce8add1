"""Whether suites hold of many rows, asked of data files in Arrow: all of them hold, or not.

The checks of `expectations/` over flat arrays, in tasks that take a file each. The answer is that
all holds, or nothing: then `jobs/validate.py` asks Spark row by row, in the suite's own words, and
names what does not. (`tests/test_audit.py` breaks tables in every way that the suites know.)
"""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import files
from jobs.increments import near
from jobs.slices import CLOCK
from jobs.tables import FEEDBACK

# -- events whose ids are hashes of their lines ---------------------------------------------------

EVENTS_DDL = "holds boolean, first bigint, last bigint"
FIRST_YEAR_US, LAST_YEAR_US = -62_135_596_800_000_000, 253_402_300_799_999_999


def events_hold(path: str) -> list[dict[str, Any]]:
    """Whether a file of `bronze.events` keeps the checks of rows in `expectations/events.py`, each
    id once; and its `first` and `last` time (us), for `apart`: equal ids have equal times."""
    names = ["event_id", "user_id", "item_id", "event_ts", "event_date", "feedback", "value",
             "exposed_with"]  # fmt: skip
    rows = files.read_parquet(path, names)
    if not rows.num_rows:
        return [{"holds": True, "first": None, "last": None}]
    if any(rows[name].null_count for name in names[:6]):
        return [{"holds": False, "first": None, "last": None}]
    times = _us(rows["event_ts"])
    value = rows["value"].drop_null().to_numpy()
    shown = _one(rows["exposed_with"]).flatten()
    hashes = np.sort(words_of(_one(rows["event_id"])))
    holds = (
        bool((hashes[1:] != hashes[:-1]).all())
        and pc.min(pc.binary_length(rows["event_id"])).as_py() > 0
        and times.min() >= FIRST_YEAR_US
        and times.max() <= LAST_YEAR_US
        and _dates(rows["event_ts"]).equals(_one(rows["event_date"]))
        and pc.all(pc.is_in(rows["feedback"], pa.array(FEEDBACK))).as_py()
        and bool(np.isfinite(value).all())
        and shown.null_count == 0
        and pc.any(pc.equal(shown, "")).as_py() is not True
    )
    return [{"holds": bool(holds), "first": int(times.min()), "last": int(times.max())}]


def _dates(times: Any) -> Any:
    return _one(times).cast(CLOCK).cast(pa.timestamp("us")).cast(pa.date32())


# -- sequences ------------------------------------------------------------------------------------

SEQUENCES_DDL = "holds boolean, first string, last string, positions bigint"


def sequences_hold(path: str) -> list[dict[str, Any]]:
    """Whether a file of `gold.sequences` keeps the suite of `expectations/sequences.py`, each user
    once and in order of `user_id`; its `first` and `last` user, for `apart`; and its positions."""
    rows = files.read_parquet(path)
    users = rows["user_id"].combine_chunks()
    if not len(users):
        return [{"holds": True, "first": None, "last": None, "positions": 0}]
    positions = int(pc.sum(pc.list_value_length(rows["item_index"])).as_py() or 0)
    ends = {"first": users[0].as_py(), "last": users[-1].as_py(), "positions": positions}
    risen = pc.all(pc.less(users[:-1], users[1:])).as_py() is not False
    return [{"holds": users.null_count == 0 and risen and _arrays_hold(rows), **ends}]


def apart(held: list[dict[str, Any]]) -> bool:
    """Whether no file begins before another, of those that begin earlier, has ended."""
    ends = sorted((one["first"], one["last"]) for one in held if one["first"] is not None)
    return all(one[1] < other[0] for one, other in itertools.pairwise(ends))


def _arrays_hold(rows: pa.Table) -> bool:
    lists = {
        name: rows[name].combine_chunks()
        for name in ("item_index", "event_ts", "session_ordinal", "feedback", "exposed_items")
    }
    if any(one.null_count for one in lists.values()):
        return False
    size = pc.list_value_length(lists["item_index"])
    if not all(pc.list_value_length(one).equals(size) for one in lists.values()):
        return False
    flat = {name: one.flatten() for name, one in lists.items()}
    shown = flat["exposed_items"]
    if any(one.null_count for one in flat.values()) or shown.flatten().null_count:
        return False
    count = size.to_numpy(zero_copy_only=False)
    if count.min() < 1:
        return False
    first = np.cumsum(count) - count
    inside = np.ones(int(count.sum()), bool)
    inside[first] = False
    times = flat["event_ts"].cast(CLOCK).cast(pa.int64()).to_numpy()
    ordinal = flat["session_ordinal"].to_numpy()
    step = np.diff(ordinal)[inside[1:]]
    return bool(
        (flat["item_index"].to_numpy() >= 1).all()
        and (shown.flatten().to_numpy() >= 1).all()
        and (np.diff(times)[inside[1:]] >= 0).all()
        and (ordinal[first] == 1).all()
        and ((step == 0) | (step == 1)).all()
        and pc.all(pc.is_in(flat["feedback"], pa.array(FEEDBACK))).as_py() is not False
    )


# -- recommendations ------------------------------------------------------------------------------

LISTS_DDL = (
    "holds boolean, first string, last string, version string, rows bigint, least bigint, "
    "most bigint, items array<string>"
)


def recommendations_hold(path: str) -> list[dict[str, Any]]:
    """Whether a file of `gold.recommendations` keeps the checks of rows in
    `expectations/recommendations.py`, all of one model version and each user once and in order;
    its `first` and `last` user, for `apart`; its shortest and longest list, and all its items."""
    rows = files.read_parquet(path)
    users, lists = rows["user_id"].combine_chunks(), rows["items"].combine_chunks()
    version = pc.unique(rows["model_version"])
    size = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    flat = lists.flatten()
    item, score = flat.field("item_id"), flat.field("score").to_numpy(zero_copy_only=False)
    names = pc.unique(item)
    code = pc.index_in(item, names).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(size)), size)
    pairs = np.sort(row * (len(names) + 1) + code)
    inside = row[1:] == row[:-1]
    holds = (
        len(users) > 0
        and users.null_count == 0
        and len(version) == 1
        and pc.all(pc.less(users[:-1], users[1:])).as_py() is not False
        and size.min() >= 1
        and item.null_count == 0
        and pc.any(pc.equal(names, "")).as_py() is not True
        and bool((pairs[1:] != pairs[:-1]).all())
        and bool(np.isfinite(score).all())
        and bool((np.diff(score)[inside] <= 0).all())
    )
    ends = {"first": users[0].as_py(), "last": users[-1].as_py()} if len(users) else {}
    return [{
        "holds": bool(holds), "first": None, "last": None, **ends, "rows": len(users),
        "version": version[0].as_py() if len(version) else None,
        "least": int(size.min(initial=0)) if len(size) == 0 else int(size.min()),
        "most": int(size.max(initial=0)), "items": names.to_pylist(),
    }]  # fmt: skip


# -- sessions, under the gap rule -----------------------------------------------------------------

SESSIONS_DDL = "holds boolean, events bigint, digest_xor bigint, digest_sum bigint, bounds string"
PRINT_DDL = "events bigint, digest_xor bigint, digest_sum bigint"
MOST_SESSIONS = 10_000_000
"""Ours: the bounds of so many sessions are compared in one place, 32 bytes each."""
ID_BYTES = 32  # of a hash as text
ODD = np.uint64(0x9E3779B97F4A7C15)


def words_of(texts: pa.Array) -> np.ndarray:
    """A 64-bit hash of each text, the same wherever the text stands: uint64[N]."""
    texts = texts.cast(pa.string())
    if not len(texts):
        return np.zeros(0, np.uint64)
    hashes: np.ndarray
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset :][: len(texts) + 1]
    ours = np.diff(offsets) == ID_BYTES
    if ours.all():  # our own hashes, of 20 million events in a second
        block = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        words = block.view(np.uint64).reshape(len(texts), ID_BYTES // 8)
        mixed = np.zeros(len(texts), np.uint64)
        for place in range(words.shape[1]):
            mixed = (mixed ^ (mixed >> np.uint64(29))) * ODD + words[:, place]
        return _scattered(mixed)
    if ours.any():
        hashes = np.empty(len(texts), np.uint64)
        for mask in (ours, ~ours):
            hashes[mask] = words_of(texts.filter(pa.array(mask)))
        return hashes
    coded = pc.dictionary_encode(texts)
    names = coded.dictionary.to_numpy(zero_copy_only=False).astype(object)
    hashed: np.ndarray = pd.util.hash_array(names, categorize=False)
    hashes = hashed[coded.indices.to_numpy(zero_copy_only=False)]
    return hashes


def _scattered(number: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit (the end of splitmix64)."""
    mixed: np.ndarray
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = number ^ (number >> np.uint64(31))
    return mixed


def _print(users: np.ndarray, events: np.ndarray) -> dict[str, int]:
    """A print of a set of events of users, that does not depend on their order."""
    digest = _scattered(users * ODD ^ events)
    xor, total = np.bitwise_xor.reduce(digest), digest.sum(dtype=np.uint64)
    return {
        "events": len(digest),
        "digest_xor": int(np.uint64(xor).astype(np.int64)),
        "digest_sum": int(np.uint64(total).astype(np.int64)),
    }


def joined(prints: list[dict[str, Any]]) -> tuple[int, int, int]:
    """The print of all files together: events, xor, sum."""
    xor = 0
    for one in prints:
        xor ^= one["digest_xor"]
    total = sum(one["digest_sum"] for one in prints) % 2**64
    return sum(one["events"] for one in prints), xor, total


def print_of_events(path: str) -> list[dict[str, Any]]:
    """The print of a data file of `bronze.events`."""
    with files.open_seekable(path) as stream:
        rows = pq.ParquetFile(stream, read_dictionary=["user_id"]).read(
            ["user_id", "event_id"], use_threads=False
        )
    parts = []
    for batch in rows.to_batches():
        users = batch["user_id"]
        hashed = words_of(users.dictionary)[users.indices.to_numpy(zero_copy_only=False)]
        parts.append(_print(hashed, words_of(batch["event_id"])))
    events, xor, total = joined(parts)
    signed = total - 2**64 if total >= 2**63 else total
    return [{"events": events, "digest_xor": xor, "digest_sum": signed}]


@dataclass(frozen=True)
class SessionsHold:
    """A task: a file of sessions, of the table or of a candidate.

    Its answer says whether each session keeps the checks that speak of it alone, the print of the
    events, and where the `bounds` are: for each session the hashes of its user and its id, and its
    first and last time (us), for `sessions_apart`.
    """

    gap_us: int
    max_session_us: int
    max_session_events: int
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        rows = read_sessions(path)
        if "change" in rows.column_names:
            rows = rows.filter(pc.not_equal(rows["change"], "retired")).combine_chunks()
        made = {"holds": True, "events": 0, "digest_xor": 0, "digest_sum": 0, "bounds": None}
        if not rows.num_rows:
            return [made]
        lists = _one(rows["events"])
        flat = lists.flatten()
        flat_columns = ("session_id", "user_id", "start_ts", "end_ts", "start_date", "event_count")
        if any(rows[name].null_count for name in flat_columns) or lists.null_count:
            return [made | {"holds": False}]
        if flat.null_count or any(flat.field(n).null_count for n in ("event_id", "event_ts")):
            return [made | {"holds": False}]
        count = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        users = words_of(_one(rows["user_id"]))
        start, end = _us(rows["start_ts"]), _us(rows["end_ts"])
        bounds = f"{self.folder}/{uuid.uuid4().hex}.parquet"
        ids = words_of(_one(rows["session_id"]))
        files.write_parquet(
            bounds, pa.table({"user": users, "id": ids, "start": start, "end": end})
        )
        return [
            made | _print(np.repeat(users, count), words_of(flat.field("event_id")))
            | {"holds": self._hold(rows, flat, count, start, end), "bounds": bounds}
        ]  # fmt: skip

    def _hold(
        self, rows: pa.Table, flat: Any, count: np.ndarray, start: np.ndarray, end: np.ndarray
    ) -> bool:
        if count.min() < 1 or not np.array_equal(count, rows["event_count"].to_numpy()):
            return False
        times = _us(flat.field("event_ts"))
        first = np.cumsum(count) - count
        runaway = np.full(len(count), "", object)
        runaway[count > self.max_session_events] = "events"
        runaway[end - start > self.max_session_us] = "hours"
        inside = np.ones(len(times), bool)
        inside[first] = False
        step = np.diff(times)[inside[1:]]
        if not (
            np.array_equal(times[first], start)
            and np.array_equal(times[first + count - 1], end)
            and _dates(rows["start_ts"]).equals(_one(rows["start_date"]))
            and pc.fill_null(_one(rows["runaway"]), "").equals(pa.array(runaway, pa.string()))
            and ((step >= 0) & (step <= self.gap_us)).all()
        ):
            return False
        tied = np.flatnonzero(inside[1:] & (np.diff(times) == 0))
        return _ties_in_order(flat, tied) if len(tied) else True


def _ties_in_order(events: Any, at: np.ndarray) -> bool:
    """Whether the events after `at`, of equal time, come after those at it: (tie_break, event_id),
    nulls last."""
    here, after = pa.array(at), pa.array(at + 1)
    one, other = (events.field("tie_break").take(place) for place in (here, after))
    by_id = pc.less(*(events.field("event_id").take(place) for place in (here, after)))
    rises = pc.if_else(pc.equal(one, other), by_id, pc.less(one, other))  # null where one is null
    without = pc.if_else(pc.is_null(one), pc.and_(pc.is_null(other), by_id), True)
    return bool(pc.all(pc.coalesce(rises, without)).as_py())


def read_sessions(path: str) -> pa.Table:
    """What the checks need of a file of sessions."""
    wanted = ("event_id", "event_ts", "tie_break")
    names = {"session_id", "user_id", "start_ts", "end_ts", "start_date", "event_count", "runaway"}
    with files.open_seekable(path) as stream:
        file = pq.ParquetFile(stream)
        columns = []
        for at in range(file.metadata.num_columns):
            place = file.metadata.schema.column(at).path.split(".")
            if place[0] in names | {"change"} or (place[0] == "events" and place[3] in wanted):
                columns.append(".".join(place))
        return file.read(columns, use_threads=False).combine_chunks()


def _one(column: Any) -> Any:
    """A column as one array."""
    made = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return made.chunk(0) if isinstance(made, pa.ChunkedArray) else made


def _us(column: Any) -> np.ndarray:
    times: np.ndarray = _one(column).cast(CLOCK).cast(pa.int64()).to_numpy(zero_copy_only=False)
    return times


@dataclass(frozen=True)
class Around:
    """A task: of a data file of `silver.sessions`, the bounds of the sessions that stand near
    those of a candidate and are none of it; see `SessionsHold`."""

    keys: str
    """A Parquet file, as `increments.keys_of` makes it: what the candidate touches."""
    ids: str
    """A Parquet file: `session_id` of the candidate's rows, retired ones too."""
    gap_us: int
    folder: str

    def __call__(self, path: str) -> list[dict[str, Any]]:
        rows = files.read_parquet(path, ["session_id", "user_id", "start_ts", "end_ts"])
        keys = files.read_parquet(self.keys)
        rows = rows.filter(pa.array(near(rows, keys, self.gap_us)))
        rows = rows.filter(
            pc.invert(pc.is_in(rows["session_id"], files.read_parquet(self.ids)["session_id"]))
        ).combine_chunks()
        if not rows.num_rows:
            return []
        bounds = f"{self.folder}/{uuid.uuid4().hex}.parquet"
        made = {
            "user": words_of(_one(rows["user_id"])), "id": words_of(_one(rows["session_id"])),
            "start": _us(rows["start_ts"]), "end": _us(rows["end_ts"]),
        }  # fmt: skip
        files.write_parquet(bounds, pa.table(made))
        return [{"bounds": bounds}]


def sessions_apart(bounds: list[str], gap_us: int) -> bool:
    """Whether sessions, by their bounds, are further apart than the gap, and their ids differ:
    surely not if this says so, and by the chance of a 64-bit hash if not."""
    if not bounds:
        return True
    rows = pa.concat_tables([files.read_parquet(path) for path in bounds])
    user, ids, start, end = (rows[name].to_numpy() for name in ("user", "id", "start", "end"))
    ids = np.sort(ids)
    order = np.lexsort((start, user))
    user, start, end = user[order], start[order], end[order]
    silent = start[1:] - end[:-1] > gap_us
    return bool((ids[1:] != ids[:-1]).all() and (silent | (user[1:] != user[:-1])).all())
