"""One invariant of a table, said for a person and as a SQL condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["fail", "warn"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A condition on each row, or on what is in one of its arrays; null is not concerned.

    holds: a Spark SQL condition on one row. `across` says that it speaks of the row before, too.
    each: a condition on every element `{x}` of `array`; pair: on every two neighbours `{a}`, `{b}`.
    unique: columns in which no two rows agree.
    Checks with none of these are facts of the whole batch: the job that made the candidate states
    them.
    """

    name: str
    says: str
    holds: str = ""
    across: bool = False
    array: str = ""
    each: str = ""
    pair: str = ""
    unique: tuple[str, ...] = ()
    severity: Severity = "fail"

    @property
    def of_array(self) -> bool:
        return bool(self.each or self.pair)

    @property
    def condition(self) -> str:
        """The condition on one row; empty for checks of keys and of the batch."""
        if self.each:
            return f"forall({self.array}, x -> {self.each.format(x='x')})"
        if self.pair:
            rest = f"greatest(size({self.array}) - 1, 0)"
            return (
                f"forall(zip_with(slice({self.array}, 1, {rest}), slice({self.array}, 2, {rest}), "
                f"(a, b) -> {self.pair.format(a='a', b='b')}), ok -> ok)"
            )
        return self.holds

    def at(self, position: str) -> str:
        """The condition on the element at a position from 0, and on the one before it."""
        here = f"get({self.array}, {position})"
        if self.each:
            return self.each.format(x=here)
        return self.pair.format(a=f"get({self.array}, {position} - 1)", b=here)
