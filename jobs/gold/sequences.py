"""`silver.sessions` -> `gold.sequences`: one row a user, made anew only where sessions changed.

All sessions that are not runaway, unfiltered; `session_ordinal` is dense over those, from 1; a
user without any has no row. The rows are made by slices of users (`jobs/gold/user_slices.py`).
"""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import functions as F

from jobs.audit import arrow_columns, balance, fingerprint_table, suite
from jobs.core import crash_points
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import SettingsError
from jobs.core.plan import (
    Algorithm,
    Engine,
    Plan,
    Publish,
    SequencesFacts,
    changed_users_engine,
    earlier,
    idle,
    sequences_plan,
)
from jobs.core.tables import EVENTS, ITEMS, NUMBERING, SEQUENCES, SESSIONS
from jobs.gold import checks
from jobs.gold.user_slices import (
    GATHERED_DDL,
    WOVEN_DDL,
    Edges,
    Gather,
    Weave,
    edges_of_sessions,
    edges_of_users,
    in_groups,
)
from jobs.lake import filesystem, foreign, foreign_columns
from jobs.lake.change_feed import PUT, RETIRED
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.data_files import DataFile, staging
from jobs.lake.delta_errors import FeedGone, feed_gone
from jobs.lake.manifest import Manifest, Staged
from jobs.lake.tasks import run


@dataclass
class SequencesManifest(Manifest):
    """What the steps of `sequences` tell each other."""

    base: int
    """The version of `gold.sequences` that the candidate was computed from."""
    upto: int
    """The version of `silver.sessions` that it read up to."""
    items: int
    """The version of `gold.items` that numbers its items."""
    empty: bool = False
    """Whether there is nothing to publish."""
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    events: int = 0
    """Events of the sessions that the rows were made of, where these are some users' only."""
    made: list[str] = field(default_factory=list)
    """The files of the rows."""
    staged: Staged | None = None
    """All rows; changed ones alone are the candidate's part `change`."""
    numbering: str | None = None
    """Which numbers `gold.items` gives, where they had to be given anew."""

    @staticmethod
    def plan_of_old(old: dict[str, Any]) -> Plan:
        if old["empty"]:
            return idle("sequences")
        if not old["all"]:
            plan = earlier("sequences", Publish.MERGE)
        else:
            plan = earlier("sequences", Publish.REPLACE if old["put_aside"] else Publish.APPEND)
        return plan if old["many"] else replace(plan, engine=Engine.HERE)


OPTIONS = ("rebuild",)


def compute(context: Context, rebuild: bool = False) -> Candidate:
    """Find the users whose sessions changed since the version consumed last, and make their rows.

    Args:
        rebuild: make all rows anew, whatever there is.

    Raises:
        AuditFailed: the stored rows do not have the events of the sessions that they were made from.
    """
    lake = context.lake
    for table, job in ((SESSIONS, "sessionize"), (ITEMS, "items")):
        if lake.version(table) is None:
            raise SettingsError(
                f"there is no table at {lake.path(table)}: run python -m jobs {job} --source "
                f"{context.source.name} first"
            )
    foreign.make_ready(context, SESSIONS, ITEMS, SEQUENCES)
    foreign.refuse_changed_input(context, SESSIONS, ITEMS)
    lake.create(SEQUENCES)
    seen, cut_from = lake.consumed(ITEMS, EVENTS), lake.sessions_cut_from()
    if cut_from is not None and (seen is None or seen < cut_from):
        raise SettingsError(
            f"gold.items has read bronze.events up to version {seen}, the sessions up to "
            f"{cut_from}: run python -m jobs items --source {context.source.name} first"
        )
    candidate = context.candidate(SEQUENCES)
    upto, base = lake.version(SESSIONS), lake.version(SEQUENCES)
    assert upto is not None and base is not None
    items = lake.version(ITEMS)
    assert items is not None
    manifest = SequencesManifest(idle("sequences"), base, upto, items)
    anew, manifest.notes = foreign.to_make_anew(context, SEQUENCES, SESSIONS, upto)
    manifest.numbering = lake.property(ITEMS, NUMBERING)
    if manifest.numbering != lake.property(SEQUENCES, NUMBERING):
        anew = True
        manifest.notes.append("item_index of gold.items was renumbered: gold.sequences was rebuilt")
    anew = anew or rebuild
    if not anew:  # (what is woven continues the rows that are there)
        manifest.notes += balance.hold(context, SEQUENCES)
    after = None if anew else lake.consumed(SEQUENCES, SESSIONS)
    manifest.empty = after == upto
    if not manifest.empty:
        fill(context, candidate, manifest, after)
    context.decide(manifest.plan)
    candidate.save(manifest)
    crash_points.point("sequences.computed")
    return candidate


SINCE = "since.parquet"
EVENTS_A_SESSION = 8  # about: only to group files of sessions


def fill(
    context: Context, candidate: Candidate, manifest: SequencesManifest, after: int | None
) -> None:
    """Make the rows, and count.

    All of them where there are none yet, where the change feed is gone, and where most files hold a
    user whose sessions changed: they are put in place of the old ones. Else the changed ones alone.
    """
    lake = context.lake
    stored = lake.files_of(SEQUENCES, manifest.base)
    facts = SequencesFacts(
        sessions=lake.rows(SESSIONS),
        grown=lake.grown(SESSIONS, after),
        whole=after is None,
        stored=bool(stored),
        size=lake.bytes(SEQUENCES),
    )
    since = None
    if after is not None:
        try:
            since = changed_users(context, candidate, facts, after, manifest.upto)
        except FeedGone as lost:
            manifest.notes.append(f"the change feed is gone, sequences are made anew ({lost})")
            facts = replace(facts, whole=True)
    if since is not None and not since.num_rows:
        manifest.empty = True
        return
    slices = slices_of(context, manifest, facts, stored, since)
    if since is not None:
        facts = replace(facts, share=len(slices.touched) / slices.count)
    manifest.plan = sequences_plan(facts, context.thresholds)
    context.decide(manifest.plan)
    weave(context, candidate, manifest, slices, stored, since)
    if manifest.staged is None and since is not None:
        manifest.events = events_of(context, manifest, since)


@dataclass(frozen=True)
class Slices:
    """Slices of users, by number from 0."""

    edges: Edges
    touched: list[int]
    """Those with a user whose sessions changed."""

    @property
    def count(self) -> int:
        return len(self.edges) + 1


def slices_of(
    context: Context,
    manifest: SequencesManifest,
    facts: SequencesFacts,
    stored: list[DataFile],
    since: pa.Table | None,
) -> Slices:
    """Slices of about equal size, by the stored rows, or by the sessions where all are read."""
    lake, limits = context.lake, context.thresholds
    positions, many = lake.rows(EVENTS), sequences_plan(facts, limits).engine is not Engine.HERE
    cores = int(context.spark.sparkContext.defaultParallelism) if many else 1
    count = max(1, positions // limits.slice_size(positions, cores))
    if since is None:
        sessions = lake.files_of(SESSIONS, manifest.upto)
        edges = edges_of_sessions([one.path for one in sessions], count)
        return Slices(edges, list(range(len(edges) + 1)))
    edges = edges_of_users([one.path for one in stored], count)
    users = since["user_id"].to_pylist()
    return Slices(edges, sorted({bisect.bisect_right(edges, one) for one in users}))


def weave(
    context: Context, candidate: Candidate, manifest: SequencesManifest, slices: Slices,
    stored: list[DataFile], since: pa.Table | None,
) -> None:  # fmt: skip
    """Write the rows: those of all slices where they will stay, or the changed ones beside."""
    lake, plan = context.lake, manifest.plan
    spark, changed = context.tasks(plan.engine), plan.path is Algorithm.WEAVE_CHANGED
    since_file = None if since is None else candidate.path(SINCE)
    folder = f"{lake.path(SEQUENCES)}/{staging(context.run_id)}"
    if changed:
        folder = candidate.path("change")
    gather = Gather(
        edges=slices.edges,
        items=tuple(one.path for one in lake.files_of(ITEMS, manifest.items)),
        folder=candidate.path("gathered"),
        rule=context.source.sessions.session_rule,
        since=since_file,
    )
    earliest = None if since is None else pc.min(since["since_us"]).as_py()
    recent = [
        (one.path, one.rows * EVENTS_A_SESSION)
        for one in lake.files_of(SESSIONS, manifest.upto)
        if earliest is None or one.last_us("start_ts") >= earliest
    ]
    groups = in_groups(recent, context.thresholds.slice_events)
    gathered = run(spark, gather, groups, GATHERED_DDL, "array<string>")
    task = Weave(
        edges=slices.edges,
        gathered=tuple(one["path"] for one in gathered),
        folder=folder,
        rule=context.source.sessions.session_rule,
        stored=() if since is None else tuple(one.path for one in stored),
        since=since_file,
        changed_only=changed,
    )
    woven = run(
        spark, task, slices.touched if changed else list(range(slices.count)), WOVEN_DDL, "int"
    )
    filesystem.remove(candidate.path("gathered"))
    manifest.rows = sum(one["rows"] for one in woven)
    manifest.made = [one["path"] for one in woven if one["path"]]
    if changed:
        write_gone(candidate, [user for one in woven for user in one["gone"] or []])
    else:
        manifest.staged = lake.entries(SEQUENCES, folder.rpartition("/")[2], manifest.made)


def changed_users(
    context: Context, candidate: Candidate, facts: SequencesFacts, after: int, upto: int
) -> pa.Table:
    """The users whose sessions changed, and from when on their rows are new: `user_id, since_us`.

    Under the gap rule that is where their first changed session starts, is or was; native sessions
    may interleave, so all of a user's are taken.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    lake, engine = context.lake, changed_users_engine(facts, context.thresholds)
    if engine is not Engine.HERE:
        context.enter(engine)
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
    if not context.source.sessions.session_rule.apart_in_time:
        ever = pa.array([np.iinfo(np.int64).min], pa.int64()).take(
            pa.array(np.zeros(found.num_rows, np.int64))
        )
        found = found.set_column(1, "since_us", ever)
    found = found.sort_by("user_id").combine_chunks()
    filesystem.write_parquet(candidate.path(SINCE), found)
    return found


def events_of(context: Context, manifest: SequencesManifest, since: pa.Table) -> int:
    """Events of the sessions of the users who changed: asked of the table, not of the tasks. (Of all
    users the fingerprints tell.)"""
    lake, upto, plan = context.lake, manifest.upto, manifest.plan
    if plan.engine is not Engine.HERE:
        spark = context.enter(plan.engine)
        sessions = lake.read(SESSIONS, upto).where("runaway IS NULL")
        users = spark.read.parquet(context.candidate(SEQUENCES).path(SINCE)).select("user_id")
        sessions = sessions.join(F.broadcast(users), "user_id", "left_semi")
        found = sessions.agg(F.coalesce(F.sum("event_count"), F.lit(0))).first()
        assert found is not None
        return int(found[0])
    rows = lake.table_of(SESSIONS, upto, ["user_id", "event_count", "runaway"])
    rows = rows.filter(pc.is_null(rows["runaway"]))
    rows = rows.filter(pc.is_in(rows["user_id"], since["user_id"].combine_chunks()))
    return int(pc.sum(rows["event_count"]).as_py() or 0)


def write_gone(candidate: Candidate, users: list[str]) -> None:
    """Add to the changed rows those users who have none any more."""
    schema = arrow_schema(SEQUENCES.columns | {"change": "string"})
    rows = [{"user_id": user, "change": RETIRED} for user in users]
    if rows:
        path = candidate.path("change") + "/gone.parquet"
        filesystem.write_parquet(path, pa.Table.from_pylist(rows, schema=schema))
    candidate.adopt("change", f"{SEQUENCES.ddl}, change string")


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored."""
    lake, manifest = context.lake, candidate.manifest(SequencesManifest)
    context.decide(manifest.plan)
    if manifest.empty:
        return
    spark, ddl = context.tasks(manifest.plan.engine), checks.SEQUENCES_DDL
    held = run(spark, checks.sequences_hold, manifest.made, ddl, "string")
    files = [json.loads(one["file"]) for one in held]
    if manifest.staged is not None:
        fingerprint_table.keep(context, (SEQUENCES, files))
        balanced = balance.has_sessions_events(context, manifest.upto, files)
    else:
        balanced = sum(one["positions"] for one in held) == manifest.events
    facts = {"positions_balance": balanced}
    if all(one["holds"] for one in held) and arrow_columns.apart(held):
        suite.audit_certified(context, SEQUENCES, manifest.rows, facts)
    else:
        engine = context.thresholds.spark(manifest.rows, lake.rows(SEQUENCES))
        context.enter(engine)
        if manifest.staged is not None:
            rows = lake.staged(SEQUENCES, manifest.staged)
        else:
            rows = candidate.part("change").where(PUT).drop("change")
        suite.audit_candidate(context, SEQUENCES, rows, facts, engine)
    crash_points.point("sequences.audited")


def publish(context: Context, candidate: Candidate) -> Result:
    """Raises:
    Conflict: another run changed `gold.sequences` since the candidate was computed.
    AuditFailed: what is published does not have the events of `silver.sessions`.
    """
    lake, manifest = context.lake, candidate.manifest(SequencesManifest)
    context.decide(manifest.plan)
    base, upto, items = manifest.base, manifest.upto, manifest.items
    tables_in = {SESSIONS.full_name: upto, ITEMS.full_name: items}
    result = Result(notes=manifest.notes, tables_in=tables_in)
    if not manifest.empty:
        consumed = lake.app_id(SEQUENCES, SESSIONS)
        if manifest.staged is not None and manifest.plan.publish is Publish.REPLACE:
            staged = manifest.staged
            foreign_columns.replace_rows(context, SEQUENCES, staged, base, consumed, upto)
        elif manifest.staged is not None:
            lake.commit(SEQUENCES, manifest.staged, base, consumed, upto, context.run_id)
        else:
            context.upsert(SEQUENCES, candidate, "change", base, consumed, upto)
        if manifest.numbering and manifest.numbering != lake.property(SEQUENCES, NUMBERING):
            lake.set_property(SEQUENCES, NUMBERING, manifest.numbering)
        crash_points.point("sequences.published")
    foreign.answer(context, SEQUENCES, SESSIONS)
    if not manifest.empty:
        result.notes += balance.hold(context, SEQUENCES)
    result.tables[SEQUENCES.full_name] = lake.told(SEQUENCES)
    return result
