"""What tests of nights under Airflow's own scheduler share."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from deltalake import DeltaTable

from jobs.core.tables import EVENTS, ITEMS, SEQUENCES, SESSIONS, Table

REPO = Path(__file__).resolve().parents[2]

SOURCE = """
[source]
name = "{name}"
landing = "{landing}/{name}/{{day}}/*.csv"
format = "csv"

[columns]
user_id = "user"
item_id = "item"
event_ts = "at"

[time]
unit = "s"

[filters]
min_item_events = 1
"""


def local() -> ModuleType:
    """infra/airflow/local.py, which is a script."""
    file = REPO / "infra" / "airflow" / "local.py"
    spec = importlib.util.spec_from_file_location("sessionmill_local", file)
    assert spec and spec.loader
    if spec.name in sys.modules:
        return sys.modules[spec.name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def last_night() -> datetime:
    """The day of the newest night that is due: its data interval (02:00 to 02:00) has ended."""
    now = datetime.now(UTC) - timedelta(hours=2)
    return now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)


def write_log(folder: Path, night: datetime, users: int, days: int) -> int:
    """Users look at five items in a row, once a day, always the same way round: on `night` and on
    so many days before it, in a file of the night's. One line more lacks its item."""
    place = folder / f"{night:%Y-%m-%d}"
    place.mkdir(parents=True)
    lines = []
    for user in range(users):
        for day in range(days + 1):
            start = night - timedelta(days=day) + timedelta(hours=10, seconds=60 * (user % 300))
            for step in range(5):
                at = int(start.timestamp()) + 60 * step
                lines.append(f"u{user},i{(user + step) % 10},{at}")
    (place / "log.csv").write_text("\n".join(["user,item,at", *lines, "u1,,12"]) + "\n")
    return len(lines) + 1


@dataclass
class Airflow:
    """Servers of a test's own, and what is asked of them."""

    servers: Any
    state: Path
    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def api(self) -> Any:
        return local().Api(self.servers)

    @property
    def lake(self) -> Path:
        return self.folder / "lake"

    def unpause(self, *dags: str) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            known = {dag["dag_id"] for dag in self.api.get("/dags?limit=100")["dags"]}
            if known.issuperset(dags):
                break
            time.sleep(1)
        for dag_id in dags:
            self.api.patch(f"/dags/{dag_id}", {"is_paused": False})

    def runs(self, dag_id: str) -> list[Any]:
        """The DAG's runs, the oldest first."""
        found: list[Any] = self.api.get(f"/dags/{dag_id}/dagRuns?order_by=run_after")["dag_runs"]
        return found

    def tasks(self, dag_id: str, run_id: str) -> dict[tuple[str, int], Any]:
        found = self.api.get(
            f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances?limit=100"
        )["task_instances"]  # fmt: skip
        return {(task["task_id"], task["map_index"]): task for task in found}

    def xcom(self, dag_id: str, run_id: str, task_id: str) -> Any:
        return self.api.get(
            f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}"
            "/xcomEntries/return_value?deserialize=true"
        )["value"]

    def ended(
        self, dag_id: str, patience_s: int, number: int = 0, *, trouble: bool = False
    ) -> tuple[Any, dict[tuple[str, int], Any]]:
        """Wait until a DAG's run (by its number) has ended; the run and its tasks.

        A task that fails is the end of the test, with its log, unless `trouble` is expected.
        """
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            try:
                runs = self.runs(dag_id)
            except TimeoutError:  # a busy machine
                runs = []
            except (OSError, RuntimeError):
                if not trouble:
                    raise
                runs = []  # a server is away
            if len(runs) > number:
                run = runs[number]
                tasks = self.tasks(dag_id, run["dag_run_id"])
                failed = [t for t in tasks.values() if t["state"] in ("failed", "up_for_retry")]
                if failed and not trouble:
                    logs = (self.servers.home / "logs").rglob("attempt=*.log")
                    newest = max(logs, key=os.path.getmtime)
                    pytest.fail(f"{failed[0]['task_id']} failed:\n{newest.read_text()[-6000:]}")
                if run["state"] in ("success", "failed"):
                    return run, tasks
            time.sleep(1)
        pytest.fail(f"run {number} of {dag_id} did not end in {patience_s} s")

    def log(
        self, dag_id: str, run_id: str, task_id: str, attempt: int = 1, map_index: int = -1
    ) -> str:
        """What a task wrote, as the API's JSON."""
        return json.dumps(self.api.get(
            f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/logs/{attempt}"
            f"?map_index={map_index}&full_content=true"
        ))  # fmt: skip

    def clear(self, dag_id: str, run_id: str) -> None:
        """Clear what failed in a run, as a person would."""
        self.api.post(
            f"/dags/{dag_id}/clearTaskInstances",
            {"dry_run": False, "dag_run_id": run_id, "only_failed": True},
        )

    def announce(self, asset: str, version: int) -> datetime:
        """What the task `announce` emits, without a night; when Airflow registered it."""
        known = self.api.get("/assets?limit=100")["assets"]
        [asset_id] = [one["id"] for one in known if one["name"] == asset]
        event = self.api.post(
            "/assets/events", {"asset_id": asset_id, "extra": {"version": version}}
        )
        return datetime.fromisoformat(event["timestamp"])

    def slots(self, pool: str, slots: int) -> None:
        """None holds tasks of that pool back; their runs go on."""
        self.api.patch(f"/pools/{pool}", {"pool": pool, "slots": slots, "include_deferred": False})

    def mark_success(self, dag_id: str, run_id: str) -> None:
        """Mark a run as a success, as a person would; what has not run does not run."""
        self.api.patch(f"/dags/{dag_id}/dagRuns/{quote(run_id)}", {"state": "success"})

    def read_again(self, dag_id: str) -> None:
        """Have the DAG's file read again now."""
        token = self.api.get(f"/dags/{dag_id}")["file_token"]
        self.api.call("PUT", f"/parseDagFile/{quote(token)}")

    def server(self, name: str) -> psutil.Process:
        """One of them, as it was started last.

        Raises:
            psutil.NoSuchProcess: it has ended.
        """
        [*_, pid] = [one["pid"] for one in local().record(self.state) if one["name"] == name]
        return psutil.Process(pid)

    def launch(self, name: str) -> None:
        """Start one server again that was killed."""
        env = local().environment(self.servers) | self.env
        local().launch(self.state, name, local().commands(self.servers)[name], env)

    @contextmanager
    def supervised(self, *names: str) -> Iterator[None]:
        """Whichever of these servers ends meanwhile is started again, as a supervisor would."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(2):
                for name in names:
                    try:
                        ended = self.server(name).status() == psutil.STATUS_ZOMBIE
                    except psutil.NoSuchProcess:
                        ended = True
                    if ended:
                        print(f"{name} ended, and is started again")
                        self.launch(name)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


@contextmanager
def airflow(
    folder: Path, sources: dict[str, str], env: dict[str, str], database: str | None = None
) -> Iterator[Airflow]:
    """Airflow and MLflow with these source files, stopped at the end."""
    (folder / "sources").mkdir()
    for name, text in sources.items():
        (folder / "sources" / f"{name}.toml").write_text(text)
    state = folder / "state"
    env = {
        "SESSIONMILL_SOURCES": str(folder / "sources"), "SESSIONMILL_DRIVER_MEMORY": "1g",
        **local().SHORT_LIVED_JVM, **env,
    }  # fmt: skip
    try:
        servers = local().start(
            state, lake=folder / "lake", airflow_port=local().free_port(),
            mlflow_port=local().free_port(), extra_env=env, database=database,
        )  # fmt: skip
        yield Airflow(servers, state, folder, env)
    finally:
        local().stop(state)
        assert local().processes(state) == []


def rows(lake: Path, source: str, table: Table) -> list[dict[str, Any]]:
    found = DeltaTable(table.path(str(lake), source)).to_pyarrow_table().to_pylist()
    return sorted(found, key=lambda row: json.dumps(row, default=str))


def said(lake: Path, source: str) -> dict[str, Any]:
    """What the tables say, without what a different order of nights may change: which run and
    file an event came by, and the numbers of items."""
    number = {row["item_index"]: row["item_id"] for row in rows(lake, source, ITEMS)}
    told = {"ingest_file", "ingest_ts"}
    return {
        "events": [
            {k: v for k, v in row.items() if k not in told} for row in rows(lake, source, EVENTS)
        ],
        "sessions": rows(lake, source, SESSIONS),
        "sequences": [
            row | {"item_index": [number[at] for at in row["item_index"]]}
            for row in rows(lake, source, SEQUENCES)
        ],
    }


def at_once(there: Airflow, source: str) -> dict[str, Any]:
    """The tables as one calm run makes them from the same files."""
    lake = there.folder / "calm"
    subprocess.run(
        [sys.executable, "-m", "jobs", "run", "--source", f"{there.folder}/sources/{source}.toml"],
        cwd=REPO, env=os.environ | there.env | {"SESSIONMILL_LAKE": str(lake)}, check=True,
    )  # fmt: skip
    return said(lake, source)
