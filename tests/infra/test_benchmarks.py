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
from tests.support.gold_world import DAY, SECOND, write_gold


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


@pytest.mark.slow
def test_what_habit_and_refits_cost(tmp_path: Path) -> None:
    draw = random.Random(1)
    users = {
        f"u{user}": [
            (f"i{draw.randrange(30)}", day * DAY + (user * 60 + place) * SECOND, day + 1)
            for day in range(8)
            for place in range(4)
        ]
        for user in range(30)
    }
    write_gold(tmp_path, "shop", users)
    source = tmp_path / "shop.toml"
    source.write_text(
        """
[source]
name = "shop"
landing = "landing/*.csv"
format = "csv"
[columns]
user_id = "u"
item_id = "i"
event_ts = "t"
[time]
unit = "s"
[filters]
min_item_events = 1
min_user_sessions = 1
"""
    )

    def rows_of(script: str, *options: str) -> Any:
        done = subprocess.run(
            [sys.executable, f"benchmarks/{script}.py", "--source", str(source), "--json", *options],
            cwd=REPO, env=os.environ | {"SESSIONMILL_LAKE": str(tmp_path)}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    words = ("--split", "last_item", "--backbones", "gru4rec", "--turns", "1", "--epochs", "2")
    (habit,) = rows_of("habit", *words)
    assert habit["events"] > 500 and habit["items"] == 30
    assert habit["ratio"] == pytest.approx(habit["epoch_cpu_s_habit"] / habit["epoch_cpu_s"])
    (refit,) = rows_of("refit", "--methods", "gru4rec", "--nights", "2")
    assert refit["nights"] == 2 and refit["users"] == 30
    assert refit["low"] <= refit["difference"] <= refit["high"]
    assert refit["cost"] == pytest.approx(refit["warm_s"] / refit["scratch_s"])


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
        [sys.executable, "benchmarks/gpu.py", "--out", str(out), "--device", "cpu",
         "--size", "tiny", *options],
        cwd=REPO, env=env, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(out.read_text()), done.stdout + done.stderr


@pytest.mark.long
def test_models_on_a_machine_without_tables(tmp_path: Path) -> None:
    chosen = [
        "tests", "losses as on the CPU", "speed of hstu", "resumed after SIGKILL",
        "two processes on one card", "an epoch of paper A", "scoring", "encodings",
    ]  # fmt: skip
    words = [word for name in chosen for word in ("--only", name)]
    status, found, said = on_a_bare_machine(tmp_path, *words)
    assert status == 0, said
    assert found["planned"] == [row["step"] for row in found["steps"]] == chosen
    tests, cuda, speed, resumed, _, epoch, scored, encodings = found["steps"]
    assert {row["status"] for row in found["steps"] if row is not cuda} == {"passed"}
    assert tests["found"][0]["tests"] >= 10
    assert cuda["status"] == "not run" and cuda["reason"] == "needs CUDA"
    sizes = [(row["dim"], row["length"]) for row in speed["found"]]
    assert sizes == [(256, 1024), (64, 200)]
    for row in speed["found"]:
        assert row["tokens_per_second"] > 0 and row["peak_memory_mb"] > 50 and row["tflops"] > 0
        assert row["share_of_peak"] is None and row["device_waits"] is None  # of a CPU: not known
    assert speed["found"][1]["precision"] == "float32"
    assert resumed["found"][-1] == {"equal_to_the_last_bit": True}
    assert epoch["found"][0]["epoch_s"] > 0
    assert all(row["listed_users_per_second"] > 0 for row in scored["found"])
    assert [row["method"] for row in encodings["found"]] == [
        "sasrec", "sasrec+st", "sasrec+sse", "sasrec+tsa", "sasrec+fb", "sasrec+habit",
    ]  # fmt: skip
    assert all(name in said for name in chosen) and "tokens/s" in said


def test_a_step_that_fails_or_takes_too_long_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = gpu_module(monkeypatch)
    results = {
        "good": {"status": "passed"}, "wrong": {"status": "failed", "reason": "it differs"},
    }  # fmt: skip
    out = tmp_path / "out.json"
    half_way = []

    def done(name: str, device: str, size: str, limit_s: float, each: Any) -> dict[str, Any]:
        each([{"tests": 1}])
        half_way.append(json.loads(out.read_text())["steps"][-1])
        return results[name]

    monkeypatch.setattr(gpu, "in_a_process", done)
    steps = [gpu.Step(name, gpu.gpu_steps.run_tests, 1, quick=True) for name in results]
    cuda = gpu.Step("cuda", gpu.gpu_steps.run_tests, 1, True, quick=True)
    monkeypatch.setattr(gpu, "STEPS", [*steps, cuda, gpu.Step("slow", gpu.gpu_steps.run_tests, 1)])
    words = ["gpu.py", "--quick", "--device", "cpu", "--size", "tiny", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu.main() == 1
    assert "failed: wrong\n" in capsys.readouterr().err
    told = json.loads(out.read_text())["steps"]
    assert [row["status"] for row in told] == ["passed", "failed", "not run"]
    # What a step has found is kept while it runs: nobody knows whether it will end.
    assert half_way[0] == {"step": "good", "status": "running", "found": [{"tests": 1}]}
    monkeypatch.setattr(gpu, "QUICK_S", 0)  # nothing is passed over in silence
    assert gpu.main() == 1
    told = json.loads(out.read_text())["steps"]
    assert [row["failed"] for row in told] == [True, True, False]
    assert told[0]["status"] == "not run" and "over" in told[0]["reason"]


def test_a_steps_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_module(monkeypatch)
    done = gpu.in_a_process("tests", "cpu", "tiny", 0.01, lambda found: None)
    assert done["status"] == "timed out" and done["found"] == []


def test_a_step_that_ends_without_a_word_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = gpu_module(monkeypatch)
    broken = tmp_path / "broken.py"
    broken.write_text("print('{\"tests\": 3}', flush=True)\nraise SystemExit('no CUDA')")
    monkeypatch.setattr(gpu, "__file__", str(broken))
    done = gpu.in_a_process("tests", "cpu", "tiny", 60, lambda found: None)
    assert done == {"status": "failed", "reason": "no CUDA", "found": [{"tests": 3}]}


def gpu_module(patch: pytest.MonkeyPatch) -> Any:
    patch.syspath_prepend(str(REPO / "benchmarks"))
    import gpu

    return gpu


def test_what_was_measured_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_module(monkeypatch)
    cell = {"method": "hstu", "dim": 512, "length": 1024, "loss": "full"}
    measured = cell | {"tokens_per_second": 12_345, "share_of_peak": 0.3512, "device_waits": None}
    results = [{"found": [measured]}, {"found": [cell | {"out_of_memory": True}, {"tests": 3}]}]
    head, first, second = gpu.table(results).splitlines()
    assert head.split()[:4] == ["method", "way", "D", "L"] and "of peak" in head
    assert "12,345" in first and "0.351" in first and "out of memory" in second
    assert gpu.table([{"found": [{"tests": 3}]}, {}]) == ""


@pytest.mark.parametrize(
    ("gpu_name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12), ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12), ("NVIDIA H200 NVL", "bfloat16", 835e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12), ("NVIDIA A100-PCIE-40GB", "float32", 19.5e12),
        ("NVIDIA L4", "bfloat16", 121e12), ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA A10", "bfloat16", 125e12), ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None), ("NVIDIA H100", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", None),
    ],
)  # fmt: skip
def test_a_card_that_is_not_known_has_no_peak(
    gpu_name: str, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_module(monkeypatch).gpu_steps.peak_of(gpu_name, precision) == peak


@pytest.mark.parametrize("loss", ["full", "sampled"])
@pytest.mark.parametrize(
    "method",
    ["sasrec", "sasrec+tsa", "bert4rec", "hstu+tsa", "gru4rec", "gru4rec+tsa", "sessionrec-sasrec"],
)
def test_operations_by_formula_are_those_that_torch_counts(
    method: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide and short, as torch counts causal attention as if it were not."""
    from torch.utils.flop_counter import FlopCounterMode

    from models.core.process_group import ALONE
    from models.networks.methods import config
    from models.training.epoch import Epoch
    from models.training.fit import Run

    steps = gpu_module(monkeypatch).gpu_steps
    sessions = method.startswith("sessionrec")
    rows = steps.log_of(8, 120 if sessions else 12, 700)
    chosen = config(
        method, "small", dim=64, layers=2, max_len=12, batch_size=8, all_windows=False, loss=loss,
        negatives=90, target="next_session" if sessions else "next_item",
    )  # fmt: skip
    model = steps.model_of(chosen, 700, rows, "cpu")
    run = Run(model, chosen, rows, "cpu", ALONE)
    parts = Epoch(model, rows, chosen, 1)[0]
    with FlopCounterMode(display=False) as counted:
        run.step(parts, 0.5)
    positions = sum(part.token.numel() for part in parts)
    classes = 700 if loss == "full" else 91
    want = steps.operations(chosen, positions, 12, parts.labels, classes)
    assert want == pytest.approx(counted.get_total_flops(), rel=0.08)


def test_a_step_that_waits_for_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card: torch is told when to refuse waiting, and what it refuses is reported."""
    import torch

    from models.core.on_device import OnDevice
    from models.training.fit import Run

    steps = gpu_module(monkeypatch).gpu_steps
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(OnDevice, "pin_memory", lambda self: self)
    monkeypatch.setattr(steps, "METHODS", ("sasrec+habit", "sessionrec-hstu+habit"))
    (found,) = steps.no_waits("cpu", steps.SIZES["tiny"])
    assert found == {"steps_without_waiting": 12} and modes == ["error", "default"] * 12
    taken = Run.step

    def waits(self: Run, *how: Any) -> None:
        taken(self, *how)
        if modes[-1] == "error" and "habit" in self.model.encodings:
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(Run, "step", waits)
    with pytest.raises(AssertionError, match=r"sasrec\+habit, full, float32: called a synch"):
        list(steps.no_waits("cpu", steps.SIZES["tiny"]))
    assert modes[-1] == "default"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_where_kernels_cannot_be_seen_waiting_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from models.core.process_group import ALONE
    from models.training.epoch import Epoch
    from models.training.fit import Run

    steps = gpu_module(monkeypatch).gpu_steps
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model, chosen, rows, _ = steps.small_batch("sasrec", "full")
    run = Run(model, chosen, rows, "cpu", ALONE)
    assert steps.busy(run, Epoch(model, rows, chosen, 1)[0]) is None
