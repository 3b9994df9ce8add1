"""What lies in a landing: logs, what lies beside them, and tables that are no folders of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.core.errors import SourceError
from jobs.lake.landed import landed, refuse_tables

LOGS = ("a.csv", "b.CSV.GZ", "part-0001", "readme-2024.csv", "md5sums.csv")
BESIDE = (
    "c.csv.tmp", "d.csv.inprogress", "README.md", "readme", "a.csv.sha256", "SHA256SUMS", ".a.crc",
    "_SUCCESS", "_temporary/0/e.csv", "checksums.txt", "f.csv~",
)  # fmt: skip


def names(paths: list[str], root: Path) -> set[str]:
    return {Path(path).relative_to(root).as_posix() for path in paths}


def test_what_lies_beside_logs_is_left_out_and_told(tmp_path: Path) -> None:
    for name in (*LOGS, *BESIDE):
        path = tmp_path / "sub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for pattern in (f"{tmp_path}/sub", f"{tmp_path}/*", f"{tmp_path}/sub/*"):
        skipped: list[str] = []
        found = [path for path, *_ in landed(pattern, skipped=skipped)]
        assert names(found, tmp_path / "sub") == set(LOGS)
        left = names(skipped, tmp_path / "sub")
        assert left == {name.split("/")[0] for name in BESIDE}


def test_a_landing_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.csv").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [path for path, *_ in landed("~/logs/*.csv")] == [f"{tmp_path}/logs/a.csv"]


def test_what_a_landing_names_is_read(tmp_path: Path) -> None:
    for name in BESIDE[:4]:
        (tmp_path / name).write_text("x")
    for pattern, wanted in (
        ("*.tmp", {"c.csv.tmp"}),
        ("README.md", {"README.md"}),
        ("*.csv", set()),
    ):
        found = [path for path, *_ in landed(f"{tmp_path}/{pattern}")]
        assert names(found, tmp_path) == wanted


@pytest.mark.parametrize(
    ("mark", "file", "word"),
    [
        ("_delta_log/0.json", "day=1/a.parquet", "Delta table"),
        ("metadata/v1.metadata.json", "data/day=1/a.parquet", "Iceberg table"),
        (".hoodie/hoodie.properties", "a.parquet", "Hudi table"),
    ],
)
def test_a_table_is_no_folder_of_files(tmp_path: Path, mark: str, file: str, word: str) -> None:
    for name in (mark, file):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text("x")
    landing = f"{tmp_path}/t/{Path(file).parent}/*.parquet"
    with pytest.raises(SourceError, match=f"files of the {word} {tmp_path}/t, which"):
        refuse_tables(landing, [path for path, *_ in landed(landing)])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.parquet").write_text("x")
    refuse_tables("l", [f"{tmp_path}/other/a.parquet"])
