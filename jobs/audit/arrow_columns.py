"""Whether suites hold of many rows, asked of data files in Arrow: all of them hold, or not.

The checks of `expectations/` over flat arrays, in tasks that take a file each. The answer is that
all holds, or nothing: then `jobs/audit/suite.py` asks Spark row by row, in the suite's own words, and
names what does not. (`tests/jobs/audit/test_suite.py` breaks tables in every way that the suites know.)
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.arrays import run_starts
from jobs.lake.time_slices import CLOCK

# -- what certificates share ----------------------------------------------------------------------

HELD_DDL = "holds boolean, broken array<string>"


def held(checks: dict[str, bool]) -> dict[str, Any]:
    """`holds`, and the names of the checks that are `broken`, as a task answers."""
    broken = [name for name, holds in checks.items() if not holds]
    return {"holds": not broken, "broken": broken}


def distinct(numbers: np.ndarray) -> bool:
    """Whether no two of the numbers are equal."""
    return bool(run_starts(np.sort(numbers)).all())


def all_in(texts: Any, names: tuple[str, ...]) -> bool:
    """Whether every text is one of the names, and none is null."""
    return pc.all(pc.is_in(texts, pa.array(names)), min_count=0).as_py() is True


def continues(size: np.ndarray) -> np.ndarray:
    """bool[N-1]: of lists of these sizes laid end to end, whether an element and the one before it
    are in the same list; from the second element on."""
    total = int(size.sum())
    inside = np.ones(total, bool)
    first = np.cumsum(size) - size
    inside[first[first < total]] = False
    return inside[1:]


def dates(times: Any) -> Any:
    return one_array(times).cast(CLOCK).cast(pa.timestamp("us")).cast(pa.date32())


def apart(held: list[dict[str, Any]]) -> bool:
    """Whether no file begins before another, of those that begin earlier, has ended."""
    ends = sorted((one["first"], one["last"]) for one in held if one["first"] is not None)
    return all(one[1] < other[0] for one, other in itertools.pairwise(ends))


# -- prints of events, in sessions and in their table ----------------------------------------------

ID_BYTES = 32  # of a hash as text
ODD = np.uint64(0x9E3779B97F4A7C15)


def words_of(texts: pa.Array) -> np.ndarray:
    """A 64-bit hash of each text, the same wherever the text is: uint64[N]."""
    texts = texts.cast(pa.string())
    hashes = np.zeros(len(texts), np.uint64)
    if not len(texts):
        return hashes
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset :][: len(texts) + 1]
    size = np.diff(offsets)
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    if (size == ID_BYTES).all():  # our own hashes, of 20 million events in a second
        return _mixed(data[offsets[0] : offsets[-1]].reshape(len(texts), ID_BYTES))
    for length in np.unique(size):
        at = np.flatnonzero(size == length)
        if length > LONG_BYTES:
            names = texts.take(pa.array(at)).to_numpy(zero_copy_only=False).astype(object)
            hashes[at] = pd.util.hash_array(names, categorize=False)
            continue
        block = np.zeros((len(at), -(-length // 8) * 8), np.uint8)
        block[:, :length] = data[offsets[at, None] + np.arange(length, dtype=np.int32)]
        hashes[at] = _mixed(block, seed=0 if length == ID_BYTES else length)
    return hashes


LONG_BYTES = 128
"""Texts of so many bytes are hashed together, length by length; longer ones are few, each alone."""


def _mixed(block: np.ndarray, seed: int = 0) -> np.ndarray:
    """A hash of each row of bytes, a multiple of eight: uint64[N]."""
    words = block.view(np.uint64)
    mixed = np.full(len(words), seed, np.uint64)
    for place in range(words.shape[1]):
        mixed = (mixed ^ (mixed >> np.uint64(29))) * ODD + words[:, place]
    return _scattered(mixed)


def _scattered(number: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit (the end of splitmix64)."""
    mixed: np.ndarray
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = number ^ (number >> np.uint64(31))
    return mixed


def fingerprint(users: np.ndarray, events: np.ndarray) -> dict[str, int]:
    """A print of a set of events of users, that does not depend on their order.

    Args:
        users, events: uint64[N], a hash of each event's user, and what tells it from the others.
    """
    return print_of(digests(users, events))


def digests(users: np.ndarray, events: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each event, as `fingerprint` takes them: uint64[N]."""
    return _scattered(users * ODD ^ events)


def print_of(digest: np.ndarray) -> dict[str, int]:
    """The print of a set of `digests`."""
    xor, total = np.bitwise_xor.reduce(digest), digest.sum(dtype=np.uint64)
    return {
        "events": len(digest),
        "digest_xor": int(np.uint64(xor).astype(np.int64)),
        "digest_sum": int(np.uint64(total).astype(np.int64)),
    }


def joined(prints: list[dict[str, Any]]) -> tuple[int, int, int]:
    """The print of all files together: events, xor, sum."""
    xor = 0
    for one in prints:
        xor ^= one["digest_xor"]
    total = sum(one["digest_sum"] for one in prints) % 2**64
    return sum(one["events"] for one in prints), xor, total


def one_array(column: Any) -> Any:
    """A column as one array."""
    made = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return made.chunk(0) if isinstance(made, pa.ChunkedArray) else made


def micros_array(column: Any) -> np.ndarray:
    times: np.ndarray = (
        one_array(column).cast(CLOCK).cast(pa.int64()).to_numpy(zero_copy_only=False)
    )
    return times
