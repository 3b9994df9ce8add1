"""Delta's jars, and those for S3: fetched once, checked by hash, named to Spark; and Spark's logging.

    python infra/spark/jars.py [--s3] [--inside] [--conf FOLDER]

Spark's own resolver fetches them from Maven Central (so no host is named here), with what Spark
ships itself left out: of Delta the seven jars of `delta-jars.sha256` are enough (13 MB instead of
87). `--s3` adds those of `s3-jars.sha256`, once and for all runs after it (S3's Java SDK is 640 MB,
so who has no object store does not fetch it), and our log store for it, compiled here. They are kept in `$SESSIONMILL_JARS_CACHE` (default:
the user's cache folder) and named in the `spark-defaults.conf` of this environment's pyspark, so
`python -m jobs`, `spark-submit` and Airflow's SparkSubmitOperator all find them; `--inside` copies
them to pyspark's own jars instead, which is for images, and `--conf` writes the configuration
to another folder (for SPARK_CONF_DIR). A machine that has the jars needs no
network.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CONF = """\
spark.sql.extensions io.delta.sql.DeltaSparkSessionExtension
spark.sql.catalog.spark_catalog org.apache.spark.sql.delta.catalog.DeltaCatalog
"""
S3_CONF = """\
spark.delta.logStore.s3a.impl sessionmill.ConditionalPutLogStore
"""
# Spark's own, but from the start on without warnings (a busy machine makes it print stacks of them), and
# without what the driver says again when a task failed.
LOGGING = """\
# written by infra/spark/jars.py
rootLogger.level = error
rootLogger.appenderRef.stderr.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{yy/MM/dd HH:mm:ss} %p %c{1}: %m%n%ex
logger.python.name = org.apache.spark.api.python.PythonGatewayServer
logger.python.level = error
logger.inbox.name = org.apache.spark.rpc.netty.Inbox
logger.inbox.level = off
"""
LOG_STORE = HERE / "ConditionalPutLogStore.java"


@dataclass(frozen=True)
class Jars:
    """Jars that go together; `name` is also that of the file with their hashes."""

    name: str
    coordinates: str
    not_needed: tuple[str, ...]
    """Groups of which the resolver fetches nothing."""
    conf: str

    @property
    def wanted(self) -> dict[str, str]:
        """Jar -> sha256, as checked in."""
        lines = (HERE / f"{self.name}-jars.sha256").read_text().split("\n")
        return {jar: digest for digest, jar in (line.split() for line in lines if line)}


DELTA = Jars(
    "delta",
    "io.delta:delta-spark_4.1_2.13:4.4.0",
    # What Spark itself ships, or what only other table formats need.
    (
        "com.fasterxml.jackson.core", "com.fasterxml.jackson.datatype", "com.github.luben",
        "com.google.code.findbugs", "commons-logging", "commons-pool", "io.airlift",
        "javax.annotation", "jakarta.annotation", "org.apache.hadoop", "org.apache.logging.log4j",
        "org.apache.parquet", "org.locationtech.jts", "org.roaringbitmap", "org.slf4j",
        "org.xerial.snappy",
    ),
    CONF,
)  # fmt: skip
COMPILER = "ecj-3.43.0.jar"  # Eclipse's: a runtime has none
S3 = Jars("s3", "org.apache.hadoop:hadoop-aws:3.4.2,org.eclipse.jdt:ecj:3.43.0", (), S3_CONF)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SESSIONMILL_JARS_CACHE") or Path(base) / "sessionmill" / "jars")


def fetch(jars: Jars, into: Path) -> None:
    """Let Spark's resolver fetch the jars into a scratch folder, then keep the ones we want."""
    submit = Path(sys.prefix) / "bin" / "spark-submit"
    with tempfile.TemporaryDirectory() as scratch:
        nothing = Path(scratch) / "nothing.py"
        nothing.write_text("")
        left_out = ",".join(f"{group}:*" for group in jars.not_needed)
        command = [
            str(submit), "--packages", jars.coordinates,
            *(["--exclude-packages", left_out] if left_out else []),
            "--conf", f"spark.jars.ivy={scratch}/ivy",
            "--conf", f"spark.jars.ivySettings={HERE / 'ivysettings.xml'}",
            str(nothing),
        ]  # fmt: skip
        env = dict(os.environ, PYSPARK_PYTHON=sys.executable, PYSPARK_DRIVER_PYTHON=sys.executable,
                   SPARK_LOCAL_HOSTNAME="localhost")  # fmt: skip
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        for name in jars.wanted:
            found = list(Path(scratch).glob(f"ivy/jars/*_{name}"))
            if not found:
                sys.exit(
                    f"{name} could not be fetched ({jars.coordinates}).\n{done.stderr[-2000:]}\n"
                    "To fix it: use a machine that reaches Maven Central, or copy the jars of "
                    f"{HERE / jars.name}-jars.sha256 into {into}."
                )
            partial = into / f".{name}.{os.getpid()}"
            shutil.copyfile(found[0], partial)
            partial.rename(into / name)


def have(jars: Jars, into: Path) -> None:
    """Fetch what is missing or another; end where what came is not what was checked in."""
    wanted = jars.wanted.items()
    if not all((into / name).exists() and sha256(into / name) == digest for name, digest in wanted):
        print(f"fetching {len(jars.wanted)} jars ({jars.name}) into {into} ...", flush=True)
        fetch(jars, into)
    for name, digest in wanted:
        if sha256(into / name) != digest:
            sys.exit(
                f"{into / name} has sha256 {sha256(into / name)}, expected {digest}: "
                "delete it and run this again"
            )


def compiled(into: Path) -> str:
    """Our log store for S3 as a jar among the others; its name."""
    import pyspark

    name = f"sessionmill-logstore-{sha256(LOG_STORE)[:12]}.jar"
    if (into / name).exists():
        return name
    home = os.environ.get("JAVA_HOME")
    own = Path(sys.prefix) / "bin" / "java"
    java = Path(home) / "bin" / "java" if home else own if own.exists() else "java"
    spark = Path(pyspark.__file__).parent / "jars"
    known = [*spark.glob("hadoop-client-api-*.jar"), *(into / jar for jar in DELTA.wanted),
             *(into / jar for jar in S3.wanted if jar.startswith("hadoop-aws"))]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [str(java), "-jar", str(into / COMPILER), "--release", "17", "-d", scratch,
             "-classpath", os.pathsep.join(map(str, known)), str(LOG_STORE)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{LOG_STORE} does not compile:\n{done.stdout}{done.stderr}")
        partial = into / f".{name}.{os.getpid()}"
        with zipfile.ZipFile(partial, "w") as jar:
            for file in Path(scratch).rglob("*.class"):
                jar.write(file, file.relative_to(scratch))
        partial.rename(into / name)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description="Delta's jars, and those for S3")
    parser.add_argument("--s3", action="store_true", help="those for S3, too")
    parser.add_argument("--inside", action="store_true", help="copy them into pyspark (images)")
    parser.add_argument("--conf", type=Path, help="folder of spark-defaults.conf")
    args = parser.parse_args()
    into = cache_folder()
    into.mkdir(parents=True, exist_ok=True)
    import pyspark

    home = Path(pyspark.__file__).parent
    conf = (args.conf or home / "conf") / "spark-defaults.conf"
    there = conf.read_text() if conf.exists() else ""
    sets = [DELTA, S3] if args.s3 or S3.conf in there else [DELTA]
    for jars in sets:
        have(jars, into)
    names = [name for jars in sets for name in jars.wanted if name != COMPILER]
    if S3 in sets:
        names.append(compiled(into))
    if args.inside:
        for name in names:
            shutil.copyfile(into / name, home / "jars" / name)
    conf.parent.mkdir(parents=True, exist_ok=True)
    conf.write_text(
        "# written by infra/spark/jars.py\n"
        + ("" if args.inside else f"spark.jars {','.join(str(into / name) for name in names)}\n")
        + "".join(jars.conf for jars in sets)
    )
    (conf.parent / "log4j2.properties").write_text(LOGGING)
    place = home / "jars" if args.inside else into
    print(f"{len(names)} jars ({' and '.join(s.name for s in sets)}) are in {place}; {conf}")


if __name__ == "__main__":
    main()
