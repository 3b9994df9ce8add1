"""Great Expectations as write-audit-publish: nothing is published that its suite did not pass.

Spark counts, in one pass over the candidate, the rows that break each condition of
`expectations/`; Great Expectations judges the counts, keeps the result and writes the Data Docs
page (run on the rows themselves, it asks Spark once an expectation, which costs 1 to 2 seconds
each whatever the size). A suite that *errored* (an expectation could not be evaluated: GX reports
that as a failure with `exception_info`) is told apart from one that *failed*.

A check holds, fails, warns, or was *not evaluated*. In a night every check must be evaluated: one
that no job stated is an error. Whole tables lack what only a run knows (`jobs/whole.py`).
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
    """What a suite said: failing checks that stop, failing checks that warn, checks that were not
    evaluated with the reason, and the page."""

    failed: dict[str, int]
    warned: dict[str, int]
    not_evaluated: dict[str, str]
    checks: int
    docs: str

    @property
    def held(self) -> int:
        return self.checks - len(self.failed) - len(self.warned) - len(self.not_evaluated)

    def counts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checks": self.checks, "held": self.held, "failed": self.failed,
            "warned": self.warned, "not_evaluated": self.not_evaluated,
        }  # fmt: skip

    def in_words(self) -> str:
        """Such as `8 of 10 checks hold, 2 were not evaluated: lines_balance (…), …`."""
        if self.held == self.checks:
            return f"{self.checks} checks hold"
        parts = [f"{self.held} of {self.checks} checks hold"]
        broken = self.failed | self.warned
        if broken:
            parts.append(f"{len(broken)} {_do_not(len(broken))}: {', '.join(broken)}")
        if self.not_evaluated:
            were = "was" if len(self.not_evaluated) == 1 else "were"
            why = ", ".join(f"{name} ({why})" for name, why in self.not_evaluated.items())
            parts.append(f"{len(self.not_evaluated)} {were} not evaluated: {why}")
        return ", ".join(parts)


def _do_not(number: int) -> str:
    return "does not" if number == 1 else "do not"


def of_batch(checks: Iterable[Check]) -> list[str]:
    """The names of the checks that speak of a whole batch: a job must state whether they hold."""
    return [check.name for check in checks if not (check.condition or check.unique)]


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
    not_evaluated: Mapping[str, str] | None = None,
) -> Verdict:
    """Run the table's suite on candidate rows.

    Args:
        rows: the table's columns.
        facts: the checks that speak of the whole batch, as the job found them.
        severity: overrides a check's severity, by name.
        words: what to say of a check of the whole batch that does not hold, by name.
        not_evaluated: the checks of the whole batch that cannot be evaluated here, with the reason.
            A night has none.

    Raises:
        AuditFailed: rows break an invariant; names the checks and the first rows.
        AuditErrored: a check was not evaluated, and `not_evaluated` has no reason for it.
    """
    checks = suite(context, table)
    missing = _expected(table, checks, facts, not_evaluated or {})
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
    counts = found.asDict()
    return _settled(context, table, checks, counts, facts, missing, severity, words, frame)


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
    silent = [_told(checks, name) for name in missing if name not in why]
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
                "site_section_builders": {
                    "validations": {
                        "renderer": {
                            "module_name": "jobs.audit_page",
                            "class_name": "AuditPageRenderer",
                        }
                    }
                },
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
    not_evaluated: Mapping[str, str] | None = None,
) -> Verdict:
    """What Great Expectations says of the counts of what breaks each check; keeps the page.

    Args:
        counts: rows that break each check, but those of `not_evaluated`.
        not_evaluated: checks without a count, each with the reason. They are no expectations: the
            result's meta has them, and the page shows them apart.

    Raises:
        AuditErrored: a check could not be evaluated.
    """
    import great_expectations as gx

    from jobs.audit_page import NOT_EVALUATED

    missing = dict(not_evaluated or {})

    folder = docs_folder(context)
    os.makedirs(folder, exist_ok=True)
    gx_context = _gx_context(folder)
    expectations = gx.ExpectationSuite(name=f"{context.source.name}.{table.full_name}")
    expectations = gx_context.suites.add(expectations)
    for check in checks:
        if check.name in missing:
            continue
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
            actions=[],
            result_format="SUMMARY",
        )
    )
    with _quiet():
        outcome = checkpoint.run(
            batch_parameters={"dataframe": frame},
            run_id=gx.RunIdentifier(run_name=re.sub(r"[^\w.+-]", "_", context.batch)),
        )
    [(place, found)] = outcome.run_results.items()
    with _quiet():
        if missing:
            found.meta[NOT_EVALUATED] = [
                {"check": check.name, "says": check.says, "why": missing[check.name]}
                for check in checks
                if check.name in missing
            ]
            gx_context.validation_results_store.set(place, found)
        pages = [place, place.expectation_suite_identifier]
        gx_context.build_data_docs(site_names=["local"], resource_identifiers=pages)
    failed: dict[str, int] = {}
    warned: dict[str, int] = {}
    for result in found.results:
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
    page = os.path.join(folder, "data_docs", "index.html")
    return Verdict(failed, warned, missing, len(checks), page)


def _exceptions(info: Any) -> list[dict[str, Any]]:
    """GX gives one exception_info, or one a metric."""
    if not info:
        return []
    if "raised_exception" in info:
        return [info]
    return [one for one in info.values() if isinstance(one, dict)]
