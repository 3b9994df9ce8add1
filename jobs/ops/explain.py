"""Where a session comes from: its events with their files, and the nights that changed it.

Reads with delta-rs alone: an answer takes a second or two, no JVM starts.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable

from jobs.core.errors import SettingsError, counted
from jobs.core.source_file import Source
from jobs.core.tables import EVENTS, RUNS, SESSIONS, Table
from jobs.lake.change_feed import CHANGED, DELETE, INSERT, POSTIMAGE, RETIRED, TYPE, VERSION
from jobs.lake.filesystem import matching, rows_of, rust_uri

CHANGES = {INSERT: "opened", POSTIMAGE: CHANGED, DELETE: RETIRED}


def explain(root: str, source: Source, session_id: str) -> dict[str, Any]:
    """What is known of one session, be it in the table or retired.

    Args:
        root: folder or URI of the lake.

    Returns:
        `session` (its row without events; `retired` says whether it is gone), `events` (each with
        `ingest_file` and `ingest_ts`), `changes` (oldest first: version, time, what, run, day),
        `changes_from_version` (what changed before is not known: those files are gone; 0: all is).

    Raises:
        SettingsError: there is no such table, or no such session in it or its change feed.
    """
    sessions = opened(root, source, SESSIONS)
    since, changes = changes_of(sessions, session_id)
    wanted = ds.field("session_id") == session_id
    found = matching(rows_of(sessions), wanted, ["session_id"])
    rows = [row for part in found for row in part.to_pylist()]
    if not rows and not changes:
        raise SettingsError(
            f"--session {session_id!r} is not in {SESSIONS.path(root, source.name)}, and no version that can still be "
            f"read had it: name a session_id of silver.sessions{such_as(sessions)}"
        )
    row = rows[0] if rows else changes[-1]["row"]
    events = row.pop("events")
    files = files_of(opened(root, source, EVENTS), row, [event["event_id"] for event in events])
    gone = {"ingest_file": None, "ingest_ts": None}  # no longer in bronze.events
    runs = {run["run_id"]: run for run in rows_of(opened(root, source, RUNS)).to_table(
        columns=["run_id", "batch", "day"]).to_pylist()}  # fmt: skip
    return {
        "session": {**row, "retired": not rows},
        "events": [{**event, **files.get(event["event_id"], gone)} for event in events],
        "changes": [
            {
                "version": change["version"],
                "time": change["time"],
                "what": change["what"],
                "event_count": change["row"]["event_count"],
                "run_id": change["run_id"],
                **{name: runs.get(change["run_id"], {}).get(name) for name in ("batch", "day")},
            }
            for change in changes
        ],
        "changes_from_version": since,
    }


def opened(root: str, source: Source, table: Table) -> DeltaTable:
    path = rust_uri(table.path(root, source.name))
    if not DeltaTable.is_deltatable(path):
        raise SettingsError(
            f"there is no table at {table.path(root, source.name)}: run python -m jobs run --source {source.name} first"
        )
    return DeltaTable(path)


def such_as(sessions: DeltaTable) -> str:
    """An example of a session's id, for messages; empty where the table has none."""
    some = rows_of(sessions).head(1, columns=["session_id"])["session_id"].to_pylist()
    return f", such as {some[0]}" if some else ""


def changes_of(sessions: DeltaTable, session_id: str) -> tuple[int, list[dict[str, Any]]]:
    """The version from which on the change feed is there, and what it remembers of a session,
    oldest first."""
    since, feed = remembered(sessions, f"session_id = '{session_id.replace(chr(39), chr(39) * 2)}'")
    run_of = {one["version"]: one.get("userMetadata") for one in sessions.history()}
    feed.sort(key=lambda row: row[VERSION])
    return since, [
        {
            "version": row[VERSION],
            "time": row["_commit_timestamp"],
            "what": CHANGES[row[TYPE]],
            "run_id": run_of.get(row[VERSION]),
            "row": {name: row[name] for name in SESSIONS.columns},
        }
        for row in feed
        if row[TYPE] in CHANGES
    ]


def remembered(table: DeltaTable, predicate: str) -> tuple[int, list[dict[str, Any]]]:
    """The change feed from as far back as no VACUUM has reached (`jobs maintain` runs it)."""
    history = table.history()
    cleaned = max(
        (
            one["timestamp"] - int(one["operationParameters"].get("specifiedRetentionMillis") or 0)
            for one in history
            if one["operation"] == "VACUUM START"
        ),
        default=0,
    )
    whole = sorted(one["version"] for one in history if one["timestamp"] > cleaned)
    # `jobs forget` deletes files of older versions, too. Where the feed can be read from some version
    # on, it can be from every later one.
    found: list[dict[str, Any]] = []
    since = table.version() + 1
    low, high = 0, len(whole)
    at = 0  # mostly all can be read
    while low < high:
        rows = _read(table, whole[at], predicate)
        if rows is None:
            low = at + 1
        else:
            since, found, high = whole[at], rows, at
        at = (low + high) // 2
    return since, found


def _read(table: DeltaTable, first: int, predicate: str) -> list[dict[str, Any]] | None:
    """The change feed from a version on; None: files of it are gone."""
    try:
        reader = table.load_cdf(
            starting_version=first, allow_out_of_range=True, predicate=predicate
        )
        rows: list[dict[str, Any]] = pa.table(reader.read_all()).to_pylist()
        return rows
    except Exception as error:  # (the reader is Rust's, and has no class for it)
        if "not found" not in str(error).lower():
            raise
        return None


def files_of(
    events: DeltaTable, session: dict[str, Any], ids: list[str]
) -> dict[str, dict[str, Any]]:
    """From which file, and when, each event came; read from the files of that time only."""
    when = ds.field("event_ts")
    near = rows_of(events).filter((when >= session["start_ts"]) & (when <= session["end_ts"]))
    found = near.to_table(columns=["event_id", "ingest_file", "ingest_ts"])
    found = found.filter(ds.field("event_id").isin(ids))
    return {row.pop("event_id"): row for row in found.to_pylist()}


def in_words(found: dict[str, Any]) -> str:
    """The answer as a person reads it."""

    def clock(moment: datetime | None) -> str:
        return f"{moment:%Y-%m-%d %H:%M:%S}" if moment else "?"

    session = found["session"]
    lines = [
        f"session {session['session_id']} of user {session['user_id']}: {session['event_count']} "
        f"events, {clock(session['start_ts'])} to {clock(session['end_ts'])} UTC"
        + (f", runaway ({session['runaway']})" if session["runaway"] else "")
        + (", retired: no longer in silver.sessions" if session["retired"] else ""),
        "events:",
    ]
    lines += [
        f"  {clock(event['event_ts'])}  {event['item_id']}  {event['event_type'] or '-'}  "
        f"{event['feedback']}  from {event['ingest_file'] or 'a line that is gone'}"
        + (f", read {clock(event['ingest_ts'])}" if event["ingest_ts"] else "")
        for event in found["events"]
    ]
    since = found["changes_from_version"]
    lines.append(
        f"changes (since version {since}: files of earlier ones are gone):" if since else "changes:"
    )
    lines += [
        f"  version {change['version']}, {clock(change['time'])}: {change['what']} "
        f"({counted(change['event_count'], 'event')}) by run {change['run_id'] or '?'}"
        + (f", batch {change['batch']}" if change["batch"] else "")
        + (f", night {change['day']}" if change["day"] else "")
        for change in found["changes"]
    ]
    return "\n".join(lines)
