"""Tasks: functions of one small thing, a path or a number, that read and write files themselves.

Few run where the job runs, without a JVM; many run in Spark, one a partition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.arrow import arrow_schema

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(
    spark: Callable[[], SparkSession] | None, task: Callable[[Any], list[dict[str, Any]]],
    todo: list[Any], ddl: str, kind: str,
) -> list[dict[str, Any]]:  # fmt: skip
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

    frame = spark().createDataFrame(
        [(number, one) for number, one in enumerate(todo)], f"number int, asked {kind}"
    )
    frame = frame.repartitionById(max(1, len(todo)), "number").select("asked")
    spark_ddl = ddl.replace("bigint", "long")
    return [row.asDict() for row in frame.mapInArrow(work, spark_ddl).collect()]
