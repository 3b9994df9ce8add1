"""The feedback rule: whether an event is positive, negative, exposed or neutral.

A source file lists, under `negative`, `positive` and `exposed`, types of events and conditions on
`value`. They are tried in this order. What no entry holds of is neutral; where there is no
`positive` rule, it is positive. An entry says nothing of an event whose type (value) is null.

The rule is stated here once, in two renderings: `column` for Spark, `codes` for NumPy.
`tests/jobs/reading/test_typed_events.py` compares one with the other.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pyspark.sql import Column

FEEDBACK = ("positive", "negative", "exposed", "neutral")
"""The names, as tables have them. A name's place is its code, as arrays have it."""
POSITIVE, NEGATIVE, EXPOSED, NEUTRAL = range(len(FEEDBACK))

IS_KNOWN = "coalesce({x} IN (" + ", ".join(f"'{name}'" for name in FEEDBACK) + "), false)"
"""Spark SQL: `{x}` is one of the names."""

CONDITION = re.compile(r"^\s*value\s*(>=|<=|>|<|==|!=)\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*$")
"""An entry of this form is a condition on `value`; any other is a type of event."""
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
    "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
TRIED = (NEGATIVE, POSITIVE, EXPOSED)

Rules = Mapping[str, Sequence[str] | None]
"""`positive` (None: there is no such rule), `negative` and `exposed`: their entries."""


def entries(rules: Rules) -> list[str]:
    """All entries of the three rules."""
    return [entry for name in FEEDBACK[:NEUTRAL] for entry in rules.get(name) or ()]


def uses_value(rules: Rules) -> bool:
    """Whether an entry is a condition on `value`."""
    return any(CONDITION.match(entry) for entry in entries(rules))


def otherwise(rules: Rules) -> int:
    """The code of an event that no entry holds of."""
    return POSITIVE if rules.get("positive") is None else NEUTRAL


def column(rules: Rules) -> Column:
    """The name, by Spark, from the columns `event_type` and `value`."""
    from pyspark.sql import functions as F

    def holds(entry: str) -> Column:
        condition = CONDITION.match(entry)
        if condition:
            held: Column = COMPARE[condition[1]](F.col("value"), F.lit(float(condition[2])))
            return held
        return F.col("event_type") == F.lit(entry)

    def any_holds(code: int) -> Column:
        found = F.lit(False)
        for entry in rules.get(FEEDBACK[code]) or ():
            found = found | F.coalesce(holds(entry), F.lit(False))
        return found

    first, *later = TRIED
    chosen = F.when(any_holds(first), FEEDBACK[first])
    for code in later:
        chosen = chosen.when(any_holds(code), FEEDBACK[code])
    return chosen.otherwise(FEEDBACK[otherwise(rules)])


def codes(
    rules: Rules, event_type: NDArray[Any] | None, value: NDArray[np.float64] | None, count: int
) -> NDArray[np.int8]:
    """int8[count]: the code, by NumPy.

    Args:
        event_type: object[count], no text where null; None: no event has one.
        value: float64[count], NaN where null; None: no event has one.
    """

    import numpy as np  # (DAG files read source files, and need the names only)

    def holds(entry: str) -> NDArray[np.bool_]:
        condition = CONDITION.match(entry)
        read = event_type if condition is None else value
        if read is None:
            return np.zeros(count, dtype=bool)
        if condition is None:
            return np.asarray(read == entry, dtype=bool)
        return np.asarray(COMPARE[condition[1]](read, float(condition[2])) & ~np.isnan(read))

    found = np.full(count, otherwise(rules), dtype=np.int8)
    for code in reversed(TRIED):
        for entry in rules.get(FEEDBACK[code]) or ():
            found[holds(entry)] = code
    return found
