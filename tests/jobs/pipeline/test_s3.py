"""The lake on an object store: a real S3-compatible server on loopback (`make test-s3`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable, write_deltalake

from jobs.core.tables import EVENTS, ITEMS, REJECTS, SEQUENCES, SESSIONS
from tests.jobs.pipeline.test_kill import MOVING, T, lines
from tests.support.airflow_tools import REPO, local
from tests.support.spark_tools import CLICKS

pytestmark = pytest.mark.s3
GATEWAY = REPO / "build" / "bin" / "versitygw"
KEY, SECRET = "tester", "of-a-test-only"


@dataclass
class Store:
    """A server, and what its clients are told."""

    folder: Path
    """Its buckets as folders: `company` is one."""
    env: dict[str, str]
    log: Path

    def python(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], env=os.environ | self.env | more, cwd=self.folder,
            capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip

    def begun(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words], env=os.environ | self.env | more, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    if not GATEWAY.exists():
        pytest.skip("no S3-compatible server here: `make test-s3` builds one")
    folder, port = tmp_path_factory.mktemp("s3"), local().free_port()
    (folder / "buckets" / "company").mkdir(parents=True)
    endpoint = f"http://127.0.0.1:{port}"
    env = {
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "PYTHONPATH": str(REPO),
        "SPARK_CONF_DIR": str(REPO / "build" / "spark-s3"), "SESSIONMILL_SPARK_MASTER": "local[2]",
        "SESSIONMILL_DRIVER_MEMORY": "1g", "SESSIONMILL_LAKE": "s3a://company/lake",
        "SESSIONMILL_CACHE": str(folder / "cache"), "SESSIONMILL_ID_KEY": "k" * 32,
    }  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [GATEWAY, "--port", f"127.0.0.1:{port}", "posix", folder / "buckets"],
            env=os.environ | {"ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET},
            stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not _answers(endpoint):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Store(folder, env, log)
    finally:
        server.terminate()
        server.wait(20)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # (it wants a signature)
    except OSError:
        return False
    return True


def tables(lake: str, options: dict[str, str] | None) -> list[Any]:
    """All tables of `clicks`, without what depends on the run and on where files lie."""
    found = {}
    for table in (EVENTS, REJECTS, SESSIONS, ITEMS, SEQUENCES):
        rows = DeltaTable(table.path(lake, "clicks"), storage_options=options).to_pyarrow_table()
        found[table] = rows.drop_columns([c for c in MOVING if c in rows.column_names]).to_pylist()
    names = {row["item_index"]: row["item_id"] for row in found[ITEMS]}
    for row in found[SEQUENCES]:
        row["item_index"] = [names[index] for index in row["item_index"]]
    for row in found[ITEMS]:
        del row["item_index"]
    return [sorted(rows, key=lambda row: json.dumps(row, default=str)) for rows in found.values()]


def test_nights_on_s3_are_those_of_a_folder_and_two_at_once_lose_nothing(
    store: Store, tmp_path: Path
) -> None:
    places = {"s3": store.folder / "buckets" / "company" / "landing", "calm": tmp_path / "landing"}
    sources = {"s3": tmp_path / "s3.toml", "calm": tmp_path / "calm.toml"}
    for name, landing in (("s3", "s3a://company/landing"), ("calm", str(places["calm"]))):
        places[name].mkdir()
        sources[name].write_text(CLICKS.replace("{landing}", landing))

    def deliver(name: str, users: range, start: int) -> None:
        for place in places.values():
            (place / name).write_text(lines(users, start))

    run = ("-m", "jobs", "run", "--source", str(sources["s3"]))
    deliver("history.csv", range(60), T)
    done = store.python(*run)
    assert done.returncode == 0, done.stderr[-3000:]
    # Sessions change: rows are replaced, by a commit that Spark makes.
    deliver("night.csv", range(20, 50), T + 1000)
    done = store.python(*run)
    assert done.returncode == 0 and "30 changed" in done.stdout, done.stdout + done.stderr[-3000:]
    # Two processes at once, as a person's by hand beside the scheduler's.
    deliver("second-night.csv", range(10, 40), T + 2000)
    both = [store.begun(*run) for _ in range(2)]
    for one in both:
        said, _ = one.communicate(timeout=900)
        assert one.returncode == 0, said[-3000:]

    calm = store.python(
        "-m",
        "jobs",
        "run",
        "--source",
        str(sources["calm"]),
        SESSIONMILL_LAKE=str(tmp_path / "lake"),
    )
    assert calm.returncode == 0, calm.stderr[-3000:]
    assert tables("s3://company/lake", store.env) == tables(str(tmp_path / "lake"), None)

    # What comes after the tables, and what tends them, reads and writes there, too.
    def typed(*words: str) -> None:
        done = store.python(
            "-m", *words, "--source", str(sources["s3"]),
            MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db",
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr[-3000:])

    typed("jobs", "validate")
    typed("jobs", "maintain", "--keep-days", "1")
    for method in ("pop", "personal_top"):
        typed("models", "train", "--method", method, "--comparison", "first")
    typed("models", "compare", "--comparison", "first")
    typed("models", "register", "--comparison", "first")
    typed("jobs", "score", "--alias", "challenger")
    typed("models", "report")
    page = store.folder / "buckets" / "company" / "lake" / "clicks" / "report.html"
    shown = re.findall(r"\bu\d+\b", page.read_text())
    assert shown, "the page has lists of some users beside their last sessions"
    typed("jobs", "forget", "--user", shown[0])
    for table in (EVENTS, SESSIONS, SEQUENCES):
        found = DeltaTable(table.path("s3://company/lake", "clicks"), storage_options=store.env)
        users = set(found.to_pyarrow_table(columns=["user_id"])["user_id"].to_pylist())
        assert shown[0] not in users and len(users) == 59
    name = re.compile(rf"\b{shown[0]}\b".encode())
    for place in (store.folder / "buckets", store.folder / "cache", tmp_path / "artifacts"):
        there = [file for file in place.rglob("*") if file.is_file()]
        assert not [file for file in there if name.search(file.read_bytes())]
    assert not page.exists()


STORE = """
from jobs.lake.spark import get_spark

spark = get_spark("store")
jvm, conf = spark._jvm, spark._jsc.hadoopConfiguration()
path = jvm.org.apache.hadoop.fs.Path("s3a://company/store/1.json")
files = path.getFileSystem(conf)
store = jvm.sessionmill.ConditionalPutLogStore(conf)

def write(*lines, overwrite=False):
    some = jvm.java.util.ArrayList()
    for line in lines:
        some.add(line)
    try:
        store.write(path, some.iterator(), overwrite, conf)
        return "written"
    except Exception as error:
        return str(error.java_exception.getClass().getName())

print("SAYS", write("a", "b"))
print("SAYS", write("a", "c"))
print("SAYS", write("a", "b"))
print("SAYS", write("x", overwrite=True))

# Why it is there: two who create one file as Hadoop's other stores do both succeed.
plain = jvm.org.apache.hadoop.fs.Path("s3a://company/store/2.json")
one, two = files.create(plain, False), files.create(plain, False)
one.write(b"one")
two.write(b"two")
one.close()
two.close()
print("SAYS both")
print("SAYS", spark.conf.get("spark.delta.logStore.s3a.impl"))
"""


def test_a_version_is_written_once(store: Store) -> None:
    done = store.python("-c", STORE)
    said = re.findall(r"^SAYS (.*)$", done.stdout, re.M)
    assert said == [
        "written", "java.nio.file.FileAlreadyExistsException",
        "written",  # (its own lines: an answer that was lost)
        "written", "both", "sessionmill.ConditionalPutLogStore",
    ], done.stdout + done.stderr[-3000:]  # fmt: skip
    place = store.folder / "buckets" / "company" / "store"
    assert (place / "1.json").read_text() == "x\n"
    assert (place / "2.json").read_text() == "two"


APPEND = """
import sys
from concurrent.futures import ThreadPoolExecutor
from jobs.lake.spark import get_spark

spark = get_spark("append")

def append(number):
    rows = spark.createDataFrame([(sys.argv[1], number)], "who string, number long").coalesce(1)
    rows.write.format("delta").mode("append").save("s3a://company/appended")

with ThreadPoolExecutor(2) as pool:
    list(pool.map(append, range(20)))
"""


def test_two_sparks_and_delta_rs_append_to_one_table(store: Store) -> None:
    import pyarrow as pa

    def append(who: str, number: int) -> None:
        write_deltalake(
            "s3://company/appended", pa.table({"who": [who], "number": [number]}), mode="append",
            storage_options=store.env,
        )  # fmt: skip

    append("rust", 0)
    sparks = [store.begun("-c", APPEND, name) for name in ("left", "right")]
    number = 0
    while any(one.poll() is None for one in sparks):
        number += 1
        append("rust", number)
    for one in sparks:
        said, _ = one.communicate()
        assert one.returncode == 0, said[-3000:]
    found = DeltaTable("s3://company/appended", storage_options=store.env)
    rows = found.to_pyarrow_table().to_pylist()
    want = [("rust", n) for n in range(number + 1)]
    want += [(who, n) for who in ("left", "right") for n in range(20)]
    assert sorted((row["who"], row["number"]) for row in rows) == sorted(want)
    assert found.version() == len(want) - 1
    print(f"{len(want)} commits, {store.log.read_text().count('| 412 |')} refused and made again")
