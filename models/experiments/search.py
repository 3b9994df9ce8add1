"""The search of `tune`: what is varied, which settings come next, when a trial is not worth going on.

Optuna's TPE sampler and median pruner. What a study remembers are its finished trials, in an SQLite
file of Optuna's own; a trial that was killed leaves nothing there. Each trial's settings follow from
the finished trials, the seed and the trial's number, and its pruning from the finished trials, so a
study that is killed and run again finds what it would have found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from models.core.config import Config
from models.networks.methods import tunable

PRUNE_AFTER = 4  # ours: finished trials, the preset's own settings the first of them
NAME = "tune"
Space = dict[str, BaseDistribution]
FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
STATES = {
    TrialState.COMPLETE: FINISHED,
    TrialState.PRUNED: PRUNED,
    TrialState.FAIL: FAILED,
}


def space_of(config: Config, given: Mapping[str, Any]) -> Space:
    """The settings that a method reads and that nobody has set, with their ranges."""
    space: Space = {}
    for name, knob in tunable(config.method).items():
        if name in given or knob.tune is None:
            continue
        value = setting(config, name)
        low, high = knob.tune.range_of(value, isinstance(value, int))
        if isinstance(value, int):
            space[name] = IntDistribution(int(low), int(high), log=knob.tune.log)
        else:
            space[name] = FloatDistribution(low, high, log=knob.tune.log)
    return space


def setting(config: Config, name: str) -> Any:
    """The value of a setting, of the model or of its training."""
    return getattr(config.model if hasattr(config.model, name) else config.train, name)


def described(space: Space) -> dict[str, Any]:
    """The ranges as they are recorded."""
    return {
        name: {"low": one.low, "high": one.high, "log": one.log}
        for name, one in space.items()
        if isinstance(one, (IntDistribution, FloatDistribution))
    }


class Study:
    """The finished trials of one search, and what comes next.

    Args:
        file: the SQLite file; made if there is none.
        preset: the settings of the first trial: those that the preset has.
        epochs: of a whole training. warm_up: epochs in which the learning rate rises.
    """

    def __init__(
        self,
        file: Path,
        space: Space,
        preset: dict[str, Any],
        seed: int,
        epochs: int,
        warm_up: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.preset, self.seed, self.epochs = space, preset, seed, epochs
        # Before the learning rate falls, scores say little.
        self.pruner = optuna.pruners.MedianPruner(PRUNE_AFTER, n_warmup_steps=warm_up + 1)
        self.stored = optuna.create_study(
            storage=optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}"),
            study_name=NAME,
            direction="maximize",
            load_if_exists=True,
        )

    def ended(self) -> list[FrozenTrial]:
        """Finished, pruned and failed trials, in order."""
        return self.stored.get_trials(deepcopy=False)

    def next(self) -> Trial:
        """The next trial, with its settings."""
        number = len(self.ended())
        [seed] = np.random.SeedSequence([self.seed, number]).generate_state(1)
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=int(seed)),
            pruner=self.pruner,
        )
        study.add_trials(self.ended())
        if not number:
            study.enqueue_trial(self.preset)
        return Trial(self, study, study.ask(self.space))


class Trial:
    """One trial while it runs. It is stored when it has ended, at once and whole."""

    def __init__(self, owner: Study, study: optuna.Study, asked: optuna.Trial) -> None:
        self.owner, self.study, self.asked = owner, study, asked
        self.number, self.settings = asked.number, dict(asked.params)
        self.reported = 0

    def report(self, curve: Sequence[float]) -> None:
        """The validation scores of all epochs so far.

        Raises:
            optuna.TrialPruned: at an epoch that was not reported yet, and is not the last, the best
                of the trial so far is below the median of the finished ones.
        """
        for epoch in range(self.reported + 1, len(curve) + 1):
            self.asked.report(curve[epoch - 1], epoch)
            self.reported = epoch
            if epoch < self.owner.epochs and self.asked.should_prune():
                raise optuna.TrialPruned(
                    f"epoch {epoch}: validation NDCG@10 below the median of the finished trials"
                )

    def end(self, state: str, value: float | None, **facts: Any) -> None:
        """Store it. facts: what is kept with it, as JSON."""
        for name, fact in facts.items():
            self.asked.set_user_attr(name, fact)
        found = next(one for one, word in STATES.items() if word == state)
        self.study.tell(self.asked, value if state == FINISHED else None, state=found)
        self.owner.stored.add_trial(self.study.get_trials(deepcopy=False)[-1])


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial of the highest value, of equal ones the first; None: none finished."""
    finished = [one for one in trials if one.state == TrialState.COMPLETE]
    return max(finished, key=lambda one: (one.value, -one.number), default=None)
