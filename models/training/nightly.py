"""A method judged as it is used (`--split nightly`): before each night it learns all that happened
until then, and it is evaluated on that night.

Epochs are chosen once, on the nights before the first test night. Then, for each test night, a model
is made of what lies before it by one of `LEARNERS`, and scored. A user's value is the mean over the
user's targets of all nights. The model of the last night is the one that is kept.

Beside the checkpoints of the training that runs there is a folder for each night that has ended,
`night-<date>/`: its result, and the model of the newest one. A backtest that was killed goes on
after the last of them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError

from models.core.environment import Say
from models.core.errors import UserError
from models.core.process_group import Team
from models.core.rows import Ints, Target
from models.data.nights import by_age, date_of, first_seen, night_cut, nights_asked
from models.data.splits import TEST, Targets, periods, targets
from models.evaluation import pool
from models.evaluation.evaluate import Result
from models.networks.methods import BASELINES, parse
from models.networks.saved_model import Stored, load, save
from models.training.checkpoints import Checkpoints
from models.training.fit import Fitted, fit, fit_for
from models.training.run import (
    Learnt,
    Outcome,
    Prepared,
    Request,
    Work,
    checkpoints_of,
    fitted_to,
    no_target,
    prepared_of,
    read,
    scored,
    stored_of,
)
from models.training.run import train as train_and_record
from models.training.warm import fit_warm


@dataclass(frozen=True)
class Before:
    """The model of the night before, with its own vocabulary (`stored.item_ids`).

    until: the newest event that it may have been trained on, microseconds since 1970.
    """

    stored: Stored
    until: int


Learner = Callable[[Before | None, Prepared, int, Work], Fitted]
"""(the night before, the data of this night, epochs, how) -> the model of this night. None: this is
the first test night."""


def from_scratch(_: Before | None, night: Prepared, epochs: int, how: Work) -> Fitted:
    """As many epochs as were best on the validation nights."""
    config, data = night.config, night.data
    return fit_for(config, data, epochs, how.say, how.device, how.keep, how.team)


def once(before: Before | None, night: Prepared, epochs: int, how: Work) -> Fitted:
    """The model of the first test night stays."""
    if before is None:
        return from_scratch(None, night, epochs, how)
    return Fitted(before.stored.model)


def warm(before: Before | None, night: Prepared, epochs: int, how: Work) -> Fitted:
    """The model of the night before goes on, as a refit does."""
    if before is None:
        return from_scratch(None, night, epochs, how)
    config, data = night.config, night.data
    return fit_warm(
        config, data, before.stored, before.until, epochs, how.say, how.device, how.keep, how.team
    )


LEARNERS: dict[str, Learner] = {"scratch": from_scratch, "warm": warm, "once": once}
STAYS = ("once",)  # their models know what lay before the first test night, and no more


@dataclass(frozen=True)
class Backtest(Prepared):
    """The last night of a backtest, what all is chosen on, and where its nights begin."""

    choosing: Learnt
    starts: list[int]


@dataclass(frozen=True)
class Chosen:
    """What was chosen on the validation nights, and what that cost."""

    epochs: int
    best_epoch: int
    validation: float
    curves: dict[str, list[float]]
    seconds: float
    events_per_second: float
    precision: str | None


@dataclass(frozen=True)
class Judged:
    """A night that has ended; `told` is its row in `by_night`."""

    result: Result
    told: dict[str, Any]


def train(request: Request, say: Say = print) -> dict[str, Any] | None:
    """As `models.training.run.train`, night by night.

    Raises:
        UserError: the log has too few nights, or nobody can be asked in any of them.
    """
    return train_and_record(request, say, prepare, judge)


def unrecorded(request: Request, say: Say = print) -> tuple[Prepared, Outcome]:
    """A backtest that is no run in MLflow: of another model's recipe, to compare a model with."""
    request.check()
    prepared = prepare(request, say)
    keep = checkpoints_of(request, prepared, Team())
    with keep.alone() as mine:
        how = Work(say, request.device, keep if mine else None)
        outcome = judge(request, prepared, how)
        if mine:
            keep.remove()
    return prepared, outcome


def prepare(request: Request, say: Say) -> Backtest:
    """The log read and cut, and the last night ready to be learnt and evaluated."""
    learnt = read(replace(request, split="nightly"), say)
    if request.recipe is not None:
        request.recipe.check_cut(learnt.facts["cut"], learnt.data.sequences.version)
    starts = nights_asked(learnt.data.sequences, learnt.data.cut)
    last = _night(request, learnt, starts, len(starts) - 1, say)
    return Backtest(**vars(last), choosing=learnt, starts=starts)


def _night(request: Request, learnt: Learnt, starts: list[int], number: int, say: Say) -> Prepared:
    """One night: training rows, vocabulary and configuration of what its model may know, targets of
    the night. Users count whose history has no item that a model that stays knows."""
    assert learnt.data.at is not None
    stays = _learner(request, learnt)[0] in STAYS
    data = learnt.data.at(night_cut(starts[0] if stays else starts[number]))
    cut = night_cut(starts[number])
    data = replace(data, cut=cut, period=periods(data.events, cut))
    config, data = fitted_to(request, data, say)
    asked = targets(
        data.events,
        data.period,
        TEST,
        data.training.vocabulary,
        cast(Target, config.train.target),
        everyone=True,
    )
    return prepared_of(request, config, data, asked, learnt.facts)


def _learner(request: Request, learnt: Learnt) -> tuple[str, Learner]:
    """Its name, and how it learns. Counts are made anew each night, whatever is asked for."""
    counted = parse(request.config.method)[0] in BASELINES
    name = "scratch" if counted else str(learnt.facts["each_night"])
    return name, LEARNERS[name]


# -- the nights, one after another ----------------------------------------------------------------


def judge(request: Request, prepared: Prepared, how: Work) -> Outcome:
    """All nights that have not ended yet, and the score over all of them.

    Raises:
        UserError: nobody could be asked.
    """
    assert isinstance(prepared, Backtest)
    learnt, starts = prepared.choosing, prepared.starts
    chosen = _chosen(learnt, how)
    name, learner = _learner(request, learnt)
    first = first_seen(learnt.data.events)
    nights, model = _ended(starts, how)
    if nights:
        how.say(f"resuming: {len(nights)} of {len(starts)} nights are done")
    eval_s = sum(one.told["eval_s"] for one in nights)
    for number in range(len(nights), len(starts)):
        at_end = number == len(starts) - 1
        night = prepared if at_end else _night(request, learnt, starts, number, how.say)
        steps = _steps(how, starts[number])
        before = None if model is None else Before(model, _newest(learnt, starts[number - 1]))
        fitted = learner(before, night, chosen.best_epoch, replace(how, keep=steps))
        ages = by_age(night.targets, first, starts[number])
        ask = _with_fallback(fitted, night)
        outcome = scored(fitted, night, request.sampled, how.team, ages=ages, ask=ask)
        fitted = replace(fitted, precision=chosen.precision)
        model = stored_of(night, fitted)
        one = Judged(outcome.result, _told(starts[number], night, fitted, outcome))
        _keep_night(how, starts[number], one, model)
        nights.append(one)
        eval_s += outcome.eval_s
        how.say(_in_words(one.told, number + 1, len(starts)))
    assert model is not None
    result = pool.pooled([one.result for one in nights])
    if not len(result.users):
        target = prepared.config.train.target
        raise UserError(no_target(learnt.data, target, prepared.targets.left_out))
    seconds = chosen.seconds + sum(one.told["train_s"] for one in nights)
    fitted = Fitted(model.model, **{**asdict(chosen), "seconds": seconds})
    last = nights[-1].result
    if name in STAYS:
        last = _of_known(request, prepared, fitted, how)
    return Outcome(fitted, result, eval_s, [one.told for one in nights], last)


def _newest(learnt: Learnt, start: int) -> int:
    """The newest event before a night."""
    ts = learnt.data.events.ts
    return int(ts[ts < start].max())


def _chosen(learnt: Learnt, how: Work) -> Chosen:
    """The epochs, chosen on the validation nights; once chosen, they are kept."""
    file = None if how.keep is None else how.keep.folder / "chosen.json"
    if file is not None and _agreed(how.team, file.is_file()):
        return Chosen(**json.loads(file.read_text(encoding="utf-8")))
    fitted = fit(
        learnt.config, learnt.data, how.say, how.device, how.keep, how.team, how.each_epoch
    )
    names = Chosen.__dataclass_fields__
    chosen = Chosen(**{name: getattr(fitted, name) for name in names})
    if file is not None and how.team.is_main_process:
        aside = file.with_suffix(".writing")
        aside.write_text(json.dumps(asdict(chosen)), encoding="utf-8")
        aside.rename(file)
    how.team.wait()
    return chosen


def _agreed(team: Team, here: bool) -> bool:
    """What the first process sees, for all."""
    return bool(team.each(torch.tensor([int(here)]))[0])


def _told(start: int, night: Prepared, fitted: Fitted, outcome: Outcome) -> dict[str, Any]:
    result = outcome.result
    mean = {name: result.mean(name) for name in ("ndcg@10", "hr@10")} if len(result.users) else {}
    return {
        "night": date_of(start),
        **{name: result.counts[name] for name in ("users", "targets", "unseen_share")},
        **mean,
        "items": len(night.data.item_ids),
        "training_events": len(night.data.training.rows.item),
        "epochs": fitted.epochs,
        "train_s": round(fitted.seconds, 3),
        "eval_s": round(outcome.eval_s, 3),
    }


def _in_words(told: dict[str, Any], number: int, most: int) -> str:
    score = f"NDCG@10 {told['ndcg@10']:.4f}" if "ndcg@10" in told else "no targets"
    return (
        f"night {told['night']} ({number}/{most}): {score} over {told['users']:,} users and "
        f"{told['targets']:,} targets; trained on {told['training_events']:,} events, "
        f"{told['items']:,} items, in {told['train_s']:.0f} s"
    )


def _with_fallback(
    fitted: Fitted, night: Prepared
) -> Callable[[Targets, Ints], torch.Tensor] | None:
    """Scores, by popularity for those whose history has no known item, as they are served; None: all
    have one."""
    if not (night.targets.begin == night.targets.end).any():
        return None
    model, popular_V = fitted.model, torch.from_numpy(night.popularity).double().log1p()

    def ask(part: Targets, _: Ints) -> torch.Tensor:
        scores = popular_V.repeat(len(part.user), 1)
        known = np.flatnonzero(part.end > part.begin)
        if len(known):
            some = part.select(known)
            own = model.score(some.rows, some.begin, some.end, some.request_ts, some.opens)
            scores[torch.from_numpy(known)] = own.double()
        return scores

    return ask


def _of_known(request: Request, last: Prepared, fitted: Fitted, how: Work) -> Result:
    """The last night's score on users with a known item alone: what a served model is asked again."""
    known = np.flatnonzero(last.targets.end > last.targets.begin)
    some = replace(last, targets=last.targets.select(known))
    return scored(fitted, some, request.sampled, how.team).result


# -- what is kept of nights that have ended -------------------------------------------------------


def _folder(keep: Checkpoints, start: int) -> Path:
    return keep.folder / f"night-{date_of(start)}"


def _steps(how: Work, start: int) -> Checkpoints | None:
    """The checkpoints of one night's training."""
    if how.keep is None:
        return None
    return Checkpoints(how.keep.folder / f"training-{date_of(start)}", how.keep.every_s)


def _ended(starts: list[int], how: Work) -> tuple[list[Judged], Stored | None]:
    """The nights that ended before, and the model of the last of them. Where one cannot be read, all
    are done again: a night's model may be made of that of the night before."""
    if how.keep is None:
        return [], None
    there = 0
    while there < len(starts) and _agreed(how.team, _folder(how.keep, starts[there]).is_dir()):
        there += 1
    if not there:
        return [], None
    folders = [_folder(how.keep, start) for start in starts[:there]]
    try:
        nights = [
            Judged(pool.kept(one), json.loads((one / "night.json").read_text(encoding="utf-8")))
            for one in folders
        ]
        return nights, load(folders[-1] / "trained")
    except (OSError, ValueError, KeyError, TypeError, BadZipFile, SafetensorError) as error:
        how.say(
            f"the saved results of {there} nights are damaged ({error}): these nights are repeated"
        )
    how.team.wait()
    if how.team.is_main_process:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    how.team.wait()
    return [], None


def _keep_night(how: Work, start: int, night: Judged, model: Stored) -> None:
    """The night in a folder of its own, complete or not at all; models of earlier nights go."""
    if how.keep is not None and how.team.is_main_process:
        place = _folder(how.keep, start)
        aside = how.keep.folder / f".night-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        pool.keep(night.result, aside)
        save(model, aside / "trained")
        (aside / "night.json").write_text(json.dumps(night.told), encoding="utf-8")
        aside.rename(place)
        for old in how.keep.folder.glob("night-*/trained"):
            if old.parent != place:
                shutil.rmtree(old, ignore_errors=True)
        steps = _steps(how, start)
        assert steps is not None
        steps.remove()
        how.keep.written = time.monotonic()
    how.team.wait()
