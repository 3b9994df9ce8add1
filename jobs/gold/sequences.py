"""`silver.sessions` -> `gold.sequences`: one row a user, made anew only where sessions changed.

All sessions that are not runaway, unfiltered; `session_ordinal` is dense over those, from 1; a
user without any has no row. The rows are made by slices of users (`jobs/gold/user_slices.py`).
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import functions as F

from jobs.audit import arrow_columns, suite
from jobs.core import crash_points
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import SettingsError
from jobs.core.tables import EVENTS, ITEMS, SEQUENCES, SESSIONS
from jobs.gold import checks
from jobs.gold.user_slices import (
    GATHERED_DDL,
    WOVEN_DDL,
    Gather,
    Weave,
    edges_of_sessions,
    edges_of_users,
    in_groups,
    slice_count,
)
from jobs.lake import filesystem
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.data_files import staging
from jobs.lake.delta_errors import FeedGone, feed_gone
from jobs.lake.tasks import run


def compute(context: Context) -> Candidate:
    lake = context.lake
    for table, job in ((SESSIONS, "sessionize"), (ITEMS, "items")):
        if lake.version(table) is None:
            raise SettingsError(
                f"{lake.path(table)} is no table: run python -m jobs {job} --source "
                f"{context.source.name} first"
            )
    lake.create(SEQUENCES)
    seen, cut_from = lake.consumed(ITEMS, EVENTS), lake.consumed(SESSIONS, EVENTS)
    if cut_from is not None and (seen is None or seen < cut_from):
        raise SettingsError(
            f"gold.items has read bronze.events up to version {seen}, the sessions up to "
            f"{cut_from}: run python -m jobs items --source {context.source.name} first"
        )
    candidate = context.candidate(SEQUENCES)
    upto, base = lake.version(SESSIONS), lake.version(SEQUENCES)
    after = lake.consumed(SEQUENCES, SESSIONS)
    assert upto is not None and base is not None
    manifest: dict[str, Any] = {
        "base": base, "upto": upto, "items": lake.version(ITEMS), "empty": after == upto,
        "whole": after is None, "notes": [],
    }  # fmt: skip
    if not manifest["empty"]:
        fill(context, candidate, manifest, after)
    candidate.save(manifest)
    crash_points.point("sequences.computed")
    return candidate


def fill(
    context: Context, candidate: Candidate, manifest: dict[str, Any], after: int | None
) -> None:
    """Make the rows, and count.

    All of them where there are none yet, where the change feed is gone, and where most files hold a
    user whose sessions changed: they are put in place of the old ones. Else the changed ones alone.
    """
    lake, upto = context.lake, manifest["upto"]
    many = context.is_many(lake.grown(SESSIONS, after), lake.rows(SESSIONS))
    sessions = lake.files_of(SESSIONS, upto)
    stored = lake.files_of(SEQUENCES, manifest["base"])
    since = None
    if after is not None:
        try:
            since = changed_users(context, candidate, after, upto, many)
        except FeedGone as lost:
            manifest["notes"].append(f"the change feed is gone, sequences are made anew ({lost})")
    if since is not None and not since.num_rows:
        manifest["empty"] = True
        return
    count = slice_count(lake.rows(EVENTS), cores(context, many))
    paths = [one.path for one in (sessions if since is None else stored)]
    edges = (edges_of_sessions if since is None else edges_of_users)(paths, count)
    touched = list(range(len(edges) + 1))
    if since is not None:
        touched = sorted({bisect.bisect_right(edges, one) for one in since["user_id"].to_pylist()})
    most = len(touched) >= MOST * (len(edges) + 1)
    manifest["all"] = since is None or most or context.is_small(SEQUENCES)
    manifest["put_aside"] = bool(stored) and manifest["all"]
    folder = f"{lake.path(SEQUENCES)}/{staging(context.run_id)}"
    if not manifest["all"]:
        folder = candidate.path("change")
    spark = (lambda: context.spark) if many else None
    since_file = None if since is None else candidate.path(SINCE)
    gather = Gather(
        edges=edges, items=tuple(one.path for one in lake.files_of(ITEMS, manifest["items"])),
        folder=candidate.path("gathered"), rule=context.source.sessions.session_rule,
        since=since_file,
    )  # fmt: skip
    earliest = None if since is None else pc.min(since["since_us"]).as_py()
    recent = [one for one in sessions if earliest is None or one.last_us("start_ts") >= earliest]
    groups = in_groups([(one.path, one.rows * EVENTS_A_SESSION) for one in recent])
    gathered = run(spark, gather, groups, GATHERED_DDL, "array<string>")
    weave = Weave(
        edges=edges, gathered=tuple(one["path"] for one in gathered), folder=folder,
        rule=context.source.sessions.session_rule,
        stored=() if since is None else tuple(one.path for one in stored), since=since_file,
        changed_only=not manifest["all"],
    )  # fmt: skip
    numbers = list(range(len(edges) + 1)) if manifest["all"] else touched
    woven = run(spark, weave, numbers, WOVEN_DDL, "int")
    filesystem.remove(candidate.path("gathered"))
    made = [one["path"] for one in woven if one["path"]]
    if manifest["all"]:
        manifest["staged"] = lake.entries(SEQUENCES, folder.rpartition("/")[2], made)
    else:
        gone = [user for one in woven for user in one["gone"] or []]
        write_gone(context, candidate, gone)
    manifest |= {
        "rows": sum(one["rows"] for one in woven), "made": made, "many": many,
        "events": events_of(context, manifest, since, many),
    }  # fmt: skip


MOST = 0.5  # ours: a MERGE that writes more than half of the files costs more than all of them
MOST_CHANGES = 2_000_000  # ours: of so many sessions the users are found in one process
SINCE = "since.parquet"
EVENTS_A_SESSION = 8  # about: only to group files of sessions


def cores(context: Context, many: bool) -> int:
    return int(context.spark.sparkContext.defaultParallelism) if many else 1


def changed_users(
    context: Context, candidate: Candidate, after: int, upto: int, many: bool
) -> pa.Table:
    """The users whose sessions changed, and from when on their rows are new: `user_id, since_us`.

    Under the gap rule that is where their first changed session starts, is or was; native sessions
    may interleave, so all of a user's are taken.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    lake, moved = context.lake, context.lake.grown(SESSIONS, after)
    if many and moved > MOST_CHANGES:
        context.expect(moved, lake.rows(SESSIONS))
        with feed_gone(SESSIONS, after, upto):
            feed = lake.changes(SESSIONS, after, upto)
            first = F.min(F.unix_micros("start_ts")).alias("since_us")
            candidate.write("users", feed.groupBy("user_id").agg(first).coalesce(1))
        found = candidate.arrow("users")
    else:
        feed = lake.changes_few(SESSIONS, after, upto, ["user_id", "start_ts"])
        times = feed["start_ts"].cast(pa.timestamp("us", "UTC")).cast(pa.int64())
        feed = pa.table({"user_id": feed["user_id"], "since_us": times})
        found = feed.group_by("user_id").aggregate([("since_us", "min")])
        found = found.rename_columns(["user_id", "since_us"])
    if context.source.sessions.rule != "gap":
        ever = pa.array([np.iinfo(np.int64).min], pa.int64()).take(
            pa.array(np.zeros(found.num_rows, np.int64))
        )
        found = found.set_column(1, "since_us", ever)
    found = found.sort_by("user_id").combine_chunks()
    filesystem.write_parquet(candidate.path(SINCE), found)
    return found


def events_of(
    context: Context, manifest: dict[str, Any], since: pa.Table | None, many: bool
) -> int:
    """Events of the sessions that the rows are made of: asked of the table, not of the tasks."""
    lake, upto = context.lake, manifest["upto"]
    if many:
        sessions = lake.read(SESSIONS, upto).where("runaway IS NULL")
        if not manifest["all"]:
            users = context.spark.read.parquet(context.candidate(SEQUENCES).path(SINCE))
            users = users.select("user_id")
            sessions = sessions.join(F.broadcast(users), "user_id", "left_semi")
        found = sessions.agg(F.coalesce(F.sum("event_count"), F.lit(0))).first()
        assert found is not None
        return int(found[0])
    rows = lake.table_of(SESSIONS, upto, ["user_id", "event_count", "runaway"])
    rows = rows.filter(pc.is_null(rows["runaway"]))
    if not manifest["all"] and since is not None:
        rows = rows.filter(pc.is_in(rows["user_id"], since["user_id"].combine_chunks()))
    return int(pc.sum(rows["event_count"]).as_py() or 0)


def write_gone(context: Context, candidate: Candidate, users: list[str]) -> None:
    """Add to the changed rows those users who have none any more."""
    schema = arrow_schema(SEQUENCES.columns | {"change": "string"})
    rows = [{"user_id": user, "change": "retired"} for user in users]
    if rows:
        path = candidate.path("change") + "/gone.parquet"
        filesystem.write_parquet(path, pa.Table.from_pylist(rows, schema=schema))
    candidate.adopt("change", f"{SEQUENCES.ddl}, change string")


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored."""
    manifest = candidate.manifest()
    if manifest["empty"]:
        return
    spark = (lambda: context.spark) if manifest["many"] else None
    ddl = checks.SEQUENCES_DDL
    held = run(spark, checks.sequences_hold, manifest["made"], ddl, "string")
    positions = sum(one["positions"] for one in held)
    facts = {"positions_balance": positions == manifest["events"]}
    if all(one["holds"] for one in held) and arrow_columns.apart(held):
        suite.audit_certified(context, SEQUENCES, manifest["rows"], facts)
    else:
        context.expect(manifest["rows"], context.lake.rows(SEQUENCES))
        if manifest["all"]:
            rows = context.lake.staged(SEQUENCES, manifest["staged"])
        else:
            rows = candidate.part("change").where("change <> 'retired'").drop("change")
        suite.audit_candidate(context, SEQUENCES, rows, facts)
    crash_points.point("sequences.audited")


def publish(context: Context, candidate: Candidate) -> Result:
    """Raises: Conflict: another run changed `gold.sequences` since the candidate was computed."""
    lake, manifest = context.lake, candidate.manifest()
    result = Result(
        notes=manifest["notes"],
        tables_in={SESSIONS.full_name: manifest["upto"], ITEMS.full_name: manifest["items"]},
    )
    if not manifest["empty"]:
        consumed, base = lake.app_id(SEQUENCES, SESSIONS), manifest["base"]
        upto = manifest["upto"]
        if manifest["all"]:
            lake.commit(
                SEQUENCES, manifest["staged"], base, consumed, upto, context.run_id,
                overwrite=manifest["put_aside"],
            )  # fmt: skip
        else:
            context.replace_rows(SEQUENCES, candidate, "change", base, consumed, upto)
        crash_points.point("sequences.published")
    result.tables[SEQUENCES.full_name] = lake.told(SEQUENCES)
    return result
