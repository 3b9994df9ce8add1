"""All commands of `python -m jobs` and `spark-submit jobs/__main__.py`: arguments in, an answer out."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import date
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from jobs.core.errors import SessionmillError, SettingsError, counted
from jobs.core.json_output import answer
from jobs.core.settings import settings
from jobs.core.source_file import Source, load_source

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from jobs.lake.context import Context, Result

STEPS = ("compute", "audit", "publish", "all")
REPLAYS = ("replay-rejects", "replay-filtered")
AUDITED = ("run", "ingest", "sessionize", "sequences", "drift", "lists", "validate", *REPLAYS)
"""Jobs that need Great Expectations. (Scoring starts no JVM, and MLflow must not import Spark at the same
time.)"""
PLANNED = ("run", "ingest", "sessionize", "items", "sequences", "score", *REPLAYS)
"""Jobs that choose how they work: an algorithm, an engine, a way to publish."""
JOBS = {
    "run": "ingest, sessionize, items and sequences, audits included, in one application",
    "ingest": "landing files -> bronze.events, bronze.rejects",
    "sessionize": "bronze.events -> silver.sessions",
    "items": "bronze.events -> gold.items",
    "sequences": "silver.sessions -> gold.sequences",
    "drift": "compare a day with the days before it; write ops.nights; warn or stop",
    "score": "gold.sequences and a registered model -> gold.recommendations",
    "lists": "compare published lists with a night's events: gold.recommendations -> ops.lists",
    "rules": "write the rules of [serving] as a text, for registered models without tables",
    "replay-rejects": "bronze.rejects -> bronze.events, after a fix of the source file",
    "replay-filtered": "bronze.filtered -> bronze.events, after a change of source.keep or [bots]",
    "validate": "run the suites on the published tables",
    "compare-rules": "report how far the log's own sessions and the gap rule agree",
    "maintain": "pack small files, remove what no version needs, report what it freed",
    "forget": "remove a person from every table, older version, candidate, cache and landing file",
    "explain": "show a session: its events with their files, and the nights that changed it",
}

GUESS = "print a first source file for a log, with reasons: format, columns, unit of time"
DAY_OF_A_NIGHT = "the night's day, YYYY-MM-DD (UTC); without it: all new files, and nothing is late"
ONE_STEP = "one step of the three, as the DAG runs them"
DAY_OF_DRIFT = "the day to compare, YYYY-MM-DD (UTC)"
DAY_OF_LISTS = "the night's day, YYYY-MM-DD (UTC); without one: the day of the newest event"
KEEP_DAYS = 30.0  # as long as Delta keeps its log: any of those days can be read by version

# What file systems say, whichever engine passes it on.
REMEDIES = {
    "No space left on device": "a disk is full: make room in the lake and in Spark's local folder",
    "Read-only file system": "a file system is read-only: mount it for writing",
    # (What Spark says of files that it reads together, which only [exposures] asks of it.)
    "CSV header does not conform": "the files of [exposures] do not all have the same columns in the same "
    "order: deliver those that differ again",
    "Generic S3 error": "the object store does not answer or refuses access: check AWS_ENDPOINT_URL, "
    "AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "OutOfMemoryError": "Spark has too little memory for these rows: raise "
    "SESSIONMILL_DRIVER_MEMORY, or on a cluster the executors' memory",
    "Permission denied": "this user may not read or write a folder or file: grant the rights",
}


def parse_day(text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date: write YYYY-MM-DD") from None
    if day.year < 1900:
        raise argparse.ArgumentTypeError(f"{text!r}: the day must be 1900-01-01 or later")
    return day


def parse_days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < 36_500:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days: 0 or more")
    return days


OF_ONE = {
    "explain": ("--session", "a session_id of silver.sessions"),
    "forget": ("--user", "the person's id, as the log has it"),
}
"""Jobs that are about one thing."""


INTERRUPTED = 128 + signal.SIGINT
"""The exit status of a command that Ctrl-C ended, as shells have it."""
NO_NUMBER = re.compile(r"invalid (int|float) value: (.*)")
NO_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """One whose errors are a sentence: a usage of forty lines hides it."""

    commands: Mapping[str, Parser] = MappingProxyType({})
    """The parsers of its commands, if it has any."""

    def error(self, message: str) -> NoReturn:
        message = NO_NUMBER.sub(
            lambda found: f"{found[2]} is not a {'whole ' * (found[1] == 'int')}number", message
        )
        if found := NO_CHOICE.search(message):
            near = difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), n=1)
            if self.commands:
                message = f"{found[1]!r} is not a command"
            message += f": did you mean {near[0]!r}?" if near else ""
        elif self.commands and message.endswith(": COMMAND"):
            message = "name a command"
        stop = "" if message.endswith("?") else "."
        what = "Commands" if self.commands else "Options"
        self.exit(2, f"{self.prog}: error: {message}{stop} {what}: {self.prog} --help\n")

    def refuse(self, unknown: list[str], more: str = "") -> NoReturn:
        """End with what is to be said of arguments that this command does not have."""
        option = next((one for one in unknown if one.startswith("--")), "").partition("=")[0]
        known = re.findall(r"--[a-z][a-z-]+", self.format_help())
        near = difflib.get_close_matches(option, known, n=1)
        hint = f": did you mean {near[0]}?" if near and not more else more
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def parser() -> Parser:
    main = Parser(
        prog="python -m jobs",
        description="From raw interaction logs to session and sequence tables.",
    )
    commands = main.add_subparsers(dest="job", required=True, metavar="COMMAND")
    main.commands = commands.choices
    guess_options(commands)
    for job, says in JOBS.items():
        command = commands.add_parser(job, help=says, description=says)
        command.add_argument("--source", required=True, help="a source file, or its name")
        command.add_argument("--json", action="store_true", help="the result as JSON, last line")
        if job in OF_ONE:
            option, what = OF_ONE[job]
            command.add_argument(option, required=True, metavar="ID", help=what)
            continue
        if job == "maintain":
            command.add_argument(
                "--keep-days",
                type=parse_days,
                default=KEEP_DAYS,
                metavar="N",
                help="keep what was removed from the tables in the last N days (default %(default)g)",
            )
        if job in ("compare-rules", "maintain", "rules"):
            continue
        command.add_argument(
            "--batch", help="name of a run: its steps share it; default: a new name"
        )
        if job in PLANNED:
            command.add_argument(
                "--explain-plan",
                action="store_true",
                help="print how each job works, as it is decided; with --json under plans, too",
            )
        if job in REPLAYS:
            continue
        if job == "score":
            which = command.add_mutually_exclusive_group()
            which.add_argument("--alias", help="default: serving if there is one, else champion")
            which.add_argument(
                "--model-version", type=int, metavar="N", help="a version, in place of an alias"
            )
            command.add_argument(
                "--k", type=int, default=100, help="most items of a list (default %(default)s)"
            )
            command.add_argument("--step", choices=STEPS, default="all", help=ONE_STEP)
            continue
        command.add_argument(
            "--day",
            type=parse_day,
            help={"lists": DAY_OF_LISTS, "drift": DAY_OF_DRIFT}.get(job, DAY_OF_A_NIGHT),
            required=job == "drift",
        )
        if job in ("ingest", "sessionize", "items", "sequences"):
            command.add_argument("--step", choices=STEPS, default="all", help=ONE_STEP)
        anew_options(command, job)
        if job == "validate":
            command.add_argument("--table", help="one table, such as silver.sessions; default all")
    return main


def guess_options(commands: Any) -> None:
    command = commands.add_parser("guess", help=GUESS, description=GUESS)
    command.add_argument(
        "file", metavar="FILE", help="a log, a folder of its files, or a Delta table"
    )
    command.add_argument("--name", help="the source's name; default: the file's")
    command.add_argument("--json", action="store_true", help="the result as JSON, last line")


def anew_options(command: argparse.ArgumentParser, job: str) -> None:
    """Options of the jobs that can make their tables again from what they read."""
    if job in ("run", "ingest"):
        command.add_argument(
            "--reload",
            action="store_true",
            help="read all landing files again, after another writer restored or overwrote the "
            "tables of the log; not with --day",
        )
    if job in ("run", "sessionize", "sequences"):
        what = {"sessionize": "silver.sessions", "sequences": "gold.sequences"}
        command.add_argument(
            "--rebuild",
            action="store_true",
            help=f"make {what.get(job, 'silver.sessions and gold.sequences')} anew, by the source file's rule"
            + (", with --reload all tables" if job == "run" else ""),
        )


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args, unknown = top.parse_known_args(argv)
    if unknown:
        top.commands[args.job].refuse(unknown)
    try:
        if args.job == "guess":
            outcome = guess(args)
        else:
            source = load_source(args.source)
            outcome = WITHOUT_CANDIDATE.get(args.job, execute)(args, source)
    except SessionmillError as error:
        print(f"{args.job} stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(
            f"{args.job} stopped: interrupted (Ctrl-C). Tables are as their last commits left them; "
            "run the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        return INTERRUPTED
    except Exception as error:
        remedy = next((REMEDIES[words] for words in REMEDIES if words in str(error)), None)
        if remedy is None:
            from jobs.lake.delta_errors import first_line

            if said := first_line(error):
                print(f"{args.job} stopped: {said}", file=sys.stderr, flush=True)
                keep_stack(args)
                return 1
        if remedy is None:
            raise
        print(
            f"{args.job} stopped: {remedy}, and run it again; the published tables are as their "
            f"last commits left them. Lake: {settings().table_root()}. "
            f"{str(error).splitlines()[0][:300]}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    if args.json:
        answer(outcome)
    return 0


def keep_stack(args: argparse.Namespace) -> None:
    """Write the stack of the error that ends the run beside the run's answers, and say where it is; to
    stderr where the lake takes no file."""
    from jobs.lake import filesystem

    context: Context | None = getattr(args, "context", None)
    if context is not None:
        step = getattr(args, "step", "all")
        file = context.lake.folder("_runs", context.batch) + f"/{args.job}.{step}.error.txt"
        with contextlib.suppress(OSError):
            filesystem.write_text(file, traceback.format_exc())
            print(f"The engine's stack is in {file}", file=sys.stderr, flush=True)
            return
    traceback.print_exc()


def guess(args: argparse.Namespace) -> dict[str, Any]:
    from jobs.reading import guess as guessing

    found = guessing.guess(args.file, args.name)
    print(found.text, end="", flush=True)
    return {"source_file": found.text, "usable": found.usable, "looked_at": found.looked_at}


def explain(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    from jobs.ops import explain as explaining

    found = explaining.explain(settings().table_root(), source, args.session)
    print(explaining.in_words(found), flush=True)
    return found


def compare_rules(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    from jobs.silver import compare_rules as silver_compare_rules

    found = silver_compare_rules.compare_rules(opened(args, source))
    print(silver_compare_rules.in_words(found), flush=True)
    return found


def maintain(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    from jobs.lake.context import Result, require_tables
    from jobs.ops import maintain as maintaining
    from jobs.ops import model_registry
    from jobs.pipeline.steps import recorded

    context = opened(args, source)
    require_tables(context)
    pins, registry = model_registry.registry_pins(source.name)
    with recorded(context, "maintain", "all", Result()):
        done = maintaining.maintain(context, args.keep_days, pins)
        kept = maintaining.listed(context)
        done["refits"] = model_registry.remove_old_refits(source.name, args.keep_days, kept)
    done |= {"run_id": context.run_id, "source": source.name, "registry": registry}
    print(maintaining.in_words(source.name, done), flush=True)
    return done


def forget(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    from jobs.forget import forget as forgetting
    from jobs.lake.context import Result, require_tables
    from jobs.pipeline.steps import recorded

    context = opened(args, source)
    require_tables(context)
    with recorded(context, "forget", "all", Result()):
        done = forgetting.forget(context, args.user)
    print(forgetting.in_words(done), flush=True)
    return done


def rules(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    from jobs.recommend import rules as serving_rules

    told = serving_rules.export(opened(args, source))
    print(serving_rules.in_words(told), flush=True)
    return told


WITHOUT_CANDIDATE = {
    "explain": explain,
    "compare-rules": compare_rules,
    "maintain": maintain,
    "forget": forget,
    "rules": rules,
}


def opened(args: argparse.Namespace, source: Source) -> Context:
    """The run's context. Spark is not started yet."""
    from jobs.lake.context import Context, checked_batch
    from jobs.lake.delta import Lake
    from jobs.lake.spark import get_spark

    def spark() -> SparkSession:
        if args.job in AUDITED and getattr(args, "step", "all") in ("audit", "all"):
            # Great Expectations takes 5 to 10 seconds to import: meanwhile the JVM starts. (Not before:
            # a mistake that is found without Spark should not wait for it.)
            threading.Thread(target=importlib.import_module, args=["great_expectations"]).start()
        return get_spark(f"sessionmill {args.job} {source.name}")

    lake = Lake(spark, settings().table_root(), source.name)
    batch = checked_batch(getattr(args, "batch", None))
    explain_plan = getattr(args, "explain_plan", False)
    day = getattr(args, "day", None)
    context = Context(source, lake, day, batch, explain_plan=explain_plan)
    args.context = context
    return context


def execute(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Start Spark, run the job, write down what it did."""
    from jobs.lake.context import require_tables

    context = opened(args, source)
    if args.job in ("validate", *REPLAYS):
        require_tables(context)
    root = settings().table_root()
    if "://" not in root:
        try:
            os.makedirs(root, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"SESSIONMILL_LAKE = {root!r} cannot be made or written: {error.strerror}. Name a folder "
                "that this user may write to, or grant the rights"
            ) from None
    step = getattr(args, "step", "all")
    from jobs.pipeline.steps import run_job

    names = ("rebuild", "reload", "table", "alias", "model_version", "k")
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    began = time.monotonic()
    result = run_job(context, args.job, step, options)
    seconds = time.monotonic() - began
    return told(context, args.job, step, result, seconds)


def left_out(result: Result) -> str:
    """The lines and events that filters left out, for a sentence; empty: none."""
    filtered = ", ".join(f"{count:,} {reason}" for reason, count in result.filtered.items())
    said = f"; filtered: {filtered}" if filtered else ""
    removed = result.events_removed
    return said + (f"; {counted(removed, 'stored event')} removed" if removed else "")


def in_lines(context: Context, job: str, result: Result) -> str:
    """What a job did, a line for each kind of thing that it makes."""
    if job == "validate":
        return f" {counted(len(result.tables_in), 'table')} checked, nothing was changed."
    tables = ", ".join(
        f"{name} version {one['version']} ({counted(one['rows'], 'row')})"
        for name, one in result.tables.items()
    )
    lines = []
    if job in ("run", "ingest", *REPLAYS):
        rejects = ", ".join(f"{count:,} {reason}" for reason, count in result.rejects.items())
        waiting = f", {result.waiting:,} waiting" if result.waiting else ""
        lines.append(
            f"read {counted(result.read, 'line')}, {counted(result.events_new, 'new event')}, "
            f"{result.events_replaced:,} replaced, {counted(result.duplicates, 'duplicate')}, "
            f"rejects: {rejects or 'none'}{waiting}{left_out(result)}."
        )
    if job in ("run", "sessionize", *REPLAYS):
        relinked = f"{result.sessions_relinked:,} relinked, " * (
            context.source.identity is not None
        )
        lines.append(
            f"sessions: {result.sessions_new:,} new, {result.sessions_changed:,} changed, "
            f"{result.sessions_retired:,} retired, {result.sessions_merged:,} merged, "
            f"{relinked}{result.runaways:,} runaway."
        )
    lines.append(f"{tables or 'nothing published'}.")
    return "\n  ".join(["", *lines]) if len(lines) > 1 else f" {lines[0]}"


def told(context: Context, job: str, step: str, result: Result, seconds: float) -> dict[str, Any]:
    """Print what was done, and keep it as JSON beside the lake."""
    from jobs.lake import filesystem

    outcome = {
        "run_id": context.run_id, "batch": context.batch, "job": job, "step": step,
        "source": context.source.name, "day": context.day, **result.counts(),
        "rejects": result.rejects, "filtered": result.filtered, "tables": result.tables, "checks": result.checks,
        "notes": result.notes, "seconds": round(seconds, 1),
    }  # fmt: skip
    if context.explain_plan:
        outcome["plans"] = {name: plan.to_json() for name, plan in context.plans.items()}
    head = f"{job} {context.source.name}" + (f" {context.day}" if context.day else "")
    head += f" [{step}]" if step != "all" else ""
    print(f"{head}:{in_lines(context, job, result)} {seconds:.1f} s.", flush=True)
    mark = "  " if job == "validate" else "note: "  # (what it says of each table is its result)
    for note in result.notes:
        print(f"{mark}{note}", flush=True)
    answer = context.lake.folder("_runs", context.batch) + f"/{job}.{step}.json"
    filesystem.write_text(answer, json.dumps(outcome, default=str))
    if step == "publish":
        # Only now: a publish whose answer was lost must find either its candidate or its answer.
        from jobs.pipeline.steps import MODULES, OTHERS

        context.candidate((MODULES | OTHERS)[job][1]).remove()
    return outcome
