"""A batch names a run: its candidates, its results, and its rows in `ops.runs`.

A run of Airflow is a batch of its own: `AIRFLOW_BATCH` where templates are filled in, `of_airflow`
elsewhere.
"""

from __future__ import annotations

AIRFLOW_BATCH = "{{ run_id | replace('~', '-') }}"


def of_airflow(run_id: str) -> str:
    """The batch of a run of Airflow, as `AIRFLOW_BATCH` makes it."""
    return run_id.replace("~", "-")


def folder_name(batch: str) -> str:
    """The batch as tables and folders have it."""
    return batch.replace(":", "_")  # Hadoop paths know no colon
