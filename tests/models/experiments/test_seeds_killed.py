"""`seeds` killed with SIGKILL at random moments, alone or with its training, and asked for again: the plan,
the looks and the trainings are those of a command that nobody killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from models.registry import tracking
from tests.support.recorded import World

pytestmark = pytest.mark.long

KILLS = 8  # of each command, at most
METHODS = ("gru4rec", "gru4rec+st")


def started(world: World, comparison: str) -> subprocess.Popen[str]:
    words = [
        "seeds", "--source", str(world.source), "--comparison", comparison, "--methods",
        ",".join(METHODS), "--first", "2", "--max-seeds", "3", "--detect", "0",
        "--results", str(world.root / f"{comparison}.json"), "--json",
        "--", "--epochs", "4", "--checkpoint-s", "0", "--threads", "1",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(
        [sys.executable, "-m", "models", *words], cwd=world.root, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def ended(command: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = command.communicate(timeout=1800)
    assert command.returncode == 0, said
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found


def killed(command: subprocess.Popen[str], after_s: float, whole: bool) -> str | None:
    """All that a killed command said; None: it had ended before. `whole`: its training dies with it."""
    try:
        command.wait(after_s)
    except subprocess.TimeoutExpired:
        (os.killpg if whole else os.kill)(command.pid, signal.SIGKILL)
        command.wait()
        return command.stdout.read() if whole and command.stdout else ""
    return None


def recorded(comparison: str) -> dict[str, Any]:
    """Trainings that ended, by cell; the plan; the looks of each curve."""
    client, experiment = tracking.connect("toy")
    runs = tracking.runs(client, experiment, kind="train", comparison=comparison)
    cells = sorted((run.data.tags["method"], run.data.tags["seed"]) for run in runs)
    plans = tracking.plans(client, experiment, comparison)
    [plan] = [run for run in plans]
    looks = {
        name: [one.step for one in client.get_metric_history(plan.info.run_id, name)]
        for name in client.get_run(plan.info.run_id).data.metrics
    }
    return {"cells": cells, "plan": json.loads(plan.data.tags["plan"]), "looks": looks}


def test_killed_at_random_it_ends_the_same(world: World) -> None:
    began = time.monotonic()
    calm = ended(started(world, "calm"))
    whole_s = time.monotonic() - began
    wanted = recorded("calm")
    assert len(wanted["cells"]) == len(set(wanted["cells"])) >= 2 * len(METHODS)
    dice, kills, alone = random.Random(3), 0, 0
    for number in range(KILLS):
        whole = number % 2 == 0
        after = dice.uniform(0.02, 0.5) * whole_s
        if killed(started(world, "killed"), after, whole) is None:
            break
        kills, alone = kills + 1, alone + (not whole)
    assert kills >= 3 and alone >= 1
    done = ended(started(world, "killed"))
    assert recorded("killed") == wanted
    for name in ("methods", "history", "failed", "looks", "bounds"):
        assert done[name] == calm[name], name
    kept = [json.loads((world.root / f"{one}.json").read_text()) for one in ("calm", "killed")]
    assert kept[0]["comparison"]["history"] == kept[1]["comparison"]["history"]
    again = ended(started(world, "killed"))
    assert again["methods"] == calm["methods"] and recorded("killed") == wanted
