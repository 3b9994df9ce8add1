"""The one place that builds a SparkSession."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.errors import SettingsError
from jobs.core.settings import settings

if TYPE_CHECKING:
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

S3_STORE = "spark.delta.logStore.s3a.impl"


def configured(app_name: str) -> SparkConf:
    """What the session is made from: ours where nobody else has said it.

    UTC, ANSI, microsecond timestamps (the Parquet default, INT96, cannot be read back beyond the
    year 2262 by other engines), and Delta's snapshot in as many partitions as there are cores
    (its default of 50 makes every commit on a laptop pay for 50 tasks).
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    if "JAVA_HOME" not in os.environ and (Path(sys.prefix) / "bin" / "java").exists():
        os.environ["JAVA_HOME"] = sys.prefix  # the runtime that `make setup` brought
    where = settings()
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # by spark-submit, whatever its master
    master = where.spark_master or (None if submitted else "local[*]")

    from pyspark import SparkConf, SparkContext

    if submitted:
        SparkContext._ensure_initialized()  # else spark-submit's own settings are not known
    conf = SparkConf()
    conf.setAppName(app_name)
    if master:
        conf.setMaster(master)
    local = (master or conf.get("spark.master", "local") or "local").startswith("local")
    if local:
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    partitions = where.shuffle_partitions or (os.cpu_count() or 2 if local else 200)
    values = {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "true",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.shuffle.partitions": str(partitions),
        "spark.databricks.delta.snapshotPartitions": str(min(partitions, 50)),
        # A candidate is an immutable folder: MERGE need not copy its source first.
        "spark.databricks.delta.merge.materializeSource": "none",
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(min(partitions, 50)),
    }
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        # An S3 of one's own: as Arrow and delta-rs read it, and without a host name a bucket.
        values |= {
            "spark.hadoop.fs.s3a.endpoint": endpoint,
            "spark.hadoop.fs.s3a.endpoint.region": os.environ.get("AWS_REGION", "us-east-1"),
            "spark.hadoop.fs.s3a.path.style.access": "true",
        }
    if local:
        values |= {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
        }
        if not submitted:
            values["spark.driver.memory"] = where.driver_memory
    for name, value in values.items():
        if not conf.contains(name) or name.startswith("spark.sql.") or not submitted:
            conf.set(name, value)
    return conf


def get_spark(app_name: str) -> SparkSession:
    """The session every job runs in, whoever started it: python, spark-submit, a test.

    Raises:
        SettingsError: Delta's jars are not there, naming the command that fetches them; Spark or Delta
            are of another version than the jobs were tested with; or the lake is on S3, and Spark's
            commits there would not be safe for two writers.
    """
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    conf = configured(app_name)
    if SparkContext._active_spark_context is None:
        print("  Spark is being started", flush=True)
    with interrupted_after() as hold:
        SparkContext.getOrCreate(conf)
        hold()
        spark = SparkSession.builder.config(conf=conf).getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    jvm: Any = spark._jvm
    if (conf.get("spark.master") or "").startswith("local"):
        _without_stacks(jvm)
    if type(jvm.org.apache.spark.sql.delta.DeltaLog).__name__ == "JavaPackage":
        spark.stop()
        raise SettingsError(
            "Delta's jars are not known to Spark: run `make setup` (it fetches them and names them "
            "in pyspark's spark-defaults.conf), or give spark-submit --packages "
            "io.delta:delta-spark_4.1_2.13:4.4.0 and Delta's two spark.sql settings"
        )
    try:
        check_versions(spark.version, jvm.io.delta.package.VERSION())
    except SettingsError:
        spark.stop()
        raise
    lake = settings().lake
    if lake.startswith("s3") and not spark.sparkContext.getConf().contains(S3_STORE):
        spark.stop()
        raise SettingsError(
            f"SESSIONMILL_LAKE = {lake}, and Spark has no setting {S3_STORE}: run `python "
            "infra/spark/jars.py --s3` (Spark's client for S3, and commits that are safe for two "
            "writers), or give spark-submit what it writes to spark-defaults.conf"
        )
    compile_plans(spark, not settings().short_jobs)
    return spark


@contextlib.contextmanager
def interrupted_after() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until Spark has started, and let it mean afterwards what it meant before.

    A JVM whose start is interrupted goes on for ever without us. And a new SparkContext puts a handler of
    its own in the place of Python's: it calls the JVM in the middle of another call, which ends as an error
    of Spark. Whoever makes one calls what is yielded, to hold back again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed: list[int] = []

    def press(number: int, _: object) -> None:
        if not pressed:  # (by the system's own call: a print may have been interrupted)
            os.write(2, b"interrupted (Ctrl-C): ends as soon as Spark has started\n")
        pressed.append(number)

    def hold() -> None:
        signal.signal(signal.SIGINT, press)

    before = signal.getsignal(signal.SIGINT)
    hold()
    try:
        yield hold
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if pressed:
        raise KeyboardInterrupt


SPARK, DELTA = "4.1", "4.4"
"""The versions, without the patch release, that the jobs were tested with."""


def check_versions(spark: str, delta: str) -> None:
    """Raises: SettingsError: Spark or Delta are of another version than the jobs were tested with.
    (Which features of tables they write, and with what defaults, differs from version to version.)"""
    for name, wanted, found, use in (
        ("Spark", SPARK, spark, "run `make setup`, or give spark-submit of that version"),
        ("Delta", DELTA, delta, "run `make setup`, or give spark-submit --packages "
         "io.delta:delta-spark_4.1_2.13:4.4.0"),
    ):  # fmt: skip
        if found.split(".")[:2] != wanted.split("."):
            raise SettingsError(f"{name} {wanted}.x is needed, found {found}: {use}")


def _without_stacks(jvm: Any) -> None:
    """Leave out of this process's stderr what the exception says that reaches us: the stacks of tasks
    that failed."""
    log4j = jvm.org.apache.logging.log4j
    for name in ("executor.Executor", "scheduler.TaskSetManager"):
        log4j.core.config.Configurator.setLevel(f"org.apache.spark.{name}", log4j.Level.OFF)


# What differs between plans for few rows and for many: (many, few). With few rows, planning costs
# more than running: of 92 stacks of a warm night's driver, 22 were in Delta's choice of files by
# statistics and 32 below the description of a plan, its planning included (LAB_LOG.md).
PLANS = {
    "spark.sql.codegen.wholeStage": ("true", "false"),
    "spark.sql.codegen.factoryMode": ("FALLBACK", "NO_CODEGEN"),
    "spark.sql.adaptive.enabled": ("true", "false"),
    "spark.databricks.delta.stats.skipping": ("true", "false"),
    "spark.sql.ui.explainMode": ("formatted", "simple"),
    "spark.sql.maxPlanStringLength": (str(2**31 - 16), "100"),
}


def compile_plans(spark: SparkSession, yes: bool) -> None:
    """Compile plans, and adapt them as they run; or interpret them as they are written.

    Compiling costs time for each plan, which only many rows give back.
    """
    for name, (many, few) in PLANS.items():
        spark.conf.set(name, many if yes else few)
