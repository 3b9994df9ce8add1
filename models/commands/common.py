"""Options and arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from models.core.errors import UserError
from models.training.options import split_asked

COMPARISON = "names a set of trainings that are compared with each other"


def add_threads(command: argparse.ArgumentParser) -> None:
    """How many threads PyTorch has."""
    command.add_argument("--threads", type=int, help="CPU threads")


def add_version(command: argparse.ArgumentParser, alias: str | None = "champion") -> Any:
    """A registered version, by its alias or its number; the group, which may get more ways."""
    which = command.add_mutually_exclusive_group()
    default = alias or "serving where it is there, else champion"
    which.add_argument("--alias", default=alias, help=f"default: {default}")
    which.add_argument("--model-version", type=int, metavar="N", help="in place of an alias")
    return which


def add_of_every_training(command: argparse.ArgumentParser) -> None:
    """What each of many trainings gets, and where their results go."""
    command.add_argument("--results", metavar="FILE", help="a JSON file for the results")
    command.add_argument(
        "options", nargs="*", metavar="-- OPTION", help="of every `train`, after --"
    )


def numbers(option: str, text: str, kind: Any) -> list[Any]:
    """The numbers of an option.

    Raises:
        UserError: a part is not a number.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: numbers by comma, such as 1,2") from None


def split_of_log(args: argparse.Namespace, source: Any, lake: str) -> str:
    """The split that is asked for, or that of the log's nights."""
    from models.data.load import split_by_default

    asked = split_asked(args, source.training)
    return asked or split_by_default(lake, source.name, args.table_version)
