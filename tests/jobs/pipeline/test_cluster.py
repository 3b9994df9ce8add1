"""The packaged jobs on a standalone Spark master with two workers: the tables of `local[*]`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.pipeline.test_kill import T, lines, tables
from tests.support.spark_tools import Workshop

REPO = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.long


@dataclass
class Cluster:
    """A master and its workers, each in a process group of its own, with the executors it starts."""

    url: str
    page: str
    workers: list[subprocess.Popen[bytes]]

    def state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.page}/json/", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def spark_home() -> Path:
    import pyspark

    return Path(pyspark.__file__).parent


def surroundings() -> dict[str, str]:
    env = dict(os.environ, SPARK_LOCAL_IP="127.0.0.1", SPARK_HOME=str(spark_home()),
               PYSPARK_PYTHON=sys.executable, SPARK_NO_DAEMONIZE="1")  # fmt: skip
    env.pop("PYTHONPATH", None)
    if (Path(sys.prefix) / "bin" / "java").exists():
        env.setdefault("JAVA_HOME", sys.prefix)
    return env


def told(log: Path, pattern: str, process: subprocess.Popen[bytes]) -> str:
    """Wait until a daemon's log says something."""
    for _ in range(600):
        found = re.search(pattern, log.read_text(errors="replace"))
        if found:
            return found.group(1)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"{pattern!r} is not in:\n{log.read_text(errors='replace')[-3000:]}")


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 2) -> Iterator[Cluster]:
    folder.mkdir(parents=True)
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(spark_home() / "bin" / "spark-class"), *words], env=surroundings(),
                cwd=folder, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        running.append(process)
        return process, log

    package = "org.apache.spark.deploy"
    loopback = ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0"]
    try:
        master, log = start("master", f"{package}.master.Master", *loopback)
        url = told(log, r"Starting Spark master at (spark://\S+)", master)
        page = told(log, r"MasterWebUI to \S+, and started at (http://\S+)", master)
        for number in range(workers):
            worker, log = start(
                f"worker{number}", f"{package}.worker.Worker", *loopback, "--cores", "1",
                "--memory", "1g", "--work-dir", str(folder / f"work{number}"), url,
            )  # fmt: skip
            told(log, r"(Successfully registered with master)", worker)
        yield Cluster(url, page, running[1:])
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def wheel() -> Path:
    done = subprocess.run(["make", "wheel"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [built] = (REPO / "dist").glob("*.whl")  # (a make within make says more than the name)
    return built


def submit(shop: Workshop, spark: Cluster, wheel: Path) -> subprocess.Popen[str]:
    env = surroundings() | {
        "SESSIONMILL_LAKE": str(shop.lake_root), "SESSIONMILL_SHUFFLE_PARTITIONS": "4",
        "SESSIONMILL_SHORT_JOBS": "false",  # tasks go to the executors, as those of large logs do
    }  # fmt: skip
    command = [
        str(spark_home() / "bin" / "spark-submit"), "--master", spark.url, "--py-files", str(wheel),
        "--driver-memory", "1g", "--executor-memory", "640m", "--conf", "spark.ui.enabled=false",
        str(REPO / "jobs" / "__main__.py"), "run", "--source", str(shop.file), "--json",
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=env, cwd=shop.folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_cluster_gives_the_same_tables_though_a_worker_dies(
    spark: Any, tmp_path: Path, wheel: Path
) -> None:
    (tmp_path / "calm").mkdir()
    calm, shop = Workshop(spark, tmp_path / "calm"), Workshop(spark, tmp_path)
    with cluster(tmp_path / "cluster") as standalone:
        for each in (calm, shop):
            each.land("history.csv", lines(range(200), T))
        calm.run()
        process = submit(shop, standalone, wheel)
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
        answer = json.loads(out.splitlines()[-1])
        assert (answer["read"], answer["events_new"]) == (202, 200)
        (finished,) = standalone.state()["completedapps"]
        assert finished["state"] == "FINISHED" and finished["cores"] == 2
        assert tables(shop) == tables(calm)

        for each in (calm, shop):
            each.land("night.csv", lines(range(100, 300), T + 1000))
        calm.run()
        process = submit(shop, standalone, wheel)
        for _ in range(600):
            if standalone.state()["activeapps"]:
                break
            time.sleep(0.1)
        time.sleep(5)
        assert process.poll() is None, "the worker is killed while the job runs"
        os.killpg(standalone.workers[0].pid, signal.SIGKILL)
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
        assert tables(shop) == tables(calm)
