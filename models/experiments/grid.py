"""Many methods and seeds, one after another, each in a process of its own; stops and goes on.

A cell that MLflow has as finished is not trained again, one that was killed continues from its
checkpoint. A cell that another process trains is waited for: a grid that was killed leaves its last
training running. What came of the grid is a small JSON file: enough to make tables and plots from, with
the command, the commit, the machine and the data version of every number.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.core.environment import code_version, machine
from models.core.errors import UserError
from models.data.sequences import cache_folder
from models.networks.methods import BACKBONES, BASELINES, SESSION_ENCODERS, parse
from models.registry import recipes, tracking
from models.registry.recipes import Key
from models.selection.compare import compare

ENCODED = ("", "+st", "+sse", "+tsa", "+st+sse+tsa")
KEPT = (
    "method", "seed", "num_params", "num_params_added", "params_added_pct", "epochs", "best_epoch",
    "train_s", "eval_s", "events_per_second", "peak_rss_mb", "counts", "by_target", "items",
)  # fmt: skip
METRICS = (
    "ndcg@10", "hr@10", "mrr@10", "recall@10", "recall@20", "first_item_hr@10", "coverage@10",
    "popularity@10", "test_loss",
)  # fmt: skip


def methods_of(words: str, target: str = "next_item") -> list[str]:
    """`all`, or names by comma; a name may be a backbone with `*` for the usual encodings.

    Where whole sessions are asked for, `all` has the next-session models, too, and the next-item
    models that see as much.
    """
    if words == "all":
        names = [*BASELINES, *(f"{name}*" for name in BACKBONES)]
        if target == "next_session":
            names += [*(f"{name}+fb" for name in BACKBONES), *SESSION_ENCODERS]
        words = ",".join(names)
    found: list[str] = []
    for word in (part.strip() for part in words.split(",")):
        wanted = [word[:-1] + end for end in ENCODED] if word.endswith("*") else [word]
        for name in wanted:
            parse(name)
            if name not in found:
                found.append(name)
    return found


@dataclass(frozen=True)
class Cell:
    """One training of a grid."""

    method: str
    seed: int
    variant: str | None = None
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return tracking.display_name(self.method, self.variant)

    @property
    def wanted(self) -> dict[str, str]:
        """Its tags in MLflow."""
        return {"kind": "train", "method": self.name, "seed": str(self.seed)}


def cells_of(
    methods: str, variants: Sequence[str], seeds: Sequence[int], target: str = "next_item"
) -> list[Cell]:
    """Each seed's methods as they are, then with the options of each variant (`NAME:OPTIONS`).

    Baselines have neither seeds nor variants.

    Raises:
        UserError: a variant without a name or options, or named twice.
    """
    told: dict[str, tuple[str, ...]] = {}
    for words in variants:
        name, _, options = (part.strip() for part in words.partition(":"))
        if not name or not options.startswith("--") or name in told or "(" in name:
            raise UserError(
                f"--variant {words!r}: write a new name, a colon, and options of `train`, such as "
                "'alpha .1: --alpha 0.1'"
            )
        told[name] = tuple(shlex.split(options))
    names = methods_of(methods, target)
    trained = [name for name in names if name not in BASELINES]
    cells = []
    for seed in seeds:
        cells += [Cell(name, seed) for name in (names if seed == seeds[0] else trained)]
        cells += [
            Cell(name, seed, variant, options)
            for variant, options in told.items()
            for name in trained
        ]
    return cells


def tuned_cells(source: str, cells: Sequence[Cell], key_of: Callable[[str], Key]) -> list[Cell]:
    """The cells with the newest recipe of each method, by name: all of a comparison take the same.

    Raises:
        UserError: methods without a recipe; nothing has been trained.
    """
    names = dict.fromkeys(one.method for one in cells)
    found = recipes.every(source, [key_of(name) for name in names])
    return [
        one
        if (recipe := found[one.method]) is None
        else replace(one, options=("--tuned", recipe.run_id, *one.options))
        for one in cells
    ]


def grid(
    source: str,
    comparison: str,
    cells: Sequence[Cell],
    options: Sequence[str],
    command: str,
    file: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train what is missing, compare, write `file`. `options` go to every `train` as they are;
    `command` makes the same again.

    Raises:
        UserError: no cell could be trained; one is there that was trained with other options.
    """
    from jobs.core.source_file import load_source

    name = load_source(source).name
    client, experiment = tracking.connect(name)
    failed: list[str] = []
    for number, one in enumerate(cells, 1):
        say(f"[{number}/{len(cells)}] {one.name}, seed {one.seed}")
        if not train_cell(client, experiment, source, comparison, one, options, say):
            failed.append(f"{one.name}, seed {one.seed}")
    outcome = compare(name, comparison, list(dict.fromkeys(one.name for one in cells)))
    outcome["failed"] = failed
    if file is not None:
        rows = [report_of(client, experiment, comparison, one) for one in cells]
        written = {
            **head("grid", command),
            "comparison": outcome,
            "cells": [row for row in rows if row],
        }
        keep(file, written, say)
    if len(failed) == len(cells):
        raise UserError(f"no cell of the grid could be trained: {', '.join(failed)}")
    return outcome


def train_cell(
    client: Any,
    experiment: str,
    source: str,
    comparison: str,
    cell: Cell,
    options: Sequence[str],
    say: Callable[[str], None],
) -> bool:
    """Train one cell in a process of its own, unless MLflow has it as finished: is it there now?

    Raises:
        UserError: it is there, and was trained with other options.
    """
    with _alone(_lock_of(source, comparison, cell), say) as lock:
        if _there(client, experiment, comparison, cell, asked_of(cell, options)):
            say("  there already")
            return True
        words = [
            "train", "--source", source, "--method", cell.method, "--seed", str(cell.seed),
            "--comparison", comparison, *options,
            *(["--variant", cell.variant] if cell.variant else []), *cell.options,
        ]  # fmt: skip
        began = time.monotonic()
        # The training has the lock, too: it may live longer than we do.
        status = in_a_process(words, pass_fds=(lock,))
    say(f"  {time.monotonic() - began:.0f} s")
    return status == 0


def in_a_process(
    words: Sequence[str], patience_s: float = 10.0, pass_fds: Sequence[int] = ()
) -> int:
    """Run a command of ours in a process of its own; its exit status.

    Args:
        pass_fds: descriptors that it inherits.

    Raises:
        KeyboardInterrupt: by Ctrl-C, which reaches that process as well: it has ended, so that what it
            recorded is whole.
    """
    command = [sys.executable, "-m", "models", *words]
    with subprocess.Popen(command, pass_fds=pass_fds) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:  # (the signal was for this process alone)
                process.send_signal(signal.SIGINT)
                process.wait()
            raise
    if status in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    return status


def _there(client: Any, experiment: str, comparison: str, cell: Cell, asked: str) -> bool:
    """Whether MLflow has the cell as finished."""
    there = tracking.runs(client, experiment, comparison=comparison, **cell.wanted)
    if there:
        trained_by = there[0].data.tags.get(tracking.ASKED_FOR, asked)
        if trained_by != asked:
            raise UserError(
                f"{cell.name}, seed {cell.seed}, is already in comparison {comparison}, trained with "
                f"{trained_by}. You gave {asked}: name another --comparison"
            )
    return bool(there)


def _lock_of(source: str, comparison: str, cell: Cell) -> Path:
    """A file that whoever trains the cell has locked."""
    from jobs.core.settings import settings
    from jobs.core.source_file import load_source

    name = hashlib.sha256(json.dumps([comparison, cell.name, cell.seed]).encode()).hexdigest()[:16]
    folder = cache_folder(settings().table_root(), load_source(source).name)
    return folder / "cells" / f"{name}.lock"


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """The locked file's descriptor, as soon as no other process has it. A process that inherits the
    descriptor has the lock, too, until it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("  another process trains it: waiting until it ends")
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                current = False
            if not current:
                continue  # who had it before us removed the file: another one may be locked by now
            try:
                yield file.fileno()
            finally:
                path.unlink(missing_ok=True)
            return


def asked_of(cell: Cell, options: Sequence[str]) -> str:
    """By what options a cell is trained, with those of every cell: equal for all of its seeds."""
    from models.training.options import asked_for, train_parser

    words = ["--source", "", "--method", cell.method, *options, *cell.options]
    return asked_for(train_parser().parse_args(words))


def head(kind: str, command: str) -> dict[str, Any]:
    """How a results file begins: what it is, and by which command, code and machine it was made."""
    return {
        "kind": kind,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": code_version(),
        "machine": machine(),
    }


def keep(file: Path, written: dict[str, Any], say: Callable[[str], None]) -> None:
    """The results file, complete or not at all."""
    from jobs.core.json_output import finite

    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".writing")
    aside.write_text(
        json.dumps(finite(written), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    aside.rename(file)
    say(f"wrote {file}")


def report_of(client: Any, experiment: str, comparison: str, cell: Cell) -> dict[str, Any] | None:
    """What one finished training reported, cut down to what tables need."""
    found = tracking.runs(client, experiment, comparison=comparison, **cell.wanted)
    if not found:
        return None
    run = found[0]
    with tracking.downloaded(client, run.info.run_id, "evaluation/result.json") as file:
        values = tracking.read_json(file)
    report = values["report"]
    row = {name: report[name] for name in KEPT}
    row["metrics"] = {m: report["metrics"][m] for m in METRICS if m in report["metrics"]}
    row["by_target"] = {
        kind: {"counts": part["counts"], "ndcg@10": part["metrics"]["ndcg@10"]}
        for kind, part in report["by_target"].items()
    }
    if "by_age" in report:
        row["by_night"] = report["by_night"]
        row["by_age"] = {
            age: {"counts": part["counts"], "ndcg@10": part["metrics"].get("ndcg@10")}
            for age, part in report["by_age"].items()
        }
    row["training_events"] = list(report["filters"].values())[-1]["events"]
    row["commit"] = run.data.tags.get("mlflow.source.git.commit")
    row["table_version"], row["cut"] = report["table_version"], report["cut"]
    return row


def command_line(
    command: str,
    source: str,
    comparison: str,
    options: Sequence[str],
    **given: str | bool | Sequence[str],
) -> str:
    """The command that makes the file again."""
    words = [
        f"python -m models {command}",
        f"--source {source}",
        f"--comparison {comparison}",
        *(
            f"--{name} {shlex.quote(one)}"
            for name, value in given.items()
            if not isinstance(value, bool)
            for one in ([value] if isinstance(value, str) else value)
        ),
        *(f"--{name}" for name, value in given.items() if value is True),
        *(["--", *options] if options else []),
    ]
    return " ".join(words)
