"""How a job does its work, as a value: which algorithm, on which engine, and how it publishes.

A job collects facts (rows that moved, rows that are there, the rule, the kinds of change), and one
function a job makes a `Plan` of them, by the sizes of one `Thresholds` object. The functions read
nothing else: no table, no setting, no session. Where a fact costs something (reading the change
feed, counting a candidate), it is None until it is known, and the plan is made again with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Engine(StrEnum):
    """Where the work is done."""

    HERE = "this process"
    INTERPRETED = "Spark, interpreted plans"
    COMPILED = "Spark, compiled plans"


class Publish(StrEnum):
    """How the candidate gets into the table: always one commit."""

    NOTHING = "nothing"
    APPEND = "append"
    MERGE = "merge"
    REPLACE = "replace whole"

    @classmethod
    def _missing_(cls, value: object) -> Publish | None:
        """What candidates of earlier versions say: their rows are merged, too."""
        return cls.MERGE if value in ("swap files", "rewrite small table") else None


class Algorithm(StrEnum):
    """What is done; the values are printed and stored in `ops.runs`."""

    NOTHING = "nothing new"
    # ingest, replay-rejects: how lines are compared with the stored events
    FIRST_SLICES = "first load by slices of time"
    FIRST_LINES = "no event is stored"
    STORED_HERE = "stored events at the lines' times, in Arrow"
    STORED_TIMES = "stored events at the lines' times"
    STORED_SPAN = "stored events in the lines' time span, joined"
    STORED_IDS = "stored events of the lines' ids, looked up"
    STORED_ALL = "stored events, joined by id"
    # sessionize
    CUT_SLICES = "all sessions, by slices of time"
    CUT_USERS = "all sessions, by slices of users"
    RECUT_ARROW = "sessions around the changes, in Arrow"
    RECUT_USERS = "sessions around the changes, by slices of users"
    # items
    COUNT_ARROW = "items of new events, in Arrow"
    COUNT_CHANGES = "items of changed events, in Spark SQL"
    COUNT_ALL = "items of all events, file by file"
    # sequences
    WEAVE_ALL = "all users, from all sessions"
    WEAVE_KEPT = "all users, from the stored rows and the changed sessions"
    WEAVE_CHANGED = "changed users"
    # score
    SCORE_ALL = "all users"
    # any job, of a candidate that was computed before plans were recorded
    EARLIER = "not recorded, an earlier version computed it"


@dataclass(frozen=True)
class Thresholds:
    """The sizes at which a job goes another way. ("Ours": chosen by us, not measured.)"""

    few_moved: int = 30_000
    """Rows. Work on at most so many is done in this process, or by interpreted plans. Ours, between
    two measured loads: some 30 lines, where interpreting won, and 290,000, where compiling did
    (LAB_LOG.md)."""
    few_there: int = 1_000_000
    """Rows of the table that is looked through; above, plans are compiled whatever moves. Ours."""
    few_bytes: int = 64 * 2**20
    """Bytes. A `gold.sequences` of at most so many is written anew rather than changed in place.
    Ours."""
    merged_rows: int = 500_000
    """Rows. At most so many are put into a table by delta-rs, which holds them in memory; more by
    Spark. Ours."""
    merged_bytes: int = 256 * 2**20
    """Bytes. A table of at most so many is looked through by delta-rs where it is not known where
    the changed rows lie: it may hold seven to ten times as much in memory (LAB_LOG.md). A larger one
    is looked through by Spark. Ours."""
    few_lines: int = 500_000
    """Lines. The ids, or the times, of at most so many are sent to every task. Ours."""
    read_bytes: int = 16 * 2**20
    """Bytes. Files of at most so many are read, and their lines compared with the stored events, in one
    process. Ours."""
    recut_events: int = 2_000_000
    """Changed events. Around at most so many sessions are cut in one process; around more in Spark.
    Ours."""
    identified_events: int = 2_000_000
    """Changed events. Of at most so many persons are found in one process; of more all of
    `silver.events` is made anew, by tasks. Ours."""
    counted_rows: int = 2_000_000
    """New events, and items. At most so many are counted in one process; more in Spark. Ours."""
    changed_sessions: int = 2_000_000
    """Changed sessions. Of at most so many the users are found in one process; of more in Spark.
    Ours."""
    rewritten_share: float = 0.5
    """Share of the slices of `gold.sequences` with a changed user. From there on all is written
    anew: a change in place that writes more than half of the files costs more. Ours."""
    compared_sessions: int = 10_000_000
    """Sessions. The bounds of at most so many are compared in one process, 32 bytes each (native ones:
    41); the audit of more is Spark's. Ours."""
    compared_bytes: int = 256 * 2**20
    """Bytes. Where the files that others replaced are at most so many, their rows are compared in
    memory; more by Spark. Ours."""
    fingerprinted_rows: int = 2_000_000
    """Rows. Data files of at most so many are fingerprinted in this process; of more in Spark. Ours."""
    listed_files: int = 5_000
    """Data files of a table. On an object store at most so many are looked for before a run: a listing
    is one request for every thousand objects. Ours."""
    smallest_slice: int = 50_000
    """Events. Under so many a second task is not worth its start. Ours."""
    slice_events: int = 1_000_000
    """Events. About so many a task holds at a time. Ours."""
    short_jobs: bool | None = None
    """SESSIONMILL_SHORT_JOBS: whether rows are taken to be few (true) or many (false) whatever their
    number; None: by their number."""

    def many(self, moved: int, there: int = 0) -> bool:
        """Whether a step is worth Spark's tasks and compiled plans.

        Args:
            moved: rows that the step works on.
            there: rows of a table that it looks through.
        """
        if self.short_jobs is not None:
            return not self.short_jobs
        return moved > self.few_moved or there > self.few_there

    def spark(self, moved: int, there: int = 0) -> Engine:
        """The engine of a step that only Spark can do; see `many`."""
        return Engine.COMPILED if self.many(moved, there) else Engine.INTERPRETED

    def tasks(self, moved: int, there: int = 0) -> Engine:
        """The engine of tasks (`jobs/lake/tasks.py`), which need no Spark; see `many`."""
        return Engine.COMPILED if self.many(moved, there) else Engine.HERE

    def whole_tables(self) -> Engine:
        """The engine of a step over whole tables of any size."""
        return Engine.INTERPRETED if self.short_jobs else Engine.COMPILED

    def read_here(self, size: int) -> bool:
        """Whether files of so many bytes are read in this process, where it can type their lines."""
        return self.short_jobs is not False and size <= self.read_bytes

    def in_one_process(self, rows: int, size: int | None) -> bool:
        """Whether so many rows are put into a table by delta-rs, not by Spark.

        Args:
            size: the table's bytes; None: it is known in which of its files the rows may be.
        """
        return rows <= self.merged_rows and (size is None or size <= self.merged_bytes)

    def slice_size(self, events: int, cores: int) -> int:
        """About how many of so many events a slice should have."""
        return max(self.smallest_slice, min(self.slice_events, events // cores + 1))

    def slices(self, events: int, cores: int) -> int:
        """How many slices so many events are worth."""
        return max(1, -(-events // self.slice_size(events, cores)))


@dataclass(frozen=True)
class Plan:
    """How one run of a job does its work."""

    job: str
    path: Algorithm
    engine: Engine
    publish: Publish | None = None
    """None: not known before the candidate is there."""

    def in_words(self) -> str:
        return f"{self.path}; {self.engine}; publish: {self.publish or 'not known yet'}"

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "job"}


def idle(job: str) -> Plan:
    """The plan of a run for which there is nothing to do."""
    return Plan(job, Algorithm.NOTHING, Engine.HERE, Publish.NOTHING)


def earlier(job: str, publish: Publish) -> Plan:
    """The plan of a candidate that an earlier version computed."""
    return Plan(job, Algorithm.EARLIER, Engine.COMPILED, publish)


# -- one function a job ---------------------------------------------------------------------------


@dataclass(frozen=True)
class IngestFacts:
    """What decides how lines become events; for `ingest` and `replay-rejects`."""

    lines: int
    """Lines read."""
    stored: int
    """Rows of `bronze.events`."""
    native_ids: bool
    """Whether event ids are the log's own."""
    late: bool
    """Whether a line can be late, or of an event that others changed."""
    replaces: bool | None = None
    """Whether a line replaces a stored event; None: not known yet."""
    here: bool = False
    """Whether all lines were typed in this process."""


def ingest_plan(facts: IngestFacts, limits: Thresholds, job: str = "ingest") -> Plan:
    if facts.here:
        return Plan(job, Algorithm.STORED_HERE, Engine.HERE, Publish.APPEND)
    engine = limits.spark(facts.lines, facts.stored)
    many = engine is Engine.COMPILED
    looked_up = many and facts.lines <= limits.few_lines
    if not facts.stored and many and not facts.native_ids and not facts.late:
        return Plan(job, Algorithm.FIRST_SLICES, engine, Publish.APPEND)
    if not facts.stored:
        path = Algorithm.FIRST_LINES
    elif facts.native_ids:
        path = Algorithm.STORED_IDS if looked_up else Algorithm.STORED_ALL
    else:
        path = Algorithm.STORED_TIMES if looked_up else Algorithm.STORED_SPAN
    publish = None
    if facts.replaces is not None:
        publish = Publish.MERGE if facts.replaces else Publish.APPEND
    return Plan(job, path, engine, publish)


@dataclass(frozen=True)
class SessionizeFacts:
    """What decides how sessions are cut."""

    gap_rule: bool
    """Whether silence alone parts sessions, so that they can be cut by slices of time."""
    events: int
    """Rows of `bronze.events`."""
    grown: int
    """Rows that it has more than at the version consumed last; below 0: fewer."""
    whole: bool
    """Whether all sessions are made anew: the first time, on demand, or without a change feed."""
    replaces: bool
    """Whether there are sessions already that all of them replace."""
    moved: int | None = None
    """Rows of the change feed since then; None: not read yet."""
    only_opens: bool | None = None
    """Whether all sessions of the candidate are new; None: not counted yet."""


def sessionize_plan(facts: SessionizeFacts, limits: Thresholds) -> Plan:
    job = "sessionize"
    if facts.whole:
        path = Algorithm.CUT_SLICES if facts.gap_rule else Algorithm.CUT_USERS
        publish = Publish.REPLACE if facts.replaces else Publish.APPEND
        return Plan(job, path, limits.spark(facts.events), publish)
    opens = facts.only_opens
    changed = None if opens is None else Publish.APPEND if opens else Publish.MERGE
    # (The table may be as large as before, and yet all of its events others.)
    moved = max(abs(facts.grown), facts.moved or 0)
    if moved <= limits.recut_events:
        return Plan(job, Algorithm.RECUT_ARROW, Engine.HERE, changed)
    return Plan(job, Algorithm.RECUT_USERS, limits.spark(moved, facts.events), changed)


@dataclass(frozen=True)
class ItemsFacts:
    """What decides how items are counted."""

    items: int
    """Rows of `gold.items`."""
    events: int
    """Rows of `bronze.events`."""
    grown: int
    """Rows of it that came since the version consumed last."""
    whole: bool
    """Whether all events are counted: the first time, or without a change feed."""
    only_inserts: bool | None = None
    """Whether events only came; None: not looked at yet."""


def items_plan(facts: ItemsFacts, limits: Thresholds) -> Plan:
    publish = Publish.MERGE if facts.items else Publish.APPEND
    here = facts.items and max(facts.grown, facts.items) <= limits.counted_rows
    if not facts.whole and here and facts.only_inserts is not False:
        return Plan("items", Algorithm.COUNT_ARROW, Engine.HERE, publish)
    path = Algorithm.COUNT_ALL if facts.whole else Algorithm.COUNT_CHANGES
    return Plan("items", path, limits.spark(facts.grown, facts.events), publish)


@dataclass(frozen=True)
class SequencesFacts:
    """What decides how sequences are made."""

    sessions: int
    """Rows of `silver.sessions`."""
    grown: int
    """Rows of it that came since the version consumed last."""
    whole: bool
    """Whether all sessions are read: the first time, or without a change feed."""
    stored: bool
    """Whether `gold.sequences` has files."""
    size: int
    """Its bytes."""
    share: float | None = None
    """Share of its slices with a changed user; None: not known yet."""


def sequences_plan(facts: SequencesFacts, limits: Thresholds) -> Plan:
    engine = limits.tasks(facts.grown, facts.sessions)
    all_rows = Publish.REPLACE if facts.stored else Publish.APPEND
    if facts.whole:
        return Plan("sequences", Algorithm.WEAVE_ALL, engine, all_rows)
    most = facts.share is not None and facts.share >= limits.rewritten_share
    if most or facts.size <= limits.few_bytes:
        return Plan("sequences", Algorithm.WEAVE_KEPT, engine, all_rows)
    publish = None if facts.share is None else Publish.MERGE
    return Plan("sequences", Algorithm.WEAVE_CHANGED, engine, publish)


def changed_users_engine(facts: SequencesFacts, limits: Thresholds) -> Engine:
    """The engine that finds the users whose sessions changed."""
    engine = limits.tasks(facts.grown, facts.sessions)
    return engine if facts.grown > limits.changed_sessions else Engine.HERE


@dataclass(frozen=True)
class ScoreFacts:
    """What decides whether users are scored."""

    there: bool
    """Whether the lists of this model and these sequences are published already."""


def score_plan(facts: ScoreFacts) -> Plan:
    if facts.there:
        return idle("score")
    return Plan("score", Algorithm.SCORE_ALL, Engine.HERE, Publish.REPLACE)
