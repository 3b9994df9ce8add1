"""`grid`, `seeds`, `compare-rules`, `backtest`, `scaling`, `results`: many trainings, one after another."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from models.commands.common import COMPARISON, add_of_every_training, numbers, split_of_log
from models.core.config import ALPHA_SPENDING
from models.core.errors import UserError
from models.training.options import add_nights, recipe_key, train_parser


def grid_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)
    command.add_argument(
        "--methods", required=True, help="by comma; `sasrec*` with its encodings; all"
    )
    command.add_argument("--seeds", default="1,2", help="by comma")
    _add_variants(command)
    add_of_every_training(command)


def _add_variants(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:OPTIONS",
        help="every method once more, with these options; may be given again",
    )
    command.add_argument(
        "--tuned",
        action="store_true",
        help="every method with the newest recipe of `tune`; options that are given win",
    )


def seeds_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)
    command.add_argument(
        "--methods", required=True, help="by comma, as in `grid`, with what they are compared with"
    )
    command.add_argument(
        "--against", metavar="METHOD", help="default: each method's backbone alone"
    )
    command.add_argument(
        "--first", type=int, default=3, metavar="N", help="seeds at the first look (default 3)"
    )
    command.add_argument(
        "--step", type=int, default=1, metavar="N", help="seeds between two looks (default 1)"
    )
    command.add_argument(
        "--max-seeds", type=int, default=8, metavar="N", help="seeds at the last look (default 8)"
    )
    command.add_argument(
        "--first-seed", type=int, default=1, metavar="N", help="the smallest seed (default 1)"
    )
    command.add_argument(
        "--detect",
        type=float,
        default=3.0,
        metavar="PERCENT",
        help="the gain of interest: a difference whose interval lies below it is decided (default 3; 0: "
        "only 0 decides)",
    )
    command.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        help="how often a difference may be found where there is none, over all looks (default 0.05)",
    )
    command.add_argument(
        "--spending",
        choices=ALPHA_SPENDING,
        default=ALPHA_SPENDING[0],
        help="how alpha is spent: hardly any early (obrien-fleming), or more evenly (pocock)",
    )
    _add_variants(command)
    add_of_every_training(command)


def rules_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)
    command.add_argument("--methods", required=True, help="by comma, as in `grid`; not baselines")
    command.add_argument(
        "--gaps",
        default="600,1800,7200,86400",
        help="seconds of silence that end a session, by comma (default: 10 and 30 minutes, 2 and 24 "
        "hours)",
    )
    command.add_argument("--seeds", default="1,2", help="by comma")
    add_of_every_training(command)


def backtest_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--methods", help="by comma, as in `grid`; default: the source file's")
    command.add_argument("--seeds", help="by comma; default: the source file's")
    add_nights(command)
    command.add_argument(
        "--table-version", type=int, help="version of gold.sequences; default: the newest"
    )
    command.add_argument(
        "--comparison",
        metavar="ID",
        help="default: named after the table version, the nights and --each-night, so that the same "
        "command continues where it stopped",
    )
    command.add_argument(
        "--tuned",
        action="store_true",
        help="every method with the newest recipe of `tune`; options that are given win",
    )
    add_of_every_training(command)


def scaling_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)
    command.add_argument("--method", required=True, help="such as sessionrec-hstu")
    command.add_argument("--widths", default="8,16,32,64,128", help="D, by comma")
    command.add_argument("--shares", default="0.125,0.25,0.5", help="of the users, by comma")
    command.add_argument("--seeds", default="1,2,3", help="by comma")
    command.add_argument(
        "--one-seed-from",
        type=float,
        default=math.inf,
        metavar="D",
        help="only the first seed where width times share is this or more",
    )
    command.add_argument(
        "--results", metavar="FILE", required=True, help="a JSON file for the results"
    )
    command.add_argument("options", nargs="*", metavar="-- OPTION", help="of every `train`")


def results_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "document", nargs="?", default="RESULTS.md", help="a document that names results files"
    )


def _cells(
    args: argparse.Namespace, source: Any, lake: str, options: list[str], variants: list[str]
) -> list[Any]:
    """The trainings of a grid, or of a backtest."""
    from models.experiments.grid import cells_of, tuned_cells

    told, _ = train_parser().parse_known_args(
        ["--source", args.source, "--method", "pop", *options]
    )
    seeds = numbers("--seeds", args.seeds, int)
    cells = cells_of(args.methods, variants, seeds, told.target or source.training.target)
    if not args.tuned:
        return cells
    split = split_of_log(told, source, lake)
    return tuned_cells(
        source.name, cells, lambda name: recipe_key(name, told, source.training, split)
    )


def run_grid(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import note
    from models.experiments.grid import command_line, grid
    from models.selection.compare import show

    file = Path(args.results) if args.results else None
    cells = _cells(args, source, lake, args.options, args.variant)
    outcome = grid(
        args.source,
        args.comparison,
        cells,
        args.options,
        command_line(
            "grid",
            args.source,
            args.comparison,
            args.options,
            methods=args.methods,
            seeds=args.seeds,
            variant=args.variant,
            tuned=args.tuned,
        ),
        file,
        note,
    )
    show(outcome)
    return outcome


def run_seeds(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    """Seeds until the differences are decided."""
    from models.core.environment import note
    from models.experiments.grid import asked_of, command_line
    from models.experiments.seeds import Plan, pairs_of, show, until_decided

    most, first = args.max_seeds, args.first_seed
    args.seeds = ",".join(str(seed) for seed in range(first, first + max(1, most)))
    cells = _cells(args, source, lake, args.options, args.variant)
    names = list(dict.fromkeys(cell.name for cell in cells))
    plan = Plan(
        pairs=pairs_of(names, args.against),
        first_seed=first,
        first=args.first,
        step=args.step,
        most=most,
        detect_pct=args.detect,
        alpha=args.alpha,
        spending=args.spending,
        trained_by={cell.name: asked_of(cell, args.options) for cell in cells},
    )
    given = {
        "methods": args.methods,
        "against": args.against or [],
        "first": str(args.first),
        "step": str(args.step),
        "max-seeds": str(most),
        "first-seed": str(first),
        "detect": f"{args.detect:g}",
        "alpha": f"{args.alpha:g}",
        "spending": args.spending,
        "variant": args.variant,
        "tuned": args.tuned,
    }
    command = command_line("seeds", args.source, args.comparison, args.options, **given)
    file = Path(args.results) if args.results else None
    outcome = until_decided(
        args.source, args.comparison, plan, cells, args.options, command, file, note
    )
    show(outcome)
    return outcome


def run_rules(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    """What a session rule is worth: every method once more for each gap, on the same targets."""
    from models.core.environment import note
    from models.experiments.grid import command_line, grid, methods_of
    from models.networks.methods import BASELINES, reads_sessions
    from models.selection.compare import show

    told, _ = train_parser().parse_known_args(
        ["--source", args.source, "--method", "pop", *args.options]
    )
    target = told.target or source.training.target
    if target != "next_item":
        raise UserError(
            f"compare-rules: under each rule the target {target!r} is a different one, so scores could "
            "not be compared: add -- --target next_item"
        )
    blind = [
        name for name in methods_of(args.methods) if not (name in BASELINES or reads_sessions(name))
    ]
    if blind:
        raise UserError(
            f"compare-rules: {', '.join(blind)}: nothing in it reads sessions, so every rule gives the same "
            "model. Add an encoding that does, such as +st or +sse"
        )
    gaps = numbers("--gaps", args.gaps, float)
    args.variant = [f"gap {gap:g} s: --preprocess gap:{gap:g}" for gap in gaps]
    args.tuned = False
    given = {"methods": args.methods, "gaps": args.gaps, "seeds": args.seeds}
    outcome = grid(
        args.source,
        args.comparison,
        _cells(args, source, lake, args.options, args.variant),
        args.options,
        command_line("compare-rules", args.source, args.comparison, args.options, **given),
        Path(args.results) if args.results else None,
        note,
    )
    show(outcome)
    return outcome


def run_backtest(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import note
    from models.experiments.backtest import backtest, planned
    from models.selection.compare import show

    args.methods = args.methods or ",".join(source.training.methods)
    args.seeds = args.seeds or ",".join(map(str, source.training.seeds))
    plan = planned(
        args.source,
        lake,
        args.nights,
        args.each_night,
        args.table_version,
        args.comparison,
        args.options,
    )
    cells = _cells(args, source, lake, plan.options, [])
    file = Path(args.results) if args.results else None
    outcome = backtest(plan, cells, args.methods, args.seeds, args.tuned, file, note)
    show(outcome)
    return outcome


def run_scaling(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import note
    from models.experiments.scaling import in_words, scaling

    written = scaling(
        args.source,
        args.comparison,
        args.method,
        numbers("--widths", args.widths, int),
        numbers("--shares", args.shares, float),
        numbers("--seeds", args.seeds, int),
        args.options,
        Path(args.results),
        note,
        args.one_seed_from,
    )
    print(in_words(written))
    return written


def run_results(args: argparse.Namespace) -> dict[str, Any]:
    from models.experiments.results import render

    document = Path(args.document)
    if not document.is_file():
        raise UserError(f"{document} is not there: name the document whose tables are to be made")
    made = render(document)
    print(f"{document}: tables made from {', '.join(made) or 'nothing: it names no results file'}")
    return {"document": str(document), "files": made}
