"""A night and its training, once, by Airflow's own scheduler, on a tiny log; asset included."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import psutil
import pytest

REPO = Path(__file__).resolve().parents[1]
USERS, DAYS_BEFORE = 30, 12

SOURCE = """
[source]
name = "tiny"
landing = "{landing}/{{day}}/*.csv"
format = "csv"

[columns]
user_id = "user"
item_id = "item"
event_ts = "at"

[time]
unit = "s"

[filters]
min_item_events = 1

[training]
methods = ["pop", "personal_top"]

[schedule]
start = {night}
"""


def _local() -> ModuleType:
    file = REPO / "infra" / "airflow" / "local.py"
    spec = importlib.util.spec_from_file_location("sessionmill_local", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def last_night() -> datetime:
    """The day of the newest night that is due: its data interval (02:00 to 02:00) has ended."""
    now = datetime.now(UTC) - timedelta(hours=2)
    return now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)


def write_log(landing: Path, night: datetime) -> int:
    """Thirty users; each looks at five items in a row, once a day, always the same way round."""
    folder = landing / f"{night:%Y-%m-%d}"
    folder.mkdir(parents=True)
    lines = []
    for user in range(USERS):
        for day in range(DAYS_BEFORE + 1):
            start = night - timedelta(days=day) + timedelta(hours=10, minutes=user)
            for step in range(5):
                at = int(start.timestamp()) + 60 * step
                lines.append(f"u{user},i{(user + step) % 10},{at}")
    (folder / "log.csv").write_text("\n".join(["user,item,at", *lines, "u1,,12"]) + "\n")
    return len(lines) + 1


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("night")
    night = last_night()
    lines = write_log(folder / "landing", night)
    (folder / "sources").mkdir()
    (folder / "sources" / "tiny.toml").write_text(
        SOURCE.format(landing=folder / "landing", night=f"{night:%Y-%m-%d}")
    )
    local = _local()
    state = folder / "state"
    settings = {
        "SESSIONMILL_SOURCES": str(folder / "sources"),
        "SESSIONMILL_DRIVER_MEMORY": "1g",
        **local.SHORT_LIVED_JVM,
    }
    try:
        servers = local.start(
            state, lake=folder / "lake", airflow_port=local.free_port(),
            mlflow_port=local.free_port(), extra_env=settings,
        )  # fmt: skip
        yield {
            "api": local.Api(servers), "servers": servers, "state": state, "lines": lines,
            "night": night, "lake": folder / "lake",
        }  # fmt: skip
    finally:
        local.stop(state)
        assert local.processes(state) == []


def the_run_of(airflow: dict[str, Any], dag_id: str, patience_s: int) -> tuple[Any, Any]:
    """Wait until the one run of a DAG has ended; the run and its tasks."""
    api, until = airflow["api"], time.monotonic() + patience_s
    while time.monotonic() < until:
        runs = api.get(f"/dags/{dag_id}/dagRuns")["dag_runs"]
        if runs:
            root = f"/dags/{dag_id}/dagRuns/{quote(runs[0]['dag_run_id'])}"
            tasks = api.get(f"{root}/taskInstances?limit=100")["task_instances"]
            trouble = [t for t in tasks if t["state"] in ("failed", "up_for_retry")]
            if trouble:
                logs = airflow["servers"].home / "logs"
                newest = max(logs.rglob("attempt=*.log"), key=os.path.getmtime)
                pytest.fail(f"{trouble[0]['task_id']} failed:\n{newest.read_text()[-6000:]}")
            if runs[0]["state"] in ("success", "failed"):
                assert len(runs) == 1
                return runs[0], {(t["task_id"], t["map_index"]): t for t in tasks}
        time.sleep(1)
    pytest.fail(f"{dag_id} did not end in {patience_s} s")


def test_the_scheduler_runs_a_night_and_the_asset_starts_the_training(
    airflow: dict[str, Any],
) -> None:
    api, night = airflow["api"], airflow["night"]
    deadline = time.monotonic() + 60
    while len(api.get("/dags")["dags"]) < 3 and time.monotonic() < deadline:
        time.sleep(1)
    for dag_id in ("train_methods.tiny", "sessions_daily.tiny"):
        api.patch(f"/dags/{dag_id}", {"is_paused": False})

    # Nobody asked for the night: catching up from `schedule.start`, the scheduler did.
    run, tasks = the_run_of(airflow, "sessions_daily.tiny", 1200)
    assert run["state"] == "success" and run["run_type"] == "scheduled"
    assert run["data_interval_start"].startswith(f"{night:%Y-%m-%d}")
    assert all(task["state"] == "success" for task in tasks.values())
    assert len(tasks) == 11

    # The asset, and nothing else, started the training: on the version that it named.
    run, tasks = the_run_of(airflow, "train_methods.tiny", 600)
    assert run["state"] == "success" and run["run_type"] == "asset_triggered"
    # (Only now: Airflow 3.3.2 answers 500 while a run that the event created has not started.)
    [event] = api.get("/assets/events")["asset_events"]
    version = event["extra"]["version"]
    assert event["extra"]["rows"] == USERS
    assert {tasks["train", n]["rendered_map_index"] for n in (0, 1)} == {
        "pop, seed 1", "personal_top, seed 1",
    }  # fmt: skip
    for n in (0, 1):
        arguments = tasks["train", n]["rendered_fields"]["arguments"]
        assert str(arguments[arguments.index("--table-version") + 1]) == str(version)
    registered = api.get(
        f"/dags/train_methods.tiny/dagRuns/{quote(run['dag_run_id'])}/taskInstances/register"
        "/xcomEntries/return_value?deserialize=true"
    )["value"]
    versions = {entry["method"]: entry["version"] for entry in registered["versions"]}
    assert set(versions) == {"pop", "personal_top"} and all(versions.values())

    listening = {
        connection.laddr.ip
        for process in _local().processes(airflow["state"])
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}


def _command(process: psutil.Process) -> str:
    """Its command line; empty where it has ended, reaped by its parent or not yet."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def test_workers_of_a_scheduler_that_was_killed_are_found_and_stopped(
    airflow: dict[str, Any],
) -> None:
    local, state = _local(), airflow["state"]
    [scheduler] = [entry["pid"] for entry in local._record(state) if entry["name"] == "scheduler"]
    workers = [
        process
        for process in psutil.Process(scheduler).children(recursive=True)
        if _command(process).startswith("airflow worker")
    ]
    assert workers
    psutil.Process(scheduler).kill()
    psutil.Process(scheduler).wait(10)
    local.stop(state)
    for process in workers:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
