"""What a model may learn from, and what it is asked: cuts, filters, vocabulary, targets.

Everything on this page depends on nothing after the cut but the targets themselves. Each event has
a period: 0 training, 1 validation, 2 test.

Decisions at the edges:
 * `temporal`: with n events in gold before filters, the cut of quantile q is the `event_ts` at rank
   floor(q(n-1)); a period starts at `event_ts >= cut`; validation at .8, test at .9, or pinned.
 * `last_session`, `last_item`: a user's last session (event) is test, the one before validation.
 * `nightly`: the last UTC days of the log are test periods of their own (`models/data/nights.py`).
   For each, a model knows all that lies before it. Its vocabulary is every item seen until then.
 * Filters are applied once each in the order items, sessions, users, to training events only, and
   ordinals are renumbered after. Histories that a model is evaluated on are never filtered.
 * A session begun before a period is history, never a `next_session` target of it; a validation
   set ends where the test period begins. A session that begins in a night is a target as a whole.
 * Users without a known item before the period are left out and counted; items that no training
   row has stay in the target sets, as misses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from models.core.errors import UserError
from models.core.rows import POSITIVE, Bools, Ints, Rows, Target, chosen, ragged, run_starts
from models.data.sequences import Sequences

SPLITS = ("temporal", "last_session", "last_item", "nightly")
NOTHING_HELD_OUT = "none"  # the split of a model that was trained on everything
VALIDATION, TEST, LATER = 1, 2, 3
PERIODS = {"validation": VALIDATION, "test": TEST}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where periods begin, as it is stored with a model. Times in us UTC, None for user rules.

    train_until: the period before which a model's training rows and vocabulary end. `test`: what was
    chosen on the validation period is trained once more with it. Of `nightly`: `nights` test nights
    from `test_from` to `test_until` (exclusive). What lies after that is in no period.
    """

    split: str
    valid_from: int | None = None
    test_from: int | None = None
    train_until: str = "validation"
    test_until: int | None = None
    nights: int | None = None


@dataclass(frozen=True, kw_only=True)
class Filters:
    """`[filters]` of the source file, which has the defaults."""

    min_item_events: int
    min_session_events: int
    min_user_sessions: int


@dataclass(frozen=True)
class Training:
    """Training rows, their vocabulary, and what each filter left."""

    rows: Rows
    user: Ints  # int64[U]: place in Sequences
    vocabulary: Ints  # int64[V]: gold's item_index of items 1..V
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Targets:
    """N requests: what follows history `rows[begin[n]:end[n]]` of user `user[n]`?

    item_start int64[N+1], item int64[M]: the distinct items of each target in the order in which
    they came, 0 = not in the vocabulary. `request_ts` is the time of the target's first event,
    `new_session` says that it opens one, `opens` that the history holds no event of its session: the
    target is the first, or those before it are of unknown items. `left_out` counts users without history and their targets. `sets`: each target is a
    whole session. `at` int64[N]: the place of the target's first event in `Events`. `gold` int64[M]:
    gold's item_index of `item`, of those that are not in the vocabulary, too.
    """

    rows: Rows
    user: Ints
    begin: Ints
    end: Ints
    request_ts: Ints
    new_session: Bools
    opens: Bools
    item_start: Ints
    item: Ints
    left_out: dict[str, int]
    sets: bool = False
    at: Ints | None = None
    gold: Ints | None = None

    def select(self, index: Ints) -> Targets:
        length = (self.item_start[1:] - self.item_start[:-1])[index]
        items, _ = ragged(self.item_start[:-1][index], length)
        return Targets(
            self.rows, self.user[index], self.begin[index], self.end[index],
            self.request_ts[index], self.new_session[index], self.opens[index],
            np.concatenate([[0], np.cumsum(length)]), self.item[items], self.left_out, self.sets,
            None if self.at is None else self.at[index],
            None if self.gold is None else self.gold[items],
        )  # fmt: skip


@dataclass(frozen=True)
class Events:
    """Sequences with users one after another: index of each event, its user and session.

    counted: the sessions that filters count, where they are others; None: the same.
    """

    sequences: Sequences
    index: Ints
    user: Ints
    start: Ints  # int64[U+1]
    opens: Bools
    session: Ints  # running number over all users
    counted: Ints | None = None

    @staticmethod
    def of(sequences: Sequences) -> Events:
        index, user = ragged(sequences.start, sequences.length)
        start = np.concatenate([[0], np.cumsum(sequences.length)])
        ordinal = sequences.session[index]
        opens = run_starts(ordinal, user)
        return Events(sequences, index, user, start, opens, np.cumsum(opens) - 1)

    @property
    def ts(self) -> Ints:
        return self.sequences.ts[self.index]

    @property
    def item(self) -> Ints:
        return self.sequences.item[self.index]

    @property
    def positive(self) -> Bools:
        positive: Bools = self.sequences.feedback[self.index] == POSITIVE
        return positive


def temporal_cut(ts: Ints, valid_from: int | None = None, test_from: int | None = None) -> Cut:
    """Cuts at the events of rank floor(q(n-1)), q = .8 and .9, or as pinned."""

    def at(quantile: str) -> int:
        if not len(ts):
            raise UserError(
                "gold.sequences has no positive event, so training and test cannot be separated: load a "
                "log that has some, or correct [feedback] in the source file"
            )
        rank = int(Fraction(quantile) * (len(ts) - 1))
        return int(np.partition(ts, rank)[rank])

    cut = Cut(
        split="temporal",
        valid_from=at("0.8") if valid_from is None else valid_from,
        test_from=at("0.9") if test_from is None else test_from,
    )
    assert cut.valid_from is not None and cut.test_from is not None
    if cut.valid_from > cut.test_from:
        raise UserError(
            f"validation begins at {stamp(cut.valid_from)}, after the test at "
            f"{stamp(cut.test_from)}: give --valid-from and --test-from in this order"
        )
    return cut


def stamp(us: int) -> str:
    """ISO 8601 of microseconds since 1970."""
    return str(np.datetime64(us, "us")) + "Z"


def periods(events: Events, cut: Cut) -> Ints:
    """int8[E]: 0 training, 1 validation, 2 test, 3 later than that."""
    if cut.split in ("temporal", "nightly"):
        assert cut.valid_from is not None and cut.test_from is not None
        validation, test = events.ts >= cut.valid_from, events.ts >= cut.test_from
        period = np.asarray(validation.astype(np.int8) + test)
        return period if cut.test_until is None else period + (events.ts >= cut.test_until)
    if cut.split == "last_item":
        from_end = events.start[events.user + 1] - 1 - np.arange(len(events.user))
    else:
        newest = np.zeros(len(events.start), dtype=np.int64)
        newest[events.user] = events.session  # the last assignment of a user stays
        from_end = newest[events.user] - events.session
    return np.asarray(np.maximum(0, 2 - from_end), dtype=np.int8)


def training_rows(
    events: Events,
    period: Ints,
    filters: Filters,
    whole_vocabulary: bool = False,
    until: int = VALIDATION,
    seen_vocabulary: bool = False,
    listed: Callable[[int], Ints] | None = None,
) -> Training:
    """Filter the training events, make the vocabulary, refuse when there is nothing to learn.

    Training events are those of the periods before `until`.
    `whole_vocabulary` takes the items of all periods, as paper A's code does (its counts of
    parameters need that; rows of unseen items stay as they were drawn). `seen_vocabulary` takes every
    item of the training events, also those that the filters leave no row of. `listed` says gold's
    item_index of what a catalogue had by the time of the newest training row: these are taken, too.
    """
    at = np.flatnonzero(period < until)
    counted = events.session if events.counted is None else events.counted
    item, session, user = events.item[at], counted[at], events.user[at]
    seen = item
    counts: dict[str, dict[str, int]] = {}

    def note(step: str) -> None:
        counts[step] = {
            "events": len(item),
            "items": len(np.unique(item)),
            "sessions": len(np.unique(session)),
            "users": len(np.unique(user)),
        }

    note("before the cut")
    keep = np.bincount(item, minlength=1)[item] >= filters.min_item_events
    at, item, session, user = at[keep], item[keep], session[keep], user[keep]
    note(f"items with {filters.min_item_events} events or more")
    keep = np.bincount(session, minlength=1)[session] >= filters.min_session_events
    at, item, session, user = at[keep], item[keep], session[keep], user[keep]
    note(f"sessions with {filters.min_session_events} events or more")
    sessions = np.bincount(user[run_starts(session)], minlength=1)
    keep = sessions[user] >= filters.min_user_sessions
    at, item, session, user = at[keep], item[keep], session[keep], user[keep]
    note(f"users with {filters.min_user_sessions} sessions or more")

    taken = events.item if whole_vocabulary else seen if seen_vocabulary else item
    if listed is not None and len(at):
        taken = np.concatenate([taken, listed(int(events.ts[at].max()))])
    vocabulary = np.unique(taken).astype(np.int64)
    users, start = np.unique(user, return_index=True)
    start = np.append(start, len(user))
    _refuse_if_hopeless(counts, vocabulary, users, start, NOT_GOLD if whole_vocabulary else LOOSEN)
    rows = Rows(
        item=(np.searchsorted(vocabulary, item) + 1).astype(np.int32),
        ts=events.ts[at],
        ordinal=_dense(events.session[at], user),
        positive=events.positive[at],
        start=start.astype(np.int64),
        **_evidence(events, at, vocabulary_index(events, vocabulary)),
    )
    return Training(rows, users, vocabulary, counts)


def users_share(training: Training, user_id: list[str], share: float) -> Training:
    """Of the training rows those of a share of the users; the vocabulary stays.

    Who stays follows from the id alone, and whoever is in a share is in every larger one.
    """
    hashes = [hashlib.sha256(user_id[u].encode()).digest()[:8] for u in training.user]
    stays = np.array([int.from_bytes(one, "big") / 2**64 < share for one in hashes], dtype=bool)
    rows, length = training.rows, np.diff(training.rows.start)
    event, _ = ragged(rows.start[:-1][stays], length[stays])
    kept: dict[str, Any] = {
        n: getattr(rows, n)[event] for n in ("item", "ts", "ordinal", "positive")
    }
    if rows.feedback is not None:
        kept["feedback"] = rows.feedback[event]
    if rows.shown_start is not None and rows.shown is not None:
        kept["shown_start"], kept["shown"] = chosen((rows.shown_start, rows.shown), event)
    start = np.concatenate([[0], np.cumsum(length[stays])])
    user = training.user[stays]
    counts = training.counts | {
        f"a share of {share:g} of the users": {
            "events": len(event),
            "items": len(np.unique(kept["item"])),
            "sessions": int(Rows(**kept, start=start).opens.sum()),
            "users": len(user),
        }
    }
    _refuse_if_hopeless(counts, training.vocabulary, user, start)
    return replace(training, rows=Rows(**kept, start=start), user=user, counts=counts)


def vocabulary_index(events: Events, vocabulary: Ints) -> Ints:
    """int32[...]: gold's item_index -> 1..V, 0 for what is not in the vocabulary."""
    gold = events.sequences
    most = max(int(part.max(initial=0)) for part in (gold.item, gold.exposed, vocabulary))
    index = np.zeros(most + 1, dtype=np.int32)
    index[vocabulary] = np.arange(1, len(vocabulary) + 1)
    return index


def _evidence(events: Events, at: Ints, index: Ints) -> dict[str, Any]:
    """Feedback of the events `at`, and what was shown with them, as far as it is known."""
    gold, place = events.sequences, events.index[at]
    count = gold.exposed_count[place].astype(np.int64)
    first = np.cumsum(gold.exposed_count, dtype=np.int64) - gold.exposed_count
    where, _ = ragged(first[place], count)
    item = index[gold.exposed[where]]
    before = np.concatenate([[0], np.cumsum(item > 0)])
    start = before[np.concatenate([[0], np.cumsum(count)])]
    return {"feedback": gold.feedback[place], "shown_start": start, "shown": item[item > 0]}


def _dense(session: Ints, user: Ints) -> Ints:
    """Ordinals from 1 within each user, without holes."""
    running = np.cumsum(run_starts(session))
    begin = np.flatnonzero(run_starts(user))
    base = np.repeat(running[begin] - 1, np.diff(np.append(begin, len(user))))
    return np.asarray(running - base, dtype=np.int32)


NOT_GOLD = (
    "[filters] are not read under --preprocess paper_a, whose rules are items and users with 5 rows, "
    "and users with two sessions, each of two items: load more days, or take gold's own sessions "
    "(--preprocess gold)"
)
LOOSEN = (
    "Loosen [filters] in the source file, load more days, or, under --split temporal, move the cut "
    "with --valid-from and --test-from (under nightly, ask about fewer --nights, or take --split temporal)"
)


def _refuse_if_hopeless(
    counts: dict[str, Any], vocabulary: Ints, users: Ints, start: Ints, remedy: str = LOOSEN
) -> None:
    why = None
    if len(users) < 2:
        why = f"{len(users)} user(s) left, at least 2 are needed"
    elif len(vocabulary) < 2:
        why = f"a vocabulary of {len(vocabulary)} item(s), at least 2 are needed"
    elif not (np.diff(start) > 1).any():
        why = "no user has two events, so nothing follows anything"
    if why:
        steps = "; ".join(
            f"{step}: " + ", ".join(f"{number} {name}" for name, number in left.items())
            for step, left in counts.items()
        )
        raise UserError(f"nothing to learn from: {why}. {steps}. {remedy}")


def vocabulary_of(item_ids: list[str], index: Ints, names: list[str]) -> Ints:
    """int64[V]: gold's item_index of a model's items; 0 for one that gold does not know."""
    by_name = dict(zip(names, index.tolist(), strict=True))
    return np.array([by_name.get(item, 0) for item in item_ids], dtype=np.int64)


def known_rows(events: Events, vocabulary: Ints) -> tuple[Rows, Ints, Ints]:
    """All events of known items, unfiltered: the histories that models are evaluated on.

    Also, for each event of `events`, how many known ones lie before it (int64[E+1]), and its item
    as vocabulary index (int32[E], 0 = unknown).
    """
    index = vocabulary_index(events, vocabulary)
    item = index[events.item]
    known = item > 0
    before = np.concatenate([[0], np.cumsum(known)])
    rows = Rows(
        item=item[known],
        ts=events.ts[known],
        ordinal=_dense(events.session[known], events.user[known]),
        positive=events.positive[known],
        start=before[events.start],
        **_evidence(events, np.flatnonzero(known), index),
    )
    return rows, before, item


def targets(
    events: Events,
    period: Ints,
    which: int,
    vocabulary: Ints,
    target: Target,
    everyone: bool = False,
) -> Targets:
    """Every later positive event (or session) of a period, with all that lies before as history.

    `everyone`: users without a known item in their history are evaluated, too.
    """
    rows, before, item = known_rows(events, vocabulary)
    asked = (period == which) & events.positive
    if target == "next_item":
        at = np.flatnonzero(asked)
        start, taken = np.arange(len(at) + 1), at
    else:
        first = np.flatnonzero(events.opens)
        asked |= (period == LATER) & events.positive
        wanted = asked & (period[first[events.session]] == which)
        # Distinct gold items, so that unknown ones count once each too.
        width = int(events.sequences.item.max(initial=0)) + 1
        pairs, where = np.unique(
            events.session[wanted] * width + events.item[wanted], return_index=True
        )
        session, count = np.unique(pairs // width, return_counts=True)
        at, start = first[session], np.concatenate([[0], np.cumsum(count)])
        # Sessions lie one after another, so the order of first places is the order within each.
        taken = np.flatnonzero(wanted)[np.sort(where)]
    user = events.user[at]
    in_training = np.zeros(len(events.start), dtype=np.int64)
    early = (period < which) & ((item > 0) | everyone)
    in_training[: len(events.start) - 1] = np.bincount(
        events.user[early], minlength=len(events.start) - 1
    )
    ready = in_training[user] > 0
    begin, end = before[events.start[user]], before[at]
    known = np.append(events.session[item > 0], -1)  # -1: no event before
    result = Targets(
        rows=rows,
        user=user,
        begin=begin,
        end=end,
        request_ts=events.ts[at],
        new_session=events.opens[at],
        opens=known[np.where(end > begin, end - 1, -1)] != events.session[at],
        item_start=start,
        item=item[taken].astype(np.int64),
        left_out={
            "users_without_history": len(np.unique(user[~ready])),
            "targets_without_history": int((~ready).sum()),
        },
        sets=target == "next_session",
        at=at,
        gold=events.item[taken].astype(np.int64),
    )
    return result.select(np.flatnonzero(ready))


def in_words(cut: dict[str, Any]) -> str:
    """A described cut as a person reads it."""
    times = [_moment(str(cut[name])) for name in ("valid_from", "test_from") if cut.get(name)]
    if cut["split"] == "nightly":
        many, end = f"{cut['nights']} night{'s' * (cut['nights'] != 1)}", _moment(cut["test_until"])
        return f"nightly, {many} (from {_moment(cut['test_from'])} until {end})"
    again = ", trained until the test period" if cut.get("train_until") == "test" else ""
    between = f" (validation from {times[0]}, test from {times[1]})" if len(times) == 2 else ""
    return str(cut["split"]) + (between or "".join(f" ({one})" for one in times)) + again


def _moment(stamped: str) -> str:
    """A time of `stamp`, to the second where it has no fraction; of a midnight the day."""
    day, _, clock = stamped.removesuffix("Z").partition("T")
    clock = clock.removesuffix(".000000")
    return day if clock == "00:00:00" else f"{day} {clock} UTC"


def describe(cut: Cut) -> dict[str, Any]:
    """A cut as it is logged and tagged."""
    values = asdict(cut)
    if cut.train_until == "validation":  # (so that what earlier versions stored is the same cut)
        del values["train_until"]
    for name in ("test_until", "nights"):
        if values[name] is None:
            del values[name]
    for name in ("valid_from", "test_from", "test_until"):
        if values.get(name) is not None:
            values[name] = stamp(values[name])
    return values
