"""The suite of `gold.sequences` over the arrays of one data file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from expectations.feedback_rule import FEEDBACK
from jobs.audit.arrow_columns import HELD_DDL, all_in, continues, held
from jobs.audit.fingerprints import of_sequence_rows
from jobs.lake import filesystem
from jobs.lake.time_slices import CLOCK

SEQUENCES_DDL = f"{HELD_DDL}, first string, last string, positions bigint, file string"
ARRAYS = ("item_index", "event_ts", "session_ordinal", "feedback", "exposed_items")


def sequences_hold(path: str) -> list[dict[str, Any]]:
    """Which checks of rows of `expectations/sequences.py` a file of `gold.sequences` keeps, each
    user once and in order of `user_id`; its `first` and `last` user, for `apart`; its positions; and
    its row of `ops.fingerprints`, as JSON."""
    rows = filesystem.read_parquet(path)
    users = rows["user_id"]
    positions = int(pc.sum(pc.list_value_length(rows["item_index"])).as_py() or 0)
    ends = {"first": None, "last": None}
    if len(users):
        ends = {"first": users[0].as_py(), "last": users[-1].as_py()}
    file = json.dumps(of_sequence_rows(path, rows))
    return [held(checks_of(rows)) | ends | {"positions": positions, "file": file}]


def checks_of(rows: pa.Table) -> dict[str, bool]:
    """Check -> whether it holds."""
    users = rows["user_id"].combine_chunks()
    lists = {name: rows[name].combine_chunks() for name in ARRAYS}
    size = {name: pc.fill_null(pc.list_value_length(one), 0) for name, one in lists.items()}
    count = {name: one.to_numpy(zero_copy_only=False) for name, one in size.items()}
    flat = {name: one.flatten() for name, one in lists.items()}
    shown = flat["exposed_items"]
    times = flat["event_ts"].cast(CLOCK).cast(pa.int64())
    ordinal = flat["session_ordinal"].to_numpy(zero_copy_only=False)
    later = {name: continues(count[name]) for name in ("event_ts", "session_ordinal")}
    # (Behind a row's last element is the next row's first, or the end.)
    first = (np.cumsum(count["session_ordinal"]) - count["session_ordinal"])[
        count["session_ordinal"] > 0
    ]
    clock = times.to_numpy(zero_copy_only=False)
    step = (ordinal[1:] - ordinal[:-1])[later["session_ordinal"]]
    return {
        "user_id_is_key": users.null_count == 0
        and pc.all(pc.less(users[:-1], users[1:])).as_py() is not False,
        "arrays_are_parallel": not any(one.null_count for one in lists.values())
        and all(np.array_equal(one, count["item_index"]) for one in count.values())
        and bool((count["item_index"] >= 1).all()),
        "items_are_known": _from_one(flat["item_index"]),
        "exposed_items_are_known": shown.null_count == 0 and _from_one(shown.flatten()),
        "oldest_first": times.null_count == 0
        and bool((clock[:-1] <= clock[1:])[later["event_ts"]].all()),
        "ordinals_begin_with_one": len(first) == rows.num_rows
        and bool((ordinal[first] == 1).all()),
        "ordinals_are_dense": bool(((step == 0) | (step == 1)).all()),
        "feedback_is_known": all_in(flat["feedback"], FEEDBACK),
    }


def _from_one(index: pa.Array) -> bool:
    return index.null_count == 0 and bool((index.to_numpy() >= 1).all())
