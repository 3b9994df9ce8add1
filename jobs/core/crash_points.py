"""Crash points: the places between two writes, where a test may kill the process.

`SESSIONMILL_CRASH_AT=<name>` makes the process send itself SIGKILL there. The names are the
commits of a run, in order; `tests` go through all of them. (`items.attributes-published` is met
where there is a catalogue.)
"""

import os
import signal
import sys

from jobs.core.settings import settings

POINTS = (
    "ingest.parsed", "ingest.computed", "ingest.audited", "ingest.rejects-published",
    "ingest.events-published", "ingest.rejects-cleaned", "ingest.ledger-published",
    "sessionize.computed", "sessionize.audited", "sessionize.published",
    "items.computed", "items.attributes-published", "items.published",
    "sequences.computed", "sequences.audited", "sequences.published",
)  # fmt: skip

SCORING = ("score.computed", "score.audited", "score.published")
"""Those of `jobs score`, which is no part of `run`."""

IDENTITY = ("identify.audited", "identify.events-published", "identify.published")
"""Those of `sessionize` where the source has `[identity]`."""

REDELIVERY = ("ingest.deliveries-published",)
"""Those of `ingest` where `source.redelivery` is replace."""

DATABASE = ("ingest.extracted",)
"""Those of `ingest` where the log is a table of a database: after each file of rows."""


def point(name: str) -> None:
    """Die here if the environment names this point."""
    assert name in POINTS + SCORING + IDENTITY + REDELIVERY + DATABASE, name
    if settings().crash_at == name:
        print(f"crash point {name}: killing myself", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
