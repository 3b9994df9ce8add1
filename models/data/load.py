"""All that a training reads, from the tables to the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from models.core.errors import UserError
from models.core.rows import Ints
from models.data.catalogue import listed_items
from models.data.nights import by_default, nightly_cut
from models.data.paper_a import PREPROCESS, gap_us, paper_a, recut, same_events
from models.data.sequences import Sequences, cache_folder, open_sequences, read_items
from models.data.splits import (
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
    the validation period, too; the epoch is chosen on it. at: the same log at another cut.
    """

    sequences: Sequences
    events: Events
    cut: Cut
    period: np.ndarray
    training: Training
    item_ids: list[str]  # of vocabulary 1..V
    side: Side | None = None  # what a catalogue says of them; for models that look at it
    selection: Data | None = None
    at: Callable[[Cut], Data] | None = None


def prepared(events: Events, preprocess: str) -> Events:
    """The events of gold.sequences, or what another way of preparing them leaves."""
    gap = gap_us(preprocess)
    if gap is not None and preprocess != "paper_a":
        return recut(events, gap)
    if preprocess not in PREPROCESS:
        raise UserError(f"unknown preprocessing {preprocess!r}: one of {', '.join(PREPROCESS)}")
    return paper_a(events) if preprocess == "paper_a" else events


def load_all(
    *, lake: str, source: str, filters: Filters, version: int | None = None, listed: bool = False
) -> Data:
    """Everything in gold.sequences at a version (None: the newest) as training rows, for a model
    that nothing is held out from. Its vocabulary is every item of the events, whatever the filters
    leave of these; `listed`: and every item of the catalogue."""
    events = _events(lake, source, version, "gold")
    names = _Names(lake, source, events.sequences)
    period = np.zeros(len(events.index), dtype=np.int8)
    cut = Cut(split=NOTHING_HELD_OUT)
    training = training_rows(
        events, period, filters, seen_vocabulary=True, listed=names.listed if listed else None
    )
    ids = names.ids
    return Data(events.sequences, events, cut, period, training, ids(training))


def load_data(
    *,
    lake: str,
    source: str,
    filters: Filters,
    version: int | None = None,
    split: str | None = "temporal",
    valid_from: int | None = None,
    test_from: int | None = None,
    preprocess: str = "gold",
    train_until: str = "validation",
    nights: int | None = None,
    listed: bool = False,
) -> Data:
    """Read gold.sequences at a version (None: the newest), cut, filter, make the vocabulary.

    split None: as the log has nights. `nightly` has the rows that all is chosen by, and `at` gives
    those of each night. listed: under `nightly`, the vocabulary has the items that the catalogue had
    before a night, too, for a model that can score them by what it says of them.
    """
    events = _events(lake, source, version, preprocess)
    sequences = events.sequences
    cut = _cut(events, split or by_default(events.sequences), valid_from, test_from, nights)
    if cut.split != "nightly":
        cut = replace(cut, train_until=train_until)
    reproduced = same_events(preprocess) != "gold"
    if reproduced:
        filters = Filters(min_item_events=1, min_session_events=1, min_user_sessions=1)
    names = _Names(lake, source, sequences)

    def until(cut: Cut, which: str = "validation", selection: Data | None = None) -> Data:
        period, seen = periods(events, cut), cut.split == "nightly"
        whole = reproduced and not seen
        more = names.listed if seen and listed else None
        training = training_rows(events, period, filters, whole, PERIODS[which], seen, more)
        item_ids = names.ids(training)
        return Data(
            sequences, events, cut, period, training, item_ids, selection=selection, at=until
        )

    selection = until(cut)
    if cut.train_until == "validation":
        return selection
    return until(cut, cut.train_until, selection)


class _Names:
    """Item ids and their numbers in gold.items."""

    def __init__(self, lake: str, source: str, sequences: Sequences) -> None:
        from jobs.core.tables import ITEM_ATTRIBUTES, ITEMS

        self.make = f"python -m jobs run --source {source}"
        self.version = sequences.version
        self.catalogue = ITEM_ATTRIBUTES.path(lake, source)
        index, names = read_items(ITEMS.path(lake, source), self.make)
        self.by_index = dict(zip(index.tolist(), names, strict=True))

    def ids(self, training: Training) -> list[str]:
        """Of a vocabulary."""
        missing = [i for i in training.vocabulary.tolist() if i not in self.by_index]
        if missing:
            raise UserError(
                f"{len(missing)} items of gold.sequences version {self.version} are not in "
                f"gold.items (item_index {missing[0]} is the first): run `{self.make}` again"
            )
        return [self.by_index[i] for i in training.vocabulary.tolist()]

    def listed(self, until_us: int) -> Ints:
        """int64[N]: item_index of what the catalogue had by then."""
        there = listed_items(self.catalogue, until_us, self.make)
        return np.array([i for i, item in self.by_index.items() if item in there], dtype=np.int64)


def split_by_default(lake: str, source: str, version: int | None = None) -> str:
    """The split that a log's nights decide, where nobody names one."""
    return by_default(_sequences(lake, source, version))


def nights_to_ask(
    lake: str, source: str, version: int | None, wanted: int | None
) -> tuple[int, int]:
    """The version of gold.sequences that is read, and how many of its nights can be evaluated.

    Raises:
        UserError: it has too few.
    """
    sequences = _sequences(lake, source, version)
    nights = nightly_cut(sequences, wanted).nights
    assert nights is not None
    return sequences.version, nights


def _sequences(lake: str, source: str, version: int | None) -> Sequences:
    from jobs.core.tables import SEQUENCES

    make = f"python -m jobs run --source {source}"
    path = SEQUENCES.path(lake, source)
    return open_sequences(path, version, cache_folder(lake, source), make)


def _events(lake: str, source: str, version: int | None, preprocess: str) -> Events:
    """Raises:
    UserError: there are none.
    """
    sequences = _sequences(lake, source, version)
    every, path = Events.of(sequences), sequences.path
    if not len(every.index):
        raise UserError(
            f"{path} version {sequences.version} has no event: put a log where the source file "
            f"says and run `python -m jobs run --source {source}`"
        )
    events = prepared(every, preprocess)
    if not len(events.index):
        raise UserError(
            f"--preprocess {preprocess} leaves none of the {len(every.index):,} events of {path}. "
            f"{NOT_GOLD}"
        )
    return events


def _cut(
    events: Events, split: str, valid_from: int | None, test_from: int | None, nights: int | None
) -> Cut:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if nights is not None and split != "nightly":
        raise UserError(
            f"--nights {nights} is for --split nightly, and the split is {split}: leave it out"
        )
    if split == "temporal":
        return temporal_cut(events.ts, valid_from, test_from)
    if valid_from is not None or test_from is not None:
        raise UserError(
            f"--valid-from and --test-from are for --split temporal, and the split is {split}: leave "
            "them out"
        )
    return nightly_cut(events.sequences, nights) if split == "nightly" else Cut(split=split)
