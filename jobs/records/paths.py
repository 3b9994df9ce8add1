"""Columns of the log by their names: `a.b` reaches into an object, `a[k]` looks a key up in a list of
keys and values, as Google Analytics 4 writes parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

STEP = re.compile(r"([^.\[\]]+)(?:\[([^\]]*)\])?(?:\.|$)")
KEY, VALUE = "key", "value"


def steps(path: str) -> list[tuple[str, str | None]]:
    """Names, each with the key that is looked up in it, if one is."""
    found, at = [], 0
    while at < len(path):
        step = STEP.match(path, at)
        if step is None:
            return [(path, None)]
        found.append((step.group(1), step.group(2)))
        at = step.end()
    return found


def root(path: str) -> str:
    """The name at which a path begins."""
    return steps(path)[0][0]


def is_there(record: dict[str, Any], path: str) -> bool:
    """Whether a JSON object has what a path begins with."""
    return path in record or root(path) in record


def reach(record: dict[str, Any], path: str) -> Any:
    """A column of a JSON record; None where it is not there."""
    if path in record:
        return record[path]
    value: Any = record
    for name, key in steps(path):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
        if key is not None:
            value = look_up(value, key)
    return value


def look_up(pairs: Any, key: str) -> Any:
    """The value of a key in `[{"key": …, "value": …}, …]`, or in an object. A value that is an object
    is the first of its fields that is not null (`string_value`, `int_value`, …)."""
    if isinstance(pairs, dict):
        return pairs.get(key)
    for one in pairs if isinstance(pairs, list) else ():
        if isinstance(one, dict) and one.get(KEY) == key:
            value = one.get(VALUE)
            if isinstance(value, dict):
                return next((inner for inner in value.values() if inner is not None), None)
            return value
    return None


def scalar_text(value: Any) -> str | None:
    """One value of a JSON record as text; numbers are the text that they were written as.

    Raises:
        ValueError: it is a list or an object.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    raise ValueError(f"{type(value).__name__} where one value is expected")


def any_text(value: Any) -> str | None:
    """`scalar_text`; a list or an object as JSON."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return scalar_text(value)


# -- of Parquet -----------------------------------------------------------------------------------


def has_path(kind: pa.Schema | pa.StructType, path: str) -> bool:
    """Whether a table, or a struct, has a column."""
    if kind.get_field_index(path) >= 0:
        return True
    for name, key in steps(path):
        place = kind.get_field_index(name) if isinstance(kind, pa.Schema | pa.StructType) else -1
        if place < 0:
            return False
        kind = kind.field(place).type
        if key is not None:
            return bool(pa.types.is_nested(kind))
    return True


def root_of(schema: pa.Schema, path: str) -> str:
    """The column of a table at which a path begins."""
    return path if path in schema.names else root(path)


def column_at(rows: pa.RecordBatch | pa.StructArray, path: str) -> pa.Array:
    """A column of a batch, or of structs, by its path; it must be there (`has_path`)."""
    schema = rows.schema if isinstance(rows, pa.RecordBatch) else rows.type
    if schema.get_field_index(path) >= 0:
        return _field(rows, path)
    found: Any = rows
    for name, key in steps(path):
        found = _field(found, name)
        if key is not None:
            found = values_of_key(found, key)
    return found


def _field(rows: pa.RecordBatch | pa.StructArray, name: str) -> pa.Array:
    if isinstance(rows, pa.RecordBatch):
        return rows.column(name)
    return pc.struct_field(rows, name)  # (null where the struct is)


def parents_of(lists: pa.Array) -> np.ndarray:
    """int64[N]: the row of each element of lists (or of maps)."""
    lengths = np.diff(lists.offsets.to_numpy())
    valid = np.asarray(lists.is_valid())
    return np.repeat(np.arange(len(lists)), np.where(valid, lengths, 0))


def elements_of(lists: pa.Array) -> pa.Array:
    """The elements of lists, without those that lie under a null."""
    return lists.flatten()


def values_of_key(pairs: pa.Array, key: str) -> pa.Array:
    """`look_up`, of lists of structs with `key` and `value`, or of maps; as text where a value may be
    one of several fields."""
    if pa.types.is_map(pairs.type):
        pairs = pairs.cast(
            pa.list_(pa.struct([(KEY, pairs.type.key_type), (VALUE, pairs.type.item_type)]))
        )
    flat, parents = elements_of(pairs), parents_of(pairs)
    hit = np.flatnonzero(
        pc.fill_null(pc.equal(pc.struct_field(flat, KEY), key), False).to_numpy(
            zero_copy_only=False
        )
    )
    values = pc.struct_field(flat, VALUE).take(pa.array(hit))
    if pa.types.is_struct(values.type):
        fields: Sequence[pa.Array] = [
            pc.struct_field(values, place).cast(pa.string())
            for place in range(values.type.num_fields)
        ]
        values = pc.coalesce(*fields)
    first = np.full(len(pairs), -1)
    first[parents[hit][::-1]] = np.arange(len(hit))[::-1]
    return values.take(pa.array(first, mask=first < 0))
