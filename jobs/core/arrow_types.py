"""Spark SQL's types as Arrow's. Needs no Spark: tasks and small tables use it."""

from __future__ import annotations

import pyarrow as pa

ARROW = {
    "string": pa.string(), "bigint": pa.int64(), "int": pa.int32(), "double": pa.float64(),
    "date": pa.date32(), "timestamp": pa.timestamp("us", "UTC"), "boolean": pa.bool_(),
}  # fmt: skip


def arrow_type(kind: str) -> pa.DataType:
    """A Spark SQL type as an Arrow type."""
    if kind in ARROW:
        return ARROW[kind]
    outer, inner = kind[: kind.index("<")], kind[kind.index("<") + 1 : -1]
    if outer == "array":
        return pa.list_(arrow_type(inner))
    parts = split(inner)
    if outer == "map":
        return pa.map_(arrow_type(parts[0]), arrow_type(parts[1]))
    return pa.struct([(one.split(":", 1)[0], arrow_type(one.split(":", 1)[1])) for one in parts])


def split(inner: str) -> list[str]:
    """Split at the commas that are outside angle brackets."""
    parts, depth = [""], 0
    for char in inner:
        depth += (char == "<") - (char == ">")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def arrow_schema(columns: dict[str, str]) -> pa.Schema:
    """The schema of a table's columns."""
    return pa.schema([(name, arrow_type(kind)) for name, kind in columns.items()])
