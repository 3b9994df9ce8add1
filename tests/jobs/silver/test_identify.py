"""Events before a login get their person as soon as it is known; sessions follow, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.core.tables import EVENTS, IDENTITIES, PERSON_EVENTS, REJECTS, SEQUENCES, SESSIONS
from tests.support.spark_tools import Workshop

WEB = """
[source]
name = "web"
landing = "{landing}/*.csv"
format = "csv"
[columns]
item_id = "item"
event_ts = "ts"
[identity]
anonymous_id = "cookie"
user_id = "login"
[time]
unit = "s"
[sessions]
gap_s = 600
[quality]
on_exceed = "warn"
"""
HEAD = "cookie,login,item,ts\n"
DAY = 86_400


def users_of(shop: Workshop) -> dict[str, list[str]]:
    """Person -> items in order, from the sessions."""
    found: dict[str, list[tuple[Any, str]]] = {}
    for row in shop.rows(SESSIONS):
        for event in row["events"]:
            found.setdefault(row["user_id"], []).append((event["event_ts"], event["item_id"]))
    return {user: [item for _, item in sorted(events)] for user, events in found.items()}


def links_of(shop: Workshop) -> list[tuple[str, str]]:
    rows = sorted(shop.rows(IDENTITIES), key=lambda row: (row["anonymous_id"], row["since_ts"]))
    return [(row["anonymous_id"], row["user_id"]) for row in rows]


def test_a_login_reaches_back_and_sessions_follow(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WEB)
    shop.land("1.csv", HEAD + "c1,,i1,0\nc1,,i2,60\nc2,,i3,0\n,bob,i4,0\n,,i5,0\n")
    first = shop.run()
    assert first.rejects == {"missing_user_id": 1} and first.sessions_relinked == 0
    assert users_of(shop) == {"anonymous:c1": ["i1", "i2"], "anonymous:c2": ["i3"], "bob": ["i4"]}
    bob = next(row["session_id"] for row in shop.rows(SESSIONS) if row["user_id"] == "bob")
    # Ann logs in with the one cookie, in a session of its own; and again near the first one, elsewhere.
    shop.land("2.csv", HEAD + f"c1,ann,i6,{DAY}\nc3,ann,i7,600\n")
    second = shop.run()
    assert users_of(shop) == {
        "ann": ["i1", "i2", "i7", "i6"], "anonymous:c2": ["i3"], "bob": ["i4"],
    }  # fmt: skip
    assert (second.sessions_new, second.sessions_retired, second.sessions_relinked) == (2, 1, 2)
    assert links_of(shop) == [("c1", "ann"), ("c3", "ann")]
    assert {row["user_id"] for row in shop.rows(SEQUENCES)} == {"ann", "anonymous:c2", "bob"}
    assert bob in {row["session_id"] for row in shop.rows(SESSIONS)}
    said = {row["item_id"]: (row["user_id"], row["anonymous_id"]) for row in shop.rows(EVENTS)}
    assert said["i1"] == (None, "c1") and said["i7"] == ("ann", "c3") and said["i4"] == ("bob", None)
    versions = [shop.version(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    assert shop.run().read == 0
    assert versions == [shop.version(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    made = [shop.rows(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    shop.run(options={"rebuild": True})
    assert made == [shop.rows(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    checked = shop.run("validate").checks
    assert not any(one["failed"] or one["warned"] for one in checked.values())
    assert not shop.rows(REJECTS, ("first_seen_ts",))[1:]
