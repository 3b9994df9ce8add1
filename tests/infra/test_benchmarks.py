"""The benchmarks run: figures come from them, so they may not rot between two measurements."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.airflow_tools import REPO


def printed(script: str, *options: str) -> Any:
    """The JSON on the last line of a benchmark."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *options, "--threads", "1", "--json"],
        cwd=REPO, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_an_epoch_of_training(tmp_path: Path) -> None:
    draw = random.Random(1)
    lines = [
        f"{user}::{draw.randrange(1, 60)}::5::{978_300_000 + 200_000 * session + 60 * place}\n"
        for user in range(1, 41)
        for session in range(8)
        for place in range(10)
    ]
    (tmp_path / "ratings.dat").write_text("".join(lines))
    (row,) = printed(
        "train", "--ratings", str(tmp_path / "ratings.dat"), "--epochs", "1", "--only", "gru4rec"
    )
    wanted = "method preset epoch_s events_per_second eval_s peak_rss_mb ndcg@10"
    assert set(wanted.split()) <= set(row) and row["method"] == "gru4rec"
    assert row["epoch_s"] > 0 and row["epochs"] == 2 and 0 < row["ndcg@10"] < 1


@pytest.mark.long
def test_a_history_and_a_list() -> None:
    rows = printed(
        "histories", "--lengths", "50", "--methods", "hstu,sessionrec-hstu", "--items", "300",
        "--dim", "16", "--repeat", "1",
    )  # fmt: skip
    assert [row["method"] for row in rows] == ["hstu", "sessionrec-hstu"]
    assert all(row["train_ms_a_history"] > 0 and row["answer_ms"] > 0 for row in rows)
    (row,) = printed("score", "--users", "200", "--methods", "sasrec", "--items", "90", "--k", "5")
    assert row["users"] == 200 and row["users_per_second"] > 0


# What a GPU machine does not have (benchmarks/gpu.py says what it has).
ABSENT = (
    "pyspark", "delta", "deltalake", "mlflow", "pandas", "great_expectations", "airflow", "duckdb",
    "hypothesis", "scipy", "pydantic",
)  # fmt: skip
BLOCKER = f"""
from importlib.machinery import PathFinder

there = PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {ABSENT} else there(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""


def on_a_bare_machine(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, results and words of benchmarks/gpu.py where those packages are not."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    env, out = os.environ | {"PYTHONPATH": str(tmp_path)}, tmp_path / "gpu.json"
    without = subprocess.run(
        [sys.executable, "-c", "import pandas"], env=env, capture_output=True, check=False
    )
    assert b"No module named 'pandas'" in without.stderr
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--quick", "--out", str(out), "--device", "cpu",
         "--size", "tiny", *options],
        cwd=REPO, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(out.read_text()), done.stdout + done.stderr


@pytest.mark.long
def test_models_on_a_machine_without_tables(tmp_path: Path) -> None:
    chosen = ["tests", "losses as on the CPU", "hstu, D 64"]
    words = [word for name in chosen for word in ("--only", name)]
    status, found, said = on_a_bare_machine(tmp_path, *words)
    assert status == 0, said
    assert found["planned"] == [row["step"] for row in found["steps"]] == chosen
    tests, cuda, speed = found["steps"]
    assert tests["status"] == speed["status"] == "passed" and tests["tests"] >= 10
    assert cuda["status"] == "not run" and cuda["reason"] == "needs CUDA"
    assert speed["tokens_per_second"] > 0 and speed["peak_memory_mb"] > 50
    assert speed["dim"] == 64 and speed["length"] == 200 and speed["precision"] == "float32"
    assert all(name in said for name in chosen)


def test_a_step_that_fails_or_takes_too_long_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import gpu

    results = {
        "good": {"status": "passed"}, "wrong": {"status": "failed", "reason": "it differs"},
    }  # fmt: skip
    monkeypatch.setattr(gpu, "in_a_process", lambda name, *_: results[name])
    steps = [gpu.Step(name, gpu.run_tests, 1) for name in results]
    monkeypatch.setattr(gpu, "STEPS", [*steps, gpu.Step("cuda", gpu.run_tests, 1, True)])
    out = tmp_path / "out.json"
    words = ["gpu.py", "--quick", "--device", "cpu", "--size", "tiny", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu.main() == 1
    assert "failed: wrong\n" in capsys.readouterr().err
    told = json.loads(out.read_text())["steps"]
    assert [row["status"] for row in told] == ["passed", "failed", "not run"]
    monkeypatch.setattr(gpu, "QUICK_S", 0)  # nothing is passed over in silence
    assert gpu.main() == 1
    told = json.loads(out.read_text())["steps"]
    assert [row["failed"] for row in told] == [True, True, False]
    assert told[0]["status"] == "not run" and "over" in told[0]["reason"]


def test_a_steps_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import gpu

    done = gpu.in_a_process("tests", "cpu", "tiny", 0.01)
    assert done["status"] == "timed out"
