"""Rows that are moved: as Arrow moves them, whatever is null or empty in them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from jobs.core.arrays import array_at, rows_at, stretches

LISTS = pa.list_(pa.list_(pa.int32()))
ARRAYS = {
    "texts": pa.array(["a", None, "c"]),
    "nulls": pa.nulls(3, pa.string()),
    "null lists": pa.nulls(3, pa.list_(pa.string())),
    "empty lists": pa.array([[], [], []], LISTS),
    "empty and null": pa.array([[], None, []], LISTS),
    "lists": pa.array([[[1, 2]], [], [[3], []]], LISTS),
    "a slice of lists": pa.array([[[9]], [], [], []], LISTS).slice(1),
    "numbers of texts": pa.array(["x", "y", "x"]).dictionary_encode(),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("places", [[2, 0, 0], [], [1]])
def test_what_is_null_or_empty_is_moved_as_arrow_moves_it(name: str, places: list[int]) -> None:
    array, at = ARRAYS[name], pa.array(places, pa.int64())
    moved = array_at(array, at)
    moved.validate(full=True)
    assert moved.equals(array.take(at)) and moved.type == array.type


def test_rows_of_many_chunks_become_one() -> None:
    part = pa.table({name: one for name, one in ARRAYS.items() if name != "a slice of lists"})
    rows = pa.concat_tables([part, part])
    places = np.array([5, 0, 3])
    moved = rows_at(rows, places)
    assert moved.equals(rows.take(pa.array(places)))
    assert all(column.num_chunks == 1 for column in moved.columns)


def test_stretches_one_after_another() -> None:
    found = stretches(np.array([7, 0, 3]), np.array([2, 0, 3]))
    assert found.tolist() == [7, 8, 3, 4, 5]
    assert stretches(np.zeros(0, int), np.zeros(0, int)).tolist() == []
