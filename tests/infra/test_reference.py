"""The reference pages are what the code says, and leave nothing out."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from jobs.core import columns
from jobs.core.settings import PREFIX, Settings
from jobs.core.source_file import load_source
from jobs.core.tables import ALL, FILTER_REASONS, REJECT_REASONS
from models.data.nights import BORN
from models.evaluation import metrics, names
from models.training.run import LOGGED
from tests.support.make_tools import REPO

sys.path.insert(0, str(REPO / "infra" / "docs"))
import error_messages
import make_reference

PAGES: dict[str, str] = {name: page() for name, page in make_reference.PAGES.items()}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    assert (make_reference.FOLDER / name).read_text("utf-8") == PAGES[name], "run: make reference"


def test_there_is_no_other_page() -> None:
    assert {file.name for file in make_reference.FOLDER.iterdir()} == set(PAGES)


def test_every_column_has_a_meaning_and_no_meaning_is_left_over() -> None:
    used = set()
    for table in ALL:
        for column in table.columns:
            assert columns.meaning(table, column)
            used.add(
                (table.full_name, column)
                if (table.full_name, column) in columns.BY_TABLE
                else column
            )
    assert {*columns.MEANING, *columns.BY_TABLE} <= used
    assert set(columns.REASONS) == {*REJECT_REASONS, *FILTER_REASONS}


def test_every_variable_has_a_meaning() -> None:
    for name in Settings.model_fields:
        assert f"| `{PREFIX}{name.upper()}` | " in PAGES["environment.md"]


def test_every_command_and_option_is_there() -> None:
    page = PAGES["commands.md"]
    for package, parser in (
        ("jobs", make_reference.jobs.cli.parser()),
        ("models", make_reference.models.cli.parser()),
    ):
        commands: Any = next(
            one for one in parser._actions if isinstance(one, argparse._SubParsersAction)
        )
        for name, command in commands.choices.items():
            section = page.split(f"\n### {package} {name}\n")[1].split("\n### ")[0]
            for action in command._actions:
                option = (action.option_strings or [action.metavar or action.dest])[0]
                assert option in ("-h",) or f"`{option}`" in section + PAGES["options.md"], option


def test_every_key_has_an_example() -> None:
    rows = [row for row in PAGES["source-file.md"].splitlines() if row.startswith("| `")]
    assert len(rows) > 90 and [row for row in rows if not row.endswith("` |")] == [], (
        "set it in infra/docs/example.toml"
    )
    assert {load_source(str(file)).name for file in make_reference.EXAMPLES} == {"shop"}


def test_every_option_says_what_it_means() -> None:
    rows = [row for row in PAGES["commands.md"].splitlines() if row.startswith("| `")]
    assert len(rows) > 100 and [row for row in rows if row.endswith("|  |")] == []


def test_every_metric_that_is_recorded_has_a_meaning() -> None:
    place, start = np.array([1, 3]), np.array([0, 1, 2])
    computed = metrics.per_target(place, start, (10,), place)
    computed |= metrics.catalogue(np.ones((1, 3), np.int64), np.ones(3, np.int64), (10,))  # type: ignore[arg-type]
    assert {name.replace("@10", "@K") for name in computed} | {"test_loss"} == set(names.METRICS)
    assert set(LOGGED) < set(names.RUN)
    assert {f"{age}_" for age in BORN} < set(names.PREFIXES)


FAULTY = """
def read(path, size):
    if size < 0:
        raise SettingsError(f"--size {size}: a number from 0")
    problem = "a file" if path else "no file"
    if path:
        raise SettingsError(problem)
    raise odd(path, "say which")

def odd(path, hint):
    return SourceError(f"{path.name} is odd: {hint}")

def other(error):
    raise SettingsError(str(error))
    raise KeyError("ours to mend")
    raise UserError(error.args[0])
"""


def test_messages_are_read_from_the_code(tmp_path: Any) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "new.py").write_text(FAULTY)
    found = error_messages.collected(tmp_path)
    assert [(one.kind, one.text) for one in found.messages] == [
        ("SettingsError", "--size <size>: a number from 0"),
        ("SettingsError", "a file"),
        ("SettingsError", "no file"),
        ("SourceError", "<name> is odd: say which"),
    ]
    assert found.composed == (("UserError", "jobs/new.py: other"),)
    assert [one.name for one in fields(found)] == ["messages", "composed"]


def test_nearly_all_messages_can_be_read() -> None:
    found = error_messages.collected(REPO)
    assert len(found.messages) > 200 and len(found.composed) <= 5


ORDERS = re.compile(r": |\. [A-Z]|; |^(?:name|use|write) ")
WITHOUT = ("Conflict", "AirflowSkipException")  # run again; no error


def test_messages_say_what_to_do() -> None:
    """A message has a second part: what to do. (Those that only pass on another's text have its.)"""
    for one in error_messages.collected(REPO).messages:
        passes_on = one.text.replace("\n", " ").endswith((">", "<more>", "<NOT_GOLD>"))
        if one.kind not in WITHOUT and not passes_on and not one.where.startswith("dags/"):
            assert ORDERS.search(one.text), f"{one.where}: {one.text}"
