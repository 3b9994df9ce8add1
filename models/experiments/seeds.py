"""`python -m models seeds`: further seeds of two methods or more, until their difference is decided.

A plan says beforehand with how many seeds of each method the difference is looked at, how alpha is spent
over these looks (`models/evaluation/sequential.py`), and which gain is of interest. It is written as a tag
of a run in MLflow before anything is trained, and never changed. At each look the intervals are as wide as
the plan says; a difference is decided when its interval excludes 0, or excludes the gain of interest, or
when the last look is over. What is decided gets no more seeds. All looks follow from the recorded trainings,
so a command that was stopped goes on, and one that has ended says the same again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.core.environment import Say
from models.core.errors import UserError
from models.evaluation.sequential import NO_GAIN, OPEN, bounds, look, spent
from models.experiments.grid import Cell, head, keep, report_of, train_cell
from models.networks.methods import BASELINES
from models.registry import tracking
from models.selection.compare import BY, SAME, Entry, entries, measured_against

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is decided before the first look.

    pairs: (method, what it is compared with). first, step, most: the numbers of trainings of each method
    at the first look, between looks, and at the last. detect_pct: the gain of interest, in percent of the
    other method's NDCG@10; 0: none. alpha: of each difference, on both sides together. trained_by: the
    options of each method's trainings.
    """

    pairs: tuple[tuple[str, str], ...]
    first_seed: int
    first: int
    step: int
    most: int
    detect_pct: float
    alpha: float
    spending: str
    trained_by: Mapping[str, str]

    def check(self) -> None:
        """Raises:
        UserError: there are no looks, or no alpha to spend on them.
        """
        for option, value, holds, must in (
            ("--first", self.first, self.first >= 2, "2 or more, or nothing is known of seeds"),
            ("--step", self.step, self.step >= 1, "1 or more"),
            ("--max-seeds", self.most, self.most >= self.first, f"--first ({self.first}) or more"),
            ("--alpha", self.alpha, 0 < self.alpha < 0.5, "between 0 and 0.5, such as 0.05"),
            ("--detect", self.detect_pct, 0 <= self.detect_pct < 100, "percent, 0 to 100"),
        ):
            if not holds:
                raise UserError(f"{option} {value}: must be {must}")

    @property
    def looks(self) -> list[int]:
        """int[K]: trainings of each method at each look."""
        return [*range(self.first, self.most, self.step), self.most]

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.most))

    @property
    def bounds(self) -> list[float]:
        """float[K]: standard errors of each look."""
        shares = [number / self.most for number in self.looks]
        return [float(one) for one in bounds(shares, self.alpha, self.spending)]

    @property
    def text(self) -> str:
        """As JSON; equal plans have equal texts."""
        return json.dumps(asdict(self), sort_keys=True)

    def in_words(self) -> str:
        of_each = ", ".join(
            f"{number} seeds: {bound:.2f}"
            for number, bound in zip(self.looks, self.bounds, strict=True)
        )
        return (
            f"plan: {', '.join(f'{one} against {other}' for one, other in self.pairs)}; alpha "
            f"{self.alpha:g}, spent as {self.spending}; bounds in standard errors at {of_each}"
        )


def pairs_of(names: Sequence[str], against: str | None) -> tuple[tuple[str, str], ...]:
    """(method, what it is compared with) of methods by name.

    Raises:
        UserError: there are none.
    """
    if against is not None and against not in names:
        raise UserError(f"--against {against}: must be one of --methods, {', '.join(names)}")
    pairs = tuple(
        (name, other)
        for name in names
        if (other := against or measured_against(name, names)) is not None and other != name
    )
    if not pairs:
        raise UserError(
            f"--methods {','.join(names)}: no two of them are compared with each other. Add the backbone of "
            "a method, or set --against"
        )
    return pairs


def until_decided(
    source: str,
    comparison: str,
    plan: Plan,
    cells: Sequence[Cell],
    options: Sequence[str],
    command: str,
    file: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Train and look as long as the plan asks for it; `file` gets the results.

    Raises:
        UserError: another plan was written for the comparison, or its differences were looked at before.
    """
    from jobs.core.source_file import load_source

    plan.check()
    name = load_source(source).name
    client, experiment = tracking.connect(name)
    run_id = _written_plan(client, experiment, name, comparison, plan)
    say(plan.in_words())

    def trained(cell: Cell) -> bool:
        return train_cell(client, experiment, source, comparison, cell, options, say)

    def read() -> list[Entry]:
        return entries(client, experiment, name, comparison)

    outcome: dict[str, Any] = {"source": name, "comparison": comparison, "plan": asdict(plan)}
    outcome |= {"looks": plan.looks, "bounds": plan.bounds, "missing": [], "mlflow_run_id": run_id}
    outcome |= _looked(plan, cells, trained, read, say)
    _record(client, run_id, outcome, say)
    if file is not None:
        told = [report_of(client, experiment, comparison, cell) for cell in cells]
        written = {
            **head(tracking.SEEDS, command),
            "comparison": outcome,
            "cells": [row for row in told if row],
        }
        keep(file, written, say)
    return outcome


def _looked(
    plan: Plan,
    cells: Sequence[Cell],
    trained: Callable[[Cell], bool],
    read: Callable[[], list[Entry]],
    say: Say,
) -> dict[str, Any]:
    """All looks until everything is decided, or a training fails: the last of each difference
    (`methods`), and every one (`history`)."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    history: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    failed: list[str] = []
    for number, (seeds, bound) in enumerate(zip(plan.looks, plan.bounds, strict=True), 1):
        open_pairs = [pair for pair in plan.pairs if rows.get(pair, _NOTHING)["verdict"] == OPEN]
        names = {name for pair in open_pairs for name in pair}
        for cell in cells:
            if cell.seed in plan.seeds[:seeds] and cell.name in names:
                say(f"[look {number} of {len(plan.looks)}] {cell.name}, seed {cell.seed}")
                if not trained(cell):
                    failed.append(f"{cell.name}, seed {cell.seed}")
        if failed or not open_pairs:
            break
        found = read()
        facts = {one: found[0].facts.get(one) for one in SAME} | {"users": len(found[0].user_id)}
        for pair in open_pairs:
            rows[pair] = _look(found, pair, plan, number, seeds, bound)
            history.append(rows[pair])
            say(f"  {in_words(rows[pair])}")
    return {**facts, "methods": list(rows.values()), "history": history, "failed": failed}


_NOTHING: dict[str, Any] = {"verdict": OPEN}


def _look(
    read: Sequence[Entry], pair: tuple[str, str], plan: Plan, number: int, seeds: int, bound: float
) -> dict[str, Any]:
    """One difference at one look: by the seeds that the plan has until then, and no others."""
    ours, theirs = (_values(read, name, plan.seeds[:seeds]) for name in pair)
    found = look(ours, theirs, bound, plan.detect_pct / 100)
    base = float(theirs.mean())
    return {
        "method": pair[0],
        "against": pair[1],
        "look": number,
        "looks": len(plan.looks),
        "seeds": [ours.shape[1], theirs.shape[1]],
        BY: float(ours.mean()),
        f"{BY}_against": base,
        **asdict(found),
        "detect_pct": plan.detect_pct,
        "difference_pct": 100 * found.difference / base if base else None,
        "spent": spent(plan.spending, plan.alpha, seeds / plan.most),
        "alpha": plan.alpha,
        "last": number == len(plan.looks),
    }


def _values(read: Sequence[Entry], name: str, seeds: Sequence[int]) -> np.ndarray:
    """float64[U, S]: a method's NDCG@10 of each user, by seed; of a counted method its only one."""
    mine = {one.report["seed"]: one.by_user for one in read if one.report["method"] == name}
    counted = tracking.method_of(name) in BASELINES
    wanted = sorted(mine)[:1] if counted else seeds
    return np.stack([mine[seed] for seed in wanted], axis=1)


def _written_plan(
    client: MlflowClient, experiment: str, source: str, comparison: str, plan: Plan
) -> str:
    """The run that has the comparison's plan, which is this one; made if there is none.

    The first plan that was written counts, whichever process wrote it.
    """
    tags = {
        tracking.KIND: tracking.SEEDS,
        tracking.COMPARISON: comparison,
        tracking.PLAN: plan.text,
    }
    there = tracking.plans(client, experiment, comparison)
    if not there:
        if len(plan.text) > 7500:  # MLflow takes 8,000 characters
            raise UserError(
                f"--methods: a plan for {len(plan.trained_by)} methods is too long for a tag in MLflow. "
                "Plan fewer in one comparison"
            )
        _not_looked_at(client, experiment, source, comparison)
        client.create_run(experiment, run_name=f"seeds {comparison}", tags=tags)
        there = tracking.plans(client, experiment, comparison)
    first = there[0]
    before, now = json.loads(first.data.tags[tracking.PLAN]), json.loads(plan.text)
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"comparison {comparison!r} of {source!r} has a plan already, with {OPTION_OF[name]} "
                f"{before.get(name)}; {value} is asked for. A plan that is changed after a look no longer "
                f"keeps its alpha: give the options of the plan, or name a new --comparison with other seeds "
                "(--first-seed)"
            )
    return str(first.info.run_id)


OPTION_OF = {
    "pairs": "--methods or --against",
    "first_seed": "--first-seed",
    "first": "--first",
    "step": "--step",
    "most": "--max-seeds",
    "detect_pct": "--detect",
    "alpha": "--alpha",
    "spending": "--spending",
    "trained_by": "options of `train`",
}
"""Field of a plan -> by what it is set."""


def _not_looked_at(client: MlflowClient, experiment: str, source: str, comparison: str) -> None:
    """Raises:
    UserError: the comparison was compared before it had a plan.
    """
    if not tracking.runs(client, experiment, kind="compare", comparison=comparison):
        return
    seeds = [
        int(run.data.tags["seed"])
        for run in tracking.runs(client, experiment, kind="train", comparison=comparison)
    ]
    raise UserError(
        f"comparison {comparison!r} of {source!r} was compared before: a plan must be written before the first "
        f"look. Name a new --comparison, and take seeds that were not looked at: --first-seed "
        f"{max(seeds, default=0) + 1}"
    )


def _record(client: MlflowClient, run_id: str, outcome: dict[str, Any], say: Say) -> None:
    """Each look as a step of a curve, and the whole as a file of the run that has the plan."""
    names = str.maketrans({"+": ".", "(": None, ")": None})
    curves: dict[str, list[float]] = {}
    for row in outcome["history"]:
        for end in ("difference", "low", "high"):
            name = f"{end}.{row['method']} against {row['against']}".translate(names)
            curves.setdefault(name, []).append(row[end])
    tracking.Curves(client, run_id, say).finish(curves)
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        file = Path(folder) / "seeds.json"
        file.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
        client.log_artifact(run_id, str(file))
    client.set_terminated(run_id, "FAILED" if outcome["failed"] else "FINISHED")


def in_words(row: dict[str, Any]) -> str:
    """A sentence for a difference at a look."""
    crossed = {
        OPEN: "includes 0"
        + (" at the last look: not significant" if row["last"] else ": more seeds"),
        NO_GAIN: f"includes 0 and excludes a gain of {row['detect_pct']:g} % ({row['effect']:.4f})",
    }
    found = crossed.get(row["verdict"], f"excludes 0: {row['verdict']}")
    return (
        f"{row['method']} against {row['against']}, look {row['look']} of {row['looks']}, "
        f"{row['seeds'][0]} and {row['seeds'][1]} seeds: {row['difference']:+.4f}"
        f"{_percent(row)}; the adjusted interval [{row['low']:+.4f}, {row['high']:+.4f}] {found}. {abs(row['z']):.2f} "
        f"standard errors from 0, the bound is {row['bound']:.2f}; {row['spent']:.4f} of alpha "
        f"{row['alpha']:g} is spent"
    )


def _percent(row: dict[str, Any]) -> str:
    share = row["difference_pct"]
    return "" if share is None else f" ({share:+.1f} %)"


def show(outcome: dict[str, Any]) -> None:
    """A sentence for each difference."""
    print(f"{outcome['source']}, comparison {outcome['comparison']}:")
    for row in outcome["methods"]:
        print(f"  {in_words(row)}")


VERDICTS = {OPEN: "not significant", NO_GAIN: "no gain of {:g} %"}


def table(written: dict[str, Any]) -> str:
    """One row a difference: where it was decided, and its adjusted interval."""
    lines = [
        "| method | against | decided at | seeds | NDCG@10 | difference | adjusted interval | verdict |",
        "|---" * 8 + "|",
    ]
    for row in written["comparison"]["methods"]:
        verdict = VERDICTS.get(row["verdict"], f"**{row['verdict']}**").format(row["detect_pct"])
        lines.append(
            f"| {row['method']} | {row['against']} | look {row['look']} of {row['looks']} "
            f"| {row['seeds'][0]} and {row['seeds'][1]} | {row[BY]:.4f} "
            f"| {row['difference']:+.4f}{_percent(row)} "
            f"| {row['low']:+.4f} to {row['high']:+.4f} | {verdict} |"
        )
    return "\n".join(lines)
