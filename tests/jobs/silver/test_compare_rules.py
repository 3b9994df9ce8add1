"""`jobs compare-rules`: boundaries counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import SettingsError
from jobs.silver import compare_rules
from tests.support.spark_tools import CLICKS, Workshop

T = 1_700_000_000


def test_boundaries_by_hand(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    with pytest.raises(SettingsError, match=r"columns\.source_session_id is not mapped"):
        compare_rules.compare_rules(shop.context())
    shop.describe(CLICKS.replace('event_ts = "ts"', 'event_ts = "ts"\nsource_session_id = "sid"'))
    with pytest.raises(SettingsError, match="has no events"):
        compare_rules.compare_rules(shop.context())
    events = [
        ("ann", 0, "s1"), ("ann", 600, "s1"),  # together by both
        ("ann", 700, "s2"),  # native boundary, no silence
        ("ann", 9_000, "s2"),  # a silence of 8,300 s inside a native session
        ("ann", 30_000, "s1"),  # both; s1 comes back
        ("ann", 30_001, ""),  # one id only: native boundary
        ("ann", 30_002, ""), ("ann", 60_000, ""),  # no id on either side: not compared
        ("bob", 0, "s1"),  # another user's neighbour is none
    ]  # fmt: skip
    shop.land("day.csv", "user,item,ts,sid\n" + "".join(
        f"{user},i,{T + second},{sid}\n" for user, second, sid in events))  # fmt: skip
    shop.run("ingest")
    found = compare_rules.compare_rules(shop.context())
    assert (found["events"], found["users"], found["without_id"]) == (9, 2, 3)
    assert (found["pairs"], found["pairs_without_id"], found["returning_ids"]) == (5, 2, 1)
    by_gap = {one["gap_s"]: one for one in found["gaps"]}
    half_hour, day = by_gap[1800], by_gap[86_400]
    names = ("both", "only_native", "only_gap", "neither")
    assert [half_hour[name] for name in names] == [1, 2, 1, 1]
    assert half_hour["agreement"] == pytest.approx(2 / 5)
    # By chance: (3/5 x 2/5) + (2/5 x 3/5) = 0.48; (0.4 - 0.48) / 0.52.
    assert half_hour["kappa"] == pytest.approx(-0.08 / 0.52)
    assert [day[name] for name in names] == [0, 3, 0, 2] and day["kappa"] == pytest.approx(0)
    assert [by_gap[21_600][name] for name in names] == [0, 3, 0, 2]  # 21,000 s: not above six hours
    assert [by_gap[7200][name] for name in names] == [1, 2, 1, 1]
    assert found["best_gap_s"] == 21_600
    told = compare_rules.in_words(found)
    assert "nearest to the native sessions" in told and "this source's gap_s" in told
