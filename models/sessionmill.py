"""The command `sessionmill`: those of `python -m jobs` and of `python -m models` under one name.

`sessionmill jobs COMMAND` and `sessionmill models COMMAND` name the package; a name that only one of
them has needs none (`sessionmill run`, `sessionmill train`). Nothing heavy is imported before a command
needs it, so `--help` works where the wheel alone is installed.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from importlib import metadata

import jobs.cli
import models.cli

PACKAGES: dict[str, Callable[[list[str] | None], int]] = {
    "jobs": jobs.cli.main,
    "models": models.cli.main,
}
OF = {
    "jobs": {"guess": jobs.cli.GUESS, **jobs.cli.JOBS},
    "models": {name: one.says for name, one in models.cli.COMMANDS.items()},
}
SAME = ("score",)  # `models score` is `jobs score`
EXTRAS = {
    "pyspark": "spark", "delta": "spark", "deltalake": "spark", "duckdb": "spark", "pyarrow": "spark", "numpy": "spark",
    "psutil": "spark", "pandas": "spark", "great_expectations": "quality", "torch": "train", "scipy": "train",
    "sklearn": "train", "safetensors": "train", "optuna": "train", "mlflow": "tracking", "matplotlib": "report",
    "jinja2": "report", "sqlalchemy": "jdbc", "pyiceberg": "iceberg",
}  # fmt: skip
"""Package -> the extra that brings it."""


def package_of(command: str) -> str | None:
    """Which package a bare command is of. None: both have it, or neither."""
    having = [name for name, commands in OF.items() if command in commands]
    return having[0] if len(having) == 1 or (having and command in SAME) else None


def overview() -> str:
    lines = [
        "usage: sessionmill COMMAND …    one command; sessionmill COMMAND --help for its options",
        "       sessionmill jobs COMMAND …, sessionmill models COMMAND …    the same, with the package",
        "       sessionmill --version",
    ]
    for package, says in (("jobs", "raw logs -> tables"), ("models", "tables -> registry")):
        lines += ["", f"{package}: {says}"]
        for name, about in OF[package].items():
            shown = name if package_of(name) == package else f"{package} {name}"
            if package == "models" and name in SAME:
                continue
            lines.append(f"  {shown:<21} {about}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        print(overview())
        return 0
    if first == "--version":
        print(f"sessionmill {metadata.version('sessionmill')}")
        return 0
    package = first if first in PACKAGES else package_of(first)
    if package is None:
        names = [*PACKAGES, *(name for commands in OF.values() for name in commands)]
        meant = difflib.get_close_matches(first, names, n=1)
        near = f"did you mean {meant[0]!r}? " if meant else ""
        both = all(first in commands for commands in OF.values())
        hint = (
            f"write sessionmill jobs {first} or sessionmill models {first}"
            if both
            else f"{near}sessionmill --help lists them"
        )
        print(f"error: {first!r} is not a command: {hint}", file=sys.stderr)
        return 2
    rest = words[1:] if first == package else words
    if argv is None:  # a process of its own, which a scheduler may end
        sys.argv[1:] = rest
    try:
        return PACKAGES[package](None if argv is None else rest)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        print(
            f"error: this command needs the package {missing}: install the extra that brings it, "
            f"pip install 'sessionmill[{EXTRAS[missing]}]' (all of them: make setup)",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
