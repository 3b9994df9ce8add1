"""Weights that are taken over into a model with more items: what is known stays, item by item."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.core.config import Config
from models.core.rows import Rows
from models.networks.methods import BACKBONES, SESSION_ENCODERS, build, config
from models.networks.recommender import Recommender
from models.networks.saved_model import Stored
from models.networks.warm_start import carry_over
from models.training.epoch import Epoch
from tests.support.gold_world import SECOND, rows_of

METHODS = [
    *BACKBONES, *SESSION_ENCODERS, "sasrec+st+sse+tsa", "bert4rec+st+fb", "sasrec+habit",
]  # fmt: skip


def known() -> Rows:
    """Items 1 to 4; two users, two sessions each."""
    return rows_of(
        [(1, 0, 1), (2, 10, 1), (3, 9000, 2)],
        [(3, 0, 1), (4, 10, 1), (1, 9000, 2), (2, 9010, 2)],
    )


def stored(name: str, rows: Rows, ids: list[str], **settings: object) -> tuple[Stored, Config]:
    chosen = config(name, "tiny", seed=5, **settings)
    torch.manual_seed(7)
    model = build(len(ids), chosen)
    assert isinstance(model, Recommender)
    model.fit(rows)
    with torch.no_grad():  # as if learnt: nothing is where it began
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.item.weight[0].zero_()
    model.eval()
    count = torch.from_numpy(np.bincount(rows.item[rows.positive], minlength=len(ids) + 1)[1:])
    return Stored(model, chosen, ids, count.double(), {"method": name}), chosen


def fresh(chosen: Config, size: int, rows: Rows) -> Recommender:
    torch.manual_seed(99)
    model = build(size, chosen)
    assert isinstance(model, Recommender)
    model.fit(rows)
    return model.eval()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("target", ["next_item", "next_session"])
def test_on_the_same_items_the_model_is_the_same(name: str, target: str) -> None:
    rows, ids = known(), ["a", "b", "c", "d"]
    old, chosen = stored(name, rows, ids, target=target)
    model = fresh(chosen, 4, rows)
    carried = carry_over(model, old, ids, rows)
    assert (carried.known, carried.beside, carried.others) == (4, 0, 0)
    begin, end = rows.start[:-1], rows.start[1:]
    torch.testing.assert_close(
        model.score(rows, begin, end), old.model.score(rows, begin, end), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["sasrec", "hstu", "bert4rec", "sessionrec-gru4rec", "gru4rec"])
@pytest.mark.parametrize("tied", [True, False])
def test_items_go_over_by_id_and_new_ones_begin_beside_what_they_are_seen_with(
    name: str, tied: bool
) -> None:
    old, chosen = stored(name, known(), ["a", "b", "c", "d"], tied=tied)
    # A vocabulary in another order: e and f are new. e stands twice beside a and once beside c; f
    # is alone in its session.
    ids = ["e", "d", "a", "f", "c", "b"]
    rows = rows_of(
        [(3, 0, 1), (3, 5, 1), (1, 10, 1), (5, 20, 1)],
        [(2, 0, 1), (6, 10, 1), (4, 9000, 2)],
    )
    model = fresh(chosen, 6, rows)
    carried = carry_over(model, old, ids, rows)
    assert (carried.known, carried.beside, carried.others) == (4, 1, 1)
    assert isinstance(old.model, Recommender)
    tables = [(model.item.weight, old.model.item.weight)]
    if model.output is not None:
        assert old.model.output is not None
        tables.append((model.output.weight, old.model.output.weight))
    for mine, theirs in tables:
        for place, item in enumerate(ids, 1):
            if item in old.item_ids:
                assert torch.equal(mine[place], theirs[1 + old.item_ids.index(item)]), item
        a, c = theirs[1], theirs[3]
        torch.testing.assert_close(mine[1], (2 * a + c) / 3, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine[4], theirs[1:5].mean(dim=0), rtol=1e-5, atol=1e-6)
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[7:], theirs[5:]), "[MASK] is the same token"
    bias = model.bias if model.output is None else model.output.bias
    theirs_b = old.model.bias if old.model.output is None else old.model.output.bias
    if bias is not None and theirs_b is not None:
        first = len(bias) - 6
        was, now = np.array([2, 2, 2, 1.0]), np.array([1, 1, 2, 1, 1, 1.0])
        share = [np.log((n + 1) / (n.sum() + len(n))) for n in (was, now)]
        was, now = (one - one.mean() for one in share)
        learnt = theirs_b[first:].detach().numpy() - was
        for place, item in enumerate(ids):
            want = now[place] + (learnt["abcd".index(item)] if item in "abcd" else 0.0)
            assert float(bias[first + place].detach()) == pytest.approx(want, abs=1e-5), item


def labels_of(rows: Rows, name: str, target: str) -> set[tuple[int, ...]]:
    """The items of every label of an epoch's batches."""
    chosen = config(name, "tiny", target=target)
    model = fresh(chosen, 96, rows)
    epoch = Epoch(model, rows, chosen, 1)
    found = set()
    for number in range(len(epoch)):
        for batch in epoch[number]:
            start = batch.label_start.tolist()
            for low, high in itertools.pairwise(start):
                found.add(tuple(batch.label_item[low:high].tolist()))
    return found


@pytest.mark.parametrize("name", ["sasrec", "gru4rec+st", "bert4rec", "sessionrec-sasrec"])
def test_only_the_events_that_are_labels_are_learnt(name: str) -> None:
    users = [[(1 + 12 * u + e, u * 10 + e * 1000, 1 + e // 2) for e in range(12)] for u in range(8)]
    rows = rows_of(*users)
    late = rows.ts > 9000 * SECOND
    for target in ("next_item", "next_session"):
        if name.startswith("sessionrec") and target == "next_item":
            continue
        some = labels_of(replace(rows, labels=late), name, target)
        every = labels_of(replace(rows, labels=np.ones(len(rows.item), dtype=bool)), name, target)
        assert some and len(some) < len(every) and every == labels_of(rows, name, target)
        # (Of a session that has begun before, nothing is a label.)
        assert {item for one in some for item in one} <= set(rows.item[late].tolist())
        none = labels_of(replace(rows, labels=np.zeros(len(rows.item), dtype=bool)), name, target)
        assert not none
