"""Every table, declared once: name, key, columns, what a row is. Imports nothing heavy.

DAGs, Spark jobs, Great Expectations suites and models all read this module. Types are Spark SQL's.
The names and types are a contract (ARCHITECTURE.md): other engines read the tables by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from expectations.lists import JUDGED, LIST_METRICS

EVENT_STRUCT = (
    "struct<event_id:string,event_ts:timestamp,item_id:string,event_type:string,value:double,"
    "feedback:string,tie_break:bigint,source_session_id:string,exposed_with:array<string>>"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A Delta table of one source.

    `layer` and `name` give its folder, `<lake>/<source>/<layer>/<name>`. `order` is the column by
    which files are laid out, so that file statistics prune reads and MERGEs. `group` is how many
    rows the row groups of its large files have, so that a night reads the few that it touches and
    little more; None: the writer's number. `feed` says that readers take its changes from Delta's
    change data feed.
    """

    layer: str
    name: str
    key: tuple[str, ...]
    doc: str
    columns: dict[str, str]
    order: tuple[str, ...] = ()
    group: int | None = None
    feed: bool = False
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        return f"{self.layer}.{self.name}"

    @property
    def ddl(self) -> str:
        return ", ".join(f"{name} {kind}" for name, kind in self.columns.items())

    def path(self, lake: str, source: str) -> str:
        """Folder or URI of this table for a source."""
        return f"{lake.rstrip('/')}/{source}/{self.layer}/{self.name}"

    def app_id(self, source: str, of: Table) -> str:
        """The `txnAppId` by which a commit says up to which version of `of` it has read."""
        return f"{source}/{self.full_name}<-{of.full_name}"


EVENTS = Table(
    layer="bronze", name="events", key=("event_id",), order=("event_ts",), feed=True,
    doc="One typed, deduplicated event. `anonymous_id`: the log's, where the source file has [identity]; "
        "user_id or it is there. `boundary_values`: what sessions.boundary reads of the log's columns, as a "
        "JSON object.",
    columns={
        "event_id": "string", "user_id": "string", "item_id": "string", "event_ts": "timestamp",
        "event_date": "date", "event_type": "string", "value": "double", "feedback": "string",
        "tie_break": "bigint", "source_session_id": "string", "exposed_with": "array<string>",
        "ingest_file": "string", "ingest_ts": "timestamp", "anonymous_id": "string",
        "boundary_values": "string",
    },
)  # fmt: skip

REJECTS = Table(
    layer="bronze", name="rejects", key=("file", "line", "raw_hash"),
    doc="One line that could not be used, with the reason. `line` is the first physical line of "
        "the record, the header counted (Parquet: the row number, raw as JSON). `file_columns`: of "
        "a CSV, its columns in order when the line was read (null: read by version 0.1.0). `element`: "
        "where a line has many ([source] explode), the place of the element, from 1; `raw` is the "
        "whole line, and `raw_hash` one of line and place.",
    columns={
        "raw": "string", "reason": "string", "file": "string", "line": "bigint",
        "run_day": "date", "first_seen_ts": "timestamp", "raw_hash": "string",
        "file_columns": "array<string>", "element": "bigint",
    },
)  # fmt: skip

FILTERED = Table(
    layer="bronze",
    name="filtered",
    key=REJECTS.key,
    doc="One line that `source.keep` or [bots] left out, with the reason, where source.keep_filtered "
    "is true. The columns are those of bronze.rejects.",
    columns=REJECTS.columns,
)
DELIVERIES = Table(
    layer="bronze",
    name="deliveries",
    key=("event_id", "file"),
    doc="One event in one file, `file`, of the events that several files had, or have, as this file has it; or "
    "of those that only a line too old to replace them still has. "
    "Only where `source.redelivery` is replace. `flag`: what [bots] says of its lines.",
    columns={**EVENTS.columns, "file": "string", "flag": "string"},
)

IDENTITIES = Table(
    layer="silver", name="identities", key=("anonymous_id", "since_ts"),
    doc="Whose an anonymous id is. Events without a user from `from_ts` (null: always) to before `to_ts` "
        "(null: still) are this user's; `since_ts`: the login that links them. Only where the source file "
        "has [identity].",
    columns={
        "anonymous_id": "string", "since_ts": "timestamp", "user_id": "string",
        "from_ts": "timestamp", "to_ts": "timestamp",
    },
)  # fmt: skip

PERSON_EVENTS = Table(
    layer="silver", name="events", key=("event_id",), order=("event_ts",), feed=True,
    doc="One event of bronze.events with the person whose it is, `user_id`: the log's user, else the "
        "user whom silver.identities names, else `anonymous:` and the anonymous id. Only where the "
        "source file has, or had, [identity]; then sessions are cut from it.",
    columns={
        "event_id": "string", "user_id": "string", "item_id": "string", "event_ts": "timestamp",
        "event_type": "string", "value": "double", "feedback": "string", "tie_break": "bigint",
        "source_session_id": "string", "exposed_with": "array<string>", "log_user_id": "string",
        "anonymous_id": "string", "boundary_values": "string",
    },
)  # fmt: skip

FLAGS = Table(
    layer="bronze",
    name="flags",
    key=("event_id",),
    doc="One event of which [bots], with policy = 'flag', says that a program made it. An event of "
    "several lines has a row if one of them is flagged.",
    columns={"event_id": "string", "flag": "string", "first_seen_ts": "timestamp"},
)

SESSIONS = Table(
    layer="silver", name="sessions", key=("session_id",), order=("start_ts",), group=5_000,
    feed=True,
    doc="One session with its events nested, in order. Readers take `runaway is null`. "
        "`boundary_values`: of each of the events, that of bronze.events; null where sessions.boundary "
        "reads no column of the log.",
    columns={
        "session_id": "string", "user_id": "string", "start_ts": "timestamp",
        "end_ts": "timestamp", "start_date": "date", "event_count": "int", "runaway": "string",
        "events": f"array<{EVENT_STRUCT}>", "boundary_values": "array<string>",
    },
)  # fmt: skip

ITEMS = Table(
    layer="gold", name="items", key=("item_id",),
    doc="One item, seen, shown, or of the catalogue alone (no first_seen_ts). `item_index` starts at 1, is "
        "append-only and never moves; 0 is padding.",
    columns={
        "item_id": "string", "item_index": "int", "first_seen_ts": "timestamp",
        "event_count": "bigint",
    },
)  # fmt: skip

ITEM_ATTRIBUTES = Table(
    layer="gold", name="item_attributes", key=("item_id", "known_from"),
    doc="How an item is said to be by the catalogue, and from when on that was known. Only where "
        "the source file has [items]; rows are added and stay.",
    columns={
        "item_id": "string", "known_from": "timestamp", "attributes": "map<string,string>",
    },
)  # fmt: skip

SEQUENCES = Table(
    layer="gold", name="sequences", key=("user_id",), order=("user_id",),
    doc="One user's whole history, ready to train on: parallel arrays, oldest first, everything "
        "that is not runaway, unfiltered.",
    columns={
        "user_id": "string", "item_index": "array<int>", "event_ts": "array<timestamp>",
        "session_ordinal": "array<int>", "feedback": "array<string>",
        "exposed_items": "array<array<int>>",
    },
    # A model names the version it was trained on: the log must reach back to it.
    properties={"delta.logRetentionDuration": "interval 3650 days"},
)  # fmt: skip

RECOMMENDATIONS = Table(
    layer="gold", name="recommendations", key=("user_id", "model_version"),
    doc="One user's list from one model version. `rules`: digest of the rules of [serving], as they "
        "were for this model, that the list was made by; null: none.",
    columns={
        "user_id": "string", "model_name": "string", "model_version": "string",
        "created_ts": "timestamp", "items": "array<struct<item_id:string,score:double>>",
        "rules": "string",
    },
)  # fmt: skip

RUNS = Table(
    layer="ops", name="runs", key=("run_id",),
    doc="What each run of a job read, wrote and rejected: lineage anyone can query. `outcome` is ok, "
        "running (or killed), or the name of the error. `plans` says, by job, how the work was done.",
    columns={
        "run_id": "string", "batch": "string", "job": "string", "step": "string",
        "source": "string", "day": "date", "started_ts": "timestamp", "seconds": "double",
        "outcome": "string", "message": "string", "counts": "map<string,bigint>",
        "rejects": "map<string,bigint>", "tables_in": "map<string,bigint>",
        "tables_out": "map<string,bigint>", "files": "array<string>",
        "plans": "map<string,string>",
    },
)  # fmt: skip

FILES = Table(
    layer="ops", name="files", key=("file",),
    doc="The ledger: each landing file as it was when last read. A shortcut only: reading a file "
        "again yields duplicates, nothing else. `waiting`: last lines that had no line end yet, and "
        "were not read (null: none).",
    columns={
        "file": "string", "size": "bigint", "modified_ms": "bigint", "sha256": "string",
        "lines": "bigint", "columns": "map<string,string>", "read_ts": "timestamp",
        "batch": "string", "waiting": "bigint",
    },
)  # fmt: skip

NIGHTS = Table(
    layer="ops", name="nights", key=("day",),
    doc="What each day looked like when its night had read it: sessions that began on it, their "
        "users, events and items, and how long the pauses between events were (`gaps[0]`: under a "
        "second, `gaps[i]`: under 2^i seconds).",
    columns={
        "day": "date", "events": "bigint", "users": "bigint", "sessions": "bigint",
        "items": "bigint", "new_items": "bigint", "gaps": "array<bigint>", "batch": "string",
        "made_ts": "timestamp",
    },
)  # fmt: skip

LISTS = Table(
    layer="ops", name="lists", key=("source", "night", "model_version"),
    doc="What lists that were published before a night's events were worth: hit rate and NDCG of the "
        "first ten, of the lists (`served_`) and of two baselines made from the same version of "
        "gold.sequences, as means over users with 95 % intervals (`_low`, `_high`); `known_`: of the "
        "users who had an event in it. `clock`: published, or log (no lists were published before "
        "the end of the night: the newest that were made from nothing of it).",
    columns={
        "source": "string", "night": "date", "model_version": "string", "model_name": "string",
        "clock": "string", "published_ts": "timestamp", "created_ts": "timestamp",
        "sequences_version": "bigint", "users": "bigint", "new_users": "bigint",
        "targets": "bigint", "events_left_out": "bigint",
        **{
            f"{of}{judged}_{metric}{end}": "double"
            for of in ("", "known_") for judged in JUDGED for metric in LIST_METRICS
            for end in ("", "_low", "_high")
        },
        "made_ts": "timestamp",
    },
)  # fmt: skip

FORGOTTEN = Table(
    layer="ops",
    name="forgotten",
    key=("user_hash",),
    doc="Erased users, as keyed hashes: ingestion skips their lines. `key_check`: fingerprint of the "
    "HMAC key; one row stores only that.",
    columns={"user_hash": "string", "key_check": "string", "forgotten_ts": "timestamp"},
)

CHANGED_EVENTS = Table(
    layer="ops", name="changed_events", key=("event_id",),
    doc="Events that others deleted or changed in bronze.events. Their lines count as duplicates when "
        "they are read again, so that a file that has grown does not bring them back; a row that is "
        "deleted here lets its event come again.",
    columns={
        "event_id": "string", "version": "bigint", "operation": "string", "who": "string",
        "seen_ts": "timestamp",
    },
)  # fmt: skip

FINGERPRINTS = Table(
    layer="ops", name="fingerprints", key=("table_name", "path"),
    doc="What a data file of bronze.events, silver.events, silver.sessions or gold.sequences has: its "
        "events, and XOR and sum (64 bits, wrapping) of a hash of each event's user and time. `kept_`: of "
        "the sessions that are not runaway; of silver.events by what the log says, as in bronze.events "
        "(null in the other tables). A shortcut only: a row that is missing is made again from its "
        "file.",
    columns={
        "table_name": "string", "path": "string", "events": "bigint", "digest_xor": "bigint",
        "digest_sum": "bigint", "kept_events": "bigint", "kept_xor": "bigint",
        "kept_sum": "bigint", "made_ts": "timestamp",
    },
)  # fmt: skip

ALL = (
    EVENTS, REJECTS, FILTERED, FLAGS, DELIVERIES, IDENTITIES, PERSON_EVENTS, SESSIONS, ITEMS, ITEM_ATTRIBUTES, SEQUENCES, RECOMMENDATIONS, RUNS, FILES,
    NIGHTS, LISTS, FORGOTTEN, CHANGED_EVENTS, FINGERPRINTS,
)  # fmt: skip

NUMBERING = "sessionmill.numbering"
"""A property of `gold.items` whose numbers had to be given anew, and of the sequences that use them."""

REJECT_REASONS = (
    "unparsable", "missing_user_id", "missing_item_id", "bad_event_ts", "bad_value",
    "bad_tie_break", "missing_event_id", "bad_expression", "late",
)  # fmt: skip

FILTER_REASONS = ("keep", "bot")
"""Why a line is left out: `source.keep`, `[bots]`. The first that holds."""
