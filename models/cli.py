"""`python -m models train|tune|recipes|grid|compare-rules|backtest|scaling|evaluate|compare|power|
register|verify|score|promote|refit|rollback|explain|report|params|results`: gold tables in, a registry out.

Prints what it did in a paragraph; `--json` prints the same for machines as the last line. Nothing
heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.core.json_output import answer
from models.core.config import ModelConfig, TrainConfig
from models.core.errors import UserError
from models.training.options import (
    add_fit,
    add_method,
    add_nights,
    add_split,
    add_training,
    asked_for,
    given,
    recipe_key,
    split_asked,
    train_parser,
)

COMPARISON = "names a set of trainings that are compared with each other"


def _tune_options(command: argparse.ArgumentParser) -> None:
    add_fit(command)
    command.add_argument("--trials", type=int, default=20, metavar="N", help="at most (default 20)")
    command.add_argument(
        "--minutes", type=float, metavar="T", help="at most; default: only --trials is a bound"
    )


def _recipes_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--methods", help="by comma, as in `grid`; default: the source file's")
    command.add_argument("--target", help="default: the source file's")
    command.add_argument("--preset", help="default: the source file's")
    add_split(command)
    command.add_argument(
        "--table-version", type=int, help="of gold.sequences, whose nights may decide the split"
    )


def _evaluate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run-id", required=True, help="of a training run in MLflow")
    command.add_argument("--table-version", type=int, help="default: the run's own")
    _threads(command)


def _compare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)
    command.add_argument("--expect", help="methods that should be there, by comma")


def _power_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", metavar="ID", help="a pilot; default: the newest one")
    command.add_argument("--split", help="of the newest one that has this split")
    command.add_argument(
        "--methods", help="by comma; default: all that have another to compare with"
    )
    command.add_argument(
        "--against", metavar="METHOD", help="default: each method's backbone alone"
    )


def _register_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)


def _threads(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=int, help="CPU threads")


def _version_options(command: argparse.ArgumentParser, alias: str | None = "champion") -> Any:
    which = command.add_mutually_exclusive_group()
    default = alias or "serving where it is there, else champion"
    which.add_argument("--alias", default=alias, help=f"default: {default}")
    which.add_argument("--model-version", type=int, metavar="N", help="in place of an alias")
    return which


def _refit_options(command: argparse.ArgumentParser) -> None:
    _version_options(command)
    command.add_argument("--table-version", type=int, metavar="V", help="default: the newest")
    command.add_argument(
        "--from-scratch",
        action="store_true",
        help="train for the recipe's best epochs; default: continue from the newest weights",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda")
    command.add_argument("--checkpoint-s", type=float, help="seconds between checkpoints")
    _threads(command)


def _explain_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--user", required=True, metavar="ID", help="whose list")
    command.add_argument(
        "--model-version",
        type=int,
        metavar="N",
        help="which version's list; default: the one that is served",
    )


def _verify_options(command: argparse.ArgumentParser) -> None:
    which = _version_options(command)
    which.add_argument(
        "--served",
        action="store_true",
        help="what is served: the alias serving where it is there, else champion",
    )
    command.add_argument(
        "--most",
        type=int,
        metavar="N",
        help="at most so many questions, of whole users drawn at random; default: all",
    )
    _threads(command)


def _score_options(command: argparse.ArgumentParser) -> None:
    _version_options(command, None)
    command.add_argument("--k", type=int, default=100, help="items of a list, at most")
    _threads(command)


def _promote_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model-version", type=int, metavar="N", help="default: the challenger")
    command.add_argument(
        "--force", action="store_true", help="set the champion without the gate's checks"
    )
    command.add_argument("--reason", default="", help="the reason, which is recorded")
    _threads(command)


def _rollback_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reason", default="", help="the reason, which is recorded")


def _report_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", metavar="ID", help="default: the newest")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the lake"
    )


def _of_every_training(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results", metavar="FILE", help="a JSON file for the results")
    command.add_argument(
        "options", nargs="*", metavar="-- OPTION", help="of every `train`, after --"
    )


def _grid_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)
    command.add_argument(
        "--methods", required=True, help="by comma; `sasrec*` with its encodings; all"
    )
    command.add_argument("--seeds", default="1,2", help="by comma")
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
    _of_every_training(command)


def _rules_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)
    command.add_argument("--methods", required=True, help="by comma, as in `grid`; not baselines")
    command.add_argument(
        "--gaps",
        default="600,1800,7200,86400",
        help="seconds of silence that end a session, by comma (default: 10 and 30 minutes, 2 and 24 "
        "hours)",
    )
    command.add_argument("--seeds", default="1,2", help="by comma")
    _of_every_training(command)


def _backtest_options(command: argparse.ArgumentParser) -> None:
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
    _of_every_training(command)


def _scaling_options(command: argparse.ArgumentParser) -> None:
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


def _results_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "document", nargs="?", default="RESULTS.md", help="a document that names results files"
    )


def _params_options(command: argparse.ArgumentParser) -> None:
    add_method(command)
    command.add_argument("--items", type=int, help="V; default: the preset's data set")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, one in COMMANDS.items():
        added = commands.add_parser(name, help=one.says, description=one.says)
        if one.source:
            added.add_argument("--source", required=True, help="a source's name or its file")
        added.add_argument("--json", action="store_true", help="JSON as the last line")
        one.options(added)
    return top


def _params(args: argparse.Namespace) -> dict[str, Any]:
    from models.core.config import PRESET_ITEMS
    from models.networks.methods import config, count_parameters

    preset = args.preset or "small"
    chosen = config(args.method, preset, **given(args, ModelConfig))
    items = args.items if args.items is not None else PRESET_ITEMS.get(preset)
    if items is None:
        raise UserError(f"--items V is needed: preset {preset!r} has no catalogue of its own")
    if not 1 <= items < 2**31:
        raise UserError(f"--items {items}: use a whole number, 1 to {2**31 - 1:,}")
    counted = {"method": args.method, **count_parameters(items, chosen)}
    parts = ", ".join(f"{name} {number:,}" for name, number in counted["by_module"].items())
    print(
        f"{args.method} with {items:,} items, preset {preset}: {counted['num_params']:,} "
        f"parameters, {counted['num_params_added']:,} ({counted['params_added_pct']:.3f} %) more "
        f"than the backbone alone. {parts}"
    )
    return counted


def _request(
    args: argparse.Namespace, source: Any, lake: str, settings_: dict[str, Any], split: str
) -> Any:
    """A training, or the trials of `tune`, with these overrides of the preset."""
    from jobs.core.settings import settings
    from models.core import environment
    from models.evaluation import rescore
    from models.networks.methods import config
    from models.training import run

    wanted = settings_ | {"target": args.target or source.training.target}
    wanted.setdefault("seed", source.training.seeds[0])
    environment.use_threads(args.threads)
    environment.use_deterministic(args.deterministic)
    return run.Request(
        source=source,
        lake=lake,
        config=config(args.method, args.preset or source.training.preset, **wanted),
        version=args.table_version,
        split=split,
        nights=args.nights,
        each_night=args.each_night,
        preprocess=args.preprocess,
        valid_from=rescore.parse_ts(args.valid_from),
        test_from=rescore.parse_ts(args.test_from),
        device=environment.pick_device(args.device),
        checkpoint_s=settings().checkpoint_s if args.checkpoint_s is None else args.checkpoint_s,
    )


def _split(args: argparse.Namespace, source: Any, lake: str) -> str:
    """The split that is asked for, or that of the log's nights."""
    from models.data.load import split_by_default

    asked = split_asked(args, source.training)
    return asked or split_by_default(lake, source.name, args.table_version)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line has."""
    every = given(args, ModelConfig, TrainConfig)
    return {name: value for name, value in every.items() if value is not None}


def _train(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any] | None:
    from models.core import environment
    from models.registry import recipes
    from models.training import nightly, run

    recipe = None
    split = _split(args, source, lake)
    if args.tuned is not None:
        key = recipe_key(args.method, args, source.training, split)
        recipe = recipes.wanted(source.name, key, args.tuned)
        environment.note(recipes.taken(key, recipe))
    settings_ = (recipe.settings if recipe else {}) | _given(args)
    request = replace(
        _request(args, source, lake, settings_, split),
        comparison=args.comparison,
        variant=args.variant,
        sampled=args.sampled,
        asked_for=asked_for(args),
        recipe=recipe,
        train_until=args.train_until,
    )
    if split == "nightly":
        return nightly.train(request, environment.note)
    return run.train(request, environment.note)


def _tune(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import note
    from models.experiments.tune import Budget, in_words, tune

    chosen, split = _given(args), _split(args, source, lake)
    done = tune(
        _request(args, source, lake, chosen, split),
        recipe_key(args.method, args, source.training, split),
        chosen,
        Budget(args.trials, args.minutes),
        note,
    )
    print(in_words(done))
    return done


def _recipes(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.experiments.grid import methods_of
    from models.registry import recipes

    words = args.methods or ",".join(source.training.methods)
    names = methods_of(words, args.target or source.training.target)
    split = _split(args, source, lake)
    keys = [recipe_key(name, args, source.training, split) for name in names]
    found = recipes.every(source.name, keys)
    for name, recipe in found.items():
        print(recipes.described(name, recipe))
    return {
        "source": source.name,
        "recipes": {
            name: recipe and {**recipe.values, "mlflow_run_id": recipe.run_id}
            for name, recipe in found.items()
        },
    }


def _evaluate(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core import environment
    from models.evaluation import rescore

    environment.use_threads(args.threads)
    return rescore.score_again(
        source=source, lake=lake, run_id=args.run_id, version=args.table_version
    )


def _power(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.selection.power import power, show

    methods = [name.strip() for name in (args.methods or "").split(",") if name.strip()]
    outcome = power(source.name, args.comparison, args.split, methods, args.against)
    show(outcome)
    return outcome


def _compare(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.selection.compare import compare, show

    expect = [name.strip() for name in (args.expect or "").split(",") if name.strip()]
    outcome = compare(source.name, args.comparison, expect)
    show(outcome)
    return outcome


def _register(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.registry.register import register

    done = register(source.name, args.comparison)
    made = ", ".join(
        f"version {v['version']} {v['method']}{'' if v['new'] else ' (was there)'}"
        for v in done["versions"]
    )
    print(
        f"registered model {done['model']}: {made}. Alias challenger is version "
        f"{done['challenger']['version']}, {done['challenger']['method']}: load it with "
        f'mlflow.pyfunc.load_model("{done["uri"]}")'
    )
    return done


def _score(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from jobs.cli import execute
    from jobs.cli import parser as jobs_parser
    from models.core.environment import use_threads

    use_threads(args.threads)
    words = ["score", "--source", args.source, "--k", str(args.k)]
    if args.model_version is not None:
        words += ["--model-version", str(args.model_version)]
    elif args.alias is not None:
        words += ["--alias", args.alias]
    return execute(jobs_parser().parse_args(words), source)


def _refit(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from jobs.core.settings import settings
    from models.core import environment
    from models.training.refit import Request, in_words, refit

    environment.use_threads(args.threads)
    done = refit(
        Request(
            source=source,
            lake=lake,
            alias=args.alias,
            number=args.model_version,
            version=args.table_version,
            from_scratch=args.from_scratch,
            device=environment.pick_device(args.device),
            checkpoint_s=settings().checkpoint_s
            if args.checkpoint_s is None
            else args.checkpoint_s,
        ),
        environment.note,
    )
    print(in_words(done))
    return done


def _explain(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.report.explain import explain, in_words

    found = explain(source, lake, args.user, args.model_version)
    print(in_words(found))
    return found


def _verify(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import use_threads
    from models.selection.verify import in_words, verify

    use_threads(args.threads)
    alias = None if args.served else args.alias
    told = verify(source, lake, alias, args.model_version, args.most)
    print(in_words(told))
    return told


def _promote(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import use_threads
    from models.selection.gate import in_words, promote

    use_threads(args.threads)
    decision = promote(source, lake, args.model_version, args.force, args.reason)
    print(in_words(decision))
    return decision


def _rollback(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.selection.gate import in_words, rollback

    decision = rollback(source, args.reason)
    print(in_words(decision))
    return decision


def _report(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.report.report import report

    done = report(source, lake, args.comparison, args.out)
    print(
        f"{done['page']}: comparison {done['comparison']}"
        + (f"; {done['url']}" if done["url"] else "")
    )
    return done


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: use numbers separated by commas, such as 1,2") from None


def _grid(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
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


def _rules(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    """What a session rule is worth: every method once more for each gap, on the same targets."""
    from models.core.environment import note
    from models.experiments.grid import command_line, grid
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
    gaps = _numbers("--gaps", args.gaps, float)
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


def _cells(
    args: argparse.Namespace, source: Any, lake: str, options: list[str], variants: list[str]
) -> list[Any]:
    """The trainings of a grid, or of a backtest."""
    from models.experiments.grid import cells_of, tuned_cells

    told, _ = train_parser().parse_known_args(
        ["--source", args.source, "--method", "pop", *options]
    )
    seeds = _numbers("--seeds", args.seeds, int)
    cells = cells_of(args.methods, variants, seeds, told.target or source.training.target)
    if not args.tuned:
        return cells
    split = _split(told, source, lake)
    return tuned_cells(
        source.name, cells, lambda name: recipe_key(name, told, source.training, split)
    )


def _backtest(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import note
    from models.experiments.backtest import backtest, planned
    from models.selection.compare import show

    args.methods = args.methods or ",".join(source.training.methods)
    args.seeds = args.seeds or ",".join(map(str, source.training.seeds))
    plan = planned(
        args.source, lake, args.nights, args.each_night, args.table_version, args.comparison,
        args.options,
    )  # fmt: skip
    cells = _cells(args, source, lake, plan.options, [])
    file = Path(args.results) if args.results else None
    outcome = backtest(plan, cells, args.methods, args.seeds, args.tuned, file, note)
    show(outcome)
    return outcome


def _scaling(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import note
    from models.experiments.scaling import in_words, scaling

    written = scaling(
        args.source,
        args.comparison,
        args.method,
        _numbers("--widths", args.widths, int),
        _numbers("--shares", args.shares, float),
        _numbers("--seeds", args.seeds, int),
        args.options,
        Path(args.results),
        note,
        args.one_seed_from,
    )
    print(in_words(written))
    return written


def _results(args: argparse.Namespace) -> dict[str, Any]:
    from models.experiments.results import render

    document = Path(args.document)
    if not document.is_file():
        raise UserError(f"{document} is not there: name the document whose tables are to be made")
    made = render(document)
    print(f"{document}: tables made from {', '.join(made) or 'nothing: it names no results file'}")
    return {"document": str(document), "files": made}


@dataclass(frozen=True)
class Command:
    """A command: what `--help` says, its options, and what it does.

    source: whether it is about one source; then `run` takes the source and the lake, too.
    """

    says: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[..., dict[str, Any] | None]
    source: bool = True


COMMANDS = {
    "train": Command("train one method, score it, record it in MLflow", add_training, _train),
    "tune": Command(
        "search one method's settings on the validation period; continues where it stopped",
        _tune_options,
        _tune,
    ),
    "recipes": Command(
        "list the newest recipe of each method, as `tune` recorded it", _recipes_options, _recipes
    ),
    "evaluate": Command(
        "score a recorded run's model again on its cut", _evaluate_options, _evaluate
    ),
    "compare": Command("compare the finished runs of a comparison", _compare_options, _compare),
    "power": Command("how much evidence a comparison has", _power_options, _power),
    "register": Command(
        "make versions of the source's registered model", _register_options, _register
    ),
    "verify": Command(
        "check that a registered model gives the scores that its training recorded",
        _verify_options,
        _verify,
    ),
    "score": Command(
        "write gold.recommendations; the same as python -m jobs score", _score_options, _score
    ),
    "promote": Command(
        "make the challenger the champion, if it passes the gate",
        _promote_options,
        _promote,
    ),
    "refit": Command(
        "train the champion's recipe on everything in gold.sequences, and serve that",
        _refit_options,
        _refit,
    ),
    "rollback": Command(
        "make the previous champion the champion again", _rollback_options, _rollback
    ),
    "explain": Command(
        "show where a user's list comes from: refit, recipe, comparison, table version, files",
        _explain_options,
        _explain,
    ),
    "report": Command(
        "make one HTML page: nights, log, methods, gate, lists, lineage", _report_options, _report
    ),
    "compare-rules": Command(
        "what counts as a session: train on sessions cut by several gaps, on the same targets",
        _rules_options,
        _rules,
    ),
    "grid": Command(
        "train many methods and seeds, one after another; continues where it stopped",
        _grid_options,
        _grid,
    ),
    "backtest": Command(
        "evaluate methods night by night, as they are used; continues where it stopped",
        _backtest_options,
        _backtest,
    ),
    "scaling": Command(
        "measure loss against parameters and data; continues where it stopped",
        _scaling_options,
        _scaling,
    ),
    "results": Command(
        "make a document's tables from results/*.json", _results_options, _results, source=False
    ),
    "params": Command("count parameters, exactly", _params_options, _params, source=False),
}


def main(argv: list[str] | None = None) -> int:
    from jobs.core.errors import SessionmillError

    args = parser().parse_args(argv)
    if argv is None:  # a scheduler that ends a task asks first: say in MLflow that the run ended
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    done: dict[str, Any] | None
    try:
        command = COMMANDS[args.command]
        if not command.source:
            done = command.run(args)
        else:
            from jobs.core.settings import settings
            from jobs.core.source_file import load_source

            source = load_source(args.source)
            done = command.run(args, source, settings().table_root())
    except (UserError, SessionmillError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json and done is not None:
        answer(done)
    if done and args.command == "verify" and not done["holds"]:
        return 1
    failed = (
        done.get("failed") if done and args.command in ("grid", "backtest", "scaling") else None
    )
    if failed:
        print(
            f"error: {len(failed)} of the trainings failed, {', '.join(failed)}: see above why. The "
            "same command tries them again",
            file=sys.stderr,
        )
    return 1 if failed else 0
