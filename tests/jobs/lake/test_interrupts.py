"""Ctrl-C while Spark starts, and while it works: a sentence, and no JVM that stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.airflow_tools import REPO, SOURCE, last_night, write_log


def javas(process: psutil.Process) -> list[psutil.Process]:
    with_names = [(one, one.name()) for one in process.children(recursive=True)]
    return [one for one, name in with_names if name == "java"]


def listens(java: psutil.Process) -> bool:
    """Whether Spark has started in it: its driver waits for others."""
    kinds = [one.status for one in java.net_connections("tcp")]
    return kinds.count("LISTEN") > 1


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [None, 0.0, 1.0, 3.0])
def test_ctrl_c_leaves_no_jvm_and_no_stack(tmp_path: Path, wait_s: float | None) -> None:
    """wait_s: since Spark listens; None: as soon as its JVM is there."""
    write_log(tmp_path / "landing" / "tiny", last_night(), 5, 3)
    source = tmp_path / "tiny.toml"
    source.write_text(SOURCE.format(name="tiny", landing=tmp_path / "landing"))
    env = os.environ | {
        "SESSIONMILL_LAKE": str(tmp_path / "lake"),
        "SESSIONMILL_SHORT_JOBS": "0",  # Spark, however few the lines are
    }
    command = [sys.executable, "-m", "jobs", "run", "--source", str(source)]
    # (Who starts a process in the background may have it ignore Ctrl-C.)
    with subprocess.Popen(
        command, cwd=REPO, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:  # fmt: skip
        process, deadline = psutil.Process(run.pid), time.monotonic() + 240
        while not (found := javas(process)) or (
            wait_s is not None and not all(map(listens, found))
        ):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(wait_s or 0)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        said = run.communicate(timeout=240)[1].splitlines()
    assert run.returncode == 130, "\n".join(said)
    assert said[-1].startswith("run stopped: interrupted (Ctrl-C). Tables are as their last")
    assert not [line for line in said if "Exception" in line or "Traceback" in line], said
    gone, alive = psutil.wait_procs(found, timeout=60)
    assert gone and not alive
