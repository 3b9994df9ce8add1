"""Nights that nobody looks after, with real processes: the scheduler killed in the middle of one, a
training killed in the middle while MLflow is away, a week in which everything is delivered wrong
and a disk fills up."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from jobs.core.tables import REJECTS
from tests.jobs.pipeline.test_faults import fill, mounted
from tests.support.airflow_tools import (
    SOURCE,
    Airflow,
    airflow,
    at_once,
    last_night,
    rows,
    said,
    write_log,
)  # fmt: skip
from tests.support.webhook import webhook

pytestmark = pytest.mark.long

# A scheduler that died is noticed in seconds rather than minutes.
IMPATIENT = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "20",
}


def until(what: Callable[[], Any], patience_s: float, pause_s: float = 0.2) -> Any:
    """What a question's first answer is that is not empty."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        answer = what()
        if answer:
            return answer
        time.sleep(pause_s)
    pytest.fail(f"nothing came in {patience_s} s")


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=20)


TRAINED = """
[training]
nightly = true
methods = ["pop", "gru4rec", "nosuch"]
split = "temporal"
cron = "never"

[schedule]
start = {night}
"""


def test_a_scheduler_and_a_training_are_killed_in_the_middle_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    night = last_night()
    write_log(tmp_path / "landing" / "killed", night, users=1500, days=12)
    text = SOURCE.format(name="killed", landing=tmp_path / "landing")
    text += TRAINED.format(night=f"{night:%Y-%m-%d}")
    with (
        webhook() as (url, heard),
        airflow(
            tmp_path,
            {"killed": text},
            IMPATIENT | {"SESSIONMILL_NOTIFY_URL": url, "SESSIONMILL_CHECKPOINT_S": "2"},
        ) as there,
    ):
        there.unpause("train_methods.killed", "sessions_daily.killed")
        dag = "sessions_daily.killed"

        def running(task_id: str) -> bool:
            runs = there.runs(dag)
            tasks = there.tasks(dag, runs[0]["dag_run_id"]) if runs else {}
            return any(t["state"] == "running" for (name, _), t in tasks.items() if name == task_id)

        # With its workers and what they do, as a machine that goes down; then alone, while its
        # workers live on.
        until(lambda: running("events.compute"), 300)
        time.sleep(3)
        kill(family(there.server("scheduler")))
        there.launch("scheduler")
        until(lambda: running("sequences.compute"), 900)
        kill([there.server("scheduler")])
        there.launch("scheduler")
        run, tasks = there.ended(dag, 900, trouble=True)
        assert run["state"] == "success", {t: one["state"] for t, one in tasks.items()}
        assert tasks["events.compute", -1]["try_number"] == 2

        # A training is killed once it has a checkpoint: its process, and the worker around it.
        checkpoint = until(
            lambda: list((there.lake / "killed" / "_cache" / "training").glob("*/step-*")), 600
        )[0]
        [trainer] = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "--method gru4rec --seed" in " ".join(process.info["cmdline"] or ())
        ]
        # MLflow is away for ten minutes: the training that goes on waits for it, and so does the
        # retry of the one that is killed now.
        kill(family(there.server("mlflow")))
        time.sleep(20)
        kill([trainer.parent(), trainer])
        time.sleep(600)
        there.launch("mlflow")
        run, tasks = there.ended("train_methods.killed", 1200, trouble=True)
        assert {n: tasks["train", n]["state"] for n in range(3)} == {
            0: "success", 1: "success", 2: "failed",
        }  # fmt: skip
        assert tasks["train", 1]["try_number"] == 2
        log = there.log("train_methods.killed", run["dag_run_id"], "train", attempt=2, map_index=1)
        assert "going on from a checkpoint" in log, checkpoint

        # In the same MLflow run, no step of a curve twice.
        client = mlflow.MlflowClient(there.servers.mlflow)
        experiment = client.get_experiment_by_name("killed")
        assert experiment is not None
        found = client.search_runs(
            [experiment.experiment_id], "tags.kind = 'train' and tags.method = 'gru4rec'"
        )
        assert [one.info.status for one in found] == ["FINISHED"]
        steps = [one.step for one in client.get_metric_history(found[0].info.run_id, "loss")]
        assert len(steps) > 2 and sorted(steps) == list(range(1, len(steps) + 1))

        # One failed method does not sink the others; the comparison and the webhook say which.
        compared = there.xcom("train_methods.killed", run["dag_run_id"], "compare")
        assert compared["missing"] == ["nosuch"] and len(compared["methods"]) == 2
        assert tasks["register", -1]["state"] == tasks["promote", -1]["state"] == "success"
        [message] = [one for one in heard if one["kind"] == "task failed"]
        assert message["task_id"] == "train" and message["map_index"] == 2
        assert "nosuch" in message["text"] and "gru4rec" in message["text"]  # what there is, too
        # And the night that was killed twice has the tables of a calm one.
        assert said(there.lake, "killed") == at_once(there, "killed")


WEEK = """
[sessions]
lateness_days = 3

[training]
nightly = false

[schedule]
start = {night}
wait_hours = 0.01
"""


def a_day(day: datetime, users: range = range(40), header: str = "user,item,at") -> str:
    """Users' clicks of a day, two sessions each."""
    lines = [
        f"u{user},i{(user + step + day.day) % 25},"
        f"{int((day + timedelta(hours=hour, seconds=user, minutes=step)).timestamp())}"
        for user in users
        for hour in (7, 23)  # the second one ends after midnight
        for step in range(0, 80, 20)
    ]
    return "\n".join([header, *lines]) + "\n"


def test_a_week_in_which_everything_is_delivered_wrong(tmp_path: Path) -> None:
    """A file doubled, one missing and later there, one with another schema, one with late events,
    MLflow away, the web server away, the disk full for a while. Nothing is lost, nothing doubled,
    every failure that lasts is told."""
    first = last_night() - timedelta(days=5)
    days = [first + timedelta(days=number) for number in range(6)]
    place = tmp_path / "landing" / "week"

    def deliver(day: datetime, text: str, name: str = "log.csv") -> Path:
        folder = place / f"{day:%Y-%m-%d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return folder / name

    deliver(days[0], a_day(days[0]))
    deliver(days[1], a_day(days[1]))
    deliver(days[1], a_day(days[1]), "log-again.csv")
    # days[2] has not come.
    renamed = deliver(days[3], a_day(days[3], header="user,article,at"))
    deliver(days[4], a_day(days[4]) + "u1,,soon\n")
    late = a_day(days[2], range(40, 50)).partition("\n")[2]
    deliver(days[5], a_day(days[5]) + late)
    text = SOURCE.format(name="week", landing=tmp_path / "landing")
    text += WEEK.format(night=f"{first:%Y-%m-%d}")
    with (
        webhook() as (url, heard),
        mounted(tmp_path / "lake", "size=64m"),
        airflow(tmp_path, {"week": text}, IMPATIENT | {"SESSIONMILL_NOTIFY_URL": url}) as there,
    ):
        dag = "sessions_daily.week"
        there.unpause(dag)

        run, _ = there.ended(dag, 900, trouble=True)
        assert run["state"] == "success"
        kill(family(there.server("mlflow")))  # nights do not need it
        run, _ = there.ended(dag, 900, number=1, trouble=True)
        assert run["state"] == "success"
        kill(family(there.server("api-server")))  # what runs now waits, or is tried again
        time.sleep(20)
        there.launch("api-server")
        until(lambda: _answers(there), 120)

        run, _ = there.ended(dag, 600, number=2, trouble=True)
        assert run["state"] == "failed"
        [message] = heard
        assert message["task_id"] == "arrived" and f"{days[2]:%Y-%m-%d}/*.csv" in message["text"]
        deliver(days[2], a_day(days[2]))  # a later night reads it

        run, _ = there.ended(dag, 900, number=3, trouble=True)
        assert run["state"] == "failed"
        _, message = heard
        assert message["task_id"] == "events.compute"
        assert str(renamed) in message["text"] and "'item'" in message["text"], message["text"]
        # As the message says: deliver it again, clear what is red.
        deliver(days[3], a_day(days[3]))
        there.clear(dag, run["dag_run_id"])
        time.sleep(2)
        run, _ = there.ended(dag, 900, number=3, trouble=True)
        assert run["state"] == "success"
        run, _ = there.ended(dag, 900, number=4, trouble=True)
        assert run["state"] == "success"
        # The disk is full when the last night comes: tried again, and there is room by then.
        ballast = fill(there.lake)
        night = until(lambda: there.runs(dag)[5:], 60)[0]["dag_run_id"]
        failed = until(
            lambda: [
                (name, there.log(dag, night, name))
                for (name, _), one in there.tasks(dag, night).items()
                if one["state"] == "up_for_retry"
            ],
            300,
        )
        assert "a disk is full: make room" in failed[0][1], failed
        ballast.unlink()
        run, tasks = there.ended(dag, 900, number=5, trouble=True)
        assert run["state"] == "success" and tasks[failed[0][0], -1]["try_number"] == 2
        assert len(there.runs(dag)) == 6 and len(heard) == 2

        want, have = at_once(there, "week"), said(there.lake, "week")
        assert have == want
        assert len(have["events"]) == 6 * 40 * 8 + 10 * 8
        [reject] = rows(there.lake, "week", REJECTS)
        assert reject["reason"] == "missing_item_id" and reject["raw"] == "u1,,soon"
        assert datetime.now(UTC) - first < timedelta(days=8)


def _answers(there: Airflow) -> bool:
    try:
        return bool(there.api.get("/dags"))
    except (OSError, ValueError, RuntimeError):
        return False
