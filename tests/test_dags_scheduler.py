"""A night, its training, its gate and its lists, once, by Airflow's own scheduler, on a tiny log;
assets, deadline and webhook included. Another source's night has no files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from deltalake import DeltaTable

from jobs.tables import RECOMMENDATIONS
from tests.airflow_tools import SOURCE, Airflow, airflow, last_night, local, write_log
from tests.webhook import webhook

USERS, DAYS_BEFORE = 30, 12
TINY = """
[training]
methods = ["pop", "gru4rec"]

[gate]
min_users = 20
max_latency_ms = 2000  # other tests run beside it

[schedule]
start = {night}
deadline_hours = 0.004
"""
ABSENT = """
[schedule]
start = {night}
wait_hours = 0.01
"""


@pytest.fixture(scope="module")
def heard() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with webhook() as (url, messages):
        yield url, messages


@pytest.fixture(scope="module")
def mill(
    tmp_path_factory: pytest.TempPathFactory, heard: tuple[str, list[dict[str, Any]]]
) -> Iterator[tuple[Airflow, datetime]]:
    folder, night = tmp_path_factory.mktemp("night"), last_night()
    write_log(folder / "landing" / "tiny", night, USERS, DAYS_BEFORE)
    sources = {
        name: (SOURCE.format(name=name, landing=folder / "landing"))
        + more.format(night=f"{night:%Y-%m-%d}")
        for name, more in (("tiny", TINY), ("absent", ABSENT))
    }
    with airflow(folder, sources, {"SESSIONMILL_NOTIFY_URL": heard[0]}) as there:
        yield there, night


def test_the_scheduler_runs_a_night_and_assets_start_what_follows(
    mill: tuple[Airflow, datetime], heard: tuple[str, list[dict[str, Any]]]
) -> None:
    there, night = mill
    there.unpause(
        "score_daily.tiny", "train_methods.tiny", "sessions_daily.tiny", "sessions_daily.absent"
    )

    # Nobody asked for the night: catching up from `schedule.start`, the scheduler did.
    run, tasks = there.ended("sessions_daily.tiny", 1200)
    assert run["state"] == "success" and run["run_type"] == "scheduled"
    assert run["data_interval_start"].startswith(f"{night:%Y-%m-%d}")
    assert all(task["state"] == "success" for task in tasks.values())
    assert len(tasks) == 13

    # The asset, and nothing else, started the training: on the version that it named.
    run, tasks = there.ended("train_methods.tiny", 600)
    assert run["state"] == "success" and run["run_type"] == "asset_triggered"
    assert {tasks["train", n]["rendered_map_index"] for n in (0, 1)} == {
        "pop, seed 1", "gru4rec, seed 1",
    }  # fmt: skip
    trained_on = {
        str(arguments[arguments.index("--table-version") + 1])
        for arguments in (tasks["train", n]["rendered_fields"]["arguments"] for n in (0, 1))
    }
    registered = there.xcom("train_methods.tiny", run["dag_run_id"], "register")
    versions = {entry["method"]: entry["version"] for entry in registered["versions"]}
    assert set(versions) == {"pop", "gru4rec"} and all(versions.values())

    # The page is a click away from the run.
    links = there.api.get(
        f"/dags/train_methods.tiny/dagRuns/{quote(run['dag_run_id'])}/taskInstances/report/links"
    )["extra_links"]
    page = there.xcom("train_methods.tiny", run["dag_run_id"], "report")
    assert links == {"The report": page["url"]} and page["mlflow_run_id"] in page["url"]
    assert (there.lake / "tiny" / "report.html").read_text().startswith("<!doctype html>")

    # Always the same way round: who knows the last item knows the next, so the gate opens, and
    # the champion's lists are there. The night had asked for lists, too, when nobody was champion.
    decision = there.xcom("train_methods.tiny", run["dag_run_id"], "promote")
    assert decision["action"] == "promoted", json.dumps(decision, indent=1)
    assert str(decision["challenger"]) == str(versions["gru4rec"])
    first, tasks = there.ended("score_daily.tiny", 300)
    assert first["state"] == "success" and tasks["score", -1]["state"] == "skipped"
    run, tasks = there.ended("score_daily.tiny", 300, number=1)
    assert run["state"] == "success" and run["run_type"] == "asset_triggered"
    assert tasks["score", -1]["state"] == "success"
    lists = DeltaTable(RECOMMENDATIONS.path(str(there.lake), "tiny")).to_pyarrow_table()
    assert sorted(lists["user_id"].to_pylist()) == sorted(f"u{user}" for user in range(USERS))
    assert set(lists["model_version"].to_pylist()) == {str(versions["gru4rec"])}

    # (Only now: Airflow 3.3.2 answers 500 while a run that an event created has not started.)
    events = there.api.get("/assets/events?order_by=timestamp")["asset_events"]
    assert [event["name"] for event in events] == ["gold.sequences/tiny", "champion/tiny"]
    assert trained_on == {str(events[0]["extra"]["version"])}
    assert events[0]["extra"]["rows"] == USERS

    # A source whose files have not come fails alone, and in words; a late run is told while it
    # goes on.
    run, tasks = there.ended("sessions_daily.absent", 300, trouble=True)
    assert run["state"] == "failed"
    assert {task["state"] for task in tasks.values()} == {"failed", "upstream_failed"}
    told = {message["kind"]: message for message in heard[1]}
    assert len(heard[1]) == 2 and set(told) == {"task failed", "run late"}
    failed, late = told["task failed"], told["run late"]
    assert (failed["dag_id"], failed["task_id"]) == ("sessions_daily.absent", "arrived")
    assert failed["run_id"] == run["dag_run_id"] and failed["source"] == "absent"
    pattern = f"{there.folder}/landing/absent/{night:%Y-%m-%d}/*.csv"
    assert (
        f"no file matches {pattern}" in failed["text"] and "mark it as a success" in failed["text"]
    )
    assert "/dags/sessions_daily.absent/" in failed["log_url"]
    assert late["dag_id"] == "sessions_daily.tiny" and "0.004 hours" in late["text"]

    listening = {
        connection.laddr.ip
        for process in local().processes(there.state)
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}

    # What every message advises: clear it. (With Airflow's own reference for deadlines: 500.)
    place = there.folder / "landing" / "absent" / f"{night:%Y-%m-%d}"
    place.mkdir(parents=True)
    (place / "log.csv").write_text("user,item,at\n")
    there.clear("sessions_daily.absent", run["dag_run_id"])
    deadline = time.monotonic() + 120
    while (
        there.tasks("sessions_daily.absent", run["dag_run_id"])["arrived", -1]["state"] != "success"
    ):
        assert time.monotonic() < deadline
        time.sleep(1)


def _command(process: psutil.Process) -> str:
    """Its command line; empty where it has ended, reaped by its parent or not yet."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def test_workers_of_a_scheduler_that_was_killed_are_found_and_stopped(
    mill: tuple[Airflow, datetime],
) -> None:
    there, _ = mill
    scheduler = there.server("scheduler")
    workers = [
        process
        for process in scheduler.children(recursive=True)
        if _command(process).startswith("airflow worker")
    ]
    assert workers
    scheduler.kill()
    scheduler.wait(10)
    local().stop(there.state)
    for process in workers:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
