"""Repeats in a large table are found by ids made again from columns: they must be the ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.bronze import new_events, stored_events
from jobs.core.plan import Thresholds
from jobs.core.tables import EVENTS
from jobs.lake import time_slices
from jobs.reading.typed_events import row_hash
from tests.support.spark_tools import CLICKS, Workshop

EVERY_COLUMN = CLICKS.replace(
    'event_ts = "ts"',
    'event_ts = "ts"\nevent_type = "kind"\nvalue = "value"\ntie_break = "tie"\n'
    'source_session_id = "sid"\nexposed_with = "shown"',
)
LINES = """user,item,ts,kind,value,tie,sid,shown
u,1,1700000000,view,-0.0,1,s,a|b
u,1,1700000000,view,0.0,2,s,a|b
u,1,1700000000.000001,"a ""quoted"", ünïcode kind",0.1,-9223372036854775808,,
u,2,1700000000,,1e300,,,a
ü,2,1700000060,,,,,
-7,9223372036854775807,1700000060,buy,5e-324,0,s,"a,""b""|c"
"""


@pytest.mark.parametrize("brought_together", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.slow
def test_a_file_delivered_again_is_all_repeats(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brought_together: bool
) -> None:
    """As if rows were many; first loads by slices as the files lie, and through Spark's shuffle."""
    if brought_together:
        monkeypatch.setattr(time_slices, "parted", lambda *_: None)
    limits = Thresholds(few_moved=-1, smallest_slice=2, read_bytes=-1)
    shop = Workshop(spark, tmp_path, EVERY_COLUMN, limits)
    shop.land("1.csv", LINES)
    first = shop.run("ingest")
    assert (first.events_new, first.rejects) == (6, {})
    events = shop.lake.read(EVENTS)
    assert events.where(events.event_id != row_hash()).count() == 0
    shop.land("2.csv", LINES + "u,3,1700000060,,,,,\n")
    asked = []
    by_time = stored_events.stored_by_time
    monkeypatch.setattr(new_events, "stored_by_time", lambda *a: asked.append(1) or by_time(*a))
    again = shop.run("ingest", day="2023-11-14")
    assert asked, "this was to go the way of large tables"
    assert (again.events_new, again.duplicates) == (1, 6)
