"""`bronze.events` -> `silver.sessions`: only the sessions around what changed are cut again.

Sessions are a pure function of the set of accepted events: ids come from the user and the
session's first event, one total order everywhere, nothing depends on arrival, files, partitions
or other users. A silence of more than `gap_s` ends a session; exactly `gap_s` does not.
"""

from __future__ import annotations

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
from jobs.core.tables import EVENTS, SESSIONS
from jobs.lake import filesystem, time_slices
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.data_files import staging
from jobs.lake.delta_errors import FeedGone, feed_gone
from jobs.lake.tasks import run
from jobs.silver import checks, cut_arrow, cut_nightly
from jobs.silver.cut_arrow import EVENT_FIELDS
from jobs.silver.cut_spark import cut, net_changes, recut, spans, touched

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
    manifest: dict[str, Any] = {
        "batch": context.batch, "base": base, "upto": upto, "after": after, "empty": False,
        "whole": after is None, "counts": {}, "notes": [],
    }  # fmt: skip
    if after is not None and after < upto:
        try:
            cut_changes(context, candidate, manifest)
        except FeedGone as gone:
            manifest["notes"].append(f"the change feed is gone, sessions are made anew ({gone})")
            manifest["whole"] = True
    elif after is not None:
        manifest["empty"] = True
    if manifest["whole"]:
        context.expect(lake.rows(EVENTS))
        known = lake.rows(SESSIONS) > 0 or manifest["after"] is not None
        manifest["replace"] = rebuild or known
        whole = cut_by_slices if rule.rule == "gap" else cut_by_users
        manifest["staged"] = whole(context, upto)
        count_whole(context, manifest)
        manifest["empty"] = manifest["counts"]["rows"] == 0 and not rebuild
    candidate.save(manifest)
    crash_points.point("sessionize.computed")
    return candidate


def cut_changes(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> None:
    """Cut around what changed: in one process, or by slices of users in Spark.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    lake, rule, after = context.lake, context.source.sessions, manifest["after"]
    upto, base = manifest["upto"], manifest["base"]
    if lake.grown(EVENTS, after) <= cut_nightly.MOST_EVENTS:
        feed = lake.changes_few(
            EVENTS, after, upto, ["user_id", *EVENT_FIELDS, "_change_type", "_commit_version"]
        )
        cut_in_arrow(context, candidate, manifest, feed)
        return
    context.expect(lake.grown(EVENTS, after), lake.rows(EVENTS))
    with feed_gone(EVENTS, after, upto):
        changes = candidate.write("changes", net_changes(lake.changes(EVENTS, after, upto)))
    if changes.isEmpty():
        manifest["empty"] = True
        return
    moved = changes.agg(F.count("came").alias("came"), F.count("gone").alias("gone")).first()
    assert moved is not None
    manifest["moved"] = moved.asDict()
    changed = candidate.write("spans", spans(changes))
    old = touched(lake.read(SESSIONS, base), changed, rule.session_rule)
    old = candidate.write("old", old.select(*SESSIONS.columns))
    rows = recut(old, changes, cut_of(rule.session_rule), slices_of(context, changes.count()))
    fill(context, candidate, manifest, rows.repartition(1))


def cut_in_arrow(
    context: Context, candidate: Candidate, manifest: dict[str, Any], feed: pa.Table
) -> None:
    """`cut_changes` in one process: `jobs/silver/cut_nightly.py`."""
    lake, rule = context.lake, context.source.sessions
    if not feed.num_rows:
        manifest["empty"] = True
        return
    gone, came = cut_nightly.net(feed)
    moved = pa.concat_tables([gone, came]).select(["user_id", "event_ts"])
    places = moved["user_id"], moved["event_ts"], moved["event_ts"]
    if rule.session_rule.native:
        keys = cut_nightly.keys_of(*places)
        filesystem.write_parquet(candidate.path("changed.parquet"), keys)
        edges = cut_nightly.Edges(candidate.path("changed.parquet"), candidate.path("edges"))
        stored = lake.files_of(SESSIONS, manifest["base"])
        spark = (lambda: context.spark) if context.is_many(lake.rows(SESSIONS)) else None
        done = run(spark, edges, [one.path for one in stored], cut_nightly.NEAR_DDL, "string")
        keys = cut_nightly.widened(keys, [filesystem.read_parquet(one["path"]) for one in done])
    else:  # each event for itself: between two of one user's events may lie weeks of sessions
        keys = cut_nightly.spans_of(*places)
    filesystem.write_parquet(candidate.path("near-changes.parquet"), keys)
    near = cut_nightly.Near(
        candidate.path("near-changes.parquet"), rule.session_rule, candidate.path("old")
    )
    found = run_near(context, near, manifest["base"], keys, cut_nightly.NEAR_DDL)
    old = pa.concat_tables(
        [
            arrow_schema(SESSIONS.columns).empty_table(),
            *(filesystem.read_parquet(one["path"]) for one in found),
        ]
    )
    changed = cut_nightly.recut(old, gone, came, cut_of(rule.session_rule))
    counts = manifest["counts"] = cut_nightly.counted(changed)
    manifest["moved"] = {"came": came.num_rows, "gone": gone.num_rows}
    filesystem.write_parquet(candidate.path("sessions") + "/part-0.parquet", changed)
    candidate.adopt("sessions", cut_nightly.CHANGE_DDL)
    if counts["rows"] == counts["new"]:
        folder = staging(context.run_id)
        rows = changed.select(list(SESSIONS.columns))
        filesystem.write_parquet(f"{lake.path(SESSIONS)}/{folder}/part-0.parquet", rows)
        manifest["staged"] = lake.entries(SESSIONS, folder)


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
    spark = (lambda: context.spark) if context.is_many(sum(one.rows for one in near)) else None
    return run(spark, task, [one.path for one in near], ddl, "string")


def cut_by_users(context: Context, upto: int) -> list[dict[str, Any]]:
    """Stage all sessions anew, under any rule: all events of a user in one place."""
    events = context.lake.read(EVENTS, upto).select("user_id", *EVENT_FIELDS)
    bounds = time_slices.bounds(events, "event_ts", context.spark.sparkContext.defaultParallelism)
    parts = slices_of(context, context.lake.rows(EVENTS))
    rows = cut(events, cut_of(context.source.sessions.session_rule), parts)
    rows = time_slices.by_time(rows, "start_ts", bounds)
    rows = rows.sortWithinPartitions(*SESSIONS.order)
    return context.lake.stage(SESSIONS, rows, context.run_id)


def slices_of(context: Context, events: int) -> int:
    """How many slices of users so many events are worth."""
    size = time_slices.size_of(events, context.spark.sparkContext.defaultParallelism)
    return max(1, -(-events // size))


def cut_by_slices(context: Context, upto: int) -> list[dict[str, Any]]:
    """Stage all sessions anew, under the gap rule: see `jobs/lake/time_slices.py`."""
    lake, rule, spark = context.lake, context.source.sessions, context.spark
    known = time_slices.extents(lake.file_uris(EVENTS, upto))
    size = time_slices.size_of(
        sum(rows for *_, rows in known), spark.sparkContext.defaultParallelism
    )
    how = cut_of(rule.session_rule)
    folder = staging(context.run_id)
    aside = f"{context.candidate(SESSIONS).folder}/{cut_arrow.SPARE}"
    work = cut_arrow.worker(how, f"{lake.path(SESSIONS)}/{folder}", aside)

    def cut_all(todo: list[tuple[int | None, int | None, list[str]]]) -> list[Any]:
        return time_slices.frame(spark, todo).mapInArrow(work, cut_arrow.REPORT_DDL).collect()

    done = cut_all(time_slices.slices(known, size)) if known else []
    spare = [one["spare"] for one in done if one["spare"]]
    done += cut_all([(None, None, spare)]) if spare else []
    return lake.entries(SESSIONS, folder, [one["path"] for one in done])


def fill(context: Context, candidate: Candidate, manifest: dict[str, Any], rows: DataFrame) -> None:
    """Write the rows that change, each partition laid out by start, and count them."""
    written = candidate.write("sessions", rows.sortWithinPartitions(*SESSIONS.order))
    put = F.col("change") != "retired"
    counted = written.agg(
        F.count("*").alias("rows"),
        *(F.count_if(F.col("change") == one).alias(one) for one in ("new", "changed", "retired")),
        F.count_if(put & F.col("merged")).alias("merged"),
        F.count_if(put & F.col("runaway").isNotNull()).alias("runaways"),
        F.coalesce(F.sum(F.when(put, F.col("event_count"))), F.lit(0)).alias("events_after"),
        F.coalesce(F.sum("old_event_count"), F.lit(0)).alias("events_before"),
        F.min(F.unix_micros(F.least("start_ts", "_start_ts"))).alias("lo_us"),
        F.max(F.unix_micros(F.greatest("start_ts", "_start_ts"))).alias("hi_us"),
    ).first()
    assert counted is not None
    counts = manifest["counts"] = counted.asDict()
    if counts["rows"] == counts["new"]:
        manifest["staged"] = context.lake.stage(SESSIONS, written, context.run_id)


def count_whole(context: Context, manifest: dict[str, Any]) -> None:
    """Count all sessions, staged where they will stay, and what differs from the table."""
    lake, staged = context.lake, manifest["staged"]
    new = lake.staged(SESSIONS, staged)
    counted = new.agg(F.coalesce(F.sum("event_count"), F.lit(0)), F.count("runaway")).first()
    assert counted is not None
    number = sum(one["rows"] for one in staged)
    manifest["counts"] = {
        "rows": number, "new": number, "changed": 0, "retired": 0, "merged": 0,
        "runaways": counted[1], "events_before": 0, "events_after": counted[0],
    }  # fmt: skip
    if manifest["replace"]:
        manifest["counts"] |= compared(lake.read(SESSIONS, manifest["base"]), new)


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


def to_put(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> DataFrame:
    """The sessions that the candidate puts into the table."""
    if "staged" in manifest:
        return context.lake.staged(SESSIONS, manifest["staged"])
    return candidate.part("sessions").where("change <> 'retired'").select(*SESSIONS.columns)


def after_image(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> DataFrame:
    """The candidate's sessions as they would stand in the table, and the untouched sessions around
    them."""
    rule = context.source.sessions
    put = to_put(context, candidate, manifest)
    if manifest["base"] and not manifest["whole"]:
        gone = candidate.part("sessions").select("session_id")
        users = (
            candidate.part("sessions")
            .groupBy("user_id")
            .agg(F.min("start_ts").alias("lo"), F.max("end_ts").alias("hi"))
        )
        around = touched(context.lake.read(SESSIONS, manifest["base"]), users, rule.session_rule)
        rest = around.join(gone, "session_id", "left_anti").select(*SESSIONS.columns)
        put = put.unionByName(rest)
    return put


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored."""
    manifest = candidate.manifest()
    if manifest["empty"]:
        return
    counts = manifest["counts"]
    facts = facts_by_arrow(context, candidate, manifest)
    if facts is not None:
        suite.audit_certified(context, SESSIONS, counts["rows"], facts)
    else:
        context.expect(counts["rows"], context.lake.rows(SESSIONS))
        whole = manifest["whole"]
        facts = (facts_of_all if whole else facts_of_changes)(context, candidate, manifest)
        rows = after_image(context, candidate, manifest)
        suite.audit_candidate(context, SESSIONS, rows, facts)
    crash_points.point("sessionize.audited")


def facts_of_all(
    context: Context, candidate: Candidate, manifest: dict[str, Any]
) -> dict[str, bool]:
    put = to_put(context, candidate, manifest)
    events = context.lake.read(EVENTS, manifest["upto"]).select("user_id", "event_id")
    return spark_checks.balance_of_all(put, events)


def facts_of_changes(
    context: Context, candidate: Candidate, manifest: dict[str, Any]
) -> dict[str, bool]:
    put = to_put(context, candidate, manifest)
    ids = put.select(F.explode("events.event_id").alias("event_id"))
    counted = ids.agg(F.count("*"), F.count_distinct("event_id")).first()
    assert counted is not None
    return balance(manifest, counted[0], counted[1])


def balance(manifest: dict[str, Any], after: int, distinct: int) -> dict[str, bool]:
    """Args: after: how many events the sessions that are put have; distinct: how many ids."""
    moved = manifest["moved"]
    expected = manifest["counts"]["events_before"] + moved["came"] - moved["gone"]
    return {"each_event_once": distinct == after, "events_balance": expected == after}


def facts_by_arrow(
    context: Context, candidate: Candidate, manifest: dict[str, Any]
) -> dict[str, bool] | None:
    """What holds of the whole batch, if every check of a session holds of each and a whole table
    has the same events; else None, and where the rule or the size asks for Spark."""
    lake, rule, counts = context.lake, context.source.sessions, manifest["counts"]
    if rule.rule != "gap" or counts["rows"] > checks.MOST_SESSIONS:
        return None
    whole = manifest["whole"]
    events = lake.rows(EVENTS) if whole else counts["events_after"]
    spark = (lambda: context.spark) if context.is_many(events) else None
    aside = candidate.path("bounds")
    hold = checks.SessionsHold(rule.session_rule, aside)
    paths = candidate.files("sessions")
    if whole:
        paths = [f"{lake.path(SESSIONS)}/{one['path']}" for one in manifest["staged"]]
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
        rows = rows.filter(pc.not_equal(rows["change"], "retired"))
        ids = pc.struct_field(pc.list_flatten(rows["events"]), "event_id")
        return balance(manifest, len(ids), pc.count_distinct(ids).as_py())
    stored = [one.path for one in lake.files_of(EVENTS, manifest["upto"])]
    printed = run(spark, arrow_columns.print_of_events, stored, arrow_columns.PRINT_DDL, "string")
    if arrow_columns.joined(held) != arrow_columns.joined(printed):
        return None  # Spark tells which of the two checks does not hold
    return {"events_balance": True, "each_event_once": True}


def bounds_around(
    context: Context, candidate: Candidate, manifest: dict[str, Any], folder: str
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
    done = run_near(context, around, manifest["base"], keys, "bounds string")
    return [one["bounds"] for one in done]


def merge(context: Context, candidate: Candidate, manifest: dict[str, Any]) -> None:
    """New, changed and retired sessions in one commit.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
    """
    lake, counts = context.lake, manifest["counts"]
    context.replace_rows(
        SESSIONS, candidate, "sessions", manifest["base"], lake.app_id(SESSIONS, EVENTS),
        manifest["upto"], within=(counts["lo_us"], counts["hi_us"]),
    )  # fmt: skip


def replace(context: Context, manifest: dict[str, Any]) -> None:
    """All sessions anew, and the rule that made them, in one commit.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
    """
    lake, base = context.lake, manifest["base"]
    consumed, rule = lake.app_id(SESSIONS, EVENTS), context.source.sessions.rule_text()
    if lake.property(SESSIONS, RULE_PROPERTY) == rule:
        lake.commit(
            SESSIONS, manifest["staged"], base, consumed, manifest["upto"], context.run_id,
            overwrite=True,
        )  # fmt: skip
        return
    if lake.changed_rows(SESSIONS, base):
        raise Conflict(f"silver.sessions was changed by another run since version {base}")
    rows = lake.staged(SESSIONS, manifest["staged"])
    with lake.transaction(SESSIONS, consumed, manifest["upto"], context.run_id):
        lake.replace(SESSIONS, rows, {RULE_PROPERTY: rule})


def publish(context: Context, candidate: Candidate) -> Result:
    """One commit replaces whatever the changes touched, and says up to where it read.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
    """
    lake, manifest = context.lake, candidate.manifest()
    result = Result(notes=manifest["notes"], tables_in={EVENTS.full_name: manifest["upto"]})
    if not manifest["empty"]:
        counts, consumed = manifest["counts"], lake.app_id(SESSIONS, EVENTS)
        base, upto = manifest["base"], manifest["upto"]
        if manifest.get("replace"):
            replace(context, manifest)
        elif "staged" in manifest:
            lake.commit(SESSIONS, manifest["staged"], base, consumed, upto, context.run_id)
        else:
            merge(context, candidate, manifest)
        crash_points.point("sessionize.published")
        result.sessions_new, result.sessions_changed = counts["new"], counts["changed"]
        result.sessions_retired, result.sessions_merged = counts["retired"], counts["merged"]
        result.runaways = counts["runaways"]
    result.tables[SESSIONS.full_name] = lake.told(SESSIONS)
    return result
