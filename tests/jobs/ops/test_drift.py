"""Nights that look unlike those before them, and the webhook that hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expectations import nights as suite
from jobs.core import webhook as core_webhook
from jobs.core.errors import AuditFailed, SettingsError
from jobs.core.settings import settings
from jobs.core.source_rules import DriftPart
from jobs.core.tables import NIGHTS, SEQUENCES
from jobs.ops.drift import Profile, compare, stability_index
from tests.support.spark_tools import CLICKS, Workshop
from tests.support.webhook import webhook

FIRST = date(2026, 3, 2)
USERS = 45


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    with webhook() as (url, heard):
        monkeypatch.setenv("SESSIONMILL_NOTIFY_URL", url)
        settings.cache_clear()
        yield heard
    monkeypatch.delenv("SESSIONMILL_NOTIFY_URL")
    settings.cache_clear()


def a_day(
    number: int, users: int = USERS, pause_s: int = 60, item: str = "i", late: int = 0
) -> str:
    """Each user opens two sessions of seven clicks; of 20 items a day one is new."""
    lines = []
    at = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC) + timedelta(days=number)
    for user in range(users):
        for hour in (8 + late, 15 + late):
            for step in range(7):
                ts = int(at.timestamp()) + hour * 3600 + user + step * pause_s
                lines.append(f"u{user},{item}{number + (user + step) % 20},{ts}")
    return "\n".join(["user,item,ts", *lines]) + "\n"


@pytest.mark.long
def test_a_history_then_nights_each_unusual_in_its_own_way(
    spark: Any, tmp_path: Path, told: list[dict[str, Any]]
) -> None:
    shop = Workshop(spark, tmp_path, CLICKS)
    days = [FIRST + timedelta(days=number) for number in range(20)]
    for number in range(6):
        shop.land(f"{number:02}.csv", a_day(number))
    shop.run()
    [note] = shop.run("drift", str(days[5])).notes
    assert note == f"5 days before {days[5]} are known; from 7 on drift is judged"
    rows = {row["day"]: row for row in shop.rows(NIGHTS)}
    assert list(rows) == days[:6]
    row = rows[days[3]]
    counts = {name: row[name] for name in ("events", "users", "sessions", "items", "new_items")}
    assert counts == {"events": 630, "users": 45, "sessions": 90, "items": 20, "new_items": 1}
    assert rows[days[0]]["new_items"] == 20
    # Six pauses of 60 s a session: under 2^6 s, and at least 2^5.
    assert row["gaps"] == [0] * 6 + [540] + [0] * 17

    for number in range(6, 10):
        shop.land(f"{number:02}.csv", a_day(number))
    shop.run()
    made = {row["day"]: row["made_ts"] for row in shop.rows(NIGHTS)}
    result = shop.run("drift", str(days[9]))
    assert result.notes == [f"{days[9]} is like the 9 days before it"]
    again = {row["day"]: row["made_ts"] for row in shop.rows(NIGHTS)}
    assert set(again) == set(days[:10])
    assert all(again[day] == made[day] for day in made)  # a history is read once

    # A third of the users; the whole log at a click a second; a shop that was filled anew.
    named: set[str] = set()
    for number, odd, which in (
        (10, a_day(10, users=13), {"events_as_usual", "users_as_usual", "sessions_as_usual"}),
        (11, a_day(11, pause_s=1), {"gaps_as_usual"}),
        (12, a_day(12, item="new"), {"new_items_as_usual"}),
    ):
        shop.land(f"{number:02}.csv", odd)
        shop.run()
        result = shop.run("drift", str(days[number]))
        [note] = result.notes
        assert note.startswith(f"clicks: {days[number]} differs from the {number} days before it\n")
        message = told.pop()
        assert not told
        assert message["kind"] == "drift" and set(message["unusual"]) == which
        assert message["text"] == note and message["day"] == str(days[number])
        assert all(f"  {name}: " in note for name in which)
        found = result.checks[NIGHTS.full_name]
        assert set(found["warned"]) == which and found["failed"] == {}
        unknown = set(found["not_evaluated"])  # 13 users make too few pauses
        assert unknown == ({"gaps_as_usual"} if number == 10 else set())
        assert ("gaps_as_usual was not evaluated: 156 pauses" in note) == bool(unknown)
        assert found["held"] == 5 - len(which) - len(unknown)
        named |= which
    assert named == {check.name for check in suite.checks()}
    assert "20 of 20 items were never seen before (100%), 5% are usual" in note

    # The same nights by the other policy: the tables stand, the line stops, and the words help.
    shop.describe(CLICKS + '\n[drift]\npolicy = "stop"\n')
    before = shop.version(SEQUENCES)
    with pytest.raises(AuditFailed, match="13 users, 45 are usual") as stopped:
        shop.run("drift", str(days[10]))
    assert "mark this task as a success" in str(stopped.value)
    assert shop.version(SEQUENCES) == before
    shop.describe(CLICKS + '\n[drift]\npolicy = "off"\n')
    assert "Drift check skipped" in shop.run("drift", str(days[10])).notes[0]
    with pytest.raises(SettingsError, match="give its --day"):
        shop.run("drift")


def test_what_is_unusual_is_beyond_the_factor_and_beyond_chance() -> None:
    rules, day = DriftPart(), date(2026, 3, 30)  # a Monday

    def weeks(events: int, weekend: int) -> dict[date, Profile]:
        found = {}
        for back in range(1, 29):
            at = day - timedelta(days=back)
            many = weekend if at.weekday() > 4 else events
            found[at] = Profile(events=many, users=many, sessions=many, items=many)
        return found

    def odd(many: int, at: date, before: dict[date, Profile]) -> set[str]:
        night = Profile(events=many, users=many, sessions=many, items=many)
        return set(compare(at, night, before, rules)[0])

    three = {"events_as_usual", "users_as_usual", "sessions_as_usual"}
    busy = weeks(1000, 100)
    assert odd(499, day, busy) == odd(2001, day, busy) == three
    assert odd(500, day, busy) == odd(2000, day, busy) == set()
    # A weekend is held against weekends.
    saturday = day - timedelta(days=2)
    before = {at: one for at, one in busy.items() if at < saturday}
    assert odd(100, saturday, before) == set() and odd(1000, saturday, before) == three
    # A small log: 3 where 8 are usual is chance.
    assert odd(3, day, weeks(8, 8)) == set() and odd(20, day, weeks(8, 8)) == three
    # A night without anything.
    assert odd(0, day, busy) == three
    _, unknown = compare(day, Profile(), busy, rules)
    assert unknown == {
        "new_items_as_usual": "the day has no items",
        "gaps_as_usual": "0 pauses, on the days before 0: at least 500 are needed",
    }
    pauses = np.full(24, 50)
    for at in busy:
        busy[at].gaps = pauses
    assert compare(day, Profile(items=1, gaps=pauses), busy, rules)[1] == {}


def test_the_stability_index_is_the_textbooks() -> None:
    p, q = np.array([600, 400]), np.array([500, 500])
    expected = sum((a - b) * np.log(a / b) for a, b in ((0.6, 0.5), (0.4, 0.5)))
    assert stability_index(p, q) == pytest.approx(expected, rel=0.02)
    assert stability_index(p, p * 3) == pytest.approx(0, abs=1e-4)


def test_the_webhook_is_asked_three_times_and_never_stops_who_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(core_webhook, "PAUSES_S", (0.0, 0.0))
    settings.cache_clear()
    assert not core_webhook.send("drift", "nobody is named")
    for answers, taken in (([500, 503], True), ([500, 503, 404], False)):
        with webhook(answers) as (url, heard):
            monkeypatch.setenv("SESSIONMILL_NOTIFY_URL", url)
            settings.cache_clear()
            assert core_webhook.send("run late", "x" * 5000, day=date(2026, 3, 1)) is taken
            assert heard == (
                [{"kind": "run late", "text": "x" * 4000, "day": "2026-03-01"}] * taken
            )
    said = capsys.readouterr().out
    assert "(127.0.0.1) did not take 'run late': 404 Not Found" in said and "s3cret" not in said
    for wrong in ("no url", "http://127.0.0.1:1/hook/s3cret", "http://[::1/s3cret"):
        monkeypatch.setenv("SESSIONMILL_NOTIFY_URL", wrong)
        settings.cache_clear()
        assert not core_webhook.send("drift", "hello")
    assert "s3cret" not in capsys.readouterr().out
    monkeypatch.delenv("SESSIONMILL_NOTIFY_URL")
    settings.cache_clear()
