"""`python -m models train|tune|recipes|grid|seeds|compare-rules|backtest|scaling|evaluate|compare|power|
register|verify|score|promote|refit|rollback|explain|report|params|results`: gold tables in, a registry out.

Prints what it did in a paragraph; `--json` prints the same for machines as the last line. Nothing
heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.cli import INTERRUPTED, Parser
from jobs.core.json_output import answer
from models.commands import comparing, experimenting, serving, training
from models.core.errors import UserError
from models.training.options import add_training


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
    "train": Command(
        "train one method, score it, record it in MLflow", add_training, training.run_train
    ),
    "tune": Command(
        "search one method's settings on the validation period; continues where it stopped",
        training.tune_options,
        training.run_tune,
    ),
    "recipes": Command(
        "list the newest recipe of each method, as `tune` recorded it",
        training.recipes_options,
        training.run_recipes,
    ),
    "evaluate": Command(
        "score a recorded run's model again on its cut",
        training.evaluate_options,
        training.run_evaluate,
    ),
    "compare": Command(
        "compare the finished runs of a comparison",
        comparing.compare_options,
        comparing.run_compare,
    ),
    "power": Command(
        "how much evidence a comparison has", comparing.power_options, comparing.run_power
    ),
    "register": Command(
        "make versions of the source's registered model",
        serving.register_options,
        serving.run_register,
    ),
    "verify": Command(
        "check that a registered model gives the scores that its training recorded",
        serving.verify_options,
        serving.run_verify,
    ),
    "score": Command(
        "write gold.recommendations; the same as python -m jobs score",
        serving.score_options,
        serving.run_score,
    ),
    "promote": Command(
        "make the challenger the champion, if it passes the gate",
        serving.promote_options,
        serving.run_promote,
    ),
    "refit": Command(
        "train the champion's recipe on everything in gold.sequences, and serve that",
        serving.refit_options,
        serving.run_refit,
    ),
    "rollback": Command(
        "make the previous champion the champion again",
        serving.rollback_options,
        serving.run_rollback,
    ),
    "explain": Command(
        "show where a user's list comes from: refit, recipe, comparison, table version, files",
        serving.explain_options,
        serving.run_explain,
    ),
    "report": Command(
        "make one HTML page: nights, log, methods, gate, lists, lineage",
        comparing.report_options,
        comparing.run_report,
    ),
    "compare-rules": Command(
        "what counts as a session: train on sessions cut by several gaps, on the same targets",
        experimenting.rules_options,
        experimenting.run_rules,
    ),
    "grid": Command(
        "train many methods and seeds, one after another; continues where it stopped",
        experimenting.grid_options,
        experimenting.run_grid,
    ),
    "seeds": Command(
        "train further seeds until a difference is decided, by a plan made before the first look",
        experimenting.seeds_options,
        experimenting.run_seeds,
    ),
    "backtest": Command(
        "evaluate methods night by night, as they are used; continues where it stopped",
        experimenting.backtest_options,
        experimenting.run_backtest,
    ),
    "scaling": Command(
        "measure loss against parameters and data; continues where it stopped",
        experimenting.scaling_options,
        experimenting.run_scaling,
    ),
    "results": Command(
        "make a document's tables from results/*.json",
        experimenting.results_options,
        experimenting.run_results,
        source=False,
    ),
    "params": Command(
        "count parameters, exactly", training.params_options, training.run_params, source=False
    ),
}
OF_MANY = ("grid", "seeds", "compare-rules", "backtest", "scaling")  # `failed`: their trainings


def parser() -> Parser:
    top = Parser(prog="python -m models", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    top.commands = commands.choices
    for name, one in COMMANDS.items():
        added = commands.add_parser(name, help=one.says, description=one.says)
        if one.source:
            added.add_argument("--source", required=True, help="a source's name or its file")
        added.add_argument("--json", action="store_true", help="JSON as the last line")
        one.options(added)
    return top


def main(argv: list[str] | None = None) -> int:
    from jobs.core.errors import SessionmillError

    top = parser()
    args, unknown = top.parse_known_args(argv)
    if unknown:
        many = args.command in OF_MANY
        more = ". Options of the trainings come last, after --" if many else ""
        top.commands[args.command].refuse(unknown, more)
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
    except KeyboardInterrupt:
        print(
            f"error: {args.command} was interrupted (Ctrl-C). What it had recorded stays; run the same "
            "command again to go on",
            file=sys.stderr,
        )
        return INTERRUPTED
    if args.json and done is not None:
        answer(done)
    if done and args.command == "verify" and not done["holds"]:
        return 1
    failed = done.get("failed") if done and args.command in OF_MANY else None
    if failed:
        print(
            f"error: {len(failed)} of the trainings failed, {', '.join(failed)}: see above why. The "
            "same command tries them again",
            file=sys.stderr,
        )
    return 1 if failed else 0
