"""Great Expectations judges counts, keeps the result, and builds the Data Docs page.

Decision 5 in docs/design/decisions.md.
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

from expectations.check import Check
from jobs.core.errors import AuditErrored
from jobs.core.settings import settings
from jobs.core.tables import Table

if TYPE_CHECKING:
    from jobs.lake.context import Context


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
            "checks": self.checks,
            "held": self.held,
            "failed": self.failed,
            "warned": self.warned,
            "not_evaluated": self.not_evaluated,
        }

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


def described(checks: Iterable[Check], name: str) -> str:
    return f"{name} ({next(check.says for check in checks if check.name == name)})"


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
                            "module_name": "jobs.audit.data_docs",
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
    missing = dict(not_evaluated or {})
    folder = docs_folder(context)
    os.makedirs(folder, exist_ok=True)
    gx_context = _gx_context(folder)
    evaluated = [check for check in checks if check.name not in missing]
    expectations = _expectations(
        gx_context, f"{context.source.name}.{table.full_name}", evaluated, severity
    )
    place, found = _evaluated(gx_context, context, table, expectations, counts)
    left_out = [
        {"check": check.name, "says": check.says, "why": missing[check.name]}
        for check in checks
        if check.name in missing
    ]
    _keep(gx_context, place, found, left_out)
    failed: dict[str, int] = {}
    warned: dict[str, int] = {}
    for result in found.results:
        name = result.expectation_config.kwargs["column"]
        if trouble := _exceptions(result.exception_info):
            raise AuditErrored(
                f"{table.full_name}: check {described(checks, name)} could not be evaluated, so "
                f"nothing is known about the rows: {trouble[0]}"
            )
        if not result.success:
            warns = result.expectation_config.severity == "warning"
            (warned if warns else failed)[name] = counts[name]
    page = os.path.join(folder, "data_docs", "index.html")
    return Verdict(failed, warned, missing, len(checks), page)


def _expectations(
    gx_context: Any, name: str, checks: Iterable[Check], severity: Mapping[str, str]
) -> Any:
    """A suite that expects each check's count to be 0."""
    import great_expectations as gx

    suite = gx_context.suites.add(gx.ExpectationSuite(name=name))
    for check in checks:
        kind = severity.get(check.name, check.severity)
        suite.add_expectation(
            gx.expectations.ExpectColumnMaxToBeBetween(
                column=check.name,
                max_value=0,
                severity="critical" if kind == "fail" else "warning",
                description=check.says,
                meta={"holds": check.condition or ", ".join(check.unique) or "stated by the job"},
            )
        )
    suite.save()
    return suite


def _evaluated(
    gx_context: Any, context: Context, table: Table, suite: Any, counts: Mapping[str, int]
) -> tuple[Any, Any]:
    """The suite's result on a frame of one row, the counts; and what the result is stored under."""
    import great_expectations as gx
    import pandas as pd

    asset = gx_context.data_sources.add_pandas("candidate").add_dataframe_asset(table.full_name)
    batches = asset.add_batch_definition_whole_dataframe("all")
    definition = gx_context.validation_definitions.add(
        gx.ValidationDefinition(name=table.full_name, data=batches, suite=suite)
    )
    checkpoint = gx_context.checkpoints.add(
        gx.Checkpoint(
            name=suite.name,
            validation_definitions=[definition],
            actions=[],
            result_format="SUMMARY",
        )
    )
    with _quiet():
        outcome = checkpoint.run(
            batch_parameters={"dataframe": pd.DataFrame([counts])},
            run_id=gx.RunIdentifier(run_name=re.sub(r"[^\w.+-]", "_", context.batch)),
        )
    [(place, found)] = outcome.run_results.items()
    return place, found


def _keep(gx_context: Any, place: Any, found: Any, left_out: list[dict[str, str]]) -> None:
    """Store what was not evaluated with the result, and build the pages."""
    from jobs.audit.data_docs import NOT_EVALUATED

    with _quiet():
        if left_out:
            found.meta[NOT_EVALUATED] = left_out
            gx_context.validation_results_store.set(place, found)
        pages = [place, place.expectation_suite_identifier]
        gx_context.build_data_docs(site_names=["local"], resource_identifiers=pages)


def _exceptions(info: Any) -> list[str]:
    """The messages of what was raised; GX gives one exception_info, or one a metric."""
    if not info:
        return []
    every = [info] if "raised_exception" in info else info.values()
    return [
        one["exception_message"]
        for one in every
        if isinstance(one, dict) and one.get("raised_exception")
    ]
