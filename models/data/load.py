"""All that a training reads, from the tables to the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from models.core.errors import UserError
from models.data.paper_a import PREPROCESS, paper_a
from models.data.sequences import Sequences, cache_folder, open_sequences, read_items
from models.data.splits import (
    LOOSEN,
    NOT_GOLD,
    NOTHING_HELD_OUT,
    PERIODS,
    SPLITS,
    Cut,
    Events,
    Filters,
    Training,
    periods,
    temporal_cut,
    training_rows,
)
from models.networks.side_information import Side


@dataclass(frozen=True)
class Data:
    """One source at one table version, cut: what every method of a comparison shares.

    selection: the same with training rows that end where validation begins, where `training` has
    the validation period, too; the epoch is chosen on it.
    """

    sequences: Sequences
    events: Events
    cut: Cut
    period: np.ndarray
    training: Training
    item_ids: list[str]  # of vocabulary 1..V
    side: Side | None = None  # what a catalogue says of them; for models that look at it
    selection: Data | None = None


def prepared(events: Events, preprocess: str) -> Events:
    """The events of gold.sequences, or what another way of preparing them leaves."""
    if preprocess not in PREPROCESS:
        raise UserError(f"unknown preprocessing {preprocess!r}: one of {', '.join(PREPROCESS)}")
    return paper_a(events) if preprocess == "paper_a" else events


def load_all(*, lake: str, source: str, filters: Filters, version: int | None = None) -> Data:
    """Everything in gold.sequences at a version (None: the newest) as training rows, for a model
    that nothing is held out from. Its vocabulary is every item of the events, whatever the filters
    leave of these."""
    events, names = _opened(lake, source, version)
    period = np.zeros(len(events.index), dtype=np.int8)
    cut = Cut(split=NOTHING_HELD_OUT)
    training = training_rows(events, period, filters, whole_vocabulary=True, remedy=LOOSEN)
    return Data(events.sequences, events, cut, period, training, names(training))


def _opened(
    lake: str, source: str, version: int | None
) -> tuple[Events, Callable[[Training], list[str]]]:
    """The events of gold.sequences, and who says the ids of a vocabulary."""
    from jobs.core.tables import ITEMS, SEQUENCES

    make = f"python -m jobs run --source {source}"
    path = SEQUENCES.path(lake, source)
    sequences = open_sequences(path, version, cache_folder(lake, source), make)
    events = Events.of(sequences)
    if not len(events.index):
        raise UserError(
            f"{path} version {sequences.version} holds no event: put a log where the source file "
            f"says and run `{make}`"
        )
    index, names = read_items(ITEMS.path(lake, source), make)
    by_index = dict(zip(index.tolist(), names, strict=True))

    def ids(training: Training) -> list[str]:
        missing = [i for i in training.vocabulary.tolist() if i not in by_index]
        if missing:
            raise UserError(
                f"{len(missing)} items of gold.sequences version {sequences.version} are not in "
                f"gold.items (item_index {missing[0]} is the first): run `{make}` again"
            )
        return [by_index[i] for i in training.vocabulary.tolist()]

    return events, ids


def load_data(
    *,
    lake: str,
    source: str,
    filters: Filters,
    version: int | None = None,
    split: str = "temporal",
    valid_from: int | None = None,
    test_from: int | None = None,
    preprocess: str = "gold",
    train_until: str = "validation",
) -> Data:
    """Read gold.sequences at a version (None: the newest), cut, filter, make the vocabulary."""
    every, ids = _opened(lake, source, version)
    sequences = every.sequences
    events = prepared(every, preprocess)
    if not len(events.index):
        raise UserError(
            f"--preprocess {preprocess} leaves none of the {len(every.index):,} events of "
            f"{sequences.path}. {NOT_GOLD}"
        )
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if split == "temporal":
        cut = temporal_cut(events.ts, valid_from, test_from)
    elif valid_from is not None or test_from is not None:
        raise UserError(f"--valid-from and --test-from pin the temporal split, not {split}")
    else:
        cut = Cut(split=split)
    cut = replace(cut, train_until=train_until)
    period = periods(events, cut)
    reproduced = preprocess != "gold"
    if reproduced:
        filters = Filters(min_item_events=1, min_session_events=1, min_user_sessions=1)

    def until(which: str, selection: Data | None = None) -> Data:
        training = training_rows(events, period, filters, reproduced, PERIODS[which])
        return Data(sequences, events, cut, period, training, ids(training), selection=selection)

    selection = until("validation")
    return selection if train_until == "validation" else until(train_until, selection)
