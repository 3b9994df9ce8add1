"""The wheel, installed alone: the command `sessionmill` and all of its `--help`."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import sessionmill
from tests.infra.test_documents import PARTS
from tests.support.make_tools import REPO, make, uv


def test_the_overview_has_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert sessionmill.main(["--help"]) == 0
    shown = [
        line[2:].split("  ")[0]
        for line in capsys.readouterr().out.splitlines()
        if line[:2] == "  " != line[2:4]
    ]
    both = set(sessionmill.OF["jobs"]) & set(sessionmill.OF["models"])
    assert {"score", "explain"} <= both
    twice = both - set(sessionmill.SAME)
    wanted = {*sessionmill.OF["jobs"], *sessionmill.OF["models"]} - twice
    assert sorted(shown) == sorted(
        wanted | {f"{of} {one}" for of in sessionmill.OF for one in twice}
    )


@pytest.mark.parametrize(
    ("words", "beginning"),
    [(["run"], "usage: python -m jobs run"), (["jobs", "run"], "usage: python -m jobs run"), (["train"], "usage: python -m models train"), (["models", "explain"], "usage: python -m models explain"), (["score"], "usage: python -m jobs score")],
)  # fmt: skip
def test_a_command_is_found_by_its_name(
    capsys: pytest.CaptureFixture[str], words: list[str], beginning: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        sessionmill.main([*words, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(beginning)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("explain", "write sessionmill jobs explain or sessionmill models explain"), ("nix", "sessionmill --help lists them"), ("trian", "did you mean 'train'? sessionmill --help lists them")],
)  # fmt: skip
def test_a_name_that_is_none_or_two_is_refused(
    capsys: pytest.CaptureFixture[str], word: str, hint: str
) -> None:
    assert sessionmill.main([word]) == 2
    assert capsys.readouterr().err == f"error: {word!r} is not a command: {hint}\n"


def test_an_extra_brings_the_package_that_is_missing() -> None:
    named = {
        "sklearn": "scikit-learn",
        "delta": "delta-spark",
        "great_expectations": "great-expectations",
    }
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for package, extra in sessionmill.EXTRAS.items():
        wanted = named.get(package, package)
        assert any(one.startswith(wanted) for one in extras[extra]), (package, extra)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The programs of an environment that has the wheel and what it always needs."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sources").mkdir()
    for part in PARTS:
        whole, there = REPO / part, folder / "sources" / part
        shutil.copytree(whole, there) if whole.is_dir() else shutil.copy2(whole, there)
    python = make("--eval", "show-python: ; @echo $(PYTHON)", "show-python")
    for command in (
        ["build", "--quiet", "--wheel", "--python", python, "--out-dir", str(folder / "dist"), str(folder / "sources")],
        ["venv", "--quiet", "--python", python, str(folder / "venv")],
    ):  # fmt: skip
        subprocess.run([uv(), *command], check=True, timeout=300)
    [wheel] = (folder / "dist").glob("sessionmill-*.whl")
    install = ["pip", "install", "--quiet", "--python", str(folder / "venv" / "bin" / "python")]
    subprocess.run([uv(), *install, str(wheel)], check=True, timeout=300)
    yield folder / "venv" / "bin"


def said(programs: Path, *words: str, status: int = 0) -> str:
    env = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(programs)}
    done = subprocess.run([str(programs / "sessionmill"), *words], cwd=programs, env=env, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == status, (words, done.stderr)
    return done.stdout + done.stderr


EVERY_HELP = """
import contextlib, io, sys
from models import sessionmill
for package, commands in sessionmill.OF.items():
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            sessionmill.main([package, command, "--help"])
        assert shown.getvalue().startswith(f"usage: python -m {package} {command}"), command
        print(command)
assert not {"pyspark", "torch", "mlflow", "numpy"} & set(sys.modules)
"""


@pytest.mark.slow
def test_help_needs_no_extra(alone: Path) -> None:
    assert "sessionmill train" not in said(alone, "--help") and "  train " in said(alone)
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert said(alone, "--version") == f"sessionmill {version}\n"
    assert "--epochs" in said(alone, "models", "train", "--help")
    done = subprocess.run([str(alone / "python"), "-I", "-c", EVERY_HELP], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == sum(map(len, sessionmill.OF.values()))


@pytest.mark.slow
def test_a_command_without_its_extra_names_it(alone: Path) -> None:
    (alone / "clicks.toml").write_text(
        '[source]\nname = "clicks"\nlanding = "log.csv"\nformat = "csv"\n'
        '[columns]\nuser_id = "u"\nitem_id = "i"\nevent_ts = "t"\n'
    )
    for words in (("run",), ("train", "--method", "pop")):
        told = said(alone, *words, "--source", "clicks.toml", status=1)
        assert "error: this command needs the package" in told and "sessionmill[" in told, told
        assert "Traceback" not in told
