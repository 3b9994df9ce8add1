"""Great Expectations as write-audit-publish: nothing is published that its suite did not pass.

Spark counts, in one pass over the candidate, the rows that break each condition of
`expectations/`; Great Expectations judges the counts, keeps the result and writes the Data Docs
page (run on the rows themselves, it asks Spark once an expectation, which costs 1 to 2 seconds
each whatever the size). A suite that *errored* (an expectation could not be evaluated: GX reports
that as a failure with `exception_info`) is distinguished from one that *failed*.

A check holds, fails, warns, or was *not evaluated*. In a night every check must be evaluated: one
that no job stated is an error. Whole tables lack what only a run knows (`jobs/whole.py`).

Decision 3 in docs/design/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from expectations import events as events_suite
from expectations import fingerprints as fingerprints_suite
from expectations import identities as identities_suite
from expectations import lists as lists_suite
from expectations import recommendations as recommendations_suite
from expectations import sequences as sequences_suite
from expectations import sessions as sessions_suite
from expectations.check import Check
from jobs.audit import spark_checks
from jobs.audit.great_expectations import Verdict, described, judge
from jobs.core.errors import AuditErrored, AuditFailed
from jobs.core.plan import Engine
from jobs.core.tables import (
    EVENTS,
    FINGERPRINTS,
    IDENTITIES,
    LISTS,
    PERSON_EVENTS,
    RECOMMENDATIONS,
    SEQUENCES,
    SESSIONS,
    Table,
)

if TYPE_CHECKING:
    from jobs.lake.context import Context

KEY = "row"
SHOWN_ROWS = 5


def of_batch(checks: Iterable[Check]) -> list[str]:
    """The names of the checks that speak of a whole batch: a job must state whether they hold."""
    return [check.name for check in checks if not (check.condition or check.unique)]


def suite(context: Context, table: Table) -> tuple[Check, ...]:
    """The checks of a table, for this source's rules."""
    if table is EVENTS:
        return events_suite.checks()
    if table is IDENTITIES:
        return identities_suite.checks()
    if table is PERSON_EVENTS:
        return identities_suite.checks_of_events()
    if table is SEQUENCES:
        return sequences_suite.checks()
    if table is RECOMMENDATIONS:
        return recommendations_suite.checks()
    if table is LISTS:
        return lists_suite.checks()
    if table is FINGERPRINTS:
        return fingerprints_suite.checks()
    if table is SESSIONS:
        return sessions_suite.checks(context.source.sessions.session_rule)
    raise KeyError(f"{table.full_name} has no suite")


def broken(rows: DataFrame, key: Iterable[str], checks: Iterable[Check]) -> DataFrame:
    """One row a row of the table: its key as text, and a boolean a check: does it break it?"""
    key_text = F.concat_ws("/", *(F.col(name).cast("string") for name in key))
    conditions = [
        F.expr(f"NOT ({check.condition or _alone(check.unique)})").alias(check.name)
        for check in checks
    ]
    return rows.select(key_text.alias(KEY), *conditions)


def _alone(columns: tuple[str, ...]) -> str:
    return f"count(*) OVER (PARTITION BY {', '.join(columns)}) = 1"


def doubled(rows: DataFrame, columns: tuple[str, ...]) -> bool:
    """Whether two rows may agree in the columns. False is certain; True may be wrong with the
    probability of a 64-bit hash collision. Rows need not be sorted by key for it."""
    hashes = rows.groupBy(F.xxhash64(*columns)).count()
    return not hashes.where("count > 1").isEmpty()


def audit_candidate(
    context: Context,
    table: Table,
    rows: DataFrame,
    facts: Mapping[str, bool],
    engine: Engine = Engine.COMPILED,
    severity: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
    not_evaluated: Mapping[str, str] | None = None,
    published: int | None = None,
) -> Verdict:
    """Run the table's suite on candidate rows.

    Args:
        rows: the table's columns.
        engine: Spark's; where plans are compiled, it is asked first whether all holds.
        facts: the checks that speak of the whole batch, as the job found them.
        severity: overrides a check's severity, by name.
        words: what to say of a check of the whole batch that does not hold, by name.
        not_evaluated: the checks of the whole batch that cannot be evaluated here, with the reason.
            A night has none.
        published: the version of the table whose rows they are; None: a candidate's.

    Raises:
        AuditFailed: rows break an invariant; names the checks and the first rows.
        AuditErrored: a check was not evaluated, and `not_evaluated` has no reason for it.
    """
    checks = suite(context, table)
    missing = _expected(table, checks, facts, not_evaluated or {})
    of_rows = [check for check in checks if check.condition or check.unique]
    context.enter(engine)
    rule = context.source.sessions.session_rule if table is SESSIONS else None
    try:
        if engine is Engine.COMPILED:
            of_rows = [one for one in of_rows if one.condition or doubled(rows, one.unique)]
            if spark_checks.all_hold(rows, of_rows, rule):
                of_rows = [one for one in of_rows if one.unique]
        if rule is not None and any(one.across for one in of_rows):
            rows = spark_checks.with_previous(rows, rule)
        frame = broken(rows, table.key, of_rows)
        found = frame.agg(
            F.count("*").alias("rows"), *(F.count_if(one.name).alias(one.name) for one in of_rows)
        ).first()
    except Exception as error:
        raise AuditErrored(
            f"{table.full_name}: the suite could not be evaluated, so nothing is known about the "
            f"rows: {str(error)[:500]}"
        ) from error
    assert found is not None
    counts = found.asDict()
    return _settled(
        context, table, checks, counts, facts, missing, severity, words, frame, published
    )


def audit_certified(
    context: Context,
    table: Table,
    number: int,
    facts: Mapping[str, bool],
    severity: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge a candidate of `number` rows of which `jobs/audit/arrow_columns.py` found that all checks of
    rows hold.

    Raises:
        AuditFailed: a check of the whole batch does not hold.
        AuditErrored: a check of the whole batch was not evaluated.
    """
    checks = suite(context, table)
    missing = _expected(table, checks, facts, {})
    counts = {"rows": number}
    return _settled(context, table, checks, counts, facts, missing, severity, words)


def _expected(
    table: Table, checks: tuple[Check, ...], facts: Mapping[str, bool], why: Mapping[str, str]
) -> dict[str, str]:
    """The checks of the batch that were not evaluated, each with its reason.

    Raises:
        AuditErrored: nobody evaluated a check, or said why not.
    """
    missing = [name for name in of_batch(checks) if name not in facts]
    silent = [described(checks, name) for name in missing if name not in why]
    if silent:
        raise AuditErrored(
            f"{table.full_name}: {len(silent)} of {len(checks)} checks were not evaluated, so "
            f"nothing is known about them and nothing is published: {', '.join(silent)}. The job "
            "that made the candidate must state whether they hold"
        )
    return {name: why[name] for name in missing}


def _settled(
    context: Context,
    table: Table,
    checks: tuple[Check, ...],
    counts: dict[str, Any],
    facts: Mapping[str, bool],
    missing: Mapping[str, str],
    severity: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
    frame: DataFrame | None = None,
    published: int | None = None,
) -> Verdict:
    """The verdict on counts of broken rows, warned of or raised."""
    of_all = of_batch(checks)
    for check in checks:
        if check.name not in of_all:  # checks of rows that are not counted are certified
            counts.setdefault(check.name, 0)
        elif check.name not in missing:
            counts[check.name] = int(not facts[check.name])
    verdict = judge(context, table, counts, checks, severity or {}, missing)
    for name, count in verdict.warned.items():
        said = (words or {}).get(name) or f"{described(checks, name)}: {_rows(count)}"
        print(f"warning: {table.full_name}: {said}", flush=True)
    if verdict.failed:
        lines = [
            f"{described(checks, name)}: {_rows(count)}" + _examples(frame, name)
            for name, count in verdict.failed.items()
        ]
        failed = f"{len(verdict.failed)} of {verdict.checks} checks failed"
        if published is None:
            said = (
                f"{table.full_name}: {failed}; the table stays at its last good version, the candidate "
                f"is kept in {context.candidate(table).folder}"
            )
        else:
            said = f"{table.full_name} version {published}: {failed}; {_repair(context, table)}"
        raise AuditFailed(
            f"{said}; the page is {verdict.docs}\n" + "\n".join(f"  {line}" for line in lines)
        )
    return verdict


def _repair(context: Context, table: Table) -> str:
    """What helps a published table whose rows break a check."""
    name = context.source.name
    if table is RECOMMENDATIONS:
        return f"python -m jobs score --source {name} makes the lists anew"
    run = f"python -m jobs run --source {name}"
    if table is EVENTS:
        return f"{run} --reload reads the landing files again"
    return f"{run} repairs what other writers changed, and {run} --rebuild makes all sessions and sequences anew"


def _rows(count: int) -> str:
    return f"{count} row{'s'[: count != 1]} break{'s'[: count == 1]} it"


def _examples(frame: DataFrame | None, name: str) -> str:
    """The keys of the first rows that break a check."""
    if frame is None or name not in frame.columns:
        return ""
    return ", such as " + ", ".join(row[KEY] for row in frame.where(name).take(SHOWN_ROWS))


# -- Great Expectations ---------------------------------------------------------------------------
