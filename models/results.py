"""RESULTS.md's tables and plots, made from the small files that `grid` writes.

The document is written by hand; what stands between `<!-- results/NAME.json -->` and `<!-- end -->`
is made here, so that no number in it was typed. `results/NAME-*.json` makes one table of several
grids that were asked the same questions, such as one for each backbone: a large grid is then work
for several days or machines, because a method is held against its own backbone only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from models import scaling
from models.compare import SAME
from models.errors import UserError
from models.methods import BASELINES, parse
from models.splits import in_words
from models.tracking import method_of

BLOCK = re.compile(r"<!-- (results/[\w.-]+?(-\*)?\.json) -->\n.*?<!-- end -->", re.DOTALL)
BY = "ndcg@10"


def render(document: Path) -> list[str]:
    """Make every block of the document anew; the files that it was made from."""
    folder = document.parent
    made: list[str] = []

    def block(match: re.Match[str]) -> str:
        files = sorted(folder.glob(match[1]))
        if not files:
            raise UserError(f"{document} names {match[1]}, which is not there: run its grid first")
        written = together(files)
        picture = folder / match[1].replace("-*", "").replace(".json", ".svg")
        made.extend(str(file.relative_to(folder)) for file in files)
        if written.get("kind") == "scaling":
            scaling.plot(written, picture)
            caption = "test loss and NDCG@10 against parameters and data"
            said = [scaling.table(written), scaling.in_words(written), where(written)]
        else:
            plot(written, picture)
            caption = "score against added parameters"
            said = [method_table(written), kind_table(written), origin(written)]
        image = f"![{caption}]({picture.relative_to(folder)})"
        parts = [f"<!-- {match[1]} -->", *said, image, "<!-- end -->"]
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
    first = parts[0]
    for file, other in zip(files[1:], parts[1:], strict=True):
        # (A lake that was made again from the same files has tables of other ids.)
        for name in (*(name for name in SAME if name != "table_id"), "users"):
            ours, theirs = (one["comparison"][name] for one in (first, other))
            if ours != theirs:
                raise UserError(
                    f"{files[0]} and {file} are no one table: {name} is {ours} and {theirs}"
                )
    if len(parts) == 1:
        return dict(first)
    outcomes = [one["comparison"] for one in parts]
    methods = sorted((row for one in outcomes for row in one["methods"]), key=lambda row: -row[BY])
    return {
        **first,
        "command": "\n".join(one["command"] for one in parts),
        "date": " and ".join(sorted({one["date"] for one in parts})),
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
        epoch = sum(c["train_s"] / c["epochs"] for c in own if c["epochs"]) / max(1, len(own))
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


def kind_table(written: dict[str, Any]) -> str:
    """Scores of the chosen seeds by kind of target, where both kinds were asked about."""
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


def origin(written: dict[str, Any]) -> str:
    """What a grid's numbers are of."""
    outcome = written["comparison"]
    missing = f" Missing: {', '.join(outcome['missing'])}." if outcome["missing"] else ""
    return (
        f"{outcome['users']:,} users; {outcome['target'].replace('_', ' ')}, full ranking; "
        f"gold.sequences version {outcome['table_version']}, cut {in_words(outcome['cut'])}; "
        f"request time {outcome['request_time']}.{missing} {where(written)}"
    )


def where(written: dict[str, Any]) -> str:
    """Where and when, by which code, and the command that makes the numbers again."""
    box = written["machine"]
    cells = written.get("cells", written.get("points", []))
    commits = sorted({str(cell["commit"])[:12] for cell in cells})
    return (
        f"{written['date']}, commits {', '.join(commits)}, {box['processor']}, {box['cores']} "
        f"cores, torch {box['torch']}.\n\n```\n{written['command']}\n```"
    )


def plot(written: dict[str, Any], file: Path, size: tuple[float, float] = (8, 4.5)) -> None:
    """Mean score of the seeds against added parameters, one line a backbone; bars are as long as the
    chosen seed's interval. As SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "sessionmill"  # the same picture from the same numbers
    rows = written["comparison"]["methods"]
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    bases = list(dict.fromkeys(parse(method_of(row["method"]))[0] for row in rows))
    for base in bases:
        own = [row for row in rows if parse(method_of(row["method"]))[0] == base]
        if base in BASELINES:
            axis.axhline(own[0][BY], lw=0.8, ls=":", color="0.5")
            axis.annotate(base, (1.0, own[0][BY]), xycoords=("axes fraction", "data"), fontsize=7)
            continue
        own.sort(key=lambda row: row["params_added_pct"])
        x = [row["params_added_pct"] for row in own]
        y = [row[f"{BY}_mean"] for row in own]
        error = [
            [row[BY] - row[f"{BY}_low"] for row in own],
            [row[f"{BY}_high"] - row[BY] for row in own],
        ]
        axis.errorbar(x, y, yerr=error, marker="o", capsize=2, lw=1, ms=4, label=base)
        for row in own:
            method = method_of(row["method"])
            name = "+".join(parse(method)[1]) + row["method"].removeprefix(method)
            axis.annotate(name, (row["params_added_pct"], row[f"{BY}_mean"]), fontsize=6,
                          xytext=(3, 3), textcoords="offset points")  # fmt: skip
    axis.set_xlabel("added parameters, % of the backbone's")
    axis.set_ylabel("NDCG@10, mean of seeds;\n95 % over users of one seed")
    axis.legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
