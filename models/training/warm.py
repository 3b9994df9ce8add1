"""Training that continues from weights that are there (`models/networks/warm_start.py`), on what has
happened since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np

from models.core.config import Config
from models.core.environment import Say
from models.core.process_group import ALONE, Team
from models.core.rows import NO_LABEL, Target
from models.data.load import Data
from models.networks.recommender import Recommender
from models.networks.saved_model import Stored
from models.networks.warm_start import carry_over
from models.training.checkpoints import Checkpoints
from models.training.fit import Fitted, fit_for

WARM_EPOCHS, WARM_RATE = 0.4, 1.0  # ours: shares of the recipe's epochs and rate; see LAB_LOG.md


def fit_warm(
    config: Config,
    data: Data,
    old: Stored,
    until: int,
    best: int,
    say: Say = print,
    device: str = "cpu",
    keep: Checkpoints | None = None,
    team: Team = ALONE,
) -> Fitted:
    """The weights of `old`, with the items that are new, trained on the events after `until`; where there
    are none, as they are.

    Args:
        until: the newest event that `old` was trained on, microseconds since 1970.
        best: the epochs of a training from scratch.
    """
    config, data, begin = _warmed(config, data, old, until, best)
    epochs = config.train.epochs if _follows_something(data, config) else 0
    return fit_for(config, data, epochs, say, device, keep, team, begin)


def _follows_something(data: Data, config: Config) -> bool:
    """Whether some label has a past: without any, there is nothing to teach."""
    rows = data.training.rows
    event = np.arange(len(rows.item))
    label = rows.own_label(event, cast(Target, config.train.target))
    first = np.repeat(rows.start[:-1], np.diff(rows.start))
    if config.train.target == "next_session":
        return bool(((label != NO_LABEL) & (rows.session > rows.session[first])).any())
    return bool(((label != NO_LABEL) & (event > first)).any())


def _warmed(
    config: Config, data: Data, old: Stored, until: int, best: int
) -> tuple[Config, Data, Callable[[Recommender], None]]:
    """What a warm training goes by: its settings, its rows, and what is done to the new model
    before its first step.

    Labels are the events after `until` alone: some of the older ones beside them made it dearer and
    no better.

    Args:
        until: the newest event that `old` was trained on, microseconds since 1970.
        best: the recipe's epochs.
    """
    train = config.train
    rate = train.learning_rate * WARM_RATE
    epochs = max(1, round(WARM_EPOCHS * best))
    train = replace(train, epochs=epochs, learning_rate=rate, habit_epochs=0)
    rows = data.training.rows
    some = replace(rows, labels=rows.ts > until)
    warm = replace(data, training=replace(data.training, rows=some))
    values = None if data.side is None else data.side.values

    def begin(model: Recommender) -> None:
        carry_over(model, old, data.item_ids, rows, values)

    return replace(config, train=train), warm, begin
