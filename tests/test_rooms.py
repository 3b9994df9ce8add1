"""The rooms of the tree: who may import whom, and that the check sees what it must see."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("expectations", "jobs", "models")
FOLDERS = (*(REPO / name for name in PACKAGES), REPO / "dags" / "sessionmill_dags")
MOST_MODULES = 18
LONGEST_FUNCTION = 60
MOST_SHAPED_BY_HAND = 120


def checked(tree: Path) -> tuple[int, str]:
    """What the linter says of a tree: exit status, words."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(
        command, cwd=tree, env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin"}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        there = tree / folder.name
        shutil.copytree(folder, there, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", tree)
    return tree


def test_a_room_imports_only_what_lies_below_it(copied: Path) -> None:
    status, said = checked(copied)
    assert status == 0, said


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("jobs/core/errors.py", "from jobs.lake import delta", "rooms"),
        ("jobs/core/errors.py", "def late():\n    from jobs.gold import items", "rooms"),
        (
            "models/core/errors.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from models.data import splits",
            "rooms",
        ),
        ("jobs/silver/cut_arrow.py", "from jobs.bronze import landing", "rooms"),
        ("jobs/lake/filesystem.py", "def late():\n    from jobs.lake import delta", "cycles"),
        ("models/serving/answer.py", "def late():\n    from jobs.core import tables", "serving"),
        ("models/data/splits.py", "from jobs.bronze import landing", "tables"),
        ("jobs/core/errors.py", "def late():\n    from sessionmill_dags import pods", "rooms"),
    ],
)
def test_a_line_in_the_wrong_room_is_found(
    copied: Path, file: str, line: str, contract: str
) -> None:
    names = dict(
        re.findall(r'id = "(\w+)"\nname = "([^"]+)"', (REPO / "pyproject.toml").read_text())
    )
    place = copied / file
    before = place.read_text()
    try:
        place.write_text(f"{before}\n\n{line}\n")
        status, said = checked(copied)
    finally:
        place.write_text(before)
    assert status == 1
    assert re.search(re.escape(names[contract]) + r"\s+BROKEN", said), said


def test_every_room_says_what_it_is_and_is_small() -> None:
    for package in PACKAGES:
        for folder in [REPO / package, *(REPO / package).rglob("*/")]:
            if folder.name == "__pycache__" or not folder.is_dir():
                continue
            modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
            assert len(modules) <= MOST_MODULES, folder
            if folder.parent != REPO:
                assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_the_wheel_has_every_module() -> None:
    """A folder without `__init__.py`, or outside the lists, would be missing where it is installed."""
    told = tomllib.loads((REPO / "pyproject.toml").read_text())
    find = told["tool"]["setuptools"]["packages"]["find"]
    found = {
        one.replace(".", "/")
        for where in find["where"]
        for one in find_packages(str(REPO / where), include=find["include"])
    }
    there = {
        file.parent.relative_to(folder.parent).as_posix()
        for folder in FOLDERS
        for file in folder.rglob("*.py")
    }
    assert found == there


def test_tests_mirror_the_rooms() -> None:
    for package in ("jobs", "models"):
        rooms = {one.name for one in (REPO / package).iterdir() if (one / "__init__.py").exists()}
        mirrored = {one.name for one in (REPO / "tests" / package).iterdir() if one.is_dir()}
        assert mirrored - {"__pycache__"} <= rooms


def test_no_function_is_longer_than_a_screen() -> None:
    found = {}
    for package in (*PACKAGES, "dags"):
        for file in (REPO / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if (
                    isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                    and node.end_lineno is not None
                ):
                    lines = node.end_lineno - node.lineno + 1
                    if lines > LONGEST_FUNCTION:
                        found[f"{file.relative_to(REPO)}:{node.name}"] = lines
    assert not found


def test_the_formatter_gives_nearly_all_shapes() -> None:
    by_hand = sum(
        file.read_text(encoding="utf-8").count("# fmt: skip")
        for name in PACKAGES
        for file in (REPO / name).rglob("*.py")
    )
    assert by_hand <= MOST_SHAPED_BY_HAND
