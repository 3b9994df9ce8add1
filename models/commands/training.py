"""`train`, `tune`, `recipes`, `evaluate`, `params`: one method."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from models.commands.common import add_threads, split_of_log
from models.core.config import ModelConfig, TrainConfig
from models.core.errors import UserError
from models.training.options import add_fit, add_method, add_split, asked_for, given, recipe_key


def tune_options(command: argparse.ArgumentParser) -> None:
    add_fit(command)
    command.add_argument("--trials", type=int, default=20, metavar="N", help="at most (default 20)")
    command.add_argument(
        "--minutes", type=float, metavar="T", help="at most; default: only --trials is a bound"
    )


def recipes_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--methods", help="by comma, as in `grid`; default: the source file's")
    command.add_argument("--target", help="default: the source file's")
    command.add_argument("--preset", help="default: the source file's")
    add_split(command)
    command.add_argument(
        "--table-version", type=int, help="of gold.sequences, whose nights may decide the split"
    )


def evaluate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run-id", required=True, help="of a training run in MLflow")
    command.add_argument("--table-version", type=int, help="default: the run's own")
    add_threads(command)


def params_options(command: argparse.ArgumentParser) -> None:
    add_method(command)
    command.add_argument("--items", type=int, help="V; default: the preset's data set")


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


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line has."""
    every = given(args, ModelConfig, TrainConfig)
    return {name: value for name, value in every.items() if value is not None}


def run_train(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any] | None:
    from models.core import environment
    from models.registry import recipes
    from models.training import nightly, run

    recipe = None
    split = split_of_log(args, source, lake)
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


def run_tune(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import note
    from models.experiments.tune import Budget, in_words, tune

    chosen, split = _given(args), split_of_log(args, source, lake)
    done = tune(
        _request(args, source, lake, chosen, split),
        recipe_key(args.method, args, source.training, split),
        chosen,
        Budget(args.trials, args.minutes),
        note,
    )
    print(in_words(done))
    return done


def run_recipes(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.experiments.grid import methods_of
    from models.registry import recipes

    words = args.methods or ",".join(source.training.methods)
    names = methods_of(words, args.target or source.training.target)
    split = split_of_log(args, source, lake)
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


def run_evaluate(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core import environment
    from models.evaluation import rescore

    environment.use_threads(args.threads)
    return rescore.score_again(
        source=source, lake=lake, run_id=args.run_id, version=args.table_version
    )


def run_params(args: argparse.Namespace) -> dict[str, Any]:
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
