"""+habit: its features against a slow oracle, and that a position sees its own past and no more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.core.config import Config
from models.core.habit import DAY_RATES, FEATURES, SESSION_RATES, Asked, Habits, OwnItems
from models.core.process_group import ALONE
from models.core.rows import EXPOSED, NEGATIVE, NEUTRAL, POSITIVE, Rows
from models.data.splits import TEST, targets
from models.evaluation.evaluate import evaluate
from models.networks import encodings
from models.networks.encodings import Habit
from models.networks.methods import (
    BACKBONES,
    SESSION_ENCODERS,
    config,
    count_parameters,
    recommender,
)
from models.networks.recommender import Recommender
from models.networks.saved_model import Stored
from models.networks.sessionrec import SessionRec
from models.serving.all_users import lists
from models.serving.answer import recommend
from models.training.checkpoints import Checkpoints
from models.training.epoch import Epoch
from models.training.fit import Run, fit
from tests.support.device import DEVICE
from tests.support.gold_world import DAY, SECOND, Event, data_of, evidence, rows_of, write_gold

V = 6
HOUR = 3600


def told(rows: Rows, begin: int, end: int) -> list[tuple[int, int, int, int, int]]:
    """(event, item, us, session, feedback) of a past: its events, and exposures that count."""
    had: set[int] = set()
    shown_in: set[tuple[int, int]] = set()
    came_up: set[tuple[int, int]] = set()
    found = []

    def exposure(event: int, item: int) -> None:
        session = int(rows.ordinal[event])
        if item in had and (session, item) not in shown_in:
            shown_in.add((session, item))
            found.append((event, item, int(rows.ts[event]), session, EXPOSED))

    for event in range(begin, end):
        item, session = int(rows.item[event]), int(rows.ordinal[event])
        feedback = int(rows.became[event])
        if feedback == EXPOSED:
            exposure(event, item)
        else:
            had.add(item)
            found.append((event, item, int(rows.ts[event]), session, feedback))
        came_up.add((session, item))
        if rows.shown_start is not None and rows.shown is not None:
            for other in rows.shown[rows.shown_start[event] : rows.shown_start[event + 1]].tolist():
                if (session, other) not in came_up:
                    came_up.add((session, other))
                    exposure(event, other)
    return found


def oracle(
    rows: Rows, begin: int, end: int, ts: int, ordinal: int, most: int
) -> dict[int, dict[str, float]]:
    """Own item -> its features, by the formulas of ARCHITECTURE.md, one item after another."""
    past = told(rows, begin, end)
    answer = {}
    for item in {one[1] for one in past}:
        mine = [one for one in past if one[1] == item]
        if mine[-1][0] < end - most:
            continue
        visits: list[tuple[int, int]] = []  # session, us
        for _, _, us, session, feedback in mine:
            visited = feedback in (POSITIVE, NEUTRAL)
            if visited and (not visits or visits[-1][0] != session):
                visits.append((session, us))
        many = {
            name: math.log1p(sum(one[4] == code for one in mine))
            for name, code in (("neutral", NEUTRAL), ("negative", NEGATIVE), ("exposed", EXPOSED))
        }
        k = len(visits)
        one = dict.fromkeys(FEATURES, 0.0) | many
        answer[item] = one
        if not k:
            continue
        n, u = ordinal, ts
        s, t = visits[-1]
        since, days = n - s, max(0, u - t) / DAY
        one |= {
            "visits": math.log1p(k), "once": float(k == 1), "share": k / n,
            "since_sessions": math.log1p(since), "since_days": math.log1p(24 * days) / 4,
            "latest": float(s == rows.ordinal[end - 1]),
        }  # fmt: skip
        if k > 1:
            g, d = (s - visits[0][0]) / (k - 1), (t - visits[0][1]) / (k - 1) / DAY
            one |= {"gap_sessions": math.log1p(g), "gap_days": math.log1p(24 * d) / 4}
            one["due_sessions"] = 4 * since / (since + g) - 2
            one["due_days"] = 4 * days / (days + d) - 2 if days else -2.0
        for rate in SESSION_RATES:
            total = sum(math.exp(-(n - session) / rate) for session, _ in visits)
            one[f"sessions_{rate:g}"] = math.log1p(total)
        for rate in DAY_RATES:
            total = sum(math.exp(-max(0, u - us) / DAY / rate) for _, us in visits)
            one[f"days_{rate:g}"] = math.log1p(total)
    return answer


@st.composite
def histories(draw: st.DrawFn) -> Rows:
    """A few users with repeats, ties, all kinds of feedback, and exposures where the log has them."""
    users, feedback, shown = [], [], {}
    kinds = draw(st.sampled_from([(POSITIVE,), (0, 0, 0, 1, 3), (0, 1, 2, 3)]))
    lists = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        ts, session, events = draw(st.integers(0, 10**6)), 1, []
        for n in range(draw(st.integers(0, 14))):
            if n and draw(st.integers(0, 2)) == 0:
                session += 1
                ts += draw(st.sampled_from([HOUR, 40 * HOUR, 900 * HOUR]))
            ts += draw(st.sampled_from([0, 0, 7, 600]))
            events.append((draw(st.integers(1, V)), ts, session))
            feedback.append(draw(st.sampled_from(kinds)))
            if lists and draw(st.booleans()):
                shown[len(feedback) - 1] = draw(st.lists(st.integers(1, V), max_size=3))
        users.append(events)
    rows = rows_of(*users)
    if kinds == (POSITIVE,) and not lists:
        return rows
    return evidence(rows, feedback, shown if lists else None)


def positions(rows: Rows, new: bool) -> Asked:
    """Every event of every user as a position: its past, asked an hour later or at its end."""
    end = np.arange(1, len(rows.item) + 1)
    begin = rows.start[np.searchsorted(rows.start, end - 1, side="right") - 1]
    return Asked(
        begin, end, rows.ts[end - 1] + new * HOUR * SECOND, rows.ordinal[end - 1].astype(int) + new
    )


@settings(max_examples=60, deadline=None)
@given(rows=histories(), most=st.sampled_from([1, 3, 1000]), new=st.booleans())
def test_features_are_those_of_a_slow_oracle(rows: Rows, most: int, new: bool) -> None:
    asked = positions(rows, new)
    own = Habits.of(rows).own_items(rows, asked, most)
    got: list[dict[int, list[float]]] = [{} for _ in asked.end]
    for row, item, one in zip(
        own.row.tolist(), own.item.tolist(), own.feature.T.tolist(), strict=True
    ):
        assert item not in got[row], "each item once"
        got[row][item] = one
    assert own.feature.dtype == torch.float32 and torch.isfinite(own.feature).all()
    assert own.row.tolist() == sorted(own.row.tolist())
    for n in range(len(asked.end)):
        want = oracle(
            rows, *(int(x[n]) for x in (asked.begin, asked.end, asked.ts, asked.ordinal)), most
        )
        assert got[n].keys() == want.keys()
        for item, one in want.items():
            assert got[n][item] == pytest.approx([one[name] for name in FEATURES], abs=2e-5)


@settings(max_examples=60, deadline=None)
@given(rows=histories(), data=st.data())
def test_the_future_and_other_users_change_no_bit(rows: Rows, data: st.DataObject) -> None:
    """Every past alone gives, to the last bit, what it gives among its future and other users."""
    if not len(rows.item):
        return
    asked = positions(rows, True)
    whole = Habits.of(rows).own_items(rows, asked, 1000)
    n = data.draw(st.integers(0, len(asked.end) - 1))
    begin, end = asked.begin[n : n + 1], asked.end[n : n + 1]
    alone = rows.part(begin, end)
    part = Asked(np.array([0]), end - begin, asked.ts[n : n + 1], asked.ordinal[n : n + 1])
    own = Habits.of(alone).own_items(alone, part, 1000)
    mine = whole.row == n
    order, other = torch.argsort(whole.item[mine]), torch.argsort(own.item)
    assert torch.equal(whole.item[mine][order], own.item[other])
    assert torch.equal(whole.feature[:, mine][:, order], own.feature[:, other])


def test_counts_of_sessions_by_hand() -> None:
    """1 in sessions 1, 2 and 4 of four, a day apart; asked two days after, in a new session."""
    rows = rows_of([(1, 0, 1), (1, 5, 1), (1, 86400, 2), (2, 172800, 3), (1, 259200, 4)])
    asked = Asked(np.array([0]), np.array([5]), np.array([5 * DAY]), np.array([5]))
    own = Habits.of(rows).own_items(rows, asked, 10)
    at = {
        int(i): dict(zip(FEATURES, f, strict=True))
        for i, f in zip(own.item, own.feature.T.tolist())
    }
    one, two = at[1], at[2]
    assert one["visits"] == pytest.approx(math.log(4)) and two["once"] == 1 and one["once"] == 0
    assert one["share"] == pytest.approx(3 / 5) and two["share"] == pytest.approx(1 / 5)
    assert one["gap_sessions"] == pytest.approx(math.log(2.5))  # (4 - 1) / 2
    assert one["due_sessions"] == pytest.approx(4 * 1 / 2.5 - 2)
    assert one["since_days"] == pytest.approx(math.log(49) / 4)
    assert (one["latest"], two["latest"]) == (1, 0)
    assert one["days_2"] == pytest.approx(math.log1p(sum(math.exp(-d / 2) for d in (5, 4, 2))))
    assert one["sessions_2"] == pytest.approx(math.log1p(sum(math.exp(-n / 2) for n in (4, 3, 1))))


EVERY = [*BACKBONES, *SESSION_ENCODERS]
TARGETS = ["next_item", "next_session"]


def model_config(method: str, **options: Any) -> Config:
    return config(method, "tiny", **{"dim": 8, "max_len": 10, **options})


def model_of(method: str, items: int = V, **options: Any) -> Recommender:
    """A small untrained model whose head says something."""
    torch.manual_seed(0)
    model = recommender(items, model_config(method, **options)).eval().to(DEVICE)
    with torch.no_grad():
        for parameter in model.encodings["habit"].parameters():
            parameter.normal_()
    return model


def repeating(users: int = 5, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    made = []
    for size in rng.integers(2, 16, users):
        ordinal = np.cumsum(rng.random(size) < 0.4)
        ts = np.cumsum(rng.integers(0, 40 * HOUR, size))
        item = rng.integers(1, V + 1, size)
        made.append(list(zip(item.tolist(), ts.tolist(), (ordinal - ordinal[0] + 1).tolist())))
    rows = rows_of(*made)
    total = len(rows.item)
    shown = {e: rng.integers(1, V + 1, 2).tolist() for e in range(0, total, 3)}
    return evidence(rows, rng.choice([0, 0, 0, 0, 1, 3], total).tolist(), shown)


Features = dict[int, list[float]]


def of_labels(model: Recommender, rows: Rows, target: str, all_windows: bool = False) -> Any:
    """(the past's end, features of own items) of each label of a training batch."""
    target = "next_session" if isinstance(model, SessionRec) else target
    chosen = replace(config("pop").train, target=target, mask_share=0.5)
    shift = np.zeros(len(rows.start) - 1, dtype=np.int64) if all_windows else None
    begin, end = model.windows(rows, shift)
    tokens = model.training_tokens(rows, begin, end, chosen, np.random.default_rng(3))
    batch = model.padded(tokens, rows, chosen)
    asked = model.labelled(tokens, rows, target)  # type: ignore[arg-type]
    assert batch.own is not None and len(asked.end) == len(batch.label_at)
    return asked.end.tolist(), by_row(batch.own, len(asked.end))


def by_row(own: Any, rows: int) -> list[Features]:
    found: list[Features] = [{} for _ in range(rows)]
    for row, item, one in zip(own.row.tolist(), own.item.tolist(), own.feature.T.tolist()):
        found[row][item] = one
    return found


@pytest.mark.parametrize("policy", ["last_event", "known"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", [*EVERY, "sasrec+st+fb", "bert4rec+st+fb"])
def test_a_label_sees_what_the_same_request_sees(method: str, target: str, policy: str) -> None:
    """Training, evaluation and serving agree, beyond the window too; of cloze models as well."""
    model = model_of(method + "+habit", request_time=policy, max_len=5)
    rows = repeating(12)
    for all_windows in (False, True):
        ends, got = of_labels(model, rows, target, all_windows)
        assert len(ends) > 1
        for end, mine in zip(ends, got, strict=True):
            begin = rows.start[np.searchsorted(rows.start, end, side="right") - 1]
            if end == begin:
                assert not mine, "before a user's first event there is nothing"
                continue
            at = np.array([begin]), np.array([end])
            batch = model.request(rows, *at, rows.ts[[end]], rows.opens[[end]])
            assert batch.own is not None
            assert by_row(batch.own, 1)[0] == mine
            alone = rows.part(*at)
            served = model.request(
                alone, alone.start[:-1], alone.start[1:], rows.ts[[end]], rows.opens[[end]]
            )
            assert served.own is not None and by_row(served.own, 1)[0] == mine


@pytest.mark.parametrize("policy", ["last_event", "known"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["sasrec+st", "bert4rec", "sessionrec-gru4rec"])
def test_the_label_and_what_follows_change_nothing(method: str, target: str, policy: str) -> None:
    """Other items and feedback from a label on, its own included: what was known at it stays."""
    model = model_of(method + "+habit", request_time=policy)
    rows = repeating()
    ends, got = of_labels(model, rows, target)
    changed = 0
    for cut in sorted(set(ends)):
        later = np.arange(len(rows.item)) >= cut
        other = replace(rows, item=np.where(later, V + 1 - rows.item, rows.item).astype(np.int32))
        other_ends, theirs = of_labels(model, other, target)
        assert other_ends == ends
        same = [got[n] == theirs[n] for n in range(len(ends))]
        assert all(same[n] for n in range(len(ends)) if ends[n] <= cut)
        changed += not all(same)
    assert changed > 1


@pytest.mark.parametrize("method", EVERY)
def test_rows_and_padding_change_no_score(method: str) -> None:
    model = model_of(method + "+habit", request_time="known")
    rows = repeating()
    begin, end = rows.start[:-1], rows.start[1:]
    new = np.array([True, False, True, False, True])
    together = model.score(rows, begin, end, rows.ts[end - 1] + HOUR * SECOND, new)
    for row in range(len(begin)):
        at = slice(row, row + 1)
        alone = model.score(
            rows.part(begin[at], end[at]), np.array([0]), end[at] - begin[at],
            rows.ts[end[at] - 1] + HOUR * SECOND, new[at],
        )  # fmt: skip
        assert torch.allclose(together[row], alone[0], atol=1e-5)
        later = model.score(rows, begin[at] + 1, end[at], rows.ts[end[at] - 1], new[at])
        part = rows.part(begin[at] + 1, end[at])
        apart = model.score(part, part.start[:-1], part.start[1:], rows.ts[end[at] - 1], new[at])
        assert torch.allclose(later, apart, atol=1e-5), "a history may begin anywhere"


@pytest.mark.parametrize("method", EVERY)
def test_it_starts_as_the_backbone_and_touches_own_items_only(method: str) -> None:
    chosen = config(method + "+habit", "tiny", dim=8, max_len=10)
    fresh = recommender(V, chosen).eval().to(DEVICE)
    alone = recommender(V, replace(chosen, method=method)).eval().to(DEVICE)
    state = {k: v for k, v in fresh.state_dict().items() if "habit" not in k}
    alone.load_state_dict(state)
    rows = repeating()
    begin, end = rows.start[:-1], rows.start[1:]
    before = alone.score(rows, begin, end)
    assert torch.equal(fresh.score(rows, begin, end), before)
    with torch.no_grad():
        fresh.encodings["habit"].down.bias.fill_(2.5)  # type: ignore[union-attr,operator]
    moved = fresh.score(rows, begin, end) - before
    for row in range(len(begin)):
        own = sorted(set(rows.item[begin[row] : end[row]].tolist()))
        want = torch.zeros(V)
        want[torch.tensor(own) - 1] = 2.5
        assert torch.allclose(moved[row], want, atol=1e-5)


@pytest.mark.parametrize("preset", ["small", "paper_a_ml20m"])
@pytest.mark.parametrize("items", [9, 5000])
@pytest.mark.parametrize("sizes", [{"dim": 8}, {"dim": 64, "layers": 3, "max_len": 200}])
@pytest.mark.parametrize("method", [*EVERY, "bert4rec+st+sse+tsa"])
def test_it_costs_what_it_says(method: str, sizes: Any, items: int, preset: str) -> None:
    """(F + 2) H + 1, whatever the backbone, its sizes and the catalogue."""
    parts = [
        count_parameters(items, config(name, preset, **sizes))["num_params"]
        for name in (method, method + "+habit")
    ]
    assert parts[1] - parts[0] == (19 + 2) * 12 + 1 == (len(FEATURES) + 2) * Habit.HIDDEN + 1 == 253


@pytest.mark.parametrize("loss", ["full", "sampled", "gbce"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", [*EVERY, "narm+st+sse+tsa", "bert4rec+st+tsa+fb"])
def test_every_loss_teaches_the_head(method: str, target: str, loss: str) -> None:
    rows = repeating(users=12)
    options: dict[str, Any] = {"alpha": 0.1} if method in SESSION_ENCODERS else {}
    chosen = config(
        method + "+habit", "tiny", target=target, loss=loss, negatives=4, dim=8, **options
    )
    model = recommender(V, chosen).to(DEVICE)
    model.fit(rows)
    run = Run(model, chosen, rows, str(DEVICE), ALONE)
    epoch = Epoch(model, rows, chosen, 1)
    for _ in range(2):  # (the last layer is zero and lets no gradient through at first)
        run.step(epoch[0], 0.5)
    for name, parameter in model.encodings["habit"].named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_the_heads_gradients_are_the_formulas() -> None:
    torch.manual_seed(0)
    head = Habit(config("sasrec").model).to(DEVICE).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    feature = torch.randn(
        len(FEATURES), 3 * encodings.BLOCK // 2, dtype=torch.float64, device=DEVICE
    )
    own = OwnItems(torch.zeros(0), torch.zeros(0), feature, np.zeros(0, dtype=np.int64))
    weight = torch.randn(feature.shape[1], dtype=torch.float64, device=DEVICE)
    got = head.added(own)
    assert got is not None
    want = head.down(torch.relu(head.up(feature.T)))[:, 0]
    assert torch.allclose(got, want)
    mine = torch.autograd.grad((got * weight).sum(), list(head.parameters()))
    theirs = torch.autograd.grad((want * weight).sum(), list(head.parameters()))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other)


def test_next_sessions_look_further_back_unless_told() -> None:
    assert config("sasrec+habit").model.habit_events == 48
    assert config("sasrec+habit", target="next_session").model.habit_events == 1024
    assert config("sessionrec-sasrec+habit").model.habit_events == 1024
    told = config("sasrec+habit", target="next_session", habit_events=7)
    assert told.model.habit_events == 7


def test_what_was_stored_before_there_was_habit_is_what_it_was() -> None:
    """Checkpoints are found by the configuration, and models are built from it."""
    old = config("sasrec+st", target="next_session").as_dict()
    assert "habit_events" not in old["model"]
    assert Config.from_dict(old).as_dict() == old
    new = config("sasrec+habit", target="next_session")
    assert Config.from_dict(new.as_dict()) == new


def story(kind: str, users: int = 80) -> dict[str, list[Event]]:
    """Sessions of one item a day. `third`: each of three own items comes back every third session,
    now and then another comes between. `never`: nobody takes anything twice."""
    rng = np.random.default_rng(1)
    told = {}
    for user in range(users):
        own = rng.choice(20, 3, replace=False)
        order = rng.permutation(20)
        events: list[Event] = []
        for session in range(12):
            item = own[session % 3] if kind == "third" else order[session]
            events.append((f"i{item:02d}", session * DAY + user * SECOND, session + 1))
        told[f"u{user:03d}"] = events
    return told


@pytest.mark.training
@pytest.mark.parametrize("method", ["gru4rec", "bert4rec", "sessionrec-sasrec"])
@pytest.mark.parametrize("kind", ["third", "never"])
def test_it_learns_when_things_come_back_and_that_they_never_do(
    kind: str, method: str, tmp_path: Path
) -> None:
    write_gold(tmp_path, "toy", story(kind))
    data = data_of(tmp_path, split="last_session")
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_session")
    chosen = config(method + "+habit", "tiny", epochs=15, target="next_session")
    model = fit(chosen, data, lambda _: None).model
    if kind == "third":
        assert evaluate(model, asked).mean("hr@1") > 0.95
        return
    scores = model.score(asked.rows, asked.begin, asked.end)
    for row in range(len(asked.user)):
        seen = torch.zeros(model.num_items, dtype=torch.bool)
        seen[torch.from_numpy(asked.rows.item[asked.begin[row] : asked.end[row]] - 1).long()] = True
        assert scores[row][seen].max() < scores[row][~seen].mean()


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "method", ["sasrec+habit", "bert4rec+st+habit", "sessionrec-gru4rec+habit"]
)
def test_resumed_it_is_the_same_training_bit_for_bit(method: str, tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", story("third", 30))
    data = data_of(tmp_path, split="last_session")
    chosen = config(method, "tiny", epochs=3, dropout=0.1, target="next_session")
    whole = fit(chosen, data, lambda _: None).model.state_dict()

    def die(epoch: int, curves: Any) -> None:
        if epoch == 2:
            raise Killed

    keep = Checkpoints(tmp_path / "kept", every_s=0)
    with pytest.raises(Killed):
        fit(chosen, data, lambda _: None, keep=keep, each_epoch=die)
    said: list[str] = []
    again = fit(chosen, data, said.append, keep=keep).model.state_dict()
    assert any("going on from a checkpoint" in line for line in said)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("policy", ["last_event", "known"])
@pytest.mark.parametrize("method", ["sasrec+st+habit", "bert4rec+habit", "sessionrec-hstu+habit"])
def test_what_is_served_by_raw_ids_is_what_was_scored(
    method: str, policy: str, tmp_path: Path
) -> None:
    """Requests, lists for everybody and the evaluation, of histories longer than the window."""
    write_gold(tmp_path, "toy", story("third", 12))
    data = data_of(tmp_path, split="last_session")
    model = model_of(method, len(data.item_ids), max_len=4, request_time=policy).to("cpu")
    counts, facts = torch.ones(len(data.item_ids)), {"gap_us": 1_800_000_000}
    stored = Stored(model, model_config(method, request_time=policy), data.item_ids, counts, facts)
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_session")
    rows, many = asked.rows, len(data.item_ids)
    want = stored.model.score(rows, asked.begin, asked.end, asked.request_ts, asked.opens)
    for n in range(len(asked.user)):
        at = slice(asked.begin[n], asked.end[n])
        frame = pd.DataFrame(
            {
                "user_id": "a person",
                "item_id": [data.item_ids[item - 1] for item in rows.item[at]],
                "event_ts": pd.to_datetime(rows.ts[at], unit="us", utc=True),
            }
        )
        when = str(np.datetime64(int(asked.request_ts[n]), "us"))
        answer = recommend(stored, frame, k=many, request_ts=when)["items"][0]
        got = {one["item_id"]: one["score"] for one in answer}
        assert [got[name] for name in data.item_ids] == pytest.approx(want[n].tolist(), abs=1e-5)
    whole = rows.part(asked.begin, asked.end)
    last = whole.start[1:] - 1
    at_once = stored.model.score(
        whole, whole.start[:-1], whole.start[1:], whole.ts[last], np.zeros(len(last), dtype=bool)
    )
    ((_, table),) = lists(stored, whole, many)
    for n, items in enumerate(table["items"].to_pylist()):
        got = {one["item_id"]: one["score"] for one in items}
        assert [got[name] for name in data.item_ids] == pytest.approx(at_once[n].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "method", ["sasrec+habit", "bert4rec+st+habit", "hstu+habit", "sessionrec-gru4rec+habit"]
)
@pytest.mark.parametrize(("epochs", "alone"), [(4, 2), (2, 1), (1, 0)])
def test_the_head_learns_before_the_backbone_joins_in(
    method: str, epochs: int, alone: int, tmp_path: Path
) -> None:
    write_gold(tmp_path, "toy", story("third", 30))
    data = data_of(tmp_path, split="last_session")
    chosen = config(method, "tiny", epochs=epochs, target="next_session", weight_decay=0.0)
    run = Run(recommender(len(data.item_ids), chosen), chosen, data.training.rows, "cpu", ALONE)
    assert run.alone == alone
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.join(False)
    epoch = Epoch(run.model, data.training.rows, chosen, 1)
    run.step(epoch[0], 0.5)
    first = {name for name in before if ".habit." in name or name == "bias"}
    learning = {name for name, value in run.model.named_parameters() if value.requires_grad}
    assert learning == first
    now = run.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], now[name])}
    assert changed and changed <= first
    fitted = fit(chosen, data, lambda _: None)
    assert fitted.best_epoch > alone and len(fitted.curves["loss"]) == epochs
    assert isinstance(fitted.model, Recommender) and fitted.model.backbone_joins
    assert all(value.requires_grad for value in fitted.model.parameters())


def test_without_the_encoding_nothing_learns_first(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", story("third", 12))
    data = data_of(tmp_path, split="last_session")
    chosen = config("sasrec+st", "tiny", epochs=4)
    run = Run(recommender(len(data.item_ids), chosen), chosen, data.training.rows, "cpu", ALONE)
    assert run.alone == 0 and run.model.learns_first() == []
    assert not {"habit_epochs", "habit_rate"} & chosen.as_dict()["train"].keys()
