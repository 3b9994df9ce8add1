"""The nights of a log: which are evaluated, what each knows, how old the items of its targets are.

A night is a UTC day. Days with less than a hundredth of the positive events of the busiest day are
left out: many logs have stragglers with wrong times, or end minutes after midnight, and such a day
asks nothing. What happened on it is learnt all the same. With D nights in the log:
 * the last N are evaluated: as many as are wanted, at most D - 2. By default 10, or half of the
   log where that is fewer, because a night that few nights lie before says little;
 * epochs, and all else that is chosen, are chosen on the nights before the first of them: as many
   as are evaluated, at most a quarter of the nights that are there, at least one;
 * where no split is named, `nightly` is taken from five nights on: two to evaluate, two to learn
   from, and one to choose on.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models.core.errors import UserError
from models.core.rows import POSITIVE, Bools, Ints
from models.data.sequences import Sequences
from models.data.splits import Cut, Events, Targets, stamp

DAY_US = 86_400_000_000
NIGHTS, FEWEST = 10, 5  # ours: that are evaluated; from how many on a log is cut into nights
QUIET = 0.01  # ours: of the busiest day's positive events; fewer are no night
BORN = ("born_that_night", "born_in_7_days", "older")
AGES = dict(
    zip(BORN, ("first seen that night", "first seen in the week before", "older"), strict=True)
)
"""Ages of items as a person reads them."""
"""By when the item of a target was first seen: in the night itself, in the 7 days before it, earlier."""


def nights_of(sequences: Sequences) -> Ints:
    """int64[D]: where the nights of the log begin, in us, rising."""
    day = sequences.ts[sequences.feedback == POSITIVE] // DAY_US
    if not len(day):
        return np.zeros(0, dtype=np.int64)
    first = int(day.min())
    count = np.bincount(day - first)
    found: Ints = (np.flatnonzero(count >= max(1, QUIET * count.max())) + first) * DAY_US
    return found


def by_default(sequences: Sequences) -> str:
    """The split of a log for which nobody names one."""
    return "nightly" if len(nights_of(sequences)) >= FEWEST else "temporal"


def nightly_cut(sequences: Sequences, wanted: int | None = None) -> Cut:
    """The cut of the whole: where the validation nights and the test nights begin, and end.

    Raises:
        UserError: the log has too few nights, or `wanted` is none.
    """
    if wanted is not None and wanted < 1:
        raise UserError(f"--nights {wanted}: use 1 or more")
    nights = nights_of(sequences)
    there = len(nights)
    if there < FEWEST:
        raise UserError(
            f"--split nightly needs {FEWEST} nights (UTC days with positive events), and the log has "
            f"{there}: load more days, or take --split temporal"
        )
    asked = min(NIGHTS, (there - 1) // 2) if wanted is None else min(wanted, there - 2)
    before = there - asked
    chosen_on = max(1, min(asked, before // 4))
    return Cut(
        split="nightly",
        valid_from=int(nights[before - chosen_on]),
        test_from=int(nights[before]),
        test_until=int(nights[-1]) + DAY_US,
        nights=asked,
    )


def nights_asked(sequences: Sequences, cut: Cut) -> list[int]:
    """Where the test nights of a cut begin."""
    assert cut.test_from is not None and cut.test_until is not None
    nights = nights_of(sequences)
    return [int(n) for n in nights[(nights >= cut.test_from) & (nights < cut.test_until)]]


def night_cut(start: int) -> Cut:
    """One night alone: all before it is training, all after it is in no period."""
    return Cut(
        split="nightly", valid_from=start, test_from=start, test_until=start + DAY_US, nights=1
    )


def last_night(cut: Cut) -> Cut:
    """The night whose model is kept and registered."""
    assert cut.test_until is not None
    return replace(night_cut(cut.test_until - DAY_US), train_until=cut.train_until)


def date_of(start: int) -> str:
    return stamp(start)[:10]


def first_seen(events: Events) -> Ints:
    """int64[most item_index + 1]: the time of each item's first event, whatever its feedback."""
    first = np.full(int(events.item.max(initial=0)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, events.item, events.ts)
    return first


def by_age(asked: Targets, first: Ints, start: int) -> dict[str, Bools]:
    """bool[M] of each age in `BORN`: which items of the targets of the night at `start` have it."""
    assert asked.gold is not None
    seen = first[asked.gold]
    new, week = seen >= start, seen >= start - 7 * DAY_US
    return dict(zip(BORN, (new, week & ~new, ~week), strict=True))
