"""Texts of typed columns, as records have them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.records.records import SCALARS, Batches, FileFacts, Format, cut_text


def is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind))


def shown(batches: Batches, lists: pa.Array) -> pa.Array:
    """Lists without what is null or means null, as in every other format."""
    nulls = pa.array([None, *sorted(batches.nulls["exposed_with"])], pa.string())
    if not pc.any(pc.is_in(lists.flatten(), nulls)).as_py():
        return lists
    return pa.array(map(batches.list_of, lists.to_pylist()), lists.type)


def clock_of(kind: pa.DataType) -> str | None:
    """The clock of a column of times; null where it is none."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not pa.types.is_timestamp(kind):
        return None
    return "utc" if kind.tz else "local"


def _lengths(texts: pa.Array) -> np.ndarray:
    """int64[N]: the characters of texts, or of lists of them."""
    if pa.types.is_string(texts.type):
        length = pc.fill_null(pc.utf8_length(texts), 0)
        return np.asarray(length.to_numpy(zero_copy_only=False), np.int64)
    ends = np.cumsum(np.append(0, _lengths(texts.flatten())))
    number = pc.fill_null(pc.list_value_length(texts), 0).to_numpy(zero_copy_only=False)
    last = np.cumsum(number)
    return np.asarray(ends[last] - ends[last - number], np.int64)


def without_long_texts(
    fmt: Format, made: dict[str, pa.Array], facts: FileFacts
) -> dict[str, pa.Array]:
    """Rows in which a column is longer than a table takes are `unparsable`, and keep its beginning.

    Args:
        made: our columns, `kind` and `line` among them.
    """
    bad = np.zeros(len(made["kind"]), bool)
    for ours in set(made) & {*SCALARS, "exposed_with"}:
        array = made[ours]
        # (No text has more characters than bytes, and most batches have fewer of those.)
        if array.nbytes <= fmt.longest_text:
            continue
        long = _lengths(array) > fmt.longest_text
        if not long.any():
            continue
        bad |= long
        places = np.flatnonzero(long)
        some = array.take(pa.array(places)).to_pylist()
        put = [None if isinstance(one, list) else cut_text(one, fmt) for one in some]
        made[ours] = (
            pc.replace_with_mask(array, pa.array(long), pa.array(put, array.type))
            if pa.types.is_string(array.type)
            else pc.if_else(pa.array(long), None, array)
        )
    if bad.any():
        made["kind"] = pc.if_else(pa.array(bad), "unparsable", made["kind"])
        first = made["line"][int(np.flatnonzero(bad)[0])].as_py()
        facts.add_too_long(first, int(bad.sum()))
    return made
