"""Files that are missing or damaged, and errors of engines that no job expects: the first line that a
person sees names table, file, cause and remedy, and the remedy works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from jobs.core.settings import settings
from jobs.core.tables import EVENTS, ITEMS, SEQUENCES, SESSIONS, Table
from jobs.lake.delta_errors import first_line
from tests.jobs.lake.test_foreign_changes import third
from tests.support.others import Saved, check_derived, data_files
from tests.support.spark_tools import Workshop


@pytest.fixture(scope="module")
def saved(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(spark, tmp_path_factory.mktemp("errors"))


@pytest.fixture
def shop(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    shop = saved.again()
    monkeypatch.setenv("SESSIONMILL_LAKE", str(shop.lake_root))
    settings.cache_clear()
    yield shop
    settings.cache_clear()


def path_of(shop: Workshop, table: Table) -> Path:
    return Path(table.path(str(shop.lake_root), "clicks"))


def missing(shop: Workshop, table: Table) -> None:
    for file in data_files(path_of(shop, table)):
        file.unlink()


def damaged(shop: Workshop, table: Table) -> None:
    for file in data_files(path_of(shop, table)):
        file.write_bytes(b"nothing of Parquet's")
        (file.parent / f".{file.name}.crc").unlink(missing_ok=True)


def torn(shop: Workshop, table: Table) -> None:
    for file in data_files(path_of(shop, table)):
        file.write_bytes(file.read_bytes()[:-20])
        (file.parent / f".{file.name}.crc").unlink(missing_ok=True)


def log_damaged(shop: Workshop, table: Table) -> None:
    [*_, last] = sorted((path_of(shop, table) / "_delta_log").glob("*.json"))
    last.write_text(last.read_text()[:40])


def run(shop: Workshop, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capfd.readouterr()
    status = cli.main(["run", "--source", str(shop.file), *words])
    said = capfd.readouterr().err
    assert "Traceback" not in said and "\tat " not in said
    for line in said.splitlines():
        if line.startswith("The engine's stack is in "):
            assert "Traceback" in Path(line.removeprefix("The engine's stack is in ")).read_text()
    return status, next(
        (line for line in said.splitlines() if line.startswith("run stopped")), said
    )


Provoke = Callable[[Workshop, Table], None]
CATALOGUE: list[tuple[Provoke, Table, str]] = [
    *((what, table, rf"run stopped: {table.full_name}: file \S+\.parquet is {how}\. .*--source clicks --rebuild$")
      for what, how in ((missing, "missing"), (damaged, "damaged"), (torn, "damaged"))
      for table in (SESSIONS, SEQUENCES)),
    (missing, EVENTS, r"run stopped: bronze\.events: file \S+\.parquet is missing\. Restore the file from a backup"),
    (damaged, EVENTS, r"run stopped: bronze\.events: file \S+\.parquet is damaged\. .*Restore the file from a backup"),
    (log_damaged, ITEMS, r"run stopped: gold\.items cannot be opened: .*restore {path}/_delta_log from a backup"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("provoke", "table", "says"),
    [
        pytest.param(
            *one,
            id=f"{one[0].__name__}-{one[1].full_name}",
            marks=pytest.mark.slow if one[0] is torn or one[1] is ITEMS else pytest.mark.long,
        )
        for one in CATALOGUE
    ],
)
def test_an_engines_error_is_a_sentence(
    shop: Workshop, capfd: pytest.CaptureFixture[str], provoke: Provoke, table: Table, says: str
) -> None:
    import re

    provoke(shop, table)
    third(shop)
    status, line = run(shop, capfd)
    assert status == 1
    assert re.match(says.format(path=re.escape(str(path_of(shop, table)))), line), line
    # (What the balance of the lake finds first was no engine's error.)
    found_by_us = table is ITEMS or "--rebuild" in line
    assert found_by_us or list((shop.lake_root / "clicks/_runs").rglob("*.error.txt"))
    if table in (SESSIONS, SEQUENCES):
        assert run(shop, capfd, "--rebuild")[0] == 0
        check_derived(shop)


def test_an_error_of_ours_is_none_of_an_engine() -> None:
    assert first_line(ValueError("ours")) is None
    assert first_line(KeyError("/srv/sessionmill/jobs/gold/items.py")) is None


def test_the_table_the_file_and_the_cause_are_found_in_what_was_raised_from_what() -> None:
    try:
        try:
            raise FileNotFoundError("No such file: /lake/clicks/silver/sessions/part-0.parquet")
        except FileNotFoundError as error:
            raise RuntimeError("a task failed") from error
    except RuntimeError as error:
        said = first_line(error)
    assert said is not None
    assert said.startswith("silver.sessions: file part-0.parquet is missing. ")
    assert "delete /lake/clicks/silver/sessions: the next run rebuilds the table" in said
