"""`register`, `verify`, `promote`, `refit`, `rollback`, `score`, `explain`: versions, and what they serve."""

from __future__ import annotations

import argparse
from typing import Any

from models.commands.common import COMPARISON, add_threads, add_version


def register_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)


def verify_options(command: argparse.ArgumentParser) -> None:
    which = add_version(command)
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
    add_threads(command)


def score_options(command: argparse.ArgumentParser) -> None:
    add_version(command, None)
    command.add_argument("--k", type=int, default=100, help="items of a list, at most")
    add_threads(command)


def promote_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model-version", type=int, metavar="N", help="default: the challenger")
    command.add_argument(
        "--force", action="store_true", help="set the champion without the gate's checks"
    )
    command.add_argument("--reason", default="", help="the reason, which is recorded")
    add_threads(command)


def refit_options(command: argparse.ArgumentParser) -> None:
    add_version(command)
    command.add_argument("--table-version", type=int, metavar="V", help="default: the newest")
    command.add_argument(
        "--from-scratch",
        action="store_true",
        help="train for the recipe's best epochs; default: continue from the newest weights",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda")
    command.add_argument("--checkpoint-s", type=float, help="seconds between checkpoints")
    add_threads(command)


def rollback_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reason", default="", help="the reason, which is recorded")


def explain_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--user", required=True, metavar="ID", help="whose list")
    command.add_argument(
        "--model-version",
        type=int,
        metavar="N",
        help="which version's list; default: the one that is served",
    )


def run_register(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
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


def run_verify(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import use_threads
    from models.selection.verify import in_words, verify

    use_threads(args.threads)
    alias = None if args.served else args.alias
    told = verify(source, lake, alias, args.model_version, args.most)
    print(in_words(told))
    return told


def run_score(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
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


def run_promote(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.core.environment import use_threads
    from models.selection.gate import in_words, promote

    use_threads(args.threads)
    decision = promote(source, lake, args.model_version, args.force, args.reason)
    print(in_words(decision))
    return decision


def run_refit(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
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


def run_rollback(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.selection.gate import in_words, rollback

    decision = rollback(source, args.reason)
    print(in_words(decision))
    return decision


def run_explain(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.report.explain import explain, in_words

    found = explain(source, lake, args.user, args.model_version)
    print(in_words(found))
    return found
