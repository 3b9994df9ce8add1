"""How the test loss falls with parameters and with data: many trainings, two power laws.

Widths D at all the data, and shares of the users at the largest width, each with every seed (the
dearest may be given the first alone); a cell that MLflow has as finished is not trained again. A
power law L(x) = a x^-b is a straight line in logarithms: b comes by least squares over all
trainings, with its 95 % t interval.
Whether the line bends is asked too: a square term whose interval excludes 0 says that one exponent
does not hold over the range (towards larger x it flattens where the term is positive).

The loss is the cross-entropy of the test targets over the whole catalogue, in nats; all cells have
the same vocabulary and the same targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.core.environment import Say
from models.core.errors import UserError
from models.experiments.grid import Cell, command_line, head, keep, report_of, train_cell
from models.networks.methods import BASELINES, config, parse
from models.registry import tracking

AXES = ("parameters", "data")


@dataclass(frozen=True)
class Point:
    """One training of the experiment: a width at a share of the users, for the line of `axis`."""

    axis: str
    dim: int
    share: float
    seed: int

    def __str__(self) -> str:
        return f"D {self.dim}, {self.share:g} of the users, seed {self.seed}"


def points_of(
    widths: Sequence[int], shares: Sequence[float], seeds: Sequence[int], one_seed_from: float
) -> list[Point]:
    """Every width at all the data, then the largest at each share, with every seed; only the first
    seed where width times share is `one_seed_from` or more."""
    sizes = [("parameters", width, 1.0) for width in sorted(widths)]
    sizes += [("data", max(widths), share) for share in sorted(shares) if share < 1]
    return [
        Point(axis, width, share, seed)
        for axis, width, share in sizes
        for seed in (seeds[:1] if width * share >= one_seed_from else seeds)
    ]


def scaling(
    source: str,
    comparison: str,
    method: str,
    widths: Sequence[int],
    shares: Sequence[float],
    seeds: Sequence[int],
    options: Sequence[str],
    file: Path,
    say: Say,
    one_seed_from: float = math.inf,
) -> dict[str, Any]:
    """Train what is missing, fit, write `file`. `options` go to every `train` as they are.

    Raises:
        UserError: fewer than three widths or shares finished, so there is no line to fit.
    """
    if parse(method)[0] in BASELINES:
        raise UserError(
            f"--method {method}: a baseline has no width and is not trained: name a trained method"
        )
    for width in widths:
        config(method, dim=width)
    todo = points_of(widths, shares, seeds, one_seed_from)
    points, failed = _trained(source, comparison, method, todo, options, say)
    most = [p for p in points if p["dim"] == max(widths) and p["share"] == 1.0]
    parameters = [p for p in points if p["axis"] == "parameters"]
    data = [p for p in points if p["axis"] == "data"] + most
    given = {
        "method": method,
        "seeds": _words(seeds),
        "widths": _words(widths),
        "shares": _words(shares),
    }
    if one_seed_from < math.inf:
        given["one-seed-from"] = f"{one_seed_from:g}"
    written = {
        **head("scaling", command_line("scaling", source, comparison, options, **given)),
        "method": method,
        "points": points,
        "missing": len(failed),
        "fits": {
            "parameters": power_law(parameters, "num_params"),
            "data": power_law(data, "events"),
        },
    }
    keep(file, written, say)
    return written | {"failed": failed}


def _trained(
    source: str,
    comparison: str,
    method: str,
    todo: Sequence[Point],
    options: Sequence[str],
    say: Say,
) -> tuple[list[dict[str, Any]], list[str]]:
    """What each training reported, and which failed."""
    from jobs.core.source_file import load_source

    client, experiment = tracking.connect(load_source(source).name)
    points: list[dict[str, Any]] = []
    failed: list[str] = []
    for number, one in enumerate(todo, 1):
        part = f"{comparison}/D{one.dim}-of-{one.share:g}"
        cell = Cell(method, one.seed)
        given = [*options, "--dim", str(one.dim), "--data-share", f"{one.share:g}"]
        say(f"[{number}/{len(todo)}] D {one.dim}, {one.share:.3g} of the users, seed {one.seed}")
        if not train_cell(client, experiment, source, part, cell, given, say):
            failed.append(str(one))
            continue
        row = report_of(client, experiment, part, cell)
        assert row is not None  # it is there now
        points.append(
            asdict(one)
            | {k: row[k] for k in ("num_params", "train_s", "commit", "table_version", "cut")}
            | {"events": row["training_events"], "epochs": row["epochs"]}
            | {"loss": row["metrics"]["test_loss"]["value"]}
            | {"ndcg@10": row["metrics"]["ndcg@10"]["value"]}
        )
    return points, failed


def _words(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def power_law(points: Sequence[dict[str, Any]], measure: str) -> dict[str, Any]:
    """`exponent` b of loss = a x^-b with its interval, `r2`, and the square term `bend`.

    Raises:
        UserError: x has fewer than three different values.
    """
    x = np.log([float(p[measure]) for p in points])
    y = np.log([float(p["loss"]) for p in points])
    if len(np.unique(x)) < 3:
        raise UserError(
            f"{len(np.unique(x))} different {measure} finished, and a line needs 3: give more widths or "
            "shares"
        )
    middle = x - x.mean()
    line = _least_squares(np.stack([np.ones_like(x), middle], axis=1), y)
    found = {
        "exponent": -line["value"][1],
        "low": -line["high"][1],
        "high": -line["low"][1],
        "at": float(np.exp(x.mean())),
        "loss_there": float(np.exp(line["value"][0])),
        "r2": line["r2"],
        "points": len(x),
        "bend": None,
    }
    if len(np.unique(x)) > 3:
        bent = _least_squares(np.stack([np.ones_like(x), middle, middle**2], axis=1), y)
        found["bend"] = {end: bent[end][2] for end in ("value", "low", "high")}
    return found


def _least_squares(columns: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Coefficients with 95 % t intervals."""
    from scipy import stats

    value, *_ = np.linalg.lstsq(columns, y, rcond=None)
    rest = y - columns @ value
    free = len(y) - columns.shape[1]
    spread = np.linalg.inv(columns.T @ columns) * (rest @ rest) / max(1, free)
    half = stats.t.ppf(0.975, max(1, free)) * np.sqrt(np.diag(spread))
    total = ((y - y.mean()) ** 2).sum()
    return {
        "value": value.tolist(),
        "low": (value - half).tolist(),
        "high": (value + half).tolist(),
        "r2": float(1 - rest @ rest / total) if total else 1.0,
    }


def in_words(written: dict[str, Any]) -> str:
    """What the fits say, a sentence each."""
    sentences = []
    for axis, fit in written["fits"].items():
        text = (
            f"loss ~ {axis}^-{fit['exponent']:.4f} [{fit['low']:.4f}, {fit['high']:.4f}], "
            f"R2 {fit['r2']:.3f} over {fit['points']} trainings"
        )
        bend = fit["bend"]
        if bend and not bend["low"] <= 0 <= bend["high"]:
            way = "flattens" if bend["value"] > 0 else "steepens"
            text += f"; it {way} towards more {axis} (square term {bend['value']:+.4f}, interval "
            text += f"{bend['low']:+.4f} to {bend['high']:+.4f})"
        elif bend:
            text += "; curvature is not significant"
        sentences.append(text)
    return ". ".join(sentences) + "."


def table(written: dict[str, Any]) -> str:
    """One row a size: the mean over seeds of loss and NDCG@10, with their range."""
    lines = ["| D | parameters | training events | seeds | loss | NDCG@10 |", "|---" * 6 + "|"]
    groups: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for point in written["points"]:
        groups.setdefault((point["dim"], point["share"]), []).append(point)
    for (dim, _), rows in groups.items():
        cells = []
        for name in ("loss", "ndcg@10"):
            values = [row[name] for row in rows]
            cells.append(f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        lines.append(
            f"| {dim} | {rows[0]['num_params']:,} | {rows[0]['events']:,} | {len(rows)} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def plot(written: dict[str, Any], file: Path) -> None:
    """Loss, with the fitted lines, and NDCG@10 against parameters and against data; as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    matplotlib.rcParams["svg.hashsalt"] = "sessionmill"
    figure, axes = pyplot.subplots(
        2, 2, figsize=(9, 6), layout="constrained", sharex="col", sharey="row"
    )
    widest = max(point["dim"] for point in written["points"])
    for (above, below), name, measure in zip(axes.T, AXES, ("num_params", "events"), strict=True):
        own = [
            p
            for p in written["points"]
            if p["axis"] == name or (name == "data" and p["dim"] == widest and p["share"] == 1)
        ]
        above.loglog([p[measure] for p in own], [p["loss"] for p in own], "o", ms=4)
        fit = written["fits"][name]
        x = np.geomspace(min(p[measure] for p in own), max(p[measure] for p in own), 50)
        line = fit["loss_there"] * (x / fit["at"]) ** -fit["exponent"]
        label = f"{name}$^{{-{fit['exponent']:.3f}}}$ ({fit['low']:.3f} to {fit['high']:.3f})"
        above.loglog(x, line, "-", lw=1, label=label)
        above.legend(fontsize=8)
        below.semilogx([p[measure] for p in own], [p["ndcg@10"] for p in own], "o", ms=4)
        below.set_xlabel({"parameters": "parameters", "data": "training events"}[name])
    for which in (axes[0, 0].yaxis.set_major_formatter, axes[0, 0].yaxis.set_minor_formatter):
        which(ticker.StrMethodFormatter("{x:g}"))  # 9, not 9 x 10^0
    axes[0, 0].set_ylabel("test loss, nats")
    axes[1, 0].set_ylabel("NDCG@10")
    axes[1, 0].set_ylim(bottom=0)
    figure.suptitle(written["method"], fontsize=9)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
