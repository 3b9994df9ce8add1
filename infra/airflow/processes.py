"""The processes of a state folder: started, remembered, found again, ended.

Process ids are kept in the folder with the time at which each was born, so that a number which
another program has by now is not mistaken; orphans are known by the AIRFLOW_HOME they were started
with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[2]
DATABASE = "postgres"  # the server that the others need until their end


def write(file: Path, text: str, mode: int = 0o644) -> None:
    """A file, complete or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as out:
        out.write(text)
    partial.rename(file)


def record(state: Path) -> list[dict[str, Any]]:
    file = state / "pids.json"
    return json.loads(file.read_text()) if file.exists() else []


def remember(state: Path, name: str, pid: int) -> None:
    entry = {"name": name, "pid": pid, "created": psutil.Process(pid).create_time()}
    write(state / "pids.json", json.dumps([*record(state), entry], indent=1))


def launch(state: Path, name: str, command: list[str], env: dict[str, str], **others: Any) -> None:
    """Start a server that outlives us; its output goes to `logs/<name>.log`."""
    (state / "logs").mkdir(parents=True, exist_ok=True)
    with open(state / "logs" / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            **{"env": env, "cwd": REPO, **others},
        )  # fmt: skip
    remember(state, name, process.pid)


def processes(state: Path) -> list[psutil.Process]:
    """Every process that belongs to a state folder: those we started, their descendants, and
    orphans, known by the AIRFLOW_HOME that they were started with."""
    found: dict[int, psutil.Process] = {}
    for entry in record(state):
        try:
            process = psutil.Process(entry["pid"])
            if abs(process.create_time() - entry["created"]) < 1:
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
        except psutil.Error:
            continue
    home = str(state.resolve() / "airflow")
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            if process.pid not in spared and process.environ().get("AIRFLOW_HOME") == home:
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
        except psutil.Error:
            continue
    return [process for pid, process in found.items() if pid not in spared]


def stop(state: Path, patience_s: float = 15) -> int:
    """End every process of a state folder, its database last; returns how many there were."""
    known = {entry["pid"] for entry in record(state) if entry["name"] == DATABASE}
    doomed = processes(state)
    base = [process for process in doomed if process.pid in known]
    below = {one.pid for process in base for one in _children(process)}  # end with their parent
    others = [process for process in doomed if process.pid not in known | below]
    for these, how in ((others, signal.SIGTERM), (base, signal.SIGINT)):
        for process in these:
            with _ignore_gone():
                process.send_signal(how)
        _, alive = psutil.wait_procs(these, timeout=patience_s)
        left = [one for one in processes(state) if these is base or one.pid not in known | below]
        for process in {*alive, *left}:
            with _ignore_gone():
                process.kill()
        psutil.wait_procs(alive, timeout=5)
    (state / "pids.json").unlink(missing_ok=True)
    return len(doomed)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with _ignore_gone():
        return list(process.children(recursive=True))
    return []


@contextmanager
def _ignore_gone() -> Iterator[None]:
    try:
        yield
    except psutil.Error:
        return


def log_tail(state: Path, name: str, lines: int = 25) -> str:
    """The end of a server's log."""
    file = state / "logs" / f"{name}.log"
    text = file.read_text(errors="replace").splitlines() if file.exists() else []
    return "\n".join(text[-lines:])


def dead(state: Path) -> str | None:
    """The name of a server that was started and is no more."""
    for entry in record(state):
        try:
            if psutil.Process(entry["pid"]).status() != psutil.STATUS_ZOMBIE:
                continue
        except psutil.NoSuchProcess:
            pass
        return str(entry["name"])
    return None
