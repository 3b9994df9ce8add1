"""Methods: exact parameter counts, what the loss is, that each learns, that seeds decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.core.config import PRESET_ITEMS
from models.core.errors import UserError
from models.core.process_group import ALONE, Team
from models.data.load import Data
from models.data.splits import TEST, targets
from models.evaluation.evaluate import evaluate
from models.networks import methods
from models.networks.encodings import Encoding
from models.networks.methods import config, count_parameters, recommender
from models.training.epoch import Epoch
from models.training.fit import Fitted, Run, fit
from tests.support.gold_world import data_of, favourites, ring, write_gold

PAPER = [
    ("paper_a_ml1m", 4_918_529, {"st": 256, "sse": 768, "tsa": 1_120, "st+sse+tsa": 2_144}),
    ("paper_a_steam", 5_386_221, {"st": 256, "sse": 1_280, "tsa": 4_288, "st+sse+tsa": 5_824}),
]


@pytest.mark.parametrize(("preset", "vanilla", "added"), PAPER)
def test_the_counts_of_paper_a(preset: str, vanilla: int, added: dict[str, int]) -> None:
    items = PRESET_ITEMS[preset]
    assert count_parameters(items, config("bert4rec", preset))["num_params"] == vanilla
    for encodings, cost in added.items():
        counted = count_parameters(items, config(f"bert4rec+{encodings}", preset))
        assert counted["num_params"] == vanilla + cost
        assert counted["num_params_added"] == cost
        assert sum(counted["by_module"].values()) == vanilla + cost


SIZES = [
    {"dim": 12, "layers": 3, "heads": 3, "max_len": 17, "segments": 4, "time_features": 5},
    {"dim": 64, "layers": 1, "heads": 2, "max_len": 200, "segments": 9, "time_features": 32},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("preset", ["small", "paper_a_ml20m"])
@pytest.mark.parametrize("base", list(methods.BACKBONES))
def test_counts_by_formula(base: str, preset: str, sizes: dict[str, int]) -> None:
    V = 71
    D, L, layers = sizes["dim"], sizes["max_len"], sizes["layers"]
    S, T = sizes["segments"], sizes["time_features"]
    recurrent = base in ("gru4rec", "narm")
    tsa = 2 * T + layers * (3 * D * T if recurrent else T * T + T)
    tsa += 2 * D * T if base == "narm" else 0
    for encodings, cost in {
        "st": D,
        "sse": S * D,
        "tsa": tsa,
        "st+sse+tsa": D + S * D + tsa,
        "fb": 4 * D,
    }.items():
        counted = count_parameters(V, config(f"{base}+{encodings}", preset, **sizes))
        assert counted["num_params_added"] == cost
    reference = preset != "small"
    table = (V + 1 + (base == "bert4rec" or reference)) * D
    head = (V + 1) * (D + 1) if reference else V
    if recurrent:
        net = layers * (6 * D * D + 6 * D) + (4 * D * D + D if base == "narm" else 0)
    elif base == "hstu":
        head, net = 0, layers * (5 * D * D + D + 2 * L - 1 + 129)
    else:
        net = L * D + layers * (12 * D * D + 13 * D) + (D if reference else 2 * D)
    assert count_parameters(V, config(base, preset, **sizes))["num_params"] == table + head + net


@pytest.mark.parametrize("name", ["bert5rec", "bert4rec+xx", "pop+st", "gru4rec+st+st", "+st", ""])
def test_an_unknown_method_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"pop, .*vsknn.*gru4rec, .*hstu.*\+st"):
        config(name)


def test_order_of_encodings_does_not_matter_for_the_count() -> None:
    one, other = config("bert4rec+st+tsa"), config("bert4rec+tsa+st")
    assert count_parameters(9, one)["num_params"] == count_parameters(9, other)["num_params"]


class Shout(Encoding):
    """A toy encoding from outside: one learned vector added to everything."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vector = nn.Parameter(torch.zeros(config.dim))

    def embed(self, x_BLD: torch.Tensor, batch: Any) -> torch.Tensor:
        return x_BLD + self.vector


class Mean(nn.Module):
    """A toy backbone from outside: the running mean of the sequence."""

    cloze = False

    def __init__(self, config: Any, feature_dim: int = 0) -> None:
        super().__init__()
        self.out = nn.Linear(config.dim + feature_dim, config.dim)

    def forward(self, x: torch.Tensor, batch: Any, features: torch.Tensor | None = None) -> Any:
        x = x if features is None else torch.cat([x, features], dim=-1)
        real = (~batch.padding).unsqueeze(-1)
        return self.out((x * real).cumsum(1) / real.cumsum(1).clamp(min=1))


def test_a_backbone_and_an_encoding_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.BACKBONES, "mean", Mean)
    monkeypatch.setitem(methods.ENCODINGS, "shout", Shout)
    write_gold(tmp_path, "toy", ring(users=10))
    data = data_of(tmp_path)
    for name in ("mean+shout+st+tsa", "bert4rec+shout", "mean"):
        fitted = fit(config(name, "tiny", epochs=2), data, lambda _: None)
        loss = fitted.curves["loss"]
        assert len(loss) == 2 and loss[1] < loss[0]
        assert 0 < ndcg(fitted, data) < 1
        learnt = {part: value for part, value in fitted.model.named_parameters() if "shout" in part}
        assert [value.shape for value in learnt.values()] == [(fitted.model.config.dim,)] * (
            "shout" in name
        )
        assert all(value.abs().max() > 0 for value in learnt.values())


@pytest.mark.parametrize("base", ["sasrec", "hstu", "gru4rec"])
def test_gradients_of_frequencies_do_not_clip_the_rest(tmp_path: Path, base: str) -> None:
    """d cos(w*t)/dw grows with t: a norm over all parameters would be theirs alone."""
    write_gold(tmp_path, "toy", ring(events=400))  # a hundred days
    data = data_of(tmp_path)
    chosen = config(f"{base}+tsa", "tiny")
    model = recommender(len(data.item_ids), chosen)
    model.fit(data.training.rows)
    run = Run(model, chosen, data.training.rows, "cpu", ALONE)
    epoch = Epoch(model, data.training.rows, chosen, 1)
    for batch in range(4):  # (zero weights let no gradient through at first)
        run.step(epoch[batch % len(epoch)], 0.5)
    left = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    frequency = left.pop("encodings.tsa.frequency")
    norm = float(torch.stack([one.norm() for one in left.values()]).norm())
    assert float(frequency.norm()) == pytest.approx(1, rel=1e-3), "clipped: years in seconds"
    assert 0.1 < norm <= 1.001


def test_of_a_batch_a_process_may_have_no_row(tmp_path: Path) -> None:
    """As of the last batch of an epoch, where it has fewer rows than there are processes."""
    write_gold(tmp_path, "toy", ring(users=5))
    data = data_of(tmp_path)
    chosen = config("sasrec+st+habit", "tiny", batch_size=4, all_windows=False)
    model = recommender(len(data.item_ids), chosen)
    model.fit(data.training.rows)
    shares = [Epoch(model, data.training.rows, chosen, 1, Team(rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    rows = [[sum(len(part.token) for part in share[n]) for n in range(2)] for share in shares]
    assert rows == [[2, 1], [1, 0], [1, 0]]


def ndcg(fitted: Fitted, data: Data, target: str = "next_item") -> float:
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, target)  # type: ignore[arg-type]
    return evaluate(fitted.model, asked).mean("ndcg@10")


@pytest.fixture(scope="module")
def ring_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    lake = tmp_path_factory.mktemp("ring")
    write_gold(lake, "toy", ring())
    return data_of(lake)


@pytest.mark.training
@pytest.mark.parametrize("policy", ["last_event", "known"])
@pytest.mark.parametrize("method", ["gru4rec", "gru4rec+st", "bert4rec", "bert4rec+st"])
def test_it_learns_what_follows_what(method: str, policy: str, ring_data: Data) -> None:
    fitted = fit(config(method, "tiny", request_time=policy, epochs=40), ring_data, lambda _: None)
    assert ndcg(fitted, ring_data) > 0.9
    assert ndcg(fit(config("pop"), ring_data), ring_data) < 0.5


@pytest.mark.parametrize(("schedule", "epochs"), [("cosine", 4), ("constant", 3)])
def test_waiting_for_a_better_score_begins_after_the_warm_up(
    schedule: str, epochs: int, ring_data: Data
) -> None:
    """Nothing is learnt, so the first epoch's score is the best: with two epochs' patience it ends
    after the third; but of 40 epochs two are warm-up."""
    fixed = {"learning_rate": 1e-12, "epochs": 40, "patience": 2, "schedule": schedule}
    fitted = fit(config("sasrec", "tiny", **fixed), ring_data, lambda _: None)
    assert fitted.best_epoch == 1 and len(fitted.curves["loss"]) == epochs


@pytest.mark.training
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sasrec+st+sse+tsa", {}),
        ("narm+st", {}),
        ("narm+sse+tsa", {}),
        ("hstu", {}),
        ("hstu+st+sse+tsa", {}),
        ("sasrec", {"loss": "sampled", "negatives": 8}),
        ("gru4rec+st", {"loss": "gbce", "negatives": 8}),
    ],
)
def test_other_backbones_encodings_and_losses_learn_too(
    method: str, options: dict[str, Any], ring_data: Data
) -> None:
    fitted = fit(config(method, "tiny", epochs=40, **options), ring_data, lambda _: None)
    assert ndcg(fitted, ring_data) > 0.9


@pytest.fixture(scope="module")
def basket_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    lake = tmp_path_factory.mktemp("baskets")
    write_gold(lake, "toy", favourites())
    return data_of(lake)


@pytest.mark.training
def test_people_buy_again(basket_data: Data) -> None:
    """personal_top beats pop where people have favourites; so does a model of next sessions."""
    score = {
        name: ndcg(
            fit(
                config(name, "tiny", target="next_session", epochs=30), basket_data, lambda _: None
            ),
            basket_data,
            "next_session",
        )
        for name in ("pop", "personal_top", "gru4rec+st", "bert4rec+st")
    }
    assert score["personal_top"] > score["pop"] + 0.1
    assert score["gru4rec+st"] > score["pop"] + 0.05
    assert score["bert4rec+st"] > score["pop"] + 0.05


def test_scores_of_baselines_by_hand(tmp_path: Path) -> None:
    story = {
        "ann": [("a", 1, 1), ("a", 2, 1), ("b", 3, 1), ("a", 90, 2)],
        "bob": [("c", 4, 1), ("b", 5, 1), ("b", 91, 2)],
    }
    write_gold(tmp_path, "toy", story)
    data = data_of(tmp_path, valid_from=80, test_from=80)
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_item")
    pop = fit(config("pop"), data).model
    assert pop.score(asked.rows, asked.begin, asked.end).tolist() == [[2, 2, 1]] * 2
    own = fit(config("personal_top"), data).model
    scores = own.score(asked.rows, asked.begin, asked.end)
    assert torch.allclose(
        scores,
        torch.tensor([[2 + 2 / 3, 1 + 2 / 3, 1 / 3], [2 / 3, 1 + 2 / 3, 1 + 1 / 3]]).double(),
    )


@pytest.mark.parametrize("method", ["gru4rec+st", "bert4rec+st+sse+tsa"])
def test_the_seed_decides(method: str, ring_data: Data) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        chosen = config(method, "tiny", seed=seed, epochs=3, dropout=0.1)
        return fit(chosen, ring_data, lambda _: None).model.state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
