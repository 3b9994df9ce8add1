"""Which methods a comparison recommends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.selection.compare import BY, Entry, _advice, epoch_s, not_recommended


def entry(method: str, by_user: list[float]) -> Entry:
    values = np.array(by_user)
    report = {"method": method, "metrics": {BY: {"value": float(values.mean())}}}
    return Entry(report, {}, [f"u{n}" for n in range(len(values))], values, {})


def told(trained: Entry, counted: Entry | None) -> dict[str, Any]:
    return {"method": trained.report["method"], BY: trained.report["metrics"][BY]["value"]} | (
        _advice(trained, counted)
    )


DICE = np.random.default_rng(0)
BASE = DICE.random(200) / 2
NOISE = DICE.normal(0, 0.1, 200)


@pytest.mark.parametrize(
    ("gain", "recommended", "words"),
    [
        (0.1, True, ""),
        (-0.1, False, "difference -0.1"),
        (0.0, False, "difference "),
    ],
)
def test_what_does_not_beat_the_baseline_is_not_recommended(
    gain: float, recommended: bool, words: str
) -> None:
    noise = NOISE - NOISE.mean()
    row = told(entry("sasrec+st", list(BASE + gain + noise)), entry("tifu_knn", list(BASE)))
    assert row["recommended"] is recommended
    assert row["vs_baseline"]["method"] == "tifu_knn"
    assert row["vs_baseline"]["difference"] == pytest.approx(gain)
    said = not_recommended({"methods": [row]})
    if recommended:
        assert said == []
        return
    [sentence] = said
    assert sentence.startswith("sasrec+st is not recommended: it does not beat tifu_knn (NDCG@10 ")
    assert words in sentence
    assert sentence.endswith(", significant)" if gain else ", not significant)")


def test_an_epoch_takes_what_it_takes_in_all_nights() -> None:
    once = {"train_s": 12.0, "epochs": 6, "best_epoch": 4}
    nights = [{"epochs": 4}, {"epochs": 4}, {"epochs": 0}]  # (the last kept its model)
    assert epoch_s(once) == 2.0
    assert epoch_s({**once, "train_s": 28.0, "by_night": nights}) == 2.0


def test_counted_methods_and_comparisons_without_one_get_no_advice() -> None:
    nothing = {"vs_baseline": None, "recommended": None}
    pop, sasrec = entry("pop", list(BASE)), entry("sasrec", list(BASE))
    assert _advice(pop, pop) == _advice(sasrec, None) == nothing
    assert _advice(entry("tifu_knn (k 900)", list(BASE)), pop) == nothing
    assert not_recommended({"methods": [{"method": "sasrec", BY: 0.1}]}) == []  # of 0.1.0
