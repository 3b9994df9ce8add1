"""The suite of `bronze.events` over the arrays of one data file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from expectations.events import FIRST_US, LAST_US
from expectations.feedback_rule import FEEDBACK
from jobs.audit.arrow_columns import (
    HELD_DDL,
    all_in,
    dates,
    distinct,
    held,
    micros_array,
    one_array,
    words_of,
)
from jobs.lake import filesystem

EVENTS_DDL = f"{HELD_DDL}, first bigint, last bigint"
COLUMNS = ["event_id", "user_id", "item_id", "event_ts", "event_date", "feedback", "value",
           "exposed_with", "anonymous_id"]  # fmt: skip


def events_hold(path: str) -> list[dict[str, Any]]:
    """Which checks of rows of `expectations/events.py` a file of `bronze.events` keeps, each id
    once; and its `first` and `last` time (us), for `apart`: equal ids have equal times."""
    rows = filesystem.read_parquet(path, COLUMNS)
    times = micros_array(rows["event_ts"].drop_null())
    ends = (int(times.min()), int(times.max())) if len(times) else (None, None)
    return [held(checks_of(rows)) | {"first": ends[0], "last": ends[1]}]


def checks_of(rows: pa.Table) -> dict[str, bool]:
    """Check -> whether it holds, of `COLUMNS`."""
    times = micros_array(rows["event_ts"].drop_null())
    shown = one_array(rows["exposed_with"]).flatten()
    ids = one_array(rows["event_id"].drop_null())
    whole = {name: not rows[name].null_count for name in rows.column_names}
    return {
        "event_id_is_key": whole["event_id"] and distinct(words_of(ids)),
        "ids_are_there": whole["event_id"]
        and not pc.any(
            pc.and_(pc.is_null(rows["user_id"]), pc.is_null(rows["anonymous_id"]))
        ).as_py()
        and whole["item_id"]
        and not pc.any(pc.equal(ids, "")).as_py(),
        "time_is_plausible": whole["event_ts"]
        and bool(((times >= FIRST_US) & (times <= LAST_US)).all()),
        "date_is_the_utc_date": whole["event_ts"]
        and whole["event_date"]
        and dates(rows["event_ts"]).equals(one_array(rows["event_date"])),
        "feedback_is_known": all_in(rows["feedback"], FEEDBACK),
        "value_is_finite": bool(np.isfinite(rows["value"].drop_null().to_numpy()).all()),
        "shown_items_have_ids": not shown.null_count and not pc.any(pc.equal(shown, "")).as_py(),
    }
