"""What else ends sessions, from landing to tables: native gaps, midnight, pieces, a boundary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import RuleChanged, SourceError
from jobs.core.tables import EVENTS, SEQUENCES, SESSIONS
from tests.support.oracle import More, expected_sequences, expected_sessions
from tests.support.spark_tools import CLICKS, Workshop

T = 1_711_839_600  # 2024-03-30 23:00 UTC, midnight in Amsterdam; an hour is left out the night after
HOUR, GAP_S, MAX_HOURS = 3600, 1800, 3


def differences(shop: Workshop, native: bool, more: More) -> tuple[list[Any], list[Any]]:
    """Sessions as they are and as the oracle has them; sequences are asserted."""
    expected = expected_sessions(
        shop.table(EVENTS).to_pyarrow_table(), native=native, gap_s=GAP_S, max_hours=MAX_HOURS,
        max_events=5000, more=more,
    )  # fmt: skip
    rows = shop.rows(SESSIONS)
    positions = {one["user_id"]: one["session_ordinal"] for one in shop.rows(SEQUENCES)}
    assert positions == {
        user: [ordinal for _, ordinal in some]
        for user, some in expected_sequences(expected).items()
    }
    found = sorted(
        (row["session_id"], row["runaway"], [one["event_id"] for one in row["events"]])
        for row in rows
    )
    return found, sorted((row["session_id"], row["runaway"], row["events"]) for row in expected)


ALL = (
    CLICKS.replace('event_ts = "ts"', 'event_ts = "ts"\nsource_session_id = "s"')
    + f"""
[sessions]
boundary = "prev.campaign <> next.campaign"
rule = "source_session_id"
native_gap = true
gap_s = {GAP_S}
midnight = "Europe/Amsterdam"
on_max_hours = "split"
max_session_hours = {MAX_HOURS}
"""
)


CAMPAIGNS = More(
    native_gap=True, midnight="Europe/Amsterdam", split=True,
    parted="before_boundary_values ->> 'campaign' <> boundary_values ->> 'campaign'",
)  # fmt: skip


def clicks(user: str, session: str, *at_s: int, campaign: str = "mail") -> list[str]:
    return [f"{user},i{n},{T + at},{session},{campaign}" for n, at in enumerate(at_s)]


def csv(*lines: str) -> str:
    return "\n".join(["user,item,ts,s,campaign", *lines]) + "\n"


@pytest.mark.slow
def test_each_key_ends_sessions_and_late_events_cut_again(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, ALL)
    long = range(HOUR // 2, 8 * HOUR, 1500)
    shop.land(
        "a.csv",
        csv(
            *clicks("gap", "s", 100, 100 + GAP_S, 101 + 2 * GAP_S),
            *clicks("midnight", "s", -100, -1, 0, 100),
            *clicks("long", "s", *long),
            *clicks("exact", "s", *range(HOUR, 4 * HOUR + 1, 1200)),
            *clicks("camp", "s", 60, 120),
            *clicks("camp", "s", 180, 240, 300, campaign="ad"),
        ),
    )
    shop.run()
    found, wanted = differences(shop, True, CAMPAIGNS)
    assert found == wanted
    size = {user: [] for user in ("gap", "midnight", "long", "exact", "camp")}  # type: ignore[var-annotated]
    for row in sorted(shop.rows(SESSIONS), key=lambda row: str(row["start_ts"])):
        assert row["runaway"] is None
        size[row["user_id"]].append(row["event_count"])
    assert size["gap"] == [2, 1] and size["midnight"] == [2, 2]
    assert size["camp"] == [2, 3]
    assert size["exact"] == [10]  # exactly max_session_hours are no longer session
    assert size["long"] == [8, 7, 3]
    # Before the first event of the whole session: all pieces begin elsewhere.
    shop.land("b.csv", csv(*clicks("long", "s", 600)))
    result = shop.run()
    assert (result.sessions_new, result.sessions_retired) == (3, 3)
    found, wanted = differences(shop, True, CAMPAIGNS)
    assert found == wanted


BOUNDARY = (
    CLICKS.replace('event_ts = "ts"', 'event_ts = "ts"\nevent_type = "kind"')
    + f"[sessions]\ngap_s = {GAP_S}\nmax_session_hours = {MAX_HOURS}\n"
)
SAID = "boundary = \"prev.event_type = 'logout' OR prev.campaign <> next.campaign\"\n"
PARTED = (
    "before_event_type = 'logout' OR "
    "coalesce(before_boundary_values ->> 'campaign' <> boundary_values ->> 'campaign', false)"
)


def visits(*rows: tuple[str, int, str, str]) -> str:
    lines = [f"{user},i{at},{T + at},{kind},{campaign}" for user, at, kind, campaign in rows]
    return "\n".join(["user,item,ts,kind,campaign", *lines]) + "\n"


@pytest.mark.slow
def test_a_boundary_is_added_to_a_source_that_has_sessions(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, BOUNDARY)
    shop.land(
        "a.csv",
        visits(
            ("ann", 0, "view", "mail"), ("ann", 60, "view", "mail"), ("ann", 120, "view", "ad"),
            ("ann", 180, "view", ""), ("ann", 240, "view", "mail"), ("ann", 240, "logout", "mail"),
            ("bob", 0, "logout", ""), ("bob", 0, "view", ""), ("bob", 60, "view", ""),
        ),
    )  # fmt: skip
    shop.run()
    assert [row["event_count"] for row in shop.rows(SESSIONS)] in ([6, 3], [3, 6])
    assert {row["boundary_values"] for row in shop.rows(EVENTS)} == {None}
    ids = {row["event_id"] for row in shop.rows(EVENTS)}

    shop.describe(BOUNDARY + SAID.replace("campaign", "campain"))
    shop.land("b.csv", visits(("cat", 0, "view", "mail")))
    with pytest.raises(SourceError, match=r"sessions.boundary = .* did you mean 'campaign'\?"):
        shop.run()
    shop.describe(BOUNDARY + SAID)
    with pytest.raises(RuleChanged, match="jobs run --source clicks --reload --rebuild"):
        shop.run()
    shop.run(options={"reload": True, "rebuild": True})
    more = More(parted=PARTED)
    found, wanted = differences(shop, False, more)
    assert found == wanted and len(found) > 3
    assert ids < {row["event_id"] for row in shop.rows(EVENTS)}
    [values] = {row["boundary_values"] for row in shop.rows(EVENTS) if row["user_id"] == "cat"}
    assert values == '{"campaign":"mail"}'

    # The same event with a smaller text, and one that comes late between two others.
    shop.land("c.csv", visits(("ann", 60, "view", "ad"), ("bob", 30, "logout", "")))
    result = shop.run()
    assert (result.events_new, result.events_replaced, result.duplicates) == (1, 1, 1)
    found, wanted = differences(shop, False, more)
    assert found == wanted
    shop.land("d.csv", visits(("ann", 60, "view", "mail")))  # again, and larger
    version = shop.version(SESSIONS)
    result = shop.run()
    assert (result.events_new, result.events_replaced, result.duplicates) == (0, 0, 1)
    assert shop.version(SESSIONS) == version
    shop.run("validate")
    shop.run(options={"rebuild": True})
    assert differences(shop, False, more)[0] == found
