"""Commands as Airflow's tasks: in processes of this machine, or, where `SESSIONMILL_POD_TEMPLATE`
names a pod, in pods of their own. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

from airflow.sdk import BaseOperator, BaseOperatorLink, Context
from airflow.sdk.exceptions import AirflowException

from jobs.core.settings import settings

LAST_LINES = 5  # of what a process said, in the words of its failure


class ProcessOperator(BaseOperator):
    """`python -m <module> <arguments> --json` in a process of its own; returns what it printed
    last.

    Arguments are a list and never see a shell.
    """

    module = ""
    template_fields: Sequence[str] = ("arguments",)
    ui_color = "#d5e8d4"

    def __init__(self, *, arguments: Sequence[str], **others: Any) -> None:
        super().__init__(**others)
        self.arguments = arguments
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        command = [sys.executable, "-m", self.module, *map(str, self.arguments), "--json"]
        self.log.info("running %s", command)
        answer, last = "", deque[str](maxlen=LAST_LINES)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={"SESSIONMILL_MLFLOW_WAIT_S": "900", **os.environ},
        ) as self._process:  # fmt: skip
            assert self._process.stdout
            for line in self._process.stdout:
                self.log.info(line.rstrip())
                last.append(line)
                if line.startswith("{"):
                    answer = line
        if self._process.returncode:
            raise AirflowException(
                f"{' '.join(command[1:])} ended with {self._process.returncode}; it said last:\n"
                + "".join(last)
            )
        found: dict[str, Any] = json.loads(answer)
        return found

    def on_kill(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()


def _operator() -> Any:
    """Where commands run, decided when the DAG files are read."""
    if settings().pod_template is None:
        return ProcessOperator
    from sessionmill_dags.pod_operator import PodOperator

    return PodOperator


Operator: Any = _operator()


class ModelsOperator(Operator):
    """`python -m models …`."""

    module = "models"


class TrainingOperator(ModelsOperator):
    """`python -m models train …`; a pod of it has the GPUs that a training is given."""

    gpus = settings().training_gpus


class PageLink(BaseOperatorLink):
    """A button on the task's page that leads to the report in MLflow."""

    name = "The report"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        return str(getattr(operator, "url", None) or "")


class PageOperator(ModelsOperator):
    """`python -m models report`; the page is a click away from the run."""

    operator_extra_links = (PageLink(),)
    url: str | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        done: dict[str, Any] = super().execute(context)
        self.url = done["url"]
        return done


class JobsOperator(Operator):
    """`python -m jobs …`, for jobs that need no Spark."""

    module = "jobs"
