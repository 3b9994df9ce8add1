"""Documents, docstrings, comments, messages and pages are in plain English: old words stay out."""

from __future__ import annotations

import re

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


@pytest.mark.parametrize(("document", "most"), [("ARCHITECTURE.md", 450), ("", 600)])
def test_paragraphs_are_short(document: str, most: int) -> None:
    """A newcomer finds a fact by its place: one idea a paragraph or list item."""
    long = [
        f"{file}:{line}: {len(text)} characters: {text[:60]}…"
        for file, line, text in prose.paragraphs()
        if document in file and len(text) > most
    ]
    assert long == [], "\n".join([f"break these up ({most} characters at most):", *long])


def test_sentences_are_short() -> None:
    long = [
        f"{file}:{line}: {len(sentence.split())} words: {sentence[:80]}…"
        for file, line, text in prose.paragraphs()
        for sentence in prose.sentences(text)
        if len(sentence.split()) > 36
    ]
    assert long == [], "\n".join(["make two sentences of these (36 words at most):", *long])


def test_all_of_a_document_is_measured() -> None:
    read = {file for file, _, _ in prose.paragraphs()}
    assert {"ARCHITECTURE.md", "docs/lake.md", "docs/guides/source-file.md"} <= read
    assert not {file for file in read if file.startswith("docs/reference/")}
    assert prose.sentences("One (of `a b`.) Two.") == ["One (of NAME.", "Two."]


def slug(heading: str) -> str:
    """The anchor of a heading, by the rule of the site and of GitHub."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_contents_of_the_architecture_name_all_of_its_sections() -> None:
    text = (prose.REPO / "ARCHITECTURE.md").read_text("utf-8")
    whole = prose.CODE.sub("", text)
    sections = [slug(one) for one in re.findall(r"^###? (.+)$", whole, re.M)]
    linked = set(re.findall(r"\]\(#([\w-]+)\)", whole))
    assert len(set(sections)) == len(sections)
    assert linked <= set(sections), f"no such section: {linked - set(sections)}"
    assert set(sections) - linked == {"contents"}
