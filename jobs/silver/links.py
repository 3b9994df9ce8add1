"""Which anonymous id is whose, and when: links follow from logins. Pure functions over arrays.

What the rules mean is in ARCHITECTURE.md (Identity).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from expectations.events import FIRST_US
from jobs.core.arrays import run_starts
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import IDENTITIES
from jobs.lake.time_slices import CLOCK

SPANS = arrow_schema(
    {"anonymous_id": "string", "user_id": "string", "since": "bigint", "until": "bigint"}
)
"""Logins of one user with one anonymous id: the first and the last one (us) of some between which no
other user logged in, as far as was looked."""
LINKS = arrow_schema(IDENTITIES.columns)
DAY_US = 86_400_000_000


def spans_of(anonymous_ids: Any, users: Any, times: Any, alone: bool = False) -> pa.Table:
    """The logins among some events, as `SPANS`; of several at one time the greatest user's.

    Args:
        times: in microseconds.
        alone: whether each login is a span of its own.
    """
    rows = pa.table([anonymous_ids, users, times, times], schema=SPANS)
    known = pc.and_(pc.is_valid(rows["anonymous_id"]), pc.is_valid(rows["user_id"]))
    return _joined(_sorted(rows.filter(known)), alone)


def _sorted(spans: pa.Table) -> pa.Table:
    """Spans by anonymous id and begin; of those that begin at one time the last user's is kept."""
    order = [(name, "ascending") for name in ("anonymous_id", "since", "user_id", "until")]
    spans = spans.sort_by(order).combine_chunks()
    last = _begins(spans["anonymous_id"], spans["since"])
    return spans.filter(pa.array(np.append(last[1:], True)[: spans.num_rows]))


def _begins(*columns: Any) -> np.ndarray:
    """bool[N]: where a run of equal rows begins."""
    return run_starts(*(_codes(one) for one in columns))


def _codes(column: Any) -> np.ndarray:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_string(column.type):
        column = pc.dictionary_encode(column).indices
    found: np.ndarray = column.to_numpy(zero_copy_only=False)
    return found


def _joined(spans: pa.Table, alone: bool = False) -> pa.Table:
    """Neighbouring spans of one user as one; of spans as `_sorted` has them."""
    if alone or not spans.num_rows:
        return spans
    first = np.flatnonzero(_begins(spans["anonymous_id"], spans["user_id"]))
    last = np.append(first[1:], spans.num_rows) - 1
    made = spans.take(pa.array(first))
    return made.set_column(3, SPANS.field("until"), spans["until"].take(pa.array(last)))


def contested(spans: pa.Table) -> pa.Array:
    """The anonymous ids with several users of which spans overlap: their logins must be looked at one
    by one.

    Args:
        spans: of several files.
    """
    order = [(name, "ascending") for name in ("anonymous_id", "since", "until")]
    spans = spans.sort_by(order).combine_chunks()
    if not spans.num_rows:
        return pa.array([], pa.string())
    owner = np.cumsum(_begins(spans["anonymous_id"])) - 1
    since, until = (spans[name].to_numpy() for name in ("since", "until"))
    times = np.unique(until)
    rank = owner * (len(times) + 1) + np.searchsorted(times, until)  # (grows with the owner)
    before = np.maximum.accumulate(rank)[:-1]
    latest = times[before % (len(times) + 1)]
    touches = np.append(False, (owner[1:] == owner[:-1]) & (latest >= since[1:]))
    users = _codes(spans["user_id"])
    first = np.flatnonzero(run_starts(owner))
    several = np.minimum.reduceat(users, first) < np.maximum.reduceat(users, first)
    found = spans["anonymous_id"].filter(pa.array(touches & several[owner]))
    return pc.unique(found.combine_chunks())


def links_of(spans: pa.Table, rule: str, max_days: float | None) -> pa.Table:
    """The links that logins make, as rows of `silver.identities`.

    Args:
        spans: those of one anonymous id do not overlap, but at one time.
        rule: `last` or `first`.
    """
    spans = _joined(_sorted(spans))
    owner = _begins(spans["anonymous_id"])
    if rule == "first":
        spans = spans.filter(pa.array(owner))
        owner = np.ones(spans.num_rows, bool)
    since = spans["since"].to_numpy()
    begin, end = since.copy(), np.append(since[1:], 0)
    always = owner.copy()
    if max_days is not None and len(since):
        begin[owner] -= round(max_days * DAY_US)
        always &= begin < FIRST_US
    still = np.append(owner[1:], True)[: len(since)]
    return pa.table(
        [
            spans["anonymous_id"], pa.array(since).cast(CLOCK), spans["user_id"],
            pa.array(begin, mask=always).cast(CLOCK), pa.array(end[: len(since)], mask=still).cast(CLOCK),
        ],
        schema=LINKS,
    )  # fmt: skip


def linked(links: pa.Table, anonymous_ids: pa.Array, times: np.ndarray) -> pa.Array:
    """The user to whom links give each event without a user; null: none.

    Args:
        links: rows of `silver.identities`, in any order.
        times: of the events (us).
    """
    nothing = pa.nulls(len(anonymous_ids), pa.string())
    if not links.num_rows or not len(anonymous_ids):
        return nothing
    links = links.sort_by([("anonymous_id", "ascending"), ("since_ts", "ascending")])
    links = links.combine_chunks()
    names = links["anonymous_id"].combine_chunks()
    first = run_starts(_codes(names))
    of_link = np.cumsum(first) - 1
    places = pc.index_in(anonymous_ids, names.filter(pa.array(first)))
    owner = places.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    since = links["since_ts"].cast(pa.int64()).to_numpy()
    # Of pairs (anonymous id, time) as numbers, times by their rank: the last link that began.
    moments = np.unique(since)
    width = len(moments) + 1
    began = of_link * width + np.searchsorted(moments, since) + 1
    asked = owner * width + np.searchsorted(moments, times, side="right")
    at = np.searchsorted(began, asked, side="right") - 1
    before_all = (at < 0) | (of_link[np.maximum(at, 0)] != owner)
    at = np.where(before_all, at + 1, at)  # before its first login: of that one, if it reaches back
    known = (owner >= 0) & (at < len(of_link))
    at = np.where(known, at, 0)
    known &= of_link[at] == owner
    reach = links["from_ts"].cast(pa.int64()).fill_null(np.iinfo(np.int64).min).to_numpy()
    known &= times >= reach[at]
    return links["user_id"].combine_chunks().take(pa.array(at, mask=~known))


def same(one: pa.Table, other: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows of links that only the one has (by all columns), and only the other."""
    keys = [rows.to_pylist() for rows in (one, other)]
    sets = [{tuple(row.values()) for row in rows} for rows in keys]
    only = [
        [tuple(row.values()) not in theirs for row in rows]
        for rows, theirs in zip(keys, reversed(sets), strict=True)
    ]
    return one.filter(pa.array(only[0], pa.bool_())), other.filter(pa.array(only[1], pa.bool_()))
