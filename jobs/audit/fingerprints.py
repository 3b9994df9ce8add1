"""Fingerprints of the events in a data file of `bronze.events`, `silver.events`, `silver.sessions`,
`gold.sequences`.

A fingerprint is what all tables can say of an event, its user and its time: the number of
events, and XOR and wrapping sum of a 64-bit hash of each (`arrow_columns.fingerprint`). It depends on
no order, and those of files add up to that of their table. Two sets of as many events, of which one
lacks what the other has, agree by a chance of about 2^-64; an event that changed its item, or another
field, is the same one here. The user of an event without one is its anonymous id, by a name that no user
has; files of `silver.events` have a second fingerprint, by the person.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.audit.arrow_columns import (
    digests,
    fingerprint,
    joined,
    one_array,
    print_of,
    words_of,
)
from jobs.core import person_ids
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import EVENTS, PERSON_EVENTS, SEQUENCES, SESSIONS
from jobs.lake import filesystem
from jobs.lake.time_slices import CLOCK

# -- of one file ----------------------------------------------------------------------------------

FIELDS = (
    "events", "digest_xor", "digest_sum", "kept_events", "kept_xor", "kept_sum",
)  # fmt: skip
PRINTED_DDL = "path string, " + ", ".join(f"{name} bigint" for name in FIELDS)
NO_DIGEST = np.zeros(0, np.uint64)
Row = dict[str, Any]
"""`path`, and FIELDS: those that begin with `kept_` are None where there are no sessions."""


def digests_of(users: Any, times: Any, size: np.ndarray | None = None) -> np.ndarray:
    """A hash of each event's user and time: uint64[N].

    Args:
        users: the user of each row; times: the time of each event.
        size: how many events each row has; None: one.
    """
    hashed = words_of(one_array(users))
    return digests(hashed if size is None else np.repeat(hashed, size), moments_of(times))


def moments_of(times: Any) -> np.ndarray:
    """Times in microseconds, null as 0: uint64[N]."""
    micros = one_array(times).cast(CLOCK).cast(pa.int64()).fill_null(0)
    found: np.ndarray = micros.to_numpy(zero_copy_only=False).view(np.uint64)
    return found


def row_of(path: str, digest: np.ndarray, kept: np.ndarray | None = None) -> Row:
    """A file's row; kept: of which of its events sessions are not runaway."""
    found: Row = {"path": path, "kept_events": None, "kept_xor": None, "kept_sum": None}
    found |= print_of(digest)
    if kept is not None:
        of_kept = print_of(digest if kept.all() else digest[kept])
        found |= {
            "kept_events": of_kept["events"],
            "kept_xor": of_kept["digest_xor"],
            "kept_sum": of_kept["digest_sum"],
        }
    return found


def of_events(path: str) -> list[Row]:
    """A task: a data file of `bronze.events`."""
    parts = _read(path, ("user_id", "event_ts", "anonymous_id"))
    return [together(path, [row_of(path, digests_of(said(p), p["event_ts"])) for p in parts])]


def said(rows: pa.Table, user: str = "user_id") -> pa.Array:
    """Whose events are by what the log says.

    Args:
        user: the column of the log's user.
    """
    users = one_array(rows[user])
    if not users.null_count or "anonymous_id" not in rows.column_names:
        return users
    return person_ids.said_by_log(
        users.cast(pa.string()), one_array(rows["anonymous_id"]).cast(pa.string())
    )


def of_person_events(path: str) -> list[Row]:
    """A task: a data file of `silver.events`. Its `kept_` is by what the log says."""
    made = [row_of(path, NO_DIGEST, NO_DIGEST.astype(bool))]
    for part in _read(path, ("user_id", "event_ts", "log_user_id", "anonymous_id")):
        made.append(of_person_rows(path, part, words_of(one_array(part["user_id"]))))
    return [together(path, made)]


def of_person_rows(path: str, rows: pa.Table, users: np.ndarray) -> Row:
    """Args: users: a hash of each row's person."""
    times = moments_of(rows["event_ts"])
    by_log = row_of(path, digests(words_of(said(rows, "log_user_id")), times))
    kept = {f"kept_{name}": by_log[one] for name, one in zip(("events", "xor", "sum"), FIELDS[:3])}
    return row_of(path, digests(users, times)) | kept


def of_sessions(path: str) -> list[Row]:
    """A task: a data file of `silver.sessions`."""
    made = [row_of(path, NO_DIGEST, NO_DIGEST.astype(bool))]
    for part in _read(path, ("user_id", "runaway"), ("events", "event_ts")):
        lists = one_array(part["events"])
        made.append(of_session_rows(path, part, lists, lists.flatten().field("event_ts")))
    return [together(path, made)]


def of_session_rows(path: str, rows: pa.Table, lists: Any, times: Any) -> Row:
    """Args: rows: `user_id`, `runaway`; lists: their events; times: those of all of them."""
    size = _sizes(lists)
    kept = pc.is_null(one_array(rows["runaway"])).to_numpy(zero_copy_only=False)
    return row_of(path, digests_of(rows["user_id"], times, size), np.repeat(kept, size))


def of_sequences(path: str) -> list[Row]:
    """A task: a data file of `gold.sequences`."""
    parts = _read(path, ("user_id",), ("event_ts", ""))
    return [together(path, [of_sequence_rows(path, part) for part in parts])]


def of_sequence_rows(path: str, rows: pa.Table) -> Row:
    """Args: rows: `user_id`, `event_ts`."""
    lists = one_array(rows["event_ts"])
    return row_of(path, digests_of(rows["user_id"], lists.flatten(), _sizes(lists)))


PRINT_DDL = "events bigint, digest_xor bigint, digest_sum bigint, file string"


def print_of_events(path: str) -> list[dict[str, Any]]:
    """A task: the print of a data file of `bronze.events`, or `silver.events`, by user and id
    (`arrow_columns.joined`); and in `file` its row, as JSON, because its columns are read anyway."""
    prints, made = [print_of(NO_DIGEST)], []
    for part in _read(path, ("user_id", "event_id", "event_ts", "log_user_id", "anonymous_id")):
        users = words_of(one_array(part["user_id"]))
        prints.append(fingerprint(users, words_of(one_array(part["event_id"]))))
        if "log_user_id" in part.column_names:
            made.append(of_person_rows(path, part, users))
        else:
            made.append(row_of(path, digests(users, moments_of(part["event_ts"]))))
    events, xor, total = joined(prints)
    signed = total - 2**64 if total >= 2**63 else total
    printed = {"events": events, "digest_xor": xor, "digest_sum": signed}
    return [printed | {"file": json.dumps(together(path, made))}]


OF_FILE: dict[str, Callable[[str], list[Row]]] = {
    EVENTS.full_name: of_events,
    PERSON_EVENTS.full_name: of_person_events,
    SESSIONS.full_name: of_sessions,
    SEQUENCES.full_name: of_sequences,
}
"""Table -> the task that makes the row of one of its files."""


def _sizes(lists: Any) -> np.ndarray:
    found: np.ndarray = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return found.astype(np.int64)


PART_BYTES = 2**28
"""Ours: about so much of a file, uncompressed and with all columns, is looked at at a time."""


def _read(
    path: str, columns: tuple[str, ...], nested: tuple[str, str] = ("", "")
) -> Iterator[pa.Table]:
    """Some columns of a file, a number of row groups at a time.

    Args:
        nested: a column of lists, and the field of its elements (empty: they have none).
    """
    with filesystem.data_file(path) as file:
        meta = file.metadata
        places = [meta.schema.column(at).path.split(".") for at in range(meta.num_columns)]
        wanted = [
            ".".join(one)
            for one in places
            if one[0] in columns or (one[0] == nested[0] and nested[1] in ("", one[-1]))
        ]
        groups, filled = [], 0
        for number in range(meta.num_row_groups):
            groups.append(number)
            filled += meta.row_group(number).total_byte_size
            if filled >= PART_BYTES or number == meta.num_row_groups - 1:
                yield file.read_row_groups(groups, wanted, use_threads=False)
                groups, filled = [], 0


# -- of many -------------------------------------------------------------------------------------


def table_of(rows: Sequence[Row]) -> pa.Table:
    """Rows of files: `path`, FIELDS."""
    schema = arrow_schema({"path": "string"} | dict.fromkeys(FIELDS, "bigint"))
    return pa.Table.from_pylist(list(rows), schema=schema)


Sum = tuple[int, int, int]
"""Events, and XOR and sum of their hashes."""


def summed(rows: pa.Table, kept: bool = False) -> Sum:
    """The fingerprint of all files together; kept: without runaway sessions."""
    names = FIELDS[3:] if kept else FIELDS[:3]
    events, xor, total = (rows[name].to_numpy() for name in names)
    return int(events.sum()), int(np.bitwise_xor.reduce(xor)), int(total.sum(dtype=np.int64))


def together(path: str, parts: Sequence[Row]) -> Row:
    """The row of a file, from those of its parts."""
    rows = table_of(parts)
    row = dict(zip(FIELDS[:3], summed(rows), strict=True))
    kept = summed(rows, kept=True) if parts and parts[0]["kept_events"] is not None else [None] * 3
    return {"path": path} | row | dict(zip(FIELDS[3:], kept, strict=True))
