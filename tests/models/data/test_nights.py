"""Nights: which are asked about, and what each knows, against an oracle written the slow way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.core.errors import UserError
from models.data.load import Data, split_by_default
from models.data.nights import BORN, by_age, first_seen, night_cut, nights_asked
from models.data.splits import TEST, VALIDATION, Filters, describe, in_words, targets
from models.networks.methods import config
from models.training.fit import fit_for
from tests.support.gold_world import DAY, SECOND, Event, data_of, ring, write_gold

HOUR = 3600 * SECOND
KINDS = ("positive", "positive", "positive", "exposed", "negative", "neutral")


def busy(seed: int, nights: int = 12, users: int = 7) -> dict[str, list[Event]]:
    """Users who come now and then, with sessions across midnight, and items born along the way."""
    dice = np.random.default_rng(seed)
    story: dict[str, list[Event]] = {}
    for user in range(users):
        events: list[Event] = []
        now = int(dice.integers(nights * DAY // 2))
        session = 0
        while now < nights * DAY:
            session += 1
            for _ in range(int(dice.integers(1, 5))):
                item = int(now // DAY) // 2 + int(dice.integers(5))
                events.append((f"i{item:02d}", now, session, str(dice.choice(KINDS))))
                now += int(dice.integers(10 * SECOND, 3 * HOUR))
            now += int(dice.integers(4 * HOUR, 3 * DAY))
        if events:
            story[f"u{user}"] = [e for e in events if e[1] < nights * DAY] or events[:1]
    return story


def flat(story: dict[str, list[Event]]) -> list[tuple[str, Any]]:
    return [(user, event) for user, events in sorted(story.items()) for event in events]


def positive_days(story: dict[str, list[Event]]) -> list[int]:
    return sorted({e[1] // DAY for _, e in flat(story) if e[3] == "positive"})


def slow_rows(story: dict[str, list[Event]], start: int, filters: Filters) -> list[tuple[Any, ...]]:
    """(user, item, us) of the training rows before a night: each filter once, in its order."""
    rows = [(u, e[0], e[1], e[2]) for u, e in flat(story) if e[1] < start]
    rows = [r for r in rows if sum(o[1] == r[1] for o in rows) >= filters.min_item_events]
    rows = [r for r in rows
            if sum(o[0] == r[0] and o[3] == r[3] for o in rows) >= filters.min_session_events]  # fmt: skip
    rows = [r for r in rows
            if len({o[3] for o in rows if o[0] == r[0]}) >= filters.min_user_sessions]  # fmt: skip
    return [r[:3] for r in rows]


def slow_targets(
    story: dict[str, list[Event]], start: int, target: str
) -> list[tuple[str, list[str], list[str], int]]:
    """(user, history, what is asked for, when) of a night, event by event."""
    asked = []
    for user, events in sorted(story.items()):
        if not any(e[1] < start for e in events):
            continue
        for n, event in enumerate(events):
            opens = n == 0 or events[n - 1][2] != event[2]
            if not start <= event[1] < start + DAY:
                continue
            history = [e[0] for e in events[:n]]
            if target == "next_item" and event[3] == "positive":
                asked.append((user, history, [event[0]], event[1]))
            elif target == "next_session" and opens:
                whole = [e[0] for e in events if e[2] == event[2] and e[3] == "positive"]
                if whole:
                    asked.append((user, history, list(dict.fromkeys(whole)), event[1]))
    return asked


def at_night(data: Data, start: int) -> Data:
    assert data.at is not None
    return data.at(night_cut(start))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", ["next_item", "next_session"])
def test_each_night_knows_what_lies_before_it_and_is_asked_about_itself(
    tmp_path: Path, seed: int, target: str
) -> None:
    story = busy(seed)
    write_gold(tmp_path, "toy", story)
    filters = Filters(min_item_events=2, min_session_events=1 + seed % 2, min_user_sessions=2)
    data = data_of(tmp_path, split="nightly", nights=4, filters=filters)
    starts = nights_asked(data.sequences, data.cut)
    assert [start // DAY for start in starts] == positive_days(story)[-4:]
    first = first_seen(data.events)
    born = {}
    for _, event in flat(story):
        born[event[0]] = min(event[1], born.get(event[0], event[1]))
    for start in starts:
        night = at_night(data, start)
        known = sorted({e[0] for _, e in flat(story) if e[1] < start})
        assert sorted(night.item_ids) == known, "every item that was seen, whatever the filters"
        name = dict(enumerate(night.item_ids, 1))
        rows, users = night.training.rows, night.training.user
        owner = np.repeat(users, np.diff(rows.start))
        got = zip(owner, rows.item, rows.ts, strict=True)
        assert [(data.sequences.user_id[u], name[int(i)], int(t)) for u, i, t in got] == slow_rows(
            story, start, filters
        )
        asked = targets(night.events, night.period, TEST, night.training.vocabulary, target)  # type: ignore[arg-type]
        gold = {int(g): name.get(int(i)) for g, i in zip(asked.gold, asked.item, strict=True)}  # type: ignore[arg-type]
        told, ages = [], by_age(asked, first, start)
        for n in range(len(asked.user)):
            items = slice(int(asked.item_start[n]), int(asked.item_start[n + 1]))
            wanted = [name.get(int(i), "?") for i in asked.item[items]]
            history = [name[int(i)] for i in asked.rows.item[asked.begin[n] : asked.end[n]]]
            told.append((data.sequences.user_id[asked.user[n]], history, wanted,
                         int(asked.request_ts[n])))  # fmt: skip
        slow = slow_targets(story, start, target)
        seen = set(known)
        assert told == [
            (user, [i for i in history if i in seen], [i if i in seen else "?" for i in items], ts)
            for user, history, items, ts in slow
        ]
        assert all(item is None or item in seen for item in gold.values())
        wanted_items = [item for _, _, items, _ in slow for item in items]
        expected = [
            BORN[0] if born[i] >= start else BORN[1] if born[i] >= start - 7 * DAY else BORN[2]
            for i in wanted_items
        ]
        found = [next(age for age in BORN if ages[age][m]) for m in range(len(asked.item))]
        assert found == expected
        assert sum(mask.sum() for mask in ages.values()) == len(asked.item)
        silent = [u for u, events in story.items() if not any(e[1] < start for e in events)]
        without = [u for u in silent if any(
            start <= e[1] < start + DAY and e[3] == "positive" for e in story[u])]  # fmt: skip
        if target == "next_item":
            assert asked.left_out["users_without_history"] == len(without)


def log_of(nights: int, users: int = 4) -> dict[str, list[Event]]:
    return {
        f"u{u}": [
            (f"i{(u + n + i) % 3}", n * DAY + u * HOUR + i * SECOND, n + 1)
            for n in range(nights)
            for i in range(2)
        ]
        for u in range(users)
    }


@pytest.mark.parametrize(
    ("there", "wanted", "asked", "chosen_on"),
    [
        (5, None, 2, 1), (11, None, 5, 1), (16, None, 7, 2), (21, None, 10, 2), (40, None, 10, 7),
        (90, None, 10, 10), (5, 10, 3, 1), (16, 10, 10, 1), (16, 3, 3, 3), (16, 99, 14, 1),
    ],
)  # fmt: skip
def test_which_nights_are_asked_about_and_which_are_chosen_on(
    tmp_path: Path, there: int, wanted: int | None, asked: int, chosen_on: int
) -> None:
    write_gold(tmp_path, "toy", log_of(there))
    cut = data_of(tmp_path, split="nightly", nights=wanted).cut
    assert (cut.nights, cut.test_until) == (asked, there * DAY)
    assert cut.test_from == (there - asked) * DAY
    assert cut.valid_from == (there - asked - chosen_on) * DAY
    told = describe(cut)
    assert told["nights"] == asked and f"nightly, {asked} nights" in in_words(told)
    assert split_by_default(str(tmp_path), "toy") == ("nightly" if there >= 5 else "temporal")
    assert data_of(tmp_path, split=None).cut.split == ("nightly" if there >= 5 else "temporal")


def test_a_day_on_which_nothing_positive_happened_is_no_night(tmp_path: Path) -> None:
    story = log_of(12)
    story["u0"] += [("i1", 14 * DAY, 13, "exposed"), ("i2", 20 * DAY, 14), ("i2", 21 * DAY, 15, "neutral")]  # fmt: skip
    write_gold(tmp_path, "toy", story)
    data = data_of(tmp_path, split="nightly", nights=3)
    assert [s // DAY for s in nights_asked(data.sequences, data.cut)] == [10, 11, 20]
    assert data.cut.test_until == 21 * DAY


def test_stragglers_are_learnt_and_make_no_night(tmp_path: Path) -> None:
    """A day with less than a hundredth of the busiest one's positive events is not asked about."""
    story = log_of(12, users=4)
    story["busy"] = [("i0", 5 * DAY + n, 6) for n in range(300)]
    story["late"] = [("i1", 3 * DAY, 4), ("i2", 13 * DAY, 14), ("i2", 30 * DAY, 31), ("i2", 30 * DAY + 1, 31)]  # fmt: skip
    write_gold(tmp_path, "toy", story)
    data = data_of(tmp_path, split="nightly", nights=3)
    starts = nights_asked(data.sequences, data.cut)
    assert [s // DAY for s in starts] == [9, 10, 11] and data.cut.test_until == 12 * DAY
    asked = [
        targets(at.events, at.period, TEST, at.training.vocabulary, "next_item").request_ts
        for at in (at_night(data, start) for start in starts)
    ]
    assert max(int(ts.max()) for ts in asked) < 12 * DAY
    story["late"] += [("i2", 30 * DAY + n, 31) for n in range(2, 5)]
    write_gold(tmp_path, "toy", story)
    data = data_of(tmp_path, split="nightly", nights=3)
    assert [s // DAY for s in nights_asked(data.sequences, data.cut)] == [10, 11, 30]
    assert (at_night(data, 30 * DAY).training.rows.ts == 13 * DAY).any()


def test_too_few_nights_and_options_of_other_splits_are_refused(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", log_of(4))
    with pytest.raises(UserError, match=r"needs 5 nights .* the log has 4: load more days, or"):
        data_of(tmp_path, split="nightly")
    write_gold(tmp_path, "toy", log_of(8))
    with pytest.raises(UserError, match="--nights 0: use 1 or more"):
        data_of(tmp_path, split="nightly", nights=0)
    with pytest.raises(
        UserError, match="--nights 3 is for --split nightly, and the split is temporal"
    ):
        data_of(tmp_path, split="temporal", nights=3)
    with pytest.raises(UserError, match="are for --split temporal, and the split is nightly"):
        data_of(tmp_path, split="nightly", test_from=5)
    write_gold(tmp_path, "toy", {"a": [("x", n * DAY, n, "exposed") for n in range(9)]})
    with pytest.raises(UserError, match="the log has 0"):
        data_of(tmp_path, split="nightly")


def test_what_is_chosen_is_chosen_before_the_first_test_night(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", busy(3, nights=20))
    data = data_of(tmp_path, split="nightly", nights=6)
    cut = data.cut
    assert cut.valid_from is not None and cut.test_from is not None
    assert data.training.rows.ts.max() < cut.valid_from < cut.test_from
    asked = targets(data.events, data.period, VALIDATION, data.training.vocabulary, "next_item")
    assert len(asked.user) and asked.request_ts.min() >= cut.valid_from
    assert asked.request_ts.max() < cut.test_from
    sets = targets(data.events, data.period, VALIDATION, data.training.vocabulary, "next_session")
    assert sets.request_ts.max() < cut.test_from


@pytest.mark.training
@pytest.mark.parametrize("method", ["pop", "recent_pop", "tifu_knn", "gru4rec+st", "sasrec+habit"])
@pytest.mark.parametrize("target", ["next_item", "next_session"])
def test_nothing_of_a_night_knows_what_comes_at_it_or_after(
    tmp_path: Path, method: str, target: str
) -> None:
    """Events at and after a night become other items, times, feedback, sessions and users."""
    story = ring(users=12)
    items = [f"i{i:02d}" for i in range(15)]
    night = 7 * DAY
    changed: dict[str, list[Event]] = {
        name: [
            e
            if e[1] < night
            else (
                f"new{i % 3}",
                night + (e[1] - night) // 2,
                10 + i,
                ("positive", "negative")[i % 2],
            )
            for i, e in enumerate(events)
        ]
        for name, events in story.items()
    }
    changed["zoe"] = [(f"i{i:02d}", night + i * DAY // 5, i + 1) for i in range(15)]
    found = []
    for lake, told_story in (("one", story), ("other", changed)):
        write_gold(tmp_path / lake, "toy", told_story, items)
        data = at_night(data_of(tmp_path / lake, split="nightly"), night)
        chosen = config(method, "tiny", target=target, epochs=2)
        model = fit_for(chosen, data, 2, lambda _: None).model
        rows = data.training.rows
        scores = model.score(rows, rows.start[:-1], rows.start[1:])
        asked = targets(data.events, data.period, TEST, data.training.vocabulary, target)  # type: ignore[arg-type]
        names = np.array(data.sequences.user_id)[asked.user]
        own = names != "zoe"
        first = {n: k for k, n in reversed(list(enumerate(names))) if own[k]}
        before = {
            n: asked.rows.item[asked.begin[k] : asked.end[k]].tolist() for n, k in first.items()
        }
        found.append((data, model, scores, before))
    (one, model, scores, before), (other, second, again, after) = found
    assert one.item_ids == other.item_ids
    for name in ("item", "ts", "ordinal", "positive", "start"):
        assert np.array_equal(getattr(one.training.rows, name), getattr(other.training.rows, name))
    assert one.training.counts == other.training.counts
    mine, theirs = model.state_dict(), second.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(scores, again)
    both = after.keys() & before.keys()
    assert len(both) >= 6
    assert all(after[name] == before[name] for name in both)
