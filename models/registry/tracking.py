"""Where runs are recorded: MLflow, reached by `MLFLOW_TRACKING_URI`, else `.mlflow/` right here.

One experiment a source. MLflow is imported when first needed: it takes seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULT_FOLDER = ".mlflow"
SHOWN_NAMES = 10
"""So many comparisons are named."""
KIND, COMPARISON, ASKED_FOR = "kind", "comparison", "asked_for"  # tags of our runs
SEEDS, PLAN = "seeds", "plan"  # the kind of a run that has the plan of a comparison, and its tag
TUNING = "tuning"  # tag of a training: the run whose recipe it took


def display_name(method: str, variant: str | None) -> str:
    """How a training is called where others of its method differ in settings."""
    return f"{method} ({variant})" if variant else method


def method_of(name: str) -> str:
    """The method of a `display_name`."""
    return name.partition(" (")[0]


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two processes must not both create the tables of a new database."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tracking_uri() -> str:
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given or f"sqlite:///{Path(DEFAULT_FOLDER).absolute()}/mlflow.db"


def _answers(uri: str) -> None:
    """Ask a server before work begins, rather than after MLflow's minutes of retries; wait for one
    that is away as long as the settings say."""
    from jobs.core.settings import settings

    until = time.monotonic() + settings().mlflow_wait_s
    while True:
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
                return
        except urllib.error.HTTPError:
            return  # it answers; what it thinks of us is said by the first real call
        except (OSError, ValueError) as error:
            left = until - time.monotonic()
            if left <= 0 or isinstance(error, ValueError):
                raise UserError(
                    f"MLflow does not answer at MLFLOW_TRACKING_URI={uri} ({error}): start it with "
                    "`make up`, or unset the variable to record under .mlflow/ in this folder"
                ) from None
            print(
                f"MLflow does not answer at {uri}: waiting, at most {left:.0f} s more", flush=True
            )
            time.sleep(min(10.0, left))


def first_sentence(error: Exception) -> str:
    """What an error of MLflow says, without what follows: some are of ten lines."""
    return re.split(r"(?<=\w)\.\s|\n", str(error), maxsplit=1)[0].rstrip(".")


def connect(source: str) -> tuple[MlflowClient, str]:
    """A client, and the id of the source's experiment (made if there is none)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        _answers(uri)
    elif "://" not in uri and re.fullmatch(r"[\w.-]+(:\d+)?", uri) and not os.path.isdir(uri):
        raise UserError(
            f"MLFLOW_TRACKING_URI={uri} is neither an address nor a folder: write http:// before a server's, "
            "sqlite:/// before a database's file, or unset it to record under .mlflow/ in this folder"
        )
    import logging

    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow.store.db.utils", "alembic", "mlflow.utils.environment"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    local = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None
    with contextlib.ExitStack() as stack:
        if local is not None:
            stack.enter_context(_one_at_a_time(local))
        try:
            client = MlflowClient()  # a new database gets its tables here
            experiment = client.get_experiment_by_name(source)
            if experiment is None:
                # Without a place of its own, a database's artifacts would go to ./mlruns.
                where = (local / "artifacts" / source).absolute().as_uri() if local else None
                try:
                    return client, str(client.create_experiment(source, artifact_location=where))
                except MlflowException:  # another process made it meanwhile
                    experiment = client.get_experiment_by_name(source)
        except MlflowException as error:
            raise UserError(
                f"MLflow at {uri} does not work: {first_sentence(error)}. Set MLFLOW_TRACKING_URI to another "
                "server or to a database (sqlite:///FILE), or unset it to record under .mlflow/ in this folder"
            ) from None
    if experiment is None or experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow's experiment {source!r} is deleted: restore it with `mlflow experiments "
            "restore`, or give the source another name"
        )
    return client, str(experiment.experiment_id)


def log_table(client: MlflowClient, run_id: str, path: str, version: int, table_id: str) -> None:
    """Name a Delta table at a version as the run's dataset input.

    MLflow's server looks whether it knows the dataset and then inserts it: of two trainings that
    start together one gets the answer that the row exists (a database's integrity error), and only has to
    ask again.
    """
    from mlflow.data.delta_dataset_source import DeltaDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    source = DeltaDatasetSource(path=path, delta_table_version=version, delta_table_id=table_id)
    dataset = MetaDataset(source=source, name="gold.sequences", digest=f"v{version}")  # type: ignore[abstract, unused-ignore]
    named = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])
    for attempt in range(5):
        try:
            client.log_inputs(run_id, [named])
            return
        except MlflowException as error:
            if "IntegrityError" not in str(error) or attempt == 4:
                raise
            time.sleep(0.2 * 2**attempt)


def log_values(
    client: MlflowClient,
    run_id: str,
    *,
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Everything in calls of at most 1000 metrics and 100 params, MLflow's own limits.

    MLflow knows no `@` in names: ndcg@10 is ndcg_at_10 there.
    """
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    values = [
        Metric(name.replace("@", "_at_"), value, now, 0) for name, value in (metrics or {}).items()
    ]
    given = [Param(name, str(value)[:6000]) for name, value in (params or {}).items()]
    for low in range(0, max(len(values), 1), 1000):
        first = given[:100] if low == 0 else []
        client.log_batch(run_id, metrics=values[low : low + 1000], params=first)
    for low in range(100, len(given), 100):
        client.log_batch(run_id, params=given[low : low + 100])


class Curves:
    """One value an epoch, logged while training runs; no step twice, also by a run taken up again.

    An MLflow that is away costs no training: what could not be logged is logged at the end.
    """

    def __init__(self, client: MlflowClient, run_id: str, say: Callable[[str], None]) -> None:
        self.client, self.run_id, self.say = client, run_id, say
        self.there: dict[str, set[int]] = {}  # metric -> steps that MLflow has

    def log(self, epoch: int, curves: Mapping[str, list[float]]) -> None:
        """After an epoch: tell what is new, and go on if MLflow does not answer."""
        from mlflow.exceptions import MlflowException

        try:
            self.finish(curves)
        except MlflowException as error:
            first = str(error).splitlines()[0][:200]
            self.say(f"MLflow did not take epoch {epoch} ({first}): telling it later")

    def finish(self, curves: Mapping[str, list[float]]) -> None:
        """Everything that MLflow does not have yet."""
        from mlflow.entities import Metric

        now, values = int(time.time() * 1000), []
        for name, curve in curves.items():
            key = name.replace("@", "_at_")
            if key not in self.there:
                history = self.client.get_metric_history(self.run_id, key)
                self.there[key] = {metric.step for metric in history}
            values += [
                Metric(key, value, now, step)
                for step, value in enumerate(curve, 1)
                if step not in self.there[key] and math.isfinite(value)
            ]
        for low in range(0, len(values), 1000):
            part = values[low : low + 1000]
            self.client.log_batch(self.run_id, metrics=part)
            for metric in part:
                self.there[metric.key].add(metric.step)


def reopened(client: MlflowClient, run_id: str) -> bool:
    """Let a run that did not finish go on; False if it is gone, or finished."""
    from mlflow.exceptions import MlflowException

    try:
        info = client.get_run(run_id).info
    except MlflowException:
        return False
    if info.status == "FINISHED" or info.lifecycle_stage != "active":
        return False
    client.update_run(run_id, status="RUNNING")
    return True


def check_name(name: str) -> None:
    """Raises:
    UserError: MLflow could not be asked for it.
    """
    if not name.strip():
        raise UserError(
            f"{name!r}: the name of a comparison, method or variant is blank: give one with letters"
        )
    if "'" in name:
        raise UserError(
            f"{name!r}: names of comparisons, methods and variants must not have a quote (')"
        )


def runs(client: MlflowClient, experiment: str, **tags: str) -> list[Run]:
    """Finished runs with these tags, the newest first."""
    for value in tags.values():
        check_name(value)
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    result: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment],
            f"attributes.status = 'FINISHED' and {wanted}",
            max_results=500,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        result.extend(page)
        token = page.token
        if not token:
            return result


def comparisons_there(client: MlflowClient, experiment: str, kind: str, asked: str | None) -> str:
    """The comparisons that have finished runs of a kind, for the sentence that one has none; empty:
    there are no others."""
    wanted = f"attributes.status = 'FINISHED' and tags.`{KIND}` = '{kind}'"
    newest = client.search_runs([experiment], wanted, max_results=1000)
    tags = (run.data.tags.get(COMPARISON) for run in newest)
    names = list(dict.fromkeys(name for name in tags if name is not None and name != asked))
    if not names:
        return ""
    near = difflib.get_close_matches(asked or "", names, n=1)
    there = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:SHOWN_NAMES])}"
    return f" ({there})"


def plans(client: MlflowClient, experiment: str, comparison: str) -> list[Run]:
    """Runs that have a plan of a comparison, whether they have ended or not, the oldest first."""
    check_name(comparison)
    wanted = f"tags.`{KIND}` = '{SEEDS}' and tags.`{COMPARISON}` = '{comparison}'"
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    return list(client.search_runs([experiment], wanted, order_by=order))


@contextlib.contextmanager
def downloaded(client: MlflowClient, run_id: str, path: str) -> Iterator[Path]:
    """An artifact folder of a run, for as long as the block lasts."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        try:
            place = Path(client.download_artifacts(run_id, path, folder))
        except (MlflowException, OSError) as error:
            raise UserError(
                f"run {run_id} has no artifact {path!r} that can be read ({error}): train again"
            ) from error
        yield place


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
