"""Audits of sessions in Arrow: they refuse what the suite refuses, under both rules, without a JVM."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark import SparkContext
from pyspark.sql import functions as F

from expectations import sessions as sessions_suite
from expectations.session_rule import SessionRule
from jobs.audit import spark_checks
from jobs.audit import suite as audit_suite
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import AuditFailed
from jobs.core.plan import Engine, Publish, Thresholds
from jobs.core.tables import EVENTS, SESSIONS
from jobs.lake import filesystem
from jobs.lake.delta import Lake
from jobs.records.boundary import VALUES, Boundary
from jobs.records.expressions import parsed
from jobs.silver import audit as silver_audit
from jobs.silver import boundary_columns, checks, sessionize
from jobs.silver.cut_arrow import EVENT_FIELDS, cut, cut_of
from jobs.silver.manifest import SessionizeManifest
from tests.jobs.audit.test_batch_checks import doubled_event, lost_event, spoiled
from tests.support.spark_tools import CLICKS, Workshop

T, DAY, GAP_S = 1_700_000_000, 86_400, 1800
START = datetime.fromtimestamp(T, UTC)
NATIVE = CLICKS.replace('event_ts = "ts"', 'event_ts = "ts"\nsource_session_id = "s"') + (
    f'[sessions]\nrule = "source_session_id"\ngap_s = {GAP_S}\n'
)
Row = dict[str, Any]

# -- a night whose candidate is broken ------------------------------------------------------------


def log(*sessions: tuple[str, str, int, int]) -> str:
    """Sessions of some events, one every ten minutes: user, id, beginning (s after T), events."""
    lines = [
        f"{user},i{n},{T + begin + 600 * n},{name}"
        for user, name, begin, many in sessions
        for n in range(many)
    ]
    return "\n".join(["user,item,ts,s", *lines]) + "\n"


@pytest.fixture(scope="module", params=["gap", "native"])
def night(
    request: pytest.FixtureRequest, spark: Any, tmp_path_factory: pytest.TempPathFactory
) -> Workshop:
    """A first load, and a night that changes a session of each of some users and opens another one:
    months before and behind the changed ones stand sessions that stay. The candidates are left."""
    toml = NATIVE if request.param == "native" else CLICKS
    shop = Workshop(spark, tmp_path_factory.mktemp(request.param), toml)
    stay = [(user, *one) for user in USERS for one in (("s1", 0, 3), ("s4", 300 * DAY, 2))]
    first = [(user, "s2", 90 * DAY, 3) for user in USERS]
    others = [(f"o{number}", "s", number * DAY, 1) for number in range(1, 31)]
    shop.land("first.csv", log(*stay, *first, *others, ("z", "s", 400 * DAY, 2)))
    shop.run("ingest", batch="first")
    for step in ("compute", "publish"):
        shop.run("sessionize", step=step, batch="first")
    late = [(user, "s2", 90 * DAY + 1800, 1) for user in USERS]
    shop.land("more.csv", log(*late, ("d", "s9", 200 * DAY, 3)))
    shop.run("ingest", batch="more")
    # As if tasks over the stored sessions were Spark's, if it were those that change.
    shop.thresholds = Thresholds(few_moved=40)
    return shop


@pytest.fixture
def without_a_jvm(monkeypatch: pytest.MonkeyPatch, night: Workshop) -> Any:
    """The context of a process in which Spark must not start."""
    monkeypatch.setattr(SparkContext, "_active_spark_context", None)
    context = night.context(batch="more")
    context.lake = Lake(
        lambda: pytest.fail("Spark was started"), str(night.lake_root), night.source.name
    )
    return context


def test_a_small_night_is_cut_and_audited_without_a_jvm(
    without_a_jvm: Any, night: Workshop
) -> None:
    """Though more sessions are looked through than may be changed without Spark: under the native
    rule all of them, because a user's neighbours may be months away."""
    assert night.lake.rows(SESSIONS) > without_a_jvm.thresholds.few_moved
    candidate = sessionize.compute(without_a_jvm)
    counts = candidate.manifest(SessionizeManifest).counts
    assert (counts.new, counts.changed, counts.retired) == (1, len(USERS), 0)
    sessionize.audit(without_a_jvm, candidate)
    plan = without_a_jvm.plans["sessionize"]
    assert plan.engine is Engine.HERE and plan.publish is Publish.MERGE


def at(row: Row, start: Any) -> None:
    """Move a session."""
    by = start - row["start_ts"]
    for event in row["events"]:
        event["event_ts"] += by
    row.update(start_ts=start, end_ts=row["end_ts"] + by, start_date=start.date())


def swap(row: Row) -> None:
    row["events"][1:3] = row["events"][2:0:-1]


def part_inside(row: Row) -> None:
    """Against both rules: another id, after a silence."""
    row["events"][-1]["event_ts"] += timedelta(seconds=GAP_S + 1)
    row["end_ts"] = row["events"][-1]["event_ts"]
    row["events"][-1]["source_session_id"] = "other"


def too_near(row: Row) -> None:
    """Against both rules: the id of the session that stands before it, and no silence between."""
    at(row, START + timedelta(seconds=1200 + GAP_S))
    for event in row["events"]:
        event["source_session_id"] = "s1"


BREAKS: dict[str, Callable[[Row], Any]] = {
    "events_in_order": swap,
    "no_boundary_inside": part_inside,
    "neighbours_are_apart": too_near,
    "neighbours_in_order": lambda row: at(row, START + timedelta(seconds=1199)),
    "bounds_are_the_events": lambda row: row.update(event_count=9),
    "runaways_are_flagged": lambda row: row.update(runaway="hours"),
    "session_id_is_key": lambda row: row.update(session_id="one"),
}
"""What breaks a check in a session of four events that changed. (The key's: in two of them.)"""
USERS = [f"a{number}" for number in range(len(BREAKS) + 1)]


def test_every_check_of_rows_has_its_break() -> None:
    suite = sessions_suite.checks(SessionRule(native=True, gap_us=1))
    assert {one.name for one in suite if one.condition or one.unique} == BREAKS.keys()


@pytest.mark.slow
def test_a_broken_candidate_is_refused_and_the_checks_are_named(night: Workshop) -> None:
    """Each break alone is refused in Arrow; all of them, each of a user's own, are named by Spark."""
    context = night.context(batch="more")
    candidate = sessionize.compute(context)
    manifest = candidate.manifest(SessionizeManifest)

    def facts(*checks: str) -> dict[str, bool] | None:
        def spoil(rows: list[Row]) -> None:
            changed = [row for row in rows if row["user_id"].startswith("a")]
            changed.sort(key=lambda row: str(row["user_id"]))
            for check, row in zip(BREAKS, changed, strict=False):
                if check in checks:
                    broken[check] = BREAKS[check](row) or str(row["session_id"])
            if "session_id_is_key" in checks:
                BREAKS["session_id_is_key"](changed[-1])

        with spoiled(candidate.files("sessions"), spoil):
            if checks == tuple(BREAKS):
                sessionize.audit(context, candidate)
            return silver_audit.facts_by_arrow(context, candidate, manifest)

    broken: dict[str, str] = {}
    assert facts() == {"each_event_once": True, "events_balance": True}
    for check in BREAKS:
        assert facts(check) is None, check
    with pytest.raises(AuditFailed) as raised:
        facts(*BREAKS)
    lines = {line.split()[0]: line for line in str(raised.value).splitlines()[1:]}
    assert lines.keys() == broken.keys() == BREAKS.keys()
    for check, line in lines.items():
        assert broken[check] in line


@pytest.mark.parametrize("spoil", [lost_event, doubled_event])
def test_events_lost_or_doubled_do_not_balance(night: Workshop, spoil: Any) -> None:
    context = night.context(batch="more")
    candidate = sessionize.compute(context)
    manifest = candidate.manifest(SessionizeManifest)
    with spoiled(candidate.files("sessions"), spoil):
        facts = silver_audit.facts_by_arrow(context, candidate, manifest)
    assert facts is None or not all(facts.values())
    whole = night.context(batch="first")
    candidate = whole.candidate(SESSIONS)
    manifest = candidate.manifest(SessionizeManifest)
    paths = [f"{night.lake.path(SESSIONS)}/{one['path']}" for one in manifest.staged or []]
    with spoiled(paths, spoil):
        assert silver_audit.facts_by_arrow(whole, candidate, manifest) is None


def test_more_sessions_than_one_process_compares_are_audited_in_spark(night: Workshop) -> None:
    night.thresholds, before = Thresholds(compared_sessions=1), night.thresholds
    try:
        context = night.context(batch="more")
        candidate = sessionize.compute(context)
        manifest = candidate.manifest(SessionizeManifest)
        assert silver_audit.facts_by_arrow(context, candidate, manifest) is None
        sessionize.audit(context, candidate)
    finally:
        night.thresholds = before


# -- any sessions ---------------------------------------------------------------------------------

GAP_RULE, NATIVE_RULE = (
    SessionRule(native=native, gap_us=10, max_session_us=40, max_session_events=5)
    for native in (False, True)
)
SHORT = {"split": True, "max_session_us": 12}
RULES = {
    "gap": GAP_RULE, "native": NATIVE_RULE,
    "all": replace(NATIVE_RULE, native_gap=True, midnight="UTC", **SHORT),
    "split": replace(GAP_RULE, **SHORT), "native split": replace(NATIVE_RULE, **SHORT),
    "midnight": replace(GAP_RULE, midnight="UTC"),
    "native with a gap": replace(NATIVE_RULE, native_gap=True),
}  # fmt: skip
BOUNDARY = Boundary(
    parsed("sessions.boundary", "prev.campaign = 'a' AND next.tie_break = 1"),
    ours=("tie_break",), log=(("campaign", ""),),
)  # fmt: skip
CAMPAIGNS = [None, '{"campaign":"a"}', '{"campaign":"b"}']
RULES |= {
    "boundary": replace(GAP_RULE, boundary=True),
    "all, boundary": replace(RULES["all"], boundary=True),
}
SLOW = ("boundary", "split", "native split", "midnight", "native with a gap")
TIMES = [-20, -15, -10, -9, 0, 1, 10, 11, 40], [-40, -36, -33, -30, -26, -25, -20, 0, 5, 40]
SETS = 400


def drawn_sessions(drawn: random.Random, rule: SessionRule) -> list[Row]:
    """The sessions of up to ten events of one or two users, most of them broken up to twice."""
    events = [
        {"event_id": f"e{number}", "user_id": drawn.choice("uuv"), "item_id": "i",
         "event_ts": drawn.choice(TIMES[rule.split]), "feedback": "positive",
         "tie_break": drawn.choice([None, 0, 1]),
         "source_session_id": drawn.choice([None, None, "a", "a", "b", "cc"]),
         VALUES: drawn.choice(CAMPAIGNS) if rule.boundary else None}
        for number in drawn.sample(range(50), drawn.randint(1, 10))
    ]  # fmt: skip
    schema = arrow_schema(
        {name: EVENTS.columns[name] for name in ("user_id", *EVENT_FIELDS, VALUES)}
    )
    how = cut_of(rule, BOUNDARY if rule.boundary else None)
    rows: list[Row] = cut(pa.Table.from_pylist(events, schema=schema), how)[0].to_pylist()
    for row in rows:  # (values go where their events go)
        for event, value in zip(row["events"], row[VALUES] or (), strict=False):
            event[VALUES] = value
    for _ in range(drawn.choice([0, 1, 1, 2])):
        drawn.choice(CHANGES if rule in (GAP_RULE, NATIVE_RULE) else MORE)(drawn, rows)
        if drawn.random() < 0.8:
            for row in rows:
                restate(row, rule)
    for row in rows:
        if rule.boundary:
            row[VALUES] = [event[VALUES] for event in row["events"]]
    if rule.boundary and drawn.random() < 0.05:
        drawn.choice(rows)[VALUES].append(None)
    return rows


def restate(row: Row, rule: SessionRule) -> None:
    """Bounds and flag as the events have them, so that only the other checks can fail."""
    first, last = row["events"][0]["event_ts"], row["events"][-1]["event_ts"]
    span, count = round((last - first).total_seconds() * 1e6), len(row["events"])
    flag = "hours" if span > rule.longest_us else None
    flag = flag or ("events" if count > rule.max_session_events else None)
    row.update(
        start_ts=first, end_ts=last, start_date=first.date(), event_count=count, runaway=flag
    )


def one_event(drawn: random.Random, rows: list[Row]) -> Row:
    event: Row = drawn.choice(drawn.choice(rows)["events"])
    return event


def swap_events(drawn: random.Random, rows: list[Row]) -> None:
    """Two events change places, inside a session or between two."""
    (one, here), (other, there) = (
        (row, drawn.randrange(len(row["events"]))) for row in drawn.choices(rows, k=2)
    )
    one["events"][here], other["events"][there] = other["events"][there], one["events"][here]


def join(drawn: random.Random, rows: list[Row]) -> None:
    if len(rows) > 1:
        one, other = drawn.sample(rows, 2)
        one["events"] += other["events"]
        rows.remove(other)


def join_next(drawn: random.Random, rows: list[Row]) -> None:
    rows.sort(key=lambda row: (row["user_id"], row["start_ts"]))
    if len(rows) > 1:
        at = drawn.randrange(len(rows) - 1)
        rows[at]["events"] += rows.pop(at + 1)["events"]


def split(drawn: random.Random, rows: list[Row]) -> None:
    row = drawn.choice(rows)
    if len(row["events"]) > 1:
        place = drawn.randrange(1, len(row["events"]))
        rows.append(row | {"session_id": f"half {len(rows)}", "events": row["events"][place:]})
        row["events"] = row["events"][:place]


def relabel(drawn: random.Random, rows: list[Row]) -> None:
    """A whole session is another one of the log's."""
    native = drawn.choice([None, "a", "b", "d"])
    for event in drawn.choice(rows)["events"]:
        event["source_session_id"] = native


def shift(drawn: random.Random, rows: list[Row]) -> None:
    by = timedelta(microseconds=drawn.choice([-11, -10, -5, 5, 10, 11]))
    for event in drawn.choice(rows)["events"]:
        event["event_ts"] += by


CHANGES: list[Callable[[random.Random, list[Row]], Any]] = [
    swap_events, join, split, relabel, relabel, shift, shift,
    lambda drawn, rows: one_event(drawn, rows).update(source_session_id=drawn.choice([None, "a", "b"])),
    lambda drawn, rows: one_event(drawn, rows).update(tie_break=drawn.choice([None, 0, 1])),
    lambda drawn, rows: drawn.choice(rows).update(event_count=drawn.randint(0, 3)),
    lambda drawn, rows: drawn.choice(rows).update(runaway=drawn.choice([None, "hours", "events"])),
    lambda drawn, rows: drawn.choice(rows).update(end_ts=drawn.choice(rows)["start_ts"]),
    lambda drawn, rows: drawn.choice(rows).update(session_id=drawn.choice(rows)["session_id"]),
]  # fmt: skip


MORE = [*CHANGES, join_next]


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in RULES]
)
def test_arrow_refuses_what_the_suite_refuses(spark: Any, tmp_path: Path, name: str) -> None:
    """Hundreds of sets of sessions, whole and broken; in Spark as users of one table."""
    drawn, rule, schema = random.Random(5), RULES[name], arrow_schema(SESSIONS.columns)
    boundary = BOUNDARY if rule.boundary else None
    hold = checks.SessionsHold(rule, f"{tmp_path}/bounds", boundary)
    accepted, every = set(), []
    for number in range(SETS):
        rows = drawn_sessions(drawn, rule)
        path = f"{tmp_path}/{number}.parquet"
        filesystem.write_parquet(path, pa.Table.from_pylist(rows, schema=schema))
        [found] = hold(path)
        if found["holds"] and checks.sessions_apart([found["bounds"]], rule, boundary):
            accepted.add(number)
        every += [
            row | {"user_id": f"{number}/{row['user_id']}", "session_id": f"{number}/{row['session_id']}"}
            for row in rows
        ]  # fmt: skip
    filesystem.write_parquet(f"{tmp_path}/all.parquet", pa.Table.from_pylist(every, schema=schema))
    table = spark.read.schema(SESSIONS.ddl).parquet(f"{tmp_path}/all.parquet")
    suite = [one for one in sessions_suite.checks(rule) if one.condition or one.unique]
    table = boundary_columns.told(table, rule, boundary)
    table = spark_checks.with_previous(table, rule)
    broken = audit_suite.broken(table, SESSIONS.key, suite).groupBy(
        F.split("row", "/")[0].alias("n")
    )
    counts = broken.agg(*(F.count_if(one.name).alias(one.name) for one in suite)).collect()
    refused = {
        int(row["n"]): {one.name for one in suite if row[one.name]}
        for row in counts
        if any(row[one.name] for one in suite)
    }
    assert accepted == set(range(SETS)) - refused.keys()
    alone = {name for names in refused.values() if len(names) == 1 for name in names}
    assert len(accepted) > SETS / 5
    # Under the gap rule what overlaps is near, too.
    implied = set() if name == "native" else {"neighbours_in_order"}
    every_name = {one.name for one in suite}
    if name in ("gap", "native"):
        assert alone == every_name - implied
        assert set().union(*refused.values()) == every_name
        return
    assert set().union(*refused.values()) >= every_name - {"runaways_are_flagged"}
    number = F.split("user_id", "/")[0].cast("int")
    right = table.where(number.isin(sorted(accepted)))
    one_wrong = table.where(number.isin([*sorted(accepted), min(refused)]))
    row_checks = [one for one in suite if one.condition]
    assert spark_checks.all_hold(right, row_checks, rule)
    assert not spark_checks.all_hold(one_wrong, row_checks, rule) or refused[min(refused)] == {
        "session_id_is_key"
    }
