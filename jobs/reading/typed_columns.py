"""Columns that have types (Parquet, ORC) as texts, where nothing of them is lost."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.source_events import field_of
from jobs.records.records import Unusable

NO_IDS = ("value", "event_ts", "event_ts_2", "event_type")
"""Columns of ours that may be floating-point numbers."""
WHOLE = 2**53
"""Up to here floating-point numbers have every whole number once."""
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def partitions(path: str) -> dict[str, str | None]:
    """The columns that are in a file's path, as Hive and Spark write them: `…/day=2024-01-01/…`."""
    found: dict[str, str | None] = {}
    for folder in path.split("/")[:-1]:
        name, equal, value = folder.partition("=")
        if equal and name:
            text = unquote(value)
            found[unquote(name)] = None if text == NO_PARTITION else text
    return found


def path_of(schema: pa.Schema, name: str) -> list[str] | None:
    """Where a column is: its own name, or the names that lead to it inside another; None: nowhere.

    Raises:
        Unusable: two columns have the name.
    """
    if name in schema.names:
        if schema.names.count(name) > 1:
            raise Unusable(f"it has the column {name!r} twice: rename one of them")
        return [name]
    steps = name.split(".")
    for cut in range(len(steps) - 1, 0, -1):
        root = ".".join(steps[:cut])
        if root in schema.names:
            kind, inner = schema.field(root).type, steps[cut:]
            return None if _inner_type(kind, inner) is None else [root, *inner]
    return None


def _inner_type(kind: pa.DataType, steps: list[str]) -> pa.DataType | None:
    for step in steps:
        if pa.types.is_map(kind):
            kind = kind.item_type
        elif pa.types.is_struct(kind) and kind.get_field_index(step) >= 0:
            kind = kind.field(kind.get_field_index(step)).type
        else:
            return None
    return kind


def type_of(schema: pa.Schema, path: list[str]) -> pa.DataType:
    return _inner_type(schema.field(path[0]).type, path[1:])


def reading_of(schema: pa.Schema, path: list[str]) -> str:
    """What to ask a reader for, to get a column: of structs only what is wanted."""
    kind = schema.field(path[0]).type
    for step in path[1:]:
        if not pa.types.is_struct(kind):
            return path[0]
        kind = kind.field(kind.get_field_index(step)).type
    return ".".join(path)


def array_at(batch: pa.RecordBatch, path: list[str]) -> pa.Array:
    array = batch.column(path[0])
    for step in path[1:]:
        if pa.types.is_map(array.type):
            array = pc.map_lookup(array, pa.scalar(step, array.type.key_type), "first")
        else:
            array = pc.struct_field(array, [step])
    return array


def kind_of(kind: pa.DataType) -> pa.DataType:
    """The type of the values, whatever they are laid out as."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.UuidType):
        kind = kind.storage_type
    return kind


def text_of(array: pa.Array, ours: str, theirs: str, file: str) -> pa.Array:
    """A column as text; times of `event_ts` as microseconds since 1970.

    Args:
        array: floating-point numbers in a column of ids are whole (`whole_numbers`).

    Raises:
        Unusable: values of this type are no texts of one value.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if isinstance(array.type, pa.UuidType):
        return _uuids(array.storage)
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    kind = array.type
    if pa.types.is_floating(kind) and ours not in NO_IDS:
        return pc.if_else(pc.is_nan(array), None, array).cast(pa.int64()).cast(pa.string())
    if pa.types.is_timestamp(kind):
        return _times(array, ours)
    if pa.types.is_nested(kind):
        raise Unusable(
            f"{file}: column {theirs!r} is {kind}, and {field_of(ours)} needs one value a row: name "
            "another column, or a field of it as in `a.b`"
        )
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_fixed(kind):
        return _texts_of_bytes(array, ours, theirs, file)
    return array.cast(pa.string())


def texts_of_lists(array: pa.Array, ours: str, theirs: str, file: str) -> pa.Array:
    """Lists of values as lists of texts."""
    inner = array.type.value_type
    if isinstance(inner, pa.BaseExtensionType) or pa.types.is_dictionary(inner):
        rows = [
            one if one is None else text_of(pa.array(one, inner), ours, theirs, file).to_pylist()
            for one in array.to_pylist()
        ]
        return pa.array(rows, pa.list_(pa.string()))
    if pa.types.is_nested(inner):
        raise Unusable(
            f"{file}: column {theirs!r} is {array.type}, and {field_of(ours)} needs a list of texts: "
            "name another column"
        )
    return array.cast(pa.list_(pa.string()))


def dates(array: pa.Array) -> pa.Array:
    """A column of dates that was written as one of times."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.date32(), safe=False) if pa.types.is_timestamp(array.type) else array


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind))


def _times(array: pa.Array, ours: str) -> pa.Array:
    zone = array.type.tz
    us = array.cast(pa.timestamp("us", zone), safe=False)
    if ours == "event_ts":
        return us.cast(pa.int64()).cast(pa.string())
    if zone:
        us = us.cast(pa.timestamp("us", "UTC"))
    return pc.strftime(us, format="%Y-%m-%dT%H:%M:%S" + ("Z" if zone else ""))


def _uuids(stored: pa.Array) -> pa.Array:
    texts = [None if one is None else str(uuid.UUID(bytes=one)) for one in stored.to_pylist()]
    return pa.array(texts, pa.string())


def _texts_of_bytes(array: pa.Array, ours: str, theirs: str, file: str) -> pa.Array:
    try:
        return array.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        raise Unusable(
            f"{file}: column {theirs!r} is {array.type} and not text in UTF-8, which "
            f"{field_of(ours)} needs. Write the column as text"
        ) from None


def whole_numbers(array: pa.Array) -> bool:
    """Whether floating-point numbers that are there are whole."""
    numbers = np.asarray(array.drop_null().to_numpy(zero_copy_only=False), np.float64)
    there = numbers[~np.isnan(numbers)]
    return bool(((np.abs(there) <= WHOLE) & (there == np.trunc(there))).all())


def are_whole(arrays: Iterable[pa.Array]) -> bool:
    """Whether floating-point numbers are whole ones that became so because some are missing: writers
    without nulls in whole numbers (pandas) change the type of the column then."""
    missing = False
    for array in arrays:
        missing = missing or bool(array.null_count)
        missing = missing or bool(pc.any(pc.is_nan(array)).as_py())
        if not whole_numbers(array):
            return False
    return missing


def refuse_floating_ids(
    kind: pa.DataType, ours: str, theirs: str, file: str, values: Callable[[], Iterable[pa.Array]]
) -> bool:
    """Whether a column of ids is of floating-point numbers that are whole (`are_whole`).

    Args:
        values: the whole column; it is read only if it must be.

    Raises:
        Unusable: they are not.
    """
    if not pa.types.is_floating(kind_of(kind)) or ours in NO_IDS:
        return False
    if are_whole(values()):
        return True
    raise Unusable(
        f"{file}: column {theirs!r} is {kind_of(kind)}, and {field_of(ours)} is an id: ids never "
        "pass through floating point. Write the column as integers or text"
    )


def same_kind(before: str, now: str) -> bool:
    """Whether columns of two files have one meaning, by the names of their types: a writer that
    changed the layout, the width or the unit loses nothing of the texts that are read."""
    return "null" in (before, now) or _family(before) == _family(now)


def _family(name: str) -> str:
    if name.startswith("dictionary<values="):
        name = name.removeprefix("dictionary<values=").partition(",")[0]
    if name in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        return "text"
    # (Whole numbers of which some are missing are floating point to many writers; ids that lost
    # something by it are refused as they are read.)
    if name.removeprefix("u") in (
        "int8",
        "int16",
        "int32",
        "int64",
        "halffloat",
        "float",
        "double",
    ):
        return "number"
    if name.startswith("timestamp["):
        return "time in UTC" if "tz=" in name else "local time"
    return "date" if name.startswith("date") else name
