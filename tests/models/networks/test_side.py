"""`+side`: on every backbone, item vectors have what the catalogue says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from models.core.config import Config
from models.core.errors import UserError
from models.core.rows import Target
from models.data.catalogue import read_side
from models.data.load import Data
from models.data.nights import night_cut, nights_asked
from models.data.splits import TEST, targets
from models.evaluation.evaluate import evaluate
from models.networks.methods import BACKBONES, build, config, count_parameters, parse
from models.networks.recommender import Recommender
from models.networks.saved_model import Stored, load, save
from models.networks.side_information import BUCKETS, WORDS, Side, words_of
from models.training.fit import fit, fit_for
from models.training.warm import fit_warm
from tests.support.gold_world import (
    DAY,
    GROUPS,
    NEW,
    SECOND,
    Event,
    attributes_table,
    data_of,
    evidence,
    launches,
    rows_of,
    write_gold,
)

SIZES = {"categories": (4, 3), "numbers": 2, "texts": 1}
CATEGORIES, EACH = 6, 40


def sized(method: str, preset: str = "tiny", **settings: object) -> Config:
    chosen = config(method, preset, **settings)
    return replace(chosen, model=replace(chosen.model, **SIZES))  # type: ignore[arg-type]


def side_of(items: int) -> Side:
    dice = np.random.default_rng(3)
    code = np.stack([dice.integers(0, size, items) for size in (4, 3)], axis=1)
    words = words_of([f"word{n % 3} of {n}" for n in range(items)])[:, None]
    return Side(code, (4, 3), dice.normal(size=(items, 2)), 0, items, {}, words)


@pytest.mark.parametrize("base", list(BACKBONES))
def test_it_costs_what_it_says(base: str) -> None:
    plain, with_it = (count_parameters(50, sized(name)) for name in (base, f"{base}+side"))
    D, width = 32, 16
    tables = (4 + 3) * width + 4097 * width
    mlp = (D + 3 * width + 2) * D + D + D * D + D
    assert with_it["num_params"] - plain["num_params"] == tables + mlp
    assert with_it["num_params_added"] == tables + mlp
    assert with_it["by_module"]["side"] == tables + mlp


@pytest.mark.parametrize("base", list(BACKBONES))
def test_attributes_reach_history_and_candidates_and_nothing_else(
    base: str, tmp_path: Path
) -> None:
    rows = rows_of([(1, 0, 1), (2, 10, 1), (3, 9000, 2)], [(4, 0, 1), (5, 10, 1)])
    torch.manual_seed(1)
    model = cast(Recommender, build(6, sized(f"{base}+st+side"))).eval()
    model.fit(rows)
    assert model.side is not None
    model.side.fill(side_of(6))
    begin, end = rows.start[:-1], rows.start[1:]
    before = model.score(rows, begin, end)
    plain = cast(Recommender, build(6, sized(f"{base}+st"))).eval()
    plain.fit(rows)
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith("side.")}
    )
    assert torch.equal(before, plain.score(rows, begin, end)), "it begins at nothing"
    with torch.no_grad():
        torch.nn.init.normal_(model.side.down.weight, std=0.3)
    learnt = model.score(rows, begin, end)
    assert not torch.allclose(learnt, before)
    # Another category of an item that is in nobody's history: only its own score moves.
    model.side.code[6, 0] = (model.side.code[6, 0] + 1) % 4
    other = model.score(rows, begin, end)
    assert torch.equal(other[:, :5], learnt[:, :5]) and not torch.equal(other[:, 5], learnt[:, 5])
    # Of one that the first user has had: what follows moves too, for that user alone.
    model.side.code[2, 0] = (model.side.code[2, 0] + 1) % 4
    third = model.score(rows, begin, end)
    kept = [0, 2, 3, 4, 5]
    assert torch.equal(third[1, kept], other[1, kept])
    assert not torch.allclose(third[0, kept], other[0, kept])
    stored = Stored(model, sized(f"{base}+st+side"), list("abcdef"), torch.ones(6), {})
    save(stored, tmp_path / "m")
    again = cast(Recommender, load(tmp_path / "m").model)
    assert torch.equal(again.score(rows, begin, end), third)


def test_where_it_cannot_be_it_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="reads the catalogue by itself"):
        parse("sessionrec-sasrec+side")
    with pytest.raises(UserError, match=r"\+side is part of the items' vectors"):
        build(6, sized("sasrec+side", "paper_a_ml1m"))


def planted(lake: Path) -> Data:
    """Only attributes tell: after any item of a category comes any item of the next one, and there
    are so many of each that hardly one is seen more than a few times."""
    dice = np.random.default_rng(5)
    users: dict[str, list[Event]] = {}
    for user in range(120):
        start, base = int(dice.integers(CATEGORIES)), int(dice.integers(DAY))
        users[f"u{user:03d}"] = [
            (f"c{(start + e) % CATEGORIES}-{int(dice.integers(EACH)):02d}",
             base + e * DAY // 4 + (e % 2) * SECOND, 1 + e // 2)
            for e in range(12)
        ]  # fmt: skip
    write_gold(lake, "toy", users)
    data = data_of(lake, split="last_item")
    category = np.array([[1 + int(name[1])] for name in data.item_ids])
    side = Side(category, (CATEGORIES + 1,), np.zeros((len(category), 0)), 0, len(category))
    return replace(data, side=side)


@pytest.mark.parametrize(
    ("base", "epochs"),
    [("sasrec", 12), ("gru4rec", 12), pytest.param("bert4rec", 100, marks=pytest.mark.slow)],
)
def test_where_only_attributes_tell_it_learns_what_the_backbone_alone_cannot(
    base: str, epochs: int, tmp_path: Path
) -> None:
    data = planted(tmp_path)
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_item")
    score = {}
    for method in (base, f"{base}+side"):
        fitted = fit(config(method, "tiny", seed=1, epochs=epochs), data, lambda _: None)
        score[method] = evaluate(fitted.model, asked, (10,)).mean("hr@10")
    # Ten of the forty items of the right category would be a quarter.
    assert score[f"{base}+side"] > 0.15 > score[base] + 0.05, score


def test_words_are_numbers_that_need_no_vocabulary() -> None:
    words = words_of(["Fresh milk", "MILK, fresh", "milk", "", "a " * 50 + "b", "Grüße 牛奶"])
    assert words.shape == (6, WORDS) and words.min() >= 0 and words.max() <= BUCKETS
    held = [set(row[row > 0].tolist()) for row in words]
    assert [len(one) for one in held] == [3, 3, 1, 0, 4, 3]
    assert held[2] < held[0] and len(held[0] & held[1]) == 2, "the pair is another one"
    assert (words[:, 0] > 0).tolist() == [True, True, True, False, True, True]
    many = words_of([" ".join(f"w{n}" for n in range(200))])
    assert (many > 0).all(), "of more words than are read some are left out"


@pytest.mark.training
def test_texts_of_a_catalogue_are_learnt(tmp_path: Path) -> None:
    """The planted log, its groups told by a word of a title."""
    data = planted(tmp_path)
    names = ["red apple", "green tea", "old cheese", "dark bread", "soft soap", "warm socks"]
    attributes_table(
        tmp_path,
        [
            (item, 0, {"title": f"No {n} {names[int(item[1])]} in {n % 7} parts"})
            for n, item in enumerate(data.item_ids)
        ],
    )
    path = str(tmp_path / "toy" / "gold" / "item_attributes")
    side = read_side(path, data.item_ids, 10**15, [], [], "make", ["title"])
    assert side.known == len(data.item_ids) and side.sizes == () and side.value.shape[1] == 0
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_item")
    chosen = config("sasrec+side", "tiny", seed=1, epochs=15)
    fitted = fit(chosen, replace(data, side=side), lambda _: None)
    assert evaluate(fitted.model, asked, (10,)).mean("hr@10") > 0.15, "by lot: .04"


# -- items of the catalogue that nothing has happened to ------------------------------------------


def the_night(lake: Path, listed: bool) -> Data:
    """What may be known before the last night."""
    data = data_of(lake, split="nightly", nights=1, listed=listed)
    assert data.at is not None
    [start] = nights_asked(data.sequences, data.cut)
    data = data.at(night_cut(start))
    newest = int(data.training.rows.ts.max())
    path = str(lake / "toy" / "gold" / "item_attributes")
    return replace(data, side=read_side(path, data.item_ids, newest, ["group"], [], "make"))


@pytest.mark.training
@pytest.mark.parametrize(
    ("method", "epochs"), [("sasrec+side", 15), ("gru4rec+side", 15), ("sessionrec-sasrec", 40)]
)
def test_products_that_nobody_has_bought_yet_are_found_by_what_the_catalogue_says(
    method: str, epochs: int, tmp_path: Path
) -> None:
    launches(tmp_path)
    target: Target = "next_session" if method.startswith("sessionrec") else "next_item"
    data = the_night(tmp_path, listed=True)
    chosen = config(method, "tiny", seed=1, epochs=epochs, target=target)
    model = cast(Recommender, fit_for(chosen, data, epochs, lambda _: None).model)
    new = np.array([number for number, item in enumerate(data.item_ids) if item[3] == "n"])
    assert len(new) == GROUPS * NEW and not any(item[3] == "x" for item in data.item_ids)
    assert not model.item.weight[1:][new].any(), "they have no vector of their own"
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, target, everyone=True)
    scores = model.score(asked.rows, asked.begin, asked.end, asked.request_ts, asked.opens)[:, new]
    group = np.array([item[1] for item in data.item_ids])
    listed = group[new][scores.topk(NEW, dim=1).indices.numpy()]
    held = np.repeat(np.arange(len(asked.user)), np.diff(asked.item_start))
    among = np.isin(asked.item - 1, new)  # of the targets, those that are new
    assert among.sum() > 100
    right = (listed[held[among]] == group[asked.item[among] - 1][:, None]).mean()
    # Without attributes they are all alike: a sixth would be of the right group. A session has two
    # groups, which share the list.
    assert right > (0.3 if target == "next_session" else 0.6), right
    without = the_night(tmp_path, listed=False)
    assert not any(item[3] in "nx" for item in without.item_ids)


def test_what_has_no_event_is_held_against_no_label_whatever_the_loss() -> None:
    rows = rows_of([(1, 0, 1), (2, 10, 1), (3, 9000, 2)], [(4, 0, 1), (5, 10, 1)])
    rows = evidence(rows, [0, 0, 0, 0, 0], {1: [7]})
    for loss in ("full", "sampled", "gbce"):
        torch.manual_seed(1)
        chosen = sized("sasrec+side", loss=loss, negatives=50)
        model = cast(Recommender, build(8, chosen))
        model.fit(rows)
        assert model.side is not None
        model.side.fill(side_of(8))
        assert model.unseen.tolist() == [False] * 5 + [True, False, True], "7 was shown"
        tokens = model.training_tokens(
            rows, rows.start[:-1], rows.start[1:], chosen.train, np.random.default_rng(0)
        )
        model.loss(model.padded(tokens, rows, chosen.train), chosen.train).backward()
        assert model.bias is not None and model.bias.grad is not None
        moved = model.bias.grad != 0
        assert moved[:5].any() and not moved[[5, 7]].any()
        grad = model.item.weight.grad
        assert grad is not None and torch.isfinite(grad).all()
        assert not grad[[6, 8]].any() and not model.item.weight[[6, 8]].any()


def test_a_warm_start_leaves_them_without_a_vector_of_their_own(tmp_path: Path) -> None:
    launches(tmp_path)
    before, data = the_night(tmp_path, listed=False), the_night(tmp_path, listed=True)
    chosen = config("sasrec+side", "tiny", seed=1, epochs=2)
    fitted = fit_for(chosen, before, 2, lambda _: None)
    facts = {"method": "sasrec+side", "categories": {"group": before.side.values["group"]}}  # type: ignore[union-attr]
    old = Stored(cast(Recommender, fitted.model), chosen, before.item_ids,
                 torch.ones(len(before.item_ids)), facts)  # fmt: skip
    until = int(np.median(data.training.rows.ts))
    model = cast(Recommender, fit_warm(chosen, data, old, until, 2, lambda _: None).model)
    new = [1 + number for number, item in enumerate(data.item_ids) if item[3] == "n"]
    assert new and not model.item.weight[new].any()
    assert model.item.weight[[1, 2, 3]].any()
