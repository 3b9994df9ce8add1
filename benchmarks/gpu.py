"""The models on a GPU: whether they are right there, and what they cost.

    python benchmarks/gpu.py --out FILE [--quick] [--device auto|cuda|cpu] [--only STEP …] [--list]

It needs a checkout, Python 3.11 or 3.12, torch 2.11 or newer, numpy, pyarrow, safetensors and
pytest; no Spark, no Delta, no MLflow, no pandas, no network. Data are made up, by seed. On a GPU it
takes 8 minutes at most, with --quick 3. Without a GPU it runs on the CPU, with smaller sizes.

`STEPS` (benchmarks/gpu_steps.py does them) are run one after another, each in a process of its own
that is ended when its time is up. FILE (JSON) is written anew after everything that a step found. A
step is `passed`, `failed`, `timed out`, or `not run` with its reason; what it had found by then is
kept. A table of all of it is printed at the end. The exit status is 0 only if all steps passed; a
step that needs CUDA, on a machine without it, does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

import gpu_steps  # noqa: E402
from gpu_steps import SIZES, Found, Sizes  # noqa: E402

WHOLE_S, QUICK_S = 470, 175  # of all steps together, on a GPU: what is left then is not run
POLL_S = 0.1
# What a table has of what was measured, and in which words.
COLUMNS = (
    ("method", "method"), ("way", "way"), ("dim", "D"), ("length", "L"), ("loss", "loss"),
    ("items", "items"), ("precision", "precision"), ("tokens_per_second", "tokens/s"),
    ("step_ms", "ms a step"), ("tflops", "TFLOP/s"), ("share_of_peak", "of peak"),
    ("device_waits", "waits"), ("making_a_batch_ms", "ms a batch"), ("peak_memory_mb", "MB"),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing to see or to measure; `limit_s` is its own, on a GPU (a CPU has four times that)."""

    name: str
    work: Callable[[str, Sizes], Found]
    limit_s: float
    needs_cuda: bool = False
    quick: bool = False


STEPS = [
    Step("tests", gpu_steps.run_tests, 60, quick=True),
    Step("losses as on the CPU", gpu_steps.as_on_cpu, 45, needs_cuda=True, quick=True),
    Step("bfloat16 beside float32", gpu_steps.bfloat16, 45, quick=True),
    Step("no step waits", gpu_steps.no_waits, 40, needs_cuda=True, quick=True),
    *(
        Step(f"speed of {method}", partial(gpu_steps.speed, method=method), 42, quick=True)
        for method in ("hstu", "sasrec")
    ),
    Step("resumed after SIGKILL", gpu_steps.resume, 75),
    Step("two processes on one card", gpu_steps.two_processes, 60),
    Step("an epoch of paper A", gpu_steps.paper_a_epoch, 20),
    Step("scoring", gpu_steps.scoring, 30),
    Step("encodings", gpu_steps.encodings, 30),
    *(
        Step(f"speed of {method}", partial(gpu_steps.speed, method=method), 32)
        for method in ("bert4rec", "sessionrec-sasrec", "gru4rec", "narm")
    ),
    Step("compiled", gpu_steps.compiled, 60),
]


def machine(device: str) -> dict[str, Any]:
    """What the figures are of."""
    import torch

    found: dict[str, Any] = {
        "device": device, "python": platform.python_version(), "torch": torch.__version__,
        "cores": os.cpu_count(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    if device == "cuda":
        of = torch.cuda.get_device_properties(0)
        peak = gpu_steps.peak_of(of.name, "bfloat16")
        found |= {
            "gpu": of.name, "gpu_memory_mb": of.total_memory // 2**20, "cuda": torch.version.cuda,
            "capability": f"{of.major}.{of.minor}", "bf16": torch.cuda.is_bf16_supported(),
            "peak_bfloat16_tflops": None if peak is None else peak / 1e12,
        }  # fmt: skip
    return found


def in_a_process(
    name: str, device: str, size: str, limit_s: float, each: Callable[[list[Any]], None]
) -> dict[str, Any]:
    """A step in a process of its own, which is ended with its children when its time is up. `each` is
    told what it has found so far."""
    command = [
        sys.executable, __file__, "--one", name, "--device", device, "--size", size, "--limit",
        str(limit_s),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("w") as to_out, err.open("w") as to_err:
            process = subprocess.Popen(
                command, stdout=to_out, stderr=to_err, start_new_session=True
            )
            until, told = time.monotonic() + limit_s, 0
            while process.poll() is None and time.monotonic() < until:
                time.sleep(POLL_S)
                if len(rows := _rows(out)) > told:
                    told = len(rows)
                    each(rows)
            late = process.poll() is None
            if late:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        rows = _rows(out)
        said = (err.read_text().strip() or out.read_text().strip())[-2000:]
    last = rows.pop() if rows and "status" in rows[-1] else {}
    if late:
        last = {"status": "timed out", "reason": f"not done after {limit_s:.0f} s"}
    elif process.returncode or not last:
        last = {"status": "failed", "reason": said or f"ended with {process.returncode}"}
    return last | {"found": rows}


def _rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a step's output."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line[:1] == "{"]


def one(name: str, device: str, size: str, limit_s: float) -> None:
    """A step in this process; what it finds, and in the end its status, as lines of JSON."""
    step = next(step for step in STEPS if step.name == name)
    sizes = replace(SIZES[size.removesuffix("-quick")], until=time.monotonic() + 0.7 * limit_s)
    if size.endswith("-quick"):
        sizes = replace(sizes, grid=min(2, sizes.grid))
    done: dict[str, Any] = {"status": "passed"}
    try:
        for found in step.work(device, sizes):
            print(json.dumps(found), flush=True)
    except AssertionError as error:
        done = {"status": "failed", "reason": str(error)[:4000]}
    print(json.dumps(done), flush=True)


def run_all(
    chosen: list[Step], device: str, size: str, quick: bool, out: Path | None
) -> list[dict[str, Any]]:
    """Every step's result; the file is whole after everything that is found."""
    began, results = time.perf_counter(), []
    slow = 1 if device == "cuda" else 4
    limit_s = slow * (QUICK_S if quick else WHOLE_S)
    head = machine(device)

    def write(running: list[dict[str, Any]]) -> None:
        if out is not None:
            whole = {"machine": head, "size": size, "planned": [s.name for s in chosen]}
            partial_file = out.with_name(out.name + ".partial")
            text = json.dumps(whole | {"steps": [*results, *running]}, indent=1)
            partial_file.write_text(text + "\n")
            partial_file.replace(out)

    for step in chosen:
        start = time.perf_counter()
        left = limit_s - (start - began)
        row: dict[str, Any] = {"step": step.name}
        away = step.needs_cuda and device != "cuda"
        if away:
            done = {"status": "not run", "reason": "needs CUDA"}
        elif left <= 0:
            done = {"status": "not run", "reason": f"{limit_s} s were over"}
        else:
            most = min(left, slow * step.limit_s)
            named = f"{size}-quick" if quick else size
            write([row | {"status": "running", "found": []}])
            done = in_a_process(
                step.name, device, named, most,
                lambda found, row=row: write([row | {"status": "running", "found": found}]),
            )  # fmt: skip
        seconds = round(time.perf_counter() - start, 1)
        failed = done["status"] != "passed" and not away
        results.append(row | {"failed": failed, "seconds": seconds} | done)
        write([])
        print(in_words(results[-1]), flush=True)
    return results


def in_words(row: dict[str, Any]) -> str:
    """A step's line."""
    said = row.get("reason", "").strip().replace("\n", "\n    ")
    found = row.get("found", [])
    if not said and found and "tokens_per_second" not in found[0]:
        each = [", ".join(f"{name} {value}" for name, value in one.items()) for one in found]
        said = "; ".join(each)
    elif found:
        said = f"{len(found)} measured. {said}"
    return f"{row['step']:26} {row['status']:10} {row['seconds']:6.1f} s  {said}"


def table(results: list[dict[str, Any]]) -> str:
    """What was measured, a line a configuration."""
    cells = [
        [("out of memory" if one.get("out_of_memory") and name == "tokens_per_second"
          else _figure(one.get(name))) for name, _ in COLUMNS]
        for row in results for one in row.get("found", [])
        if "tokens_per_second" in one or "out_of_memory" in one
    ]  # fmt: skip
    if not cells:
        return ""
    lines = [[words for _, words in COLUMNS], *cells]
    wide = [max(len(line[at]) for line in lines) for at in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, wide, strict=True)) for line in lines
    )


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 10 else f"{value:,.1f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three minutes on a GPU, not eight")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--only", metavar="STEP", action="append", help="may be given again")
    parser.add_argument("--list", action="store_true", help="the steps' names")
    parser.add_argument("--size", choices=SIZES, help="default: the device's; tiny: to try it")
    return parser


def main() -> int:
    parser = options()
    args = parser.parse_args()
    names = [step.name for step in STEPS]
    if args.list:
        print("\n".join(names))
        return 0
    for name in args.only or []:
        if name not in names:
            parser.error(f"--only {name!r}: one of {', '.join(map(repr, names))}")
    import torch

    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        parser.error("--device cuda: torch finds no CUDA here")
    device = ("cuda" if there else "cpu") if args.device == "auto" else args.device
    chosen = [
        step for step in STEPS
        if (step.name in args.only if args.only else step.quick or not args.quick)
    ]  # fmt: skip
    results = run_all(chosen, device, args.size or device, args.quick, args.out)
    print(table(results))
    failed = [row["step"] for row in results if row["failed"]]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def of_a_step() -> None:
    """What a step starts: itself in a process of its own (`--one`), or a training (`--train`)."""
    parser = argparse.ArgumentParser()
    for name in ("--one", "--device", "--size", "--train", "--method"):
        parser.add_argument(name)
    for name in ("--dropout", "--limit"):
        parser.add_argument(name, type=float)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.device, args.size, args.limit)
    else:
        gpu_steps.train_into(Path(args.train), args.device, args.method, args.dropout)


if __name__ == "__main__":
    if {"--one", "--train"} & set(sys.argv):
        of_a_step()
    else:
        sys.exit(main())
