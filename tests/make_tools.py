"""What the Makefile decides, asked of it."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


@cache
def uv() -> str:
    """The uv that `make` takes: the machine's own, or the one that it brings (now, if need be)."""
    make = shutil.which("make")
    assert make
    done = subprocess.run(
        [make, "--silent", "--eval", "show-uv: | $(UV); @echo $(UV)", "show-uv"],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(REPO / done.stdout.splitlines()[-1])  # (an absolute path stays as it is)
