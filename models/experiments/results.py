"""RESULTS.md's tables and plots, made from the small files that `grid` writes.

The documents (RESULTS.md, and the pages in results/) are written by hand; what is between
`<!-- results/NAME.json -->` and `<!-- end -->` is made here, so that no number in it was typed.
`<!-- short results/NAME.json -->` makes one table of what is compared with its backbone, in percent. `results/NAME-*.json` makes one table of several
grids that were asked the same questions, such as one for each backbone: a large grid is then work
for several days or machines, because a method is compared with its own backbone only.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from models.core.errors import UserError
from models.data.nights import AGES, BORN
from models.data.splits import in_words
from models.experiments import scaling, seeds
from models.networks.methods import BASELINES, parse
from models.registry.tracking import SEEDS, method_of
from models.selection.compare import (
    SAME,
    budget_of,
    epoch_s,
    not_recommended,
    sees_more,
    tuned_unequally,
)

BLOCK = re.compile(
    r"<!-- (short )?(results/[\w.-]+?(?:-\*)?\.json) -->\n.*?<!-- end -->", re.DOTALL
)
BY = "ndcg@10"
KINDS = [("first", "first of a session"), ("inside", "inside a session")]


def render(document: Path) -> list[str]:
    """Make every block of the document anew; the files that it was made from."""
    here = document.parent
    folder = here.parent if here.name == "results" else here
    made: list[str] = []

    def block(match: re.Match[str]) -> str:
        short, name = match[1] or "", match[2]
        files = sorted(folder.glob(name))
        if not files:
            raise UserError(f"{document} names {name}, which is not there: run its grid first")
        written = together(files)
        picture = folder / name.replace("-*", "").replace(".json", ".svg")
        made.extend(str(file.relative_to(folder)) for file in files)
        if short:
            return "\n\n".join([f"<!-- {short}{name} -->", short_table(written), "<!-- end -->"])
        if written.get("kind") == SEEDS:
            return "\n\n".join(
                [f"<!-- {name} -->", seeds.table(written), origin(written), "<!-- end -->"]
            )
        if written.get("kind") == "scaling":
            scaling.plot(written, picture)
            caption = "test loss and NDCG@10 against parameters and data"
            said = [scaling.table(written), scaling.in_words(written), where(written)]
        else:
            plot(written, picture)
            caption = "scores, a row a method"
            said = [
                method_table(written),
                kind_table(written),
                age_table(written),
                origin(written),
            ]
        image = f"![{caption}]({os.path.relpath(picture, here)})"
        parts = [f"<!-- {name} -->", *said, image, "<!-- end -->"]
        return "\n\n".join(part for part in parts if part)

    text = document.read_text(encoding="utf-8")
    document.write_text(BLOCK.sub(block, text), encoding="utf-8")
    return made


def together(files: list[Path]) -> dict[str, Any]:
    """One grid of several, whose cells answered the same questions.

    Raises:
        UserError: their cells did not.
    """
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for part in parts:
        if part.get("kind") != "scaling":  # (another grid's methods may be in its comparison)
            own = {cell["method"] for cell in part["cells"]}
            rows = part["comparison"]["methods"]
            part["comparison"]["methods"] = [row for row in rows if row["method"] in own]
    first = parts[0]
    for file, other in zip(files[1:], parts[1:], strict=True):
        # (A lake that was made again from the same files has tables of other ids.)
        for name in (*(name for name in SAME if name != "table_id"), "users"):
            # (Files made before there were nights say nothing of them.)
            ours, theirs = (one["comparison"].get(name) for one in (first, other))
            if ours != theirs:
                raise UserError(
                    f"{files[0]} and {file} cannot be one table: {name} is {ours} and {theirs}"
                )
    if len(parts) == 1:
        return dict(first)
    outcomes = [one["comparison"] for one in parts]
    methods = sorted((row for one in outcomes for row in one["methods"]), key=lambda row: -row[BY])
    return {
        **first,
        "command": "\n".join(one["command"] for one in parts),
        "date": " and ".join(sorted({one["date"] for one in parts})),
        "machines": [one["machine"] for one in parts],
        "cells": [cell for one in parts for cell in one["cells"]],
        "comparison": {
            **outcomes[0],
            "methods": methods,
            "missing": [name for one in outcomes for name in one["missing"]],
        },
    }


def _interval(low: float, high: float, signed: bool = False) -> str:
    return f"{low:+.4f} to {high:+.4f}" if signed else f"{low:.4f} to {high:.4f}"


def _versus(versus: dict[str, Any] | None) -> str:
    if versus is None:
        return ""
    mark = {"better": " **better**", "worse": " worse", "cannot tell": ""}[versus["verdict"]]
    interval = _interval(versus["low"], versus["high"], signed=True)
    return f"{versus['difference']:+.4f} ({interval}){mark}"


def method_table(written: dict[str, Any]) -> str:
    """One row a method, the best mean of seeds first: score, difference to its backbone, the seed
    that validation chose with its interval over users, parameters, cost."""
    lines = [
        "| method | seeds | NDCG@10, mean of seeds | against its backbone, over seeds | NDCG@10 of "
        "the chosen seed, 95 % interval | its HR@10 | parameters | added | s an epoch | events/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cells = written["cells"]
    for row in sorted(written["comparison"]["methods"], key=lambda row: -row[f"{BY}_mean"]):
        speed = f"{row['events_per_second']:,.0f}"
        own = [cell for cell in cells if cell["method"] == row["method"]]
        epoch = sum(epoch_s(c) for c in own if c["epochs"]) / max(1, len(own))
        trained = row["method"] not in BASELINES and own
        added = f"{row['num_params_added']:,} ({row['params_added_pct']:.2f} %)"
        lines.append(
            f"| {row['method']} | {row['seeds']} | {row[f'{BY}_mean']:.4f} "
            f"| {_versus(row['vs_vanilla_seeds'])} "
            f"| {row[BY]:.4f} ({_interval(row[f'{BY}_low'], row[f'{BY}_high'])}) "
            f"| {row['hr@10']:.4f} "
            f"| {row['num_params']:,} | {added if row['num_params_added'] else ''} "
            f"| {f'{epoch:.1f}' if trained else ''} "
            f"| {speed if trained else ''} |"
        )
    return "\n".join(lines)


WHOLE, PLAIN = 1.959963985 + 0.841621234, 1.959963985
"""Standard errors that a difference must have to be significant at 95 % with a probability of 80 %,
and to be significant."""


def short_table(written: dict[str, Any]) -> str:
    """A row a backbone, a column an encoding: the difference over seeds in percent of the backbone's
    mean NDCG@10, with its 95 % interval, and the smallest difference that would probably have been
    seen, taken from the interval's width."""
    found: dict[str, dict[str, str]] = {}
    mean = {row["method"]: row[f"{BY}_mean"] for row in written["comparison"]["methods"]}
    for row in sorted(written["comparison"]["methods"], key=lambda row: row["params_added_pct"]):
        versus = row["vs_vanilla_seeds"]
        if versus is None or not mean.get(versus["method"]):
            continue
        base = mean[versus["method"]]
        told, low, high = (100 * versus[name] / base for name in ("difference", "low", "high"))
        least = (high - low) / 2 / PLAIN * WHOLE
        mark = "**" if versus["verdict"] != "cannot tell" else ""
        added = row["method"].removeprefix(versus["method"])
        column = added if added != row["method"] else f"sessionrec-{versus['method'].split('+')[0]}"
        column = "sessionrec" if column.startswith("sessionrec") else column
        found.setdefault(column, {})[versus["method"]] = (
            f"{mark}{told:+.0f} %{mark} ({low:+.0f} to {high:+.0f}; seen from {least:.0f} %)"
        )
    others = list(dict.fromkeys(one for cells in found.values() for one in cells))
    others.sort(key=lambda one: -mean[one])
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    lines += [
        f"| {one} ({mean[one]:.3f}) | "
        + " | ".join(cells.get(one, "") for cells in found.values())
        + " |"
        for one in others
    ]
    return "\n".join(lines)


def kind_table(written: dict[str, Any]) -> str:
    """Scores of the chosen seeds by kind of target, where both kinds were evaluated."""
    rows = [row for row in written["comparison"]["methods"] if row["by_target"]]
    if not rows:
        return ""
    lines = [
        "| method (chosen seed) | first of a session | against its backbone | inside a session | against its "
        "backbone |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        parts = [row["by_target"].get(kind) for kind in ("first", "inside")]
        words = [
            f"{part[BY]:.4f} | {_versus(part.get('vs_vanilla'))}" if part else " | "
            for part in parts
        ]
        lines.append(f"| {row['method']} | {' | '.join(words)} |")
    return "\n".join(lines)


def age_table(written: dict[str, Any]) -> str:
    """Scores of the chosen seeds by age of the targets' items, where nights were evaluated."""
    rows = [row for row in written["comparison"]["methods"] if row.get("by_age")]
    if not rows:
        return ""
    lines = [
        "| method (chosen seed) | " + " | ".join(AGES.values()) + " |",
        "|---" * (1 + len(BORN)) + "|",
    ]
    for row in rows:
        parts = [row["by_age"].get(age) for age in BORN]
        words = [
            f"{part[BY]:.4f} ({_interval(part[f'{BY}_low'], part[f'{BY}_high'])}), "
            f"{part['targets']:,} targets"
            if part
            else ""
            for part in parts
        ]
        lines.append(f"| {row['method']} | {' | '.join(words)} |")
    return "\n".join(lines)


def origin(written: dict[str, Any]) -> str:
    """What a grid's numbers are of."""
    outcome = written["comparison"]
    missing = f" Missing: {', '.join(outcome['missing'])}." if outcome["missing"] else ""
    if sees_more(outcome):
        missing += f" Not equal in what they know: {sees_more(outcome)}."
    sentences = [*not_recommended(outcome), *tuned_unequally(outcome)]
    missing += "".join(f" {sentence}." for sentence in sentences)
    tuned = [f"{row['method']} by {budget_of(row)}" for row in outcome["methods"] if budget_of(row)]
    if tuned:
        missing += f" Tuned: {'; '.join(tuned)}."
    return (
        f"{outcome['users']:,} users; {outcome['target'].replace('_', ' ')}, full ranking; "
        f"gold.sequences version {outcome['table_version']}, cut {in_words(outcome['cut'])}; "
        f"request time {outcome['request_time']}.{missing} {where(written)}"
    )


def where(written: dict[str, Any]) -> str:
    """Where and when, by which code, and the command that makes the numbers again."""
    boxes = [_machine(box) for box in written.get("machines", [written["machine"]])]
    cells = written.get("cells", written.get("points", []))
    commits = sorted({str(cell["commit"])[:12] for cell in cells})
    return (
        f"{written['date']}, commits {', '.join(commits)}, {' and '.join(dict.fromkeys(boxes))}."
        f"\n\n```\n{written['command']}\n```"
    )


def _machine(box: dict[str, Any]) -> str:
    vectors = f" ({box['cpu_capability']})" if "cpu_capability" in box else ""
    return f"{box['processor']}{vectors}, {box['cores']} cores, torch {box['torch']}"


def plot(written: dict[str, Any], file: Path, phone: bool = False) -> None:
    """Scores, a row a method: backbones, the best first, each with its own encodings in order of the
    parameters that they add; then the baselines. As SVG.

    A dot is the mean of the seeds, a bar the interval over users of the chosen seed, which the dot
    need not be the middle of. Beside it, where both kinds of target were evaluated, the chosen
    seed's scores by kind; not on a `phone`.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "sessionmill"  # the same picture from the same numbers
    rows = _in_order(written["comparison"]["methods"])
    kinds = [] if phone or not any(row and row["by_target"] for row in rows) else KINDS
    figure, axes = pyplot.subplots(
        1, 1 + len(kinds), sharey=True, squeeze=False, layout="constrained",
        figsize=((5, 9)[bool(kinds)], 1 + (0.2 if phone else 0.18) * len(rows)),
    )  # fmt: skip
    baselines = [row for row in rows if row and row["method"] in BASELINES]
    for axis, (kind, title) in zip(axes[0], [(None, "all targets"), *kinds], strict=True):

        def of(row: dict[str, Any], kind: str | None = kind) -> dict[str, Any]:
            return row["by_target"].get(kind) or {} if kind else row

        for place, row in enumerate(rows):
            if row is None or BY not in of(row):
                continue
            color = "0.5" if row in baselines else "C0"
            axis.plot([of(row)[f"{BY}_low"], of(row)[f"{BY}_high"]], [place] * 2, color=color, lw=1)
            mean = of(row).get(f"{BY}_mean", of(row)[BY])
            axis.plot([mean], [place], "o", color=color, ms=4)
        known = [of(row)[BY] for row in baselines if BY in of(row)]
        if known:
            axis.axvline(max(known), lw=0.8, ls=":", color="0.5")
        axis.set_xlim(left=_left([row for row in rows if row]) if phone else 0)
        axis.set_title(title if kinds else "", fontsize=8)
        axis.set_xlabel("NDCG@10", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", lw=0.3)
    there = [place for place, row in enumerate(rows) if row]
    axes[0, 0].set_yticks(there, [_label(row) for row in rows if row])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _left(rows: list[dict[str, Any]]) -> float:
    """Where an axis of scores begins: at 0, unless all scores are far from it. (Dots have no length
    that would be cut.)"""
    low, high = min(row[f"{BY}_low"] for row in rows), max(row[f"{BY}_high"] for row in rows)
    return low - 0.1 * (high - low) if low > high / 2 else 0.0


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """The rows as the plot has them; None between backbones, which is an empty line."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -row[f"{BY}_mean"]):
        base = parse(method_of(row["method"]))[0]
        groups.setdefault("" if base in BASELINES else base, []).append(row)
    last = groups.pop("", [])
    ordered: list[dict[str, Any] | None] = []
    for own in groups.values():
        own.sort(key=lambda row: row["params_added_pct"])
        ordered += [*own, None]
    return [*ordered, *last] if last else ordered[:-1]


def _label(row: dict[str, Any]) -> str:
    added = row["params_added_pct"]
    return f"{row['method']} (+{added:.2f} %)" if added else str(row["method"])
