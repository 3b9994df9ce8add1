"""What people read, as lines of text: documents, docstrings, comments, messages, templates, help."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.support.make_tools import REPO

PYTHON = ("jobs", "models", "expectations", "dags", "infra")
LEFT_OUT = {"LAB_LOG.md"}  # a journal: dated, and never rewritten
CODE = re.compile(r"^```.*?^```", re.M | re.S)
TARGET = re.compile(r"\]\([^)\s]*\)")
END = re.compile(r"(?<=[.!?])[)*\"]*\s+")
NAMES = re.compile(r"`[^`\n]*`|\]\([^)\s]*\)")

OLD = {
    r"told": "reported; trained on; distinguished",
    r"pass(?:ed|es) over": "skipped",
    r"of late": "recent",
    r"st(?:ands?|ood)(?! for\b| in for\b|-)": "is",
    r"asked about": "evaluated on",
    r"in vain": "shown but not chosen",
    r"(?:it|and|this|they) says? so|said so": "(what it says)",
    r"surely": "certainly, or leave it out",
    r"nobody looked": "the check was skipped",
    r"held against|holds? (?:\w+ ){1,4}against": "compared with",
    r"way out": "fix",
    r"taught": "trained on",
    r"go(?:es|ing)? on where": "continue where",
    r"nobody knows": "is not known",
    r"forgotten people|people who were forgotten": "erased users",
    r"is no (?:number|Delta|SQL|regular|text|time\b)|are no numbers": "is not a",
    r"whatever the (?:gate|suite) would say": "without the gate",
}
"""Words of an English of our own, as regular expressions -> what to write."""
FOUND = re.compile(r"\b(?:" + "|".join(OLD).replace(" ", r"\s+") + r")\b", re.I)


def texts() -> Iterator[tuple[str, int, str]]:
    """(file, line, text) of everything in the repository that is prose."""
    for file in (
        sorted(REPO.glob("*.md"))
        + sorted((REPO / "docs").rglob("*.md"))
        + [
            one
            for folder in ("benchmarks", "results")
            for one in sorted((REPO / folder).glob("*.md"))
        ]
    ):
        if file.name not in LEFT_OUT and "reference" not in file.parts:
            yield from _document(file)
    for file in sorted((REPO / "docs").rglob("*.toml")) + sorted(
        (REPO / "infra" / "sources").glob("*.toml")
    ):
        yield from _lines(file, lambda line: line.partition("#")[2])
    yield from _lines(
        REPO / "Makefile",
        lambda line: line if "##" in line or line.startswith("#") or "echo" in line else "",
    )
    for folder in PYTHON:
        for file in sorted((REPO / folder).rglob("*.py")):
            yield from _python(file)
        for file in sorted((REPO / folder).rglob("*.j2")):
            yield from _lines(file, lambda line: line)


def _name(file: Path) -> str:
    return file.relative_to(REPO).as_posix()


def _lines(file: Path, text: object) -> Iterator[tuple[str, int, str]]:
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if shown := text(line):  # type: ignore[operator]
            yield _name(file), number, shown


def _document(file: Path) -> Iterator[tuple[str, int, str]]:
    whole = CODE.sub(lambda box: "\n" * box[0].count("\n"), file.read_text("utf-8"))
    for number, line in enumerate(whole.splitlines(), 1):
        yield _name(file), number, NAMES.sub("", line)


def _python(file: Path) -> Iterator[tuple[str, int, str]]:
    source = file.read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield _name(file), node.lineno, NAMES.sub("", node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield _name(file), token.start[0], NAMES.sub("", token.string)


def paragraphs() -> Iterator[tuple[str, int, str]]:
    """(file, line, text) of each paragraph and list item of the documents that explain: without
    boxes, tables, names in code and targets of links."""
    pages = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")]
    pages += [one for one in sorted((REPO / "docs").rglob("*.md")) if "reference" not in one.parts]
    for page in pages:
        whole = CODE.sub(lambda box: "\n" * box[0].count("\n"), page.read_text("utf-8"))
        for number, line in enumerate(whole.splitlines(), 1):
            if line and not line.startswith("|"):
                yield _name(page), number, TARGET.sub("]", line)


def sentences(paragraph: str) -> list[str]:
    """A paragraph cut where sentences end; a name in code counts as one word."""
    return END.split(re.sub(r"`[^`]*`", "NAME", paragraph))


def found() -> list[str]:
    """`file:line: the words, in their line`, of every old word."""
    hits = []
    for file, number, text in texts():
        for match in FOUND.finditer(text):
            line = number + text[: match.start()].count("\n")
            around = text[max(0, match.start() - 60) : match.end() + 60]
            hits.append(f"{file}:{line}: {match[0]!r} in …{' '.join(around.split())}…")
    return list(dict.fromkeys(hits))
