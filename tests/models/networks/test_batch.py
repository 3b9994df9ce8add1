"""What exactly a model sees: session tokens, labels, times, segments, padding. Goldens by hand.

V = 5 items, so [MASK] is 6 and [ST] is 7. One user: 1 2 | 3 4, at seconds 10 20 | 100 110.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models.core.rows import Rows
from models.networks.batch import Batch, label_cloze, label_next, pad, take, windows
from models.networks.methods import BACKBONES, config, recommender
from models.networks.recommender import Recommender
from tests.support.device import DEVICE
from tests.support.gold_world import SECOND, evidence, rows_of

V, MASK, ST = 5, 6, 7
CAUSAL = [name for name, backbone in BACKBONES.items() if not backbone.cloze]
USER = [(1, 10, 1), (2, 20, 1), (3, 100, 2), (4, 110, 2)]


def model_of(method: str, **options: Any) -> Recommender:
    torch.manual_seed(0)
    chosen = config(method, "tiny", **{"dim": 8, "max_len": 8, **options})
    return recommender(V, chosen).eval().to(DEVICE)


def trained_on(method: str, rows: Rows, target: str = "next_item", **options: Any) -> Batch:
    """The training batch of whole users, nothing masked at random."""
    model = model_of(method, **options)
    train = replace(config(method, "tiny").train, target=target, mask_share=0.0)
    tokens = model.training_tokens(
        rows, rows.start[:-1], rows.start[1:], train, np.random.default_rng(0)
    )
    return model.padded(tokens, rows, train).to(DEVICE)


def labels(batch: Batch, row: int = 0) -> list[set[int]]:
    """The label set at each position of a row."""
    width = batch.token.shape[1]
    found: list[set[int]] = [set() for _ in range(width)]
    for n, at in enumerate(batch.label_at.tolist()):
        if at // width == row:
            part = batch.label_item[batch.label_start[n] : batch.label_start[n + 1]]
            found[at % width] = set(part.tolist())
    return found


def seconds(batch: Batch, row: int = 0) -> list[int]:
    return [int(ts) // SECOND for ts in batch.ts[row]]


@pytest.mark.parametrize("policy", ["known", "last_event"])
def test_without_encodings_the_label_is_the_next_event(policy: str) -> None:
    batch = trained_on("gru4rec", rows_of(USER), request_time=policy)
    assert batch.token.tolist() == [[1, 2, 3, 4]]
    assert labels(batch) == [{2}, {3}, {4}, set()]


def test_st_known_crossing_is_predicted_from_the_token_and_only_from_it() -> None:
    batch = trained_on("gru4rec+st", rows_of(USER), request_time="known")
    assert batch.token.tolist() == [[ST, 1, 2, ST, 3, 4]]
    assert labels(batch) == [{1}, {2}, set(), {3}, {4}, set()]
    assert seconds(batch) == [10, 10, 20, 100, 100, 110]
    assert batch.ordinal.tolist() == [[1, 1, 1, 2, 2, 2]]


def test_st_last_event_crossing_is_predicted_from_the_last_item() -> None:
    batch = trained_on("gru4rec+st", rows_of(USER), request_time="last_event")
    assert batch.token.tolist() == [[ST, 1, 2, ST, 3, 4]]
    assert labels(batch) == [set(), {2}, {3}, set(), {4}, set()]


def test_next_session_labels_are_the_set_at_the_session_end() -> None:
    user = [*USER, (3, 500, 3), (5, 501, 3), (3, 502, 3)]
    vanilla = trained_on("gru4rec", rows_of(user), "next_session")
    assert labels(vanilla) == [set(), {3, 4}, set(), {3, 5}, set(), set(), set()]
    known = trained_on(
        "gru4rec+st", rows_of(user), "next_session", request_time="known", max_len=12
    )
    assert known.token.tolist() == [[ST, 1, 2, ST, 3, 4, ST, 3, 5, 3]]
    assert labels(known) == [
        {1, 2},
        set(),
        set(),
        {3, 4},
        set(),
        set(),
        {3, 5},
        set(),
        set(),
        set(),
    ]


def test_only_positive_events_are_labels() -> None:
    rows = rows_of(USER, positive=[True, False, True, False])
    assert labels(trained_on("gru4rec", rows)) == [set(), {3}, set(), set()]
    assert labels(trained_on("gru4rec", rows, "next_session")) == [set(), {3}, set(), set()]


def test_cloze_masks_the_newest_as_served() -> None:
    inside = trained_on("bert4rec+st", rows_of(USER))
    assert inside.token.tolist() == [[ST, 1, 2, ST, 3, MASK]]
    assert labels(inside) == [set()] * 5 + [{4}]
    assert seconds(inside) == [10, 10, 20, 100, 100, 100]
    opening = trained_on("bert4rec+st", rows_of(USER[:3]))
    assert opening.token.tolist() == [[ST, 1, 2, MASK]], "the hidden session's token is gone"
    assert seconds(opening) == [10, 10, 20, 20]
    assert opening.ordinal.tolist() == [[1, 1, 1, 1]]
    assert labels(opening) == [set(), set(), set(), {3}]


def test_cloze_next_session_hides_a_session_behind_one_mask() -> None:
    batch = trained_on("bert4rec+st", rows_of(USER), "next_session")
    assert batch.token.tolist() == [[ST, 1, 2, MASK]]
    assert labels(batch) == [set(), set(), set(), {3, 4}]
    assert seconds(batch) == [10, 10, 20, 20]


def test_cloze_never_hides_or_predicts_a_session_token() -> None:
    rows = rows_of(*[USER] * 200)
    model = model_of("bert4rec+st", request_time="known")
    tokens = take(rows, rows.start[:-1], rows.start[1:], V, "next_item")
    tokens = label_cloze(tokens, "next_item", np.random.default_rng(1), 0.5, False)
    tokens = model.all_encodings()[0].layout(tokens, causal=False)
    batch = pad(tokens, 8, rows, "next_item")
    assert (batch.token[:, [-6, -3]] == ST).all()
    at = batch.label_at.numpy() % 6
    assert set(at.tolist()) == {1, 2, 4, 5}
    # 80 % [MASK], 10 % random, 10 % unchanged (a random item is the right one in 1 of 5).
    hidden = batch.token.reshape(-1)[batch.label_at]
    assert (hidden == MASK).float().mean() == pytest.approx(0.8, abs=0.06)
    assert (hidden == batch.label_item).float().mean() == pytest.approx(0.12, abs=0.05)


HISTORY = USER[:3]  # 1 2 | 3


@pytest.mark.parametrize(
    ("method", "policy", "opens", "tokens", "times", "segments"),
    [
        ("gru4rec", "last_event", True, [1, 2, 3], [10, 20, 100], [1, 1, 2]),
        ("gru4rec", "known", True, [1, 2, 3], [10, 20, 100], [1, 1, 2]),
        ("gru4rec+st", "last_event", True, [ST, 1, 2, ST, 3], [10, 10, 20, 100, 100], [1, 1, 1, 2, 2]),
        ("gru4rec+st", "known", False, [ST, 1, 2, ST, 3], [10, 10, 20, 100, 100], [1, 1, 1, 2, 2]),
        ("sasrec+st", "known", True, [ST, 1, 2, ST, 3, ST], [10, 10, 20, 100, 100, 500], [1, 1, 1, 2, 2, 3]),
        ("bert4rec", "last_event", True, [1, 2, 3, MASK], [10, 20, 100, 100], [1, 1, 2, 2]),
        ("bert4rec", "known", True, [1, 2, 3, MASK], [10, 20, 100, 500], [1, 1, 2, 3]),
        ("bert4rec+st", "last_event", True, [ST, 1, 2, ST, 3, MASK], [10, 10, 20, 100, 100, 100], [1, 1, 1, 2, 2, 2]),
        ("bert4rec+st", "known", False, [ST, 1, 2, ST, 3, MASK], [10, 10, 20, 100, 100, 500], [1, 1, 1, 2, 2, 2]),
        ("bert4rec+st", "known", True, [ST, 1, 2, ST, 3, ST, MASK], [10, 10, 20, 100, 100, 500, 500], [1, 1, 1, 2, 2, 3, 3]),
    ],
)  # fmt: skip
def test_a_request(
    method: str, policy: str, opens: bool, tokens: list[int], times: list[int], segments: list[int]
) -> None:
    rows = rows_of(HISTORY)
    model = model_of(method, request_time=policy)
    batch = model.request(
        rows, rows.start[:-1], rows.start[1:], np.array([500 * SECOND]), np.array([opens])
    )
    assert batch.token.tolist() == [tokens]
    assert seconds(batch) == times
    assert batch.ordinal.tolist() == [segments]
    assert model.score(rows, rows.start[:-1], rows.start[1:]).shape == (1, V)


def test_session_tokens_use_up_length_and_the_newest_is_last() -> None:
    batch = trained_on("gru4rec+st", rows_of(USER, USER[:1]), max_len=4)
    assert batch.token.tolist() == [[2, ST, 3, 4], [0, 0, ST, 1]]
    assert seconds(batch, 1) == [10, 10, 10, 10], "padding carries the first event's time"


def test_segments_count_from_the_newest_or_from_the_oldest() -> None:
    rows = rows_of([(1, 10 * s, s) for s in range(1, 6)], [(1, 10, 1), (2, 20, 2)])
    newest = model_of("sasrec+sse", sse_index="from_newest")
    oldest = model_of("sasrec+sse", sse_index="from_oldest")
    batch = trained_on("sasrec+sse", rows)
    index = newest.encodings["sse"].index(batch)  # type: ignore[operator]
    assert index.tolist() == [[1, 1, 1, 2, 3], [0, 0, 0, 2, 3]]
    index = oldest.encodings["sse"].index(batch)  # type: ignore[operator]
    assert index.tolist() == [[1, 2, 3, 3, 3], [0, 0, 0, 1, 2]]


def test_time_features_are_exact_far_from_1970() -> None:
    when = 1_700_000_000
    rows = rows_of([(1, when, 1), (2, when + 1, 1), (3, when + 3, 1)])
    model = model_of("sasrec+tsa", time_origin_us=when * SECOND)
    got = model.encodings["tsa"].features(trained_on("sasrec+tsa", rows))[0]  # type: ignore[operator]
    w = 10.0 ** -np.linspace(0, 9, 8)
    want = np.cos(np.array([[0.0], [1.0], [3.0]]) * w)
    assert np.allclose(got.detach().cpu().numpy(), want, atol=1e-6)
    raw = model_of("sasrec+tsa", tsa_time="raw_float32")
    noise = raw.encodings["tsa"].features(trained_on("sasrec+tsa", rows))[0]  # type: ignore[operator]
    assert torch.equal(noise[0], noise[2]), "float32 cannot tell seconds apart in our time"


@pytest.mark.parametrize("encodings", ["", "+st", "+sse", "+tsa", "+st+sse+tsa"])
@pytest.mark.parametrize("base", CAUSAL)
@pytest.mark.parametrize("policy", ["known", "last_event"])
def test_causality(base: str, encodings: str, policy: str) -> None:
    """Another item, time or session after position i changes no output at or before i."""
    method = base + encodings
    model = model_of(method, request_time=policy, max_len=12)
    one = [(1, 10, 1), (2, 20, 1), (3, 100, 2), (4, 110, 2), (5, 500, 3)]
    for changed in range(1, 5):
        other = one[:changed] + [
            (item % V + 1, second + 7, ordinal) for item, second, ordinal in one[changed:]
        ]
        first = trained_on(method, rows_of(one), request_time=policy, max_len=12)
        second = trained_on(method, rows_of(other), request_time=policy, max_len=12)
        width = first.token.shape[1]
        same = (first.token == second.token) & (first.ts == second.ts)
        until = int(torch.nonzero(~same[0])[0]) if not bool(same.all()) else width
        kept = [t for t in first.token[0, :until].tolist() if t <= V]
        assert len(kept) == changed
        with torch.no_grad():
            assert torch.allclose(model(first)[0, :until], model(second)[0, :until], atol=1e-6)


@pytest.mark.parametrize("policy", ["known", "last_event"])
@pytest.mark.parametrize("encodings", ["", "+st", "+fb", "+st+sse+tsa+fb"])
@pytest.mark.parametrize("base", CAUSAL)
def test_later_boundaries_and_exposures_change_no_output(
    base: str, encodings: str, policy: str
) -> None:
    """However many tokens the encodings put in later. Transformers: with positions from the oldest
    (from the newest, a token's position tells how many follow)."""
    method = base + encodings
    chosen: dict[str, Any] = {"request_time": policy, "max_len": 30, "positions": "from_oldest"}
    model = model_of(method, **chosen)
    one = [(1, 10, 1), (2, 20, 1), (3, 100, 2), (4, 110, 2), (5, 500, 3)]
    apart = one[:3] + [(item, second, 3 + n) for n, (item, second, _) in enumerate(one[3:])]
    shown = {0: [5, 4], 3: [1, 2, 3], 4: [2]}
    first = trained_on(method, evidence(rows_of(one), [0] * 5, {0: shown[0]}), **chosen)
    second = trained_on(method, evidence(rows_of(apart), [0, 0, 0, 1, 0], shown), **chosen)
    until = 3 + ("+fb" in encodings) * 2 + ("+st" in encodings) * 2
    assert torch.equal(first.token[0, :until], second.token[0, :until])
    if encodings:
        assert first.token.shape != second.token.shape
    with torch.no_grad():
        outputs = [model(batch)[0, :until] for batch in (first, second)]
        assert torch.allclose(*outputs, atol=1e-6)
        if base == "sasrec" and encodings:
            model.backbone.from_oldest = False  # type: ignore[assignment]
            outputs = [model(batch)[0, :until] for batch in (first, second)]
            assert not torch.allclose(*outputs, atol=1e-3)


def test_cloze_is_not_causal() -> None:
    model = model_of("bert4rec")
    one, other = rows_of(USER), rows_of([*USER[:3], (5, 110, 2)])
    batches = [model.request(r, r.start[:-1], r.start[1:]).to(DEVICE) for r in (one, other)]
    with torch.no_grad():
        assert not torch.allclose(model(batches[0])[0, 0], model(batches[1])[0, 0])


@pytest.mark.parametrize("base", list(BACKBONES))
@pytest.mark.parametrize("encodings", ["", "+st", "+st+sse+tsa+habit"])
@pytest.mark.parametrize("preset", ["tiny", "paper_a_steam"])
def test_padding_changes_no_score(base: str, encodings: str, preset: str) -> None:
    torch.manual_seed(0)
    chosen = config(base + encodings, preset, dim=8, max_len=12)
    model = recommender(V, chosen).eval().to(DEVICE)
    rows = rows_of(HISTORY, [*USER, (5, 900, 3), (1, 901, 3)], USER[:1])
    begin, end = rows.start[:-1], rows.start[1:]
    together = model.score(rows, begin, end, end * SECOND, np.array([True, False, True]))
    for row in range(3):
        at = slice(row, row + 1)
        alone = model.score(
            rows, begin[at], end[at], end[at] * SECOND, np.array([True, False, True])[at]
        )
        assert torch.allclose(together[row], alone[0], atol=1e-5)
    assert together.shape == (3, V)
    assert torch.isfinite(together).all()


def test_windows_share_no_event_and_lose_none() -> None:
    rng = np.random.default_rng(3)
    users = []
    for size in rng.integers(1, 50, 30):
        ordinal = np.cumsum(rng.random(size) < 0.3) + 1
        users.append([(1, t, int(o)) for t, o in zip(range(size), ordinal, strict=True)])
    rows = rows_of(*users)
    cost = 1 + rows.opens.astype(np.int64)
    for shift in (np.zeros(30, dtype=np.int64), rng.integers(0, 16, 30)):
        begin, end = windows(rows, 16, cost, shift)
        covered = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
        assert np.array_equal(np.sort(covered), np.arange(len(rows.item)))
        # A session token may lie on the boundary: one more than fits, cut when padding.
        assert max(cost[b:e].sum() for b, e in zip(begin, end, strict=True)) <= 17
        owner = np.searchsorted(rows.start, begin, side="right")
        assert np.array_equal(owner, np.searchsorted(rows.start, end - 1, side="right"))
    begin, end = windows(rows, 16, cost, None)
    assert np.array_equal(end, rows.start[1:])
    # The newest 16 tokens, the event through which the cut goes included.
    for first, b, e in zip(rows.start, begin, end, strict=False):
        assert b == first or cost[b:e].sum() >= 16 > cost[b + 1 : e].sum()


@pytest.mark.parametrize("shift", [None, np.zeros(1, dtype=np.int64)])
def test_an_event_of_more_tokens_than_a_row_is_not_lost(shift: Any) -> None:
    rows = evidence(rows_of(USER), [0] * 4, {e: [5, 1, 4, 3] for e in range(4)})
    model = model_of("sasrec+fb", max_len=2, exposures=9)
    begin, end = model.windows(rows, shift)
    assert (end > begin).all() and end[-1] == 4
    train = config("sasrec+fb", "tiny").train
    tokens = model.training_tokens(rows, begin, end, train, np.random.default_rng(0))
    padded = model.padded(tokens, rows, train)
    assert padded.token.shape[1] == 2 and (padded.token[:, -1] > 0).all()
    asked = model.request(rows, np.array([0]), np.array([4]))
    assert torch.equal(asked.token[0], padded.token[-1])
    with torch.no_grad():
        assert torch.isfinite(model(padded.to(DEVICE))).all()


def test_a_training_row_has_as_many_tokens_as_a_request() -> None:
    rows = rows_of([(1 + n % V, 100 * n, n + 1) for n in range(20)])  # 20 sessions of one item
    model = model_of("sasrec+st", max_len=15)
    begin, end = model.windows(rows, None)
    tokens = model.training_tokens(
        rows, begin, end, config("sasrec", "tiny").train, np.random.default_rng(0)
    )
    assert model.padded(tokens, rows, config("sasrec", "tiny").train).tokens == 15
    assert model.request(rows, np.array([0]), np.array([20])).tokens == 15


def test_of_few_events_one_at_least_is_asked() -> None:
    rows = rows_of(USER[:2])
    for seed in range(20):
        tokens = take(rows, rows.start[:-1], rows.start[1:], V, "next_item")
        hidden = label_cloze(tokens, "next_item", np.random.default_rng(seed), 0.01, False)
        assert (hidden.label >= 0).sum() == 1
    nothing = label_cloze(
        replace(tokens, own=tokens.label), "next_item", np.random.default_rng(0), 0.5, False
    )
    assert not (nothing.label >= 0).any()


def test_a_window_knows_the_label_that_lies_behind_its_end() -> None:
    rows = rows_of(USER)
    tokens = take(rows, np.array([0]), np.array([2]), V, "next_item")
    assert labels(pad(label_next(tokens, rows, "next_item"), 8, rows, "next_item")) == [{2}, {3}]


SHOWN = {0: [5, 1, 4], 2: [5, 4, 3], 3: [4, 2]}  # with the events of USER


@pytest.mark.parametrize("target", ["next_item", "next_session"])
def test_fb_shows_feedback_and_what_was_shown_where_it_is_known(target: str) -> None:
    rows = evidence(rows_of(USER), [0, 1, 0, 0], SHOWN)
    batch = trained_on("gru4rec+fb", rows, target, max_len=20)
    # 1 was not shown in vain with itself; what has come up in its session does not come up again.
    assert batch.token.tolist() == [[1, 5, 4, 2, 3, 5, 4, 4, 2]]
    assert batch.feedback.tolist() == [[0, 2, 2, 1, 0, 2, 2, 0, 2]]
    assert seconds(batch) == [10, 10, 10, 20, 100, 100, 100, 110, 110]
    wanted: list[set[int]] = [set() for _ in range(9)]
    wanted[3] = {3} if target == "next_item" else {3, 4}
    if target == "next_item":
        wanted[6] = {4}  # at the last token of the event before; 2 is negative, no label
    assert labels(batch) == wanted


def test_fb_shows_so_many_a_session_and_the_newest_tokens_stay() -> None:
    rows = evidence(rows_of(USER), [0, 1, 0, 0], SHOWN)
    assert trained_on("gru4rec+fb", rows, exposures=1, max_len=20).token.tolist() == [
        [1, 5, 2, 3, 5, 4]
    ]
    assert trained_on("gru4rec+fb", rows, exposures=0, max_len=20).token.tolist() == [[1, 2, 3, 4]]
    model = model_of("gru4rec+fb", max_len=5)  # of which an event, its [ST] and a request take 3
    begin, end = model.windows(rows, np.zeros(1, dtype=np.int64))
    assert list(zip(begin.tolist(), end.tolist(), strict=True)) == [(0, 1), (1, 4)]
    asked = model.request(rows, np.array([0]), np.array([3]))
    assert asked.token.tolist() == [[4, 2, 3, 5, 4]]
    none = model_of("gru4rec+fb", max_len=3).request(rows, np.array([0]), np.array([3]))
    assert none.token.tolist() == [[1, 2, 3]]


def test_fb_of_a_hidden_item_is_hidden() -> None:
    rows = evidence(rows_of(USER), [0, 1, 0, 0], SHOWN)
    item = trained_on("bert4rec+st+fb", rows, max_len=20)
    assert item.token.tolist() == [[ST, 1, 5, 4, 2, ST, 3, 5, 4, MASK]]
    assert item.feedback.tolist() == [[-1, 0, 2, 2, 1, -1, 0, 2, 2, -1]]
    assert labels(item)[-1] == {4}
    session = trained_on("bert4rec+fb", rows, "next_session", max_len=20)
    assert session.token.tolist() == [[1, 5, 4, 2, MASK]]
    assert session.feedback.tolist() == [[0, 2, 2, 1, -1]]
    asked = model_of("bert4rec+fb", max_len=20).request(rows, np.array([0]), np.array([2]))
    assert asked.token.tolist() == [[1, 5, 4, 2, MASK]]


def test_at_random_hidden_items_take_their_exposures_with_them() -> None:
    rows = evidence(
        rows_of(*[USER] * 100), [0] * 400, {4 * u + e: SHOWN[e] for u in range(100) for e in SHOWN}
    )
    model = model_of("bert4rec+fb", request_time="known", max_len=20)
    train = replace(config("bert4rec+fb", "tiny").train, mask_share=0.5)
    tokens = model.training_tokens(
        rows, rows.start[:-1], rows.start[1:], train, np.random.default_rng(1)
    )
    assert (tokens.feedback[tokens.label >= 0] == -1).all()
    hidden = set(tokens.label[tokens.label >= 0].tolist())
    shown = tokens.event[tokens.feedback == 2]
    assert len(hidden) > 150 and len(shown) > 150
    assert not hidden & set(shown.tolist())


@pytest.mark.parametrize("base", CAUSAL)
def test_fb_changes_no_output_before_what_it_tells(base: str) -> None:
    """Other feedback and other exposures at event 3: nothing before it moves, and something after
    it does."""
    chosen = {"max_len": 20, "exposures": 9}
    model = model_of(f"{base}+fb", **chosen)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("fb.table")).normal_()
    first = evidence(rows_of(USER), [0, 0, 0, 0], {0: [5, 1, 4], 2: [5, 4, 3]})
    other = evidence(rows_of(USER), [0, 0, 2, 0], {0: [5, 1, 4], 2: [2, 4, 3]})
    with torch.no_grad():
        asked = [model.request(r, np.array([0]), np.array([4])).to(DEVICE) for r in (first, other)]
        a, b = (model(one) for one in asked)
    assert a.shape == b.shape
    assert torch.allclose(a[0, :4], b[0, :4], atol=1e-6)
    assert not torch.allclose(a[0, 4:], b[0, 4:], atol=1e-3)
