"""What the steps of `ingest`, and of `replay-rejects`, tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jobs.core.plan import Plan, Publish, earlier, idle
from jobs.core.tables import Table
from jobs.lake.context import Context
from jobs.lake.manifest import Manifest, Staged


@dataclass
class Counts:
    """Lines read, and what became of them."""

    read: int = 0
    events_new: int = 0
    events_replaced: int = 0
    duplicates: int = 0
    waiting: int = 0
    """Last lines without an end, which are not among those read."""
    events_removed: int = 0
    """Stored events that `source.keep` or `[bots]` leave out, of a reload; and those that no file has
    any more (`source.redelivery`)."""


@dataclass
class IngestManifest(Manifest):
    """What the steps of `ingest`, and of `replay-rejects`, tell each other."""

    base: dict[str, int]
    """By table: the version that the candidate was computed from."""
    empty: bool
    """Whether there is nothing to publish."""
    counts: Counts = field(default_factory=Counts)
    rejects: dict[str, int] = field(default_factory=dict)
    """By reason, how many lines."""
    filtered: dict[str, int] = field(default_factory=dict)
    """By reason, how many lines were left out."""
    filtered_staged: Staged | None = None
    """Lines that were left out and that `bronze.filtered` does not have yet."""
    filtered_changed: int = 0
    """How many stored ones go, or have another reason now."""
    flagged: int = 0
    """How many events are flagged."""
    flags_changed: int = 0
    """How many rows of `bronze.flags` change, where that is not `flagged`."""
    settled: bool = False
    """Whether events and flags are those of all deliveries (`jobs/bronze/redelivery.py`)."""
    deliveries_changed: int = 0
    """How many rows of `bronze.deliveries` change."""
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    staged: Staged | None = None
    """New events; None: they are the candidate's part `events`, because some replace stored ones."""
    rejects_staged: Staged | None = None
    """Rejects that the table does not have yet."""
    reload: bool = False
    """Whether all files were read again."""
    rejects_changed: int = 0
    """How many stored rejects go, or have another reason now."""

    @staticmethod
    def plan_of_old(old: dict[str, Any]) -> Plan:
        if old["empty"]:
            return idle("ingest")
        return earlier("ingest", Publish.MERGE if old.get("staged") is None else Publish.APPEND)


def version_of(context: Context, table: Table) -> int:
    """The version of a table that is there."""
    version = context.lake.version(table)
    assert version is not None
    return version
