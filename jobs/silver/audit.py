"""The audit of `sessionize`: of the candidate, and of the sessions that stay around it.

Over the arrays of data files (`jobs/silver/checks.py`); very large candidates, and what those checks
refuse, by the suite in Spark, which names the check.
"""

from __future__ import annotations

import json

import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.audit import arrow_columns, fingerprint_table, fingerprints, spark_checks, suite
from jobs.core import crash_points
from jobs.core.tables import SESSIONS
from jobs.lake import filesystem
from jobs.lake.change_feed import PUT, is_put
from jobs.lake.context import Candidate, Context
from jobs.lake.tasks import run
from jobs.records.boundary import boundary_of
from jobs.silver import checks, cut_nightly
from jobs.silver.boundary_columns import with_boundaries
from jobs.silver.cut_changes import stored_near
from jobs.silver.cut_spark import touched
from jobs.silver.manifest import SessionizeManifest


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored."""
    manifest = candidate.manifest(SessionizeManifest)
    context.decide(manifest.plan)
    if manifest.empty:
        return
    counts = manifest.counts
    facts = facts_by_arrow(context, candidate, manifest)
    if facts is not None:
        suite.audit_certified(context, SESSIONS, counts.rows, facts)
    else:
        engine = context.thresholds.spark(counts.rows, context.lake.rows(SESSIONS))
        context.enter(engine)
        whole = manifest.whole
        facts = (facts_of_all if whole else facts_of_changes)(context, candidate, manifest)
        rows = after_image(context, candidate, manifest)
        suite.audit_candidate(context, SESSIONS, rows, facts, engine)
    crash_points.point("sessionize.audited")


def to_put(context: Context, candidate: Candidate, manifest: SessionizeManifest) -> DataFrame:
    """The sessions that the candidate puts into the table."""
    if manifest.staged is not None:
        return context.lake.staged(SESSIONS, manifest.staged)
    return candidate.part("sessions").where(PUT).select(*SESSIONS.columns)


def after_image(context: Context, candidate: Candidate, manifest: SessionizeManifest) -> DataFrame:
    """The candidate's sessions as they would be in the table, and the untouched sessions around
    them."""
    rule = context.source.sessions
    put = to_put(context, candidate, manifest)
    if manifest.base and not manifest.whole:
        gone = candidate.part("sessions").select("session_id")
        users = (
            candidate.part("sessions")
            .groupBy("user_id")
            .agg(F.min("start_ts").alias("lo"), F.max("end_ts").alias("hi"))
        )
        around = touched(context.lake.read(SESSIONS, manifest.base), users, rule.session_rule)
        rest = around.join(gone, "session_id", "left_anti").select(*SESSIONS.columns)
        put = put.unionByName(rest)
    return with_boundaries(put, context.source)


def facts_of_all(
    context: Context, candidate: Candidate, manifest: SessionizeManifest
) -> dict[str, bool]:
    put = to_put(context, candidate, manifest)
    of = context.lake.session_events()
    events = context.lake.read(of, manifest.upto).select("user_id", "event_id")
    return spark_checks.balance_of_all(put, events)


def facts_of_changes(
    context: Context, candidate: Candidate, manifest: SessionizeManifest
) -> dict[str, bool]:
    put = to_put(context, candidate, manifest)
    ids = put.select(F.explode("events.event_id").alias("event_id"))
    counted = ids.agg(F.count("*"), F.count_distinct("event_id")).first()
    assert counted is not None
    return balance(manifest, counted[0], counted[1])


def balance(manifest: SessionizeManifest, after: int, distinct: int) -> dict[str, bool]:
    """Args: after: how many events the sessions that are put have; distinct: how many ids."""
    moved = manifest.moved
    assert moved is not None
    expected = manifest.counts.events_before + moved.came - moved.gone
    return {"each_event_once": distinct == after, "events_balance": expected == after}


def facts_by_arrow(
    context: Context, candidate: Candidate, manifest: SessionizeManifest
) -> dict[str, bool] | None:
    """What holds of the whole batch, if every check of a session holds of each and a whole table
    has the same events; else None, and where the size asks for Spark."""
    lake, limits = context.lake, context.thresholds
    rule, boundary = context.source.sessions.session_rule, boundary_of(context.source)
    if manifest.counts.rows > limits.compared_sessions and boundary is None:
        return None
    whole, of = manifest.whole, lake.session_events()
    events = lake.rows(of) if whole else manifest.counts.events_after
    spark = context.tasks(limits.tasks(events))
    aside = candidate.path("bounds")
    hold = checks.SessionsHold(rule, aside, boundary)
    paths = candidate.files("sessions")
    if whole:
        paths = [f"{lake.path(SESSIONS)}/{one['path']}" for one in manifest.staged or []]
    held = run(spark, hold, paths, checks.SESSIONS_DDL, "string")
    if not all(one["holds"] for one in held):
        return None
    bounds = [one["bounds"] for one in held if one["bounds"]]
    if not whole:
        bounds += bounds_around(context, candidate, manifest, aside)
    if not checks.sessions_apart(bounds, rule, boundary):
        return None
    filesystem.remove(aside)
    if not whole:
        rows = candidate.arrow("sessions", ["change", "events"])
        rows = rows.filter(is_put(rows))
        ids = pc.struct_field(pc.list_flatten(rows["events"]), "event_id")
        return balance(manifest, len(ids), pc.count_distinct(ids).as_py())
    stored = [one.path for one in lake.files_of(of, manifest.upto)]
    print_of = fingerprints.print_of_events
    printed = run(spark, print_of, stored, fingerprints.PRINT_DDL, "string")
    if arrow_columns.joined(held) != arrow_columns.joined(printed):
        return None  # Spark tells which of the two checks does not hold
    files = ((of, printed), (SESSIONS, held))
    made = ((table, [json.loads(one["file"]) for one in found]) for table, found in files)
    fingerprint_table.keep(context, *made)
    return {"events_balance": True, "each_event_once": True}


def bounds_around(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, folder: str
) -> list[str]:
    """The bounds of the sessions that are near the candidate's and stay as they are."""
    rule, boundary = context.source.sessions.session_rule, boundary_of(context.source)
    rows = candidate.arrow("sessions", list(checks.BOUNDED))
    keys = cut_nightly.keys_of(rows["user_id"], rows["start_ts"], rows["end_ts"])
    fields: tuple[str, ...] = ("source_session_id",) if rule.native else ()
    columns: tuple[str, ...] = checks.BOUNDED
    if boundary is not None:
        fields += (*rule.ties, *boundary.ours)
        columns += boundary.stored
    near = stored_near(
        context, candidate, "around", manifest.base, keys, columns=columns, fields=fields
    )
    ids = rows["session_id"].combine_chunks()
    stay = [one.filter(pc.invert(pc.is_in(one["session_id"], ids))) for one in near]
    return [checks.write_bounds(one, rule, folder, boundary) for one in stay if one.num_rows]
