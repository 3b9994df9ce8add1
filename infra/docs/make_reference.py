"""The pages of docs/reference, made from the code: `make reference`. A test holds them up to date."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path

import error_messages
import source_file_page
from source_file_page import texts_under

import jobs.cli
import models.cli
import models.training.reference
from jobs.core import columns
from jobs.core.settings import PREFIX, Settings
from jobs.core.tables import ALL, FILTER_REASONS, REJECT_REASONS, Table
from models.core.config import ModelConfig, TrainConfig
from models.core.knobs import knobs
from models.evaluation.names import CURVES, METRICS, PREFIXES, RUN

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "docs" / "reference"


def made_from(title: str, *files: str) -> str:
    names = ", ".join(files)
    return f"# {title}\n\n<!-- Made by `make reference` from {names}. Change it there. -->\n\n"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        lines.append(
            "| " + " | ".join(" ".join(one.replace("|", "\\|").split()) for one in row) + " |"
        )
    return "\n".join(lines) + "\n"


# -- source files ----------------------------------------------------------------------------------

TOML = re.compile(r"^```toml\n(.*?)^```$", re.M | re.S)
EXAMPLES = sorted((REPO / "infra" / "docs").glob("example*.toml"))  # of all other keys
LONGEST = 70  # characters of an example


def examples() -> dict[tuple[str, str], str]:
    """(section, key) -> a line that sets it, of the first file that does: one of this repository's
    source files, a guide, or one of EXAMPLES."""
    files = [
        *(REPO / "docs" / "formats").glob("*.toml"),
        *(REPO / "infra" / "sources").glob("*.toml"),
    ]
    texts = [file.read_text(encoding="utf-8") for file in sorted(files)]
    for guide in sorted((REPO / "docs").rglob("*.md")):
        texts += TOML.findall(guide.read_text(encoding="utf-8"))
    texts += [file.read_text(encoding="utf-8") for file in EXAMPLES]
    found: dict[tuple[str, str], str] = {}
    for text in texts:
        for section, keys in tomllib.loads(text).items():
            for key, value in keys.items():
                line = f"{key} = {_toml(value)}"
                if len(line) <= LONGEST:
                    found.setdefault((section, key), line)
    return found


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str) and '"' in value and "'" not in value:
        return f"'{value}'"
    return value.isoformat() if isinstance(value, date) else json.dumps(value, ensure_ascii=False)


# -- commands --------------------------------------------------------------------------------------


def commands() -> str:
    text = made_from("Commands", "jobs/cli.py", "models/cli.py", "models/commands") + (
        "`python -m jobs` makes tables, `python -m models` trains and promotes models. With the package "
        "installed, `sessionmill jobs …` and `sessionmill models …` are the same. Every command prints "
        "what it did; with `--json` also as JSON, on the last line. The exit status is 0 if it ended well, "
        "1 if it failed, and 2 if an option is wrong.\n"
    )
    for name, parser in (("jobs", jobs.cli.parser()), ("models", models.cli.parser())):
        text += f"\n## python -m {name}\n"
        for command, options in _commands_of(parser):
            text += f"\n### {name} {command}\n\n{_sentence(options.description or '')}\n\n"
            text += table(
                ("option", "default", "allowed", "meaning"), list(_options(name, command, options))
            )
            if (name, command) == ("models", "train"):
                text += "\nEvery setting of a training is an option, too: [Training settings](options.md).\n"
    return text


def _commands_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _options(
    package: str, command: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, ...]]:
    settings = {one.name for kind in (ModelConfig, TrainConfig) for one, _ in knobs(kind)}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        if package == "models" and action.dest in settings:
            continue  # those of docs/reference/options.md
        name = (
            ", ".join(f"`{one}`" for one in action.option_strings)
            or f"`{action.metavar or action.dest}`"
        )
        open_end = action.nargs in ("*", "?", argparse.REMAINDER)
        default = "required" if action.required and not open_end else ""
        if action.default not in (None, False, "", argparse.SUPPRESS, []):
            default = f"`{action.default}`"
        allowed = ", ".join(f"`{one}`" for one in action.choices or ())
        meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
        yield name, default, allowed, meaning


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    if "." in text.split()[0].rstrip("."):  # the name of a table
        return text + "."
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


# -- tables ----------------------------------------------------------------------------------------


def tables() -> str:
    text = made_from("Tables", "jobs/core/tables.py", "jobs/core/columns.py") + (
        "Every table is a Delta table at `$SESSIONMILL_LAKE/<source>/<layer>/<name>`. Names, keys and types "
        "are a contract: changing them is a breaking change. Types are Spark SQL's.\n"
    )
    for one in ALL:
        text += f"\n## {one.full_name}\n\n{one.doc}\n\nKey: {', '.join(f'`{key}`' for key in one.key)}.\n\n"
        text += table(("column", "type", "meaning"), list(_columns(one)))
    reasons = {name: columns.REASONS[name] for name in (*REJECT_REASONS, *FILTER_REASONS)}
    text += "\n## Reasons of rejects\n\nThe first reason that holds. `keep` and `bot` are those of `bronze.filtered`.\n\n"
    return text + table(
        ("reason", "meaning"), [(f"`{name}`", says) for name, says in reasons.items()]
    )


def _columns(one: Table) -> Iterator[tuple[str, str, str]]:
    metrics = [name for name in one.columns if columns.meaning(one, name) == columns.METRIC]
    for name, kind in one.columns.items():
        if name in metrics:
            if name != metrics[0]:
                continue
            shown = "`[known_]{served,recent_pop,personal_top}_{hr,ndcg}_at_10[_low,_high]`"
        else:
            shown = f"`{name}`"
        yield shown, f"`{kind}`", columns.meaning(one, name)


# -- the environment -------------------------------------------------------------------------------

OTHERS = (
    ("MLFLOW_TRACKING_URI", "MLflow's server or database; unset: a database in `.mlflow`, here."),
    ("AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY", "An S3 object store's region and key, unless the machine has a role."),
    ("AWS_ENDPOINT_URL", "The address of an S3 of your own."),
    ("AWS_ALLOW_HTTP", "`true`: that address may be http."),
    ("GOOGLE_APPLICATION_CREDENTIALS", "The key file for `gs://`."),
    ("JAVA_HOME", "A Java 17 or 21 to use; unset: the one that is found, or that `make setup` brought."),
)  # fmt: skip


def environment() -> str:
    text = made_from("Environment variables", "jobs/core/settings.py") + (
        "Where it runs is decided by the environment. An unknown `SESSIONMILL_…` variable is an error, because "
        "a misspelt one would be ignored.\n\n"
    )
    rows = []
    meanings = texts_under(Settings)
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        rows.append((f"`{PREFIX}{name.upper()}`", default, meanings[name]))
    text += table(("variable", "default", "meaning"), rows)
    text += "\n## Of other programs\n\nThese are read, too.\n\n"
    return text + table(
        ("variable", "meaning"),
        [(f"`{name}`".replace(", ", "`, `"), says) for name, says in OTHERS],
    )


# -- metrics ---------------------------------------------------------------------------------------


def metrics() -> str:
    text = made_from("Metrics", "models/evaluation/names.py") + (
        "Names are those of a training's JSON. In MLflow `@` is written `_at_`. A metric that is a mean over "
        "users has `_low` and `_high` beside it: its 95 % bootstrap interval. What they are for: "
        "[What a comparison says](../concepts/comparisons.md).\n"
    )
    for title, names in (
        ("Of rankings", METRICS), ("Beginnings of names", PREFIXES), ("Of a run", RUN), ("Curves, one value an epoch", CURVES),
    ):  # fmt: skip
        rows = [(f"`{name}`", says) for name, says in names.items()]
        text += f"\n## {title}\n\n" + table(("name", "meaning"), rows)
    return text


# -- errors ----------------------------------------------------------------------------------------


def errors() -> str:
    text = made_from("Error messages", "the code") + error_messages.page(REPO, table)
    text += (
        "\n## Of engines and file systems\n\nWhere the text of an engine's error has one of these words, a job ends with "
        "the sentence beside it. The published tables are as their last commits left them: run the command again.\n\n"
    )
    return text + table(
        ("the error has", "message"),
        [(f"`{word}`", says) for word, says in jobs.cli.REMEDIES.items()],
    )


PAGES: dict[str, Callable[[], str]] = {
    "source-file.md": lambda: source_file_page.page(examples()),
    "options.md": models.training.reference.page,
    "commands.md": commands,
    "tables.md": tables,
    "environment.md": environment,
    "metrics.md": metrics,
    "errors.md": errors,
}


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
