"""The models on a GPU: whether they are right there, and what they cost.

    python benchmarks/gpu.py --quick --out FILE [--device auto|cuda|cpu] [--only STEP,…] [--list]

It needs a checkout, Python 3.11 or 3.12, torch, numpy, pyarrow, safetensors and pytest; no Spark,
no Delta, no MLflow, no pandas, no network. Data are made up, by seed. Without a GPU it runs on the
CPU, with smaller sizes.

`STEPS` are run one after another, each in a process of its own that is ended when its time is up.
FILE (JSON) is written anew after every step. A step is `passed`, `failed`, `timed out`, or
`not run` with its reason. The exit status is 0 only if all steps passed; a step that needs CUDA,
on a machine without it, does not count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

# Tests that need no table. (The others of test_models_methods train, and read tables for it.)
TESTS = (
    "tests/models/networks/test_losses.py", "tests/models/networks/test_layers.py", "tests/models/networks/test_batch.py",
    "tests/models/networks/test_methods.py::test_the_counts_of_paper_a",
    "tests/models/networks/test_methods.py::test_counts_by_formula",
)  # fmt: skip
METHODS = (
    "gru4rec+st+sse+tsa+fb", "narm+tsa", "sasrec+st+sse+tsa", "bert4rec+st+sse+tsa", "hstu+st+tsa",
    "sessionrec-sasrec", "sessionrec-hstu", "sessionrec-gru4rec",
)  # fmt: skip
LOSSES = ("full", "sampled", "gbce")
FLOAT_ERROR = 1e-3  # of a gradient's norm: sums of float32 in another order, through a GRU's steps
BF16_ERROR = 0.05  # of a gradient's norm: bfloat16 has 8 bits; several layers of it
LENGTH = 200


@dataclass(frozen=True)
class Sizes:
    """How much a step does: users of a batch, items, steps that are timed after the first three."""

    batch: int
    items: int
    steps: int


SIZES = {"cuda": Sizes(128, 10_000, 30), "cpu": Sizes(4, 1_000, 3), "tiny": Sizes(2, 50, 1)}


# -- what the steps do: each takes the device and sizes, returns values, raises AssertionError -------


def run_tests(device: str, sizes: Sizes) -> dict[str, Any]:
    """The model tests that need no table: causality, padding, parameter counts, losses, layers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        chosen = TESTS[:1] if sizes is SIZES["tiny"] else TESTS
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
             f"--junitxml={file}", *chosen],
            cwd=REPO, capture_output=True, text=True, check=False,
            env=os.environ | {"TEST_DEVICE": device, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )  # fmt: skip
        if not file.exists():
            raise AssertionError(f"pytest did not run: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        suite = ET.parse(file).getroot()[0]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.get('name')}: {what.get('message', '')[:300]}"
        for case in suite.iter("testcase")
        for what in case
        if what.tag in ("failure", "error", "skipped")
    ]
    # A skipped test has shown nothing.
    if done.returncode or bad or not counts["tests"]:
        raise AssertionError(f"pytest ended with {done.returncode}, {counts}: " + "; ".join(bad))
    return {"tests": counts["tests"]}


def log_of(users: int, length: int, items: int) -> Any:
    """`Rows` of made-up histories, sessions of ten, with feedback and what was shown in vain."""
    import numpy as np
    from histories import histories

    rows = histories(users, length, 10, items)
    rng = np.random.default_rng(8)
    feedback = (rng.random(len(rows.item)) < 0.1).astype(np.int8)  # a tenth is negative
    shown = np.where(np.arange(len(rows.item)) % 5 == 0, 2, 0)  # two items with each fifth event
    return replace(
        rows, feedback=feedback, positive=feedback == 0,
        shown_start=np.concatenate([[0], np.cumsum(shown)]),
        shown=rng.integers(1, items + 1, shown.sum()).astype(np.int32),
    )  # fmt: skip


def learnt(method: str, loss: str, device: str, precision: str) -> tuple[float, Any]:
    """The loss of one batch, and the gradients of all weights in one vector, on the CPU."""
    import numpy as np
    import torch

    from models.networks.methods import config, recommender

    rows = log_of(6, 40, 50)
    sessions = method.startswith("sessionrec")
    target = "next_session" if sessions else "next_item"
    chosen = config(
        method, "small", dim=32, max_len=64, dropout=0.0, loss=loss, target=target, negatives=16,
        alpha=0.3 if sessions else None,  # the rank loss, too
    )  # fmt: skip
    torch.manual_seed(0)
    model = recommender(50, chosen)
    model.fit(rows)
    # Where some start at 0, no gradient would flow through what they are multiplied with.
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape)
    model.precision = precision
    model.to(device)
    tokens = model.training_tokens(
        rows, rows.start[:-1], rows.start[1:], chosen.train, np.random.default_rng(0)
    )
    batch = model.padded(tokens, rows, chosen.train)
    items = torch.randint(50, (16,))
    with drawing(items.to(device)):
        value = model.loss(batch.to(device), chosen.train)
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    return float(value.detach()), torch.cat(gradients)


@contextmanager
def drawing(items: Any) -> Iterator[None]:
    """Sampled losses draw these items: a GPU's random numbers are not the CPU's."""
    import torch

    before = torch.multinomial, torch.randint
    torch.multinomial = torch.randint = lambda *_, **__: items
    try:
        yield
    finally:
        torch.multinomial, torch.randint = before


def held_against(one: tuple[str, str], other: tuple[str, str], bound: float) -> dict[str, Any]:
    """Every method under every loss by two (device, precision): the largest relative differences.

    Raises:
        AssertionError: a loss or a gradient differs by more than the bound; names it.
    """
    worst = {"loss": 0.0, "gradient": 0.0}
    wrong = []
    for method in METHODS:
        for loss in LOSSES:
            (a, grad_a), (b, grad_b) = (learnt(method, loss, *way) for way in (one, other))
            differs = {
                "loss": abs(a - b) / abs(a),
                "gradient": float((grad_a - grad_b).norm() / grad_a.norm()),
            }
            for name, value in differs.items():
                worst[name] = max(worst[name], value)
                if not value <= bound:  # NaN is none of them
                    wrong.append(f"{method}, {loss}: {name} differs by {value:.2e}")
    if wrong:
        raise AssertionError(f"more than {bound:g} of it: " + "; ".join(wrong))
    return {f"largest_{name}_difference": float(f"{value:.3g}") for name, value in worst.items()}


def as_on_cpu(device: str, sizes: Sizes) -> dict[str, Any]:
    """Losses and gradients in float32, beside the CPU's."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # (a GRU's default, and no float32)
    return held_against(("cpu", "float32"), (device, "float32"), FLOAT_ERROR)


def bfloat16(device: str, sizes: Sizes) -> dict[str, Any]:
    """Losses and gradients in bfloat16, beside float32 on the same device."""
    return held_against((device, "float32"), (device, "bfloat16"), BF16_ERROR)


def train_speed(device: str, sizes: Sizes, method: str, dim: int) -> dict[str, Any]:
    """Tokens a second of training, batches made and all, and the most memory that it took."""
    import torch

    from models.core.environment import peak_rss_mb
    from models.networks.methods import config, recommender
    from models.training.epoch import Epoch
    from models.training.fit import Run

    on_gpu = device.startswith("cuda")
    rows = log_of(2 * sizes.batch, LENGTH, sizes.items)
    chosen = config(
        method, "small", dim=dim, layers=2, max_len=LENGTH, batch_size=sizes.batch,
        all_windows=False, loss="full",
    )  # fmt: skip
    torch.manual_seed(0)
    model = recommender(sizes.items, chosen)
    model.fit(rows)
    model.to(device).train()
    epochs = (Epoch(model, rows, chosen, n, device=device) for n in range(1, 10**6))
    run = Run(model, chosen, rows, device, Epoch(model, rows, chosen, 1).team)
    seconds, made = [], []
    warm_up = min(3, sizes.steps)
    for step in range(warm_up + sizes.steps):
        if step % 2 == 0:
            epoch = next(epochs)
        began = time.perf_counter()
        parts = epoch[step % 2]
        made.append(time.perf_counter() - began)
        run.step(parts, 0.5)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    at = run.at
    if not math.isfinite(at.total):
        raise AssertionError(f"the mean loss of {at.count} steps is {at.total / at.count}")
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_rss_mb()
    return {
        "method": method, "dim": dim, "length": LENGTH, "batch": sizes.batch, "items": sizes.items,
        "precision": model.precision, "steps": sizes.steps,
        "tokens_per_second": round(at.seen / at.count / median(seconds[warm_up:])),
        "step_ms": round(1000 * median(seconds[warm_up:]), 2),
        "of_which_making_batches_ms": round(1000 * median(made[warm_up:]), 2),
        "peak_memory_mb": round(memory, 1), "mean_loss": round(at.total / at.count, 4),
    }  # fmt: skip


# -- the steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One thing to see or to measure; `limit_s` is its own, on a GPU (a CPU has four times that)."""

    name: str
    work: Callable[[str, Sizes], dict[str, Any]]
    limit_s: float
    needs_cuda: bool = False


STEPS = [
    Step("tests", run_tests, 60),
    Step("losses as on the CPU", as_on_cpu, 40, needs_cuda=True),
    Step("bfloat16 beside float32", bfloat16, 40),
    *(
        Step(f"{method}, D {dim}", partial(train_speed, method=method, dim=dim), 40)
        for dim in (64, 256)
        for method in ("sasrec", "hstu")
    ),
]
QUICK_S = 180  # of all steps together, on a GPU: what is left then is not run


def machine(device: str) -> dict[str, Any]:
    """What the figures are of."""
    import torch

    found: dict[str, Any] = {
        "device": device, "python": platform.python_version(), "torch": torch.__version__,
        "cores": os.cpu_count(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    if device == "cuda":
        of = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": of.name, "gpu_memory_mb": of.total_memory // 2**20, "cuda": torch.version.cuda,
            "capability": f"{of.major}.{of.minor}", "bf16": torch.cuda.is_bf16_supported(),
        }  # fmt: skip
    return found


def in_a_process(name: str, device: str, size: str, limit_s: float) -> dict[str, Any]:
    """A step in a process of its own, which is ended with its children when its time is up."""
    command = [sys.executable, __file__, "--one", name, "--device", device, "--size", size]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"status": "timed out", "reason": f"not done after {limit_s:.0f} s"}
    last = (out.strip().splitlines() or [""])[-1]
    if process.returncode or not last.startswith("{"):
        said = (err.strip() or out.strip())[-2000:]
        return {"status": "failed", "reason": said or f"ended with {process.returncode}"}
    found: dict[str, Any] = json.loads(last)
    return found


def one(name: str, device: str, size: str) -> None:
    """A step in this process; what came of it as JSON on the last line."""
    step = next(step for step in STEPS if step.name == name)
    try:
        done = {"status": "passed", **step.work(device, SIZES[size])}
    except AssertionError as error:
        done = {"status": "failed", "reason": str(error)[:4000]}
    print(json.dumps(done))


def run_all(chosen: list[Step], device: str, size: str, out: Path | None) -> list[dict[str, Any]]:
    """Every step's result; the file is whole after each of them."""
    began, results = time.perf_counter(), []
    slow = 1 if device == "cuda" else 4
    head = machine(device)
    for step in chosen:
        start = time.perf_counter()
        left = slow * QUICK_S - (start - began)
        if step.needs_cuda and device != "cuda":
            done = {"status": "not run", "reason": "needs CUDA"}
        elif left <= 0:
            done = {"status": "not run", "reason": f"{slow * QUICK_S} s were over"}
        else:
            done = in_a_process(step.name, device, size, min(left, slow * step.limit_s))
        counts = done["status"] != "passed" and not (step.needs_cuda and device != "cuda")
        results.append(
            {"step": step.name, "failed": counts, "seconds": round(time.perf_counter() - start, 1)}
            | done
        )
        if out is not None:
            whole = {"machine": head, "size": size, "planned": [s.name for s in chosen]}
            partial_file = out.with_name(out.name + ".partial")
            partial_file.write_text(json.dumps(whole | {"steps": results}, indent=1) + "\n")
            partial_file.replace(out)
        print(in_words(results[-1]), flush=True)
    return results


def in_words(row: dict[str, Any]) -> str:
    """A line of the table."""
    said = row.get("reason", "").strip().replace("\n", "\n    ")
    if "tokens_per_second" in row:
        said = (
            f"{row['tokens_per_second']:>11,} tokens/s, {row['step_ms']:,.1f} ms a step "
            f"({row['of_which_making_batches_ms']:,.1f} making batches), "
            f"{row['peak_memory_mb']:,.0f} MB, {row['precision']}"
        )
    elif not said:
        skip = ("step", "failed", "seconds", "status")
        said = ", ".join(f"{name} {value}" for name, value in row.items() if name not in skip)
    return f"{row['step']:24} {row['status']:10} {row['seconds']:6.1f} s  {said}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="three minutes on a GPU (so far the only way)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--only", metavar="STEP", action="append", help="may be given again")
    parser.add_argument("--list", action="store_true", help="the steps' names")
    parser.add_argument("--size", choices=SIZES, help="default: the device's; tiny: to try it")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.one:
        one(args.one, args.device, args.size)
        return 0
    names = [step.name for step in STEPS]
    if args.list:
        print("\n".join(names))
        return 0
    if not args.quick:
        parser.error("--quick is the only set of steps so far: give it")
    for name in args.only or []:
        if name not in names:
            parser.error(f"--only {name!r}: one of {', '.join(map(repr, names))}")
    import torch

    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        parser.error("--device cuda: torch finds no CUDA here")
    device = ("cuda" if there else "cpu") if args.device == "auto" else args.device
    chosen = [step for step in STEPS if not args.only or step.name in args.only]
    results = run_all(chosen, device, args.size or device, args.out)
    failed = [row["step"] for row in results if row["failed"]]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
