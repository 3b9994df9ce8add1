"""A full disk, a read-only lake, two runs at once, kills at any time: a clear word, and no damage."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.pipeline.test_kill import T, command, environment, lines, run_command, tables
from tests.support.spark_tools import Workshop

pytestmark = pytest.mark.long


@contextmanager
def mounted(place: Path, options: str, what: str = "tmpfs") -> Iterator[None]:
    """A file system of the test's own; skips where this machine lets nobody mount one."""
    place.mkdir(parents=True, exist_ok=True)
    kind = ["-t", "tmpfs"] if what == "tmpfs" else []
    done = subprocess.run(
        ["mount", *kind, "-o", options, what, str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no right to mount a file system here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """The file that takes up all the room that its disk has."""
    ballast = place / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while file.write(b"x" * 65_536):
            pass
    return ballast


def test_a_full_disk_is_told_and_repaired_by_running_again(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    calm, shop = Workshop(spark, tmp_path / "calm"), Workshop(spark, tmp_path)
    with mounted(shop.lake_root, "size=6m"):
        for each in (calm, shop):
            each.land("history.csv", lines(range(30), T))
        assert run_command(shop, None).returncode == 0
        calm.run()
        before = tables(shop)
        ballast = fill(shop.lake_root)
        for each in (calm, shop):
            each.land("night.csv", lines(range(20, 50), T + 1000))
        done = run_command(shop, None)
        assert done.returncode == 1
        assert "a disk is full: make room" in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert tables(shop) == before
        ballast.unlink()
        assert run_command(shop, None).returncode == 0
        calm.run()
        assert tables(shop) == tables(calm)


def test_a_read_only_lake_is_told(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("history.csv", lines(range(30), T))
    shop.run()
    before = tables(shop)
    shop.land("night.csv", lines(range(20, 50), T + 1000))
    with mounted(shop.lake_root, "bind", str(shop.lake_root)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(shop.lake_root)], check=True)
        done = run_command(shop, None)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "read-only: mount it for writing" in done.stderr, done.stderr[-2000:]
    assert tables(shop) == before


def test_two_runs_at_once_give_one_result(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    calm, shop = Workshop(spark, tmp_path / "calm"), Workshop(spark, tmp_path)
    for each in (calm, shop):
        each.land("history.csv", lines(range(30), T))
    shop.run()
    for each in (calm, shop):
        each.land("night.csv", lines(range(20, 50), T + 1000))
    calm.run()
    pair = [
        subprocess.Popen(command(shop), env=environment(shop), cwd=shop.folder, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    for process in pair:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0 or "Run it again when the other run has ended" in error, (
            error
        )
    assert 0 in [process.returncode for process in pair]
    assert tables(shop) == tables(calm)
    versions = [shop.version(table) for table in (*shop_tables(),)]
    assert shop.run().read == 0
    assert [shop.version(table) for table in (*shop_tables(),)] == versions


def shop_tables() -> tuple[Any, ...]:
    from jobs.core.tables import EVENTS, ITEMS, REJECTS, SEQUENCES, SESSIONS

    return EVENTS, REJECTS, SESSIONS, ITEMS, SEQUENCES


@pytest.mark.parametrize("quarter", range(4))
def test_killed_at_random_times(
    spark: Any, tmp_path: Path, request: pytest.FixtureRequest, quarter: int
) -> None:
    """Each round a new night lands and its run is killed; after every tenth, all is compared. Every
    third night is ingested by Spark."""
    kills = request.config.getoption("--kills") // 4
    luck = random.Random(20261122 + quarter)
    (tmp_path / "calm").mkdir()
    calm, shop = Workshop(spark, tmp_path / "calm"), Workshop(spark, tmp_path)
    for each in (calm, shop):
        each.land("history.csv", lines(range(30), T))
    began = time.monotonic()
    assert run_command(shop, None).returncode == 0
    whole = time.monotonic() - began
    killed = 0
    for number in range(kills):
        for each in (calm, shop):
            each.land(f"night{number}.csv", lines(range(20, 50), T + 700 * number, number % 3 == 2))
        process = subprocess.Popen(
            command(shop), env=environment(shop), cwd=shop.folder, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        began = time.monotonic()
        try:
            process.wait(luck.uniform(0.2 * whole, whole))
            whole = time.monotonic() - began  # (a machine that was busy at first is quicker now)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the driver with its JVM and its workers
            process.wait()
        killed += process.returncode == -signal.SIGKILL
        if number % 10 == 9 or number == kills - 1:
            done = run_command(shop, None)
            assert done.returncode == 0, done.stderr[-2000:]
            calm.run()
            assert tables(shop) == tables(calm), f"after {number + 1} nights"
            print(f"{killed} of {number + 1} runs killed, tables equal", file=sys.stderr)
    assert killed > kills / 2
