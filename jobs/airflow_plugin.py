"""What a run's deadline is counted from; Airflow finds it by the entry point `airflow.plugins`.

Airflow 3.3 has a reference of its own for this, DAGRUN_QUEUED_AT. A run with such a deadline can no
longer be cleared: the API answers 500, because the interval is taken for a number that is stored as
a document. Clearing is what every page here advises, so the reference is ours.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from airflow.plugins_manager import AirflowPlugin
from airflow.sdk.definitions.deadline import BaseDeadlineReference


class RunQueued(BaseDeadlineReference):
    """When the run was put into the queue."""

    required_kwargs: ClassVar[set[str]] = {"dag_id", "run_id"}

    def _evaluate_with(self, *, session: Any, dag_id: str, run_id: str) -> datetime:
        from airflow.models import DagRun
        from sqlalchemy import select

        wanted = select(DagRun.queued_at).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)
        queued: datetime | None = session.scalar(wanted)
        return queued or datetime.now(UTC)


class SessionmillPlugin(AirflowPlugin):
    name = "sessionmill"
    deadline_references = [RunQueued]  # noqa: RUF012
