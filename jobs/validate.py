"""Great Expectations as write-audit-publish: nothing is published that its suite did not pass.

Spark counts, in one pass over the candidate, the rows that break each condition of
`expectations/`; Great Expectations judges the counts, keeps the result and writes the Data Docs
page (run on the rows themselves, it asks Spark once an expectation, which costs 1 to 2 seconds
each whatever the size). A suite that *errored* (an expectation could not be evaluated: GX reports that as a failure with
`exception_info`) is told apart from one that *failed*.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from expectations import events as events_suite
from expectations import recommendations as recommendations_suite
from expectations import sequences as sequences_suite
from expectations import sessions as sessions_suite
from expectations.check import Check
from jobs import certify
from jobs.errors import AuditErrored, AuditFailed
from jobs.settings import settings
from jobs.tables import EVENTS, RECOMMENDATIONS, SEQUENCES, SESSIONS, Table

if TYPE_CHECKING:
    from jobs.context import Context

KEY = "row"
SHOWN_ROWS = 5


@dataclass(frozen=True)
class Verdict:
    """What a suite said: failing checks that stop, failing checks that warn, and the page."""

    failed: dict[str, int]
    warned: dict[str, int]
    checks: int
    docs: str


def suite(context: Context, table: Table) -> tuple[Check, ...]:
    """The checks of a table, for this source's rules."""
    if table is EVENTS:
        return events_suite.checks()
    if table is SEQUENCES:
        return sequences_suite.checks()
    if table is RECOMMENDATIONS:
        return recommendations_suite.checks()
    if table is SESSIONS:
        rule = context.source.sessions
        return sessions_suite.checks(
            rule.rule, rule.gap_us, rule.max_session_us, rule.max_session_events
        )
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
    """Whether two rows may agree in the columns: surely so if they do, and by the chance of a
    64-bit hash if they do not. Rows need not be sorted by key for it."""
    hashes = rows.groupBy(F.xxhash64(*columns)).count()
    return not hashes.where("count > 1").isEmpty()


def audit_candidate(
    context: Context,
    table: Table,
    rows: DataFrame,
    facts: Mapping[str, bool],
    severity: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Verdict:
    """Run the table's suite on candidate rows.

    Args:
        rows: the table's columns.
        facts: the checks that speak of the whole batch, as the job found them.
        severity: overrides a check's severity, by name.
        words: what to say of a check of the whole batch that does not hold, by name.

    Raises:
        AuditFailed: rows break an invariant; names the checks and the first rows.
        AuditErrored: a check could not be evaluated.
    """
    checks = suite(context, table)
    of_rows = [check for check in checks if check.condition or check.unique]
    rule = context.source.sessions if table is SESSIONS else None
    try:
        if context.many:
            of_rows = [one for one in of_rows if one.condition or doubled(rows, one.unique)]
            if certify.all_hold(rows, of_rows, rule):
                of_rows = [one for one in of_rows if one.unique]
        if rule is not None and any(one.across for one in of_rows):
            rows = certify.with_previous(rows, rule.rule)
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
    return _settled(context, table, checks, found.asDict(), facts, severity, words, frame)


def audit_certified(
    context: Context,
    table: Table,
    number: int,
    facts: Mapping[str, bool],
    severity: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge a candidate of `number` rows of which `jobs/arrow_checks.py` found that all checks of
    rows hold.

    Raises:
        AuditFailed: a check of the whole batch does not hold.
    """
    checks = suite(context, table)
    return _settled(context, table, checks, {"rows": number}, facts, severity, words)


def _settled(
    context: Context,
    table: Table,
    checks: tuple[Check, ...],
    counts: dict[str, Any],
    facts: Mapping[str, bool],
    severity: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
    frame: DataFrame | None = None,
) -> Verdict:
    """The verdict on counts of broken rows, warned of or raised."""
    for check in checks:  # what is not counted row by row holds of all, or the job says whether
        counts.setdefault(check.name, int(not facts.get(check.name, True)))
    verdict = judge(context, table, counts, checks, severity or {})
    for name, count in verdict.warned.items():
        said = (words or {}).get(name) or f"{_told(checks, name)}: {_rows(count)}"
        print(f"warning: {table.full_name}: {said}", flush=True)
    if verdict.failed:
        lines = [
            f"{_told(checks, name)}: {_rows(count)}" + _examples(frame, name)
            for name, count in verdict.failed.items()
        ]
        raise AuditFailed(
            f"{table.full_name}: {len(verdict.failed)} of {verdict.checks} checks failed; the "
            "table stays at its last good version, the candidate is kept in "
            f"{context.candidate(table).folder}, the page is {verdict.docs}\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    return verdict


def _rows(count: int) -> str:
    return f"{count} row{'s'[: count != 1]} of the candidate break{'s'[: count == 1]} it"


def _told(checks: Iterable[Check], name: str) -> str:
    return f"{name} ({next(check.says for check in checks if check.name == name)})"


def _examples(frame: DataFrame | None, name: str) -> str:
    """The keys of the first rows that break a check."""
    if frame is None or name not in frame.columns:
        return ""
    return ", such as " + ", ".join(row[KEY] for row in frame.where(name).take(SHOWN_ROWS))


# -- Great Expectations ---------------------------------------------------------------------------


def docs_folder(context: Context) -> str:
    """Where results and Data Docs are kept: beside the tables, or in `SESSIONMILL_CACHE`."""
    root = context.lake.root
    base = root if "://" not in root else settings().cache_root()
    return os.path.join(base, context.source.name, "_quality")


def _gx_context(folder: str) -> Any:
    """A context whose results and pages are files, and whose definitions live in this process:
    two runs at once share no file that both rewrite."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import DataContextConfig

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    files = {"class_name": "TupleFilesystemStoreBackend"}
    config = DataContextConfig(
        config_version=4.0,
        analytics_enabled=False,
        expectations_store_name="expectations_store",
        validation_results_store_name="validation_results_store",
        checkpoint_store_name="checkpoint_store",
        stores={
            "expectations_store": {"class_name": "ExpectationsStore"},
            "validation_definition_store": {"class_name": "ValidationDefinitionStore"},
            "checkpoint_store": {"class_name": "CheckpointStore"},
            "validation_results_store": {
                "class_name": "ValidationResultsStore",
                "store_backend": {**files, "base_directory": os.path.join(folder, "results")},
            },
        },
        data_docs_sites={
            "local": {
                "class_name": "SiteBuilder",
                "show_how_to_buttons": False,
                "store_backend": {**files, "base_directory": os.path.join(folder, "data_docs")},
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            }
        },
        progress_bars={"globally": False},
    )
    return gx.get_context(project_config=config, mode="ephemeral")


@contextlib.contextmanager
def _quiet() -> Any:
    """GX's progress bars write to standard error whatever its settings say."""
    with tempfile.TemporaryFile("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def judge(
    context: Context,
    table: Table,
    counts: Mapping[str, int],
    checks: tuple[Check, ...],
    severity: Mapping[str, str],
) -> Verdict:
    """What Great Expectations says of the counts of what breaks each check; keeps the page.

    Raises:
        AuditErrored: a check could not be evaluated.
    """
    import great_expectations as gx

    folder = docs_folder(context)
    os.makedirs(folder, exist_ok=True)
    gx_context = _gx_context(folder)
    expectations = gx.ExpectationSuite(name=f"{context.source.name}.{table.full_name}")
    expectations = gx_context.suites.add(expectations)
    for check in checks:
        kind = severity.get(check.name, check.severity)
        expectations.add_expectation(
            gx.expectations.ExpectColumnMaxToBeBetween(
                column=check.name,
                max_value=0,
                severity="critical" if kind == "fail" else "warning",
                description=check.says,
                meta={"holds": check.condition or ", ".join(check.unique) or "stated by the job"},
            )
        )
    expectations.save()
    import pandas as pd

    frame = pd.DataFrame([counts])
    asset = gx_context.data_sources.add_pandas("candidate").add_dataframe_asset(table.full_name)
    batches = asset.add_batch_definition_whole_dataframe("all")
    definition = gx_context.validation_definitions.add(
        gx.ValidationDefinition(name=table.full_name, data=batches, suite=expectations)
    )
    checkpoint = gx_context.checkpoints.add(
        gx.Checkpoint(
            name=f"{context.source.name}.{table.full_name}",
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["local"])],
            result_format="SUMMARY",
        )
    )
    with _quiet():
        outcome = checkpoint.run(
            batch_parameters={"dataframe": frame},
            run_id=gx.RunIdentifier(run_name=re.sub(r"[^\w.+-]", "_", context.batch)),
        )
    failed: dict[str, int] = {}
    warned: dict[str, int] = {}
    for result in next(iter(outcome.run_results.values())).results:
        name = result.expectation_config.kwargs["column"]
        trouble = [
            info["exception_message"]
            for info in _exceptions(result.exception_info)
            if info.get("raised_exception")
        ]
        if trouble:
            raise AuditErrored(
                f"{table.full_name}: check {_told(checks, name)} could not be evaluated, so "
                f"nothing is known about the rows: {trouble[0]}"
            )
        if not result.success:
            warns = result.expectation_config.severity == "warning"
            (warned if warns else failed)[name] = counts[name]
    return Verdict(failed, warned, len(checks), os.path.join(folder, "data_docs", "index.html"))


def _exceptions(info: Any) -> list[dict[str, Any]]:
    """GX gives one exception_info, or one a metric."""
    if not info:
        return []
    if "raised_exception" in info:
        return [info]
    return [one for one in info.values() if isinstance(one, dict)]


def whole_facts(context: Context, sessions: DataFrame, upto: int | None) -> dict[str, bool]:
    """What must hold of all sessions together, against the events that they were cut from."""
    if upto is None:
        return {"events_balance": sessions.isEmpty()}
    events = context.lake.read(EVENTS, upto).select("user_id", "event_id")
    inside, there, same = certify.same_events(sessions, events)
    return {"events_balance": inside == there, "each_event_once": inside != there or same}


def validate_tables(context: Context, only: str | None) -> Any:
    """Run the suites on the whole published tables, as they stand.

    Raises:
        SettingsError: `only` names no table with a suite, or there is no such table yet.
        AuditFailed, AuditErrored: as in a night.
    """
    from jobs.context import Result
    from jobs.errors import SettingsError

    tables = {table.full_name: table for table in (EVENTS, SESSIONS, SEQUENCES, RECOMMENDATIONS)}
    if only is not None and only not in tables:
        raise SettingsError(f"--table {only}: tables with a suite are {', '.join(tables)}")
    result = Result()
    for name, table in tables.items():
        if only not in (None, name):
            continue
        version = context.lake.version(table)
        if version is None and table is RECOMMENDATIONS and only is None:
            continue  # nobody has scored yet
        if version is None:
            raise SettingsError(f"{context.lake.path(table)} is no table: run the jobs first")
        rows = context.lake.read(table, version)
        facts: dict[str, bool] = {}
        if table is SESSIONS:
            facts = whole_facts(context, rows, context.lake.consumed(SESSIONS, EVENTS))
        verdict = audit_candidate(context, table, rows, facts)
        result.tables_in[name] = version
        result.notes.append(f"{name} version {version}: {verdict.checks} checks hold")
    return result
