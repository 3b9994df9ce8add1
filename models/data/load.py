"""All that a training reads, from the tables to the cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from models.core.errors import UserError
from models.data.paper_a import PREPROCESS, paper_a
from models.data.sequences import Sequences, cache_folder, open_sequences, read_items
from models.data.splits import (
    NOT_GOLD,
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
    from jobs.core.tables import ITEMS, SEQUENCES

    make = f"python -m jobs run --source {source}"
    path = SEQUENCES.path(lake, source)
    sequences = open_sequences(path, version, cache_folder(lake, source), make)
    every = Events.of(sequences)
    if not len(every.index):
        raise UserError(
            f"{path} version {sequences.version} holds no event: put a log where the source file "
            f"says and run `{make}`"
        )
    events = prepared(every, preprocess)
    if not len(events.index):
        raise UserError(
            f"--preprocess {preprocess} leaves none of the {len(every.index):,} events of {path}. "
            f"{NOT_GOLD}"
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
    index, names = read_items(ITEMS.path(lake, source), make)
    by_index = dict(zip(index.tolist(), names, strict=True))

    def until(which: str, selection: Data | None = None) -> Data:
        training = training_rows(events, period, filters, reproduced, PERIODS[which])
        missing = [i for i in training.vocabulary.tolist() if i not in by_index]
        if missing:
            raise UserError(
                f"{len(missing)} items of gold.sequences version {sequences.version} are not in "
                f"gold.items (item_index {missing[0]} is the first): run `{make}` again"
            )
        item_ids = [by_index[i] for i in training.vocabulary.tolist()]
        return Data(sequences, events, cut, period, training, item_ids, selection=selection)

    selection = until("validation")
    return selection if train_until == "validation" else until(train_until, selection)
