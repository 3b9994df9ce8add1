"""The challenger and what it must beat, by user: what the gate decides about.

On one cut both stored models are scored anew (`models/evaluation/rescore.py`), and both have learnt
from the same events: a champion whose weights are of another cut or table version is trained on the
challenger's, by its recipe, or a challenger could win by knowing newer events. A backtest has a model
a night, and the last one alone is kept, so there the gate compares recipes: the values by user that
were recorded over all nights. A champion that was not judged on the same nights of the same table
version is judged anew by its recipe, with the challenger's options; what that costs is reported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from models.core.config import Config
from models.core.environment import Say, note, pick_device
from models.core.rows import Floats
from models.data.splits import describe
from models.evaluation.rescore import rescored, stored_cut
from models.networks.baselines import PersonalTop
from models.networks.methods import config
from models.networks.saved_model import Stored
from models.registry.register import Registered
from models.selection.compare import BY, SAME, entry_of
from models.training.nightly import unrecorded
from models.training.refit import recipe_of, trained_on
from models.training.run import Request

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from jobs.core.source_file import Source

Scores = dict[str, float]
LEARNT_FROM = ("table_id", "table_version", "cut")  # facts: who agrees learnt from the same events


@dataclass(frozen=True)
class Contender:
    """A model at the gate."""

    called: str
    stored: Stored


@dataclass(frozen=True)
class Pair:
    """NDCG@10 of both by user, users in the same order; `alone`: users that only one was evaluated on.

    judged_anew_s: what it cost to judge the other on the same nights; None: it was judged on them.
    """

    ours_U: Floats
    theirs_U: Floats
    alone: int
    against: str
    table_version: int
    cut: dict[str, Any]
    coverage: float
    judged_anew_s: float | None = None


def pair(
    client: MlflowClient,
    source: Source,
    lake: str,
    challenger: tuple[Registered, Contender],
    champion: tuple[Registered, Contender] | None,
) -> Pair:
    """The challenger against the champion; without one against `personal_top`."""
    cut = challenger[1].stored.facts["cut"]
    if cut["split"] == "nightly":
        return _by_night(client, source, lake, challenger, champion)
    return _on_one_cut(client, source, lake, challenger[1], champion)


def _on_one_cut(
    client: MlflowClient,
    source: Source,
    lake: str,
    one: Contender,
    champion: tuple[Registered, Contender] | None,
) -> Pair:
    facts, cut = one.stored.facts, stored_cut(one.stored)
    seconds = None
    if champion is None:
        plain = PersonalTop(len(one.stored.item_ids), one.stored.config.model)
        plain.count.copy_(one.stored.popularity)
        other = Contender("personal_top, as there is no champion", replace(one.stored, model=plain))
    elif all(champion[1].stored.facts[name] == facts[name] for name in LEARNT_FROM):
        other = champion[1]
    else:
        began = time.perf_counter()
        recipe = recipe_of(client, champion[0])
        stored = trained_on(recipe, source, lake, facts["table_version"], cut, note)
        other = Contender(f"{champion[1].called}, trained anew on the same events", stored)
        seconds = round(time.perf_counter() - began, 2)
    scores, results = [], []
    for each in (one, other):
        version, asked, result = rescored(each.stored, source, lake, None, cut, facts["target"])
        scores.append(dict(zip(asked, result.values[BY].tolist(), strict=True)))
        results.append(result)
    coverage = results[0].catalogue["coverage@10"]
    return _paired(*scores, other.called, version, describe(cut), coverage, seconds)


def _by_night(
    client: MlflowClient,
    source: Source,
    lake: str,
    challenger: tuple[Registered, Contender],
    champion: tuple[Registered, Contender] | None,
) -> Pair:
    ours = entry_of(client, challenger[0].run_id)
    told = ours.report["table_version"], ours.facts["cut"]
    coverage = float(ours.report["metrics"]["coverage@10"]["value"])
    mine = dict(zip(ours.user_id, ours.by_user.tolist(), strict=True))
    facts = ours.facts
    if champion is not None:
        theirs = entry_of(client, champion[0].run_id)
        if all(theirs.facts.get(name) == facts.get(name) for name in SAME):
            scores = dict(zip(theirs.user_id, theirs.by_user.tolist(), strict=True))
            return _paired(mine, scores, champion[1].called, *told, coverage)
        called, recipe = champion[1].called, champion[1].stored.config
    else:
        called = "personal_top, as there is no champion"
        recipe = config("personal_top")
    began = time.perf_counter()
    scores = _judged_anew(source, lake, recipe, facts, note)
    seconds = round(time.perf_counter() - began, 2)
    return _paired(mine, scores, called, *told, coverage, seconds)


def _judged_anew(
    source: Source, lake: str, recipe: Config, facts: dict[str, Any], say: Say
) -> Scores:
    """NDCG@10 by user of a recipe on the nights of a backtest with these facts."""
    asked = replace(
        recipe,
        train=replace(recipe.train, target=facts["target"]),
        model=replace(
            recipe.model,
            request_time=facts["request_time"],
            repeat_policy=facts["repeat_policy"],
        ),
    )
    request = Request(
        source=source,
        lake=lake,
        config=asked,
        version=facts["table_version"],
        split="nightly",
        nights=facts["cut"]["nights"],
        each_night=facts["each_night"],
        preprocess=facts["preprocess"],
        device=pick_device("auto"),
    )
    prepared, outcome = unrecorded(request, say)
    names, result = prepared.data.sequences.user_id, outcome.result
    return dict(zip([names[u] for u in result.users], result.values[BY].tolist(), strict=True))


def _paired(mine: Scores, theirs: Scores, *told: Any) -> Pair:
    both = sorted(mine.keys() & theirs.keys())
    ours_U, theirs_U = (np.array([one[user] for user in both]) for one in (mine, theirs))
    return Pair(ours_U, theirs_U, len(mine.keys() ^ theirs.keys()), *told)
