"""Values of Avro records as texts."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from jobs.core.source_events import field_of
from jobs.reading.typed_columns import NO_IDS
from jobs.records.records import Unusable

EPOCH = datetime(1970, 1, 1)
LOGICAL = {
    "timestamp-millis": "timestamp[ms, tz=UTC]", "timestamp-micros": "timestamp[us, tz=UTC]",
    "timestamp-nanos": "timestamp[ns, tz=UTC]", "local-timestamp-millis": "timestamp[ms]",
    "local-timestamp-micros": "timestamp[us]", "date": "date32[day]", "uuid": "string",
    "time-millis": "time32[ms]", "time-micros": "time64[us]", "decimal": "decimal",
}  # fmt: skip
PLAIN = {"int": "int32", "long": "int64", "boolean": "bool", "bytes": "binary", "enum": "string"}


def columns_of(schema: Any) -> dict[str, str]:
    """The fields of a record schema, with their types in Arrow's words."""
    return {one["name"]: _kind(one["type"]) for one in schema.get("fields", ())}


def kind_at(schema: Any, name: str) -> str | None:
    """The type of a field; `a.b` is a field of a record in another; None: there is none."""
    found: Any = schema
    for step in name.split("."):
        found = _without_null(found)
        if isinstance(found, dict) and found.get("type") == "map":
            found = found["values"]
            continue
        fields = found.get("fields", ()) if isinstance(found, dict) else ()
        found = next((one["type"] for one in fields if one["name"] == step), None)
        if found is None:
            return None
    return _kind(found)


def _without_null(kind: Any) -> Any:
    if isinstance(kind, list):
        others = [one for one in kind if one != "null"]
        return others[0] if len(others) == 1 else kind
    return kind


def _kind(kind: Any) -> str:
    kind = _without_null(kind)
    if isinstance(kind, dict):
        logical = LOGICAL.get(kind.get("logicalType", ""))
        return logical or _kind(kind["type"])
    return PLAIN.get(kind, kind) if isinstance(kind, str) else "union"


def value_at(record: Any, name: str, constants: dict[str, str | None]) -> Any:
    """A field's value; of `constants` (in the file's path) where the record has no such field."""
    first = name.split(".")[0]
    if first not in record:
        return constants.get(name)
    for step in name.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(step)
    return record


def clock_of(value: Any) -> str | None:
    """As `records.RECORD_DDL` has it."""
    if not isinstance(value, datetime):
        return None
    return "utc" if value.tzinfo else "local"


def text_of(value: Any, ours: str, theirs: str, file: str) -> Any:
    """A value as text; times of `event_ts` as microseconds since 1970.

    Raises:
        Unusable: it is no single value, or an id in floating point.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | UUID | Decimal):
        return str(value)
    if isinstance(value, float):
        if ours in NO_IDS:
            return str(value)
        raise Unusable(
            f"{file}: column {theirs!r} is of floating-point numbers, and {field_of(ours)} is an id: "
            "ids never pass through floating point. Write the column as integers or text"
        )
    if isinstance(value, datetime):
        local = value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
        if ours == "event_ts":
            return str((local - EPOCH) // timedelta(microseconds=1))
        return local.isoformat() + ("Z" if value.tzinfo else "")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    if isinstance(value, list) and ours == "exposed_with":
        return [text_of(one, ours, theirs, file) for one in value]
    raise Unusable(
        f"{file}: column {theirs!r} is {type(value).__name__}, and {field_of(ours)} needs one value "
        "a record: name another column, or a field of it as in `a.b`"
    )
