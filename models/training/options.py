"""The options of a training on the command line: settings from their declarations
(`models/core/config.py`), and what else one run gets."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from models.core.config import EACH_NIGHT, PRESETS, TRAIN_UNTIL, ModelConfig, TrainConfig
from models.core.knobs import add_options
from models.registry.recipes import NEWEST, Key

if TYPE_CHECKING:
    from jobs.core.source_rules import TrainingPart

# How and not what: a training's names, and what leaves its outcome as it is.
NAMES = ("command", "source", "method", "seed", "comparison", "variant")
HOW = (*NAMES, "threads", "device", "deterministic", "checkpoint_s", "json")


def add_method(command: argparse.ArgumentParser) -> None:
    """The method, its preset, and the settings of its model."""
    command.add_argument("--method", required=True, help="a method such as bert4rec+st")
    command.add_argument("--preset", help=f"{', '.join(PRESETS)}; default: the source's, or small")
    add_options(command, ModelConfig)


def add_training(command: argparse.ArgumentParser) -> None:
    """The options of `python -m models train`, without its source."""
    add_fit(command)
    command.add_argument(
        "--train-until",
        choices=TRAIN_UNTIL,
        help="the period before which training rows and vocabulary end. test: once the best epoch "
        "is known, train again with the validation period; default: the source file's. Not used "
        "under --split nightly, which trains on everything before each night",
    )
    command.add_argument(
        "--comparison", metavar="ID", help="the comparison that the training belongs to"
    )
    command.add_argument(
        "--sampled",
        type=int,
        default=0,
        metavar="N",
        help="also rank among N drawn items, as sampled_…; 0: do not",
    )
    command.add_argument(
        "--variant",
        metavar="NAME",
        help="names it among trainings of the same method in the comparison",
    )
    command.add_argument(
        "--tuned",
        nargs="?",
        const=NEWEST,
        metavar="RUN_ID",
        help="with the settings that `tune` found: the newest recipe, or that of this run in "
        "MLflow; options that are given win",
    )


def add_fit(command: argparse.ArgumentParser) -> None:
    """Options of both a training and a trial of `tune`."""
    add_method(command)
    add_options(command, TrainConfig)
    command.add_argument(
        "--checkpoint-s",
        type=float,
        metavar="SECONDS",
        help="seconds between checkpoints (default SESSIONMILL_CHECKPOINT_S, or 60); 0: after "
        "every step",
    )
    add_split(command)
    add_nights(command)
    command.add_argument("--valid-from", metavar="TS", help="where the validation period begins")
    command.add_argument("--test-from", metavar="TS", help="where the test period begins")
    command.add_argument(
        "--table-version", type=int, help="version of gold.sequences; default: the newest"
    )
    command.add_argument("--threads", type=int, help="CPU threads; 1 is best when others run, too")
    command.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train"
    )
    command.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU the same seed gives the same weights to the last bit; slower. On a CPU it does "
        "anyway",
    )


def add_nights(command: argparse.ArgumentParser) -> None:
    """Options of `--split nightly`."""
    command.add_argument(
        "--nights",
        type=int,
        metavar="N",
        help="how many of the log's last nights (UTC days) --split nightly evaluates on; default: 10, or "
        "half of the log's nights where that is fewer",
    )
    command.add_argument(
        "--each-night",
        choices=EACH_NIGHT,
        help="the model of each test night: scratch (default): trained from scratch on everything before "
        "the night; warm: the model of the night before goes on, as a refit does; once: the first test night's model is kept",
    )


def add_split(command: argparse.ArgumentParser) -> None:
    """How the events are prepared and cut."""
    command.add_argument(
        "--split",
        help="how periods are cut: temporal, nightly, last_session or last_item; default: the source "
        "file's, else nightly where the log has five nights or more, else temporal",
    )
    command.add_argument(
        "--preprocess",
        default="gold",
        help="gold; gap:SECONDS: the same events in sessions that such a silence ends; or paper_a: "
        "sessions and users as in paper A",
    )


def split_of(
    split: str | None,
    preprocess: str,
    *,
    pinned: bool = False,
    nightly: bool = False,
    by_source: str | None = None,
) -> str | None:
    """The split that is asked for: by name; by the preprocessing; by options that only one split has
    (`pinned`: a cut, `nightly`: nights); by the source file. None: the log decides."""
    if split is None and preprocess == "paper_a":
        return "last_item"
    if split is None and (pinned or nightly):
        return "temporal" if pinned else "nightly"
    return split or by_source


def split_asked(args: argparse.Namespace, training: TrainingPart) -> str | None:
    """`split_of` the options of a command that has some of them."""
    told = vars(args)
    return split_of(
        args.split,
        args.preprocess,
        pinned=told.get("valid_from") is not None or told.get("test_from") is not None,
        nightly=told.get("nights") is not None or told.get("each_night") is not None,
        by_source=training.split,
    )


def recipe_key(method: str, args: argparse.Namespace, training: TrainingPart, split: str) -> Key:
    """What recipe a method is trained by, or tuned to, under these options, `[training]` and a
    split."""
    return Key(
        method=method,
        target=args.target or training.target,
        preset=args.preset or training.preset,
        split=split,
        preprocess=args.preprocess,
    )


def train_parser() -> argparse.ArgumentParser:
    """`python -m models train` alone, for what a grid asks of its trainings."""
    parser = argparse.ArgumentParser(prog="python -m models train")
    parser.add_argument("--source", required=True, help="a source's name or its file")
    add_training(parser)
    return parser


def given(args: argparse.Namespace, *kinds: type) -> dict[str, Any]:
    """The settings of configuration classes as the command line gives them; None: not given."""
    return {one.name: getattr(args, one.name, None) for kind in kinds for one in fields(kind)}


def asked_for(args: argparse.Namespace) -> str:
    """By what options a training is asked for, in one line that equal options have in common."""
    bare = train_parser().parse_args(["--source", "", "--method", ""])
    wanted = {k: v for k, v in vars(args).items() if k not in HOW and v != getattr(bare, k)}
    return json.dumps(wanted, sort_keys=True)
