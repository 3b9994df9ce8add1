"""A small log, an MLflow (SQLite and a folder) of its own, and the commands that fill it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models import cli
from tests.support.gold_world import ring, write_gold, write_silver

SOURCE = """
[source]
name = "toy"
landing = "landing/*.csv"
format = "csv"
[columns]
user_id = "u"
item_id = "i"
event_ts = "t"
[sessions]
gap_s = 1800
[filters]
min_item_events = 1
min_user_sessions = 1
[training]
preset = "tiny"
split = "temporal"
"""


class World:
    def __init__(self, root: Path) -> None:
        self.root, self.lake, self.source = root, root / "lake", root / "toy.toml"

    def run(self, *args: str) -> tuple[int, dict[str, Any] | None, str, str]:
        """A command: exit status, the JSON of its last line, all it said, its errors."""
        import contextlib
        import io

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(list(args))
        said = out.getvalue()
        last = said.strip().splitlines()[-1] if said.strip() else ""
        return status, json.loads(last) if last.startswith("{") else None, said, err.getvalue()

    def train(self, method: str, *args: str) -> dict[str, Any]:
        status, done, said, err = self.run(
            "train", "--source", str(self.source), "--method", method, "--epochs", "3",
            "--json", *args,
        )  # fmt: skip
        assert status == 0, said + err
        assert done is not None
        return done


def trained_here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A grid's trainings run in this process from now on, and not in processes of their own; their
    words, as they come."""
    from models.experiments import grid

    told: list[list[str]] = []

    def here(words: list[str], **_: Any) -> int:
        told.append(words)
        return cli.main(words)

    monkeypatch.setattr(grid, "in_a_process", here)
    return told


def file_of_version(version: int | str, name: str) -> Path:
    """A file of a registered version, as its pyfunc loads it."""
    from models.registry import tracking

    client, _ = tracking.connect("toy")
    place = Path(client.get_model_version_download_uri("toy", str(version)).removeprefix("file://"))
    [file] = place.rglob(name)
    return file


@contextmanager
def opened(root: Path) -> Iterator[World]:
    """The log at `root`, which is the working directory too."""
    from jobs.core.settings import settings

    there = World(root)
    write_gold(there.lake, "toy", ring())
    write_silver(there.lake, "toy", ring())
    there.source.write_text(SOURCE)
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SESSIONMILL_LAKE", str(there.lake))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        settings.cache_clear()
        os.chdir(root)
        yield there
        os.chdir(before)
    settings.cache_clear()
