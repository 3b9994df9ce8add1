"""How tables are read without a JVM."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyarrow import fs

from jobs.lake.filesystem import rows_of
from tests.support.airflow_tools import REPO


@pytest.mark.parametrize("folder", ["plain", "a blank", "über"])
def test_rows_come_by_arrows_own_file_system(tmp_path: Path, folder: str) -> None:
    path, days = tmp_path / folder / "table", ["2024-03-01", "2024-03-02"]
    for number, day in enumerate(days):
        rows = pa.table({"user": [f"u{number}"], "day": [day]})
        write_deltalake(str(path), rows, mode="append", partition_by=["day"])
    first = rows_of(DeltaTable(str(path), version=0))
    assert first.to_table().to_pylist() == [{"user": "u0", "day": days[0]}]
    both = rows_of(DeltaTable(str(path)))
    assert sorted(both.to_table()["day"].to_pylist()) == days
    assert not isinstance(both.filesystem, fs.PyFileSystem)
    assert isinstance(both.filesystem.base_fs, fs.LocalFileSystem)


def test_nobody_reads_tables_by_pythons() -> None:
    """(What Arrow's threads call in Python ends the process by SIGABRT when they are late.)"""
    found = [
        f"{file.relative_to(REPO)}: {line.strip()}"
        for part in ("dags", "expectations", "infra", "jobs", "models")
        for file in (REPO / part).rglob("*.py")
        for line in file.read_text().splitlines()
        if ".to_pyarrow_dataset(" in line or ".to_pyarrow_table(" in line
    ]
    assert found == [
        "jobs/lake/filesystem.py: made = table.to_pyarrow_dataset("
        "filesystem=fs.SubTreeFileSystem(inner, system))"
    ]
