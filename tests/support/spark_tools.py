"""What tests of the Spark jobs share: a lake, a landing folder, jobs run in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from pyspark import SparkContext

from jobs.core.plan import Thresholds
from jobs.core.source_file import Source, load_source
from jobs.core.tables import Table
from jobs.lake.context import Context, Result, checked_batch
from jobs.lake.delta import Lake
from jobs.pipeline.steps import run_job

CLICKS = """
[source]
name = "clicks"
landing = "{landing}/*.csv"
format = "csv"

[columns]
user_id = "user"
item_id = "item"
event_ts = "ts"

[time]
unit = "s"
"""


class Workshop:
    """A source with its landing folder and its lake, in a folder of a test's own."""

    def __init__(
        self, spark: Any, folder: Path, toml: str = CLICKS, thresholds: Thresholds | None = None,
        lake: str = "a läke",
    ) -> None:  # fmt: skip
        self.spark, self.folder, self.thresholds = spark, folder, thresholds
        # (Whoever names files by URLs, as table logs do, stumbles over these names.)
        self.landing, self.lake_root = folder / "landing of files", folder / lake
        self.landing.mkdir(parents=True, exist_ok=True)
        self.file = folder / "source.toml"
        self.describe(toml)

    def describe(self, toml: str) -> None:
        """Write the source file (again)."""
        self.file.write_text(toml.replace("{landing}", str(self.landing)))

    @property
    def source(self) -> Source:
        return load_source(str(self.file))

    def start(self) -> Any:
        """What a process's first need of Spark does: from here on columns can be named."""
        SparkContext._active_spark_context = self.spark.sparkContext
        return self.spark

    @property
    def lake(self) -> Lake:
        return Lake(self.start, str(self.lake_root), self.source.name)

    def land(self, name: str, text: str | bytes) -> Path:
        path = self.landing / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, str):
            text = text.encode()
        path.write_bytes(text)
        return path

    def context(self, day: str | None = None, batch: str | None = None) -> Context:
        made = Context(
            self.source, self.lake, date.fromisoformat(day) if day else None,
            checked_batch(batch),
        )  # fmt: skip
        return made if self.thresholds is None else replace(made, thresholds=self.thresholds)

    def run(
        self, job: str = "run", day: str | None = None, step: str = "all",
        batch: str | None = None, options: Mapping[str, Any] | None = None,
    ) -> Result:  # fmt: skip
        chosen = {"rebuild": False, "table": None} | dict(options or {})
        # As in a process of its own, where Spark starts when the job first asks for it.
        SparkContext._active_spark_context = None
        try:
            return run_job(self.context(day, batch), job, step, chosen)
        finally:
            self.start()

    def run_steps(self, day: str | None, batch: str) -> None:
        """A night as its DAG runs it: each step alone."""
        for job in ("ingest", "sessionize", "items", "sequences"):
            for step in ("all",) if job == "items" else ("compute", "audit", "publish"):
                self.run(job, day, step, batch)

    def table(self, table: Table) -> DeltaTable:
        return DeltaTable(table.path(str(self.lake_root), self.source.name))

    def rows(self, table: Table, drop: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """The table as another engine reads it, without columns that a re-run may change."""
        found = self.table(table).to_pyarrow_table()
        rows = found.drop_columns([name for name in drop if name in found.column_names])
        return sorted(rows.to_pylist(), key=lambda row: json.dumps(row, default=str))

    def version(self, table: Table) -> int:
        return self.table(table).version()
