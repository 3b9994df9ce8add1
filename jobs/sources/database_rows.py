"""Rows of a database as Arrow tables, and the values of a column that grows as texts in names of files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

Growing = int | float | Decimal | datetime | date | str
"""A value of the column that grows."""


# -- how far a table was read ----------------------------------------------------------------------


NAME = re.compile(r"rows-(?P<column>\w+)-(?P<token>[nmftzds][\w.~+]*)-.+\.parquet")


@dataclass(frozen=True)
class Mark:
    """Of a file of rows: the column that they were read by, and its largest value.

    It is the file's name, so the ledger of files knows how far a table was read.
    """

    column: str
    value: Growing

    def name(self, batch: str, number: int) -> str:
        """The name of a run's file."""
        return f"rows-{_word(self.column)}-{_token(self.value)}-{batch}-{number}.parquet"

    @classmethod
    def of(cls, path: str) -> Mark | None:
        """What a file's name says; None: it is none of these files."""
        found = NAME.fullmatch(path.rpartition("/")[2])
        return None if found is None else cls(found["column"], _value(found["token"]))

    def is_of(self, column: str) -> bool:
        return self.column.lower() == _word(column).lower()


def _word(column: str) -> str:
    return "".join(
        one if one.isascii() and (one.isalnum() or one == "_") else f"{ord(one):x}"
        for one in column
    )


def kind_of(value: object) -> str:
    """`number`, `time`, `time in UTC`, `date` or `text`; of anything else the name of its type."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, datetime):
        return "time" if value.tzinfo is None else "time in UTC"
    kinds: dict[type, str] = {
        int: "number",
        float: "number",
        Decimal: "number",
        date: "date",
        str: "text",
    }
    return kinds.get(type(value), type(value).__name__)


KINDS = ("number", "time", "time in UTC", "date", "text")


def _token(value: Growing) -> str:
    if isinstance(value, datetime):
        sign, value = ("t", value) if value.tzinfo is None else ("z", value.astimezone(UTC))
        text = value.replace(tzinfo=None).isoformat(timespec="microseconds")
        return sign + re.sub("[-:]", "", text)
    if isinstance(value, date):
        return "d" + value.isoformat().replace("-", "")
    if isinstance(value, str):
        return "s" + value.encode().hex()
    sign = {int: "n", Decimal: "m", float: "f"}[type(value)]
    return sign + str(value).replace("-", "~")


def _value(token: str) -> Growing:
    sign, text = token[0], token[1:]
    if sign in "tz":
        return datetime.fromisoformat(text).replace(tzinfo=UTC if sign == "z" else None)
    if sign == "d":
        return date.fromisoformat(text)
    if sign == "s":
        return bytes.fromhex(text).decode()
    made: type[int] | type[float] | type[Decimal] = {"n": int, "m": Decimal, "f": float}[sign]
    return made(text.replace("~", "-"))


def before(value: Any, lag: float) -> Growing:
    """The value that lies a lag before: seconds of a time, its own unit of a number.

    Args:
        value: no text, unless the lag is 0.
    """
    if not lag:
        return value  # type: ignore[no-any-return]
    if isinstance(value, datetime):
        return value - timedelta(seconds=lag)
    if isinstance(value, date):
        return value - timedelta(days=math.ceil(lag / 86400))
    step = math.ceil(lag) if isinstance(value, int) else type(value)(lag)
    return value - step  # type: ignore[no-any-return]


def latest(value: Any, now: datetime) -> Any:
    """The value, or, of a time that is more than a day ahead, that bound: rows with such times would
    keep all that come after them from being read.

    Args:
        now: UTC.
    """
    bound = now + timedelta(days=1)
    if isinstance(value, datetime):
        return min(value, bound if value.tzinfo else bound.replace(tzinfo=None))
    return min(value, bound.date()) if isinstance(value, date) else value


# -- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a result.

    Args:
        scale: digits behind the point, where the database declares them.
    """

    name: str
    scale: int | None = None


def table_of(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> pa.Table:
    """Some rows as they are typed. What has no type of its own in a log is text."""
    values = zip(*rows, strict=True) if rows else ((),) * len(columns)
    arrays = [array_of(one, found) for one, found in zip(columns, values, strict=True)]
    return pa.table(arrays, names=[one.name for one in columns])


def array_of(column: Column, values: Sequence[Any]) -> pa.Array:
    """Values of one column. Numbers of a database that have no declared scale are texts, or their
    type would differ from file to file."""
    kinds = {type(one) for one in values} - {type(None)}
    try:
        if kinds <= {int, bool, float, str, bytes, date} and len(kinds) <= 1:
            return pa.array(values)
        if kinds == {int, float}:
            return pa.array(values, pa.float64())
        if kinds == {datetime} and len({one.tzinfo is None for one in values if one}) == 1:
            aware = any(one.tzinfo for one in values if one)
            return pa.array(values, pa.timestamp("us", "UTC" if aware else None))
        if kinds <= {Decimal, int} and column.scale is not None:
            return pa.array(values, pa.decimal128(38, column.scale))
        if kinds == {list} and not any(
            isinstance(part, dict | list) for one in values for part in one or ()
        ):
            return pa.array(values)
        if kinds <= {bytes, memoryview}:
            return pa.array([None if one is None else bytes(one) for one in values], pa.binary())
    except (pa.ArrowException, OverflowError):
        pass  # (what does not fit its type is text)
    return pa.array([_text(one) for one in values], pa.string())


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, datetime):
        return value.isoformat()
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def together(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables with the same names as one: where types differ, nulls and whole numbers give way, and of
    others the texts are kept."""
    columns = {}
    for name in tables[0].column_names:
        parts = [one[name] for one in tables]
        kinds = {one.type for one in parts} - {pa.null()}
        wanted = kinds.pop() if len(kinds) == 1 else None
        if kinds and wanted is None:
            wanted = pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()
        columns[name] = pa.chunked_array(
            [chunk for one in parts for chunk in pc.cast(one, wanted or pa.null()).chunks],
            wanted or pa.null(),
        )
    return pa.table(columns)
