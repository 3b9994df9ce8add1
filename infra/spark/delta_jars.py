"""Delta's jars: fetched once, checked by hash, named to Spark.

    python infra/spark/delta_jars.py

Spark's own resolver fetches them from Maven Central (so no host is named here), with a second
Hadoop, Jackson and log4j left out: the seven jars of `delta-jars.sha256` are enough (13 MB
instead of 87). They are kept in `$SESSIONMILL_JARS_CACHE` (default: the user's cache folder) and
named in the `spark-defaults.conf` of this environment's pyspark, so `python -m jobs`,
`spark-submit` and Airflow's SparkSubmitOperator all find them. A machine that has the jars
needs no network.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
COORDINATES = "io.delta:delta-spark_4.1_2.13:4.4.0"
# What Spark itself ships, or what only other table formats need.
NOT_NEEDED = [
    "com.fasterxml.jackson.core", "com.fasterxml.jackson.datatype", "com.github.luben",
    "com.google.code.findbugs", "commons-logging", "commons-pool", "io.airlift", "javax.annotation",
    "jakarta.annotation", "org.apache.hadoop", "org.apache.logging.log4j", "org.apache.parquet",
    "org.locationtech.jts", "org.roaringbitmap", "org.slf4j", "org.xerial.snappy",
]  # fmt: skip


def wanted() -> dict[str, str]:
    """Jar name -> sha256, as checked in."""
    lines = (HERE / "delta-jars.sha256").read_text().split("\n")
    return {name: digest for digest, name in (line.split() for line in lines if line)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SESSIONMILL_JARS_CACHE") or Path(base) / "sessionmill" / "jars")


def fetch(into: Path) -> None:
    """Let Spark's resolver fetch the jars into a scratch folder, then keep the ones we want."""
    submit = Path(sys.prefix) / "bin" / "spark-submit"
    with tempfile.TemporaryDirectory() as scratch:
        nothing = Path(scratch) / "nothing.py"
        nothing.write_text("")
        command = [
            str(submit), "--packages", COORDINATES,
            "--exclude-packages", ",".join(f"{group}:*" for group in NOT_NEEDED),
            "--conf", f"spark.jars.ivy={scratch}/ivy",
            "--conf", f"spark.jars.ivySettings={HERE / 'ivysettings.xml'}",
            str(nothing),
        ]  # fmt: skip
        env = dict(os.environ, PYSPARK_PYTHON=sys.executable, PYSPARK_DRIVER_PYTHON=sys.executable)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        for name in wanted():
            found = list(Path(scratch).glob(f"ivy/jars/io.*_{name}"))
            if not found:
                sys.exit(
                    f"{name} could not be fetched ({COORDINATES}).\n{done.stderr[-2000:]}\n"
                    "The way out: a machine that reaches Maven Central, or copy the jars of "
                    f"{HERE / 'delta-jars.sha256'} into {into}."
                )
            partial = into / f".{name}.{os.getpid()}"
            shutil.copyfile(found[0], partial)
            partial.rename(into / name)


def main() -> None:
    into = cache_folder()
    into.mkdir(parents=True, exist_ok=True)
    jars = wanted()
    if not all((into / name).exists() and sha256(into / name) == jars[name] for name in jars):
        print(f"fetching Delta's {len(jars)} jars into {into} ...", flush=True)
        fetch(into)
    for name, digest in jars.items():
        if sha256(into / name) != digest:
            sys.exit(
                f"{into / name} has sha256 {sha256(into / name)}, expected {digest}: "
                "delete it and run this again"
            )
    import pyspark

    conf = Path(pyspark.__file__).parent / "conf"
    conf.mkdir(exist_ok=True)
    (conf / "spark-defaults.conf").write_text(
        "# written by infra/spark/delta_jars.py\n"
        f"spark.jars {','.join(str(into / name) for name in jars)}\n"
        "spark.sql.extensions io.delta.sql.DeltaSparkSessionExtension\n"
        "spark.sql.catalog.spark_catalog org.apache.spark.sql.delta.catalog.DeltaCatalog\n"
    )
    print(f"Delta's {len(jars)} jars are in {into}, named in {conf / 'spark-defaults.conf'}")


if __name__ == "__main__":
    main()
