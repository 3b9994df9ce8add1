"""What each column of the tables means, for people: docs/reference/tables.md is made from it.

A name means the same wherever it is; the few exceptions are by table. A test holds the names equal to
those of `jobs/core/tables.py`.
"""

from __future__ import annotations

from jobs.core.tables import Table

MEANING = {
    # events
    "event_id": "The event's id: the log's own, or a hash of all mapped columns.",
    "user_id": "Who acted. Hashed with `[privacy] hash_user_id`.",
    "item_id": "The item's id, as the log has it.",
    "event_ts": "When it happened, UTC, in microseconds.",
    "event_date": "The UTC date of `event_ts`.",
    "event_type": "What kind of event it is, as the log has it.",
    "value": "A number of the event, such as a rating or a quantity.",
    "feedback": "`positive`, `negative`, `exposed` or `neutral`, by `[feedback]`.",
    "tie_break": "Orders events of one user and time; smaller first, null last.",
    "source_session_id": "The log's own session.",
    "exposed_with": "Ids of the items that were shown with the event.",
    "ingest_file": "The landing file that the event was read from.",
    "ingest_ts": "When the run that stored the event began.",
    "anonymous_id": "The log's id of a visitor who is not logged in.",
    "boundary_values": "What `sessions.boundary` reads of the log's columns, as a JSON object; null: nothing.",
    "log_user_id": "The user that the log names; null: it names none.",
    # rejects, filtered lines, flags
    "raw": "The line as it was read.",
    "reason": "Why it was not used.",
    "file": "The landing file.",
    "line": "The first physical line of the record, from 1, the header counted. In files with rows: the row.",
    "run_day": "The day of the run (`--day`); null: a run without a day.",
    "first_seen_ts": "When the run that stored this row first began.",
    "raw_hash": "A hash of the line, and of the element's place where a line has several.",
    "file_columns": "The columns of the CSV when the line was read; null: not a CSV, or read by 0.1.0.",
    "element": "The place of the element in the line, from 1, with `[source] explode`.",
    "flag": "Why the event is flagged.",
    # identities
    "since_ts": "The time of the login that links the two ids.",
    "from_ts": "From when the user's events are counted; null: always.",
    "to_ts": "Until before when; null: still.",
    # sessions
    "session_id": "A hash of the user and the session's first event.",
    "start_ts": "Time of the first event.",
    "end_ts": "Time of the last event.",
    "start_date": "The UTC date of `start_ts`.",
    "event_count": "Number of events.",
    "runaway": "Why the session is left out of gold: `hours`, `events`, `rate` or `no_pause`; null: it is not.",
    "events": "The session's events, in order.",
    # items, sequences
    "item_index": "The number that models use for the item, from 1. It never changes; 0 is padding.",
    "known_from": "From when this was known.",
    "attributes": "What the catalogue says about the item: column to text.",
    "session_ordinal": "The number of each event's session, from 1.",
    "exposed_items": "The numbers of the items that were shown with each event.",
    # recommendations
    "model_name": "The registered model.",
    "model_version": "Its version.",
    "created_ts": "When the list was made.",
    "items": "The list, best item first, with scores.",
    "rules": "Digest of the rules of `[serving]` that the list was made by; null: no rules.",
    # runs
    "run_id": "The run of one step of one job.",
    "batch": "Ties the steps of one run together.",
    "job": "The job, such as `ingest`.",
    "step": "`compute`, `audit`, `publish` or `all`.",
    "source": "The source's name.",
    "day": "The day.",
    "started_ts": "When it began.",
    "seconds": "How long it took.",
    "outcome": "`ok`, `running` (or killed), or the name of the error.",
    "message": "What it reported, in one paragraph.",
    "counts": "Counts of the step, by name.",
    "rejects": "Rejected lines, by reason.",
    "tables_in": "Versions that were read, by table.",
    "tables_out": "Versions that were written, by table.",
    "files": "Landing files that were read.",
    "plans": "How each part of the work was done, by job.",
    # the ledger
    "size": "Size in bytes when last read.",
    "modified_ms": "Modification time when last read, in milliseconds since 1970.",
    "sha256": "Hash of the content.",
    "lines": "Lines that were read.",
    "columns": "The file's columns and their types.",
    "read_ts": "When the file was last read.",
    "waiting": "Last lines without a line end, which were not read yet.",
    # nights
    "users": "Number of users.",
    "sessions": "Number of sessions.",
    "new_items": "Items that were never seen before.",
    "gaps": "Pauses between events: `gaps[0]` under a second, `gaps[i]` under 2^i seconds.",
    "made_ts": "When the row was made.",
    # lists
    "night": "The UTC day whose events the lists are compared with.",
    "clock": "`published`: by the time of publication. `log`: by the times of the log.",
    "published_ts": "When the lists were published.",
    "sequences_version": "The version of `gold.sequences` that the lists were made from.",
    "new_users": "Users without an event in that version.",
    "targets": "Distinct items that users chose in the night.",
    "events_left_out": "Events before the first publication.",
    # erased users, changes of others, fingerprints
    "user_hash": "Keyed hash of the user's id.",
    "key_check": "Fingerprint of the HMAC key; one row stores only that.",
    "forgotten_ts": "When the person was removed.",
    "version": "The version of `bronze.events` that changed the event.",
    "operation": "What was done: DELETE, UPDATE, MERGE.",
    "who": "The writer, as the commit names it.",
    "seen_ts": "When a run noticed it.",
    "table_name": "The table that the file belongs to.",
    "path": "The data file.",
    "digest_xor": "XOR of a 64-bit hash of each event's user and time.",
    "digest_sum": "Sum of these hashes, 64 bits, wrapping.",
    "kept_events": "`events` without runaway sessions (`silver.events`: as `bronze.events` has them).",
    "kept_xor": "`digest_xor` of those.",
    "kept_sum": "`digest_sum` of those.",
}
BY_TABLE = {
    ("silver.identities", "anonymous_id"): "The visitor's id before the login.",
    ("silver.identities", "user_id"): "The user whose events these are.",
    ("silver.events", "user_id"): "The person: the log's user, or the user of `silver.identities`, or `anonymous:` and the anonymous id.",
    ("silver.sessions", "boundary_values"): "Of each event that of `bronze.events`; null: nothing is read.",
    ("silver.sessions", "user_id"): "Whose session it is; with `[identity]` the person.",
    ("gold.items", "first_seen_ts"): "Time of the item's first event; null: only the catalogue has it.",
    ("gold.sequences", "item_index"): "The items of the user's events, oldest first.",
    ("gold.sequences", "event_ts"): "Their times.",
    ("gold.sequences", "feedback"): "Their feedback.",
    ("ops.nights", "events"): "Number of events.",
    ("ops.nights", "items"): "Number of distinct items.",
    ("ops.fingerprints", "events"): "Number of events in the file.",
    ("ops.lists", "source"): "The source's name.",
}  # fmt: skip
METRIC = (
    "Mean over users of a list's hit rate or NDCG at ten: of the published lists (`served_`), of "
    "`recent_pop` and of `personal_top`. `known_`: of users with a history. `_low`, `_high`: the 95 % "
    "interval."
)
"""Of the columns of `ops.lists` that are metrics."""


def meaning(table: Table, column: str) -> str:
    """Raises KeyError: the column has no text."""
    if table.full_name == "ops.lists" and "_at_10" in column:
        return METRIC
    return BY_TABLE.get((table.full_name, column)) or MEANING[column]


REASONS = {
    "unparsable": "The line cannot be read as a record of its format, or is too long.",
    "missing_user_id": "No user (and no anonymous id, with `[identity]`).",
    "missing_item_id": "No item.",
    "bad_event_ts": "No readable time: see `[time]`.",
    "bad_value": "`value` is not a finite number.",
    "bad_tie_break": "`tie_break` is not a whole number.",
    "missing_event_id": "The source file names a column of event ids, and it is empty here.",
    "bad_expression": "An SQL expression of the source file failed for this line.",
    "late": "Older than the lateness bound of the night that read it.",
    "keep": "The condition `[source] keep` is false.",
    "bot": "`[bots]` recognised a program.",
}
"""Reasons of rejected and filtered lines."""
