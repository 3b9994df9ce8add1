"""Other ways of preparing a log, cut anew from gold.sequences: to reproduce or to compare, not default.

`gap:SECONDS` has the same events and other sessions: a silence of more than so many seconds ends one.
What is trained on and evaluated is what it was, because filters still count the table's sessions.

`paper_a` is what paper A's public code does before it trains: it looks at all rows, later ones
too, and leaves out users with any session of one item, so that no target opens a session.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from expectations.session_rule import SessionRule
from models.core.errors import UserError
from models.data.splits import Events

PREPROCESS = ("gold", "paper_a", "gap:SECONDS")
PAPER_A_GAP_US = 86_400_000_000
PAPER_A_RULE = SessionRule(native=False, gap_us=PAPER_A_GAP_US)
MIN_ROWS, LAST_ROWS, MIN_SESSIONS, MIN_SESSION_ITEMS = 5, 200, 2, 2


def gap_us(preprocess: str) -> int | None:
    """The silence that ends a session, where sessions are cut anew by one; None: they are not.

    Raises: UserError: what is behind `gap:` is not a number of seconds above 0.
    """
    if preprocess == "paper_a":
        return PAPER_A_GAP_US
    kind, _, seconds = preprocess.partition(":")
    if kind != "gap":
        return None
    try:
        found = round(float(seconds) * 1_000_000)
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise UserError(
            f"--preprocess {preprocess!r}: write a number of seconds above 0 after gap:, as in gap:1800"
        )
    return found


def same_events(preprocess: str) -> str:
    """Who agrees in this trains on the same events and is evaluated on the same targets."""
    return "gold" if preprocess.startswith("gap:") else preprocess


def recut(events: Events, gap: int) -> Events:
    """The same events in sessions that a silence of more than `gap` microseconds ends."""
    rule = SessionRule(native=False, gap_us=gap)
    opens = rule.arrays.opens(events.user, events.ts)
    return replace(events, opens=opens, session=np.cumsum(opens) - 1, counted=events.session)


def paper_a(events: Events) -> Events:
    """Items with 5 rows, then users with 5 rows (once each, in that order); each user's last 200
    rows; a new session where the gap is above 24 h; users with two sessions, each of two items.

    Rows are in our one total order; a user keeps the place in `sequences`.
    """
    users = len(events.start) - 1
    keep = np.bincount(events.item, minlength=1)[events.item] >= MIN_ROWS
    keep &= np.bincount(events.user[keep], minlength=users)[events.user] >= MIN_ROWS
    at = np.flatnonzero(keep)
    start = _starts(events.user[at], users)
    at = at[start[events.user[at] + 1] - np.arange(len(at)) <= LAST_ROWS]
    user, ts = events.user[at], events.ts[at]
    opens = PAPER_A_RULE.arrays.opens(user, ts)
    session = np.cumsum(opens) - 1
    short = np.bincount(session, minlength=1)[session] < MIN_SESSION_ITEMS
    number = np.bincount(user[opens], minlength=users)
    good = (number >= MIN_SESSIONS) & (np.bincount(user[short], minlength=users) == 0)
    at, opens = at[good[user]], opens[good[user]]
    user = events.user[at]
    return Events(
        sequences=events.sequences,
        index=events.index[at],
        user=user,
        start=_starts(user, users),
        opens=opens,
        session=np.cumsum(opens) - 1,
    )


def _starts(user: np.ndarray, users: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])
