"""The name of a run's batch: the same in Airflow's templates, in folders and in tables."""

from __future__ import annotations

import pytest
from jinja2 import Template

from jobs.core.batches import AIRFLOW_BATCH, folder_name, of_airflow
from jobs.lake.context import checked_batch


@pytest.mark.parametrize(
    "run_id",
    [
        "scheduled__2024-05-01T02:00:00+00:00", "manual__2024-05-01T10:11:12.123456+00:00",
        "backfill__2024-05-01", "asset_triggered__2024-05-01T02:00:00+00:00_a~b~c",
    ],
)  # fmt: skip
def test_a_run_of_airflow_has_one_batch(run_id: str) -> None:
    batch = Template(AIRFLOW_BATCH).render(run_id=run_id)
    assert of_airflow(run_id) == batch
    assert folder_name(batch) == checked_batch(batch)
    assert not set(folder_name(batch)) & set("~:")
