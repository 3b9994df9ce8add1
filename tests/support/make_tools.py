"""What the Makefile decides, asked of it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BROUGHT = "build/uv/bin/uv"


def make(*words: str) -> str:
    done = subprocess.run(
        ["make", "--silent", *words], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@cache
def uv() -> str:
    """The uv that `make` takes: the machine's own, or the one that it brings (now, if need be)."""
    taken = make("--eval", "show-uv: ; @echo $(UV)", "show-uv")
    if taken != BROUGHT:
        return taken
    make(BROUGHT)
    return str(REPO / BROUGHT)
