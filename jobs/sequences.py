"""`silver.sessions` -> `gold.sequences`: one row a user, made anew only where sessions changed.

All sessions that are not runaway, unfiltered; `session_ordinal` is dense over those, from 1; a
user without any has no row.
"""

from __future__ import annotations

from typing import Any

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from expectations.sessions import order_key
from jobs import crash, validate
from jobs.context import Candidate, Context, Result
from jobs.delta import FeedGone, feed_gone
from jobs.errors import SettingsError
from jobs.sources import SessionsPart
from jobs.tables import EVENTS, ITEMS, SEQUENCES, SESSIONS


def sequences(
    sessions: DataFrame, items: DataFrame, rule: SessionsPart, exposures: bool = True
) -> DataFrame:
    """Sessions of whole users -> rows of `gold.sequences`.

    Args:
        sessions: rows of `silver.sessions`, runaways already left out.
        items: `item_id, item_index`; must cover every item of the sessions.
        exposures: False where no event has `exposed_with`: half of the plan is not needed then.
    """
    # Numbered before their events are taken out: one row a session, and the frame stays
    # partitioned by user for the collecting below.
    by_user = Window.partitionBy("user_id").orderBy(F.expr(order_key(rule.rule, "events[0]")))
    numbered = sessions.select(
        "user_id", "events", F.row_number().over(by_user).alias("session_ordinal")
    )
    events = numbered.select("user_id", "session_ordinal", F.explode("events").alias("e")).select(
        "user_id", "session_ordinal", F.expr(order_key(rule.rule, "e")).alias("key"), "e.item_id",
        "e.event_ts", "e.feedback", "e.exposed_with",
    )  # fmt: skip
    index = items.select("item_id", "item_index")
    indexed = events.join(index, "item_id", "left")
    nothing = F.array().cast("array<int>")
    if exposures:
        shown = (
            events.where("size(exposed_with) > 0")
            .select("user_id", "key", F.posexplode("exposed_with").alias("at", "item_id"))
            .join(index, "item_id", "left")
            .groupBy("user_id", "key")
            .agg(F.sort_array(F.collect_list(F.struct("at", "item_index"))).alias("_shown"))
            .select("user_id", "key", F.col("_shown.item_index").alias("shown"))
        )
        indexed = indexed.join(shown, ["user_id", "key"], "left")
        indexed = indexed.withColumn("shown", F.coalesce("shown", nothing))
    else:
        indexed = indexed.withColumn("shown", nothing)
    position = F.struct("key", "item_index", "event_ts", "session_ordinal", "feedback", "shown")
    users = indexed.groupBy("user_id").agg(F.sort_array(F.collect_list(position)).alias("p"))
    return users.select(
        "user_id", F.col("p.item_index").alias("item_index"), F.col("p.event_ts").alias("event_ts"),
        F.col("p.session_ordinal").alias("session_ordinal"), F.col("p.feedback").alias("feedback"),
        F.col("p.shown").alias("exposed_items"),
    )  # fmt: skip


ARRAYS = [name for name in SEQUENCES.columns if name != "user_id"]


def spliced(stored: DataFrame, since: DataFrame, tails: DataFrame) -> DataFrame:
    """Rows of `gold.sequences` whose ends are made anew: what lies before stays as it is.

    Under the gap rule a session that did not change, and starts before one that did, ends before it
    starts: so positions before the first change of a user are the same positions.

    Args:
        stored: rows of `gold.sequences`.
        since: `user_id`, `since`: the start of the first session that changed, was or is there.
        tails: rows made of the users' sessions that start at `since` or later, numbered from 1.
    """
    heads = stored.join(F.broadcast(since), "user_id")
    before = F.size(F.filter("event_ts", lambda at: at < F.col("since")))
    heads = heads.withColumn("_before", before).where("_before > 0")
    heads = heads.select(
        "user_id", *(F.slice(n, 1, F.col("_before")).alias(f"_{n}") for n in ARRAYS)
    )
    both = heads.join(tails, "user_id", "full_outer")
    last = F.coalesce(F.try_element_at("_session_ordinal", F.lit(-1)), F.lit(0))
    both = both.withColumn(
        "session_ordinal", F.transform("session_ordinal", lambda ordinal: ordinal + last)
    )
    nothing = F.array()
    return both.select(
        "user_id",
        *(F.concat(F.coalesce(f"_{n}", nothing), F.coalesce(n, nothing)).alias(n) for n in ARRAYS),
    )


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
    crash.point("sequences.computed")
    return candidate


def fill(
    context: Context, candidate: Candidate, manifest: dict[str, Any], after: int | None
) -> None:
    lake = context.lake
    upto = manifest["upto"]
    context.expect(lake.grown(SESSIONS, after), lake.rows(SESSIONS))
    sessions = lake.read(SESSIONS, upto).where("runaway IS NULL")
    tails, users, spliceable = sessions, None, False
    if after is not None:
        try:
            with feed_gone(SESSIONS, after, upto):
                feed = lake.changes(SESSIONS, after, upto)
                since = feed.groupBy("user_id").agg(F.min("start_ts").alias("since"))
                users = candidate.write("users", since.coalesce(1))
                spliceable = context.source.sessions.rule == "gap"
        except FeedGone as lost:
            manifest["notes"].append(f"the change feed is gone, sequences are made anew ({lost})")
            users = candidate.write(
                "users",
                sessions.select("user_id")
                .union(lake.read(SEQUENCES, manifest["base"]).select("user_id"))
                .distinct(),
            )
        if users.isEmpty():
            manifest["empty"] = True
            return
        sessions = tails = sessions.join(F.broadcast(users), "user_id", "left_semi")
        if spliceable:
            first = users.agg(F.min(F.unix_micros("since"))).first()
            assert first is not None
            # (The one bound for all is what files are chosen by.)
            bound = F.timestamp_micros(F.lit(first[0]))
            recent = lake.read(SESSIONS, upto).where(F.col("start_ts") >= bound)
            tails = recent.where("runaway IS NULL").join(F.broadcast(users), "user_id")
            tails = tails.where("start_ts >= since").drop("since")
    shown = tails.where("exists(events, e -> size(e.exposed_with) > 0)")
    exposures = context.source.columns.exposed_with is not None or not shown.isEmpty()
    items = lake.read(ITEMS, manifest["items"])
    rows = sequences(tails, items, context.source.sessions, exposures)
    if users is None:
        manifest["staged"] = lake.stage(SEQUENCES, rows, context.run_id)
        rows = lake.staged(SEQUENCES, manifest["staged"])
    else:
        if spliceable:
            rows = spliced(lake.read(SEQUENCES, manifest["base"]), users, rows)
        rows = candidate.write("sequences", rows)
        known = lake.read(SEQUENCES, manifest["base"]).select("user_id")
        gone = users.select("user_id").join(rows, "user_id", "left_anti").join(known, "user_id")
        change = rows.withColumn("gone", F.lit(False)).unionByName(
            gone.withColumn("gone", F.lit(True)), allowMissingColumns=True
        )
        candidate.write("change", change)
    counted = rows.agg(F.count("*"), F.coalesce(F.sum(F.size("item_index")), F.lit(0))).first()
    expected = sessions.agg(F.coalesce(F.sum("event_count"), F.lit(0))).first()
    assert counted is not None and expected is not None
    manifest |= {"rows": counted[0], "positions": counted[1], "events": expected[0]}
    manifest["empty"] = (counted[0] if users is None else candidate.row_count("change")) == 0


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored."""
    manifest = candidate.manifest()
    if manifest["empty"]:
        return
    facts = {"positions_balance": manifest["positions"] == manifest["events"]}
    context.expect(manifest["rows"], context.lake.rows(SEQUENCES))
    staged = manifest.get("staged")
    rows = context.lake.staged(SEQUENCES, staged) if staged else candidate.part("sequences")
    validate.audit_candidate(context, SEQUENCES, rows, facts)
    crash.point("sequences.audited")


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
        if "staged" in manifest:
            lake.commit(SEQUENCES, manifest["staged"], base, consumed, upto, context.run_id)
        else:
            context.merge(SEQUENCES, candidate, "change", base, consumed, upto)
        crash.point("sequences.published")
    result.tables[SEQUENCES.full_name] = lake.told(SEQUENCES)
    return result
