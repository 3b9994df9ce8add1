"""`bronze.events` -> `silver.sessions`: only the sessions around what changed are cut again.

Sessions are a pure function of the set of accepted events: ids come from the user and the
session's first event, one total order everywhere, nothing depends on arrival, files, partitions
or other users. A silence of more than `gap_s` ends a session; exactly `gap_s` does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from expectations.session_rule import SessionRule
from jobs.audit import arrow_columns, spark_checks, suite
from jobs.core import crash_points
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import Conflict, RuleChanged, SettingsError
from jobs.core.plan import (
    Algorithm,
    Plan,
    Publish,
    SessionizeFacts,
    earlier,
    idle,
    sessionize_plan,
    sessions_in_arrow,
)
from jobs.core.tables import EVENTS, SESSIONS
from jobs.lake import filesystem, time_slices
from jobs.lake.change_feed import CHANGES, PUT, SAME, TYPE, VERSION, is_put, only_came
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.data_files import staging
from jobs.lake.delta_errors import FeedGone, feed_gone
from jobs.lake.manifest import Manifest, Staged
from jobs.lake.tasks import run
from jobs.silver import checks, cut_arrow, cut_nightly
from jobs.silver.cut_spark import EVENT_FIELDS, cut, difference, net_changes, recut, spans, touched

RULE_PROPERTY = "sessionmill.rule"


def check_rule(context: Context) -> None:
    """Raises: RuleChanged: the table was made by another rule than the source file's."""
    stored = context.lake.property(SESSIONS, RULE_PROPERTY)
    wanted = context.source.sessions.rule_text()
    if stored is not None and stored != wanted:
        raise RuleChanged(
            f"silver.sessions was made by the rule {stored}, the source file says {wanted}. "
            f"Put the rule back, or make the table anew: python -m jobs sessionize --source "
            f"{context.source.name} --rebuild"
        )


OPTIONS = ("rebuild",)


@dataclass
class Counts:
    """Sessions of the candidate, and events in them."""

    rows: int = 0
    new: int = 0
    changed: int = 0
    retired: int = 0
    merged: int = 0
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
    """The version of `bronze.events` that it read up to."""
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
        kept = Publish.SWAP if old.get("staged") is None else Publish.APPEND
        return earlier("sessionize", Publish.REPLACE if old.get("replace") else kept)


def compute(context: Context, rebuild: bool = False) -> Candidate:
    """Find what changed since the version consumed last and cut around it."""
    lake, rule = context.lake, context.source.sessions
    if lake.version(EVENTS) is None:
        raise SettingsError(
            f"{lake.path(EVENTS)} is no table: run python -m jobs ingest --source "
            f"{context.source.name} first"
        )
    lake.create(SESSIONS, {RULE_PROPERTY: rule.rule_text()})
    if not rebuild:
        check_rule(context)
    candidate = context.candidate(SESSIONS)
    upto, base = lake.version(EVENTS), lake.version(SESSIONS)
    assert upto is not None and base is not None
    after = None if rebuild else lake.consumed(SESSIONS, EVENTS)
    manifest = SessionizeManifest(idle("sessionize"), base, upto)
    facts = SessionizeFacts(
        gap_rule=rule.rule == "gap", events=lake.rows(EVENTS), grown=lake.grown(EVENTS, after),
        whole=after is None, replaces=rebuild or after is not None or lake.rows(SESSIONS) > 0,
    )  # fmt: skip
    if after is not None and after < upto:
        try:
            cut_changes(context, candidate, manifest, facts, after)
        except FeedGone as gone:
            manifest.notes.append(f"the change feed is gone, sessions are made anew ({gone})")
            facts = replace(facts, whole=True)
    elif after is not None:
        manifest.empty = True
    if facts.whole:
        cut_all(context, manifest, facts, rebuild)
    context.decide(manifest.plan)
    candidate.save(manifest)
    crash_points.point("sessionize.computed")
    return candidate


def cut_all(
    context: Context, manifest: SessionizeManifest, facts: SessionizeFacts, rebuild: bool
) -> None:
    """Make all sessions anew."""
    manifest.whole, manifest.plan = True, sessionize_plan(facts, context.thresholds)
    context.decide(manifest.plan)
    context.enter(manifest.plan.engine)
    whole = cut_by_slices if manifest.plan.path is Algorithm.CUT_SLICES else cut_by_users
    manifest.staged = whole(context, manifest.upto)
    count_whole(context, manifest)
    if manifest.counts.rows == 0 and not rebuild:
        manifest.empty, manifest.plan = True, idle("sessionize")


def cut_changes(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, facts: SessionizeFacts,
    after: int,
) -> None:  # fmt: skip
    """Cut around what changed: in Arrow where it can be, else in Spark.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    lake, upto, came = context.lake, manifest.upto, None
    plan = sessionize_plan(facts, context.thresholds)
    if plan.path is Algorithm.RECUT_ARROW:
        came = lake.changes_few(EVENTS, after, upto, ["user_id", *EVENT_FIELDS, TYPE, VERSION])
        facts = replace(facts, only_inserts=only_came(came))
        plan = sessionize_plan(facts, context.thresholds)
    manifest.plan = plan
    context.decide(plan)
    rows: pa.Table | DataFrame | None
    if came is not None and plan.path is Algorithm.RECUT_ARROW:
        rows = cut_in_arrow(context, candidate, manifest, came)
    else:
        rows = cut_in_spark(context, candidate, manifest, after)
    if rows is None:
        manifest.empty, manifest.plan = True, idle("sessionize")
        return
    opens = manifest.counts.rows == manifest.counts.new
    manifest.plan = sessionize_plan(replace(facts, only_opens=opens), context.thresholds)
    if manifest.plan.publish is Publish.APPEND:
        manifest.staged = stage_sessions(context, rows)


def stage_sessions(context: Context, rows: pa.Table | DataFrame) -> Staged:
    """Put the candidate's sessions, which are all new, where they will stay."""
    lake = context.lake
    if isinstance(rows, DataFrame):
        return lake.stage(SESSIONS, rows, context.run_id)
    folder = staging(context.run_id)
    rows = rows.select(list(SESSIONS.columns))
    filesystem.write_parquet(f"{lake.path(SESSIONS)}/{folder}/part-0.parquet", rows)
    return lake.entries(SESSIONS, folder)


def cut_in_spark(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, after: int
) -> DataFrame | None:
    """`cut_changes` under any rule, and where events went, too: the rows that change, counted; None
    if no event did.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    lake, rule, upto = context.lake, context.source.sessions, manifest.upto
    context.enter(manifest.plan.engine)
    with feed_gone(EVENTS, after, upto):
        changes = candidate.write("changes", net_changes(lake.changes(EVENTS, after, upto)))
    if changes.isEmpty():
        return None
    moved = changes.agg(F.count("came").alias("came"), F.count("gone").alias("gone")).first()
    assert moved is not None
    manifest.moved = Moved(moved["came"], moved["gone"])
    changed = candidate.write("spans", spans(changes))
    old = touched(lake.read(SESSIONS, manifest.base), changed, rule.session_rule)
    old = candidate.write("old", old.select(*SESSIONS.columns))
    new = recut(old, changes, rule.session_rule)
    rows = difference(old, new).where(F.col("change") != SAME)
    return fill(candidate, manifest, rows.repartition(1))


def cut_in_arrow(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, came: pa.Table
) -> pa.Table | None:
    """`cut_changes` where events only came, under the gap rule (`jobs/silver/cut_nightly.py`): the
    rows that change, counted; None if no event came."""
    rule = context.source.sessions
    if not came.num_rows:
        return None
    # Each event for itself: between two of one user's events may lie weeks of sessions.
    keys = cut_nightly.spans_of(came["user_id"], came["event_ts"], came["event_ts"])
    filesystem.write_parquet(candidate.path("near-changes.parquet"), keys)
    near = cut_nightly.Near(
        candidate.path("near-changes.parquet"), rule.session_rule, candidate.path("old")
    )
    found = run_near(context, near, manifest.base, keys, cut_nightly.NEAR_DDL)
    old = pa.concat_tables(
        [
            arrow_schema(SESSIONS.columns).empty_table(),
            *(filesystem.read_parquet(one["path"]) for one in found),
        ]
    )
    changed = cut_nightly.recut(old, came, cut_of(rule.session_rule))
    manifest.counts = Counts(**cut_nightly.counted(changed))
    manifest.moved = Moved(came.num_rows, 0)
    filesystem.write_parquet(candidate.path("sessions") + "/part-0.parquet", changed)
    candidate.adopt("sessions", cut_nightly.CHANGE_DDL)
    return changed


def cut_of(rule: SessionRule) -> cut_arrow.Cut:
    return cut_arrow.Cut(
        rule=rule, fields=EVENT_FIELDS, events=EVENTS.columns, sessions=SESSIONS.columns
    )


def run_near(
    context: Context, task: Any, base: int, keys: pa.Table, ddl: str
) -> list[dict[str, Any]]:
    """A task over the files of `silver.sessions` whose times come near those of `keys`."""
    rule = context.source.sessions.session_rule
    if not keys.num_rows:
        return []
    first, last = rule.arrays.reach(pc.min(keys["lo"]).as_py(), pc.max(keys["hi"]).as_py())
    stored = context.lake.files_of(SESSIONS, base)
    near = [one for one in stored if one.first_us("start_ts") <= last]
    near = [one for one in near if one.last_us("end_ts") >= first]
    spark = context.tasks(context.thresholds.tasks(sum(one.rows for one in near)))
    return run(spark, task, [one.path for one in near], ddl, "string")


def cut_by_users(context: Context, upto: int) -> list[dict[str, Any]]:
    """Stage all sessions anew, under any rule: all events of a user in one place."""
    events = context.lake.read(EVENTS, upto).select("user_id", *EVENT_FIELDS)
    bounds = time_slices.bounds(events, "event_ts", context.spark.sparkContext.defaultParallelism)
    events = events.withColumn("old_session_id", F.lit(None).cast("string"))
    rows = time_slices.by_time(
        cut(events, context.source.sessions.session_rule), "start_ts", bounds
    )
    rows = rows.sortWithinPartitions(*SESSIONS.order)
    return context.lake.stage(SESSIONS, rows, context.run_id)


def cut_by_slices(context: Context, upto: int) -> list[dict[str, Any]]:
    """Stage all sessions anew, under the gap rule: see `jobs/lake/time_slices.py`."""
    lake, rule, spark = context.lake, context.source.sessions, context.spark
    known = time_slices.extents(lake.file_uris(EVENTS, upto))
    size = context.thresholds.slice_size(
        sum(rows for *_, rows in known), spark.sparkContext.defaultParallelism
    )
    how = cut_of(rule.session_rule)
    folder = staging(context.run_id)
    aside = f"{context.candidate(SESSIONS).folder}/{cut_arrow.SPARE}"
    work = cut_arrow.worker(how, f"{lake.path(SESSIONS)}/{folder}", aside)

    def cut_slices(todo: list[tuple[int | None, int | None, list[str]]]) -> list[Any]:
        return time_slices.frame(spark, todo).mapInArrow(work, cut_arrow.REPORT_DDL).collect()

    done = cut_slices(time_slices.slices(known, size)) if known else []
    spare = [one["spare"] for one in done if one["spare"]]
    done += cut_slices([(None, None, spare)]) if spare else []
    return lake.entries(SESSIONS, folder, [one["path"] for one in done])


def fill(candidate: Candidate, manifest: SessionizeManifest, rows: DataFrame) -> DataFrame:
    """Write the rows that change, each partition laid out by start, and count them."""
    written = candidate.write("sessions", rows.sortWithinPartitions(*SESSIONS.order))
    put = F.expr(PUT)
    counted = written.agg(
        F.count("*").alias("rows"),
        *(F.count_if(F.col("change") == one).alias(one) for one in CHANGES),
        F.count_if(put & F.col("merged")).alias("merged"),
        F.count_if(put & F.col("runaway").isNotNull()).alias("runaways"),
        F.coalesce(F.sum(F.when(put, F.col("event_count"))), F.lit(0)).alias("events_after"),
        F.coalesce(F.sum("old_event_count"), F.lit(0)).alias("events_before"),
        F.min(F.unix_micros(F.least("start_ts", "_start_ts"))).alias("lo_us"),
        F.max(F.unix_micros(F.greatest("start_ts", "_start_ts"))).alias("hi_us"),
    ).first()
    assert counted is not None
    manifest.counts = Counts(**counted.asDict())
    return written


def count_whole(context: Context, manifest: SessionizeManifest) -> None:
    """Count all sessions, staged where they will stay, and what differs from the table."""
    lake, staged = context.lake, manifest.staged or []
    new = lake.staged(SESSIONS, staged)
    counted = new.agg(F.coalesce(F.sum("event_count"), F.lit(0)), F.count("runaway")).first()
    assert counted is not None
    number = sum(one["rows"] for one in staged)
    counts = Counts(rows=number, new=number, runaways=counted[1], events_after=counted[0])
    if manifest.plan.publish is Publish.REPLACE:
        counts = replace(counts, **compared(lake.read(SESSIONS, manifest.base), new))
    manifest.counts = counts


def compared(old: DataFrame, new: DataFrame) -> dict[str, int]:
    """How many sessions are `new`, `changed`, `retired`; and `runaways` among new and changed."""
    digest = F.xxhash64("start_ts", "end_ts", "runaway", "events").alias("digest")
    before = old.select("session_id", digest.alias("old_digest"))
    both = new.select("session_id", "runaway", digest).join(before, "session_id", "full_outer")
    is_new, is_gone = F.col("old_digest").isNull(), F.col("digest").isNull()
    differs = ~is_new & ~is_gone & (F.col("digest") != F.col("old_digest"))
    counted = both.agg(
        F.count_if(is_new).alias("new"), F.count_if(is_gone).alias("retired"),
        F.count_if(differs).alias("changed"),
        F.count_if((is_new | differs) & F.col("runaway").isNotNull()).alias("runaways"),
    ).first()  # fmt: skip
    assert counted is not None
    return counted.asDict()


def to_put(context: Context, candidate: Candidate, manifest: SessionizeManifest) -> DataFrame:
    """The sessions that the candidate puts into the table."""
    if manifest.staged is not None:
        return context.lake.staged(SESSIONS, manifest.staged)
    return candidate.part("sessions").where(PUT).select(*SESSIONS.columns)


def after_image(context: Context, candidate: Candidate, manifest: SessionizeManifest) -> DataFrame:
    """The candidate's sessions as they would stand in the table, and the untouched sessions around
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
    return put


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


def facts_of_all(
    context: Context, candidate: Candidate, manifest: SessionizeManifest
) -> dict[str, bool]:
    put = to_put(context, candidate, manifest)
    events = context.lake.read(EVENTS, manifest.upto).select("user_id", "event_id")
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
    has the same events; else None, and where the rule or the size asks for Spark."""
    lake, rule, limits = context.lake, context.source.sessions, context.thresholds
    if not sessions_in_arrow(rule.rule == "gap", manifest.counts.rows, limits):
        return None
    whole = manifest.whole
    events = lake.rows(EVENTS) if whole else manifest.counts.events_after
    spark = context.tasks(limits.tasks(events))
    aside = candidate.path("bounds")
    hold = checks.SessionsHold(rule.session_rule, aside)
    paths = candidate.files("sessions")
    if whole:
        paths = [f"{lake.path(SESSIONS)}/{one['path']}" for one in manifest.staged or []]
    held = run(spark, hold, paths, checks.SESSIONS_DDL, "string")
    if not all(one["holds"] for one in held):
        return None
    bounds = [one["bounds"] for one in held if one["bounds"]]
    if not whole:
        bounds += bounds_around(context, candidate, manifest, aside)
    if not checks.sessions_apart(bounds, rule.session_rule):
        return None
    filesystem.remove(aside)
    if not whole:
        rows = candidate.arrow("sessions", ["change", "events"])
        rows = rows.filter(is_put(rows))
        ids = pc.struct_field(pc.list_flatten(rows["events"]), "event_id")
        return balance(manifest, len(ids), pc.count_distinct(ids).as_py())
    stored = [one.path for one in lake.files_of(EVENTS, manifest.upto)]
    printed = run(spark, arrow_columns.print_of_events, stored, arrow_columns.PRINT_DDL, "string")
    if arrow_columns.joined(held) != arrow_columns.joined(printed):
        return None  # Spark tells which of the two checks does not hold
    return {"events_balance": True, "each_event_once": True}


def bounds_around(
    context: Context, candidate: Candidate, manifest: SessionizeManifest, folder: str
) -> list[str]:
    """The bounds of the sessions that stand near the candidate's and stay as they are."""
    rows = candidate.arrow("sessions", ["session_id", "user_id", "start_ts", "end_ts"])
    filesystem.write_parquet(candidate.path("ids.parquet"), rows.select(["session_id"]))
    keys = cut_nightly.keys_of(rows["user_id"], rows["start_ts"], rows["end_ts"])
    filesystem.write_parquet(candidate.path("near.parquet"), keys)
    around = checks.Around(
        candidate.path("near.parquet"), candidate.path("ids.parquet"),
        context.source.sessions.session_rule, folder,
    )  # fmt: skip
    done = run_near(context, around, manifest.base, keys, "bounds string")
    return [one["bounds"] for one in done]


def change(context: Context, candidate: Candidate, manifest: SessionizeManifest) -> None:
    """New, changed and retired sessions in one commit.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
    """
    lake, counts = context.lake, manifest.counts
    assert counts.lo_us is not None and counts.hi_us is not None
    context.replace_rows(
        SESSIONS, candidate, "sessions", manifest.base, lake.app_id(SESSIONS, EVENTS),
        manifest.upto, within=(counts.lo_us, counts.hi_us),
    )  # fmt: skip


def replace_all(context: Context, manifest: SessionizeManifest) -> None:
    """All sessions anew, and the rule that made them, in one commit.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
    """
    lake, base, staged = context.lake, manifest.base, manifest.staged or []
    consumed, rule = lake.app_id(SESSIONS, EVENTS), context.source.sessions.rule_text()
    if lake.property(SESSIONS, RULE_PROPERTY) == rule:
        lake.commit(SESSIONS, staged, base, consumed, manifest.upto, context.run_id, overwrite=True)
        return
    if lake.changed_rows(SESSIONS, base):
        raise Conflict(f"silver.sessions was changed by another run since version {base}")
    context.enter(manifest.plan.engine)
    rows = lake.staged(SESSIONS, staged)
    with lake.transaction(SESSIONS, consumed, manifest.upto, context.run_id):
        lake.replace(SESSIONS, rows, {RULE_PROPERTY: rule})


def publish(context: Context, candidate: Candidate) -> Result:
    """One commit replaces whatever the changes touched, and says up to where it read.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
    """
    lake, manifest = context.lake, candidate.manifest(SessionizeManifest)
    context.decide(manifest.plan)
    result = Result(notes=manifest.notes, tables_in={EVENTS.full_name: manifest.upto})
    if not manifest.empty:
        counts, consumed = manifest.counts, lake.app_id(SESSIONS, EVENTS)
        if manifest.plan.publish is Publish.REPLACE:
            replace_all(context, manifest)
        elif manifest.plan.publish is Publish.APPEND:
            staged, base = manifest.staged or [], manifest.base
            lake.commit(SESSIONS, staged, base, consumed, manifest.upto, context.run_id)
        else:
            change(context, candidate, manifest)
        crash_points.point("sessionize.published")
        result.sessions_new, result.sessions_changed = counts.new, counts.changed
        result.sessions_retired, result.sessions_merged = counts.retired, counts.merged
        result.runaways = counts.runaways
    result.tables[SESSIONS.full_name] = lake.told(SESSIONS)
    return result
