"""`python -m models tune`: settings of one method that do well on the validation period.

A trial is a training as `train` would make it, without its score: the targets of the test period
are never made. Each is an MLflow run of kind `tune`; the best settings become a recipe
(`models/registry/recipes.py`). A tuning that is killed goes on when the same is asked for again:
ended trials count, and so does the time that was spent; the interrupted trial continues from its
checkpoint. What is asked for is the source, method, settings, seed, cut and table version; the
budget may grow.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import optuna
import torch
from optuna.trial import FrozenTrial

from jobs.core.errors import counted
from models.core import process_group
from models.core.config import Config
from models.core.environment import Say
from models.core.errors import UserError
from models.core.rows import Target
from models.data.sequences import cache_folder
from models.data.splits import VALIDATION, targets
from models.experiments.search import (
    FAILED,
    FINISHED,
    PRUNED,
    STATES,
    Study,
    Trial,
    best_of,
    described,
    setting,
    space_of,
)
from models.networks.methods import changed, count_parameters, tunable
from models.registry import recipes, tracking
from models.registry.recipes import Key
from models.training.checkpoints import Checkpoints
from models.training.fit import SELECT_BY, fit, warming
from models.training.run import Learnt, Request, flat, read, recorded

if TYPE_CHECKING:
    from mlflow import MlflowClient

NO_RECIPE = ("target", "seed", "data_share")  # what a recipe is for, and how it was looked for
CURVE = f"validation_{SELECT_BY}"


@dataclass(frozen=True)
class Budget:
    """How long is searched: trials at most, and minutes at most (None: no bound)."""

    trials: int
    minutes: float | None = None

    def check(self) -> None:
        """Raises:
        UserError: a bound out of its range.
        """
        if self.trials < 1:
            raise UserError(f"--trials {self.trials}: use 1 or more")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UserError(f"--minutes {self.minutes:g}: use a number above 0")

    @property
    def seconds(self) -> float:
        return math.inf if self.minutes is None else 60 * self.minutes

    def covers(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those that it is enough for: a study may have gone on under a larger one."""
        counted, spent = [], 0.0
        for one in trials[: self.trials]:
            if spent >= self.seconds:
                break
            counted.append(one)
            spent += one.user_attrs["seconds"]
        return counted


class OutOfTime(Exception):
    """The minutes ended within a trial."""


@dataclass(frozen=True)
class Search:
    """A tuning at work. keep: its folder, with a note on the trial that runs."""

    request: Request
    key: Key
    learnt: Learnt
    study: Study
    keep: Checkpoints
    budget: Budget
    device: str
    say: Say

    @property
    def name(self) -> str:
        return self.keep.folder.name

    def spent(self) -> float:
        """Seconds of the trials that ended, and of one that was interrupted."""
        ended = self.study.ended()
        lost = self.keep.noted()
        here = lost["seconds"] if lost.get("trial") == len(ended) else 0.0
        return float(sum(one.user_attrs["seconds"] for one in ended) + here)


def tune(
    request: Request, key: Key, given: Mapping[str, Any], budget: Budget, say: Say = print
) -> dict[str, Any]:
    """Look for settings within the budget, and record the best as a recipe.

    Args:
        given: settings that a person chose. They stay, and are part of the recipe.

    Raises:
        UserError: there is nothing to tune or nothing to choose by, or no trial finished.
    """
    request.check()
    budget.check()
    space = space_of(request.config, given)
    if not space:
        raise UserError(_nothing(key.method, given))
    team, device = process_group.start(request.device)
    if team.size > 1:
        process_group.stop()
        raise UserError("tune runs in one process: start it without torchrun")
    # A trial ends where a training chooses its epoch; what a training does after that chooses nothing.
    learnt = read(replace(request, train_until="validation"), say)
    _check_validation(learnt)
    train = learnt.config.train
    preset = {name: setting(learnt.config, name) for name in space}
    folder = _folder(request, learnt, described(space))
    keep = Checkpoints(folder, request.checkpoint_s)
    with keep.alone() as mine:
        if not mine:
            raise UserError(
                f"the same tuning is running ({folder}): wait until it has ended, or stop it"
            )
        warm_up = warming(train.schedule, train.epochs)
        study = Study(folder / "study.db", space, preset, train.seed, train.epochs, warm_up)
        search = Search(request, key, learnt, study, keep, budget, device, say)
        _trials(search)
        return _recipe(search, given)


def _nothing(method: str, given: Mapping[str, Any]) -> str:
    if not tunable(method):
        return f"--method {method}: it has no setting that is tuned. Train it without `tune`"
    names = ", ".join(name for name in tunable(method) if name in given)
    return f"--method {method}: all settings that are tuned are given ({names}): leave some out"


def _check_validation(learnt: Learnt) -> None:
    data, target = learnt.data, learnt.config.train.target
    asked = targets(
        data.events, data.period, VALIDATION, data.training.vocabulary, cast(Target, target)
    )
    if not len(asked.user):
        raise UserError(
            f"the validation period of {data.sequences.path} has no target "
            f"({target.replace('_', ' ')}) of a user with a history: nothing says which settings "
            "are best. Load more days, or, under --split temporal, move the cut with --valid-from "
            "and --test-from"
        )


def _folder(request: Request, learnt: Learnt, space: dict[str, Any]) -> Path:
    """Named after all that a study's outcome follows from, but for its budget."""
    key = [learnt.config.as_dict(), learnt.facts, space]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder(request.lake, request.source.name) / "tuning" / name


def _trials(search: Search) -> None:
    """All that the budget has left."""
    study, budget, say = search.study, search.budget, search.say
    client, experiment = tracking.connect(search.request.source.name)
    _settle(client, search)
    if there := len(study.ended()):
        say(f"going on: {counted(there, 'trial')} ended before, {search.spent():.0f} s were spent")
    while len(study.ended()) < budget.trials and search.spent() < budget.seconds:
        try:
            _one(client, experiment, search)
        except OutOfTime:
            run_id = search.keep.noted()["mlflow_run_id"]
            client.set_tag(run_id, "state", "stopped: out of time")
            say(f"{budget.minutes:g} minutes are over: the trial that ran does not count")
            return


def _settle(client: MlflowClient, search: Search) -> None:
    """A process that died between storing a trial and ending its MLflow run left it running."""
    noted, ended = search.keep.noted(), search.study.ended()
    if noted.get("trial", len(ended)) >= len(ended):
        return
    run_id = str(noted["mlflow_run_id"])
    if "state" not in client.get_run(run_id).data.tags:
        _say_state(client, run_id, ended[noted["trial"]])


def _say_state(client: MlflowClient, run_id: str, trial: FrozenTrial) -> None:
    """Tell MLflow how a stored trial ended."""
    state = STATES[trial.state]
    client.set_tag(run_id, "state", state)
    if reason := trial.user_attrs["reason"]:
        client.set_tag(run_id, "reason", reason[:5000])
    client.set_terminated(run_id, "FAILED" if state == FAILED else "FINISHED")


def _one(client: MlflowClient, experiment: str, search: Search) -> None:
    """One trial, in a run of its own; an interrupted one goes on in its run."""
    trial, keep, learnt = search.study.next(), search.keep, search.learnt
    config = changed(learnt.config, trial.settings)
    noted, sequences = keep.noted(), learnt.data.sequences
    earlier = noted if noted.get("trial") == trial.number else {}
    tags = {
        tracking.KIND: "tune",
        "method": search.key.method,
        "seed": str(config.train.seed),
        "study": search.name,
        "trial": str(trial.number),
        "table_version": str(sequences.version),
    }
    title = f"tune {search.key.method}, trial {trial.number}"
    with recorded(client, experiment, title, tags, earlier.get("mlflow_run_id")) as run_id:
        clock = Clock(search, trial.number, run_id, earlier.get("seconds", 0.0))
        params = flat({**config.as_dict(), "data": learnt.facts})
        tracking.log_values(client, run_id, params=params)
        tracking.log_table(client, run_id, sequences.path, sequences.version, sequences.table_id)
        counted = count_parameters(len(learnt.data.item_ids), config)["num_params"]
        state, value, reason = _learn(search, trial, config, clock, client)
        seconds = clock.note()
        metrics = {"num_params": float(counted), "seconds": seconds}
        if value is not None:
            metrics["validation_ndcg@10_best"] = value
        tracking.log_values(client, run_id, metrics=metrics)
        facts = {"seconds": seconds, "num_params": counted, "mlflow_run_id": run_id}
        trial.end(state, value, reason=reason, **facts)
    ended = search.study.ended()[-1]
    _say_state(client, run_id, ended)
    Checkpoints(_trial_folder(search, trial)).remove()
    search.say(_in_a_line(ended))


def _trial_folder(search: Search, trial: Trial) -> Path:
    return search.keep.folder / f"trial-{trial.number:04d}"


class Clock:
    """The time that a trial takes, noted beside the study: a process that is killed has spent it.

    Args:
        earlier: seconds that the trial took before it was interrupted.
    """

    def __init__(self, search: Search, number: int, run_id: str, earlier: float) -> None:
        self.keep, self.number, self.run_id, self.earlier = search.keep, number, run_id, earlier
        self.before = search.spent() - earlier  # of the trials that ended
        self.began = time.monotonic()
        self.note()

    def note(self) -> float:
        """Seconds of this trial until now."""
        seconds = self.earlier + time.monotonic() - self.began
        self.keep.note(trial=self.number, seconds=seconds, mlflow_run_id=self.run_id)
        return seconds


def _learn(
    search: Search, trial: Trial, config: Config, clock: Clock, client: MlflowClient
) -> tuple[str, float | None, str]:
    """How a trial ends: its state, the value of a finished one, the reason of another.

    Raises:
        OutOfTime: at the end of an epoch that is not the last.
    """
    curves = tracking.Curves(client, clock.run_id, search.say)

    def each_epoch(epoch: int, told: dict[str, list[float]]) -> None:
        seconds = clock.note()
        curves.log(epoch, told)
        trial.report(told[CURVE])
        if clock.before + seconds >= search.budget.seconds and epoch < config.train.epochs:
            raise OutOfTime

    checkpoints = Checkpoints(_trial_folder(search, trial), search.keep.every_s)
    try:
        fitted = fit(
            config,
            search.learnt.data,
            search.say,
            search.device,
            checkpoints,
            each_epoch=each_epoch,
        )
        trial.report(fitted.curves.get(CURVE, []))  # of one that was killed after its last epoch
    except optuna.TrialPruned as pruned:
        return PRUNED, None, str(pruned)
    except (UserError, MemoryError, torch.OutOfMemoryError) as error:
        return FAILED, None, str(error)
    curves.finish(fitted.curves)
    return FINISHED, fitted.validation, ""


def _in_a_line(trial: FrozenTrial) -> str:
    state, facts = STATES[trial.state], trial.user_attrs
    how = f"validation {SELECT_BY} {trial.value:.4f}" if state == FINISHED else facts["reason"]
    return f"trial {trial.number} {state}, {facts['seconds']:.1f} s: {how}; {_words(trial.params)}"


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in settings.items())


def _recipe(search: Search, given: Mapping[str, Any]) -> dict[str, Any]:
    """The best of the trials that the budget covers, recorded.

    Raises:
        UserError: none finished.
    """
    key, learnt, budget = search.key, search.learnt, search.budget
    trials = budget.covers(search.study.ended())
    best = best_of(trials)
    if best is None:
        why = trials[-1].user_attrs["reason"] if trials else "the first one took too long"
        raise UserError(
            f"no trial of {key.method} finished, of {len(trials)} that ended: {why}. Give more "
            "--minutes or --trials; the same command continues"
        )
    states = [STATES[one.state] for one in trials]
    first = trials[0]
    values = {
        "source": search.request.source.name,
        **asdict(key),
        "given": {k: v for k, v in given.items() if k not in NO_RECIPE},
        "settings": dict(best.params),
        "trial": best.number,
        f"validation_{SELECT_BY}": best.value,
        f"preset_validation_{SELECT_BY}": first.value if states[0] == FINISHED else None,
        "num_params": best.user_attrs["num_params"],
        "preset_num_params": first.user_attrs["num_params"],
        "budget": {
            "trials": budget.trials,
            "minutes": budget.minutes,
            "tried": len(trials),
            "finished": states.count(FINISHED),
            "pruned": states.count(PRUNED),
            "failed": states.count(FAILED),
            "seconds": round(sum(one.user_attrs["seconds"] for one in trials), 1),
        },
        "space": described(search.study.space),
        "seed": learnt.config.train.seed,
        "data_share": learnt.config.train.data_share,
        "cut": learnt.facts["cut"],
        "table_id": learnt.facts["table_id"],
        "table_version": learnt.facts["table_version"],
        "study": search.name,
    }
    client, experiment = tracking.connect(search.request.source.name)
    run_id = recipes.record(client, experiment, key, values)
    return {**values, "trials": [_told(one) for one in trials], "mlflow_run_id": run_id}


def _told(trial: FrozenTrial) -> dict[str, Any]:
    facts = trial.user_attrs
    return {
        "trial": trial.number,
        "state": STATES[trial.state],
        "settings": dict(trial.params),
        CURVE: trial.value,
        "epochs": len(trial.intermediate_values),
        **{name: facts[name] for name in ("seconds", "num_params", "reason", "mlflow_run_id")},
    }


def in_words(done: dict[str, Any]) -> str:
    """What a tuning found, in a paragraph."""
    budget, name = done["budget"], f"validation_{SELECT_BY}"
    before = done[f"preset_{name}"]
    own = "failed" if before is None else f"{before:.4f}"
    key = Key(**{one.name: done[one.name] for one in fields(Key)})
    return (
        f"{done['method']} on {done['source']}: {recipes.budget_in_words(budget)}; "
        f"{budget['finished']} finished, {budget['pruned']} pruned, {budget['failed']} failed, in "
        f"{budget['seconds']:.0f} s. Best: trial {done['trial']}, validation NDCG@10 "
        f"{done[name]:.4f} (the preset's own settings: {own}) with {_words(done['settings'])}; "
        f"{done['num_params']:,} parameters (the preset's: {done['preset_num_params']:,}). Recorded "
        f"as run {done['mlflow_run_id']}: train with `python -m models train --source "
        f"{done['source']} {key.options()} --tuned --comparison ID`, where ID is "
        "a name that you choose, or that of the comparison it joins"
    )
