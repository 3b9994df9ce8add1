"""Where we run: everything that the environment decides, and nothing else.

`SESSIONMILL_…` variables; an unknown name is an error, because a misspelt one would be ignored.

Decision 14 in docs/design/decisions.md.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import tempfile
from functools import lru_cache

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.core.errors import SettingsError

PREFIX = "SESSIONMILL_"


class Settings(BaseSettings):
    """The environment's settings; each field is `SESSIONMILL_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    lake: str = "lake"
    """Folder or URI under which each source has its tables."""
    cache: str | None = None
    """Folder of caches, checkpoints and audits' pages where the lake is a URI; unset: this
    machine's temporary folder. A shared one lets a training go on in another pod."""
    sources: str = "infra/sources"
    """Folder of the source files that a bare `--source name` means."""
    spark_master: str | None = None
    """Spark's master; unset: spark-submit's own choice, or `local[*]`."""
    driver_memory: str = "4g"
    """Memory of the Spark driver when this process starts it (spark-submit has its own flag)."""
    executor_memory: str | None = None
    """Memory of each executor that Airflow's Spark jobs ask for; unset: Spark's own, 1 GiB."""
    executor_cores: int | None = Field(default=None, ge=1)
    """Cores of each of them."""
    executors: int | None = Field(default=None, ge=1)
    """How many of them (Kubernetes, YARN)."""
    shuffle_partitions: int | None = None
    """Shuffle partitions; unset: the number of local cores, or Spark's default on a cluster."""
    short_jobs: bool | None = None
    """Whether plans are interpreted rather than compiled, and tasks run in the job's process rather
    than in Spark's; unset: where few rows move. By plans alone, a warm night on a
    tiny log took 28 s instead of 52 (LAB_LOG.md), a load of 290,000 lines 207 instead of 134."""
    jars_cache: str | None = None
    """Where Delta's jars are kept (infra/spark/jars.py)."""
    checkpoint_s: float = Field(default=60.0, ge=0)
    """Seconds between a training's checkpoints; fewer where machines are taken away."""
    mlflow_wait_s: float = Field(default=0.0, ge=0)
    """How long a command waits for an MLflow server that does not answer; Airflow's tasks: 900."""
    pod_template: str | None = None
    """File with the pod in which Airflow runs each command that is no Spark job, trainings among
    them (infra/kubernetes/pod.yaml is one); unset: a process beside the scheduler."""
    spark_pod_template: str | None = None
    """File with the pod of Spark's drivers and executors (infra/kubernetes/spark-pod.yaml is one),
    where the connection `spark_default` is a Kubernetes."""
    training_gpus: int = Field(default=1, ge=0)
    """GPUs of a training's pod."""
    answer_file: str | None = None
    """File into which a command's JSON goes, too; in pods, what Airflow reads its answer from."""
    mlflow_page: str | None = None
    """Where a person's browser finds MLflow, if not at MLFLOW_TRACKING_URI."""
    notify_url: SecretStr | None = None
    """A webhook that gets failed tasks, late runs and drift (jobs/core/webhook.py)."""
    id_key: SecretStr | None = None
    """The key by which user ids are hashed ([privacy]) and erased users are recognised."""
    crash_at: str | None = None
    """For tests: the name of a crash point at which the process kills itself with SIGKILL."""

    def cache_root(self) -> str:
        """Where files lie that belong to a lake behind a URI and cannot lie in it."""
        folder = self.cache or f"{tempfile.gettempdir()}/sessionmill-{os.getuid()}"
        return os.path.join(folder, hashlib.sha256(self.lake.encode()).hexdigest()[:12])

    def table_root(self) -> str:
        """The lake as an absolute path, or the URI as it is."""
        return self.lake if "://" in self.lake else os.path.abspath(self.lake)


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once and checked.

    Raises:
        SettingsError: an unknown `SESSIONMILL_…` variable, naming the nearest known one.
    """
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise SettingsError(f"environment variable {name} is not a setting: {hint}")
    try:
        return Settings()
    except ValueError as error:
        raise SettingsError(f"environment: {error}") from None
