"""What the documents tell people to type, typed: in a copy of this repository, in their order."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deltalake import DeltaTable

from jobs.core.source_file import load_source
from models.networks import methods
from tests.jobs.pipeline.test_cluster import cluster
from tests.models.networks import test_batch as batches
from tests.models.networks.test_methods import data_of, fit, ring, write_gold
from tests.support.airflow_tools import REPO

PARTS = ("dags", "expectations", "infra", "jobs", "models", "pyproject.toml", "README.md", "LICENSE",
         "Makefile", "requirements.lock")  # fmt: skip
BOX = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def boxes(document: str, kind: str) -> list[str]:
    """The boxes of one kind, in their order."""
    return [text for found, text in BOX.findall((REPO / document).read_text()) if found == kind]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A copy as of a fresh clone, with this environment."""
    there = tmp_path / "sessionmill"
    there.mkdir()
    for part in PARTS:
        whole = REPO / part
        if whole.is_dir():
            shutil.copytree(whole, there / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(whole, there / part)
    (there / ".venv").symlink_to(sys.prefix)
    yield there


def typed(place: Path, box: str, **more: str) -> str:
    """What a box answers; it must end well, each of its commands."""
    unset = ("MLFLOW_TRACKING_URI", "PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"SESSIONMILL_DRIVER_MEMORY": "1g", "PYTHONPATH": str(place)} | more
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", box], cwd=place, env=env, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{box}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.long
def test_your_own_log_as_it_is_typed(place: Path) -> None:
    steps = boxes("docs/your-own-log.md", "bash")
    assert steps[0] == "make setup\n" and len(steps) == 8
    said = [typed(place, box) for box in steps[1:]]
    assert len((place / "landing" / "clicks" / "log.csv").read_text().splitlines()) == 40_001
    again = typed(place, steps[3])
    assert "40,000 new events" in said[2] and "0 new events" in again
    assert re.match(r"4\d{3} sessions", said[3]), said[3]
    assert "gru4rec+st" in said[4] and "report.html" in said[5]
    assert "is version" in said[6] and "gold.recommendations version 1 (400 rows)" in said[6]


CLICKS = """
mkdir -p landing/clicks landing/catalogue landing/promotions
.venv/bin/python - <<'END' > landing/clicks/log.csv
print("visitor,article,ts")
for visitor in range(60):
    for click in range(40):
        print(f"v{visitor},a{(visitor + click) % 12},{1717200000000 + visitor + click * 7000000}")
END
cat > infra/sources/clicks.toml <<'END'
%s
[training]
methods = ["pop", "gru4rec"]
END
"""


GUIDE = "docs/guides/source-file.md"


def test_the_guides_source_files_are_read(tmp_path: Path) -> None:
    first, *more = boxes(GUIDE, "toml")
    assert boxes("README.md", "toml") == [first]
    people, items, shown = sorted(
        more, key=lambda one: ("[identity]", "[items]", "[exposures]").index(one.split()[0])
    )
    shown = shown.replace("store =", "article =")
    for text in (first, first + people, first + items, first + items + shown):
        file = tmp_path / "clicks.toml"
        file.write_text(text)
        assert load_source(str(file)).name == tomllib.loads(text)["source"]["name"]


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 120


@pytest.mark.long
def test_the_readme_as_it_is_typed(place: Path) -> None:
    [box], [source] = boxes("README.md", "bash"), boxes("README.md", "toml")
    typed(place, CLICKS.replace("%s", source))
    said = typed(place, box)
    assert "2,400 new events" in said and "gru4rec+st" in said


@pytest.mark.long
def test_the_guides_as_they_are_typed(place: Path) -> None:
    guides = (GUIDE, *(f"docs/guides/{one}.md" for one in ("spark-submit", "methods", "champion")))
    steps = [box for guide in guides for box in boxes(guide, "bash")]
    typed(place, CLICKS.replace("%s", boxes(GUIDE, "toml")[0]))
    # (A training here takes seconds anyway: two epochs say what thirty would, of the command.)
    shorter = {
        "--epochs 30": "--epochs 2", '"sasrec*,': '"sasrec,sasrec+st,', "--trials 20": "--trials 2",
        "--max-seeds 8 --detect 3": "--max-seeds 3 --detect 3 -- --epochs 2",
        "--gaps 600,1800,7200,86400 --seeds 1,2": "--gaps 600,86400 --seeds 1 -- --epochs 2",
    }  # fmt: skip
    quick = steps
    for word, less in shorter.items():
        assert any(word in box for box in quick), word
        quick = [box.replace(word, less) for box in quick]
    nights, spark, grid, power, seeds, rules, tuning, champion = quick
    said = typed(place, nights)
    assert "2,400 new events" in said and "registered model clicks" in said
    # (The environment is this one: it is not to be made anew for a copy.)
    assert "0 new events" in typed(place, spark.replace("make wheel", "make -o .venv/.jars wheel"))
    assert "item_knn" in typed(place, grid)
    assert "seeds" in typed(place, power) and "look" in typed(place, seeds)
    assert "gap 600" in typed(place, rules)
    assert "the recipe that is used" in typed(place, tuning)
    # There is one champion to go back to only after another one: the guide's number is a person's.
    forced, rollback = champion.replace("--model-version 7", "--model-version 2"), "models rollback"
    lines = forced.strip().splitlines()
    assert [rollback in line for line in lines] == [False, False, True, False, False]
    typed(
        place,
        "\n".join(lines[:2]).replace(
            "promote --source clicks   ",
            "promote --source clicks --model-version 1 --force --reason first   ",
        ),
    )
    typed(place, "\n".join(lines[2:]))


def test_decisions_are_short_and_name_their_code() -> None:
    """Each record has its context, decision, price and code, in fewer than 15 lines; the code names it."""
    text = (REPO / "docs" / "design" / "decisions.md").read_text()
    records = re.split(r"^## ", text, flags=re.M)[1:]
    assert [int(one.split(".")[0]) for one in records] == list(range(1, len(records) + 1))
    for record in records:
        assert len(record.strip().splitlines()) < 15, record
        parts = re.findall(r"^\* \*\*(\w+)\.\*\*", record, re.M)
        assert parts == ["Context", "Decision", "Price", "Code"], record
        named = re.findall(r"`([\w/]+\.py)`", record.split("**Code.**")[1])
        number = record.split(".")[0]
        for file in named:
            [said] = re.findall(r"Decisions? ([\d and]+) in docs/design/decisions\.md", (REPO / file).read_text())  # fmt: skip
            assert number in said.split(" and "), (file, number)
        assert named, record
    assert len(records) >= 15


# -- the runbook: commands in its sentences -------------------------------------------------------

COMMAND = re.compile(r"`((?:SESSIONMILL_ID_KEY=\S+ )?python -m [^`]+ --source [^`]+)`")
TWICE = """
.venv/bin/python -m jobs run --source clicks
for method in pop item_knn; do
    .venv/bin/python -m models train --source clicks --method $method --comparison $method
    .venv/bin/python -m models compare --source clicks --comparison $method
    .venv/bin/python -m models register --source clicks --comparison $method
    .venv/bin/python -m models promote --source clicks --force --reason first
done
"""


@pytest.mark.long
def test_the_runbook_as_it_is_typed(place: Path) -> None:
    document = "docs/runbook.md"
    asked = set(COMMAND.findall((REPO / document).read_text()))
    typed(place, CLICKS.replace("%s", boxes("README.md", "toml")[0]))
    log = place / "landing" / "clicks" / "log.csv"
    log.write_text(log.read_text() + "v7,,1717200000000\n")
    typed(place, TWICE)
    sessions = DeltaTable(str(place / "lake" / "clicks" / "silver" / "sessions"))
    session = sessions.to_pyarrow_table(columns=["session_id"])["session_id"][0].as_py()

    def command(beginning: str, **words: str) -> str:
        """A command of the document, its SOURCE and the like filled in."""
        [found] = [each for each in asked if each.startswith(beginning)]
        asked.remove(found)
        for word, meant in {"SOURCE": "clicks", **words}.items():
            found = found.replace(word, meant)
        return typed(place, found.replace("python -m", ".venv/bin/python -m"))

    [box] = boxes(document, "bash")
    assert "v7,,1717200000000" in typed(place, box.replace("SOURCE", "clicks"))
    assert "report.html" in command("python -m models report")
    assert session in command("python -m jobs explain", ID=session)
    assert "0 new events" in command("python -m jobs replay-rejects")
    assert "0 new events" in command("python -m jobs run --source SOURCE --rebuild")
    assert "0 new events" in command("python -m jobs run --source SOURCE --reload")
    command("python -m jobs validate")
    assert "clicks/1" in command("python -m models rollback", **{"…": "complaints"})
    assert "gold.recommendations version" in command("python -m jobs score")
    assert "only 60 users to compare on" in command("python -m models promote")
    source = place / "infra" / "sources" / "clicks.toml"
    source.write_text(source.read_text() + "\n[sessions]\ngap_s = 9000\n")
    assert "(60 rows)" in command("python -m jobs sessionize")
    assert "v7," in log.read_text()
    key = "0123456789abcdef0123456789abcdef"
    command("SESSIONMILL_ID_KEY=", **{"…": key, "user ID": "user v7"})
    assert "v7," not in log.read_text()
    assert not asked, f"the runbook has commands that no test types: {asked}"


# -- from laptop to cluster -----------------------------------------------------------------------


@pytest.mark.long
def test_a_cluster_as_it_is_typed(place: Path) -> None:
    submit, _torchrun = boxes("docs/cluster.md", "bash")  # (tests/models/training: torchrun)
    [containers] = boxes("docs/guides/containers.md", "bash")
    typed(place, CLICKS.replace("%s", boxes("README.md", "toml")[0]))
    with cluster(place / "cluster") as standalone:
        for word, meant in {
            "make wheel": "make -o .venv/.jars wheel", "s3a://company/lake": f"{place}/lake",
            "spark://host:7077": standalone.url,
        }.items():  # fmt: skip
            assert word in submit
            submit = submit.replace(word, meant)
        said = json.loads(typed(place, submit, SPARK_LOCAL_IP="127.0.0.1").splitlines()[-1])
        [finished] = standalone.state()["completedapps"]
    assert said["events_new"] == 2400 and finished["state"] == "FINISHED"
    secrets, compose = containers.strip().splitlines()
    typed(place, secrets)
    if subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False
    ).returncode:
        pytest.skip("typed all but `docker compose`: there is none here")
    up = "up --detach --scale spark-worker=2"
    assert up in compose
    typed(place, compose.replace(up, "config --quiet"))


def test_what_needs_a_cluster_names_files_that_are_there() -> None:
    documents = ("docs/cluster.md", "docs/guides/object-store.md", "docs/guides/kubernetes.md")
    plain = "".join(text for document in documents for text in boxes(document, ""))
    named = set(re.findall(r"infra/[\w./-]+", plain))
    assert {"infra/kubernetes/settings.yaml", "infra/docker/Dockerfile"} <= named
    assert [name for name in named if not (REPO / name).exists()] == ["infra/sources/clicks.toml"]
    manifests = "".join(each.read_text() for each in (REPO / "infra" / "kubernetes").glob("*.yaml"))
    for kind, name in re.findall(r"create (configmap|secret generic) ([\w-]+)", plain):
        assert name in manifests, f"no manifest asks for the {kind} {name}"
    assert set(re.findall(r"--target \$role", plain)) and "orchestrator spark train" in plain


# -- classes that a person writes -----------------------------------------------------------------


def written(number: int, name: str) -> Any:
    """A class of docs/extend.md, as if it had a file of its own."""
    space: dict[str, Any] = {"__name__": "written"}
    exec(boxes("docs/extend.md", "python")[number], space)
    return space[name]


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.ENCODINGS, "pause", written(0, "Pause"))
    monkeypatch.setitem(methods.BACKBONES, "decay", written(1, "Decay"))


@pytest.mark.usefixtures("extended")
@pytest.mark.parametrize(
    ("base", "encodings"), [("decay", ""), ("decay", "+st+sse+tsa"), ("decay", "+pause"), ("sasrec", "+pause")]
)  # fmt: skip
def test_what_the_document_writes_is_honest(base: str, encodings: str) -> None:
    batches.test_causality(base, encodings, "known")
    batches.test_padding_changes_no_score(base, encodings, "tiny")


@pytest.mark.usefixtures("extended")
def test_what_the_document_writes_learns(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", ring(users=30))
    data = data_of(tmp_path)
    for name in ("decay+pause", "gru4rec+st+pause"):
        fitted = fit(methods.config(name, "tiny", epochs=4), data, lambda _: None)
        assert fitted.curves["loss"][-1] < fitted.curves["loss"][0]
    counts = methods.count_parameters(10_000, methods.config("decay+pause", "tiny"))
    dim = methods.config("decay", "tiny").model.dim
    assert counts["num_params_added"] == 16 * dim


@pytest.mark.usefixtures("extended")
def test_the_command_of_the_document_knows_the_method(place: Path) -> None:
    [box] = boxes("docs/extend.md", "bash")
    assert "parameters" in typed(place, box)
    torch.manual_seed(0)
    pause = written(0, "Pause")(methods.config("sasrec", "tiny").model)
    batch = batches.trained_on("sasrec", batches.rows_of([(1, 10, 1), (2, 20, 1), (3, 4000, 2)]))
    moved = pause.embed(torch.zeros(*batch.token.shape, pause.table.shape[1]), batch)[0]
    assert np.allclose(moved[-1].detach(), pause.table[5].detach())  # 3,980 s: 4^5 to 4^6
