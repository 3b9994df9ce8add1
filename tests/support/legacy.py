"""Lakes and an MLflow store that version 0.1.0 made (tests/fixtures/make_lake_0_1_0.py), unpacked.

The archive was made at another place. What names it is changed as it is unpacked: texts (source
files, MLflow's and the lake's JSON), MLflow's database, and the ledger of files that were read.
`ingest_file` of stored events and `file` of stored rejects stay: they say where a line came from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.core.tables import FILES
from tests.support.spark_tools import Workshop

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "lake_0_1_0.tar.xz"
SOURCES = ("shop", "library")


class Legacy:
    """What 0.1.0 left, in a folder of a test's own."""

    def __init__(self, root: Path) -> None:
        self.root, self.lake = root, root / "lake"
        with tarfile.open(ARCHIVE) as tar:
            # (Python 3.11.2, which Debian has, knows no argument `filter`.)
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(root)
        self.told: dict[str, Any] = json.loads((root / "expected.json").read_text())
        self.place = str(self.told["place"])
        self.tracking_uri = f"sqlite:///{root}/.mlflow/mlflow.db"
        self._texts()
        self._database()
        for source in SOURCES:
            self._ledger(Path(FILES.path(str(self.lake), source)))

    def source(self, name: str) -> str:
        return str(self.root / "sources" / f"{name}.toml")

    def _texts(self) -> None:
        old, new = self.place.encode(), str(self.root).encode()
        for file in self.root.rglob("*"):
            if file.is_file() and file.suffix in (".json", ".toml", ".yaml", "") and (
                "_delta_log" not in file.parts
            ):  # fmt: skip
                text = file.read_bytes()
                if old in text:
                    file.write_bytes(text.replace(old, new))

    def _database(self) -> None:
        with sqlite3.connect(self.root / ".mlflow" / "mlflow.db") as db:
            tables = [
                name
                for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            ]
            for table in tables:
                for _, column, kind, *_ in db.execute(f"PRAGMA table_info({table})").fetchall():
                    if kind.upper().startswith(("VARCHAR", "TEXT")):
                        db.execute(
                            f"UPDATE {table} SET {column} = replace({column}, ?, ?) "
                            f"WHERE instr({column}, ?)",
                            (self.place, str(self.root), self.place),
                        )
        db.close()

    def _ledger(self, table: Path) -> None:
        """Its data files written anew under their names; their sizes and statistics in the log."""
        for file in table.glob("*.parquet"):
            rows = pq.read_table(file)
            at = rows.schema.get_field_index("file")
            names = rows["file"].cast(pa.string())
            moved = pc.replace_substring(names, self.place, str(self.root))
            pq.write_table(rows.set_column(at, "file", moved), file)
        for log in (table / "_delta_log").glob("*.json"):
            entries = [json.loads(line) for line in log.read_text().splitlines()]
            for entry in entries:
                add = entry.get("add")
                if add and (table / add["path"]).exists():
                    add["size"] = (table / add["path"]).stat().st_size
                    add["stats"] = add["stats"].replace(self.place, str(self.root))
            log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


class OldShop(Workshop):
    """A source of that lake, for jobs to run on."""

    def __init__(self, spark: Any, legacy: Legacy, name: str) -> None:
        self.thresholds = None
        self.spark, self.folder, self.lake_root = spark, legacy.root, legacy.lake
        self.landing, self.file = legacy.root / "landing" / name, Path(legacy.source(name))
        self.arrives = legacy.root / "arrives" / name

    def arrive(self) -> list[str]:
        """What the fourth night finds in its landing; the files' names."""
        made = [shutil.copy2(file, self.landing) for file in sorted(self.arrives.iterdir())]
        return [str(file) for file in made]


def digest(rows: Iterable[dict[str, Any]]) -> str:
    """Of rows in any order, as it was recorded."""
    texts = sorted(json.dumps(row, default=str, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
