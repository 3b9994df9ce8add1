"""The DAG files: light, one DAG a source, and a broken source file stops its own DAGs only."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.recorded import World

REPO = Path(__file__).resolve().parents[2]
HEAVY = (
    "great_expectations",
    "mlflow",
    "numpy",
    "pandas",
    "pyarrow",
    "pyspark",
    "torch",
)
KINDS = ("load_history", "maintenance", "score_daily", "sessions_daily", "train_methods")

SOURCE = """
[source]
name = "{name}"
landing = "landing/{name}/*.csv"
format = "csv"

[columns]
user_id = "user"
item_id = "item"
event_ts = "at"

[schedule]
{schedule}
"""

# In a process of its own: what the DAG files import must not depend on what tests import.
READ_DAGS = """
import json, sys
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(dag_folder=sys.argv[1])
print(json.dumps({
    "errors": bag.import_errors, "files": sorted(bag.file_last_changed),
    "modules": [name for name in sys.argv[2].split(",") if name in sys.modules],
    "dags": {
        name: {
            "tasks": {
                task.task_id: {
                    "downstream": sorted(task.downstream_task_ids), "pool": task.pool,
                    "retries": task.retries, "trigger_rule": task.trigger_rule.value,
                    "arguments": list(getattr(task, "application_args", None)
                                      or getattr(task, "arguments", None) or []),
                    "outlets": [asset.name for asset in task.outlets],
                }
                for task in dag.tasks
            },
            "catchup": dag.catchup, "start": str(dag.start_date)[:10], "doc": dag.doc_md,
            "max_active_runs": dag.max_active_runs, "schedule": repr(dag.schedule),
            "params": dag.params.dump(),
            "deadlines": [
                [one.interval.total_seconds(), one.callback.path] for one in dag.deadline or []
            ],
            "tells": all(task.on_failure_callback for task in dag.tasks),
        }
        for name, dag in bag.dags.items()
    },
}))
"""


def write_source(folder: Path, name: str, schedule: str = "") -> Path:
    file = folder / f"{name}.toml"
    file.write_text(SOURCE.format(name=name, schedule=schedule))
    return file


def read_dags(sources: Path, home: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", READ_DAGS, str(REPO / "dags"), ",".join(HEAVY)],
        env=os.environ | {"AIRFLOW_HOME": str(home), "SESSIONMILL_SOURCES": str(sources)},
        check=False, cwd=home, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two sources that are right, one that is not, one that takes another's name."""
    folder = tmp_path_factory.mktemp("sources")
    write_source(folder, "clicks", "start = 2026-01-05")
    write_source(folder, "baskets", 'cron = "never"')
    broken = write_source(folder, "broken")
    broken.write_text(broken.read_text().replace("user_id =", "user ="))
    write_source(folder, "midnight", 'cron = "at midnight"')
    often = write_source(folder, "often")
    often.write_text(often.read_text() + '[training]\ncron = "61 * * * *"\n')
    (folder / "copy.toml").write_text((folder / "clicks.toml").read_text())
    return read_dags(folder, tmp_path_factory.mktemp("airflow"))


def test_reading_the_dag_files_imports_nothing_heavy(bag: Any) -> None:
    """(The scheduler reads them all the time: what takes long there is what they import.)"""
    assert bag["modules"] == []


def test_airflow_reads_the_dag_files_and_not_what_they_import(bag: Any) -> None:
    names = {Path(file).relative_to(REPO / "dags").as_posix() for file in bag["files"]}
    assert names == {f"{kind}.py" for kind in (*KINDS, "source_errors")}


def test_every_source_has_its_own_dags(bag: Any) -> None:
    assert sorted(bag["dags"]) == sorted(
        f"{kind}.{source}" for kind in KINDS for source in ("baskets", "clicks")
    )


def test_a_mistake_in_a_source_file_is_an_import_error_beside_the_other_dags(
    bag: Any,
) -> None:
    [(file, message)] = bag["errors"].items()
    # an import error takes all DAGs of its file out of service: this file has none
    assert file.endswith("source_errors.py")
    assert "broken.toml: columns.user is not a field: did you mean 'user_id'?" in message
    assert "midnight.toml: schedule.cron = 'at midnight': use five fields" in message
    assert "often.toml: training.cron = '61 * * * *': use five fields" in message
    assert "copy.toml" in message or "clicks.toml" in message
    assert "'clicks' is the name of" in message


def test_the_sources_that_are_shipped_are_right(tmp_path: Path) -> None:
    found = read_dags(REPO / "infra" / "sources", tmp_path)
    assert found["errors"] == {}
    assert "sessions_daily.completejourney" in found["dags"]


def test_a_night_computes_audits_and_publishes_each_table_in_order(bag: Any) -> None:
    tasks = bag["dags"]["sessions_daily.clicks"]["tasks"]
    assert {name: task["downstream"] for name, task in tasks.items()} == {
        "events.compute": ["events.audit"],
        "events.audit": ["events.publish"],
        "events.publish": ["items", "sessions.compute"],
        "sessions.compute": ["sessions.audit"],
        "sessions.audit": ["sessions.publish"],
        "sessions.publish": ["sequences.compute"],
        "items": ["sequences.compute"],
        "sequences.compute": ["sequences.audit"],
        "sequences.audit": ["sequences.publish"],
        "sequences.publish": ["drift", "lists"],
        "drift": ["announce"],
        "lists": ["announce"],
        "announce": [],
    }
    assert tasks["announce"]["outlets"] == ["gold.sequences/clicks"]


def test_every_step_of_a_night_gets_its_day_and_the_same_batch(bag: Any) -> None:
    for name, task in bag["dags"]["sessions_daily.clicks"]["tasks"].items():
        if name != "announce":
            told = dict(zip(task["arguments"][1::2], task["arguments"][2::2], strict=False))
            assert told["--source"] == "clicks"
            assert "data_interval_start" in task["arguments"][task["arguments"].index("--day") + 1]
            assert "run_id" in task["arguments"][task["arguments"].index("--batch") + 1]
            assert task["pool"] == ("default_pool" if name in ("drift", "lists") else "spark")


def test_nights_catch_up_from_the_day_the_source_names_one_at_a_time(bag: Any) -> None:
    clicks = bag["dags"]["sessions_daily.clicks"]
    assert clicks["start"] == "2026-01-05" and clicks["catchup"] is True
    assert clicks["max_active_runs"] == 1
    assert "CronDataIntervalTimetable" in clicks["schedule"] and "0 2 * * *" in clicks["schedule"]

    baskets = bag["dags"]["sessions_daily.baskets"]
    assert baskets["schedule"] == "None" and baskets["catchup"] is False


def test_sunday_cleans_without_spark(bag: Any) -> None:
    cleaning = bag["dags"]["maintenance.clicks"]
    assert "0 5 * * 0" in cleaning["schedule"] and cleaning["catchup"] is False
    arguments = cleaning["tasks"]["maintain"]["arguments"]
    assert arguments[:3] == ["maintain", "--source", "clicks"] and "keep_days" in arguments[-1]
    assert cleaning["params"]["keep_days"] == 30


def test_where_a_night_has_files_of_its_own_it_waits_for_them(tmp_path: Path) -> None:
    for name, wait in (("waits", ""), ("goes", "wait_hours = 0")):
        file = write_source(tmp_path, name, wait)
        file.write_text(file.read_text().replace(f"{name}/*.csv", f"{name}/{{day}}/*.csv"))
    dags = read_dags(tmp_path, tmp_path)["dags"]
    assert dags["sessions_daily.waits"]["tasks"]["arrived"]["downstream"] == ["events.compute"]
    assert "arrived" not in dags["sessions_daily.goes"]["tasks"]


def test_every_failure_and_every_late_run_has_someone_to_tell(bag: Any) -> None:
    assert all(dag["tells"] for dag in bag["dags"].values())
    deadlines = {name: dag["deadlines"] for name, dag in bag["dags"].items() if dag["deadlines"]}
    assert deadlines == {
        f"{kind}.{source}": [[hours * 3600, "sessionmill_dags.alarms.tell_late"]]
        for kind, hours in (("sessions_daily", 8), ("score_daily", 8), ("train_methods", 24))
        for source in ("baskets", "clicks")
    }


def test_training_runs_by_the_week_too_or_only_so(bag: Any, tmp_path: Path) -> None:
    assert "0 6 * * 0" in bag["dags"]["train_methods.clicks"]["schedule"]
    for name, words in (
        ("weekly", ""), ("nightly", 'nightly = true\ncron = "never"'), ("hand", 'cron = "never"'),
        ("both", "nightly = true"),
    ):  # fmt: skip
        file = write_source(tmp_path, name)
        file.write_text(file.read_text() + f"[training]\n{words}\n")
    dags = read_dags(tmp_path, tmp_path)["dags"]
    names = ("weekly", "nightly", "hand", "both")
    when = {name: dags[f"train_methods.{name}"]["schedule"] for name in names}
    assert "0 6 * * 0" in when["weekly"] and "gold.sequences" not in when["weekly"]
    assert "gold.sequences" in when["nightly"] and "* * 0" not in when["nightly"]
    assert when["hand"] == "None"
    assert all(word in when["both"] for word in ("gold.sequences", "0 6 * * 0"))


SKIPS = """
from airflow.sdk.exceptions import AirflowSkipException
from sessionmill_dags import dag_factory

for methods, seeds, version, tuning in (
    (["pop"], [1], 0, {}), (["pop", "sasrec"], [1], 0, {}), (["pop"], [1], 1, {}),
    (["pop"], [1], 0, {"pop": "another recipe"}),
):
    try:
        dag_factory._skip_what_was_trained("toy", version, methods, seeds, tuning)
        print("trains")
    except AirflowSkipException as skipped:
        print("skips", skipped)
"""


@pytest.mark.slow
def test_a_week_in_which_nothing_came_trains_nothing_again(world: World, tmp_path: Path) -> None:
    world.train("pop", "--seed", "1")
    done = subprocess.run(
        [sys.executable, "-c", SKIPS],
        env=os.environ | {"AIRFLOW_HOME": str(tmp_path)},
        check=False, cwd=world.root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith(("trains", "skips"))]
    assert [line.split()[0] for line in said] == ["skips", *["trains"] * 3], done.stderr
    assert "gold.sequences version 0 is the newest, and all methods were trained on it" in said[0]


PLANS = """
import json
from sessionmill_dags import dag_factory

context = {"params": {
    "methods": ["pop", "gru4rec"], "seeds": [1, 2], "target": "next_item", "preset": "tiny",
    "table_version": 3,
}}
answer = {"recipes": {"pop": None, "gru4rec": {"mlflow_run_id": "run of gru4rec"}}}
print(json.dumps([
    dag_factory.plan.function("toy", "toy.toml", "night", recipes, **context)
    for recipes in (None, answer)
]))
"""


def test_tuned_trainings_take_the_recipes_that_were_found_before_any_of_them(
    tmp_path: Path,
) -> None:
    for name, words in (("plain", ""), ("tuned", "tuned = true")):
        file = write_source(tmp_path, name)
        file.write_text(file.read_text() + f"[training]\n{words}\n")
    dags = read_dags(tmp_path, tmp_path)["dags"]
    plain, tuned = (dags[f"train_methods.{name}"]["tasks"] for name in ("plain", "tuned"))
    assert "recipes" not in plain and set(tuned) - set(plain) == {"recipes"}
    assert tuned["recipes"]["downstream"] == ["plan"]
    assert (tuned["recipes"]["retries"], tuned["plan"]["retries"]) == (0, 2)
    assert tuned["recipes"]["arguments"][:4] == [
        "recipes", "--source", "tuned", "--methods"
    ]  # fmt: skip
    as_they_are, by_recipe = ask(PLANS, tmp_path)
    assert not any("--tuned" in one for one in as_they_are)
    assert [one[-2:] for one in by_recipe if "gru4rec" in one] == 2 * [
        ["--tuned", "run of gru4rec"]
    ]
    assert [one for one in by_recipe if "pop" in one] == [
        one for one in as_they_are if "pop" in one
    ]


# What a task sees of Airflow's events, without Airflow.
ANNOUNCED = """
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse
from sessionmill_dags import dag_factory

EVENTS = [  # seconds of the announcement, version
    SimpleNamespace(timestamp=datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=at),
                    extra={"version": version})
    for at, version in ((0, 9), (60, 3), (60.4, 5), (60.8, 4), (90, 7))
]

class Inlet:
    def __init__(self, events, order=1, most=None):
        self.events, self.order, self.most = events, order, most
    def after(self, at):
        since = datetime.fromisoformat(at)
        return Inlet(self.events and [e for e in self.events if e.timestamp >= since])
    def ascending(self, yes):
        return Inlet(self.events, 1 if yes else -1)
    def limit(self, most):
        return Inlet(self.events, self.order, most)
    def __iter__(self):
        if self.events is None:
            raise AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR))
        return iter(self.events[::self.order][:self.most])

def context(told, known):
    return {"triggering_asset_events": {"asset": told} if told else {}, "inlet_events": [Inlet(known)]}

print(json.dumps({
    "within a second, the lower last": dag_factory._highest_announced(context(EVENTS[1:4], EVENTS[:4])),
    "the later two not given": dag_factory._highest_announced(context(EVENTS[1:2], EVENTS)),
    "nothing given": dag_factory._highest_announced(context([], EVENTS)),
    "Airflow cannot list them": dag_factory._highest_announced(context(EVENTS[1:3], None)),
    "newest": dag_factory._announced(context([], EVENTS), 0),
    "none yet": dag_factory._announced(context([], []), 0),
    "newest, not listed": dag_factory._announced(context([], None), 0),
}))
"""


def ask(script: str, home: Path, **env: str) -> Any:
    """What a script about the DAGs prints last, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(REPO / "dags")],
        env=os.environ | {"AIRFLOW_HOME": str(home)} | env,
        check=False, cwd=home, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_takes_the_highest_version_of_those_announced_together(tmp_path: Path) -> None:
    assert ask(ANNOUNCED, tmp_path) == {
        "within a second, the lower last": 5,
        "the later two not given": 7,
        "nothing given": None,
        "Airflow cannot list them": 5,
        "newest": {"version": 7},
        "none yet": None,
        "newest, not listed": None,
    }


# The scheduler's own timetables, on a machine whose clock is set to New York.
NIGHTS = """
import json, sys
from datetime import datetime, timedelta, timezone

from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.encoders import coerce_to_core_timetable
from airflow.timetables.base import DataInterval, TimeRestriction
from sessionmill_dags import dag_factory

bag = DagBag(dag_folder=sys.argv[1])
nights = bag.dags["sessions_daily.clicks"]

def following(dag, last, catchup, earliest=None):
    return coerce_to_core_timetable(dag.timetable).next_dagrun_info(
        last_automated_data_interval=last, restriction=TimeRestriction(earliest, None, catchup))

def day(interval):
    return nights.get_template_env().from_string(dag_factory.DAY).render(
        params={"day": None}, data_interval_start=interval.start)

found = {"local": datetime(2026, 7, 1).astimezone().tzname(), "nights": []}
last = None
for first, count in ((datetime(2026, 3, 6, 2), 5), (datetime(2026, 10, 30, 2), 5)):
    first = first.replace(tzinfo=timezone.utc)
    last = DataInterval(first - timedelta(days=1), first)
    for _ in range(count):
        last = following(nights, last, True).data_interval
        found["nights"].append([day(last), str(last.start), str(last.end)])

train = bag.dags["train_methods.clicks"]
now = datetime.now(timezone.utc)
weeks = {"never on": None, "off for a month": DataInterval.exact(now - timedelta(days=35))}
for name, week in weeks.items():
    info = following(train, week, train.catchup)
    after = following(train, info.data_interval, train.catchup)
    found[name] = [now - timedelta(days=7) < info.run_after <= now, info.run_after.strftime("%A %H:%M %Z"), after.run_after > now]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def new_york(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("new_york")
    write_source(folder, "clicks", "start = 2026-03-06")
    return ask(NIGHTS, folder, TZ="America/New_York", SESSIONMILL_SOURCES=str(folder))


def test_a_night_is_a_day_of_utc_wherever_the_machine_stands(new_york: Any) -> None:
    assert new_york["local"] == "EDT"
    # Both changes of New York's clock, on 8 March and on 1 November, are among them.
    days = [f"2026-03-{day:02}" for day in range(6, 12)]
    days += ["2026-10-30", "2026-10-31", "2026-11-01", "2026-11-02", "2026-11-03", "2026-11-04"]
    between = [pair for pair in itertools.pairwise(days) if pair[0] != "2026-03-11"]
    assert new_york["nights"] == [
        [day, f"{day} 02:00:00+00:00", f"{after} 02:00:00+00:00"] for day, after in between
    ]


def test_a_training_that_is_switched_on_runs_once_for_all_weeks_that_passed(new_york: Any) -> None:
    # Airflow queues no event for a DAG that is off: the week's run trains what came meanwhile.
    for state in ("never on", "off for a month"):
        assert new_york[state] == [True, "Sunday 06:00 UTC", True], state


def test_training_is_started_by_the_asset_and_survives_a_failed_method(
    bag: Any,
) -> None:
    training = bag["dags"]["train_methods.clicks"]
    assert training["tasks"]["train"]["pool"] == "gpu"
    assert training["tasks"]["train"]["downstream"] == ["compare"]
    assert training["tasks"]["compare"]["trigger_rule"] == "all_done_min_one_success"
    assert training["tasks"]["compare"]["downstream"] == ["register", "report"]
    assert training["tasks"]["register"]["downstream"] == ["promote"]
    assert training["tasks"]["promote"]["downstream"] == ["announce_champion", "report"]
    assert training["tasks"]["announce_champion"]["outlets"] == ["champion/clicks"]
    assert training["params"]["methods"][:2] == ["pop", "personal_top"]


def test_new_sequences_or_a_new_champion_are_scored(bag: Any) -> None:
    scoring = bag["dags"]["score_daily.clicks"]
    assert all(name in scoring["schedule"] for name in ("gold.sequences/clicks", "champion/clicks"))
    assert scoring["tasks"]["is_there_a_champion"]["downstream"] == ["refit"]
    assert scoring["tasks"]["refit"]["arguments"] == ["refit", "--source", "clicks"]
    assert scoring["tasks"]["refit"]["pool"] == "gpu"
    assert scoring["tasks"]["refit"]["downstream"] == ["verify"]
    assert scoring["tasks"]["verify"]["arguments"][-3:] == ["--served", "--most", "500"]
    assert scoring["tasks"]["verify"]["downstream"] == ["score"]
    assert scoring["tasks"]["score"]["arguments"][:3] == ["score", "--source", "clicks"]
    assert scoring["tasks"]["score"]["downstream"] == ["report"]
    assert scoring["tasks"]["report"]["arguments"] == ["report", "--source", "clicks"]


def test_every_dag_tries_again_and_tells_the_operator_what_to_do(bag: Any) -> None:
    for name, dag in bag["dags"].items():
        assert "red" in dag["doc"], name
        assert all(task["retries"] == 2 for task in dag["tasks"].values()), name
