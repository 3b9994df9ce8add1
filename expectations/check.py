"""One invariant of a table, said for a person and as a SQL condition on a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["fail", "warn"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """`holds` is a Spark SQL condition on one row; a row for which it is null is not concerned.

    `unique` names columns in which no two rows agree. Checks with neither are facts of the whole
    batch: the job that made the candidate states them.
    """

    name: str
    says: str
    holds: str = ""
    unique: tuple[str, ...] = ()
    severity: Severity = "fail"
