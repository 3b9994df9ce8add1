"""The suite of `bronze.events` over the arrays of one data file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from expectations.feedback_rule import FEEDBACK
from jobs.audit.arrow_columns import (
    FIRST_YEAR_US,
    LAST_YEAR_US,
    dates,
    micros_array,
    one_array,
    words_of,
)
from jobs.lake import filesystem

EVENTS_DDL = "holds boolean, first bigint, last bigint"


def events_hold(path: str) -> list[dict[str, Any]]:
    """Whether a file of `bronze.events` keeps the checks of rows in `expectations/events.py`, each
    id once; and its `first` and `last` time (us), for `apart`: equal ids have equal times."""
    names = ["event_id", "user_id", "item_id", "event_ts", "event_date", "feedback", "value",
             "exposed_with"]  # fmt: skip
    rows = filesystem.read_parquet(path, names)
    if not rows.num_rows:
        return [{"holds": True, "first": None, "last": None}]
    if any(rows[name].null_count for name in names[:6]):
        return [{"holds": False, "first": None, "last": None}]
    times = micros_array(rows["event_ts"])
    value = rows["value"].drop_null().to_numpy()
    shown = one_array(rows["exposed_with"]).flatten()
    hashes = np.sort(words_of(one_array(rows["event_id"])))
    holds = (
        bool((hashes[1:] != hashes[:-1]).all())
        and pc.min(pc.binary_length(rows["event_id"])).as_py() > 0
        and times.min() >= FIRST_YEAR_US
        and times.max() <= LAST_YEAR_US
        and dates(rows["event_ts"]).equals(one_array(rows["event_date"]))
        and pc.all(pc.is_in(rows["feedback"], pa.array(FEEDBACK))).as_py()
        and bool(np.isfinite(value).all())
        and shown.null_count == 0
        and pc.any(pc.equal(shown, "")).as_py() is not True
    )
    return [{"holds": bool(holds), "first": int(times.min()), "last": int(times.max())}]
