"""SessionRec: what a session is made of, what it must not see, and that it finds what is planted.

V = 6 items. One user: 1 2 | 3 | 4 5, at seconds 10 20 | 100 | 200 210; codes of feedback: 0 taken,
1 negative, 2 exposed, 3 neutral.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.core.errors import UserError
from models.core.rows import Rows
from models.data.catalogue import read_side
from models.data.load import Data
from models.data.splits import TEST, targets
from models.evaluation.evaluate import evaluate
from models.networks.methods import SESSION_ENCODERS, config, count_parameters, recommender
from models.networks.pooling import POOLINGS
from models.networks.saved_model import Stored
from models.networks.sessionrec import SessionBatch, SessionRec
from models.networks.side_information import Side
from models.serving.answer import recommend
from models.training import epoch
from models.training.fit import fit
from tests.support.gold_world import (
    DAY,
    SECOND,
    Event,
    attributes_table,
    data_of,
    evidence,
    rows_of,
    write_gold,
)

V = 6
USER = [(1, 10, 1), (2, 20, 1), (3, 100, 2), (4, 200, 3), (5, 210, 3)]


def model_of(method: str = "sessionrec-sasrec", **options: Any) -> SessionRec:
    torch.manual_seed(0)
    chosen = config(method, "tiny", **{"dim": 8, "max_len": 8, **options})
    made = recommender(V, chosen).eval()
    assert isinstance(made, SessionRec)
    return made


def trained_on(rows: Rows, **options: Any) -> SessionBatch:
    model = model_of(**options)
    chosen = config("sessionrec-sasrec", "tiny")
    begin, end = model.windows(rows, None)
    tokens = model.training_tokens(rows, begin, end, chosen.train, np.random.default_rng(0))
    batch = model.padded(tokens, rows, chosen.train)
    assert isinstance(batch, SessionBatch)
    return batch


def elements(batch: SessionBatch) -> dict[int, list[tuple[int, int]]]:
    """Place in B*L -> its (item, feedback), sorted."""
    found: dict[int, list[tuple[int, int]]] = {}
    for at, item, feedback in zip(
        batch.element_at.tolist(), batch.element_item.tolist(), batch.element_feedback.tolist(),
        strict=True,
    ):  # fmt: skip
        found.setdefault(at, []).append((item, feedback))
    return {at: sorted(held) for at, held in found.items()}


def sets(start: torch.Tensor, item: torch.Tensor) -> list[set[int]]:
    return [set(item[a:b].tolist()) for a, b in pairwise(start.tolist())]


def test_a_position_is_a_session_and_predicts_the_next_ones_items() -> None:
    batch = trained_on(rows_of(USER, [(6, 5, 1), (1, 500, 2)]))
    assert batch.token.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert (batch.ts[0] // SECOND).tolist() == [10, 100, 200]
    assert batch.ordinal.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert elements(batch) == {
        0: [(1, 0), (2, 0)], 1: [(3, 0)], 2: [(4, 0), (5, 0)], 4: [(6, 0)], 5: [(1, 0)],
    }  # fmt: skip
    assert batch.label_at.tolist() == [0, 1, 4]
    assert sets(batch.label_start, batch.label_item) == [{3}, {4, 5}, {1}]
    assert batch.tokens == 7


def test_what_was_shown_in_vain_is_history_and_evidence_but_no_label() -> None:
    rows = evidence(rows_of(USER), [0, 3, 2, 0, 1], {0: [6, 2, 5, 6], 3: [6, 4, 3]})
    batch = trained_on(rows)
    # 2 has an event of its own in the first session, 4 in the last; 6 is shown once.
    assert elements(batch) == {
        0: [(1, 0), (2, 3), (5, 2), (6, 2)], 1: [(3, 2)], 2: [(3, 2), (4, 0), (5, 1), (6, 2)],
    }  # fmt: skip
    # The second session took nothing: it is history, and no target.
    assert batch.label_at.tolist() == [1]
    assert sets(batch.label_start, batch.label_item) == [{4}]
    assert sets(batch.ignored_start, batch.ignored_item) == [{3, 5, 6}]


def test_of_many_shown_the_last_stay() -> None:
    rows = evidence(rows_of(USER), [0] * 5, {0: [3, 4, 5], 1: [6, 3]})
    assert elements(trained_on(rows, exposures=2))[0] == [(1, 0), (2, 0), (3, 2), (6, 2)]
    assert elements(trained_on(rows, exposures=0))[0] == [(1, 0), (2, 0)]


def test_events_that_are_exposures_are_bounded_with_what_was_listed() -> None:
    rows = evidence(rows_of(USER), [0, 2, 2, 0, 2], {0: [6], 4: [4, 1]})
    # Item 2's own event comes after 6 was shown; 4 was taken in its session.
    assert elements(trained_on(rows, exposures=20)) == {
        0: [(1, 0), (2, 2), (6, 2)], 1: [(3, 2)], 2: [(1, 2), (4, 0), (5, 2)],
    }  # fmt: skip
    assert elements(trained_on(rows, exposures=1)) == {
        0: [(1, 0), (2, 2)], 1: [(3, 2)], 2: [(1, 2), (4, 0)],
    }  # fmt: skip
    none = trained_on(rows, exposures=0)
    assert elements(none) == {0: [(1, 0)], 2: [(4, 0)]}
    # A session of which nothing is left stays a position, and every encoder has a number for it.
    assert none.token.tolist() == [[1, 1, 1]]
    for pooling in ("mean", "attention", "transformer"):
        assert model_of(pooling=pooling)(none).isfinite().all()


@pytest.mark.parametrize("exposures", [0, 20])
def test_listed_or_events_of_their_own_exposures_say_the_same(exposures: int) -> None:
    listed = evidence(rows_of(USER), [0] * 5, {1: [6], 4: [3, 1]})
    told = [*USER[:2], (6, 11, 1), *USER[2:], (3, 300, 3), (1, 300, 3)]
    events = evidence(rows_of(told), [0, 0, 2, 0, 0, 0, 2, 2], {})
    one, other = (elements(trained_on(rows, exposures=exposures)) for rows in (listed, events))
    assert one == other and len(one) == 3


def test_an_open_session_is_the_last_position_and_holds_only_what_was() -> None:
    rows = evidence(rows_of(USER), [0] * 5, {3: [6], 4: [1]})
    model = model_of()
    batch = model.request(rows, np.array([0, 0]), np.array([4, 3]))
    assert isinstance(batch, SessionBatch)
    assert batch.token.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert elements(batch)[2] == [(4, 0), (6, 2)]
    assert elements(batch)[5] == [(3, 0)]
    short = model_of(max_len=2).request(rows, np.array([0]), np.array([5]))
    assert isinstance(short, SessionBatch)
    assert elements(short) == {0: [(3, 0)], 1: [(1, 2), (4, 0), (5, 0), (6, 2)]}


def test_windows_are_whole_sessions() -> None:
    rng = np.random.default_rng(3)
    users = []
    for size in rng.integers(1, 50, 30):
        ordinal = 1 + np.cumsum(np.append(False, rng.random(size - 1) < 0.3))
        users.append([(1, t, int(o)) for t, o in enumerate(ordinal)])
    rows = rows_of(*users)
    model = model_of(max_len=5)
    for shift in (np.zeros(30, dtype=np.int64), rng.integers(0, 5, 30)):
        begin, end = model.windows(rows, shift)
        covered = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
        assert np.array_equal(covered, np.arange(len(rows.item)))
        assert rows.opens[begin].all()
        assert max(rows.opens[b:e].sum() for b, e in zip(begin, end, strict=True)) <= 5
    begin, end = model.windows(rows, None)
    assert np.array_equal(end, rows.start[1:]) and rows.opens[begin].all()
    assert all(
        rows.opens[b:e].sum() == min(5, rows.ordinal[e - 1])
        for b, e in zip(begin, end, strict=True)
    )


def test_a_served_model_sees_what_the_trained_one_saw() -> None:
    """Feedback by the source's rules and what was shown, from raw events in any order."""
    rows = evidence(rows_of(USER), [0, 1, 2, 0, 0], {0: [6, 2], 3: [1, 3]})
    model = model_of("sessionrec-hstu", feedback=True)
    rules = {"positive": None, "negative": ["skip"], "exposed": ["view"]}
    facts = {"gap_us": 50 * SECOND, "feedback": rules}
    chosen = config("sessionrec-hstu", "tiny")
    stored = Stored(model, chosen, [f"i{n}" for n in range(1, V + 1)], torch.ones(V), facts)
    frame = pd.DataFrame(
        {
            "user_id": "u",
            "item_id": [f"i{item}" for item, _, _ in USER],
            "event_ts": pd.to_datetime([second for _, second, _ in USER], unit="s", utc=True),
            "event_type": ["buy", "skip", "view", "buy", "buy"],
            "exposed_with": [["i6", "i2", "elsewhere"], None, [], np.array(["i1", "i3"]), None],
        }
    ).iloc[[3, 0, 4, 2, 1]]
    (answer,) = recommend(stored, frame.reset_index(drop=True), V)["items"]
    want = model.score(rows, rows.start[:-1], rows.start[1:])[0]
    blind = model.score(rows_of(USER), rows.start[:-1], rows.start[1:])[0]
    served = torch.tensor([{i["item_id"]: i["score"] for i in answer}[n] for n in stored.item_ids])
    assert torch.allclose(served, want, atol=1e-5) and not torch.allclose(want, blind, atol=1e-3)
    with pytest.raises(ValueError, match=r"exposed_with = 'i6': give a list of item ids"):
        recommend(stored, frame.assign(exposed_with="i6").reset_index(drop=True))


METHODS = [name + end for name in SESSION_ENCODERS for end in ("", "+sse+tsa")]


def random_rows(seed: int, users: int = 5, events: int = 30) -> Rows:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(users):
        ordinal = 1 + np.cumsum(np.append(False, rng.random(events - 1) < 0.4))
        items = rng.integers(1, V + 1, events)
        made.append(
            [(int(i), 60 * t, int(o)) for t, (i, o) in enumerate(zip(items, ordinal, strict=True))]
        )
    rows = rows_of(*made)
    shown = {e: rng.integers(1, V + 1, 3).tolist() for e in range(0, users * events, 2)}
    return evidence(rows, rng.integers(0, 4, users * events).tolist(), shown)


@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_later_session_changes_what_is_said_before_it(
    method: str, pooling: str
) -> None:
    for seed in range(3):
        rows = random_rows(seed)
        model = model_of(method, pooling=pooling, layers=2, max_len=40)
        before, cut = rows.start[:-1], 17
        late = np.concatenate([np.arange(b + cut, b + 30) for b in before])
        late = late[rows.session[late] > np.repeat(rows.session[before + cut - 1], 13)[: len(late)]]
        rng = np.random.default_rng(100 + seed)
        item, feedback, shown = rows.item.copy(), rows.feedback.copy(), rows.shown.copy()  # type: ignore[union-attr]
        item[late] = rng.integers(1, V + 1, len(late))
        feedback[late] = rng.integers(0, 4, len(late))
        for e in late:
            shown[rows.shown_start[e] : rows.shown_start[e + 1]] = rng.integers(1, V + 1)  # type: ignore[index]
        other = replace(rows, item=item, feedback=feedback, positive=feedback == 0, shown=shown)
        with torch.no_grad():
            outputs = [model(model.request(r, r.start[:-1], r.start[1:])) for r in (rows, other)]
        changed = 0
        for user in range(5):
            sessions = int(rows.ordinal[before[user] + 29])
            first = outputs[0].shape[1] - sessions
            safe = first + int(rows.ordinal[before[user] + cut - 1])
            early = slice(first, safe)
            assert torch.allclose(outputs[0][user, early], outputs[1][user, early], atol=1e-6)
            changed += not torch.allclose(outputs[0][user, safe:], outputs[1][user, safe:])
        assert changed == 5


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_company_change_no_score(method: str) -> None:
    rows = random_rows(7)
    model = model_of(method, max_len=12)
    begin = rows.start[:-1]
    end = begin + np.array([30, 3, 17, 1, 24])
    together = model.score(rows, begin, end)
    assert together.shape == (5, V) and torch.isfinite(together).all()
    for user in range(5):
        at = slice(user, user + 1)
        alone = model.score(rows, begin[at], end[at])
        assert torch.allclose(together[user], alone[0], atol=1e-5)


@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_order_inside_a_session_is_nothing(pooling: str) -> None:
    rows = rows_of(USER)
    swapped = rows_of([(2, 10, 1), (1, 20, 1), (3, 100, 2), (5, 200, 3), (4, 210, 3)])
    model = model_of(pooling=pooling)
    ask = rows.start[:-1], rows.start[1:]
    assert torch.allclose(model.score(rows, *ask), model.score(swapped, *ask), atol=1e-5)


@pytest.mark.parametrize("kind", list(POOLINGS))
def test_a_session_is_pooled_from_its_own_items_alone(kind: str) -> None:
    """Many sessions of all sizes together, and each by itself."""
    torch.manual_seed(1)
    pool = POOLINGS[kind](config("sessionrec-sasrec", "tiny", dim=8).model).eval()
    at = torch.tensor([3, 0, 3, 5, 0, 3, 3, 5, 2, 3, 3, 3])
    x = torch.randn(len(at), 8)
    with torch.no_grad():
        got = pool(x, at, 7)
        for session in (0, 2, 3, 5):
            own = x[at == session]
            alone = pool(own, torch.zeros(len(own), dtype=torch.long), 1)
            assert torch.allclose(got[session], alone[0], atol=1e-5)
        if kind == "mean":
            assert torch.allclose(got[3], x[at == 3].mean(0), atol=1e-6)
    assert (got[[1, 4, 6]] == 0).all()


@pytest.mark.parametrize("method", list(SESSION_ENCODERS))
def test_parts_of_a_batch_are_the_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(9, users=40)
    chosen = config(method, "tiny", batch_size=64, max_len=16, alpha=0.5, pooling="attention")
    torch.manual_seed(0)
    model = recommender(V, chosen)
    gradients = []
    for budget, part in ((10**9, 10**9), (60, 20)):
        monkeypatch.setattr("models.networks.batch.PART", part)
        monkeypatch.setitem(epoch.PART_TOKENS, "cpu", budget)
        parts = epoch.Epoch(model, rows, chosen, 1)[0]
        assert (len(parts) > 3) == (budget == 60)
        labels = sum(len(one.label_at) for one in parts)
        for one in parts:
            mean = model.loss(one, chosen.train) * (len(one.label_at) / labels)
            mean.backward()  # type: ignore[no-untyped-call]
        gradients.append([labels, *[p.grad for p in model.parameters()]])
        model.zero_grad(set_to_none=True)
    assert gradients[0][0] == gradients[1][0]
    for whole, summed in zip(*(g[1:] for g in gradients), strict=True):
        if whole is None or summed is None:
            assert whole is summed
        else:
            assert torch.allclose(whole, summed, atol=1e-6)


def test_counts() -> None:
    D, L = 32, 24
    chosen = config("sessionrec-sasrec", "tiny")
    block = 12 * D * D + 13 * D
    items = 71 * D + D + 71  # with padding and biases
    plain = items + 8 * D + (4 * D * D + 5 * D) + L * D + block + 2 * D
    assert count_parameters(71, chosen)["num_params"] == plain
    for kind, cost in (("attention", D * D + 2 * D), ("transformer", block)):
        sized = config("sessionrec-sasrec", "tiny", pooling=kind)
        assert count_parameters(71, sized)["num_params"] == plain + cost
    without = config("sessionrec-sasrec", "tiny", feedback=False)
    assert count_parameters(71, without)["num_params"] == plain - 8 * D
    # Against the next-item model of the same sizes: feedback and the items' net are what is more.
    assert count_parameters(71, chosen)["num_params_added"] == 8 * D + (4 * D * D + 5 * D)
    more = count_parameters(71, config("sessionrec-sasrec+sse", "tiny", segments=3))
    assert more["num_params_added"] == 3 * D + 8 * D + (4 * D * D + 5 * D)


def test_a_session_token_says_nothing_here() -> None:
    with pytest.raises(UserError, match="every position of sessionrec-hstu is a session"):
        config("sessionrec-hstu+st")


def pairs(users: int, seed: int = 0) -> dict[str, list[Event]]:
    """The next session's item is told by both of a session's items together, by neither alone."""
    rng = np.random.default_rng(seed)
    story: dict[str, list[Event]] = {}
    for user in range(users):
        events: list[Event] = []
        for turn in range(10):
            a, b = rng.integers(4), rng.integers(4)
            both = [f"a{a}", f"b{b}", "noise"]
            rng.shuffle(both)
            day = 2 * turn * DAY
            events += [(item, day + n * SECOND, 2 * turn + 1) for n, item in enumerate(both)]
            events.append((f"c{(a + b) % 4}", day + DAY, 2 * turn + 2))
        story[f"u{user:03d}"] = events
    return story


def ignored(users: int, seed: int = 0) -> dict[str, list[Event]]:
    """Each session takes what the one before it was shown in vain; what it took itself is noise."""
    rng = np.random.default_rng(seed)
    story: dict[str, list[Event]] = {}
    for user in range(users):
        events: list[Event] = []
        wanted = rng.integers(8)
        for turn in range(20):
            coming = rng.integers(8)
            events.append(
                (f"i{wanted}", turn * DAY, turn + 1, "positive", [f"i{coming}"])
                if coming != wanted
                else (f"i{wanted}", turn * DAY, turn + 1)
            )
            wanted = coming if coming != wanted else rng.integers(8)
        story[f"u{user:03d}"] = events
    return story


def score(method: str, data: Data, **options: Any) -> float:
    """HR@1 on next sessions; what can be reached is said by the test that asks."""
    given = {"batch_size": 8, "epochs": 30, "patience": 60, **options}
    chosen = config(method, "tiny", target="next_session", **given)
    fitted = fit(chosen, data, lambda _: None)
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_session")
    return evaluate(fitted.model, asked).mean("hr@1")


# One of them each in every run, all three in the long ones.
FIRST, *OTHERS = SESSION_ENCODERS
ONE_OF = [FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)]


@pytest.mark.training
@pytest.mark.parametrize("method", ONE_OF)
def test_two_items_together_tell_the_next_session(method: str, tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", pairs(150))
    data = data_of(tmp_path, split="last_session")
    # Recurrent layers want smaller steps here: LAB_LOG.md.
    patient = {"learning_rate": 3e-3, "epochs": 60} if method.endswith("gru4rec") else {}
    assert score(method, data, **patient) > 0.95


@pytest.mark.training
@pytest.mark.parametrize("method", ONE_OF)
@pytest.mark.slow
def test_only_what_was_ignored_tells(method: str, tmp_path: Path) -> None:
    """Seven in eight sessions show what the next one takes; without that, one in eight is luck."""
    write_gold(tmp_path, "toy", ignored(150))
    data = data_of(tmp_path, split="last_session")
    seen, blind = score(method, data), score(method, data, exposures=0)
    assert seen > 0.8 and blind < 0.3


@pytest.mark.long
def test_only_what_was_ignored_tells_where_it_is_events(tmp_path: Path) -> None:
    events = {
        user: [
            one
            for item, ts, session, *rest in told
            for one in [
                (item, ts, session),
                *((shown, ts + SECOND, session, "exposed") for shown in (rest[1] if rest else [])),
            ]
        ]
        for user, told in ignored(150).items()
    }
    write_gold(tmp_path, "toy", events)  # type: ignore[arg-type]
    data = data_of(tmp_path, split="last_session")
    seen, blind = score(FIRST, data), score(FIRST, data, exposures=0)
    assert seen > 0.8 and blind < 0.3


def test_a_model_is_told_what_was_known_at_the_cut(tmp_path: Path) -> None:
    attributes_table(
        tmp_path,
        [
            ("a", 0, {"brand": "X", "price": "1"}), ("b", 0, {"brand": "Y", "price": "3"}),
            ("a", 50, {"brand": "Y", "price": "1"}), ("b", 51, {"brand": "Z"}), ("z", 0, {}),
        ],
    )  # fmt: skip
    path = str(tmp_path / "toy/gold/item_attributes")

    def asked(until: int) -> Side:
        return read_side(path, ["b", "c", "a"], until, ["brand"], ["price"], "make")

    early, late = asked(49), asked(50)
    assert early.code.tolist() == [[2], [0], [1]] and early.sizes == (3,)
    assert early.value.tolist() == [[1.0], [0.0], [-1.0]], "unknown is the mean"
    assert late.code.tolist() == [[1], [0], [1]] and late.sizes == (2,)
    attributes_table(tmp_path, [("c", 60, {"brand": "new"})])
    again = asked(49)
    assert again.version == early.version + 1
    assert again.code.tolist() == early.code.tolist() and again.sizes == early.sizes
    assert (early.known, late.known, asked(-1).known) == (2, 2, 0)
    with pytest.raises(UserError, match="there is no table at"):
        read_side(path + "x", ["a"], 0, ["brand"], [], "make")


def test_side_information_costs_what_it_says_and_reaches_history_and_candidates() -> None:
    sizes: dict[str, Any] = {"categories": (4, 3), "numbers": 1, "side_dim": 5}
    model = model_of(**sizes)
    assert model.side is not None
    D, C, s = 8, 2, 5
    own = sum(p.numel() for p in model.side.parameters())
    assert own == (4 + 3) * s + (D + C * s + 1) * D + D + D * D + D
    code = np.array([[1, 2], [2, 1], [3, 0], [0, 0], [1, 1], [2, 2]])
    model.side.fill(Side(code, (4, 3), np.arange(6.0)[:, None], 0, 5))
    rows, one = rows_of(USER), (np.array([0]), np.array([3]))
    plain = model.score(rows, *one)
    assert torch.equal(model.catalogue(), model.item.weight[1 : V + 1]), "it starts as without"
    with torch.no_grad():
        model.side.down.weight.normal_()
    assert not torch.allclose(model.score(rows, *one), plain)
    # Of history: another brand of item 2 changes the state; of candidates: only 2's own score.
    with torch.no_grad():
        state = model(model.request(rows, *one))
        model.side.code[2, 0] = 3
        moved = model(model.request(rows, *one))
    assert not torch.allclose(state[0, 0], moved[0, 0])
    assert model_of().side is None


@pytest.mark.training
def test_attributes_are_learnt_where_items_alone_say_nothing(tmp_path: Path) -> None:
    """120 items of 6 kinds, bought once or twice each: after kind k comes kind k+1."""
    rng = np.random.default_rng(5)
    story: dict[str, list[Event]] = {}
    for user in range(100):
        kind = rng.integers(6)
        story[f"u{user}"] = [
            (f"i{6 * rng.integers(20) + (kind + s) % 6}", s * DAY + user, s + 1) for s in range(8)
        ]
    write_gold(tmp_path, "toy", story)
    attributes_table(tmp_path, [(f"i{i}", 0, {"kind": f"k{i % 6}"}) for i in range(120)])
    data = data_of(tmp_path, split="last_session")
    found = {}
    for side in (None, "kind"):
        options: dict[str, Any] = {}
        with_side = data
        if side:
            path = str(tmp_path / "toy/gold/item_attributes")
            told = read_side(path, data.item_ids, 10**15, ["kind"], [], "make")
            with_side = replace(data, side=told)
            options = {"categories": told.sizes}
        chosen = config("sessionrec-sasrec", "tiny", target="next_session", epochs=40, **options)
        fitted = fit(chosen, with_side, lambda _: None)
        asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_session")
        found[side] = evaluate(fitted.model, asked, (20,)).mean("hr@20")
    # One kind is 20 items of 120: who knows the kind has it among 20.
    assert found["kind"] > 0.7, found
    assert found["kind"] > found[None] + 0.2, found
