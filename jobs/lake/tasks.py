"""Tasks: functions of one small thing, a path or a number, that read and write files themselves.

Few run where the job runs, without a JVM; many run in Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.core.arrow_types import arrow_schema

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

TASKS_A_CORE = 2  # ours


def shared_out(spark: SparkSession, rows: list[tuple[Any, ...]], ddl: str) -> DataFrame:
    """Rows that are work to do as a frame, shared out over its partitions.

    (Starting a task of Python costs 0.15 s here: several rows a task, some tasks a core.)
    """
    parts = max(1, min(len(rows), TASKS_A_CORE * spark.sparkContext.defaultParallelism))
    numbered = [(number % parts, *row) for number, row in enumerate(rows)]
    frame = spark.createDataFrame(numbered, f"part int, {ddl}")
    return frame.repartitionById(parts, "part").drop("part")


def run(
    spark: Callable[[], SparkSession] | None,
    task: Callable[[Any], list[dict[str, Any]]],
    todo: list[Any],
    ddl: str,
    kind: str,
) -> list[dict[str, Any]]:
    """The answers of a task to each of `todo`: here, one after another, or in Spark.

    Args:
        spark: gives the session; None: here.
        ddl: the columns of an answer; kind: the type of what is asked.
    """
    if spark is None:
        return [answer for one in todo for answer in task(one)]

    def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        schema = arrow_schema(dict(one.split(" ", 1) for one in ddl.split(", ")))
        for batch in batches:
            for asked in batch.column("asked").to_pylist():
                answers = task(asked)
                if answers:
                    yield pa.RecordBatch.from_pylist(answers, schema=schema)

    frame = shared_out(spark(), [(one,) for one in todo], f"asked {kind}")
    spark_ddl = ddl.replace("bigint", "long")
    return [row.asDict() for row in frame.mapInArrow(work, spark_ddl).collect()]
