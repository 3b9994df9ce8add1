"""What published lists were worth: by a slow oracle, by both clocks, night after night."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

from expectations.lists import JUDGED
from expectations.lists import checks as suite
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import AuditFailed, SettingsError
from jobs.core.settings import settings
from jobs.core.source_file import load_source
from jobs.core.tables import LISTS, RECOMMENDATIONS, SEQUENCES
from jobs.lake.context import Context
from jobs.lake.delta import Lake
from jobs.recommend import lists
from jobs.recommend.counted import Counted
from jobs.recommend.lists import Publication, audit, judge
from models.core.rows import Rows
from models.networks.baselines import PersonalTop, RecentPopularity
from models.networks.methods import config
from models.networks.scoring import best
from models.serving.rules import Rules, best_of, permitted
from tests.support.gold_world import DAY, Event, write_gold
from tests.support.recorded import SOURCE
from tests.support.webhook import webhook

ITEMS = [f"i{number:02d}" for number in range(15)]
BEFORE: dict[str, list[Event]] = {
    "ann": [("i00", 0, 1), ("i01", DAY, 2), ("i01", 2 * DAY, 3), ("i14", 2 * DAY + 1, 3)],
    "bob": [("i02", DAY, 1), ("i03", 2 * DAY, 2, "negative")],
    "cat": [("i01", 2 * DAY, 1)],
}
NIGHT: dict[str, list[Event]] = {
    "ann": [("i01", 3 * DAY, 4), ("i05", 3 * DAY + 5, 4), ("i05", 3 * DAY + 6, 4)],
    "bob": [("i13", 3 * DAY + 7, 3), ("i00", 3 * DAY + 8, 3, "exposed")],
    "cat": [("i12", 4 * DAY, 2)],  # (the day after)
    "dan": [("i01", 3 * DAY + 9, 1)],  # new
}
GIVEN = {"ann": ["i05", "i07", "i01"], "bob": ["i01", "i02"], "cat": ["i01"]}


def no_jvm() -> Any:
    raise AssertionError("no JVM")


def world(root: Path, serving: str = "", day: int | None = 3) -> Context:
    file = root / "toy.toml"
    file.write_text(SOURCE + "[serving]\n" + serving)
    of = None if day is None else date(1970, 1, 1) + timedelta(days=day)
    return Context(load_source(str(file)), Lake(no_jvm, str(root / "lake"), "toy"), of, "test")


def merged(*parts: dict[str, list[Event]]) -> dict[str, list[Event]]:
    users = dict.fromkeys(user for part in parts for user in part)
    return {user: [event for part in parts for event in part.get(user, [])] for user in users}


def publish(
    root: Path, given: dict[str, list[str]], sequences: int, version: str = "1",
    rules: str | None = None,
) -> None:  # fmt: skip
    """Lists in `gold.recommendations`, as `jobs score` publishes them, now."""
    rows = [
        {"user_id": user, "model_name": "toy", "model_version": version, "rules": rules,
         "created_ts": datetime.now(UTC),
         "items": [{"item_id": one, "score": -float(at)} for at, one in enumerate(items)]}
        for user, items in given.items()
    ]  # fmt: skip
    by = [Transaction(RECOMMENDATIONS.app_id("toy", SEQUENCES), sequences)]
    write_deltalake(
        RECOMMENDATIONS.path(str(root / "lake"), "toy"),
        pa.Table.from_pylist(rows, arrow_schema(RECOMMENDATIONS.columns)),
        mode="overwrite", commit_properties=CommitProperties(app_transactions=by),
    )  # fmt: skip


def stored(root: Path) -> list[dict[str, Any]]:
    table = DeltaTable(LISTS.path(str(root / "lake"), "toy"))
    rows: list[dict[str, Any]] = table.to_pyarrow_table().to_pylist()
    return sorted(rows, key=lambda row: (row["night"], row["model_version"]))


def slow(given: dict[str, list[str]], wanted: dict[str, set[str]]) -> tuple[float, float]:
    """Hit rate@10 and NDCG@10 over users, from the definitions."""
    hits, gains = [], []
    for user, items in wanted.items():
        ten = given.get(user, [])[:10]
        hits.append(float(any(one in items for one in ten)))
        gain = sum(1 / math.log2(at + 2) for at, one in enumerate(ten) if one in items)
        gains.append(gain / sum(1 / math.log2(at + 2) for at in range(min(10, len(items)))))
    return sum(hits) / len(hits), sum(gains) / len(gains)


WANTED = {"ann": {"i01", "i05"}, "bob": {"i13"}, "dan": {"i01"}}
# By hand: counts before the night are i01 3, i00 1, i02 1, i14 1; then the order of the items.
POPULAR = ["i01", "i00", "i02", "i14", "i03", "i04", "i05", "i06", "i07", "i08"]
BY_COUNTS = {
    "recent_pop": {"ann": POPULAR, "bob": POPULAR},
    "personal_top": {
        "ann": ["i01", "i00", "i14", "i02", *POPULAR[4:]],
        "bob": ["i02", "i01", "i00", "i14", *POPULAR[4:]],
    },
}


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A log of three days with lists made from them, and then the fourth day."""
    write_gold(tmp_path / "lake", "toy", BEFORE, ITEMS)
    publish(tmp_path, GIVEN, 0)
    write_gold(tmp_path / "lake", "toy", merged(BEFORE, NIGHT), ITEMS)
    return tmp_path


def test_a_night_of_a_replayed_log_by_a_slow_oracle(told: Path) -> None:
    result = judge(world(told))
    [row] = stored(told)
    assert (row["source"], row["model_version"], row["clock"]) == ("toy", "1", "log")
    assert (row["night"], row["sequences_version"]) == (date(1970, 1, 4), 0)
    assert (row["users"], row["new_users"], row["targets"], row["events_left_out"]) == (3, 1, 4, 0)
    known = {user: WANTED[user] for user in ("ann", "bob")}
    for name, given in {"served": GIVEN, **BY_COUNTS}.items():
        for prefix, wanted in (("", WANTED), ("known_", known)):
            found = tuple(row[f"{prefix}{name}_{one}_at_10"] for one in ("hr", "ndcg"))
            assert found == pytest.approx(slow(given, wanted)), (name, prefix)
        assert row[f"{name}_ndcg_at_10_low"] <= row[f"{name}_ndcg_at_10"]
    assert "by the log's clock: 3 users (1 new), 4 targets" in result.notes[-1]

    version = DeltaTable(LISTS.path(str(told / "lake"), "toy")).version()
    assert judge(world(told)).notes[-1] == "these rows are in ops.lists already"
    assert DeltaTable(LISTS.path(str(told / "lake"), "toy")).version() == version
    late = {"cat": [("i01", 3 * DAY + 100, 2)]}
    write_gold(told / "lake", "toy", merged(BEFORE, NIGHT, late), ITEMS)
    judge(world(told))
    [again] = stored(told)
    assert again["users"] == 4, "events that came late count"


def test_without_a_day_it_is_the_newest_events(told: Path) -> None:
    judge(world(told, day=None))
    [row] = stored(told)
    assert row["night"] == date(1970, 1, 5) and row["users"] == 1


def test_lists_are_those_that_were_there_before_an_event(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The night's second lists, of another model, came after 7 us of it; the first ones after 5."""
    publish(told, {"bob": ["i13"], "dan": ["i01"]}, 0, "2")
    first, second = lists.published(world(told))
    at = [3 * DAY + 5, 3 * DAY + 8]
    moved = [
        Publication(one.version, us, one.sequences)
        for one, us in zip((first, second), at, strict=True)
    ]
    monkeypatch.setattr(lists, "published", lambda _: moved)
    monkeypatch.setattr(lists, "_us", lambda _: 0)  # made long ago
    result = judge(world(told))
    one, two = stored(told)
    assert [row["clock"] for row in (one, two)] == ["published"] * 2
    assert any(
        "1 positive events of 1970-01-04 were before the first lists" in n for n in result.notes
    )
    assert one["events_left_out"] == 1
    wanted = {"ann": {"i05"}, "bob": {"i13"}}
    assert (one["served_hr_at_10"], one["served_ndcg_at_10"]) == slow(GIVEN, wanted)
    assert (two["users"], two["new_users"], two["served_hr_at_10"]) == (1, 1, 0.0), "dan was new"


def test_lists_that_are_published_before_a_night_are_judged_by_their_time(tmp_path: Path) -> None:
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    number = (tomorrow - date(1970, 1, 1)).days
    write_gold(tmp_path / "lake", "toy", BEFORE, ITEMS)
    publish(tmp_path, GIVEN, 0)
    write_gold(tmp_path / "lake", "toy", merged(BEFORE, {"ann": [("i07", number * DAY, 4)]}), ITEMS)
    judge(world(tmp_path, day=number))
    [row] = stored(tmp_path)
    assert (row["night"], row["clock"], row["served_hr_at_10"]) == (tomorrow, "published", 1.0)
    assert row["served_ndcg_at_10"] == pytest.approx(1 / math.log2(3))


def test_a_night_without_lists_or_events_is_skipped_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="python -m jobs run --source toy first"):
        judge(world(tmp_path))
    write_gold(tmp_path / "lake", "toy", merged(BEFORE, NIGHT), ITEMS)
    [note] = judge(world(tmp_path)).notes
    assert note == "the night of 1970-01-04: skipped, no lists were made before it"
    publish(tmp_path, GIVEN, 0)  # (made from the night itself)
    assert judge(world(tmp_path)).notes == [note]
    [note] = judge(world(tmp_path, day=9)).notes
    assert note == "the night of 1970-01-10: skipped, it has no positive event"
    assert not (tmp_path / "lake/toy/ops/lists").exists()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    with webhook() as (url, messages):
        monkeypatch.setenv("SESSIONMILL_NOTIFY_URL", url)
        settings.cache_clear()
        yield messages
    monkeypatch.delenv("SESSIONMILL_NOTIFY_URL")
    settings.cache_clear()


def test_the_webhook_hears_of_nights_in_a_row_below_the_baselines(
    tmp_path: Path, heard: list[dict[str, Any]]
) -> None:
    """Users repeat their one item; lists are worth nothing on nights 1, 3 and 4."""
    users = {f"u{n}": f"i{n % 5:02d}" for n in range(20)}
    log: dict[str, list[Event]] = {user: [(item, 0, 1)] for user, item in users.items()}
    write_gold(tmp_path / "lake", "toy", log, ITEMS)
    for night in range(1, 5):
        publish(tmp_path, {user: [item if night == 2 else "i14"] for user, item in users.items()},
                night - 1, str(night))  # fmt: skip
        log = merged(log, {user: [(item, night * DAY, night + 1)] for user, item in users.items()})
        write_gold(tmp_path / "lake", "toy", log, ITEMS)
        context = world(tmp_path, "nights = 2", night)
        notes = judge(context).notes
        assert len(heard) == (night == 4), notes
    [message] = heard
    assert message["kind"] == "lists" and message["text"] == notes[-1]
    assert "in the last 2 nights with lists, 1970-01-04 to 1970-01-05" in message["text"]
    assert message["nights"] == ["1970-01-04", "1970-01-05"]
    assert message["ndcg"]["served"] == 0 and message["ndcg"]["personal_top"] == 1
    judge(context)
    assert len(heard) == 1, "nothing new, nobody is told again"


def test_baselines_are_those_of_the_methods(tmp_path: Path) -> None:
    dice = np.random.default_rng(2)
    kinds = ("positive", "negative", "exposed")
    log: dict[str, list[Event]] = {
        f"u{user:02d}": [
            (ITEMS[int(dice.integers(15))], int(when) * DAY // 4, 1, str(dice.choice(kinds)))
            for when in sorted(dice.integers(0, 100, int(dice.integers(1, 12))))
        ]
        for user in range(30)
    }
    write_gold(tmp_path / "lake", "toy", log, ITEMS)
    past = lists.opened(world(tmp_path), 0)
    rows = Rows(past.item, past.ts, past.session, past.feedback == 0,
                np.append(past.start, len(past.item)))  # fmt: skip
    begin, end, users = rows.start[:-1], rows.start[1:], np.arange(30)
    for rules in (None, Rules(dice.random(15) < 0.8, 5 * DAY, int(past.ts.max()), 2,
                              dice.integers(-1, 4, 15))):  # fmt: skip
        counted = Counted.of(past, rules)
        for made, ours in (
            (RecentPopularity, counted.recent_pop),
            (PersonalTop, counted.personal_top),
        ):
            name = "recent_pop" if made is RecentPopularity else "personal_top"
            model = made(15, config(name).model)
            model.fit(rows)
            scores = model.score(rows, begin, end)
            if rules is None:
                place, score = best(scores, 10)
            else:
                place, score = best_of(permitted(scores, rules, rows, begin, end, None), 10, rules)
            want = torch.where(torch.isfinite(score), place + 1, 0)
            assert ours(users).tolist() == want.tolist(), (name, rules is None)
        assert ours(np.array([-1])).tolist() == [[0] * 10], "a stranger gets no list"


def good(**other: Any) -> dict[str, Any]:
    values = {
        f"{prefix}{name}_{metric}_at_10{end}": value
        for prefix in ("", "known_") for name in JUDGED for metric in ("hr", "ndcg")
        for end, value in (("", 0.5), ("_low", 0.25), ("_high", 0.75))
    }  # fmt: skip
    now = datetime(2024, 1, 1, tzinfo=UTC)
    return values | {
        "source": "toy", "night": date(2024, 1, 1), "model_version": "1", "model_name": "toy",
        "clock": "log", "published_ts": now, "created_ts": now, "sequences_version": 0, "users": 2,
        "new_users": 1, "targets": 2, "events_left_out": 0, "made_ts": now,
    } | other  # fmt: skip


BROKEN: dict[str, dict[str, Any]] = {
    "clock_is_known": {"clock": "wall"},
    "users_are_counted": {"new_users": 3},
    "values_are_shares": {"served_hr_at_10": 1.5, "served_hr_at_10_high": 2.0},
    "intervals_have_their_value": {"personal_top_ndcg_at_10_low": 0.6},
    "known_users_have_values": {"known_recent_pop_hr_at_10": None},
}


@pytest.mark.parametrize("name", [*BROKEN, "night_and_model_are_key", "nothing"])
def test_a_broken_row_is_refused_by_the_name_of_its_check(tmp_path: Path, name: str) -> None:
    assert {*BROKEN, "night_and_model_are_key"} == {check.name for check in suite()}
    rows = [
        good(),
        good(model_version="1" if name.endswith("key") else "2", **BROKEN.get(name, {})),
    ]
    table = pa.Table.from_pylist(rows, arrow_schema(LISTS.columns))
    if name == "nothing":
        audit(world(tmp_path), table)
        return
    with pytest.raises(AuditFailed, match=f"1 of 6 checks failed(?s:.)*{name}"):
        audit(world(tmp_path), table)


@pytest.mark.parametrize("clock", ["published", "log"])
def test_lists_whose_sequences_are_gone_are_skipped(
    told: Path, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    """`jobs maintain` and `jobs forget` remove files of older versions."""
    context = world(told)
    path = SEQUENCES.path(str(told / "lake"), "toy")
    there = {Path(one.removeprefix("file://")).name for one in DeltaTable(path).file_uris()}
    gone = [file for file in Path(path).glob("*.parquet") if file.name not in there]
    assert gone
    for file in gone:
        file.unlink()
    if clock == "published":
        [one] = lists.published(context)
        early = Publication(one.version, 3 * DAY, one.sequences)
        monkeypatch.setattr(lists, "published", lambda _: [early])
        monkeypatch.setattr(lists, "_us", lambda _: 0)
    notes = judge(context).notes
    skipped = {
        "published": ["model version 1: skipped: ", "none of its events has lists to judge"],
        "log": ["no lists were made before it"],
    }[clock]
    assert len(notes) == len(skipped)
    assert all(words in note for words, note in zip(skipped, notes, strict=True)), notes
    assert not (told / "lake/toy/ops/lists").exists()
