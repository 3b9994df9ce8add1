"""What the steps of `sessionize` tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jobs.core.plan import Plan, Publish, earlier, idle
from jobs.lake.manifest import Manifest, Staged


@dataclass
class Counts:
    """Sessions of the candidate, and events in them."""

    rows: int = 0
    new: int = 0
    changed: int = 0
    retired: int = 0
    merged: int = 0
    relinked: int = 0
    """With an event that is another person's now; 0 where all sessions were made anew."""
    runaways: int = 0
    events_before: int = 0
    events_after: int = 0
    lo_us: int | None = None
    """The first time (us) at which a session of the candidate starts or started."""
    hi_us: int | None = None
    """And the last."""


@dataclass
class Moved:
    """Events that changed since the version consumed last."""

    came: int
    gone: int


@dataclass
class SessionizeManifest(Manifest):
    """What the steps of `sessionize` tell each other."""

    base: int
    """The version of `silver.sessions` that the candidate was computed from."""
    upto: int
    """The version of the events (`Lake.session_events`) that it read up to."""
    empty: bool = False
    """Whether there is nothing to publish."""
    whole: bool = False
    """Whether all sessions were made anew."""
    counts: Counts = field(default_factory=Counts)
    notes: list[str] = field(default_factory=list)
    moved: Moved | None = None
    staged: Staged | None = None
    """The sessions, where they are all new; else they are the candidate's part `sessions`."""

    @staticmethod
    def plan_of_old(old: dict[str, Any]) -> Plan:
        if old["empty"]:
            return idle("sessionize")
        kept = Publish.MERGE if old.get("staged") is None else Publish.APPEND
        return earlier("sessionize", Publish.REPLACE if old.get("replace") else kept)
