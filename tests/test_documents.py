"""What the documents tell people to type, typed: in a copy of this repository, in their order."""

from __future__ import annotations

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

from jobs.sources import load_source
from models import methods
from tests import test_models_batches as batches
from tests.airflow_tools import REPO
from tests.test_models_methods import data_of, fit, ring, write_gold

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


def test_the_readmes_source_files_are_read(tmp_path: Path) -> None:
    first, *more = boxes("README.md", "toml")
    assert len(more) == 2
    for text in (first, first + more[0], first + more[0] + more[1].replace("store =", "article =")):
        file = tmp_path / "clicks.toml"
        file.write_text(text)
        assert load_source(str(file)).name == tomllib.loads(text)["source"]["name"]


def test_the_readme_as_it_is_typed(place: Path) -> None:
    steps = boxes("README.md", "bash")
    source = boxes("README.md", "toml")[0]
    typed(place, CLICKS.replace("%s", source))
    # (A training here takes seconds anyway: two epochs say what thirty would, of the command.)
    shorter = {"--epochs 30": "--epochs 2", '"sasrec*,': '"sasrec,', "--seeds 1,2": "--seeds 1"}
    quick = steps
    for word, less in shorter.items():
        quick = [box.replace(word, less) for box in quick]
    nights, spark, grid, champion = quick
    said = typed(place, nights)
    assert "2,400 new events" in said and "registered model clicks" in said
    # (The environment is this one: it is not to be made anew for a copy.)
    assert "0 new events" in typed(place, spark.replace("make wheel", "make -o .venv/.jars wheel"))
    assert "item_knn" in typed(place, grid)
    # There is one champion to go back to only after another one: the README's number is a person's.
    forced, rollback = champion.replace("--model-version 7", "--model-version 2"), "models rollback"
    lines = forced.strip().splitlines()
    assert [rollback in line for line in lines] == [False, False, True, False]
    typed(
        place,
        "\n".join(lines[:2]).replace(
            "promote --source clicks   ",
            "promote --source clicks --model-version 1 --force --reason first   ",
        ),
    )
    typed(place, "\n".join(lines[2:]))


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
