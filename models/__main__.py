"""`python -m models train|grid|scaling|evaluate|compare|register|verify|score|promote|rollback|report|
params|results`: gold tables in, a registry out.

Prints what it did in a paragraph; `--json` prints the same for machines as the last line. Nothing
heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

from jobs.answers import answer
from models.errors import UserError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, source: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        if source:
            added.add_argument("--source", required=True, help="a source's name or its file")
        added.add_argument("--json", action="store_true", help="JSON as the last line")
        return added

    train = command("train", "train one method, score it, record it in MLflow")
    _method(train)
    train.add_argument("--seed", type=int, default=None)
    train.add_argument("--epochs", type=int, help="at most so many")
    train.add_argument("--patience", type=int, help="epochs without improvement before stopping")
    train.add_argument("--batch-size", type=int, help="rows a step")
    train.add_argument("--learning-rate", type=float)
    train.add_argument("--loss", help="auto, full, sampled or gbce")
    train.add_argument("--precision", help="float32, bfloat16, or auto: what is fast here")
    train.add_argument("--alpha", type=float, help="of sessionrec: share of the rank loss")
    train.add_argument("--data-share", type=float, help="of the training users, 0 to 1")
    train.add_argument("--negatives", type=int, help="items drawn a step: sampled, gbce")
    train.add_argument(
        "--checkpoint-s",
        type=float,
        metavar="SECONDS",
        help="between checkpoints (default SESSIONMILL_CHECKPOINT_S, or 60); 0: after every step",
    )
    train.add_argument("--target", help="next_item or next_session; default: the source file's")
    train.add_argument("--split", help="temporal (default), last_session or last_item")
    train.add_argument("--preprocess", default="gold", help="gold, or paper_a: cut anew as it did")
    train.add_argument("--valid-from", metavar="TS", help="pins the validation cut")
    train.add_argument("--test-from", metavar="TS", help="pins the test cut")
    train.add_argument("--table-version", type=int, help="of gold.sequences; default: the newest")
    train.add_argument("--comparison", metavar="ID", help="names the comparison this belongs to")
    train.add_argument(
        "--sampled",
        type=int,
        default=0,
        metavar="N",
        help="also the places among N drawn items, as sampled_…",
    )
    train.add_argument(
        "--variant", metavar="NAME", help="tells it from others of its method in the comparison"
    )
    train.add_argument("--threads", type=int, help="CPU threads; 1 is best when others run too")
    train.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))

    evaluate = command("evaluate", "score a recorded run's model again on its cut")
    evaluate.add_argument("--run-id", required=True, help="of a training run in MLflow")
    evaluate.add_argument("--table-version", type=int, help="default: the run's own")
    evaluate.add_argument("--threads", type=int)

    compare = command("compare", "compare the finished runs of a comparison")
    compare.add_argument("--comparison", required=True, metavar="ID")
    compare.add_argument("--expect", help="methods that should be there, by comma")

    register = command("register", "make versions of the source's registered model")
    register.add_argument("--comparison", required=True, metavar="ID")

    served = command(
        "verify", "ask a registered model its test period: are its scores those stored?"
    )
    which = served.add_mutually_exclusive_group()
    which.add_argument("--alias", default="champion", help="default %(default)s")
    which.add_argument("--model-version", type=int, metavar="N", help="in place of an alias")
    served.add_argument(
        "--most", type=int, metavar="N",
        help="at most so many questions, of whole users drawn at random; default: all",
    )  # fmt: skip
    served.add_argument("--threads", type=int, help="CPU threads")

    score = command("score", "write gold.recommendations; the same as python -m jobs score")
    which = score.add_mutually_exclusive_group()
    which.add_argument("--alias", default="champion", help="default %(default)s")
    which.add_argument("--model-version", type=int, metavar="N", help="in place of an alias")
    score.add_argument("--k", type=int, default=100, help="items of a list, at most")
    score.add_argument("--threads", type=int, help="CPU threads")

    promote = command("promote", "make the challenger the champion, if it has shown itself better")
    promote.add_argument("--model-version", type=int, metavar="N", help="default: the challenger")
    promote.add_argument("--force", action="store_true", help="whatever the gate would say")
    promote.add_argument("--reason", default="", help="why; recorded")
    promote.add_argument("--threads", type=int, help="CPU threads")

    rollback = command("rollback", "make the champion before this one the champion again")
    rollback.add_argument("--reason", default="", help="why; recorded")

    page = command("report", "one HTML page: nights, log, methods, gate, lists, lineage")
    page.add_argument("--comparison", metavar="ID", help="default: the newest")
    page.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the lake")

    grid = command("grid", "train many methods and seeds, one after another; goes on where it was")
    grid.add_argument("--comparison", required=True, metavar="ID")
    grid.add_argument(
        "--methods", required=True, help="by comma; `sasrec*` with its encodings; all"
    )
    grid.add_argument("--seeds", default="1,2", help="by comma")
    grid.add_argument(
        "--variant", action="append", default=[], metavar="NAME:OPTIONS",
        help="every method once more, with these options; may be given again",
    )  # fmt: skip
    grid.add_argument("--results", metavar="FILE", help="a small JSON file of what came of it")
    grid.add_argument("options", nargs="*", metavar="-- OPTION", help="of every `train`, after --")

    scaling = command("scaling", "loss against parameters and against data; goes on where it was")
    scaling.add_argument("--comparison", required=True, metavar="ID")
    scaling.add_argument("--method", required=True, help="such as sessionrec-hstu")
    scaling.add_argument("--widths", default="8,16,32,64,128", help="D, by comma")
    scaling.add_argument("--shares", default="0.125,0.25,0.5", help="of the users, by comma")
    scaling.add_argument("--seeds", default="1,2,3", help="by comma")
    scaling.add_argument(
        "--one-seed-from", type=float, default=math.inf, metavar="D",
        help="only the first seed where width times share is this or more",
    )  # fmt: skip
    scaling.add_argument("--results", metavar="FILE", required=True, help="a small JSON file")
    scaling.add_argument("options", nargs="*", metavar="-- OPTION", help="of every `train`")

    results = command("results", "make a document's tables from results/*.json", source=False)
    results.add_argument("document", nargs="?", default="RESULTS.md")

    params = command("params", "count parameters, exactly", source=False)
    _method(params)
    params.add_argument("--items", type=int, help="V; default: the preset's data set")
    return top


def _method(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", required=True, help="such as bert4rec+st")
    command.add_argument("--preset", help="small, tiny or paper_a_…; default: the source's, small")
    command.add_argument("--length", type=int, dest="max_len", help="L")
    command.add_argument("--segments", type=int, help="S_max of +sse")
    command.add_argument("--time-features", type=int, help="T of +tsa")
    command.add_argument("--layers", type=int)
    command.add_argument("--dim", type=int, help="D")
    command.add_argument("--heads", type=int)
    command.add_argument("--dropout", type=float)
    command.add_argument("--pooling", help="of sessionrec: mean, attention or transformer")
    command.add_argument(
        "--feedback", action=argparse.BooleanOptionalAction, default=None,
        help="of sessionrec: does history say what became of an item?",
    )  # fmt: skip
    command.add_argument(
        "--side", action=argparse.BooleanOptionalAction, default=None,
        help="of sessionrec: does it see what a catalogue says of items?",
    )  # fmt: skip
    command.add_argument(
        "--exposures",
        type=int,
        help="of sessionrec and +fb: shown items a session, at most; those that are events of their own only of sessionrec",
    )
    command.add_argument("--request-time", help="last_event or known")
    command.add_argument("--repeat-policy", help="allow or exclude_seen")
    command.add_argument("--sse-index", help="from_oldest or from_newest")
    command.add_argument("--positions", help="of transformers: from_newest or from_oldest")
    command.add_argument("--tsa-time", help="float64 or raw_float32")


MODEL_OPTIONS = (
    "max_len", "segments", "time_features", "layers", "dim", "heads", "dropout", "request_time",
    "repeat_policy", "sse_index", "positions", "tsa_time", "pooling", "exposures", "feedback", "side",
)  # fmt: skip
TRAIN_OPTIONS = (
    "seed", "epochs", "patience", "batch_size", "learning_rate", "loss", "negatives",
    "precision", "alpha", "data_share",
)  # fmt: skip


HOW = (  # and not what: a training's names, and what leaves its outcome as it is
    "source", "method", "seed", "comparison", "variant", "threads", "device", "checkpoint_s", "json",
)  # fmt: skip


def asked_for(args: argparse.Namespace) -> str:
    """By what options a training is asked for, in one line that equal options have in common."""
    bare = parser().parse_args(["train", "--source", "", "--method", ""])
    given = {k: v for k, v in vars(args).items() if k not in HOW and v != getattr(bare, k)}
    return json.dumps(given, sort_keys=True)


def _params(args: argparse.Namespace) -> dict[str, Any]:
    from models.methods import config, count_parameters
    from models.presets import PRESET_ITEMS

    preset = args.preset or "small"
    chosen = config(args.method, preset, **{name: getattr(args, name) for name in MODEL_OPTIONS})
    items = args.items if args.items is not None else PRESET_ITEMS.get(preset)
    if items is None:
        raise UserError(f"--items V is needed: preset {preset!r} has no catalogue of its own")
    if not 1 <= items < 2**31:
        raise UserError(f"--items {items}: a whole number, 1 to {2**31 - 1:,}")
    counted = {"method": args.method, **count_parameters(items, chosen)}
    parts = ", ".join(f"{name} {number:,}" for name, number in counted["by_module"].items())
    print(
        f"{args.method} with {items:,} items, preset {preset}: {counted['num_params']:,} "
        f"parameters, {counted['num_params_added']:,} ({counted['params_added_pct']:.3f} %) more "
        f"than the backbone alone. {parts}"
    )
    return counted


def _train(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any] | None:
    from jobs.settings import settings
    from models import commands
    from models.methods import config

    names = (*MODEL_OPTIONS, *TRAIN_OPTIONS)
    given = {name: getattr(args, name) for name in names}
    given["target"] = args.target or source.training.target
    if given["seed"] is None:
        given["seed"] = source.training.seeds[0]
    chosen = config(args.method, args.preset or source.training.preset, **given)
    commands.use_threads(args.threads)
    return commands.train(
        source=source,
        lake=lake,
        config=chosen,
        version=args.table_version,
        split=args.split,
        preprocess=args.preprocess,
        valid_from=commands.parse_ts(args.valid_from),
        test_from=commands.parse_ts(args.test_from),
        comparison=args.comparison,
        variant=args.variant,
        device=commands.pick_device(args.device),
        checkpoint_s=settings().checkpoint_s if args.checkpoint_s is None else args.checkpoint_s,
        sampled=args.sampled,
        asked_for=asked_for(args),
        say=commands.note,
    )


def _evaluate(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models import commands

    commands.use_threads(args.threads)
    return commands.score_again(
        source=source, lake=lake, run_id=args.run_id, version=args.table_version
    )


def _compare(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.compare import compare, show

    expect = [name.strip() for name in (args.expect or "").split(",") if name.strip()]
    outcome = compare(source.name, args.comparison, expect)
    show(outcome)
    return outcome


def _register(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.register import register

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
    from jobs.__main__ import execute
    from jobs.__main__ import parser as jobs_parser
    from models.commands import use_threads

    use_threads(args.threads)
    words = ["score", "--source", args.source, "--k", str(args.k), "--alias", args.alias]
    if args.model_version is not None:
        words[-2:] = ["--model-version", str(args.model_version)]
    return execute(jobs_parser().parse_args(words), source)


def _verify(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.commands import use_threads
    from models.verify import in_words, verify

    use_threads(args.threads)
    told = verify(source, lake, args.alias, args.model_version, args.most)
    print(in_words(told))
    return told


def _promote(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.commands import use_threads
    from models.gate import in_words, promote

    use_threads(args.threads)
    decision = promote(source, lake, args.model_version, args.force, args.reason)
    print(in_words(decision))
    return decision


def _rollback(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.gate import in_words, rollback

    decision = rollback(source, args.reason)
    print(in_words(decision))
    return decision


def _report(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.report import report

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
        raise UserError(f"{option} {text}: numbers by comma, such as 1,2") from None


def _grid(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.commands import note
    from models.compare import show
    from models.grid import cells_of, command_line, grid

    seeds = _numbers("--seeds", args.seeds, int)
    file = Path(args.results) if args.results else None
    told, _ = parser().parse_known_args(
        ["train", "--source", args.source, "--method", "pop", *args.options]
    )
    target = told.target or source.training.target
    outcome = grid(
        args.source, args.comparison, cells_of(args.methods, args.variant, seeds, target),
        args.options,
        command_line(
            "grid", args.source, args.comparison, args.options, methods=args.methods,
            seeds=args.seeds, variant=args.variant,
        ),
        file, note,
    )  # fmt: skip
    show(outcome)
    return outcome


def _scaling(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.commands import note
    from models.scaling import in_words, scaling

    written = scaling(
        args.source, args.comparison, args.method, _numbers("--widths", args.widths, int),
        _numbers("--shares", args.shares, float), _numbers("--seeds", args.seeds, int),
        args.options, Path(args.results), note, args.one_seed_from,
    )  # fmt: skip
    print(in_words(written))
    return written


def _results(args: argparse.Namespace) -> dict[str, Any]:
    from models.results import render

    document = Path(args.document)
    if not document.is_file():
        raise UserError(f"{document} is not there: name the document whose tables are to be made")
    made = render(document)
    print(f"{document}: tables made from {', '.join(made) or 'nothing: it names no results file'}")
    return {"document": str(document), "files": made}


ALONE = {"params": _params, "results": _results}  # need no source
COMMANDS: dict[str, Any] = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "register": _register,
    "verify": _verify,
    "score": _score,
    "promote": _promote,
    "rollback": _rollback,
    "report": _report,
    "grid": _grid,
    "scaling": _scaling,
}


def main(argv: list[str] | None = None) -> int:
    from jobs.errors import SessionmillError

    args = parser().parse_args(argv)
    if argv is None:  # a scheduler that ends a task asks first: say in MLflow that the run ended
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    done: dict[str, Any] | None
    try:
        if args.command in ALONE:
            done = ALONE[args.command](args)
        else:
            from jobs.settings import settings
            from jobs.sources import load_source

            source = load_source(args.source)
            done = COMMANDS[args.command](args, source, settings().table_root())
    except (UserError, SessionmillError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json and done is not None:
        answer(done)
    if done and args.command == "verify" and not done["holds"]:
        return 1
    failed = done.get("failed") if done and args.command in ("grid", "scaling") else None
    if failed:
        print(
            f"error: {len(failed)} of the trainings failed, {', '.join(failed)}: see above why. The "
            "same command tries them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
