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
from models.data.load import Data
from models.data.splits import TEST, targets
from models.evaluation.evaluate import evaluate
from models.networks.methods import BACKBONES, build, config, count_parameters, parse
from models.networks.recommender import Recommender
from models.networks.saved_model import Stored, load, save
from models.networks.side_information import Side
from models.training.fit import fit
from tests.support.gold_world import DAY, SECOND, Event, data_of, rows_of, write_gold

SIZES = {"categories": (4, 3), "numbers": 2}
CATEGORIES, EACH = 6, 40


def sized(method: str, preset: str = "tiny", **settings: object) -> Config:
    chosen = config(method, preset, **settings)
    return replace(chosen, model=replace(chosen.model, **SIZES))  # type: ignore[arg-type]


def side_of(items: int) -> Side:
    dice = np.random.default_rng(3)
    code = np.stack([dice.integers(0, size, items) for size in (4, 3)], axis=1)
    return Side(code, (4, 3), dice.normal(size=(items, 2)), 0, items)


@pytest.mark.parametrize("base", list(BACKBONES))
def test_it_costs_what_it_says(base: str) -> None:
    plain, with_it = (count_parameters(50, sized(name)) for name in (base, f"{base}+side"))
    D, width = 32, 16
    tables = (4 + 3) * width
    mlp = (D + 2 * width + 2) * D + D + D * D + D
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
    with pytest.raises(UserError, match="reads the catalogue as it is"):
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
