"""Killed trainings go on bit for bit; two processes train what one does. Real SIGKILLs, torchrun."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models import cli
from models.data.load import Data
from models.networks.methods import config
from models.registry import tracking
from models.training.checkpoints import Checkpoints
from models.training.fit import fit
from tests.models.registry.test_register import SOURCE
from tests.support.gold_world import DAY, data_of, ring, write_gold

STEPS = 6 * 7  # at least so many: six epochs of seven or eight steps


class Mill:
    """A lake, a source file and an MLflow of a test's own; commands here, or in processes."""

    def __init__(self, root: Path) -> None:
        self.root, self.lake = root, root / "lake"
        write_gold(self.lake, "toy", ring())
        (root / "toy.toml").write_text(SOURCE)
        self.env = dict(os.environ, SESSIONMILL_LAKE=str(self.lake), OMP_NUM_THREADS="1",
                        PYTHONPATH=str(Path(__file__).parents[3]))  # fmt: skip
        self.env.pop("MLFLOW_TRACKING_URI", None)

    def start(self, *words: str, processes: int = 1) -> subprocess.Popen[str]:
        """`train` in a process of its own, or in several under torchrun."""
        torchrun = [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        ]  # fmt: skip
        command = [
            sys.executable, *(torchrun if processes > 1 else []), "-m", "models", "train",
            "--source", str(self.root / "toy.toml"), "--threads", "1", "--device", "cpu", *words,
        ]  # fmt: skip
        return subprocess.Popen(command, cwd=self.root, env=self.env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, command: str, *words: str) -> tuple[dict[str, Any], str]:
        """A command in this process (importing torch and MLflow costs seconds)."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = cli.main(
                [command, "--source", str(self.root / "toy.toml"), "--threads", "1", "--json",
                 *words]
            )  # fmt: skip
        said = out.getvalue()
        assert status == 0, said
        answer: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return answer, said

    def checkpoints(self) -> list[Path]:
        return sorted((self.lake / "toy" / "_cache" / "training").glob("*/step-*"))

    def kept(self, run_id: str) -> tuple[bytes, dict[str, Any]]:
        """The weights that a run kept, and its curves with their steps; its status is FINISHED."""
        client, _ = tracking.connect("toy")
        assert client.get_run(run_id).info.status == "FINISHED"
        with tracking.downloaded(client, run_id, "trained") as folder:
            weights = (folder / "model.safetensors").read_bytes()
        curves = {
            name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
            for name in ("loss", "validation_ndcg_at_10")
        }
        return weights, curves


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    from jobs.core.settings import settings

    there = Mill(tmp_path_factory.mktemp("resume"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SESSIONMILL_LAKE", str(there.lake))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(there.root)
        settings.cache_clear()
        yield there
    settings.cache_clear()


def words(method: str) -> list[str]:
    return ["--method", method, "--epochs", "6", "--patience", "6", "--batch-size", "16",
            "--dropout", "0.1", "--seed", "3"]  # fmt: skip


def ended_at(mill: Mill, step: int, how: signal.Signals, *command: str) -> None:
    """A signal as soon as the training has come to a step."""
    process = mill.start(*command, "--checkpoint-s", "0")
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if any(int(place.name.removeprefix("step-")) >= step for place in mill.checkpoints()):
            process.send_signal(how)
            process.communicate()
            return
        time.sleep(0.002)
    pytest.fail(f"no step {step}: {process.communicate()}")


def ended_and_whole(mill: Mill, method: str, ends: list[tuple[int, signal.Signals]]) -> str:
    """A run that was ended several times and then resumed, beside one that was not; its id."""
    whole, _ = mill.run("train", *words(method), "--comparison", "whole")
    client, experiment = tracking.connect("toy")
    for step, how in ends:
        ended_at(mill, step, how, *words(method))
        newest, *_ = client.search_runs([experiment], f"tags.method = '{method}'")
        # Who is asked to end says so; who is killed cannot.
        said_so = "FAILED" if how == signal.SIGTERM else "RUNNING"
        assert newest.info.status == said_so
    resumed, said = mill.run("train", *words(method))
    assert "going on from a checkpoint" in said
    assert mill.checkpoints() == []
    runs = [mill.kept(one["mlflow_run_id"]) for one in (whole, resumed)]
    assert runs[0] == runs[1]
    assert [step for step, _ in runs[1][1]["loss"]] == list(range(1, whole["epochs"] + 1))
    assert whole["metrics"] == resumed["metrics"] and whole["best_epoch"] == resumed["best_epoch"]
    return str(resumed["mlflow_run_id"])


def random_ends(seed: object, number: int) -> list[tuple[int, signal.Signals]]:
    """Steps to end at, in order. A scheduler asks first (SIGTERM); the rest are killed."""
    steps = sorted(random.Random(str(seed)).sample(range(2, STEPS - 14), number))
    return [(step, signal.SIGKILL if n else signal.SIGTERM) for n, step in enumerate(steps)]


@pytest.mark.slow
def test_ended_at_random_steps_and_resumed_it_is_the_same_run_bit_for_bit(mill: Mill) -> None:
    run_id = ended_and_whole(mill, "bert4rec+st+sse+tsa+habit", random_ends(20261122, 2))
    client, experiment = tracking.connect("toy")
    found = client.search_runs([experiment], "tags.method = 'bert4rec+st+sse+tsa+habit'")
    assert len(found) == 2, "the run that was ended and its resumptions are one"
    assert run_id in {run.info.run_id for run in found}


@pytest.mark.long
@pytest.mark.parametrize("method", ["gru4rec+st", "narm+tsa", "sasrec+sse", "hstu+st"])
def test_every_backbone_resumes(mill: Mill, method: str) -> None:
    ended_and_whole(mill, method, random_ends(method, 4))


@pytest.mark.slow
def test_a_backtest_that_is_killed_goes_on_after_the_last_night_that_ended(mill: Mill) -> None:
    command = [*words("gru4rec+st"), "--split", "nightly", "--nights", "4"]
    whole, _ = mill.run("train", *command, "--comparison", "whole nights")
    for ended in (1, 3):
        process = mill.start(*command)
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            there = list((mill.lake / "toy" / "_cache" / "training").glob("*/night-*"))
            if len(there) >= ended:
                break
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    resumed, said = mill.run("train", *command)
    assert "resuming: 3 of 4 nights are done" in said or "resuming: 4 of 4" in said
    assert resumed["metrics"] == whole["metrics"] and resumed["by_age"] == whole["by_age"]
    assert mill.kept(resumed["mlflow_run_id"]) == mill.kept(whole["mlflow_run_id"])
    client, experiment = tracking.connect("toy")
    found = client.search_runs([experiment], "tags.method = 'gru4rec+st'")
    assert len(found) == 2, "the run that was killed and its resumptions are one"


@pytest.fixture(scope="module")
def ring_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    lake = tmp_path_factory.mktemp("ring")
    write_gold(lake, "toy", ring())
    return data_of(lake)


class Killed(Exception):
    pass


@pytest.mark.parametrize("ends", [(2, 7, 8), (5,)])
def test_a_training_in_two_parts_goes_on_in_either(tmp_path: Path, ends: tuple[int, ...]) -> None:
    """Ended again and again while it writes a checkpoint after every step."""
    write_gold(tmp_path, "toy", ring(users=20))
    cut = {"valid_from": 6 * DAY, "test_from": 8 * DAY}
    data = data_of(tmp_path, train_until="test", **cut)
    chosen = config("sasrec+st+habit", "tiny", epochs=3, dropout=0.1, batch_size=16)
    whole = fit(chosen, data, lambda _: None)
    kept = Checkpoints(tmp_path / "kept", every_s=0)
    written = {"again": 0, "kept": 0}

    class Ending(Checkpoints):
        def write(self, step: int, *rest: Any) -> None:
            Checkpoints.write(self, step, *rest)
            written[self.folder.name] += 1
            if step in ends and step not in ended:
                ended.append(step)
                raise Killed

    ended: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.training.fit.Checkpoints", Ending)
        for _ in (*ends, None):
            with contextlib.suppress(Killed):
                last = fit(chosen, data, lambda _: None, keep=Ending(kept.folder, 0))
    assert sorted(ended) == sorted(ends) and all(written.values())
    assert {k: v for k, v in whole.curves.items() if k.endswith("loss")} == {
        k: v for k, v in last.curves.items() if k.endswith("loss")
    }
    assert (whole.best_epoch, whole.validation) == (last.best_epoch, last.validation)
    mine, theirs = whole.model.state_dict(), last.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(ring_data: Data, tmp_path: Path) -> None:
    chosen = config("sasrec+st", "tiny", epochs=3, dropout=0.1)
    whole = fit(chosen, ring_data, lambda _: None).model.state_dict()

    def die(epoch: int, curves: Any) -> None:
        if epoch == 2:
            raise Killed

    keep = Checkpoints(tmp_path / "kept", every_s=0)
    with pytest.raises(Killed):
        fit(chosen, ring_data, lambda _: None, keep=keep, each_epoch=die)
    newest, before = sorted(keep.folder.glob("step-*"), reverse=True)
    damaged = (newest / "state.safetensors").read_bytes()
    for harm in (
        lambda: (newest / "state.safetensors").write_bytes(damaged[:-7] + b"another"),
        lambda: (newest / "state.safetensors").write_bytes(damaged[: len(damaged) // 2]),
        lambda: (newest / "state.json").write_text('{"at": '),
        lambda: (newest / "state.json").unlink(),
    ):
        again = tmp_path / "again"
        shutil.copytree(keep.folder, again)
        for place in again.glob("step-*"):
            shutil.rmtree(place)
        harm()
        for place in (newest, before):
            shutil.copytree(place, again / place.name)
        said: list[str] = []
        taken = Checkpoints(again, every_s=1e9)
        resumed = fit(chosen, ring_data, said.append, keep=taken).model.state_dict()
        assert any(f"{newest.name} is damaged" in line for line in said)
        assert any("going on from a checkpoint" in line for line in said)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        shutil.rmtree(again)


def test_checkpoints_are_two_and_hold_no_pickle(ring_data: Data, tmp_path: Path) -> None:
    keep = Checkpoints(tmp_path / "kept", every_s=0)
    fit(config("gru4rec", "tiny", epochs=1), ring_data, lambda _: None, keep=keep)
    places = sorted(keep.folder.glob("step-*"))
    assert len(places) == 2
    files = {file.name for place in places for file in place.iterdir()}
    assert files == {"state.safetensors", "state.json"}
    with keep.alone() as mine, Checkpoints(keep.folder).alone() as other:
        assert (mine, other) == (True, False)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(mill: Mill) -> None:
    """Uneven shares: windows of 60 users in batches of 59, so that of the second batch a process has
    none. What two processes found by sharing the targets out is what one finds when it asks the same
    model about all of them."""
    command = [
        "--method",
        "sasrec+st+habit",
        "--epochs",
        "3",
        "--batch-size",
        "59",
        "--dropout",
        "0",
    ]
    one, _ = mill.run("train", *command)
    process = mill.start(*command, "--json", processes=2)
    said, error = process.communicate(timeout=300)
    assert process.returncode == 0, said + error
    two = json.loads(said.strip().splitlines()[-1])
    assert (one["processes"], two["processes"]) == (1, 2)
    curves = [mill.kept(run["mlflow_run_id"])[1] for run in (one, two)]
    for name in ("loss", "validation_ndcg_at_10"):
        for (step, value), (other_step, other) in zip(
            curves[0][name], curves[1][name], strict=True
        ):
            assert step == other_step and value == pytest.approx(other, rel=1e-3)
    again, _ = mill.run("evaluate", "--run-id", two["mlflow_run_id"])
    assert again["metrics"] == two["metrics"] and again["counts"] == two["counts"]
