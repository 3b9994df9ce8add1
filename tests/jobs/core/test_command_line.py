"""What a mistake on the command line answers: a sentence, and no usage of forty lines."""

import signal
import subprocess
import sys
from typing import Any

import pytest

import jobs.cli
import models.cli
from models.experiments import grid


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("run --source x --day soon", "run: error: argument --day: 'soon' is not a date: write"),
        (
            "score --source x --k ten",
            "--k: 'ten' is not a whole number. Options: python -m jobs score",
        ),
        (
            "runn --source x",
            "python -m jobs: error: 'runn' is not a command: did you mean 'run'? Commands: python",
        ),
        (
            "run --source x --dya 3",
            "jobs run: error: unrecognized arguments: --dya 3: did you mean --day? Options: python -m jobs run",
        ),
        ("", "python -m jobs: error: name a command. Commands: python -m jobs --help"),
        ("run", "jobs run: error: the following arguments are required: --source. Options: "),
    ],
)
def test_jobs(argv: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        jobs.cli.main(argv.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and says in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            "grid --source x --comparison c --methods pop --seeds 1 --results r.json --epochs 3",
            "unrecognized arguments: --epochs. Options of the trainings come last, after --. Options: ",
        ),
        (
            "compare --source x --comparison c --sead 3",
            "unrecognized arguments: --sead 3. Options: python -m models compare",
        ),
        ("train --source x --method pop --epochs many", "--epochs: 'many' is not a whole number. "),
        ("train --source x --method pop --learning-rate big", "'big' is not a number. Options: "),
        ("comapre --source x", "did you mean 'compare'?"),
    ],
)
def test_models(argv: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        models.cli.main(argv.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and says in said and len(said.splitlines()) == 1


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs.cli, "guess", interrupt)
    assert jobs.cli.main(["guess", "log.csv"]) == 130
    assert "guess stopped: interrupted (Ctrl-C). Tables are as" in capsys.readouterr().err
    command = models.cli.COMMANDS["params"]
    monkeypatch.setitem(
        models.cli.COMMANDS,
        "params",
        models.cli.Command(command.says, command.options, interrupt, source=False),
    )
    assert models.cli.main(["params", "--method", "pop", "--items", "3"]) == 130
    assert "params was interrupted (Ctrl-C). What it had recorded" in capsys.readouterr().err


class Training:
    """A process that ends by itself, or only by the signal that it is sent."""

    def __init__(self, status: int, waits: list[BaseException]) -> None:
        self.status, self.waits, self.sent = status, waits, list[int]()

    def __call__(self, words: list[str], **_: Any) -> "Training":
        assert words[:3] == [sys.executable, "-m", "models"]
        return self

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        if self.waits:
            raise self.waits.pop(0)
        return self.status

    def send_signal(self, number: int) -> None:
        self.sent.append(number)


def test_a_grid_ends_with_the_training_that_ctrl_c_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, waits, sent in (
        (130, [], []),
        (-signal.SIGINT, [], []),
        (0, [KeyboardInterrupt()], []),
        (0, [KeyboardInterrupt(), subprocess.TimeoutExpired("models", 1)], [signal.SIGINT]),
    ):
        training = Training(status, list(waits))
        monkeypatch.setattr(grid.subprocess, "Popen", training)
        with pytest.raises(KeyboardInterrupt):
            grid.in_a_process(["train"])
        assert training.sent == sent and not training.waits
    monkeypatch.setattr(grid.subprocess, "Popen", Training(1, []))
    assert grid.in_a_process(["train"]) == 1
