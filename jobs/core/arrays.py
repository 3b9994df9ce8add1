"""Flat arrays of rows in order, and rows moved into an order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def run_starts(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """bool[N]: whether a run of equal rows begins here: the row differs from the one before it in
    some column, or is the first. (As `models.core.rows.run_starts`; what is served has no jobs.)"""
    starts = np.zeros(len(columns[0]), dtype=bool)
    starts[:1] = True
    for column in columns:
        starts[1:] |= column[1:] != column[:-1]
    return starts


def stretches(begin: NDArray[Any], size: NDArray[Any]) -> NDArray[np.int64]:
    """int64[sum of size]: the places of stretches, one after another.

    Args:
        begin, size: of each stretch, its first place and how many places it has.
    """
    end = np.cumsum(size)
    total = int(end[-1]) if len(end) else 0
    found: NDArray[np.int64] = np.repeat(begin - (end - size), size) + np.arange(total)
    return found


def array_at(array: pa.Array, places: pa.Array) -> pa.Array:
    """The elements at some places. Nulls throughout, and lists that are all empty, are not moved:
    Arrow moves them as slowly as values."""
    if array.null_count == len(array):
        return pa.nulls(len(places), array.type)
    if pa.types.is_list(array.type) and not array.null_count:
        offsets = array.offsets
        if offsets[0].as_py() == offsets[-1].as_py():
            none = pa.array(np.zeros(len(places) + 1, np.int32))
            return pa.ListArray.from_arrays(none, array.values[:0], type=array.type)
    return array.take(places)


def rows_at(rows: pa.Table, places: NDArray[np.int64]) -> pa.Table:
    """The rows at some places, each column in one chunk."""
    at, made = pa.array(places), []
    for column in rows.columns:
        whole = column.combine_chunks()
        # (Texts of more than 2 GiB stay in chunks.)
        moved = whole.take(at) if isinstance(whole, pa.ChunkedArray) else array_at(whole, at)
        made.append(moved)
    return pa.Table.from_arrays(made, schema=rows.schema)
