"""The suites over whole published tables, as they are (`jobs validate`).

What a night's audit knows of its batch is computed here from the tables themselves, against the
versions that they were made from. What only a run knows (how many lines it read), and what cannot
be read any more (an older version, a model), is not evaluated, and the reason is given.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from deltalake.exceptions import DeltaError
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from expectations import identities
from jobs.audit import balance, spark_checks
from jobs.audit.suite import audit_candidate
from jobs.core.errors import AuditFailed, SettingsError
from jobs.core.tables import (
    EVENTS,
    FINGERPRINTS,
    IDENTITIES,
    ITEMS,
    LISTS,
    PERSON_EVENTS,
    RECOMMENDATIONS,
    RUNS,
    SEQUENCES,
    SESSIONS,
    Table,
)
from jobs.lake.context import Context, Result
from jobs.lake.delta_errors import FeedGone, feed_gone
from jobs.recommend import rule_checks, score
from jobs.recommend.rules import Resolved, resolve
from jobs.silver.boundary_columns import with_boundaries

if TYPE_CHECKING:
    from models.networks.saved_model import Stored


WITH_SUITE = (
    EVENTS, IDENTITIES, PERSON_EVENTS, SESSIONS, SEQUENCES, RECOMMENDATIONS, LISTS, FINGERPRINTS,
)  # fmt: skip
MAY_BE_MISSING = (IDENTITIES, PERSON_EVENTS, RECOMMENDATIONS, LISTS, FINGERPRINTS)


@dataclass
class Facts:
    """What is known of the checks of a whole table.

    held: check -> whether it holds. unknown: check -> why it was not evaluated.
    """

    held: dict[str, bool] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, parts: Mapping[str, bool | str]) -> None:
        """Join the answers of several parts, by the part's name: one that fails decides, then one
        that is unknown (a text: why)."""
        why = [f"{part}: {one}" for part, one in parts.items() if isinstance(one, str)]
        if any(one is False for one in parts.values()):
            self.held[name] = False
        elif why:
            self.unknown[name] = "; ".join(why)
        else:
            self.held[name] = True


def validate_tables(context: Context, only: str | None) -> Result:
    """Run the suites on the whole published tables, as they are.

    Raises:
        SettingsError: `only` names no table with a suite, or there is no such table yet.
        AuditFailed, AuditErrored: as in a night.
    """
    tables = {table.full_name: table for table in WITH_SUITE}
    if only is not None and only not in tables:
        near = difflib.get_close_matches(only, tables, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(
            f"--table {only} is no table with checks: {hint}Those are {', '.join(tables)}"
        )
    result, failed = Result(), []
    for name, table in tables.items():
        if only not in (None, name):
            continue
        version = context.lake.version(table)
        if version is None and table in MAY_BE_MISSING and only is None:
            continue  # nobody has scored yet, or judged; the source has no [identity]
        if version is None:
            raise SettingsError(
                f"there is no table at {context.lake.path(table)}: run python -m jobs run --source "
                f"{context.source.name} first"
            )
        print(f"  {name}: started", flush=True)
        engine = context.thresholds.whole_tables()
        context.enter(engine)
        rows = context.lake.read(table, version)
        lacking = {name: kind for name, kind in table.columns.items() if name not in rows.columns}
        rows = rows.withColumns({n: F.lit(None).cast(kind) for n, kind in lacking.items()})
        if table is SESSIONS:
            rows = with_boundaries(rows, context.source)
        facts = FACTS[table.full_name](context, rows)
        try:
            verdict = audit_candidate(
                context,
                table,
                rows,
                facts.held,
                engine,
                not_evaluated=facts.unknown,
                published=version,
            )
        except AuditFailed as error:  # (the other tables are checked, too)
            failed.append(str(error))
            continue
        result.tables_in[name] = version
        result.checks[name] = {"version": version, **verdict.counts()}
        result.notes.append(f"{name} version {version}: {verdict.in_words()}")
    if failed:
        raise AuditFailed("\n".join([*failed, *result.notes]))
    return result


def readable(context: Context, table: Table, version: int) -> int:
    """The version, or the newest one where no row has moved since: its files are there."""
    newest = context.lake.version(table)
    assert newest is not None
    return version if context.lake.changed_rows(table, version) else newest


# -- each table's checks of the batch -------------------------------------------------------------


def event_facts(context: Context, rows: DataFrame) -> Facts:
    del context, rows
    why = "it belongs to a run: the audit of each night evaluates it"
    return Facts(unknown=dict.fromkeys(("lines_balance", "reject_share_within_bound"), why))


def identity_facts(context: Context, rows: DataFrame) -> Facts:
    """Against the logins in `silver.events`; a table's rows are not kept."""
    who, lake = context.source.identity, context.lake
    rows.createOrReplaceTempView("identities")
    facts = Facts({"links_follow": _nothing(context, identities.BROKEN_LINKS)})
    if who is not None and not isinstance(who.link, str):
        facts.unknown["links_are_the_logins"] = "identity.link is a table: the runs compare with it"
        return facts
    events = lake.read(PERSON_EVENTS).where("log_user_id IS NOT NULL AND anonymous_id IS NOT NULL")
    if who is None:
        facts.held["links_are_the_logins"] = rows.isEmpty()
        return facts
    events.selectExpr(
        "anonymous_id", "log_user_id AS user_id", "event_ts AS login_ts"
    ).createOrReplaceTempView("logins")
    said = identities.AGAINST_LOGINS[str(who.link)]
    facts.held["links_are_the_logins"] = _nothing(context, said)
    return facts


def person_facts(context: Context, rows: DataFrame) -> Facts:
    """Against the links, and the number of events."""
    lake = context.lake
    rows.createOrReplaceTempView("events")
    lake.read(IDENTITIES).createOrReplaceTempView("identities")
    facts = Facts({"persons_are_theirs": _nothing(context, identities.WRONG_PERSONS)})
    upto = lake.consumed(PERSON_EVENTS, EVENTS)
    if upto is None:
        facts.held["people_balance"] = rows.isEmpty()
        return facts
    try:
        upto = readable(context, EVENTS, upto)
        wanted = sum(one.rows for one in lake.files_of(EVENTS, upto))
        facts.held["people_balance"] = rows.count() == wanted
    except DeltaError:
        facts.unknown["people_balance"] = (
            f"{EVENTS.full_name} version {upto} cannot be read any more"
        )
    return facts


def _nothing(context: Context, query: str) -> bool:
    """Whether SQL over the views finds nothing."""
    return context.spark.sql(query).isEmpty()


def session_facts(context: Context, rows: DataFrame) -> Facts:
    """Against the events that the sessions were cut from."""
    of = context.lake.session_events()
    upto = context.lake.consumed(SESSIONS, of)
    if upto is None:
        once = spark_checks.events_are_distinct(rows)
        return Facts({"events_balance": rows.isEmpty(), "each_event_once": once})
    upto = readable(context, of, upto)
    try:
        with feed_gone(of, upto - 1, upto):
            events = context.lake.read(of, upto).select("user_id", "event_id")
            return Facts(spark_checks.balance_of_all(rows, events))
    except FeedGone:
        return Facts(
            {"each_event_once": spark_checks.events_are_distinct(rows)},
            {"events_balance": f"{of.full_name} version {upto} cannot be read any more"},
        )


def sequence_facts(context: Context, rows: DataFrame) -> Facts:
    """Against the sessions that the sequences were made from, user by user."""
    upto = context.lake.consumed(SEQUENCES, SESSIONS)
    if upto is None:
        return Facts({"positions_balance": rows.isEmpty()})
    upto = readable(context, SESSIONS, upto)
    try:
        with feed_gone(SESSIONS, upto - 1, upto):
            sessions = context.lake.read(SESSIONS, upto).where("runaway IS NULL")
            events = sessions.groupBy("user_id").agg(F.sum("event_count").alias("events"))
            positions = rows.groupBy("user_id").agg(F.sum(F.size("item_index")).alias("positions"))
            both = events.join(positions, "user_id", "full_outer")
            same = F.col("events").eqNullSafe(F.col("positions"))
            return Facts({"positions_balance": both.where(~same).isEmpty()})
    except FeedGone:
        why = f"{SESSIONS.full_name} version {upto} cannot be read any more"
        return Facts(unknown={"positions_balance": why})


def list_facts(context: Context, rows: DataFrame) -> Facts:
    """Against `gold.items`, and each model version's lists against the users that it scored.

    How many items a list was asked to have is not recorded: the longest list of a version tells.
    """
    facts = Facts()
    ids = rows.select(F.explode("items.item_id").alias("item_id")).distinct()
    known = context.lake.read(ITEMS).select("item_id")
    facts.held["items_are_known"] = ids.join(known, "item_id", "left_anti").isEmpty()
    scored = _scored_from(context)
    found: dict[str, dict[str, bool | str]] = {}
    versions = sorted(row[0] for row in rows.select("model_version").distinct().collect())
    for version in versions:
        lists = rows.where(F.col("model_version") == version)
        for name, one in _of_version(context, lists, version, scored.get(version)).items():
            found.setdefault(name, {})[f"model version {version}"] = one
    for name in OF_LISTS:
        facts.put(name, found.get(name, {}))
    return facts


def _scored_from(context: Context) -> dict[str, int]:
    """Model version -> the version of `gold.sequences` that it scored last, from `ops.runs`."""
    runs = context.lake.small(RUNS).to_pylist()
    found: dict[str, int] = {}
    for run in sorted(runs, key=lambda one: one["started_ts"]):
        upto = dict(run["tables_in"] or ()).get(SEQUENCES.full_name)
        if run["job"] == "score" and run["outcome"] == "ok" and upto is not None:
            found |= {uri.rpartition("/")[2]: upto for uri in run["files"] or ()}
    return found


OF_LISTS = ("lists_are_whole", "users_balance", *rule_checks.CHECKS)


def _of_version(
    context: Context, lists: DataFrame, version: str, upto: int | None
) -> dict[str, bool | str]:
    """Check -> whether a model version's lists are whole, of all users that it scored, and as the
    rules allow; or why that is not known.

    Args:
        upto: the version of `gold.sequences` that it scored.
    """
    if upto is None:
        return dict.fromkeys(OF_LISTS, "no finished run of score in ops.runs names it")
    upto = readable(context, SEQUENCES, upto)
    sizes = lists.select("user_id", F.size("items").alias("size")).toArrow()
    try:
        with feed_gone(SEQUENCES, upto - 1, upto):
            stored, ruled = _model(context, version, upto)
            made_by = _made_by(lists)
            if made_by - {None if ruled is None else ruled.digest}:
                return dict.fromkeys(OF_LISTS, "they were made by other rules of [serving]")
            most = None
            if ruled is not None or score.excludes(stored):
                most = score.most_of_users(context, stored, upto, ruled)
            names = context.lake.table_of(SEQUENCES, upto, ["user_id"])["user_id"]
            of_users: dict[str, bool | str] = {
                "lists_are_whole": _whole(sizes, stored, most),
                "users_balance": _balanced(sizes, names, most),
            }
            return of_users | _ruled(context, lists, upto, ruled)
    except FeedGone:
        why = f"{SEQUENCES.full_name} version {upto} cannot be read any more"
    except SettingsError as error:
        why = f"the model cannot be asked again ({error})"
    return dict.fromkeys(OF_LISTS, why)


def _made_by(lists: DataFrame) -> set[str | None]:
    """The digests of the rules of lists; earlier versions knew no rules, and had no such column."""
    if "rules" not in lists.columns:
        return {None}
    return {row[0] for row in lists.select("rules").distinct().collect()}


def _model(context: Context, version: str, upto: int) -> tuple[Stored, Resolved | None]:
    """The stored model, and the rules as they are for it today."""
    _, stored = score.loaded(context.source.name, "", int(version))
    return stored, resolve(context, stored.item_ids, upto)


def _ruled(
    context: Context, lists: DataFrame, upto: int, ruled: Resolved | None
) -> dict[str, bool]:
    if ruled is None:
        return rule_checks.none()
    rows = lists.select("user_id", F.col("items.item_id").alias("ids")).toArrow().combine_chunks()
    users, ids = (rows[name].combine_chunks() for name in ("user_id", "ids"))
    return rule_checks.rules_held(context, upto, users, ids)


def _whole(sizes: pa.Table, stored: Stored, most: pa.Table | None) -> bool:
    size = sizes["size"].to_numpy()
    asked = int(size.max(initial=0))
    if most is None:
        return bool((size == min(asked, len(stored.item_ids))).all())
    return score.as_long_as_can_be(sizes["user_id"], size, most, asked)


def _balanced(sizes: pa.Table, names: Any, most: pa.Table | None) -> bool:
    nothing = 0 if most is None else int(np.sum(most["most"].to_numpy() == 0))
    return bool(sizes.num_rows + nothing == len(names))


def fingerprint_facts(context: Context, rows: DataFrame) -> Facts:
    """Against the data files themselves: all of them are read."""
    del rows
    return Facts(*balance.validated(context))


FACTS: dict[str, Callable[[Context, DataFrame], Facts]] = {
    EVENTS.full_name: event_facts,
    IDENTITIES.full_name: identity_facts,
    PERSON_EVENTS.full_name: person_facts,
    SESSIONS.full_name: session_facts,
    SEQUENCES.full_name: sequence_facts,
    RECOMMENDATIONS.full_name: list_facts,
    LISTS.full_name: lambda context, rows: Facts(),  # (all its checks are of rows)
    FINGERPRINTS.full_name: fingerprint_facts,
}
