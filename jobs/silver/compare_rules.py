"""How far the log's own sessions and the gap rule agree, boundary by boundary, before one is chosen.

Between two neighbouring events of a user each rule either sees a boundary or does not. Pairs in
which neither event has an id of its own are distinguished: there the native rule *is* the gap rule.
What else may part events (`native_gap`, `midnight`, `boundary`, `on_max_hours`) is in neither rule: it
would part the same pairs of both.
"""

from __future__ import annotations

from typing import Any

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from expectations.session_rule import SessionRule
from jobs.core.errors import SettingsError
from jobs.core.tables import EVENTS
from jobs.lake.context import Context

GAPS_S = (300, 600, 900, 1_200, 1_800, 3_600, 7_200, 21_600, 43_200, 86_400)


def compare_rules(context: Context) -> dict[str, Any]:
    """Compare the source's native sessions with gap rules of several lengths.

    Returns:
        `version` of `bronze.events`; `events`, `users`, `without_id` (events); `pairs` (of
        neighbours, at least one of which has an id), `pairs_without_id`, `returning_ids` (native
        ids that go on after another session of the user); `gaps`: one entry a gap with `gap_s`,
        `both`, `only_native`, `only_gap`, `neither` (boundaries by whom), `agreement` (share of
        pairs), `kappa` (Cohen's: agreement beyond chance, null where there is nothing to tell);
        `best_gap_s`, the one of the highest kappa.

    Raises:
        SettingsError: the source maps no native session id, or there are no events.
    """
    source, lake = context.source, context.lake
    if source.columns.source_session_id is None:
        raise SettingsError(
            f"source {source.name}: columns.source_session_id is not mapped, so there is nothing to "
            "compare: name the log's session column"
        )
    version = lake.version(EVENTS)
    if version is None or not lake.rows(EVENTS):
        raise SettingsError(
            f"{EVENTS.full_name} of {source.name} has no events: run python -m jobs ingest --source "
            f"{source.name} first"
        )
    gaps = sorted({*GAPS_S, source.sessions.gap_s})
    of = lake.session_events()
    events = lake.read(of, version if of is EVENTS else lake.version(of))
    counted = counts(events, [round(gap * 1_000_000) for gap in gaps])
    entries = [_entry(gap, *counted["gaps"][at]) for at, gap in enumerate(gaps)]
    known = [entry for entry in entries if entry["kappa"] is not None]
    return {
        "source": source.name, "version": version,
        **{name: count for name, count in counted.items() if name != "gaps"},
        "gaps": entries, "rule": source.sessions.rule, "gap_s": source.sessions.gap_s,
        "best_gap_s": max(known, key=lambda one: one["kappa"])["gap_s"] if known else None,
    }  # fmt: skip


def counts(events: DataFrame, gaps_us: list[int]) -> dict[str, Any]:
    """Count the boundaries of both rules in one pass over the events."""
    gap_rules = [SessionRule(native=False, gap_us=gap_us) for gap_us in gaps_us]
    native_rule = SessionRule(native=True, gap_us=gaps_us[0])
    # One order for all rules, or they would speak of other pairs.
    order = [F.asc_nulls_last(name) for name in gap_rules[0].sql.order_columns]
    by_user = Window.partitionBy("user_id").orderBy(*order)
    native, here = F.col("source_session_id"), F.struct("event_ts", "source_session_id")
    paired = events.select(
        "user_id", native, here.alias("_here"), F.lag(here).over(by_user).alias("_before"),
        # An id that was seen before, though not in the event before, comes back.
        F.lag("event_id").over(
            Window.partitionBy("user_id", "source_session_id").orderBy(*order)
        ).isNotNull().alias("_seen"),
    )  # fmt: skip
    before = F.col("_before.source_session_id")
    is_pair = F.col("_before").isNotNull()
    asked = is_pair & (native.isNotNull() | before.isNotNull())
    together = F.expr(native_rule.sql.belong("_before", "_here"))  # (of pairs that are asked)
    sums = [
        F.count_if(asked & (cut_native == native_says) & (cut_gap == gap_says))
        for gap_rule in gap_rules
        for cut_native, cut_gap in [(~together, ~F.expr(gap_rule.sql.belong("_before", "_here")))]
        for native_says in (True, False)
        for gap_says in (True, False)
    ]
    back = is_pair & native.isNotNull() & ~together & F.col("_seen")
    row = paired.agg(
        F.count("*").alias("events"),
        F.count_distinct("user_id").alias("users"),
        F.count_if(native.isNull()).alias("without_id"),
        F.count_if(asked).alias("pairs"),
        F.count_if(is_pair & ~asked).alias("pairs_without_id"),
        F.count_distinct(F.when(back, F.struct("user_id", native))).alias("returning_ids"),
        F.array(*sums).alias("gaps"),
    ).first()
    assert row is not None
    found = row.asDict()
    flat = found["gaps"]
    found["gaps"] = [tuple(flat[at : at + 4]) for at in range(0, len(flat), 4)]
    return found


def _entry(gap: float, both: int, only_native: int, only_gap: int, neither: int) -> dict[str, Any]:
    pairs = both + only_native + only_gap + neither
    agreement = kappa = None
    if pairs:
        agreement = (both + neither) / pairs
        native, by_gap = (both + only_native) / pairs, (both + only_gap) / pairs
        chance = native * by_gap + (1 - native) * (1 - by_gap)
        kappa = (agreement - chance) / (1 - chance) if chance < 1 else None
    return {
        "gap_s": gap, "both": both, "only_native": only_native, "only_gap": only_gap,
        "neither": neither, "agreement": agreement, "kappa": kappa,
    }  # fmt: skip


def in_words(found: dict[str, Any]) -> str:
    """The comparison as a table that a person reads."""
    lines = [
        f"compare-rules {found['source']}: {found['events']:,} events of {found['users']:,} users "
        f"(bronze.events version {found['version']}), {found['without_id']:,} without a native id. "
        f"{found['pairs']:,} pairs of neighbours compared; {found['pairs_without_id']:,} more have "
        "no id on either side, where the native rule cuts at gap_s itself. "
        f"{found['returning_ids']:,} native sessions go on after another one of their user.",
        "     gap_s   cut by both   only native   only by gap       neither   agreement   kappa",
    ]
    for one in found["gaps"]:
        agreement = "-" if one["agreement"] is None else f"{one['agreement']:.2%}"
        kappa = "-" if one["kappa"] is None else f"{one['kappa']:.3f}"
        marks = "  <- this source's gap_s" if one["gap_s"] == found["gap_s"] else ""
        if one["gap_s"] == found["best_gap_s"]:
            marks += "  <- nearest to the native sessions"
        lines.append(
            f"{one['gap_s']:>10,g}{one['both']:>14,}{one['only_native']:>14,}"
            f"{one['only_gap']:>14,}{one['neither']:>14,}{agreement:>12}{kappa:>8}{marks}"
        )
    lines.append(f"The source file says rule = {found['rule']!r}.")
    return "\n".join(lines)
