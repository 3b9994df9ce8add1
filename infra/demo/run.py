"""`make demo`: three nights of a real log, run by Airflow's own scheduler, then a table of methods, a
champion, and its lists.

    python infra/demo/run.py

Starts from nothing each time: what an earlier demo left in `.demo/` is ended and removed, so it may
be killed anywhere and run again. Exit status is not 0 when anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "infra" / "airflow"))
import local  # noqa: E402

SOURCE = "completejourney"
HOUSEHOLDS = 825  # of prepare.py
STATE = REPO / ".demo"
LAKE = STATE / "lake"
COUNTS = (
    "events_new", "events_replaced", "duplicates", "sessions_new", "sessions_changed",
    "sessions_retired", "sessions_merged", "runaways",
)  # fmt: skip
console = Console(highlight=False, soft_wrap=True)


class TaskFailed(RuntimeError):
    """A task went red; the message says which, with the end of its log and where to look."""


class Clock:
    """Seconds since the start, and what each phase took."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.phases: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def say(self, text: str, style: str = "") -> None:
        minutes, seconds = divmod(int(self.seconds), 60)
        console.print(Text(f"{minutes:>2}:{seconds:02}  ", "dim") + Text(text, style))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.seconds
        yield
        self.phases[name] = round(self.seconds - before, 1)


class PeakMemory(threading.Thread):
    """Samples what the whole tree of processes holds, pages shared between them counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._over = threading.Event()

    def run(self) -> None:
        me = psutil.Process()  # everything that the demo starts descends from it
        while not self._over.wait(5):
            self.bytes = max(self.bytes, sum(map(self._of, [me, *me.children(recursive=True)])))

    @staticmethod
    def _of(process: psutil.Process) -> int:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            return int(rollup.split("\nPss:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            pass
        try:
            return int(process.memory_info().rss)  # not Linux
        except psutil.Error:
            return 0

    def stop(self) -> float:
        """End sampling; the peak in GiB."""
        self._over.set()
        self.join()
        return round(self.bytes / 2**30, 2)


# -- Airflow -----------------------------------------------------------------------------------


def wait_for_dags(api: local.Api, names: list[str]) -> None:
    """Until the dag-processor has read the DAG files; an import error ends the demo."""
    for _ in range(120):
        known = {dag["dag_id"] for dag in api.get("/dags?limit=100")["dags"]}
        if known.issuperset(names):
            return
        if errors := api.get("/importErrors")["import_errors"]:
            raise TaskFailed("\n".join(error["stack_trace"] for error in errors))
        time.sleep(1)
    raise TaskFailed(f"Airflow does not show {names}: see {STATE}/logs/dag-processor.log")


def task_name(task: dict[str, Any]) -> str:
    label = task.get("rendered_map_index") or (task["map_index"] if task["map_index"] >= 0 else "")
    return f"{task['task_id']} [{label}]" if label != "" else str(task["task_id"])


def failure(api: local.Api, task: dict[str, Any], lines: int = 40) -> str:
    """The end of a failed task's log, and where the rest is."""
    root = f"/dags/{task['dag_id']}/dagRuns/{quote(task['dag_run_id'])}/taskInstances"
    try:
        content = api.get(
            f"{root}/{task['task_id']}/logs/{max(task['try_number'], 1)}"
            f"?map_index={task['map_index']}&full_content=true"
        )["content"]
        log = [entry if isinstance(entry, str) else entry["event"] for entry in content]
    except (RuntimeError, OSError, KeyError) as error:
        log = [f"(its log could not be read: {error})"]
    return "\n".join(
        [
            f"{task['dag_id']}: {task_name(task)} is {task['state']}. The end of its log:",
            *(f"  | {line}" for line in log[-lines:]),
            (
                f"All of it: {STATE}/airflow/logs/dag_id={task['dag_id']}/run_id={task['dag_run_id']}, "
                "or `make up` and the task in Airflow's pages."
            ),
        ]
    )


def follow(api: local.Api, clock: Clock, dag_id: str, run_id: str) -> list[dict[str, Any]]:
    """Wait for a run, telling each task as it ends; returns the tasks.

    Raises:
        TaskFailed: when one failed for good.
    """
    root, told = (
        f"/dags/{dag_id}/dagRuns/{quote(run_id)}",
        set[tuple[str, int, int, str]](),
    )
    heartbeat = time.monotonic()
    with console.status("") as status:
        while True:
            run = api.get(root)
            tasks: list[dict[str, Any]] = api.get(f"{root}/taskInstances?limit=200")[
                "task_instances"
            ]
            tasks.sort(key=lambda task: task["end_date"] or "9999")
            for task in tasks:
                key = (
                    task["task_id"],
                    task["map_index"],
                    task["try_number"],
                    str(task["state"]),
                )
                if key in told:
                    continue
                if task["state"] == "up_for_retry":
                    told.add(key)
                    clock.say(f"  {failure(api, task, 15)}\n  It is tried again.", "yellow")
                elif task["state"] in (
                    "success",
                    "failed",
                    "skipped",
                    "upstream_failed",
                ):
                    told.add(key)
                    seconds, ok = task["duration"] or 0, task["state"] == "success"
                    clock.say(
                        f"  {task_name(task):<34} {seconds:>5.0f} s{'' if ok else '  ' + task['state']}"
                    )
            if run["state"] in ("success", "failed"):
                if bad := [task for task in tasks if task["state"] == "failed"]:
                    raise TaskFailed("\n\n".join(failure(api, task) for task in bad))
                if run["state"] == "failed":
                    raise TaskFailed(f"{dag_id} {run_id} failed without a failed task: {tasks}")
                return tasks
            running = [task_name(task) for task in tasks if task["state"] == "running"]
            status.update(f"       {', '.join(running) or 'waiting for the scheduler'} ...")
            if not console.is_terminal and time.monotonic() - heartbeat > 30:
                heartbeat = time.monotonic()
                clock.say(f"  ... {', '.join(running) or 'waiting for the scheduler'}")
            time.sleep(2)


def unpause(api: local.Api, dag_id: str) -> None:
    api.patch(f"/dags/{dag_id}", {"is_paused": False})


def trigger(api: local.Api, dag_id: str, run_id: str, day: str | None = None) -> str:
    """Ask for a run: of a day (its data interval starts there), or of no day."""
    body: dict[str, Any] = {"dag_run_id": run_id, "logical_date": None}
    if day:
        start = f"{day}T00:00:00Z"
        end = time.strftime("%Y-%m-%dT00:00:00Z", time.gmtime(_epoch(day) + 86_400))
        body |= {
            "logical_date": start,
            "data_interval_start": start,
            "data_interval_end": end,
        }
    api.post(f"/dags/{dag_id}/dagRuns", body)
    return run_id


def _epoch(day: str) -> float:
    from calendar import timegm

    return timegm(time.strptime(day, "%Y-%m-%d"))


def scored(api: local.Api, clock: Clock, dag_id: str) -> dict[str, Any]:
    """Wait until a run has made the champion's lists: `path`, `version` and `rows` of their table.

    The last night's asset has started a run, too: it ends without lists, since there was no champion.
    """
    done: set[str] = set()
    for _ in range(300):
        runs = api.get(f"/dags/{dag_id}/dagRuns?limit=10")["dag_runs"]
        for run in sorted(runs, key=lambda one: one["run_after"]):
            if (run_id := str(run["dag_run_id"])) in done:
                continue
            done.add(run_id)
            tasks = follow(api, clock, dag_id, run_id)
            if any(task["task_id"] == "score" and task["state"] == "success" for task in tasks):
                result = returned(api, dag_id, run_id, "score")
                table: dict[str, Any] = result["tables"]["gold.recommendations"]
                return table
        time.sleep(1)
    raise TaskFailed(f"no run of {dag_id} made lists in five minutes")


def triggered_by_asset(api: local.Api, dag_id: str) -> str:
    for _ in range(120):
        runs = api.get(f"/dags/{dag_id}/dagRuns?limit=10")["dag_runs"]
        for run in runs:
            if run["run_type"] == "asset_triggered":
                return str(run["dag_run_id"])
        time.sleep(1)
    raise TaskFailed(f"the asset gold.sequences/{SOURCE} did not start {dag_id} in two minutes")


def returned(api: local.Api, dag_id: str, run_id: str, task_id: str) -> Any:
    """What a task returned."""
    entry = api.get(
        f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/xcomEntries/return_value"
        "?deserialize=true"
    )
    value = entry["value"]
    return json.loads(value) if isinstance(value, str) else value


# -- what came out -----------------------------------------------------------------------------


def results(run_id: str) -> list[dict[str, Any]]:
    """The JSON results that the jobs of a run left beside the lake, in order."""
    files = sorted(
        (LAKE / SOURCE / "_runs" / run_id).glob("*.json"),
        key=lambda f: f.stat().st_mtime,
    )
    return [
        json.loads(file.read_text())
        for file in files
        if file.name.endswith(("publish.json", "all.json"))
    ]


def night(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of one night, as `semantics` has them."""
    rejects: dict[str, int] = {}
    for result in found:
        for reason, count in result.get("rejects", {}).items():
            rejects[reason] = rejects.get(reason, 0) + count
    summed = {count: sum(result.get(count, 0) for result in found) for count in COUNTS}
    return {
        "name": name,
        "events_in": sum(result.get("read", 0) for result in found),
        **summed,
        "rejects": rejects,
    }


def methods(compared: dict[str, Any], registered: dict[str, Any]) -> list[dict[str, Any]]:
    versions = {entry["method"]: entry["version"] for entry in registered["versions"]}
    keys = (
        "method", "num_params", "num_params_added", "ndcg@10", "ndcg@10_low", "ndcg@10_high",
        "hr@10", "seconds", "mlflow_run_id",
    )  # fmt: skip
    return [
        {key: entry.get(key) for key in keys} | {"model_version": versions.get(entry["method"])}
        for entry in compared["methods"]
    ]


def show_methods(found: list[dict[str, Any]]) -> None:
    # (Narrow enough for a window of 80 columns: a number cut off is none.)
    table = Table(
        title="The next basket, all its items", title_justify="left", box=None,
        padding=(0, 2, 0, 0), pad_edge=False,
    )  # fmt: skip
    for column in (
        "method",
        "NDCG@10",
        "95 % interval",
        "HR@10",
        "params",
        "added",
        "seconds",
    ):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for entry in sorted(found, key=lambda entry: -(entry["ndcg@10"] or 0)):
        table.add_row(
            entry["method"],
            f"{entry['ndcg@10']:.4f}",
            f"{entry['ndcg@10_low']:.3f} to {entry['ndcg@10_high']:.3f}",
            f"{entry['hr@10']:.4f}",
            f"{entry['num_params']:,}",
            f"{entry['num_params_added']:,}",
            f"{entry['seconds']:.0f}",
        )
    console.print(table)


def show_gate(decision: dict[str, Any]) -> None:
    """What the gate said of the winner, with its numbers."""
    from models.selection.gate import in_words

    console.print("The gate to `champion`: " + in_words(decision), markup=False, highlight=False)


def show_night(entry: dict[str, Any]) -> None:
    rejects = ", ".join(f"{count} {reason}" for reason, count in sorted(entry["rejects"].items()))
    console.print(
        f"{entry['name']}: {entry['events_in']:,} lines in, {entry['events_new']:,} new events, "
        f"{entry['duplicates']:,} duplicates, rejected: {rejects or 'none'}. "
        f"Sessions: {entry['sessions_new']:,} opened, {entry['sessions_changed']:,} changed, "
        f"{entry['sessions_merged']:,} merged, {entry['sessions_retired']:,} retired."
    )


# -- the story ---------------------------------------------------------------------------------


def begin(clock: Clock) -> None:
    """Forget an earlier demo."""
    if STATE.exists():
        local.stop(STATE)
        shutil.rmtree(STATE)
        clock.say("removed what an earlier demo left in .demo")
    LAKE.mkdir(parents=True)


def run(clock: Clock) -> dict[str, Any]:
    import prepare

    landing = STATE / "landing"
    begin(clock)
    clock.say(
        f"A grocer's year: every third household ({HOUSEHOLDS}) of the completejourney data, their "
        "baskets as sessions."
    )
    written: list[prepare.Delivery] = []
    writer = threading.Thread(target=lambda: written.extend(prepare.deliveries()))
    with clock.phase("start"):
        clock.say("Starting MLflow and Airflow, and writing the log as files")
        writer.start()
        servers = local.start(
            STATE,
            lake=LAKE,
            extra_env=local.SHORT_LIVED_JVM
            | {"SESSIONMILL_DRIVER_MEMORY": os.environ.get("SESSIONMILL_DRIVER_MEMORY", "2g")},
            say=lambda text: clock.say(f"  {text}"),
        )
        clock.say(f"  Airflow {servers.airflow}   MLflow {servers.mlflow}")
        writer.join()
        api = local.Api(servers)
        daily, train = f"sessions_daily.{SOURCE}", f"train_methods.{SOURCE}"
        load, score = f"load_history.{SOURCE}", f"score_daily.{SOURCE}"
        wait_for_dags(api, [daily, train, load, score])
        unpause(api, load)
        unpause(api, daily)

    nights = []
    for delivery, day in zip(written, [None, *prepare.NIGHTS], strict=True):
        clock.say(f"{delivery.name.capitalize()}: {delivery.words}", "bold")
        with clock.phase(delivery.name):
            delivery.land(landing)
            if day == prepare.NIGHTS[-1]:
                unpause(api, train)  # the last night's asset starts the training
                unpause(api, score)  # and a new champion the lists
            dag, run_id = (daily, f"night-{day}") if day else (load, "history")
            follow(
                api,
                clock,
                dag,
                trigger(api, dag, run_id, day.isoformat() if day else None),
            )
        nights.append(night(delivery.name, results(run_id)))
        show_night(nights[-1])

    clock.say(f"The asset gold.sequences/{SOURCE} starts the training", "bold")
    with clock.phase("training"):
        run_id = triggered_by_asset(api, train)
        follow(api, clock, train, run_id)
    gate = returned(api, train, run_id, "promote")
    lists = None
    if gate["action"] == "promoted":
        clock.say(f"The asset champion/{SOURCE} starts the scoring", "bold")
        with clock.phase("lists"):
            lists = scored(api, clock, score)
    tables: dict[str, Any] = {}
    for name in ("history", *(f"night-{day}" for day in prepare.NIGHTS)):
        for result in results(name):
            tables |= result.get("tables", {})
    return {
        "source": SOURCE,
        "households": HOUSEHOLDS,
        "tables": tables,
        "nights": nights,
        "methods": methods(
            returned(api, train, run_id, "compare"),
            returned(api, train, run_id, "register"),
        ),
        "gate": gate,
        "recommendations": lists,
        "page": str(LAKE / SOURCE / "report.html"),
    }


def terminated(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminated)
    os.chdir(REPO)
    clock, memory = Clock(), PeakMemory()
    memory.start()
    try:
        story = run(clock)
    except (TaskFailed, local.NotHealthy) as error:
        console.print(Text(f"\nThe demo failed.\n{error}", "red"))
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; `make demo` starts again.")
        return 130
    finally:
        if STATE.exists():
            clock.say("stopping Airflow and MLflow")
            quietly(lambda: local.stop(STATE))
    story |= {
        "seconds": round(clock.seconds, 1),
        "phases": clock.phases,
        "peak_memory_gib": memory.stop(),
    }
    (LAKE / "demo.json").write_text(json.dumps(story, indent=1) + "\n")

    console.print()
    show_methods(story["methods"])
    console.print()
    show_gate(story["gate"])
    console.print()
    for entry in story["nights"]:
        show_night(entry)
    if lists := story["recommendations"]:
        console.print(
            f"{lists['rows']} households have a list in gold.recommendations version "
            f"{lists['version']}."
        )
    docs = LAKE / SOURCE / "_quality" / "data_docs" / "index.html"
    console.print(
        f"\nIt took {story['seconds'] / 60:.1f} minutes and at most {story['peak_memory_gib']} GiB.\n"
        f"The lake        {LAKE}\n"
        f"The page        {story['page']}\n"
        f"Data Docs       {docs}\n"
        f"The same as JSON {LAKE / 'demo.json'}\n"
        "Airflow's and MLflow's pages, with these runs and models: `make up`. Forget it all: "
        "`make clean-demo`."
    )
    return 0


def quietly(action: Callable[[], object]) -> None:
    """Do it to the end, whatever key is pressed."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        action()
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
