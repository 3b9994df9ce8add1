"""Which run published a version of a table."""

from datetime import UTC, datetime
from typing import Any

from models.data.lineage import published, publishers


def run(name: str, hour: int, version: int | None, **other: Any) -> dict[str, Any]:
    out = [] if version is None else [("gold.sequences", version)]
    return {
        "run_id": name, "job": "run", "outcome": "ok",
        "started_ts": datetime(2024, 1, 1, hour, tzinfo=UTC), "tables_out": out,
    } | other  # fmt: skip


RUNS = [
    run("idle, later", 5, 3),
    run("idle", 4, 3),
    run("published", 3, 3),
    run("failed", 2, 3, outcome="failed"),
    run("before", 1, 1),
    run("none", 0, None),
]


def test_a_run_that_found_nothing_to_do_published_nothing() -> None:
    assert published(RUNS, "gold.sequences", 3) == (3, RUNS[2])
    assert [one["run_id"] for one in publishers(RUNS, 3)] == ["published"]


def test_where_no_run_names_the_version() -> None:
    # (Of a table whose newest version packs files: the newest that a run published.)
    assert published(RUNS, "gold.sequences", 2) == (1, RUNS[4])
    assert publishers(RUNS, 2) == []
    assert published(RUNS, "gold.items", 9) is None


def test_another_job_does_not_publish_sequences() -> None:
    assert publishers([run("validated", 3, 3, job="validate")], 3) == []
