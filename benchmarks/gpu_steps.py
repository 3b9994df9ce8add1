"""What benchmarks/gpu.py does on a device: right or wrong first, then what it costs.

A step is a function of the device and of sizes. It yields what it found as it finds it, and raises
AssertionError where something is wrong.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
Found = Iterator[dict[str, Any]]

# Tests that need no table. (The others of test_models_methods train, and read tables for it.)
TESTS = (
    "tests/models/networks/test_losses.py", "tests/models/networks/test_layers.py", "tests/models/networks/test_batch.py",
    "tests/models/networks/test_methods.py::test_the_counts_of_paper_a",
    "tests/models/networks/test_methods.py::test_counts_by_formula",
)  # fmt: skip
METHODS = (
    "gru4rec+st+sse+tsa+fb", "narm+tsa", "sasrec+st+sse+tsa", "bert4rec+st+sse+tsa", "hstu+st+tsa",
    "sasrec+habit", "sessionrec-sasrec", "sessionrec-hstu+habit", "sessionrec-gru4rec",
)  # fmt: skip
LOSSES = ("full", "sampled", "gbce")
FLOAT_ERROR = 1e-3  # of a gradient's norm: sums of float32 in another order, through a GRU's steps
BF16_ERROR = 0.05  # of a gradient's norm: bfloat16 has 8 bits; several layers of it
SESSION = 10  # events
DRAWN = 256  # items of a sampled loss
# (D, L, loss), those that matter most first: a step whose time is up has measured the others.
GRID = (
    (256, 1024, "full"), (64, 200, "full"), (256, 200, "full"), (256, 200, "sampled"),
    (512, 200, "full"), (512, 1024, "full"), (64, 1024, "full"), (256, 1024, "sampled"),
    (64, 200, "sampled"), (512, 200, "sampled"), (64, 1024, "sampled"), (512, 1024, "sampled"),
)  # fmt: skip
ENCODINGS = ("st", "sse", "tsa", "fb", "habit", "side")
# From memory of makers' data sheets, not looked up again: 10^12 operations a second in bfloat16 on
# tensor cores, without sparsity, and
# in float32 without them (which is how layers in float32 are computed here).
PEAKS = {
    "H100 PCIe": (756, 51), "H100 NVL": (835, 60), "H100 80GB HBM3": (989, 67), "H200 NVL": (835, 60),
    "H200": (989, 67), "A100": (312, 19.5), "L4": (121, 30.3), "L40S": (362, 91.6), "A10": (125, 31.2),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much a step does.

    tokens of a batch; steps that are timed after three of warm-up, for `seconds` at most; items of
    a full and of a sampled loss; users that are scored; of `GRID` the first `grid`. What is not begun
    at `until` (time.monotonic) is left out, and said to be.
    """

    tokens: int
    steps: int
    seconds: float
    items: int
    many_items: int
    users: int
    grid: int = len(GRID)
    until: float = math.inf


SIZES = {
    "cuda": Sizes(65_536, 20, 1.0, 10_000, 1_000_000, 8192),
    "cpu": Sizes(4096, 3, 4.0, 1000, 20_000, 256, grid=4),
    "tiny": Sizes(400, 1, 0.0, 50, 200, 8, grid=2),
}


# -- right or wrong ----------------------------------------------------------------------------------


def run_tests(device: str, sizes: Sizes) -> Found:
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
    yield {"tests": counts["tests"]}


def log_of(users: int, length: int, items: int) -> Any:
    """`Rows` of made-up histories, sessions of ten, with feedback and what was shown in vain."""
    import numpy as np
    from histories import histories

    rows = histories(users, length, SESSION, items)
    rng = np.random.default_rng(8)
    feedback = (rng.random(len(rows.item)) < 0.1).astype(np.int8)  # a tenth is negative
    shown = np.where(np.arange(len(rows.item)) % 5 == 0, 2, 0)  # two items with each fifth event
    return replace(
        rows, feedback=feedback, positive=feedback == 0,
        shown_start=np.concatenate([[0], np.cumsum(shown)]),
        shown=rng.integers(1, items + 1, shown.sum()).astype(np.int32),
    )  # fmt: skip


def small_batch(method: str, loss: str) -> tuple[Any, Any, Any, Any]:
    """A model on the CPU whose weights are nowhere 0, its configuration, its rows, and a batch of
    histories of different lengths."""
    import numpy as np
    import torch

    from models.networks.methods import config, recommender

    rows = log_of(6, 40, 50)
    sessions = method.startswith("sessionrec")
    target = "next_session" if sessions else "next_item"
    chosen = config(
        method, "small", dim=32, layers=2, max_len=64, dropout=0.0, loss=loss, target=target,
        negatives=16, habit_epochs=0, alpha=0.3 if sessions else None,  # (the rank loss, too)
    )  # fmt: skip
    torch.manual_seed(0)
    model = recommender(50, chosen)
    model.fit(rows)
    # Where some start at 0, no gradient would flow through what they are multiplied with.
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape)
    begin = rows.start[:-1] + 5 * np.arange(6)
    tokens = model.training_tokens(
        rows, begin, rows.start[1:], chosen.train, np.random.default_rng(0)
    )
    return model, chosen, rows, model.padded(tokens, rows, chosen.train)


def learnt(method: str, loss: str, device: str, precision: str) -> tuple[float, Any]:
    """The loss of one batch, and the gradients of all weights in one vector, on the CPU."""
    import torch

    model, chosen, _, batch = small_batch(method, loss)
    model.precision = precision
    model.to(device)
    items = torch.randint(50, (16,)).to(device)
    with drawing(items):
        value = model.loss(batch.to(device), chosen.train)
    value.backward()
    gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    return float(value.detach()), torch.cat(gradients)


@contextmanager
def drawing(items: Any) -> Iterator[None]:
    """Sampled losses draw these items: a GPU's random numbers are not the CPU's."""
    from models.networks.recommender import Recommender

    before = Recommender.drawn
    Recommender.drawn = lambda *_, **__: items  # type: ignore[method-assign]
    try:
        yield
    finally:
        Recommender.drawn = before  # type: ignore[method-assign]


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


def as_on_cpu(device: str, sizes: Sizes) -> Found:
    """Losses and gradients in float32, beside the CPU's."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # (a GRU's default, and no float32)
    yield held_against(("cpu", "float32"), (device, "float32"), FLOAT_ERROR)


def bfloat16(device: str, sizes: Sizes) -> Found:
    """Losses and gradients in bfloat16, beside float32 on the same device."""
    yield held_against((device, "float32"), (device, "bfloat16"), BF16_ERROR)


def no_waits(device: str, sizes: Sizes) -> Found:
    """Second steps of every method and loss, both precisions, where torch refuses to wait for the
    GPU (`torch.cuda.set_sync_debug_mode`)."""
    import torch

    from models.core.process_group import ALONE
    from models.training.epoch import Parts
    from models.training.fit import Run

    waited, steps = [], 0
    for method in METHODS:
        for loss in LOSSES:
            for precision in ("float32", "bfloat16"):
                model, chosen, rows, batch = small_batch(method, loss)
                model.to(device).train()
                run = Run(model, chosen, rows, device, ALONE)
                model.precision = precision
                parts = Parts([batch.pin_memory()], len(batch.label_at))
                run.step(parts, 0.5)  # (libraries and the optimiser make what they keep)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    run.step(parts, 0.5)
                except RuntimeError as error:
                    waited.append(f"{method}, {loss}, {precision}: {str(error)[:200]}")
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                run.read()
                steps += 1
    if waited:
        raise AssertionError("; ".join(waited))
    yield {"steps_without_waiting": steps}


# -- trainings in processes of their own ---------------------------------------------------------------


def made_up_data() -> Any:
    """`Data` of a log of 60 users, as a table's would be; 90 items, of which each follows from the
    one before."""
    import numpy as np

    from models.data.load import Data
    from models.data.sequences import Sequences
    from models.data.splits import Cut, Events, Filters, periods, training_rows

    users, length, items = 60, 30, 90
    place, user = np.tile(np.arange(length), users), np.repeat(np.arange(users), length)
    nothing = np.zeros(users * length, dtype=np.int32)
    sequences = Sequences(
        path="made up", version=0, table_id="", user_id=[f"{u:03d}" for u in range(users)],
        start=np.arange(users) * length, length=np.full(users, length),
        item=((7 * user + place) % items + 1).astype(np.int32),
        ts=((place // SESSION) * 86_400_000_000 + place % SESSION * 60_000_000).astype(np.int64),
        session=(place // SESSION + 1).astype(np.int32), feedback=nothing.astype(np.int8),
        exposed=nothing[:0], exposed_count=nothing,
    )  # fmt: skip
    events = Events.of(sequences)
    cut = Cut(split="last_item")
    period = periods(events, cut)
    every = Filters(min_item_events=1, min_session_events=1, min_user_sessions=1)
    training = training_rows(events, period, every, whole_vocabulary=True)
    return Data(sequences, events, cut, period, training, [str(i) for i in training.vocabulary])


def train_into(folder: Path, device: str, method: str, dropout: float) -> None:
    """A training with a checkpoint after every step; it goes on from the newest one. Its curves and
    weights are in the folder when it has ended. Under torchrun: its share."""
    from safetensors.torch import save_file

    from models.core import process_group
    from models.core.environment import use_deterministic
    from models.networks.methods import config
    from models.training.checkpoints import Checkpoints
    from models.training.fit import fit

    use_deterministic(True)
    team, device = process_group.start(device)
    chosen = config(method, "tiny", epochs=4, patience=4, batch_size=16, dropout=dropout, seed=3)
    keep = Checkpoints(folder / "checkpoints", 0.0)
    fitted = fit(chosen, made_up_data(), lambda _: None, device, keep, team)
    if team.is_main_process:
        save_file(dict(fitted.model.state_dict()), folder / "model.safetensors")
        curves = {name: fitted.curves[name] for name in ("loss", "validation_ndcg@10")}
        (folder / "curves.json").write_text(json.dumps(curves))
    process_group.stop()


def a_training(folder: Path, device: str, method: str, dropout: float, processes: int = 1) -> Any:
    folder.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable, *(torchrun if processes > 1 else []), str(REPO / "benchmarks" / "gpu.py"),
        "--train", str(folder), "--device", device, "--method", method, "--dropout", str(dropout),
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: Any) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise AssertionError(f"a training ended with {process.returncode}: {said[-1500:]}")


def resume(device: str, sizes: Sizes) -> Found:
    """A training that is killed (SIGKILL) twice and goes on from its checkpoints ends with the
    weights of one that is left alone, to the last bit: dropout, masks and batches included."""
    method = "bert4rec+st+sse+tsa+habit"
    with tempfile.TemporaryDirectory() as place:
        alone, killed = Path(place) / "alone", Path(place) / "killed"
        whole = a_training(alone, device, method, 0.1)
        for step in (3, 9):
            process = a_training(killed, device, method, 0.1)
            while process.poll() is None:
                there = [int(one.name[5:]) for one in killed.glob("checkpoints/step-*")]
                if there and max(there) >= step:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.005)
            if process.wait() != -signal.SIGKILL:
                raise AssertionError(f"it ended before it was killed: {process.communicate()[1]}")
            yield {"killed_after_step": max(there)}
        ended(a_training(killed, device, method, 0.1))
        ended(whole)
        for name in ("curves.json", "model.safetensors"):
            if (alone / name).read_bytes() != (killed / name).read_bytes():
                raise AssertionError(f"{name} of the training that was resumed differs")
    yield {"equal_to_the_last_bit": True}


def two_processes(device: str, sizes: Sizes) -> Found:
    """`torchrun` with two processes on one card (gloo) gives the losses and scores of one."""
    with tempfile.TemporaryDirectory() as place:
        curves = []
        for processes in (1, 2):
            folder = Path(place) / str(processes)
            ended(a_training(folder, device, "sasrec+st+habit", 0.0, processes))
            curves.append(json.loads((folder / "curves.json").read_text()))
    worst = 0.0
    for name, values in curves[0].items():
        for one, other in zip(values, curves[1][name], strict=True):
            worst = max(worst, abs(one - other) / max(abs(one), 1e-9))
    if not worst <= 1e-2:
        raise AssertionError(f"losses or scores differ by {worst:.2e} of them: {curves}")
    yield {"largest_difference": float(f"{worst:.3g}")}


# -- what it costs -------------------------------------------------------------------------------------


def peak_of(gpu: str, precision: str) -> float | None:
    """Operations a second of a card by its name; None: not known."""
    for name in sorted(PEAKS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", gpu):
            return 1e12 * PEAKS[name][precision == "float32"]
    return None


def operations(chosen: Any, positions: int, length: int, labels: int, classes: int) -> float:
    """Model FLOPs of a training step: a multiply-add is 2, the way back twice the way there.

    Of a position: a transformer block 12 D^2 multiply-adds, an HSTU layer 5 D^2, a GRU layer 3 D (D
    + F) + 3 D^2; attention s (2 D + H F) a layer, s the positions that are seen, (L + 1) / 2 where
    it is causal; NARM 2 D (D + F) + 2 D^2 + 2 D s more; SessionRec 4 D^2 to mix a session. Of
    time features F^2 a layer. A label: D for each class that it is held against. In a cloze
    model's last block only the labels' positions are worked out. Look-ups, norms, softmax, what
    is recomputed: not counted.

    Args:
        positions: of all rows; length: of a row; classes: V, or the drawn ones and the label.
    """
    from models.networks.methods import BACKBONES, SESSION_ENCODERS, parse

    base, encodings = parse(chosen.method)
    backbone = base.removeprefix("sessionrec-")
    size = chosen.model
    dim, layers = size.dim, size.layers
    wide = size.time_features if "tsa" in encodings else 0
    cloze = (BACKBONES | SESSION_ENCODERS)[base].cloze
    seen = length if cloze else (length + 1) / 2
    if backbone in ("gru4rec", "narm"):
        each = layers * (3 * dim * (dim + wide) + 3 * dim**2)
        if backbone == "narm":
            each += 2 * dim * (dim + wide) + 2 * dim**2 + 2 * dim * seen
        total = positions * each
    else:
        heads = wide * size.heads
        keys = 2 * dim**2 + wide**2  # of all positions, in the last block too
        block = 12 * dim**2 if backbone in ("sasrec", "bert4rec") else 5 * dim**2
        asked = block - 2 * dim**2 + seen * (2 * dim + heads)
        last = labels if cloze else positions
        total = layers * positions * keys + ((layers - 1) * positions + last) * asked
    if base in SESSION_ENCODERS:
        total += positions * 4 * dim**2
    return float(6 * (total + labels * dim * classes))


class Logs:
    """Made-up logs of this process, by their sizes: making one takes seconds."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int, int], Any] = {}

    def __call__(self, users: int, length: int, items: int) -> Any:
        key = users, length, items
        if key not in self.made:
            self.made = {key: log_of(*key)}  # (of the newest size only)
        return self.made[key]


def model_of(chosen: Any, items: int, rows: Any, device: str) -> Any:
    """A model whose weights are made on the device: of a million items that takes a CPU seconds."""
    import torch

    from models.networks.methods import parse, recommender

    if "side" in parse(chosen.method)[1]:
        chosen = replace(chosen, model=replace(chosen.model, categories=(100, 1000), numbers=2))
    torch.manual_seed(0)
    with torch.device(device):
        model = recommender(items, chosen)
    model.fit(rows)
    return model.to(device)


def speed_of(
    method: str, dim: int, length: int, loss: str, device: str, sizes: Sizes, logs: Logs
) -> dict[str, Any]:
    """Training steps of one configuration as `fit` takes them: batches made ahead, losses read
    late."""
    from models.networks.methods import config

    sessions = method.startswith("sessionrec")
    items = sizes.items if loss == "full" else sizes.many_items
    batch = max(2, sizes.tokens // length)
    rows = logs(batch * (3 + sizes.steps), length, items)
    chosen = config(
        method, "small", dim=dim, layers=2, max_len=length // SESSION if sessions else length,
        batch_size=batch, all_windows=False, loss=loss, negatives=DRAWN, habit_epochs=0,
        target="next_session" if sessions else "next_item",
    )  # fmt: skip
    told = {"method": method, "dim": dim, "length": length, "loss": loss, "items": items}
    return told | steps_of(chosen, model_of(chosen, items, rows, device), rows, device, sizes)


def steps_of(chosen: Any, model: Any, rows: Any, device: str, sizes: Sizes) -> dict[str, Any]:
    """What training steps cost: of at least one epoch's first batches, and then as time allows."""
    import torch

    from models.core.environment import peak_rss_mb
    from models.core.process_group import ALONE
    from models.training.epoch import Epoch
    from models.training.fit import Run

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model.train()
    run = Run(model, chosen, rows, device, ALONE)
    epoch = Epoch(model, rows, chosen, 1, device=device)
    batches = (parts for _, parts in epoch.after(0))
    warm_up = min(3, sizes.steps)
    for _ in range(warm_up):
        run.step(next(batches), 0.5)
    run.read()  # (a GPU is done when its losses are here)
    before, began, steps = run.at.seen, time.perf_counter(), 0
    while steps < sizes.steps and (not steps or time.perf_counter() - began < sizes.seconds):
        parts = next(batches)
        run.step(parts, 0.5)
        steps += 1
    run.read()
    step_s = (time.perf_counter() - began) / steps
    if not math.isfinite(run.at.total):
        raise AssertionError(f"{chosen.method}: the mean loss is {run.at.total / run.at.count}")
    positions = sum(part.token.numel() for part in parts)
    length = max(part.token.shape[1] for part in parts)
    classes = len(model.share) if chosen.train.loss == "full" else 1 + chosen.train.negatives
    flops = operations(chosen, positions, length, parts.labels, classes)
    peak = peak_of(torch.cuda.get_device_name(), model.precision) if on_gpu else None
    busy_s = busy(run, parts) if on_gpu else None
    began = time.perf_counter()
    epoch[len(epoch) - 1]
    made_s = time.perf_counter() - began
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_rss_mb()
    return {
        "precision": model.precision, "steps": steps,
        "tokens_per_second": round((run.at.seen - before) / steps / step_s),
        "step_ms": round(1000 * step_s, 2), "tflops": round(flops / step_s / 1e12, 3),
        "share_of_peak": None if peak is None else round(flops / step_s / peak, 4),
        "device_waits": None if busy_s is None else round(max(0.0, 1 - busy_s / step_s), 3),
        "making_a_batch_ms": round(1000 * made_s, 2), "peak_memory_mb": round(memory, 1),
        "mean_loss": round(run.at.total / run.at.count, 4),
    }  # fmt: skip


def busy(run: Any, parts: Any) -> float | None:
    """Seconds of a step in which the GPU computes or copies: the profiler's, whose own cost on the
    host makes the step longer but not its kernels. None: the profiler cannot see them."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(2):
                run.step(parts, 0.5)
            torch.cuda.synchronize()
    except (AssertionError, RuntimeError):
        return None
    run.read()
    # (An annotation, such as the optimiser's step, spans kernels that are counted themselves.)
    kernels = [
        one.time_range.elapsed_us()
        for one in seen.events()
        if one.device_type == DeviceType.CUDA and not getattr(one, "is_user_annotation", False)
    ]
    return sum(kernels) / 2e6 or None


def measured(cells: list[tuple[str, int, int, str]], device: str, sizes: Sizes) -> Found:
    """Each (method, D, L, loss); what does not fit a card's memory is said, and is no fault."""
    import torch

    logs = Logs()
    for number, (method, dim, length, loss) in enumerate(cells):
        if number and time.monotonic() > sizes.until:
            yield {"left_out_for_want_of_time": cells[number:]}
            return
        try:
            yield speed_of(method, dim, length, loss, device, sizes, logs)
        except torch.cuda.OutOfMemoryError:
            cell = {"method": method, "dim": dim, "length": length, "loss": loss}
            yield cell | {"out_of_memory": True}
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def speed(device: str, sizes: Sizes, method: str) -> Found:
    """A method at every width, length and loss of `GRID`."""
    return measured([(method, *cell) for cell in GRID[: sizes.grid]], device, sizes)


def encodings(device: str, sizes: Sizes) -> Found:
    """What each encoding adds to sasrec at D 256, L 200."""
    names = ["sasrec", *(f"sasrec+{name}" for name in ENCODINGS)]
    return measured([(name, 256, 200, "full") for name in names[: 3 * sizes.grid]], device, sizes)


def paper_a_epoch(device: str, sizes: Sizes) -> Found:
    """An epoch at paper A's size (its ML-1M: 1,196 users of 132 events, 3,328 items, 4 layers, D
    256, L 200, batches of 128), all three encodings."""
    from models.core.process_group import ALONE
    from models.networks.methods import config
    from models.training.epoch import Epoch
    from models.training.fit import Run

    users = 1196 if device.startswith("cuda") else max(16, sizes.users // 8)
    rows = log_of(users, 132, 3328)
    method = "bert4rec+st+sse+tsa"
    chosen = config(method, "paper_a_ml1m")
    model = model_of(chosen, 3328, rows, device)
    model.train()
    run, seconds = Run(model, chosen, rows, device, ALONE), []
    for number in range(1, 5 if sizes.steps > 3 else 3):
        began = time.perf_counter()
        epoch = Epoch(model, rows, chosen, number, device=device)
        for _, parts in epoch.after(0):
            run.step(parts, 0.5)
        run.read()
        seconds.append(time.perf_counter() - began)
    yield {
        "method": method, "preset": "paper_a_ml1m", "users": users, "batches": len(epoch),
        "precision": model.precision, "epoch_s": round(min(seconds[1:]), 3),
    }  # fmt: skip


def scoring(device: str, sizes: Sizes) -> Found:
    """Users a second: their scores of all items, and their twenty best."""
    import numpy as np
    import torch

    from models.networks.methods import config
    from models.networks.scoring import best, parts

    for method in ("sasrec", "hstu"):
        for items, users in ((sizes.items, sizes.users), (sizes.many_items, sizes.users // 32)):
            rows = log_of(max(8, users), 200, items)
            chosen = config(method, "small", dim=256, layers=2, max_len=200)
            model = model_of(chosen, items, rows, device).eval()
            order = np.arange(len(rows.start) - 1)
            chunks = parts(model, order, np.diff(rows.start))
            spent = [0.0, 0.0]
            for number, chunk in enumerate([chunks[0], *chunks]):
                began = time.perf_counter()
                scores = model.score(rows, rows.start[chunk], rows.start[chunk + 1])
                middle = time.perf_counter()
                best(scores, 20)
                if number:  # (the first is warm-up)
                    spent[0] += middle - began
                    spent[1] += time.perf_counter() - middle
            yield {
                "method": method, "dim": 256, "length": 200, "items": items, "users": len(order),
                "scored_users_per_second": round(len(order) / spent[0]),
                "listed_users_per_second": round(len(order) / sum(spent)),
            }  # fmt: skip
            del model
            if device.startswith("cuda"):
                torch.cuda.empty_cache()


def compiled(device: str, sizes: Sizes) -> Found:
    """The backbone by `torch.compile`, beside the same without: whether it would help here."""
    import torch

    from models.networks.methods import config

    rows = log_of(max(2, sizes.tokens // 1024) * (3 + sizes.steps), 1024, sizes.items)
    for method in ("hstu", "sasrec"):
        chosen = config(
            method, "small", dim=256, layers=2, max_len=1024, all_windows=False, loss="full",
            batch_size=max(2, sizes.tokens // 1024),
        )  # fmt: skip
        for way in ("as it is", "compiled"):
            model = model_of(chosen, sizes.items, rows, device)
            if way == "compiled":
                model.backbone.compile()
            try:
                done = steps_of(chosen, model, rows, device, sizes)
            except torch.cuda.OutOfMemoryError:
                done = {"out_of_memory": True}
            told = {"method": method, "way": way, "dim": 256, "length": 1024, "loss": "full"}
            yield told | {"items": sizes.items} | done
            if time.monotonic() > sizes.until:
                return
