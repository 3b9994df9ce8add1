"""Suites are tested by breaking a good table one row at a time: the right check must fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import Column
from pyspark.sql import functions as F

from expectations import sessions as sessions_suite
from jobs.audit import great_expectations, spark_checks
from jobs.audit import suite as audit_suite
from jobs.core.errors import AuditErrored, AuditFailed
from jobs.core.tables import EVENTS, FINGERPRINTS, RECOMMENDATIONS, SEQUENCES, SESSIONS, Table
from jobs.gold import sequences as sequences_job
from jobs.lake.spark import compile_plans
from jobs.silver import cut_nightly
from tests.support.spark_tools import Workshop

pytestmark = pytest.mark.slow

T = 1_700_000_000


@pytest.fixture(scope="module")
def shop(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(spark, tmp_path_factory.mktemp("audit"))
    rows = [f"u{n % 3},i{n},{T + 400 * n}" for n in range(30)] + [f"u0,i1,{T + 90_000}"]
    made.land("log.csv", "\n".join(["user,item,ts", *rows]) + "\n")
    made.run()
    return made


BATCH = {
    EVENTS: ("lines_balance", "reject_share_within_bound"),
    SESSIONS: ("each_event_once", "events_balance"),
    SEQUENCES: ("positions_balance",),
    RECOMMENDATIONS: (
        "items_are_known",
        "lists_are_whole",
        "users_balance",
        "items_are_allowed",
        "seen_items_are_left_out",
        "categories_are_bounded",
    ),
    FINGERPRINTS: (
        "rows_are_of_their_files",
        "people_balance",
        "sessions_balance",
        "sequences_balance",
    ),
}


def stated(table: Table, *but: str) -> dict[str, bool]:
    """What a job states of a batch that is whole."""
    return {name: True for name in BATCH[table] if name not in but}


def breaking(rows: Any, where: str, changes: dict[str, Column]) -> Any:
    return rows.withColumns(
        {
            name: F.when(F.expr(where), value).otherwise(F.col(name))
            for name, value in changes.items()
        }
    )


def row_breaks(where: str, **changes: Any) -> Callable[[Any], Any]:
    """A function that changes columns of the rows of a condition."""

    def make(rows: Any) -> Any:
        return breaking(rows, where, {n: change(F.col(n)) for n, change in changes.items()})

    return make


def halved(rows: Any) -> Any:
    """A session in two: each holds alone, together they are too near."""
    rows = rows.where("user_id = 'u1'")
    halves = [
        rows.withColumn("events", F.slice("events", start, length)).withColumns(
            {"session_id": F.lit(f"half {start}"), "event_count": F.size("events"),
             "start_ts": F.col("events")[0].event_ts,
             "end_ts": F.element_at("events", -1).event_ts}
        )
        for start, length in ((1, 4), (5, 6))
    ]  # fmt: skip
    return halves[0].unionByName(halves[1])


def inside_the_first(_: Any) -> Column:
    return F.timestamp_seconds(F.lit(T + 1300))


SESSION_BREAKS: dict[str, Callable[[Any], Any]] = {
    "events_in_order": row_breaks("event_count > 5", events=F.reverse),
    "no_boundary_inside": row_breaks(
        "event_count > 5",
        events=lambda events: F.transform(
            events, lambda e, n: e.withField("event_ts", F.timestamp_seconds(F.lit(T) + n * 1801))),
    ),
    "bounds_are_the_events": row_breaks("event_count > 5", event_count=lambda count: count - 1),
    "runaways_are_flagged": row_breaks("event_count > 5", runaway=lambda _: F.lit("hours")),
    "session_id_is_key": row_breaks("true", session_id=lambda _: F.lit("one")),
    "neighbours_are_apart": halved,
    # u0's other session moves into the first one.
    "neighbours_in_order": row_breaks(
        "event_count = 1", start_ts=inside_the_first, end_ts=inside_the_first,
        start_date=lambda _: F.to_date(inside_the_first(_)),
        events=lambda events: F.transform(
            events, lambda e: e.withField("event_ts", inside_the_first(e))),
    ),
}  # fmt: skip


def named(error: BaseException) -> set[str]:
    """The checks that an audit names."""
    return set(re.findall(r"^  (\w+) \(", str(error), re.MULTILINE))


@pytest.mark.parametrize("check", SESSION_BREAKS)
def test_a_broken_session_fails_its_check(shop: Workshop, check: str) -> None:
    broken = SESSION_BREAKS[check](shop.lake.read(SESSIONS))
    with pytest.raises(AuditFailed) as raised:
        audit_suite.audit_candidate(shop.context(), SESSIONS, broken, stated(SESSIONS))
    assert check in named(raised.value) and "such as" in str(raised.value)


def test_what_is_whole_is_certified_and_what_is_broken_is_not(shop: Workshop) -> None:
    """The way for many rows says yes to good tables, and no to what the slow way says no to."""
    rule = shop.source.sessions.session_rule
    sessions, sequences = shop.lake.read(SESSIONS), shop.lake.read(SEQUENCES)
    suite = audit_suite.suite(shop.context(), SESSIONS)
    assert spark_checks.all_hold(sessions, suite, rule)
    unbounded = [check for check in suite if check.name != "bounds_are_the_events"]
    assert spark_checks.all_hold(sessions, unbounded, rule)  # looks at the events of neighbours
    assert spark_checks.all_hold(sequences, audit_suite.suite(shop.context(), SEQUENCES))
    assert spark_checks.all_hold(shop.lake.read(EVENTS), audit_suite.suite(shop.context(), EVENTS))
    for name, make in SESSION_BREAKS.items():
        if name != "session_id_is_key":  # a key is asked for apart
            assert not spark_checks.all_hold(make(sessions), suite, rule), name
    empty = {"events": F.slice("events", 1, 0)}
    assert not spark_checks.all_hold(breaking(sessions, "event_count > 5", empty), suite, rule)


def test_the_way_for_many_rows_compiles(shop: Workshop) -> None:
    """Spark interprets a plan that does not compile, and says so with 200 lines of Java."""
    spark = shop.lake.spark
    compile_plans(spark, True)
    strict = {
        "spark.sql.codegen.fallback": "false",
        "spark.sql.codegen.factoryMode": "CODEGEN_ONLY",
    }
    before = {name: spark.conf.get(name) for name in strict}
    for name, value in strict.items():
        spark.conf.set(name, value)
    try:
        for table in (EVENTS, SESSIONS, SEQUENCES):
            rule = shop.source.sessions.session_rule if table is SESSIONS else None
            suite = audit_suite.suite(shop.context(), table)
            assert spark_checks.all_hold(shop.lake.read(table), suite, rule)
            assert not audit_suite.doubled(shop.lake.read(table), table.key)
        assert spark_checks.same_events(shop.lake.read(SESSIONS), shop.lake.read(EVENTS))[2]
    finally:
        for name, value in before.items():
            spark.conf.set(name, value)


def test_the_same_events_are_told_from_as_many_others(shop: Workshop) -> None:
    sessions = shop.lake.read(SESSIONS)
    events = shop.lake.read(EVENTS).select("user_id", "event_id")
    assert spark_checks.same_events(sessions, events) == (31, 31, True)
    twice = breaking(
        sessions, "event_count > 5",
        {"events": F.transform("events", lambda e, n: F.when(n == 1, F.col("events")[0]).otherwise(e))},
    )  # fmt: skip
    assert spark_checks.same_events(twice, events) == (31, 31, False)
    swapped = sessions.withColumn("user_id", F.translate("user_id", "01", "10"))
    assert spark_checks.same_events(swapped, events) == (31, 31, False)
    assert spark_checks.same_events(sessions.where("event_count > 5"), events)[0] < 31


def test_two_sessions_that_belong_together_fail(shop: Workshop) -> None:
    whole = shop.lake.read(SESSIONS)
    cut, rule = halved(whole), shop.source.sessions.session_rule
    assert not spark_checks.times_are_apart(cut, rule) and spark_checks.times_are_apart(whole, rule)


def test_native_sessions_are_in_order_though_they_are_apart(shop: Workshop) -> None:
    """Under the native rule `neighbours_in_order` fails alone: b begins while a lasts."""
    rule = replace(shop.source.sessions.session_rule, native=True)
    suite = sessions_suite.checks(rule)
    checks = [check for check in suite if check.across]
    whole = shop.lake.read(SESSIONS).where("user_id = 'u0'")
    native = {
        "events": F.transform(
            "events",
            lambda e: e.withField("source_session_id", F.col("event_count").cast("string")),
        )
    }
    for rows, broken in (
        (whole, set()),
        (SESSION_BREAKS["neighbours_in_order"](whole), {"neighbours_in_order"}),
    ):
        rows = rows.withColumns(native)
        frame = audit_suite.broken(spark_checks.with_previous(rows, rule), SESSIONS.key, checks)
        assert {one.name for one in checks if frame.where(one.name).count()} == broken
        assert spark_checks.all_hold(rows, suite, rule) is (not broken)


SEQUENCE_BREAKS: dict[str, Callable[[Any], Any]] = {
    "user_id_is_key": lambda rows: rows.unionByName(rows.where("user_id = 'u0'")),
    **{
        check: row_breaks("user_id = 'u0'", **{column: make})
        for check, column, make in (
            ("ordinals_are_dense", "session_ordinal", lambda c: F.transform(c, lambda o: o * 2)),
            ("oldest_first", "event_ts", F.reverse),
            ("arrays_are_parallel", "feedback", lambda c: F.slice(c, 1, 1)),
            ("ordinals_begin_with_one", "session_ordinal",
             lambda c: F.transform(c, lambda o: o + 1)),
            ("items_are_known", "item_index", lambda c: F.transform(c, lambda i: i - 100)),
            ("exposed_items_are_known", "exposed_items",
             lambda c: F.transform(c, lambda _: F.array(F.lit(0)))),
            ("feedback_is_known", "feedback", lambda c: F.transform(c, lambda _: F.lit("loved"))),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("check", SEQUENCE_BREAKS)
def test_a_broken_sequence_fails_its_check(shop: Workshop, check: str) -> None:
    rows = SEQUENCE_BREAKS[check](shop.lake.read(SEQUENCES))
    with pytest.raises(AuditFailed) as raised:
        audit_suite.audit_candidate(shop.context(), SEQUENCES, rows, stated(SEQUENCES))
    assert check in named(raised.value) and "u0" in str(raised.value)


EVENT_BREAKS: dict[str, Callable[[Any], Any]] = {
    check: row_breaks("item_id IN ('i1', 'i2')", **{column: lambda _, made=made: made()})
    for check, column, made in (
        ("event_id_is_key", "event_id", lambda: F.lit("same")),
        ("ids_are_there", "user_id", lambda: F.lit(None).cast("string")),
        ("time_is_plausible", "event_ts", lambda: F.lit(None).cast("timestamp")),
        ("date_is_the_utc_date", "event_date", lambda: F.lit("2020-01-01").cast("date")),
        ("feedback_is_known", "feedback", lambda: F.lit("loved")),
        ("value_is_finite", "value", lambda: F.lit(float("nan"))),
        ("shown_items_have_ids", "exposed_with", lambda: F.array(F.lit("i4"), F.lit(""))),
    )
}


@pytest.mark.parametrize("check", EVENT_BREAKS)
def test_a_broken_event_fails_its_check(shop: Workshop, check: str) -> None:
    rows = EVENT_BREAKS[check](shop.lake.read(EVENTS))
    with pytest.raises(AuditFailed) as raised:
        audit_suite.audit_candidate(shop.context(), EVENTS, rows, stated(EVENTS))
    assert check in named(raised.value)


FINGERPRINT_BREAKS: dict[str, Callable[[Any], Any]] = {
    "file_is_key": lambda rows: rows.unionByName(rows.limit(1)),
    "table_is_known": row_breaks("events > 0", table_name=lambda _: F.lit("gold.items")),
    "events_are_counted": row_breaks(
        "true", kept_events=lambda kept: F.coalesce(kept, F.lit(0)) + 99
    ),
}


@pytest.mark.parametrize("check", FINGERPRINT_BREAKS)
def test_a_broken_fingerprint_fails_its_check(shop: Workshop, check: str) -> None:
    rows = FINGERPRINT_BREAKS[check](shop.lake.read(FINGERPRINTS))
    with pytest.raises(AuditFailed) as raised:
        audit_suite.audit_candidate(shop.context(), FINGERPRINTS, rows, stated(FINGERPRINTS))
    assert check in named(raised.value)


def test_every_check_of_rows_has_its_break(shop: Workshop) -> None:
    """(Those of batches: tests/jobs/audit/test_batch_checks.py. Those of lists: tests/jobs/recommend/test_score.py.)"""
    for table, breaks in (
        (EVENTS, EVENT_BREAKS), (SESSIONS, SESSION_BREAKS), (SEQUENCES, SEQUENCE_BREAKS),
        (FINGERPRINTS, FINGERPRINT_BREAKS),
    ):  # fmt: skip
        checks = audit_suite.suite(shop.context(), table)
        assert set(breaks) | set(BATCH[table]) == {check.name for check in checks}


def test_lines_that_do_not_balance_fail_and_a_high_reject_share_warns(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shop.lake.read(EVENTS)
    with pytest.raises(AuditFailed, match="lines_balance"):
        audit_suite.audit_candidate(
            shop.context(), EVENTS, rows, stated(EVENTS) | {"lines_balance": False}
        )
    verdict = audit_suite.audit_candidate(
        shop.context(), EVENTS, rows, stated(EVENTS) | {"reject_share_within_bound": False},
        severity={"reject_share_within_bound": "warn"},
    )  # fmt: skip
    assert verdict.failed == {} and verdict.warned == {"reject_share_within_bound": 1}
    assert "warning: bronze.events" in capsys.readouterr().out


@pytest.mark.parametrize("table", BATCH, ids=lambda table: table.full_name)
def test_a_check_that_no_job_stated_is_an_error(shop: Workshop, table: Table) -> None:
    """Whichever it is, whichever way the rows were audited."""
    checks = audit_suite.suite(shop.context(), table)
    assert tuple(audit_suite.of_batch(checks)) == BATCH[table]
    rows = shop.lake.spark.createDataFrame([], table.ddl)
    for name in BATCH[table]:
        said = rf"{table.full_name}: 1 of \d+ checks were not evaluated[\s\S]*{name} \("
        with pytest.raises(AuditErrored, match=said):
            audit_suite.audit_certified(shop.context(), table, 0, stated(table, name))
        with pytest.raises(AuditErrored, match=said):
            audit_suite.audit_candidate(shop.context(), table, rows, stated(table, name))
    verdict = audit_suite.audit_certified(shop.context(), table, 0, stated(table))
    assert verdict.held == verdict.checks == len(checks) and verdict.not_evaluated == {}


def test_an_expectation_that_raises_errored_and_did_not_fail(shop: Workshop) -> None:
    """Great Expectations says of it `success: false`, as of one that fails."""
    checks = audit_suite.suite(shop.context(), SEQUENCES)
    counts: dict[str, Any] = {check.name: 0 for check in checks}
    assert great_expectations.judge(shop.context(), SEQUENCES, counts, checks, {}).failed == {}
    name = checks[2].name
    for wrong in (
        {one: count for one, count in counts.items() if one != name},  # no such column
        counts | {name: "several"},
    ):
        with pytest.raises(AuditErrored, match=rf"gold.sequences: check {name} \(") as raised:
            great_expectations.judge(shop.context(), SEQUENCES, wrong, checks, {})
        assert "nothing is known about the rows" in str(raised.value)


def test_rows_that_cannot_be_counted_errored_and_did_not_fail(shop: Workshop) -> None:
    rows = shop.lake.read(SESSIONS).drop("events")
    with pytest.raises(AuditErrored, match="nothing is known about the rows"):
        audit_suite.audit_candidate(shop.context(), SESSIONS, rows, stated(SESSIONS))


def test_a_failed_audit_publishes_nothing_and_keeps_the_candidate(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps as a DAG runs them: compute, audit (red), and after the fix all three again."""
    shop.land("more.csv", f"user,item,ts\nu7,i1,{T}\nu7,i2,{T + 5}\n")
    shop.run("ingest")
    version = shop.version(SESSIONS)
    honest = cut_nightly.recut

    def careless(*asked: Any) -> Any:
        made = honest(*asked)
        turned = [list(reversed(events)) for events in made["events"].to_pylist()]
        at = made.column_names.index("events")
        return made.set_column(at, "events", pa.array(turned, made.schema.field("events").type))

    monkeypatch.setattr(cut_nightly, "recut", careless)
    shop.run("sessionize", step="compute", batch="night-1")
    with pytest.raises(AuditFailed, match="events_in_order"):
        shop.run("sessionize", step="audit", batch="night-1")
    assert shop.version(SESSIONS) == version
    candidate = shop.context(batch="night-1").candidate(SESSIONS)
    assert candidate.finished and candidate.part("sessions").count() == 1

    monkeypatch.undo()
    for step in ("compute", "audit", "publish"):
        result = shop.run("sessionize", step=step, batch="night-1")
    assert result.sessions_new == 1 and shop.version(SESSIONS) > version
    versions = shop.version(SESSIONS)
    shop.run("sessionize", step="publish", batch="night-1")  # a retry: changes nothing
    assert shop.version(SESSIONS) == versions


def test_published_tables_pass_their_suites_and_have_a_page(shop: Workshop) -> None:
    shop.run()
    result = shop.run("validate")
    assert len(result.notes) == 4 and all("checks hold" in note for note in result.notes)
    page = shop.lake_root / "clicks" / "_quality" / "data_docs" / "index.html"
    assert "clicks.silver.sessions" in page.read_text()


def test_validate_names_every_damaged_table_and_what_repairs_it(shop: Workshop) -> None:
    shop.run()
    for table, change in (
        (SESSIONS, {"event_count": "event_count + 1"}),
        (SEQUENCES, {"user_id": "user_id || ' of others'"}),
    ):
        shop.table(table).update(updates=change)
    with pytest.raises(AuditFailed) as raised:
        shop.run("validate")
    said = str(raised.value)
    for table in (SESSIONS, SEQUENCES, FINGERPRINTS):  # (that has their former files)
        assert f"{table.full_name} version {shop.version(table)}: " in said
    assert "bounds_are_the_events" in named(raised.value) and "candidate" not in said
    assert said.count("python -m jobs run --source clicks repairs") == 3
    assert "bronze.events version" in said  # what holds is said, too
    notes = shop.run().notes
    assert any("silver.sessions was changed by another writer" in note for note in notes)
    shop.run("validate")


def test_sequences_refuse_items_that_know_less(shop: Workshop) -> None:
    from jobs.core.errors import SettingsError

    shop.land("last.csv", f"user,item,ts\nu9,new,{T}\n")
    shop.run("ingest")
    shop.run("sessionize")
    with pytest.raises(SettingsError, match="python -m jobs items"):
        sequences_job.compute(shop.context())
    shop.run("items")
    shop.run("sequences")
