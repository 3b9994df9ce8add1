"""SIGKILL between compute and publish, then the same command: nothing doubled, nothing missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.core import crash_points
from jobs.core.tables import EVENTS, ITEM_ATTRIBUTES, ITEMS, REJECTS, SEQUENCES, SESSIONS
from tests.support.spark_tools import CLICKS, Workshop

T = 1_700_000_000
MOVING = ("ingest_ts", "ingest_file", "first_seen_ts", "file")


def lines(users: range, start: int, unusual: bool = False) -> str:
    """Args: unusual: whether one has a time that only Spark types, so that the night is Spark's."""
    rows = [f"u{user},i{user % 7},{start + user * 100}" for user in users]
    rows += [f"u1,i1,{start}.25"] * unusual
    return "\n".join(["user,item,ts", *rows, "u1,,5", "u2,i,never"]) + "\n"


CATALOGUE = """
[items]
landing = "{landing}/../catalogue/*.csv"
format = "csv"
id = "item"
categories = ["kind"]
"""


def catalogue(shop: Workshop, night: int) -> None:
    """Items 0 to night+2; what is said of them does not change."""
    folder = shop.folder / "catalogue"
    folder.mkdir(exist_ok=True)
    rows = [f"i{item},{'odd' if item % 2 else 'even'}" for item in range(night + 3)]
    (folder / "items.csv").write_text("\n".join(["item,kind", *rows]) + "\n")


def environment(shop: Workshop) -> dict[str, str]:
    return dict(os.environ, SESSIONMILL_LAKE=str(shop.lake_root), SESSIONMILL_DRIVER_MEMORY="1g",
                SESSIONMILL_SPARK_MASTER="local[2]", TZ="America/Sao_Paulo")  # fmt: skip


def command(shop: Workshop) -> list[str]:
    return [sys.executable, "-m", "jobs", "run", "--source", str(shop.file), "--json"]


def run_command(shop: Workshop, point: str | None) -> subprocess.CompletedProcess[str]:
    env = environment(shop) | ({"SESSIONMILL_CRASH_AT": point} if point else {})
    return subprocess.run(command(shop), env=env, cwd=shop.folder, capture_output=True, text=True)


def tables(shop: Workshop) -> list[Any]:
    """All tables as an undisturbed run would leave them, times of ingestion apart."""
    names = {row["item_index"]: row["item_id"] for row in shop.rows(ITEMS)}
    sequences = [
        {**row, "item_index": [names[index] for index in row["item_index"]]}
        for row in shop.rows(SEQUENCES)
    ]
    items = [{**row, "item_index": None} for row in shop.rows(ITEMS)]
    made = [EVENTS, REJECTS, SESSIONS, *([ITEM_ATTRIBUTES] if shop.source.items else [])]
    rows = [shop.rows(table, drop=MOVING) for table in made]
    return [*rows, sequences, sorted(items, key=lambda row: row["item_id"])]


def killed_and_repaired(
    spark: Any, tmp_path: Path, points: list[str], unusual: bool, calm_first: bool = False
) -> None:
    """Nights that are killed are processes of their own; what comes before and after them is the
    same code in ours.

    Args:
        unusual: whether the nights are ingested by Spark.
        calm_first: whether the history is read before: then the first killed night, too, changes
            sessions.
    """
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    calm = Workshop(spark, tmp_path / "calm", CLICKS + CATALOGUE)
    killed = Workshop(spark, tmp_path / "killed", CLICKS + CATALOGUE)
    for shop in (calm, killed):
        shop.land("history.csv", lines(range(30), T))
        catalogue(shop, 0)
    if calm_first:
        killed.run()
    for number, point in enumerate(points):
        for shop in (calm, killed):
            shop.land(f"night{number}.csv", lines(range(20, 50), T + 1000 * number, unusual))
            catalogue(shop, number + 1)
        done = run_command(killed, point)
        assert done.returncode == -signal.SIGKILL, (point, done.stderr[-2000:])
    killed.run()
    calm.run()  # all at once: the tables are a function of the set of lines
    assert tables(killed) == tables(calm)


@pytest.mark.long
@pytest.mark.parametrize("unusual", [False, True])
def test_killed_between_compute_and_publish_of_each_table(
    spark: Any, tmp_path: Path, unusual: bool
) -> None:
    points = ["ingest.events-published", "sessionize.audited", "items.attributes-published"]
    killed_and_repaired(spark, tmp_path, points, unusual, calm_first=True)


@pytest.mark.long
@pytest.mark.parametrize("unusual", [False, True])
@pytest.mark.parametrize("third", range(3))
def test_killed_at_every_point(spark: Any, tmp_path: Path, third: int, unusual: bool) -> None:
    """One night after the other: each has to mend what the one before it left."""
    killed_and_repaired(spark, tmp_path, list(crash_points.POINTS[third::3]), unusual)


def test_a_mistake_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[source]\nname = 'x'\n")
    words = [sys.executable, "-m", "jobs", "run", "--source", str(tmp_path / "bad.toml")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "source.landing is missing" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([*words, "--day", "tomorrow; rm -rf /"], capture_output=True, text=True)
    assert done.returncode == 2 and "write YYYY-MM-DD" in done.stderr


def test_an_object_store_that_is_away_is_told(tmp_path: Path) -> None:
    (tmp_path / "clicks.toml").write_text(CLICKS.replace("{landing}", str(tmp_path)))
    env = os.environ | {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ALLOW_HTTP": "true",
        "SESSIONMILL_LAKE": "s3a://company/lake",
    }  # fmt: skip
    words = [sys.executable, "-m", "jobs", "run", "--source", str(tmp_path / "clicks.toml")]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "check AWS_ENDPOINT_URL" in done.stderr
    assert "s3a://company/lake" in done.stderr and "Traceback" not in done.stderr
