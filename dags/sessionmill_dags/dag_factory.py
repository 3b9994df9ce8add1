"""What the DAG files are made of: sources, tasks, defaults. Imports nothing heavy.

One DAG of each kind per file in `infra/sources/`. A file with a mistake has no DAGs: its message
is the import error of `source_errors.py`, and the other sources go on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import (
    Asset,
    AssetOrTimeSchedule,
    CronDataIntervalTimetable,
    CronTriggerTimetable,
    Param,
    TaskGroup,
    chain,
    task,
)
from airflow.sdk.exceptions import (
    AirflowFailException,
    AirflowRuntimeError,
    AirflowSkipException,
)

import jobs
from jobs.core.batches import AIRFLOW_BATCH, folder_name
from jobs.core.errors import SourceError
from jobs.core.landing_globs import DAY_FIELD, landing_patterns
from jobs.core.settings import settings
from jobs.core.source_file import Source, load_source
from jobs.core.tables import SEQUENCES
from sessionmill_dags import alarms, pods
from sessionmill_dags.operators import (
    JobsOperator,
    ModelsOperator,
    PageOperator,
    TrainingOperator,
)

log = logging.getLogger(__name__)
REPO = Path(jobs.__file__).resolve().parents[1]

# Ties the steps of one run, and names the candidate's folder and the comparison.
RUN = AIRFLOW_BATCH
# The day of a night is the start of its data interval; `day` is for a run by hand.
DAY = "{{ params.day or (data_interval_start | ds) }}"
DAY_PARAM = {
    "day": Param(
        None,
        type=["null", "string"],
        format="date",
        description="The night's day, for a run by hand. Empty: the start of the data interval.",
    )
}
KEEP_DAYS_PARAM = {
    "keep_days": Param(
        30,
        type="number",
        minimum=1,
        description="What was removed from the tables in the last so many days is kept.",
    )
}
# Every job is idempotent: trying again is always right.
PATIENCE = {
    "owner": "sessionmill",
    "retries": 2,
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=20),
    "on_failure_callback": alarms.tell_failed,
}


# -- sources -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScheduledSource:
    """A source file that could be read, and when it runs."""

    file: str
    """What `--source` is given: the file's name without its ending."""
    spec: Source
    schedule: CronDataIntervalTimetable | None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def start_date(self) -> datetime:
        """The first day, where the source names one; else long ago, with nothing to catch up."""
        first = self.spec.schedule.start
        return datetime(first.year, first.month, first.day, tzinfo=UTC) if first else LONG_AGO

    @property
    def catchup(self) -> bool:
        return self.spec.schedule.start is not None

    @property
    def sequences(self) -> Asset:
        """Tells who trains that `gold.sequences` has a new version (in the event's `extra`)."""
        return Asset(name=f"{SEQUENCES.full_name}/{self.name}")

    @property
    def retrained(self) -> Any:
        """When its methods are trained: once a week, and with `[training] nightly` on new sequences.

        Airflow queues no event for a DAG that is switched off. The newest week that has passed runs
        as soon as the DAG is switched on, once, so that what was announced meanwhile is trained.
        """
        training = self.spec.training
        asset = [self.sequences] if training.nightly else None
        if training.cron == "never":
            return asset
        weekly = CronTriggerTimetable(training.cron, timezone="UTC", run_immediately=True)
        return AssetOrTimeSchedule(timetable=weekly, assets=asset) if asset else weekly

    @property
    def champion(self) -> Asset:
        """Tells who scores that another model is the champion."""
        return Asset(name=f"champion/{self.name}")


VERIFIED = 500  # users whose lists, or questions that, the served model is asked again
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def source_files() -> list[Path]:
    folder = Path(settings().sources)
    if not folder.is_absolute() and not folder.is_dir():
        folder = REPO / folder
    return sorted(folder.glob("*.toml"))


def _read_all() -> Iterator[ScheduledSource | SourceError]:
    taken: dict[str, Path] = {}
    for file in source_files():
        try:
            spec = load_source(str(file))
            if spec.name in taken:
                raise SourceError(
                    f"{file}: source.name = {spec.name!r} is the name of {taken[spec.name]} too: "
                    "give one of them another"
                )
            taken[spec.name] = file
            yield ScheduledSource(file.stem, spec, _schedule(spec, file))
        except SourceError as error:
            yield error


def _schedule(spec: Source, file: Path) -> CronDataIntervalTimetable | None:
    from croniter import croniter

    cron = spec.schedule.cron
    for name, words in (("schedule", cron), ("training", spec.training.cron)):
        if words != "never" and not croniter.is_valid(words):
            raise SourceError(
                f"{file}: {name}.cron = {words!r}: use five fields such as '0 2 * * *', or 'never'"
            )
    return None if cron == "never" else CronDataIntervalTimetable(cron, timezone="UTC")


def sources() -> list[ScheduledSource]:
    """The sources whose files are right, in the order of their files' names."""
    return [source for source in _read_all() if isinstance(source, ScheduledSource)]


def source_errors() -> list[str]:
    """The message of every source file that has a mistake."""
    return [str(error) for error in _read_all() if isinstance(error, SourceError)]


# -- nights ------------------------------------------------------------------------------------


def _asked_by(context: Any) -> str:
    """What started the run: scheduled, backfill, manual, asset_triggered."""
    kind = context["dag_run"].run_type
    return str(getattr(kind, "value", kind))


def arrived(source: ScheduledSource) -> Any:
    """Wait for the first file of a scheduled night's day, where the landing has a place for it.

    A night without files would end well and say nothing; the day would be missed for good once it
    is older than `lateness_days`. Empty where there is nothing to wait for.
    """
    landing, hours = source.spec.source.landing, source.spec.schedule.wait_hours
    if not DAY_FIELD.search(landing) or not hours:
        return []

    @task.sensor(task_id="arrived", mode="reschedule", poke_interval=60, timeout=10 * 366 * 86_400)
    def arrived(day: str, **context: Any) -> bool:
        from jobs.lake import filesystem

        # (A person who starts a night knows what there is.)
        if _asked_by(context) not in ("scheduled", "backfill"):
            return True
        [pattern] = landing_patterns(landing, date.fromisoformat(day), 0)
        if filesystem.glob(pattern):
            return True
        if datetime.now(UTC) < context["data_interval_end"] + timedelta(hours=hours):
            return False
        raise AirflowFailException(
            f"no file matches {pattern}, {hours:g} hours (schedule.wait_hours) after the night of "
            f"{day} was due. Have the day delivered and clear this task; if there is nothing to "
            "come, mark it as a success, and the night continues with what else there is. A night "
            f"within {source.spec.sessions.lateness_days} days (sessions.lateness_days) reads the "
            "files, too, if they come by then"
        )

    return arrived(day=DAY)


def drift(source: ScheduledSource) -> JobsOperator:
    """Is the night like those before it? Warns, or stops the line, as the source's policy says."""
    return JobsOperator(
        task_id="drift",
        arguments=["drift", "--source", source.file, "--batch", RUN, "--day", DAY],
    )


def lists(source: ScheduledSource) -> JobsOperator:
    """What were the lists worth that were there before the night's events?"""
    return JobsOperator(
        task_id="lists",
        arguments=["lists", "--source", source.file, "--batch", RUN, "--day", DAY],
    )


def spark_job(
    source: ScheduledSource, job: str, step: str = "all", *, by_day: bool = True
) -> SparkSubmitOperator:
    """One job as a task; `step` is compute, audit, publish, or all of them."""
    arguments = [job, "--source", source.file, "--batch", RUN, "--json"]
    if step != "all":
        arguments += ["--step", step]
    if by_day:
        arguments += ["--day", DAY]
    application = str(REPO / "jobs" / "__main__.py")
    as_pods = settings().spark_pod_template
    return SparkSubmitOperator(
        task_id=job if step == "all" else step,
        # (In pods, the repository lies where it lies here: both are our images.)
        application=f"local://{application}" if as_pods else application,
        conf=pods.spark_conf(as_pods) if as_pods else None,
        application_args=arguments,
        name=f"{source.name}.{job}.{step}",
        driver_memory=settings().driver_memory,
        executor_memory=settings().executor_memory,
        executor_cores=settings().executor_cores,
        num_executors=settings().executors,
        pool="spark",
    )


def write_audit_publish(source: ScheduledSource, group: str, job: str) -> TaskGroup:
    """Compute a candidate, audit it, publish it: a person sees which of the three went red."""
    with TaskGroup(group) as steps:
        chain(*(spark_job(source, job, step) for step in ("compute", "audit", "publish")))
    return steps


def maintain(source: ScheduledSource) -> JobsOperator:
    """Pack small files and remove what no version needs; needs no JVM."""
    return JobsOperator(
        task_id="maintain",
        arguments=[
            "maintain", "--source", source.file, "--keep-days", "{{ params.keep_days }}",
        ],
    )  # fmt: skip


def announce(source: ScheduledSource, result: str) -> Any:
    """Emit the asset with the version that this run published; nothing new emits nothing."""

    @task(task_id="announce", outlets=[source.sequences], inlets=[source.sequences])
    def tell(run: str, **context: Any) -> dict[str, Any]:
        published = json.loads(_read_text(source.name, run, result))["tables"]
        table = published.get(SEQUENCES.full_name)
        if table is None:
            raise AirflowSkipException(f"{result} published no {SEQUENCES.full_name}")
        extra = {
            "version": table["version"],
            "rows": table["rows"],
            "path": table["path"],
        }
        if _announced(context, source.sequences) == extra:
            raise AirflowSkipException(f"version {table['version']} was announced before")
        context["outlet_events"][source.sequences].extra = extra
        return extra

    return tell(run=RUN)


def _events(accessor: Any) -> list[Any]:
    """An asset's events; empty, with a warning, where Airflow cannot list them.

    Airflow 3.3 answers 500 for all events of an asset while a run that one of them started waits in
    the queue without a start. A run that was cleared beside a running one waits for hours. An event
    that is announced twice is harmless; a night that fails for this is not.
    """
    try:
        return list(accessor)
    except AirflowRuntimeError as error:
        log.warning("Airflow cannot list the asset's events, so they are not used: %s", error)
        return []


def _announced(context: Any, asset: Asset) -> dict[str, Any] | None:
    """What the asset's newest event says; None where there is none, or it cannot be read."""
    newest = _events(context["inlet_events"][asset].ascending(False).limit(1))
    return newest[0].extra if newest else None


def _read_text(source: str, run: str, result: str) -> str:
    from jobs.lake import filesystem

    folder = f"{settings().table_root()}/{source}/_runs/{folder_name(run)}"
    return filesystem.read_text(f"{folder}/{result}")


# -- models ------------------------------------------------------------------------------------


def training_params(source: ScheduledSource) -> dict[str, Param]:
    """What a person may change when they start a training by hand."""
    training = source.spec.training
    return {
        "methods": Param(
            list(training.methods), type="array", minItems=1, uniqueItems=True,
            items={"type": "string", "pattern": "^[a-z0-9_+-]+$"}, examples=list(training.methods),
            description="Methods to train, one a line.",
        ),
        "seeds": Param(
            list(training.seeds), type="array", minItems=1, uniqueItems=True,
            items={"type": "integer", "minimum": 0},
            description="Seeds to train each method with.",
        ),
        "target": Param(training.target, enum=["next_item", "next_session"]),
        "preset": Param(training.preset, type="string", pattern="^[a-z0-9_-]+$"),
        "table_version": Param(
            None, type=["null", "integer"], minimum=0,
            description="Version of gold.sequences. Empty: the announced one, or the newest.",
        ),
    }  # fmt: skip


@task
def plan(
    source: str, file: str, run: str, recipes: dict[str, Any] | None = None, **context: Any
) -> list[list[str]]:
    """The arguments of each training: methods x seeds, all on one version of the table.

    `recipes`: the answer of `models recipes`; each method's seeds are trained by the same one.
    """
    params = context["params"]
    version = params["table_version"]
    tuning = _recipe_runs(recipes)
    if version is None:
        version = _highest_announced(context)
    if version is None:
        from deltalake import DeltaTable

        place = SEQUENCES.path(settings().table_root(), source)
        if not DeltaTable.is_deltatable(place):
            raise AirflowSkipException(f"there is no table at {place} yet: no night has run")
        version = DeltaTable(place).version()
        if _asked_by(context) == "scheduled":
            _skip_what_was_trained(source, int(version), params["methods"], params["seeds"], tuning)
    return [
        [
            "train", "--source", file, "--method", method, "--seed", str(seed),
            "--target", params["target"], "--preset", params["preset"],
            "--table-version", str(version), "--comparison", run,
            *(["--tuned", tuning[method]] if method in tuning else []),
        ]
        for method in params["methods"]
        for seed in params["seeds"]
    ]  # fmt: skip


def _recipe_runs(recipes: dict[str, Any] | None) -> dict[str, str]:
    """Method -> the run that has its recipe; without those that have nothing to tune."""
    found = (recipes or {"recipes": {}})["recipes"]
    return {method: recipe["mlflow_run_id"] for method, recipe in found.items() if recipe}


def _highest_announced(context: Any) -> int | None:
    """The highest version announced since the first event that the run was given; None: no event.

    A run of Airflow 3.3 is not given all of them. What is announced while another run of the DAG is
    active, or within a moment, gives one run together, and that run gets the first event alone. The
    order in which it gets several is not that of their versions.
    """
    told = [event for every in context["triggering_asset_events"].values() for event in every]
    if not told:
        return None
    first = min(event.timestamp for event in told)
    since = _events(context["inlet_events"][0].after(first.isoformat()))
    return max(int(event.extra["version"]) for event in [*told, *since])


def _skip_what_was_trained(
    source: str,
    version: int,
    methods: Sequence[str],
    seeds: Sequence[int],
    tuning: Mapping[str, str],
) -> None:
    """A week in which nothing came: the same seeds and recipes on the same rows give the same
    models."""
    from models.registry import tracking

    client, experiment = tracking.connect(source)
    done = tracking.runs(client, experiment, kind="train", table_version=str(version))
    there = {
        (tags["method"], tags["seed"], tags.get(tracking.TUNING, ""))
        for tags in (run.data.tags for run in done)
    }
    wanted = {(method, str(seed), tuning.get(method, "")) for method in methods for seed in seeds}
    if there >= wanted:
        raise AirflowSkipException(
            f"gold.sequences version {version} is the newest, and all methods were trained on it"
        )


def train_each(source: ScheduledSource) -> Any:
    """One task per method and seed, as many at a time as the pool has slots."""
    planned = plan.override(inlets=[source.sequences])
    recipes = _recipes(source).output if source.spec.training.tuned else None
    return TrainingOperator.partial(
        task_id="train",
        pool="gpu",
        map_index_template="{{ task.arguments[4] }}, seed {{ task.arguments[6] }}",
    ).expand(arguments=planned(source=source.name, file=source.file, run=RUN, recipes=recipes))


def _recipes(source: ScheduledSource) -> ModelsOperator:
    """The newest recipe of each method; red, before anything is trained, where one has none."""
    return ModelsOperator(
        task_id="recipes",
        retries=0,  # who has no recipe has none in five minutes; for MLflow the command waits itself
        arguments=[
            "recipes", "--source", source.file, "--methods", "{{ params.methods | join(',') }}",
            "--target", "{{ params.target }}", "--preset", "{{ params.preset }}",
        ],
    )  # fmt: skip


def compare(source: ScheduledSource) -> ModelsOperator:
    """Compare those that finished, if any did, and say which did not."""
    return ModelsOperator(
        task_id="compare",
        arguments=[
            "compare", "--source", source.file, "--comparison", RUN,
            "--expect", "{{ params.methods | join(',') }}",
        ],
        trigger_rule="all_done_min_one_success",
    )  # fmt: skip


def register(source: ScheduledSource) -> ModelsOperator:
    """Each method's best seed becomes a version of the source's registered model."""
    return ModelsOperator(
        task_id="register",
        arguments=["register", "--source", source.file, "--comparison", RUN],
    )


def promote(source: ScheduledSource) -> Any:
    """The gate decides whether the challenger becomes the champion; a new one is announced."""
    decided = ModelsOperator(task_id="promote", arguments=["promote", "--source", source.file])

    @task(task_id="announce_champion", outlets=[source.champion], inlets=[source.champion])
    def tell(decision: dict[str, Any], **context: Any) -> None:
        if decision["action"] not in ("promoted", "champion already"):
            raise AirflowSkipException(f"the gate said: {decision['action']}")
        extra = {"version": decision["challenger"]}
        if _announced(context, source.champion) == extra:
            raise AirflowSkipException(f"version {extra['version']} was announced before")
        context["outlet_events"][source.champion].extra = extra

    tell(decided.output)
    return decided


def report(source: ScheduledSource) -> PageOperator:
    """The page of this comparison, in MLflow and in the lake, whatever the gate said."""
    return PageOperator(
        task_id="report",
        arguments=["report", "--source", source.file, "--comparison", RUN],
        trigger_rule="all_done_min_one_success",
    )


def score(source: ScheduledSource) -> Any:
    """The champion's recipe trained on the newest events, its lists for all users, and the page of the
    newest comparison with them; nothing where there is no champion yet."""

    @task.short_circuit(task_id="is_there_a_champion")
    def there(name: str) -> bool:
        from models.registry import tracking
        from models.registry.register import CHAMPION, aliases_of

        client, _ = tracking.connect(name)
        return CHAMPION in (aliases_of(client, name) or {})

    scored = JobsOperator(
        task_id="score", arguments=["score", "--source", source.file, "--batch", RUN]
    )
    page = PageOperator(task_id="report", arguments=["report", "--source", source.file])
    # Lists are made of what answers as it was stored.
    verified = ModelsOperator(
        task_id="verify",
        arguments=["verify", "--source", source.file, "--served", "--most", str(VERIFIED)],
    )
    taught = there(source.name)
    if source.spec.training.refit:
        taught >>= TrainingOperator(
            task_id="refit", arguments=["refit", "--source", source.file], pool="gpu"
        )
    return taught >> verified >> scored >> page


__all__ = [
    "DAY_PARAM",
    "KEEP_DAYS_PARAM",
    "LONG_AGO",
    "PATIENCE",
    "SourceError",
    "announce",
    "compare",
    "maintain",
    "promote",
    "register",
    "report",
    "score",
    "source_errors",
    "sources",
    "spark_job",
    "train_each",
    "training_params",
    "write_audit_publish",
]
