"""The suite of `gold.sequences` over the arrays of one data file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from expectations.feedback_rule import FEEDBACK
from jobs.lake import filesystem
from jobs.lake.time_slices import CLOCK

SEQUENCES_DDL = "holds boolean, first string, last string, positions bigint"


def sequences_hold(path: str) -> list[dict[str, Any]]:
    """Whether a file of `gold.sequences` keeps the suite of `expectations/sequences.py`, each user
    once and in order of `user_id`; its `first` and `last` user, for `apart`; and its positions."""
    rows = filesystem.read_parquet(path)
    users = rows["user_id"].combine_chunks()
    if not len(users):
        return [{"holds": True, "first": None, "last": None, "positions": 0}]
    positions = int(pc.sum(pc.list_value_length(rows["item_index"])).as_py() or 0)
    ends = {"first": users[0].as_py(), "last": users[-1].as_py(), "positions": positions}
    risen = pc.all(pc.less(users[:-1], users[1:])).as_py() is not False
    return [{"holds": users.null_count == 0 and risen and _arrays_hold(rows), **ends}]


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
