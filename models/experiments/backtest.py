"""`python -m models backtest`: methods judged night by night on one table version, then compared.

A grid whose every training is one under `--split nightly` (`models/training/nightly.py`). A method and
seed that has ended is not judged again; one that was stopped goes on after the last night that it
ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.core.config import EACH_NIGHT
from models.core.environment import Say
from models.core.errors import UserError
from models.experiments.grid import Cell, command_line, grid

DECIDED = ("--split", "--nights", "--each-night", "--table-version", "--valid-from", "--test-from")


@dataclass(frozen=True)
class Plan:
    """What every training gets, and the comparison that they belong to."""

    source: str
    comparison: str
    nights: int
    each_night: str
    version: int
    given: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        return [
            "--split", "nightly", "--nights", str(self.nights), "--each-night", self.each_night,
            "--table-version", str(self.version), *self.given,
        ]  # fmt: skip


def planned(
    source: str,
    lake: str,
    nights: int | None,
    each_night: str | None,
    version: int | None,
    comparison: str | None,
    options: Sequence[str],
) -> Plan:
    """The nights and the table version, pinned for all trainings.

    Raises:
        UserError: the log has too few nights; an option after -- is one that the backtest decides.
    """
    from jobs.core.source_file import load_source
    from models.data.load import nights_to_ask

    twice = [name for name in (one.partition("=")[0] for one in options) if name in DECIDED]
    if twice:
        raise UserError(f"{twice[0]} after --: `backtest` sets it. Leave it out there")
    name = load_source(source).name
    version, count = nights_to_ask(lake, name, version, nights)
    each = each_night or EACH_NIGHT[0]
    called = comparison or f"backtest-v{version}-{count}-nights-{each}"
    return Plan(source, called, count, each, version, tuple(options))


def backtest(
    plan: Plan,
    cells: Sequence[Cell],
    methods: str,
    seeds: str,
    tuned: bool,
    file: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Judge what is not judged yet, compare, write `file`."""
    command = command_line(
        "backtest",
        plan.source,
        plan.comparison,
        plan.given,
        methods=methods,
        seeds=seeds,
        nights=str(plan.nights),
        **{"each-night": plan.each_night, "table-version": str(plan.version)},
        tuned=tuned,
    )
    return grid(plan.source, plan.comparison, cells, plan.options, command, file, say)
