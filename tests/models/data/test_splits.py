"""Cuts, filters, targets, and that nothing before a cut knows what comes after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from deltalake import DeltaTable, write_deltalake

from models.core.config import TRAIN_UNTIL
from models.core.errors import UserError
from models.data.load import Data
from models.data.splits import TEST, VALIDATION, Filters, Targets, targets, temporal_cut
from models.networks.baselines import Popularity
from models.networks.methods import config
from models.training.fit import fit
from tests.support.gold_world import DAY, SECOND, Event, data_of, ring, write_gold


@pytest.mark.parametrize("size", [1, 2, 10, 11, 101, 997, 1000])
def test_the_cut_is_an_event_of_the_stated_rank(size: int) -> None:
    ts = np.random.default_rng(size).integers(0, 500, size)  # with ties
    cut = temporal_cut(ts)
    assert cut.valid_from == sorted(ts)[8 * (size - 1) // 10]
    assert cut.test_from == sorted(ts)[9 * (size - 1) // 10]
    assert temporal_cut(ts, 3, 4).valid_from == 3
    with pytest.raises(UserError, match="in this order"):
        temporal_cut(ts, 600, 4)


def test_a_period_starts_at_the_cut(tmp_path: Path) -> None:
    story = [("a", t, 1) for t in range(10)]
    write_gold(tmp_path, "toy", {"ann": story, "bob": [("b", 1, 1), ("b", 9, 2)]})
    data = data_of(tmp_path, valid_from=5, test_from=9)
    assert data.period.tolist() == [0] * 5 + [1] * 4 + [2] + [0, 2]


FILTERED: dict[str, list[Event]] = {
    # rare is dropped; then session 2 has one event and goes; ordinals close up
    "ann": [("a", 1, 1), ("b", 2, 1), ("rare", 3, 2), ("a", 4, 2), ("a", 5, 3), ("b", 6, 3)],
    "bob": [("a", 1, 1), ("b", 2, 1), ("a", 7, 2), ("b", 8, 2)],
    # loses a session to the session filter, then has one: dropped; its events do not bring
    # b below the item filter again (once each)
    "cat": [("b", 1, 1), ("a", 2, 1), ("b", 9, 2)],
    # after the cut: counts for nothing
    "dan": [("rare", 100, 1), ("rare", 101, 1), ("rare", 102, 1)],
}


def test_filters_golden(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", FILTERED)
    filters = Filters(min_item_events=6, min_session_events=2, min_user_sessions=2)
    data = data_of(tmp_path, valid_from=100, test_from=100, filters=filters)
    assert data.item_ids == ["a", "b"]
    rows, training = data.training.rows, data.training
    assert [data.sequences.user_id[u] for u in training.user] == ["ann", "bob"]
    assert rows.start.tolist() == [0, 4, 8]
    assert rows.item.tolist() == [1, 2, 1, 2, 1, 2, 1, 2]
    assert rows.ordinal.tolist() == [1, 1, 2, 2, 1, 1, 2, 2]
    assert rows.ts.tolist() == [1, 2, 5, 6, 1, 2, 7, 8]
    assert [(c["events"], c["items"], c["sessions"], c["users"]) for c in training.counts.values()] == [
        (13, 3, 7, 3), (12, 2, 7, 3), (10, 2, 5, 3), (8, 2, 4, 2),
    ]  # fmt: skip


def test_nothing_to_learn_from_is_refused_with_the_counts(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", FILTERED)
    with pytest.raises(
        UserError,
        match=r"0 user\(s\) left.*before the cut: 13 events, 3 items, 7 sessions, 3 users.*items with 99 events or more: 0 events",
    ):
        data_of(
            tmp_path,
            valid_from=100,
            test_from=100,
            filters=Filters(min_item_events=99, min_session_events=1, min_user_sessions=2),
        )
    write_gold(tmp_path, "none", {})
    with pytest.raises(UserError, match=r"version 0 has no event: put a log .*jobs run --source"):
        data_of(tmp_path, "none")
    with pytest.raises(UserError, match=r"paper_a leaves none of the 16 events.*--preprocess gold"):
        data_of(tmp_path, split="last_item", preprocess="paper_a")
    path = str(tmp_path / "none" / "gold" / "sequences")
    other = DeltaTable(path).to_pyarrow_table().rename_columns({"user_id": "user"})
    write_deltalake(path, other, mode="overwrite", schema_mode="overwrite")
    with pytest.raises(UserError, match=r"version 1 has no column user_id: .*run `python -m jobs"):
        data_of(tmp_path, "none")
    write_gold(tmp_path, "one", {"ann": [("a", 1, 1), ("a", 2, 1)], "bob": [("a", 1, 1)]})
    with pytest.raises(UserError, match=r"vocabulary of 1 item"):
        data_of(tmp_path, "one", valid_from=100, test_from=100)
    write_gold(tmp_path, "short", {"ann": [("a", 1, 1)], "bob": [("b", 1, 1)]})
    with pytest.raises(UserError, match="no user has two events"):
        data_of(tmp_path, "short", valid_from=100, test_from=100)


ASKED: dict[str, list[Event]] = {
    "ann": [
        ("a", 1, 1), ("b", 2, 1), ("a", 11, 2), ("b", 21, 2),  # session 2 begins before the test
        ("a", 30, 3), ("new", 31, 3), ("a", 32, 3), ("b", 33, 3, "exposed"),
        ("b", 40, 4, "exposed"),  # a session without a positive is no target
    ],
    "bob": [("b", 3, 1), ("a", 4, 1), ("b", 35, 2), ("a", 36, 2)],
    "cat": [("a", 25, 1), ("b", 36, 2)],  # no history before the test
}  # fmt: skip


def asked_of(data: Data, which: int, target: str) -> Targets:
    return targets(data.events, data.period, which, data.training.vocabulary, target)  # type: ignore[arg-type]


def told(asked: Targets, data: Data) -> list[tuple[str, list[int], list[int], int, bool]]:
    """(user, history, target, time, new session) of each request, as vocabulary indices."""
    return [
        (
            data.sequences.user_id[asked.user[n]],
            asked.rows.item[asked.begin[n] : asked.end[n]].tolist(),
            asked.item[asked.item_start[n] : asked.item_start[n + 1]].tolist(),
            int(asked.request_ts[n]),
            bool(asked.new_session[n]),
        )
        for n in range(len(asked.user))
    ]


def test_a_session_of_which_only_unknown_items_were_seen_opens_for_the_model(
    tmp_path: Path,
) -> None:
    """It is inside a session for who counts, and after [ST] for who has never heard of `new`."""
    write_gold(
        tmp_path,
        "toy",
        {u: [("a", 1, 1), ("b", 2, 1), ("new", 30, 2), ("a", 31, 2)] for u in ("ann", "bob")},
    )
    asked = asked_of(data_of(tmp_path, valid_from=10, test_from=20), TEST, "next_item")
    assert asked.new_session.tolist() == [True, False] * 2
    assert asked.opens.tolist() == [True, True] * 2
    assert asked.select(np.array([1])).opens.tolist() == [True]


def test_targets_golden(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", ASKED)
    data = data_of(tmp_path, valid_from=10, test_from=20)
    sessions = asked_of(data, TEST, "next_session")
    assert told(sessions, data) == [
        ("ann", [1, 2, 1, 2], [1, 0], 30, True),  # a set: a once, `new` is a miss
        ("bob", [2, 1], [2, 1], 35, True),  # in the order in which they came
    ]
    assert sessions.left_out == {"users_without_history": 1, "targets_without_history": 2}
    items = asked_of(data, TEST, "next_item")
    assert told(items, data) == [
        ("ann", [1, 2, 1], [2], 21, False),
        ("ann", [1, 2, 1, 2], [1], 30, True),
        ("ann", [1, 2, 1, 2, 1], [0], 31, False),
        ("ann", [1, 2, 1, 2, 1], [1], 32, False),
        ("bob", [2, 1], [2], 35, True),
        ("bob", [2, 1, 2], [1], 36, False),
    ]
    # What the models are told: of session 3 they know its a, but not `new`.
    assert items.opens.tolist() == [False, True, False, False, True, False]
    # Validation ends where the test begins, also inside a session.
    assert told(asked_of(data, VALIDATION, "next_session"), data) == [
        ("ann", [1, 2], [1], 11, True)
    ]


def test_splits_by_user(tmp_path: Path) -> None:
    story = {
        name: [("a", base + 1, 1), ("b", base + 2, 1), ("a", base + 3, 2), ("b", base + 4, 3)]
        for name, base in (("ann", 0), ("bob", 1000))
    }
    write_gold(tmp_path, "toy", story)
    item = data_of(tmp_path, split="last_item")
    assert item.period.tolist() == [0, 0, 1, 2] * 2
    session = data_of(tmp_path, split="last_session")
    assert session.period.tolist() == [0, 0, 1, 2] * 2
    assert [t[1:3] for t in told(asked_of(session, TEST, "next_session"), session)] == [
        ([1, 2, 1], [2]),
        ([1, 2, 1], [2]),
    ]
    with pytest.raises(UserError, match="are for --split temporal"):
        data_of(tmp_path, split="last_item", test_from=5)
    with pytest.raises(UserError, match="temporal, last_session, last_item"):
        data_of(tmp_path, split="random")


@pytest.mark.training
@pytest.mark.parametrize("method", ["pop", "personal_top", "gru4rec+st", "bert4rec+st+sse+tsa"])
@pytest.mark.parametrize("target", ["next_item", "next_session"])
@pytest.mark.parametrize("until", TRAIN_UNTIL)
def test_nothing_before_the_cut_knows_what_comes_after(
    tmp_path: Path, method: str, target: str, until: str
) -> None:
    """Events after the pinned test cut become other items, times, feedback, sessions and users."""
    story = ring(users=12)
    valid, test = 6 * DAY, 8 * DAY
    changed: dict[str, list[Event]] = {
        name: [
            e if e[1] < test else (f"new{i % 3}", test + (e[1] - test) // 2, 10 + i, "negative")
            for i, e in enumerate(events)
        ]
        for name, events in story.items()
    }
    changed["zoe"] = [(f"i{i:02d}", test + i, i + 1) for i in range(15)]
    items = [f"i{i:02d}" for i in range(15)]
    found = []
    for lake, told_story in (("one", story), ("other", changed)):
        write_gold(tmp_path / lake, "toy", told_story, items)
        data = data_of(tmp_path / lake, valid_from=valid, test_from=test, train_until=until)
        chosen = config(method, "tiny", target=target, epochs=2)
        model = fit(chosen, data, lambda _: None).model
        rows = data.training.rows
        scores = model.score(rows, rows.start[:-1], rows.start[1:])
        found.append((data, model, scores))
    (one, first, scores), (other, second, again) = found
    assert one.item_ids == other.item_ids
    for name in ("item", "ts", "ordinal", "positive", "start"):
        assert np.array_equal(getattr(one.training.rows, name), getattr(other.training.rows, name))
    assert one.training.counts == other.training.counts
    mine, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(scores, again)


def late_items() -> dict[str, list[Event]]:
    """A ring of whose items one comes up in the validation period only, and one in the test's."""
    story = ring(users=20)
    story["u000"] += [("late", 6 * DAY + SECOND, 90)]
    story["u001"] += [("later", 8 * DAY + SECOND, 90)]
    return {name: sorted(events, key=lambda one: one[1]) for name, events in story.items()}


@pytest.mark.parametrize("split", ["temporal", "last_session"])
def test_training_until_the_test_has_all_rows_and_items_before_it(
    tmp_path: Path, split: str
) -> None:
    write_gold(tmp_path, "toy", late_items())
    pins = {"valid_from": 6 * DAY, "test_from": 8 * DAY} if split == "temporal" else {}
    data = data_of(tmp_path, split=split, train_until="test", **pins)
    alone = data_of(tmp_path, split=split, **pins)
    assert data.selection is not None and alone.selection is None
    for part, periods in ((data, (0, 1)), (data.selection, (0,)), (alone, (0,))):
        assert len(part.training.rows.item) == np.isin(data.period, periods).sum()
    assert data.selection.item_ids == alone.item_ids
    if split == "temporal":
        assert set(data.item_ids) - set(alone.item_ids) == {"late"}


@pytest.mark.training
@pytest.mark.parametrize("method", ["sasrec+habit", "bert4rec+st", "sessionrec-gru4rec"])
def test_the_second_training_is_one_from_scratch_for_the_best_epochs(
    tmp_path: Path, method: str
) -> None:
    """With a constant learning rate it is what a log whose validation period is empty gives."""
    write_gold(tmp_path, "toy", late_items())
    wanted = {"schedule": "constant", "patience": 1, "learning_rate": 0.02, "dropout": 0.1}
    said: list[str] = []
    cut = {"valid_from": 6 * DAY, "test_from": 8 * DAY}
    chosen = config(method, "tiny", epochs=6, **wanted)
    twice = fit(chosen, data_of(tmp_path, train_until="test", **cut), said.append)
    first = fit(chosen, data_of(tmp_path, **cut), lambda _: None)
    assert (twice.best_epoch, twice.epochs, twice.validation) == (
        first.best_epoch, first.epochs, first.validation,
    )  # fmt: skip
    assert twice.curves["loss"] == first.curves["loss"]
    assert len(twice.curves["again_loss"]) == twice.best_epoch
    scratch = fit(
        config(method, "tiny", epochs=twice.best_epoch, **wanted),
        data_of(tmp_path, valid_from=8 * DAY, test_from=8 * DAY),
        lambda _: None,
    )
    mine, theirs = twice.model.state_dict(), scratch.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any("training again for" in line for line in said)


def test_a_baseline_counts_until_the_test_and_is_validated_before(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", late_items())
    cut = {"valid_from": 6 * DAY, "test_from": 8 * DAY}
    until = data_of(tmp_path, train_until="test", **cut)
    counted = fit(config("pop", "tiny"), until, lambda _: None)
    before = fit(config("pop", "tiny"), data_of(tmp_path, **cut), lambda _: None)
    assert isinstance(counted.model, Popularity) and counted.validation == before.validation
    assert int(counted.model.count.sum()) == (until.period < TEST).sum()
    assert counted.model.count[until.item_ids.index("late")] == 1
