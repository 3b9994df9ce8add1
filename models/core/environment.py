"""The machine and the process: threads, device, memory, code version."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from models.core.errors import UserError

Say = Callable[[str], None]


def use_threads(number: int | None) -> None:
    if number is not None:
        if number < 1:
            raise UserError(f"--threads {number}: use 1 or more")
        torch.set_num_threads(number)


def use_deterministic(yes: bool) -> None:
    """Take only algorithms that give the same each time; a GPU has faster ones that do not. An
    operation that has none ends with torch's error."""
    if yes:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(yes)


_cards: dict[int, TextIO] = {}  # GPUs that this process has, with the files that say so


def pick_device(name: str) -> str:
    """`cpu`, `cuda`, or, where there are several GPUs, one of them that no other training has."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here: use --device cpu")
    # torchrun gives each of its processes a GPU (`process_group.start`).
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if name != "cuda" or not alone or torch.cuda.device_count() < 2:
        return name
    card = _free_card(torch.cuda.device_count())
    torch.cuda.set_device(card)
    return f"cuda:{card}"


def _free_card(cards: int) -> int:
    """A GPU of this machine that no process of this user has; it is kept until this process ends.
    The first one where all are taken."""
    for card in _cards:
        return card
    for card in range(cards):
        path = Path(tempfile.gettempdir()) / f"sessionmill-{os.getuid()}-gpu-{card}.lock"
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _cards[card] = file
        return card
    return 0


def note(text: str) -> None:
    """Progress goes to standard output, at once."""
    print(text, flush=True, file=sys.stdout)


def machine() -> dict[str, Any]:
    """Where it ran, in words that mean something elsewhere."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        # A maker gives one name to processors of very different speed; this tells them apart.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


def code_version() -> str | None:
    """The git commit of this code, with `+changes` if files differ from it; None outside git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
