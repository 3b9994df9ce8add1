"""All settings of a training as a page, docs/reference/options.md: `make reference`."""

from __future__ import annotations

import argparse
import math
import typing
from typing import Any

from models.core.config import ModelConfig, TrainConfig
from models.core.knobs import Knob, knobs, option_of
from models.training.options import train_parser

HEAD = """# Settings of a training

<!-- Made by `make reference` from models/core/config.py and models/training/options.py. Change it
there. -->

The default is that of the code; a preset (`--preset`: models/core/config.py) changes some of them,
and an option changes both. A setting without an option is set by a preset, or by the data. The
last column says where `python -m models tune` looks for a setting's value, and for which methods;
"trained" are all that are no baselines, "log" is evenly in the logarithm. A range is widened to
hold the preset's own value.
"""
SECTIONS = (
    ("The model", ModelConfig, "`python -m models train` and `params` take these options."),
    ("Its training", TrainConfig, "`python -m models train` takes these options."),
)
OTHERS = """
## Other options of `python -m models train`

| option | default | allowed | meaning |
|---|---|---|---|
"""


def page() -> str:
    return HEAD + "".join(_section(*one) for one in SECTIONS) + OTHERS + _others()


def _section(title: str, kind: type, says: str) -> str:
    types = typing.get_type_hints(kind)
    rows = []
    for one, told in knobs(kind):
        whole = types[one.name] is int
        option = "" if told.hidden else f"`{option_of(one)}`"
        if types[one.name] is bool and option:
            option += f", `--no-{option_of(one).removeprefix('--')}`"
        cells = (
            f"`{one.name}`",
            option,
            f"`{_figure(one.default)}`",
            _allowed(told, whole),
            told.help,
            "" if told.tune is None else told.tune.in_words,
        )
        rows.append("| " + " | ".join(cells) + " |\n")
    head = "| setting | option | default | allowed | meaning | tuned |\n" + "|---" * 6 + "|\n"
    return f"\n## {title}\n\n{says}\n\n{head}{''.join(rows)}"


def _figure(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _allowed(told: Knob, whole: bool) -> str:
    if told.choices:
        return ", ".join(f"`{one}`" for one in told.choices)
    if whole and told.low is not None and told.high == math.inf:
        return f"{told.low:.0f} or more"
    return told.allowed(whole).removesuffix(", finite")


def _others() -> str:
    """Options that are no settings, as argparse has them."""
    settings = {one.name for _, kind, _ in SECTIONS for one, _ in knobs(kind)}
    lines = []
    for action in train_parser()._actions:
        if action.dest in settings or isinstance(action, argparse._HelpAction):
            continue
        default = "required" if action.required else ""
        if action.default is not None:
            default = f"`{action.default}`"
        choices = ", ".join(f"`{one}`" for one in action.choices or ())
        cells = (f"`{action.option_strings[0]}`", default, choices, action.help or "")
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)
