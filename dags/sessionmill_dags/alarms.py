"""Alarms when a task has failed for good, or a run is late: one webhook (jobs/core/webhook.py).

A task is reported after its last try, with what the job itself said (`ops.runs` keeps it), because
"spark-submit ended with 1" helps nobody. A late run is reported once, when its time is over, and
continues. Neither can make anything fail.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import DeadlineAlert, SyncCallback  # type: ignore[attr-defined]  # (its stub lacks them)

from jobs.airflow_plugin import RunQueued
from jobs.core.batches import folder_name, of_airflow
from jobs.core.settings import settings
from jobs.core.webhook import send


def tell_failed(context: Any) -> None:
    """Airflow's callback of a task that failed and is not tried again."""
    task = context["ti"]
    dag_id, run_id = task.dag_id, task.run_id
    source = dag_id.partition(".")[2]
    place = task.task_id + (f" [{task.map_index}]" if task.map_index >= 0 else "")
    why = (
        _said(source, run_id, getattr(task, "start_date", None))
        or str(context.get("exception") or "it was killed, or lost").strip()
    )
    log = getattr(task, "log_url", None)
    send(
        "task failed",
        f"{dag_id}: {place} failed for good, in {run_id}\n{why}\n"
        + (f"Log: {log}\n" if log else "")
        + f"What to do: the page of {dag_id} says it, task by task. Clearing the task is always safe.",
        source=source, dag_id=dag_id, run_id=run_id, task_id=task.task_id,
        map_index=task.map_index, try_number=task.try_number, why=why, log_url=log,
    )  # fmt: skip


def _said(source: str, run_id: str, since: datetime | None) -> str | None:
    """What a job of the run said as it stopped, since the task's last try began; None where none
    did, or nobody can tell. (Other jobs of the run may have begun later, and be well.)"""
    try:
        import pyarrow.dataset as ds
        from deltalake import DeltaTable

        from jobs.core.tables import RUNS
        from jobs.lake.filesystem import rows_of, rust_uri

        batch = folder_name(of_airflow(run_id))
        table = DeltaTable(rust_uri(RUNS.path(settings().table_root(), source)))
        rows = rows_of(table).to_table(
            filter=ds.field("batch") == batch, columns=["job", "outcome", "message", "started_ts"]
        )
        said = [
            row
            for row in rows.to_pylist()
            if row["message"] is not None and (since is None or row["started_ts"] >= since)
        ]
        if not said:
            return None
        last = max(said, key=lambda row: row["started_ts"])
        return f"{last['job']} stopped: {last['outcome']}: {last['message']}"
    except Exception:  # a callback must not fail; the task's own words are sent instead
        return None


def deadline(hours: float, doing: str) -> DeadlineAlert:
    """An alarm when a run has not ended so many hours after it was queued."""
    return DeadlineAlert(
        name=f"{doing}, within {hours:g} h",
        reference=RunQueued(),
        interval=timedelta(hours=hours),
        callback=SyncCallback(tell_late, kwargs={"hours": hours, "doing": doing}),
    )


def tell_late(context: Any, hours: float, doing: str) -> None:
    """Airflow's callback of a run whose deadline has passed; the run goes on."""
    run = context["dag_run"]
    dag_id, run_id = run["dag_id"], run["dag_run_id"]
    send(
        "run late",
        f"{dag_id} is late: {run_id} was to have ended {hours:g} hours after it was queued "
        f"({doing}), and has not. Nothing was stopped: look at its running task's log; if it hangs, "
        "clear that task.",
        source=dag_id.partition(".")[2],
        dag_id=dag_id,
        run_id=run_id,
        hours=hours,
    )
