"""`jobs run --reload`: after a loss all tables are as the nights made them, late lines and native ids too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from jobs.core.tables import EVENTS, REJECTS, SESSIONS
from tests.jobs.lake.test_foreign_changes import but, state
from tests.support.others import check_derived
from tests.support.spark_tools import Workshop

NATIVE = """
[source]
name = "clicks"
landing = "{landing}/*.csv"
format = "csv"

[columns]
event_id = "id"
user_id = "user"
item_id = "item"
event_ts = "ts"
source_session_id = "visit"

[time]
unit = "s"

[sessions]
rule = "source_session_id"
lateness_days = 2
"""
HEADER = "id,user,item,ts,visit\n"
T, DAY = 1_700_006_400, 86_400  # 2023-11-15, a day's beginning
NIGHTS = {
    "2023-11-15": f"a,u1,i1,{T + 60},v1\nb,u1,i2,{T + 120},v1\nc,u2,i1,{T + 60},v2\nd,u3,i3,{T + 900},\n",
    # Of b a smaller line comes in time: it is the event from now on. Another visit goes on.
    "2023-11-16": f"b,u1,i4,{T + 90},v1\ne,u1,i5,{T + 180},v1\nf,u2,i2,{T + DAY},v2\n",
    # Of a and c smaller lines come too late: they are duplicates. g is late, h is not.
    "2023-11-20": f"a,u1,i9,{T + 30},v1\nc,u2,i9,{T + 30},v9\ng,u4,i1,{T},v4\nh,u4,i1,{T + 5 * DAY},v4\n",
}


@pytest.mark.parametrize("loss", but(("restore", "older", "overwrite", "both", "nothing"), "both"))
def test_late_lines_and_native_ids_are_judged_as_their_nights_did(
    spark: Any, tmp_path: Path, loss: str
) -> None:
    shop = Workshop(spark, tmp_path, NATIVE)
    for day, lines in NIGHTS.items():
        shop.land(f"{day}.csv", HEADER + lines)
        shop.run(day=day)
    rows = {row["event_id"]: row["item_id"] for row in shop.rows(EVENTS)}
    assert rows == {"a": "i1", "b": "i4", "c": "i1", "d": "i3", "e": "i5", "f": "i2", "h": "i1"}
    assert [row["reason"] for row in shop.rows(REJECTS)] == ["late"]
    before = state(shop, EVENTS, REJECTS, SESSIONS)
    check_derived(shop)
    lose(shop, loss)
    for _ in range(2):  # (the second one finds what the first one judged)
        shop.run(options={"reload": True})
        assert state(shop, EVENTS, REJECTS, SESSIONS) == before
        check_derived(shop)
    assert shop.run().read == 0


def lose(shop: Workshop, loss: str) -> None:
    events, rejects = shop.table(EVENTS), shop.table(REJECTS)
    if loss == "restore":
        events.restore(1)
    elif loss == "older":  # as it was after the first night
        log = Path(EVENTS.path(str(shop.lake_root), "clicks"), "_delta_log")
        for file in log.glob("*.json"):
            if int(file.stem) > 1:
                file.unlink()
    elif loss == "overwrite":
        events.restore(0)
    elif loss == "both":  # nothing says any more which lines were late, but the nights' days
        events.restore(0)
        rejects.restore(0)
        for name in (EVENTS, REJECTS):
            path = name.path(str(shop.lake_root), "clicks")
            DeltaTable(path).vacuum(0, dry_run=False, enforce_retention_duration=False)
