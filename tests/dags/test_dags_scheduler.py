"""A night, its training, its gate and its lists, once, by Airflow's own scheduler, on a tiny log;
assets, deadline and webhook included. Another source's night has no files. A third source has
announcements without nights: Airflow's edges. The clock of scheduler and tasks is New York's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from deltalake import DeltaTable

from jobs.core.tables import RECOMMENDATIONS, SEQUENCES
from tests.support.airflow_tools import REPO, SOURCE, Airflow, airflow, last_night, local, write_log
from tests.support.webhook import webhook

USERS, DAYS_BEFORE = 30, 12
TINY = """
[training]
nightly = true
methods = ["pop", "gru4rec"]
split = "temporal"

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
EDGES = """
[training]
nightly = true
methods = ["pop"]
split = "temporal"

[schedule]
cron = "never"
"""
# The dag-processor misses a DAG after seconds; files are read again when a test asks for it.
ENV = {
    "AIRFLOW__DAG_PROCESSOR__STALE_DAG_THRESHOLD": "10",
    "AIRFLOW__DAG_PROCESSOR__PARSING_CLEANUP_INTERVAL": "2",
    "TZ": "America/New_York",
}


# One scheduler for all, and each test goes on where the last one ended: `make test-long` gives such
# a file to one process.
pytestmark = pytest.mark.in_order


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
        for name, more in (("tiny", TINY), ("absent", ABSENT), ("edges", EDGES))
    }
    with airflow(folder, sources, ENV | {"SESSIONMILL_NOTIFY_URL": heard[0]}) as there:
        yield there, night


def until(found: Callable[[], Any], patience_s: int) -> Any:
    deadline = time.monotonic() + patience_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain"
        time.sleep(1)
    return value


@pytest.mark.long
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
    assert len(tasks) == 14
    arguments = tasks["events.compute", -1]["rendered_fields"]["application_args"]
    assert arguments[arguments.index("--day") + 1] == f"{night:%Y-%m-%d}"

    # Last Sunday's training, when there was no table yet. Then the asset, and nothing else,
    # started the training: on the version that it named.
    run, tasks = there.ended("train_methods.tiny", 300)
    assert run["run_type"] == "scheduled" and tasks["plan", -1]["state"] == "skipped"
    run, tasks = there.ended("train_methods.tiny", 600, number=1)
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
    assert {task["state"] for task in tasks.values()} == {"success"}
    assert "No lists yet" not in (there.lake / "tiny" / "report.html").read_text()
    lists = DeltaTable(RECOMMENDATIONS.path(str(there.lake), "tiny")).to_pyarrow_table()
    assert sorted(lists["user_id"].to_pylist()) == sorted(f"u{user}" for user in range(USERS))
    refit = there.xcom("score_daily.tiny", run["dag_run_id"], "refit")
    assert str(refit["refit_of"]) == str(versions["gru4rec"])
    assert set(lists["model_version"].to_pylist()) == {str(refit["version"])}

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


@pytest.mark.long
def test_a_source_that_is_tuned_trains_by_its_recipes(mill: tuple[Airflow, datetime]) -> None:
    there, _ = mill
    dag_id, file = "train_methods.tiny", there.folder / "sources" / "tiny.toml"
    file.write_text(file.read_text().replace("[training]\n", "[training]\ntuned = true\n"))

    def has_recipes() -> bool:
        there.read_again(dag_id)
        time.sleep(2)
        tasks = there.api.get(f"/dags/{dag_id}/tasks")["tasks"]
        return "recipes" in {one["task_id"] for one in tasks}

    until(has_recipes, 300)
    number = len(there.runs(dag_id))
    there.api.post(f"/dags/{dag_id}/dagRuns", {"dag_run_id": "tuned", "logical_date": None})
    run, tasks = there.ended(dag_id, 300, number=number, trouble=True)
    assert run["state"] == tasks["recipes", -1]["state"] == "failed"
    assert {task["state"] for key, task in tasks.items() if key[0] == "train"} == {
        "upstream_failed"
    }

    # Its log names the command, which is typed here; `pop` has no setting that is tuned.
    log = there.log(dag_id, "tuned", "recipes")
    found = set(re.findall(r"python -m models tune(?: --[a-z-]+ [^\s\"\\;,]+)+", log))
    [command] = {one for one in found if "--method" in one}
    assert "--method gru4rec" in command
    _, *words = command.split()
    env = local().environment(there.servers) | there.env
    short = ["--trials", "1", "--minutes", "2", "--epochs", "2", "--json"]
    done = subprocess.run(
        [sys.executable, *words, *short], cwd=REPO, env=env, check=True, stdout=subprocess.PIPE
    )
    recipe = json.loads(done.stdout.splitlines()[-1])["mlflow_run_id"]

    there.clear(dag_id, "tuned")
    until(lambda: there.runs(dag_id)[number]["state"] in ("queued", "running"), 60)
    run, tasks = there.ended(dag_id, 600, number=number)
    assert run["state"] == tasks["recipes", -1]["state"] == "success"
    trained = [tasks["train", at]["rendered_fields"]["arguments"] for at in (0, 1)]
    by_method = {one[one.index("--method") + 1]: one for one in trained}
    assert by_method["gru4rec"][-2:] == ["--tuned", recipe] and "--tuned" not in by_method["pop"]


SEQUENCES_OF_EDGES = "gold.sequences/edges"
TRAIN, SCORE = "train_methods.edges", "score_daily.edges"


def all_ended(there: Airflow, dag_id: str) -> list[Any] | None:
    runs = there.runs(dag_id)
    return runs if all(run["state"] in ("success", "failed") for run in runs) else None


def planned(there: Airflow, number: int) -> str:
    """The version that a run of the training is for, once it was planned. (There is no table to
    train on: the tests mark the run as a success.)"""

    def plan() -> Any:
        runs = there.runs(TRAIN)
        if len(runs) <= number:
            return None
        task = there.tasks(TRAIN, runs[number]["dag_run_id"]).get(("plan", -1))
        assert not task or task["state"] not in ("failed", "up_for_retry", "skipped")
        return task and task["state"] == "success" and runs[number]

    run = until(plan, 300)
    [arguments] = there.xcom(TRAIN, run["dag_run_id"], "plan")
    return str(arguments[arguments.index("--table-version") + 1])


@pytest.mark.long
def test_what_is_announced_while_a_run_is_active_or_within_a_second_is_not_lost(
    mill: tuple[Airflow, datetime],
) -> None:
    there, _ = mill
    there.slots("gpu", 0)  # a training that lasts
    there.unpause(TRAIN, SCORE)
    there.ended(TRAIN, 300)  # last Sunday's: there is no table
    there.announce(SEQUENCES_OF_EDGES, 3)
    assert planned(there, 1) == "3"

    # Airflow 3.3.2 gives the next run the first of these events alone.
    for version in (4, 6, 5):
        last = there.announce(SEQUENCES_OF_EDGES, version)
    time.sleep(3)
    assert len(there.runs(TRAIN)) == 2  # one at a time
    there.mark_success(TRAIN, there.runs(TRAIN)[1]["dag_run_id"])
    assert planned(there, 2) == "6"
    there.mark_success(TRAIN, there.runs(TRAIN)[2]["dag_run_id"])

    # Lists are of the newest sequences: a run must begin after the last announcement.
    def scored() -> Any:
        runs = all_ended(there, SCORE)
        return runs and datetime.fromisoformat(runs[-1]["start_date"]) > last and runs

    runs = until(scored, 300)
    assert {run["state"] for run in runs} == {"success"}
    assert len(until(lambda: all_ended(there, TRAIN), 300)) == 3


@pytest.mark.long
def test_tables_are_announced_while_a_training_waits_to_run_again(
    mill: tuple[Airflow, datetime],
) -> None:
    there, _ = mill
    there.announce(SEQUENCES_OF_EDGES, 7)
    assert planned(there, 3) == "7"
    seventh = there.runs(TRAIN)[3]["dag_run_id"]
    there.mark_success(TRAIN, seventh)
    there.api.post(
        f"/dags/{TRAIN}/dagRuns",
        {"dag_run_id": "by-hand", "logical_date": None, "conf": {"table_version": 2}},
    )
    assert planned(there, 4) == "2"
    there.api.post(
        f"/dags/{TRAIN}/clearTaskInstances",
        {"dry_run": False, "dag_run_id": seventh, "only_failed": False},
    )
    # It waits for the one by hand, without a start: Airflow 3.3.2 cannot list the asset's events.
    waiting = {run["dag_run_id"]: run for run in there.runs(TRAIN)}[seventh]
    assert waiting["state"] == "queued" and waiting["start_date"] is None
    with pytest.raises(RuntimeError, match="500"):
        there.api.get("/assets/events")

    # The task `announce` itself, after a history that Spark need not load.
    load, result = "load_history.edges", there.lake / "edges" / "_runs" / "history"
    result.mkdir(parents=True)
    table = {"version": 8, "rows": 1, "path": "gold/sequences"}
    (result / "run.all.json").write_text(json.dumps({"tables": {SEQUENCES.full_name: table}}))
    there.slots("spark", 0)
    there.api.post(f"/dags/{load}/dagRuns", {"dag_run_id": "history", "logical_date": None})
    there.unpause(load)
    until(lambda: there.runs(load)[0]["state"] == "running", 300)
    there.api.patch(f"/dags/{load}/dagRuns/history/taskInstances/run", {"new_state": "success"})
    there.slots("spark", 2)
    run, tasks = there.ended(load, 300)
    assert run["state"] == tasks["announce", -1]["state"] == "success"

    # What was cleared is planned anew: on the newest that was announced since.
    there.mark_success(TRAIN, "by-hand")
    for number in (3, 5):
        until(lambda number=number: planned(there, number) == "8", 300)  # type: ignore[misc]
        there.mark_success(TRAIN, there.runs(TRAIN)[number]["dag_run_id"])


@pytest.mark.long
def test_a_source_file_that_is_broken_and_mended_loses_no_announcement(
    mill: tuple[Airflow, datetime],
) -> None:
    there, _ = mill
    there.slots("gpu", 0)
    there.unpause(TRAIN, SCORE)
    there.ended(TRAIN, 300)  # last Sunday's: there is no table
    until(lambda: all_ended(there, TRAIN), 300)
    file = there.folder / "sources" / "edges.toml"
    right = file.read_text()

    def stale(*, wanted: bool) -> bool:
        for dag_id in (TRAIN, SCORE):
            there.read_again(dag_id)
        time.sleep(2)
        return all(there.api.get(f"/dags/{one}")["is_stale"] is wanted for one in (TRAIN, SCORE))

    file.write_text(right.replace("user_id =", "user ="))
    until(lambda: stale(wanted=True), 300)
    there.announce(SEQUENCES_OF_EDGES, 9)
    scored, trained = len(there.runs(SCORE)), len(there.runs(TRAIN))
    time.sleep(3)
    assert (len(there.runs(SCORE)), len(there.runs(TRAIN))) == (scored, trained)

    file.write_text(right)
    until(lambda: stale(wanted=False), 300)
    assert planned(there, trained) == "9"
    there.mark_success(TRAIN, there.runs(TRAIN)[trained]["dag_run_id"])
    until(lambda: len(there.runs(SCORE)) > scored and all_ended(there, SCORE), 300)
    there.announce(SEQUENCES_OF_EDGES, 10)  # and the next as ever
    assert planned(there, trained + 1) == "10"
    there.mark_success(TRAIN, there.runs(TRAIN)[trained + 1]["dag_run_id"])


def _command(process: psutil.Process) -> str:
    """Its command line; empty where it has ended, reaped by its parent or not yet."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@pytest.mark.slow
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
