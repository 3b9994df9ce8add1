"""A training run that is killed continues where it stopped: weights, optimiser, random numbers, place.

One folder a checkpoint, `step-<number>/`: tensors in safetensors, the rest in JSON with the
tensors' digest, written aside and renamed into place. The two newest are kept: one that cannot be
read is named and the one before it taken. Nothing is pickled. A lock on the folder lets one
training at a time use it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

KEPT = 2
Tensors = dict[str, torch.Tensor]


class Checkpoints:
    """The checkpoints of one training run, in a folder of their own.

    `every_s`: a new one is due so many seconds after the last; 0 means after every step.
    """

    def __init__(self, folder: Path, every_s: float = 60.0) -> None:
        self.folder, self.every_s = folder, every_s
        self.written = time.monotonic()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether this process has the folder to itself, for as long as the block lasts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True

    @property
    def due(self) -> bool:
        return time.monotonic() - self.written >= self.every_s

    def write(self, step: int, tensors: Tensors, values: dict[str, Any]) -> None:
        """Put a checkpoint in place, then drop the oldest."""
        place = self.folder / f"step-{step:012d}"
        aside = self.folder / f".making-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        file = aside / "state.safetensors"
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, file)
        values = {**values, "sha256": _digest(file)}
        (aside / "state.json").write_text(json.dumps(values), encoding="utf-8")
        for written in (file, aside / "state.json"):
            with written.open("rb+") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)
        for old in self._all()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        self.written = time.monotonic()

    def newest(self, say: Callable[[str], None]) -> tuple[Tensors, dict[str, Any]] | None:
        """The newest checkpoint that can be read; those that cannot are named and removed."""
        for place in self._all():
            file = place / "state.safetensors"
            try:
                values = json.loads((place / "state.json").read_text(encoding="utf-8"))
                if values["sha256"] != _digest(file):
                    raise ValueError("its tensors are not those that were written")
                return load_file(file), values
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                say(f"checkpoint {place} is damaged ({error}): taking the one before it")
                shutil.rmtree(place, ignore_errors=True)
        return None

    def note(self, **values: Any) -> None:
        """Remember something about the run beside its checkpoints."""
        aside = self.folder / f".note-{os.getpid()}"
        aside.write_text(json.dumps(values), encoding="utf-8")
        aside.rename(self.folder / "run.json")

    def noted(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "run.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def remove(self) -> None:
        """The run has ended: nothing is taken up any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
