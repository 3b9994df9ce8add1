"""Shared by all tests: one Spark session a worker, a clean environment."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.recorded import World

for name in [name for name in os.environ if name.startswith("SESSIONMILL_")]:
    del os.environ[name]
# Short JVM lives: the second compiler and the check of the jars' byte code cost more than they give, and
# a larger young generation saves collections (one history of three nights: 87 s before, 70 with 400 MB).
os.environ.setdefault(
    "JAVA_TOOL_OPTIONS",
    # (The first compiler alone gets 48 MiB for its code. A JVM of many tests fills them; the thread that
    # then removes code had taken 3.4 of 16.4 minutes of its processor time.)
    "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC -Xmn256m "
    "-XX:+UnlockDiagnosticVMOptions -XX:-BytecodeVerificationRemote",
)
# Spark keeps a hundred generated classes. More are kept here, so that nights and tests may share them.
os.environ.setdefault(
    "PYSPARK_SUBMIT_ARGS", "--conf spark.sql.codegen.cache.maxEntries=2000 pyspark-shell"
)


# Tests that start no JVM, no server and no other process of ours, and end in seconds: `make test-quick`.
QUICK = (
    "test_rooms.py", "infra/test_reference.py", "infra/test_source_file_page.py", "infra/test_prose.py", "jobs/audit/test_arrow_checks.py", "jobs/audit/test_balance.py",
    "jobs/records/test_compression.py",
    "jobs/reading/test_formats.py", "jobs/records/test_expressions.py", "jobs/records/test_boundary.py",
    "jobs/records/test_explode.py", "jobs/reading/test_json_blocks.py", "jobs/reading/test_guess.py",
    "jobs/lake/test_landed.py", "jobs/sources/test_database.py", "jobs/core/", "jobs/lake/test_commits.py",
    "jobs/lake/test_filesystem.py", "jobs/lake/test_refused_tables.py",
    "jobs/recommend/test_rules.py",
    "jobs/bronze/test_file_checks.py", "jobs/silver/test_unusual_sessions.py", "jobs/silver/test_cut_users.py", "jobs/silver/test_links.py", "models/data/",
    "models/evaluation/", "models/networks/",
    "models/selection/test_compare.py",
    "models/serving/test_rules.py",
)  # fmt: skip


LONGER = (
    "models/evaluation/test_sequential.py",
    "models/networks/test_habit.py",
    "models/networks/test_side.py",
    "models/evaluation/test_components.py",
)
"""Of these rooms, but too long for a minute."""


def is_quick(path: Path) -> bool:
    place = path.relative_to(Path(__file__).parent).as_posix()
    return place.startswith(QUICK) and place not in LONGER


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where the quick tests are asked for, the other files are not even read: their imports cost more
    than a third of the minute."""
    if not config.option.markexpr.startswith("quick") or collection_path.is_dir():
        return None
    return None if is_quick(collection_path) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_quick(item.path):
            assert "spark" not in getattr(item, "fixturenames", ()), f"{item.nodeid} starts a JVM"
            item.add_marker(pytest.mark.quick)
    if part := config.getoption("part"):
        number, parts = map(int, part.split("/"))
        slow = Counter(item.path for item in items if is_slow(item))
        files = in_parts(slow, parts)[number - 1]
        left = [item for item in items if is_slow(item) and item.path not in files]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if is_slow(item) and item.path in files]


def is_slow(item: pytest.Item) -> bool:
    return "slow" in item.keywords and "long" not in item.keywords


def in_parts(tests_of_file: Mapping[Path, int], parts: int) -> list[set[Path]]:
    """Files in `parts` sets with about as many tests each. Whole files: tests of one file may build on
    what those before them left."""
    made: list[set[Path]] = [set() for _ in range(parts)]
    for file in sorted(tests_of_file, key=lambda file: (-tests_of_file[file], file)):
        min(made, key=lambda files: sum(tests_of_file[one] for one in files)).add(file)
    return made


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", help="K/N: the slow tests of every N-th file, about, from the K-th")
    parser.addoption("--kills", type=int, default=200, help="kills at random times (long)")


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Spark session for all tests of a worker: a JVM costs 8 to 15 seconds."""
    from jobs.lake.spark import get_spark

    home = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("spark"))
    os.environ["SESSIONMILL_SPARK_MASTER"] = "local[2]"
    os.environ["SESSIONMILL_DRIVER_MEMORY"] = "2g"
    from jobs.core.settings import settings

    settings.cache_clear()
    session = get_spark("tests")
    del os.environ["SESSIONMILL_SPARK_MASTER"], os.environ["SESSIONMILL_DRIVER_MEMORY"]
    settings.cache_clear()
    os.chdir(home)
    yield session
    session.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A small log with an MLflow of its own, for the module's tests."""
    from tests.support.recorded import opened

    with opened(tmp_path_factory.mktemp("recorded")) as there:
        yield there
