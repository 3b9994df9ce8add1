"""Documents, docstrings, comments, messages and pages are in plain English: old words stay out."""

from __future__ import annotations

import pytest

from tests.support import prose


def test_no_old_word_is_in_what_people_read() -> None:
    found = prose.found()
    assert found == [], "\n".join(
        [*found, "", "say instead:", *(f"  {old}: {say}" for old, say in prose.OLD.items())]
    )


@pytest.mark.parametrize(
    "line",
    ["the share of targets is told", "lines were passed over", "the item stands in a list", "and says so", "no bend can be told from chance", "drift: nobody looked", "held against the days before", "what is surely right"],
)  # fmt: skip
def test_an_old_word_is_found(line: str) -> None:
    assert prose.FOUND.search(line)


@pytest.mark.parametrize(
    "line",
    ["a stand-in for the server", "`$` stands for a name", "a standalone master", "in one pass over the rows", "the source file says so many days"],
)  # fmt: skip
def test_other_words_are_not(line: str) -> None:
    assert not prose.FOUND.search(line)


def test_all_kinds_of_text_are_read() -> None:
    read = {file for file, _, _ in prose.texts()}
    assert {
        "README.md", "docs/runbook.md", "jobs/cli.py", "models/report/report.html.j2", "Makefile",
        "dags/sessions_daily.py", "docs/formats/segment.toml", "infra/demo/run.py",
    } <= read  # fmt: skip
    assert not {file for file in read if file.startswith(("tests/", "docs/reference/", "LAB_LOG"))}
