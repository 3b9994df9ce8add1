"""One setting of a model or its training, declared once: default, range or choices, option, help.

The command line (`models/training/options.py`), the checks (`check`), `python -m models params`, what `tune` searches
(`models/experiments/search.py`) and docs/reference/options.md (`models/training/reference.py`) read
the declaration; there is no second list of names.
"""

from __future__ import annotations

import argparse
import math
import typing
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any

from models.core.errors import UserError

MOST = 1_000_000  # of what sizes a tensor: what is larger is a slip, and torch's error says little
LARGEST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Within what range `python -m models tune` looks for a setting's value, and for whom.

    Args:
        low, high: the range, both ends included; with `around`, as multiples of the preset's value.
        log: drawn evenly in its logarithm; both ends are above 0.
        of: which methods read the setting: a backbone's or baseline's name, an encoding such as
            "+habit", "trained" (all that are no baselines) or "sessionrec".
    """

    low: float
    high: float
    log: bool = False
    around: bool = False
    of: tuple[str, ...] = ("trained",)

    def range_of(self, value: float, whole: bool) -> tuple[float, float]:
        """Both ends for a setting whose preset has `value`, which is always inside."""
        low, high = (self.low * value, self.high * value) if self.around else (self.low, self.high)
        if whole:
            low, high = max(1, math.floor(low)), math.ceil(high)
        return min(low, value), max(high, value)

    @property
    def in_words(self) -> str:
        """The range and whose it is."""
        unit = " times the preset's value" if self.around else ""
        scale = ", log" if self.log else ""
        return f"{self.low:g} to {self.high:g}{unit}{scale} ({', '.join(self.of)})"


@dataclass(frozen=True, kw_only=True)
class Knob:
    """What may be set, and how a person sets it.

    Args:
        help: what it means, as `--help` prints it.
        choices: the texts that are allowed; empty: any, or a number.
        low, high: the range of a number; whole numbers include both ends.
        open_low, open_high: a fraction may not be the end itself.
        option: on the command line; empty: the field's name with dashes.
        hidden: not on the command line: presets, or the data, set it.
        tune: where `tune` looks for its value; None: it is not tuned.
    """

    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    option: str = ""
    hidden: bool = False
    tune: Tune | None = None

    def fault(self, option: str, value: Any, whole: bool) -> str:
        """What is wrong with a value, with the fix; empty: nothing."""
        if self._holds(value, whole):
            return ""
        kind = "" if self.choices else "a whole number, " if whole else "a number "
        return f"{option} {value}: use {kind}{self.allowed(whole)}"

    def _holds(self, value: Any, whole: bool) -> bool:
        if self.choices:
            return value in self.choices
        if self.low is None:
            return True
        if whole:
            return bool(self.low <= value <= min(self.high, LARGEST))
        return bool(
            self.low < value < self.high
            or (value == self.low and not self.open_low)
            or (value == self.high < math.inf and not self.open_high)
        )

    def allowed(self, whole: bool) -> str:
        """The choices or the range in words; empty: anything of the type."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.low is None:
            return ""
        if whole:
            return f"{self.low:.0f} to {int(min(self.high, LARGEST)):,}"
        ends = f"{'above' if self.open_low else 'from'} {self.low:g}"
        if self.high < math.inf:
            return f"{ends} {'to below' if self.open_high else 'to'} {self.high:g}"
        return f"{ends}, finite"


def knob(default: Any, help: str, **how: Any) -> Any:
    """A dataclass field that is a setting; `how` as in `Knob`."""
    return field(default=default, metadata={"knob": Knob(help=help, **how)})


def knobs(kind: type) -> Iterator[tuple[Field[Any], Knob]]:
    """The settings of a configuration class, in order."""
    for one in fields(kind):
        if "knob" in one.metadata:
            yield one, one.metadata["knob"]


def option_of(one: Field[Any]) -> str:
    """How a setting is written on the command line."""
    told: Knob = one.metadata["knob"]
    return told.option or "--" + one.name.replace("_", "-")


def option_named(kind: type, name: str) -> str:
    """The option of one setting of a configuration class."""
    return next(option_of(one) for one, _ in knobs(kind) if one.name == name)


def check(config: Any) -> None:
    """Raises:
    UserError: a setting is out of its range or no choice; named as the option that sets it.
    """
    for one, told in knobs(type(config)):
        value = getattr(config, one.name)
        if fault := told.fault(option_of(one), value, isinstance(value, int)):
            raise UserError(fault)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """An option for each setting that is not hidden; none has a default: what is not given stays
    as the preset has it."""
    types_of = typing.get_type_hints(kind)
    for one, told in knobs(kind):
        if told.hidden:
            continue
        how: dict[str, Any] = {
            "dest": one.name,
            "default": None,
            "help": told.help.replace("%", "%%"),
        }
        if types_of[one.name] is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif not told.choices:
            how["type"] = types_of[one.name]
        else:
            how["metavar"] = "{" + ",".join(told.choices) + "}"
        parser.add_argument(option_of(one), **how)
