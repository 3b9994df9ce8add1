"""Who is better than whom, on the same cut of the same table, and where we cannot tell.

Each method is represented by its best seed on validation. Intervals of differences are paired:
both methods are asked about the same users, users are drawn, 95 % percentile. "Better" means that
the interval excludes 0. The winner has the highest NDCG@10 on test.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models import tracking
from models.errors import UserError
from models.metrics import bootstrap

if TYPE_CHECKING:
    from mlflow import MlflowClient

BY = "ndcg@10"
SAME = (
    "table_id", "table_version", "cut", "target", "request_time", "repeat_policy", "filters",
)  # fmt: skip
DRAWS = 2000


@dataclass(frozen=True)
class Entry:
    """One method's best seed: its report, its facts, and NDCG@10 of each user."""

    report: dict[str, Any]
    facts: dict[str, Any]
    user_id: list[str]
    by_user: NDArray[np.float64]


def compare(
    source: str, comparison: str, expect: list[str] | None = None, baseline: str | None = None
) -> dict[str, Any]:
    """Compare the finished runs tagged `comparison`; record the outcome as a run of its own."""
    client, experiment = tracking.connect(source)
    found = tracking.runs(client, experiment, kind="train", comparison=comparison)
    if not found:
        raise UserError(
            f"no finished training run of {source!r} is tagged comparison={comparison!r} in "
            f"{tracking.tracking_uri()}: train with `--comparison {comparison}` first"
        )
    # A task that ran twice counts once: the newest run of a method and seed.
    newest: dict[tuple[str, str], Any] = {}
    for run in found:
        newest.setdefault((run.data.tags["method"], run.data.tags["seed"]), run)
    read = [_read(client, run.info.run_id) for run in newest.values()]
    _same(read)
    best: dict[str, Entry] = {}
    for entry in read:
        method = entry.report["method"]
        if method not in best or _validation(entry) > _validation(best[method]):
            best[method] = entry
    order = sorted(best.values(), key=lambda e: (-_score(e), e.report["method"]))
    winner = order[0]
    methods = [_row(entry, best, winner) for entry in order]
    seeds: dict[str, int] = {}
    for method, _ in newest:
        seeds[method] = seeds.get(method, 0) + 1
    for row in methods:
        row["seeds"] = seeds[row["method"]]
    outcome = {
        "comparison": comparison,
        "source": source,
        "winner": winner.report["method"],
        **{name: winner.facts[name] for name in SAME},
        "users": len(winner.user_id),
        "methods": methods,
        "missing": [name for name in expect or [] if name not in best],
    }
    outcome["mlflow_run_id"] = _record(client, experiment, outcome)
    return outcome


def _read(client: MlflowClient, run_id: str) -> Entry:
    with tracking.downloaded(client, run_id, "evaluation") as folder:
        values = tracking.read_json(folder / "result.json")
        with np.load(folder / "per_user.npz", allow_pickle=False) as arrays:
            user_id = arrays["user_id"].tolist()
            by_user = arrays[BY.replace("@", "_at_")]
    return Entry(values["report"], values["facts"], user_id, by_user)


def _same(entries: list[Entry]) -> None:
    """Refuse to compare what was not asked the same questions."""
    first = entries[0]
    for other in entries[1:]:
        for name in SAME:
            if other.facts[name] != first.facts[name]:
                raise UserError(
                    f"cannot compare: {name} of {first.report['method']} (run "
                    f"{first.report['mlflow_run_id']}) is {first.facts[name]}, of "
                    f"{other.report['method']} (run {other.report['mlflow_run_id']}) "
                    f"{other.facts[name]}. Train both at one --table-version, with the same "
                    "--valid-from and --test-from, under a new --comparison"
                )
        if other.user_id != first.user_id:
            raise UserError(
                f"cannot compare: {first.report['method']} and {other.report['method']} were "
                f"asked about {len(first.user_id)} and {len(other.user_id)} users that differ"
            )


def _score(entry: Entry) -> float:
    return float(entry.report["metrics"][BY]["value"])


def _validation(entry: Entry) -> float:
    value = float(entry.report["validation_ndcg@10"])
    return -np.inf if np.isnan(value) else value


def _row(entry: Entry, best: dict[str, Entry], winner: Entry) -> dict[str, Any]:
    report = entry.report
    names = (
        "method", "seed", "num_params", "num_params_added", "params_added_pct", "epochs",
        "events_per_second", "peak_rss_mb", "seconds", "mlflow_run_id",
    )  # fmt: skip
    row: dict[str, Any] = {name: report[name] for name in names}
    for name, value in report["metrics"].items():
        row |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
    row["validation_ndcg@10"] = report["validation_ndcg@10"]
    vanilla = best.get(report["method"].split("+")[0])
    row["vs_vanilla"] = _against(entry, vanilla) if vanilla and vanilla is not entry else None
    row["vs_winner"] = _against(entry, winner) if winner is not entry else None
    return row


def _against(entry: Entry, other: Entry) -> dict[str, Any]:
    """Mean difference of NDCG@10 over users, with its paired interval."""
    difference = entry.by_user - other.by_user
    low, high = bootstrap(difference[:, None], DRAWS)[:, 0]
    verdict = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
    return {
        "method": other.report["method"],
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "verdict": verdict,
    }


def _record(client: MlflowClient, experiment: str, outcome: dict[str, Any]) -> str:
    """One compare run a comparison: comparing again replaces what it says."""
    comparison = outcome["comparison"]
    earlier = tracking.runs(client, experiment, kind="compare", comparison=comparison)
    if earlier:
        run_id = str(earlier[0].info.run_id)
    else:
        tags = {tracking.KIND: "compare", tracking.COMPARISON: comparison}
        run = client.create_run(experiment, run_name=f"compare {comparison}", tags=tags)
        run_id = str(run.info.run_id)
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        file = Path(folder) / "compare.json"
        file.write_text(json.dumps(outcome, indent=1))
        client.log_artifact(run_id, str(file))
    client.set_tag(run_id, "winner", outcome["winner"])
    scores = {f"{BY}.{row['method'].replace('+', '.')}": row[BY] for row in outcome["methods"]}
    tracking.log_values(client, run_id, metrics=scores)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def show(outcome: dict[str, Any]) -> None:
    """The table a person reads, and a sentence a method."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{outcome['source']}: {outcome['target'].replace('_', ' ')}, full ranking")
    for name in ("method", "ndcg@10", "95 % interval", "hr@10", "parameters", "added", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in outcome["methods"]:
        mark = " *" if row["method"] == outcome["winner"] else ""
        table.add_row(
            row["method"] + mark,
            f"{row[BY]:.4f}",
            f"{row[f'{BY}_low']:.4f} - {row[f'{BY}_high']:.4f}",
            f"{row['hr@10']:.4f}",
            f"{row['num_params']:,}",
            f"{row['num_params_added']:,} ({row['params_added_pct']:.2f} %)"
            if row["num_params_added"]
            else "",
            f"{row['seconds']:.0f}",
        )
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    print(
        f"* winner: {outcome['winner']}, of {len(outcome['methods'])} methods, the same "
        f"{outcome['users']:,} users, gold.sequences version {outcome['table_version']}, "
        f"cut {outcome['cut']}"
    )
    for row in outcome["methods"]:
        versus = row["vs_vanilla"]
        if versus:
            print(
                f"  {row['method']} against {versus['method']}: {versus['difference']:+.4f} "
                f"[{versus['low']:+.4f}, {versus['high']:+.4f}], {versus['verdict']}"
            )
    if outcome["missing"]:
        print(f"  missing (not finished): {', '.join(outcome['missing'])}")
