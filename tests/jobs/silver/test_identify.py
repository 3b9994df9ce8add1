"""Events before a login get their person as soon as it is known; sessions follow, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.core import crash_points
from jobs.core.errors import AuditFailed, SourceError
from jobs.core.settings import settings
from jobs.core.tables import EVENTS, IDENTITIES, PERSON_EVENTS, REJECTS, SEQUENCES, SESSIONS
from jobs.forget.forget import forget
from jobs.privacy.pseudonyms import Privacy
from tests.jobs.forget.test_forget import where
from tests.support.others import data_files
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


@pytest.mark.slow
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
    assert (
        said["i1"] == (None, "c1") and said["i7"] == ("ann", "c3") and said["i4"] == ("bob", None)
    )
    versions = [shop.version(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    assert shop.run().read == 0
    assert versions == [shop.version(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    made = [shop.rows(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    shop.run(options={"rebuild": True})
    assert made == [shop.rows(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    checked = shop.run("validate").checks
    assert not any(one["failed"] or one["warned"] for one in checked.values())
    assert not shop.rows(REJECTS, ("first_seen_ts",))[1:]


@pytest.mark.slow
def test_a_shared_device_and_another_rule(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WEB)
    lines = [
        "x,,i1,0",
        "x,ann,i2,1000",
        "x,,i3,2000",
        "x,bob,i4,3000",
        "x,,i5,4000",
        "y,,i6,0",
        ",carl,i7,0",
    ]
    shop.land("1.csv", HEAD + "\n".join(lines) + "\n")
    shop.run()
    last = {"ann": ["i1", "i2", "i3"], "bob": ["i4", "i5"], "anonymous:y": ["i6"], "carl": ["i7"]}
    assert users_of(shop) == last and links_of(shop) == [("x", "ann"), ("x", "bob")]
    made = [shop.rows(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    # A login between two others, that comes late.
    shop.land("2.csv", HEAD + "x,dora,i8,2000\n")
    second = shop.run()
    assert users_of(shop) == last | {"ann": ["i1", "i2"], "dora": ["i3", "i8"]}
    assert second.sessions_relinked == 2
    # The rule of the source file changes: only the events that are somebody else's now move.
    shop.describe(WEB.replace("[time]", 'link = "first"\n[time]'))
    third = shop.run()
    assert users_of(shop) == last | {
        "ann": ["i1", "i2", "i3", "i5"], "bob": ["i4"], "dora": ["i8"],
    }  # fmt: skip
    # (What is left of dora's session has another id, and had no event that moved.)
    assert (third.sessions_new, third.sessions_changed, third.sessions_retired) == (2, 1, 1)
    assert third.sessions_relinked == 3
    shop.describe(WEB.replace("[time]", "max_days = 0.01\n[time]"))
    shop.run()
    assert users_of(shop)["anonymous:x"] == ["i1"]
    # Without [identity] every anonymous id is a person of its own.
    shop.describe(WEB[: WEB.index("[identity]")].replace("[columns]", '[columns]\nuser_id = "login"')
                  + WEB[WEB.index("[time]"):])  # fmt: skip
    unlinked = shop.run()
    assert users_of(shop)["anonymous:x"] == ["i1", "i3", "i5"] and users_of(shop)["ann"] == ["i2"]
    assert links_of(shop) == [] and unlinked.rejects == {}
    assert not any(one["failed"] for one in shop.run("validate").checks.values())
    # And back: what there was before, and the ids that there were.
    shop.describe(WEB)
    shop.land("2.csv", HEAD)
    shop.table(EVENTS).delete("item_id = 'i8'")
    shop.run()
    assert made == [shop.rows(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]


TABLE = """link = { landing = "{landing}/links/*.csv", format = "csv", anonymous_id = "who", user_id = "is", \
since = "since", unit = "s" }
[time]"""


@pytest.mark.slow
def test_a_table_says_who_is_who(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WEB.replace("[time]", TABLE))
    links = shop.landing / "links"
    shop.land("1.csv", HEAD + "x,,i1,0\nx,ann,i2,1000\nx,,i3,5000\ny,,i4,0\n")
    with pytest.raises(SourceError, match=r"identity.link.landing = .* matches no file"):
        shop.run()
    shop.land("links/a.csv", "who,is,since\nx,bob,4000\nx,,5000\n")
    first = shop.run()
    assert users_of(shop) == {"bob": ["i1", "i3"], "ann": ["i2"], "anonymous:y": ["i4"]}
    assert any("1 of 2 rows of" in note and "were skipped" in note for note in first.notes)
    # Nothing of the log is new, a row of the table is.
    (links / "b.csv").write_text("who,is,since\ny,bob,0\n")
    second = shop.run()
    assert users_of(shop) == {"bob": ["i1", "i4", "i3"], "ann": ["i2"]}
    assert (second.read, second.sessions_relinked) == (0, 2)
    versions = [shop.version(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    shop.run()
    assert versions == [shop.version(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    (links / "a.csv").unlink()
    shop.run()
    assert users_of(shop) == {"bob": ["i4"], "ann": ["i2"], "anonymous:x": ["i1", "i3"]}


PLAIN = WEB[: WEB.index("[identity]")].replace("[columns]", '[columns]\nuser_id = "login"')
PLAIN += WEB[WEB.index("[time]") :]


@pytest.mark.slow
def test_a_source_with_data_gets_identity(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path / "old", PLAIN)
    lines = HEAD + "x,,i1,0\nx,ann,i2,1000\nz,bob,i3,0\nb,bob,i5,1000\na,bob,i5,1000\n"
    shop.land("1.csv", lines)
    assert shop.run().rejects == {"missing_user_id": 1}
    before = {row["item_id"]: row["event_id"] for row in shop.rows(EVENTS)}
    assert shop.lake.version(PERSON_EVENTS) is None
    # A lake of an earlier version lacks the column; its events are there, under the ids that they had.
    shop.describe(WEB)
    shop.land("2.csv", HEAD + "x,,i4,2000\n")
    second = shop.run()
    assert any("python -m jobs run --source web --reload" in note for note in second.notes)
    assert users_of(shop)["anonymous:x"] == ["i4"]
    again = shop.run(options={"reload": True})
    assert again.rejects == {}
    assert users_of(shop) == {"ann": ["i1", "i2", "i4"], "bob": ["i3", "i5"]}
    after = {row["item_id"]: row["event_id"] for row in shop.rows(EVENTS)}
    assert {item: after[item] for item in before} == before
    new = Workshop(spark, tmp_path / "new", WEB)
    new.land("1.csv", lines)
    new.land("2.csv", HEAD + "x,,i4,2000\n")
    new.run()
    for table in (IDENTITIES, PERSON_EVENTS, SESSIONS):
        assert new.rows(table) == shop.rows(table), table.full_name
    # Of lines that are one event the smallest anonymous id is kept.
    assert {row["anonymous_id"] for row in new.rows(EVENTS) if row["item_id"] == "i5"} == {"a"}


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(
            one, marks=pytest.mark.slow if one.endswith("events-published") else pytest.mark.long
        )
        for one in crash_points.IDENTITY
    ],
)
def test_a_run_that_was_killed_is_repaired(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    shop = Workshop(spark, tmp_path, WEB)
    shop.land("1.csv", HEAD + "x,,i1,0\ny,,i2,0\nz,carl,i3,0\n")
    shop.run()
    shop.land("2.csv", HEAD + "x,ann,i4,1000\n")

    def die(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(crash_points, "point", die)
        shop.run()
    shop.land("3.csv", HEAD + "x,,i5,2000\nx,bob,i6,500\n")
    shop.run()
    assert users_of(shop) == {
        "bob": ["i1", "i6"], "ann": ["i4", "i5"], "anonymous:y": ["i2"], "carl": ["i3"],
    }  # fmt: skip
    assert links_of(shop) == [("x", "bob"), ("x", "ann"), ("z", "carl")]


@pytest.mark.slow
def test_what_others_did_is_repaired_and_losses_are_noticed(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, WEB)
    shop.land("1.csv", HEAD + "x,,i1,0\ny,,i2,0\nx,ann,i3,1000\n")
    shop.run()
    made = [shop.rows(table) for table in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    for table, change in (
        (IDENTITIES, {"user_id": "'mallory'"}), (PERSON_EVENTS, {"user_id": "'mallory'"}),
    ):  # fmt: skip
        shop.table(table).update(updates=change)
        done = shop.run()
        assert any("was changed by another writer" in note for note in done.notes), done.notes
        assert made == [shop.rows(one) for one in (IDENTITIES, PERSON_EVENTS, SESSIONS)]
    file, *_ = data_files(shop.lake.path(PERSON_EVENTS))
    rows = pq.read_table(file)
    pq.write_table(rows.slice(1), file)
    with pytest.raises(AuditFailed, match=r"silver\.events: file .* is damaged"):
        shop.run()
    shop.run(options={"rebuild": True})
    assert made == [shop.rows(one) for one in (IDENTITIES, PERSON_EVENTS, SESSIONS)]


@pytest.mark.slow
def test_a_person_is_forgotten_with_their_devices(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SESSIONMILL_ID_KEY", "k" * 40)
    settings.cache_clear()
    shop = Workshop(spark, tmp_path, WEB + "max_reject_share = 1\n")
    mine = ["c-one,,i1,0", "c-one,ann,i2,1000", "c-two,ann,i3,2000", "c-two,,i4,3000", "c-one,,,5"]
    others = ["c-two,bob,i5,4000", "c-bob,,i6,0", "c-bob,bob,i7,10", "c-bob,,,7", ",carl,i8,0"]
    shop.land("1.csv", HEAD + "\n".join([*mine, *others]) + "\n")
    shop.land("2.csv", HEAD + "c-one,,i1,600\nc-bob,,i6,600\n")
    shop.run()
    done = forget(shop.context(), "ann")
    assert (done["events"], done["rejects"], done["landing_lines"]) == (5, 1, 6)
    assert users_of(shop) == {"bob": ["i6", "i7", "i6", "i5"], "carl": ["i8"]}
    assert (
        where("ann", shop.lake_root, shop.landing)
        == where("c-one", shop.lake_root, shop.landing)
        == []
    )
    # (Bob was on the other one, too.)
    assert links_of(shop) == [("c-bob", "bob"), ("c-two", "bob")]
    # Delivered again, they do not come back.
    shop.land("3.csv", HEAD + "\n".join([*mine, *others]) + "\n")
    again = shop.run()
    assert "Skipped 5 lines of erased users" in again.notes
    assert users_of(shop) == {"bob": ["i6", "i7", "i6", "i5"], "carl": ["i8"]}
    settings.cache_clear()


@pytest.mark.long
def test_anonymous_ids_are_hashed_with_user_ids(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SESSIONMILL_ID_KEY", "k" * 40)
    settings.cache_clear()
    shop = Workshop(spark, tmp_path, WEB + "[privacy]\nhash_user_id = true\n")
    shop.land("1.csv", HEAD + "c-one,,i1,0\nc-one,ann,i2,1000\nc-two,,i3,0\nc-two,,,0\n")
    shop.run()
    assert where("ann", shop.lake_root) == where("c-one", shop.lake_root) == []
    assert where("c-two", shop.lake_root) == []
    secret = Privacy(b"k" * 40, "web", True, frozenset())
    assert users_of(shop) == {
        secret.pseudonym("ann"): ["i1", "i2"], f"anonymous:{secret.of_anonymous('c-two')}": ["i3"],
    }  # fmt: skip
    assert forget(shop.context(), "ann")["events"] == 2
    assert [row["item_id"] for row in shop.rows(EVENTS)] == ["i3"]
    assert where("c-one", shop.lake_root, shop.landing) == []
    settings.cache_clear()
