"""Who is better than whom, on the same cut of the same table, and where we cannot tell.

Each method is represented by its best seed on validation. Intervals of differences are paired:
both methods are evaluated on the same users, users are drawn, 95 % percentile. "Better" means that
the interval excludes 0. Against the vanilla backbone there is also the difference over all seeds, whose
interval knows of both users and trainings (`models/evaluation/components.py`), and the differences by
kind of target (the first item of a session, an item inside one). Beside each is the smallest true
difference that would have been significant with a probability of 80 %. A next-session model is compared
with the next-item model of its encoder, `+fb` where that is there. The winner has the highest NDCG@10 on test. A trained method is
recommended only if it is better than the best of the counted baselines. Where methods were tuned
(`python -m models tune`), the table says by what budget, and a sentence where budgets differ.

Decision 11 in docs/design/decisions.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.core.errors import counted
from models.core.config import ModelConfig, TrainConfig
from models.core.errors import UserError
from models.core.knobs import option_named
from models.data.nights import AGES
from models.data.paper_a import same_events
from models.data.splits import in_words
from models.evaluation.components import components, over_seeds
from models.evaluation.metrics import bootstrap
from models.networks.methods import BASELINES, tunable
from models.registry import tracking
from models.registry.recipes import budget_in_words

if TYPE_CHECKING:
    from mlflow import MlflowClient

BY = "ndcg@10"
SAME = {  # what has to be equal -> by what it is set
    "table_id": "--table-version",
    "table_version": "--table-version",
    "cut": "--split, --valid-from, --test-from, --train-until and --nights",
    "each_night": "--each-night",
    "target": option_named(TrainConfig, "target"),
    "request_time": option_named(ModelConfig, "request_time"),
    "repeat_policy": option_named(ModelConfig, "repeat_policy"),
    "filters": "[filters] of the source file",
    "preprocess": "--preprocess",
}
DRAWS = 2000
WORDS = {"cannot tell": "not significant"}
"""Verdicts that a person reads otherwise than they are stored."""
REPORTED = (  # by a training, and a column of the comparison
    "method", "seed", "num_params", "num_params_added", "params_added_pct", "epochs",
    "events_per_second", "peak_rss_mb", "seconds", "mlflow_run_id",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One method's best seed: its report, its facts, and NDCG@10 of each user."""

    report: dict[str, Any]
    facts: dict[str, Any]
    user_id: list[str]
    by_user: NDArray[np.float64]
    # The same by kind of target, and by age of the item.
    parts: dict[str, tuple[list[str], NDArray[np.float64]]]


def compare(
    source: str, comparison: str, expect: list[str] | None = None, baseline: str | None = None
) -> dict[str, Any]:
    """Compare the finished runs tagged `comparison`; record the outcome as a run of its own."""
    client, experiment = tracking.connect(source)
    read = entries(client, experiment, source, comparison)
    best: dict[str, Entry] = {}
    for entry in read:
        method = entry.report["method"]
        if method not in best or _validation(entry) > _validation(best[method]):
            best[method] = entry
    order = sorted(best.values(), key=lambda e: (-_score(e), e.report["method"]))
    winner = order[0]
    trainings: dict[str, list[Entry]] = {}
    for entry in read:
        trainings.setdefault(entry.report["method"], []).append(entry)
    counted = next((entry for entry in order if _is_counted(entry)), None)
    methods = [_row(entry, best, winner, trainings) | _advice(entry, counted) for entry in order]
    outcome = {
        "comparison": comparison,
        "source": source,
        "winner": winner.report["method"],
        **{name: winner.facts.get(name) for name in SAME},
        "users": len(winner.user_id),
        "methods": methods,
        "missing": [name for name in expect or [] if name not in best],
        "planned": bool(tracking.plans(client, experiment, comparison)),
    }
    outcome["mlflow_run_id"] = _record(client, experiment, outcome)
    return outcome


def entries(client: MlflowClient, experiment: str, source: str, comparison: str) -> list[Entry]:
    """All trainings of a comparison, one of each method and seed, evaluated on the same targets.

    Raises: UserError: there is none, or they were evaluated on others.
    """
    found = tracking.runs(client, experiment, kind="train", comparison=comparison)
    if not found:
        others = tracking.comparisons_there(client, experiment, "train", comparison)
        raise UserError(
            f"comparison {comparison!r} of {source!r} has no finished training in "
            f"{tracking.tracking_uri()}{others}. To begin it, run `python -m models train --source {source} --method METHOD "
            f"--comparison {comparison}`"
        )
    # A task that ran twice counts once: the newest run of a method and seed.
    newest: dict[tuple[str, str], Any] = {}
    for run in found:
        newest.setdefault((run.data.tags["method"], run.data.tags["seed"]), run)
    read = [entry_of(client, run.info.run_id) for run in newest.values()]
    _same(read)
    return read


def entry_of(client: MlflowClient, run_id: str) -> Entry:
    """What a training recorded of its score."""
    with tracking.downloaded(client, run_id, "evaluation") as folder:
        values = tracking.read_json(folder / "result.json")
        report = values["report"]
        with np.load(folder / "per_user.npz", allow_pickle=False) as arrays:
            user_id = arrays["user_id"].tolist()
            name = BY.replace("@", "_at_")
            by_user = arrays[name]
            parts = {
                kind: (arrays[f"{kind}.user_id"].tolist(), arrays[f"{kind}.{name}"])
                for kind in (*report.get("by_target", {}), *report.get("by_age", {}))
            }
    return Entry(report, values["facts"], user_id, by_user, parts)


def _same(entries: list[Entry]) -> None:
    """Refuse to compare what was not asked the same questions."""
    first = entries[0]
    for other in entries[1:]:
        for name, option in SAME.items():
            if _fact(other, name) != _fact(first, name):
                said = [
                    in_words(one.facts[name]) if name == "cut" else one.facts.get(name)
                    for one in (first, other)
                ]
                raise UserError(
                    f"cannot compare: {name} of {first.report['method']} (run "
                    f"{first.report['mlflow_run_id']}) is {said[0]}, of "
                    f"{other.report['method']} (run {other.report['mlflow_run_id']}) "
                    f"{said[1]}. Train both with the same {option}, under a new --comparison; or take the "
                    f"one that does not belong here out: MLFLOW_TRACKING_URI={tracking.tracking_uri()} mlflow "
                    "runs delete --run-id RUN"
                )
        if other.user_id != first.user_id:
            raise UserError(
                f"cannot compare: {first.report['method']} and {other.report['method']} were "
                f"evaluated on {len(first.user_id)} and {len(other.user_id)} users that differ. "
                "Train both with the same options, under a new --comparison"
            )


def _fact(entry: Entry, name: str) -> Any:
    value = entry.facts.get(name)
    return same_events(value) if name == "preprocess" and value else value


def _score(entry: Entry) -> float:
    return float(entry.report["metrics"][BY]["value"])


def _validation(entry: Entry) -> float:
    value = float(entry.report["validation_ndcg@10"])
    return -np.inf if np.isnan(value) else value


def _row(
    entry: Entry, best: dict[str, Entry], winner: Entry, trainings: dict[str, list[Entry]]
) -> dict[str, Any]:
    report = entry.report
    row: dict[str, Any] = {name: report[name] for name in REPORTED}
    for name, value in report["metrics"].items():
        row |= {name if end == "value" else f"{name}_{end}": v for end, v in value.items()}
    row["validation_ndcg@10"] = report["validation_ndcg@10"]
    row["epoch_s"] = round(epoch_s(report), 3) if report["epochs"] else None
    row["by_target"] = _parts(report.get("by_target", {}))
    if "by_age" in report:
        row["by_age"] = _parts(report["by_age"])
        row["by_night"] = report["by_night"]
    mine = trainings[report["method"]]
    row["seeds"] = len(mine)
    scores = [_score(one) for one in mine]
    row[f"{BY}_mean"], row[f"{BY}_std"] = float(np.mean(scores)), float(np.std(scores))
    vanilla = other_method(report["method"], best)
    if vanilla is None:
        row["vs_vanilla"] = row["vs_vanilla_seeds"] = None
    else:
        row["vs_vanilla"] = _against(entry, vanilla)
        row["vs_vanilla_seeds"] = _over_seeds(mine, trainings[vanilla.report["method"]])
        for kind, part in [*row["by_target"].items(), *row.get("by_age", {}).items()]:
            if entry.parts[kind][0] == vanilla.parts[kind][0] and one_rule(entry, vanilla):
                part["vs_vanilla"] = _against(entry, vanilla, kind)
    row["vs_winner"] = _against(entry, winner) if winner is not entry else None
    row["tuning"] = report.get("tuning")  # (0.1.0 knew none)
    sees = report.get("catalogue", False)
    row["sees_more"] = bool(vanilla and sees and not vanilla.report.get("catalogue", False))
    return row


def epoch_s(report: dict[str, Any]) -> float:
    """Seconds of one epoch of a trained method, over all nights that were trained for."""
    epochs: int = report["epochs"] + sum(night["epochs"] for night in report.get("by_night", ()))
    return float(report["train_s"] / epochs)


def one_rule(one: Entry, other: Entry) -> bool:
    """Whether both were trained on the same sessions: else other targets open one."""
    return bool(one.facts.get("preprocess") == other.facts.get("preprocess"))


def _parts(parts: dict[str, Any]) -> dict[str, Any]:
    """Kinds of target, or ages of items, that were evaluated."""
    return {
        name: {"users": part["counts"]["users"], "targets": part["counts"]["targets"]}
        | {BY: part["metrics"][BY]["value"]}
        | {f"{BY}_{end}": part["metrics"][BY][end] for end in ("low", "high")}
        for name, part in parts.items()
        if part["counts"]["users"]
    }


def sees_more(outcome: dict[str, Any]) -> str:
    """Which methods know more than what they are compared with, in words; empty if none does."""
    more = [row["method"] for row in outcome["methods"] if row.get("sees_more")]
    if not more:
        return ""
    return (
        f"{', '.join(more)} read the catalogue ([items]), which no next-item model does: --no-side "
        "trains without it"
    )


def budget_of(row: dict[str, Any]) -> str:
    """The budget that a method was tuned by, in words; empty: its settings are the preset's."""
    return budget_in_words(row["tuning"]) if row.get("tuning") else ""


def tuned_unequally(outcome: dict[str, Any]) -> list[str]:
    """Where methods of a comparison were tuned by different budgets, or some were not: a sentence
    each. Methods that have no setting that is tuned are as good as tuned."""
    rows = outcome["methods"]
    groups: dict[tuple[int, float | None], list[str]] = {}
    for row in rows:
        if told := row.get("tuning"):
            groups.setdefault((told["trials"], told["minutes"]), []).append(row["method"])
    if not groups:
        return []
    found = []
    if len(groups) > 1:
        of_each = "; ".join(
            f"{', '.join(names)}: {counted(trials, 'trial')}"
            + (f", {minutes:g} min" if minutes is not None else "")
            for (trials, minutes), names in groups.items()
        )
        found.append(f"budgets of tuning differ ({of_each}), which favours the larger ones")
    plain = [
        row["method"]
        for row in rows
        if not row.get("tuning") and tunable(tracking.method_of(row["method"]))
    ]
    if plain:
        found.append(f"{', '.join(plain)}: not tuned, unlike the others, which this favours")
    return found


def _is_counted(entry: Entry) -> bool:
    return tracking.method_of(entry.report["method"]) in BASELINES


def _advice(entry: Entry, counted: Entry | None) -> dict[str, Any]:
    """Whether a trained method is recommended: it is better than the best counted baseline. None:
    it is counted itself, or the comparison has no baseline."""
    if counted is None or _is_counted(entry):
        return {"vs_baseline": None, "recommended": None}
    versus = _against(entry, counted)
    return {"vs_baseline": versus, "recommended": versus["verdict"] == "better"}


def not_recommended(outcome: dict[str, Any]) -> list[str]:
    """A sentence for each trained method that does not beat the best counted baseline."""
    rows = [row for row in outcome["methods"] if row.get("recommended") is False]
    return [
        f"{row['method']} is not recommended: it does not beat {versus['method']} (NDCG@10 "
        f"{row[BY]:.4f}, difference {versus['difference']:+.4f} [{versus['low']:+.4f}, "
        f"{versus['high']:+.4f}], {'not ' * (versus['verdict'] == 'cannot tell')}significant)"
        for row in rows
        for versus in [row["vs_baseline"]]
    ]


def other_method(method: str, best: dict[str, Entry]) -> Entry | None:
    """What a method is measured against, where the comparison has it."""
    return best.get(measured_against(method, best) or "")


def measured_against(method: str, names: Container[str]) -> str | None:
    """The one of these methods that a method is measured against: its backbone alone; a variant, the
    method as it is; a next-session model without encodings, the next-item model of its encoder, with
    feedback if that is there. None: it is not among them."""
    plain = tracking.method_of(method)
    base, *encodings = method.split("+")
    below = base.removeprefix("sessionrec-")
    if plain != method:
        wanted = [plain]
    elif encodings:
        wanted = [base]
    else:
        wanted = [f"{below}+fb", below] if below != base else []
    return next((name for name in wanted if name in names), None)


def _against(entry: Entry, other: Entry, kind: str | None = None) -> dict[str, Any]:
    """Mean difference of NDCG@10 over users, with its paired interval."""
    ours, theirs = (e.by_user if kind is None else e.parts[kind][1] for e in (entry, other))
    difference = ours - theirs
    low, high = bootstrap(difference[:, None], DRAWS)[:, 0]
    return _verdict(other, float(difference.mean()), float(low), float(high)) | seen(
        ours[:, None], theirs[:, None]
    )


def seen(one_US: NDArray[np.float64], other_US: NDArray[np.float64]) -> dict[str, float | None]:
    """The smallest true difference that would have been significant four times in five
    (`detectable`), and what share of the other method's NDCG@10 it is, in percent."""
    found = components(one_US, other_US)
    trainings = min((n for n in (one_US.shape[1], other_US.shape[1]) if n > 1), default=1)
    least, base = found.detectable(len(one_US), trainings), float(other_US.mean())
    return {"detectable": least, "detectable_pct": 100 * least / base if base else None}


def _over_seeds(mine: list[Entry], others: list[Entry]) -> dict[str, Any]:
    """Mean difference over all trainings of two methods: users and trainings are drawn."""
    ours, theirs = (np.stack([one.by_user for one in each], axis=1) for each in (mine, others))
    return (
        _verdict(others[0], *over_seeds(ours, theirs))
        | seen(ours, theirs)
        | {"seeds": [len(mine), len(others)]}
    )


def _verdict(other: Entry, difference: float, low: float, high: float) -> dict[str, Any]:
    return {
        "method": other.report["method"],
        "difference": difference,
        "low": low,
        "high": high,
        "verdict": "better" if low > 0 else "worse" if high < 0 else "cannot tell",
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
    # MLflow takes neither of these in a metric's name.
    names = str.maketrans({"+": ".", "(": None, ")": None})
    scores = {f"{BY}.{row['method'].translate(names)}": row[BY] for row in outcome["methods"]}
    tracking.log_values(client, run_id, metrics=scores)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def show(outcome: dict[str, Any]) -> None:
    """The table a person reads, and a sentence a method."""
    from rich.console import Console
    from rich.table import Table

    tuned = any(budget_of(row) for row in outcome["methods"])
    table = Table(title=f"{outcome['source']}: {outcome['target'].replace('_', ' ')}, full ranking")
    for name in (
        "method",
        "ndcg@10",
        "95 % interval",
        "hr@10",
        "parameters",
        "added",
        "s/epoch",
        "seconds",
        *(["tuned"] if tuned else []),
    ):
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
            f"{row['epoch_s']:.1f}" if row["epoch_s"] else "",
            f"{row['seconds']:.0f}",
            *([budget_of(row)] if tuned else []),
        )
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    many = len(outcome["methods"])
    won = (
        f"winner: {outcome['winner']}, of {many} methods, the same"
        if many > 1
        else f"the only method: {outcome['winner']}; train another with the same --comparison."
    )
    print(
        f"* {won} {counted(outcome['users'], 'user')}, gold.sequences version "
        f"{outcome['table_version']}, cut {in_words(outcome['cut'])}"
    )
    for row in outcome["methods"]:
        versus = row["vs_vanilla"]
        if versus:
            print(
                f"  {row['method']} against {versus['method']}: {versus['difference']:+.4f} "
                f"[{versus['low']:+.4f}, {versus['high']:+.4f}], {WORDS.get(versus['verdict'], versus['verdict'])}"
                + _and_seeds(row["vs_vanilla_seeds"])
                + _and_kinds(row["by_target"])
                + _and_power(row)
            )
    for sentence in _notes(outcome):
        print(f"  {sentence}")


def _notes(outcome: dict[str, Any]) -> list[str]:
    """What is to be known beside the differences, a sentence each."""
    notes = [*by_age(outcome), *not_recommended(outcome), *tuned_unequally(outcome)]
    if sees_more(outcome):
        notes.append(f"not equal in what they know: {sees_more(outcome)}")
    if outcome["planned"]:
        notes.append(
            "this comparison has a plan, whose looks these intervals do not allow for: those of `models "
            "seeds` do"
        )
    if outcome["missing"]:
        notes.append(f"missing (not finished): {', '.join(outcome['missing'])}")
    return notes


def by_age(outcome: dict[str, Any]) -> list[str]:
    """NDCG@10 of each method by age of the item, a sentence each; empty outside of `nightly`."""
    return [
        f"{row['method']}, by age of the item: "
        + ", ".join(
            f"{AGES.get(age, age)} {part[BY]:.4f} [{part[f'{BY}_low']:.4f}, "
            f"{part[f'{BY}_high']:.4f}] ({part['targets']:,} targets)"
            for age, part in row["by_age"].items()
        )
        for row in outcome["methods"]
        if row.get("by_age")
    ]


def _and_seeds(versus: dict[str, Any]) -> str:
    if min(versus["seeds"]) < 2:
        return ""
    return (
        f"; over {versus['seeds'][0]} and {versus['seeds'][1]} seeds {versus['difference']:+.4f} "
        f"[{versus['low']:+.4f}, {versus['high']:+.4f}], {WORDS.get(versus['verdict'], versus['verdict'])}"
    )


def _and_power(row: dict[str, Any]) -> str:
    versus = (
        row["vs_vanilla_seeds"] if min(row["vs_vanilla_seeds"]["seeds"]) > 1 else row["vs_vanilla"]
    )
    share = versus.get("detectable_pct")  # (comparisons of earlier versions have none)
    if share is None:
        return ""
    return f"; a difference below {share:.1f} % would probably not have been seen"


def _and_kinds(by_target: dict[str, Any]) -> str:
    return "".join(
        f"; {'first of a session' if kind == 'first' else 'inside a session'} "
        f"{part['vs_vanilla']['difference']:+.4f} [{part['vs_vanilla']['low']:+.4f}, "
        f"{part['vs_vanilla']['high']:+.4f}], {WORDS.get(part['vs_vanilla']['verdict'], part['vs_vanilla']['verdict'])}"
        for kind, part in by_target.items()
        if "vs_vanilla" in part
    )
