"""The suite of `gold.recommendations` over the arrays of one data file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.audit.arrow_columns import HELD_DDL, continues, distinct, held
from jobs.lake import filesystem

LISTS_DDL = (
    f"{HELD_DDL}, first string, last string, version string, rows bigint, least bigint, "
    "most bigint, items array<string>"
)


def recommendations_hold(path: str) -> list[dict[str, Any]]:
    """Which checks of rows of `expectations/recommendations.py` a file of `gold.recommendations`
    keeps, all of one model version and each user once and in order; its `first` and `last` user,
    for `apart`; its shortest and longest list, and all its items."""
    rows = filesystem.read_parquet(path)
    users, version = rows["user_id"], pc.unique(rows["model_version"])
    size = _lengths(rows)
    ends = {"first": None, "last": None}
    if len(users):
        ends = {"first": users[0].as_py(), "last": users[-1].as_py()}
    return [held(checks_of(rows)) | ends | {
        "rows": len(users), "version": version[0].as_py() if len(version) else None,
        "least": int(size.min()) if len(size) else 0, "most": int(size.max(initial=0)),
        "items": pc.unique(rows["items"].combine_chunks().flatten().field("item_id")).to_pylist(),
    }]  # fmt: skip


def _lengths(rows: pa.Table) -> np.ndarray:
    """int64[N]: the items of each list; a null list has none."""
    size = pc.fill_null(pc.list_value_length(rows["items"]), 0)
    return np.asarray(size.to_numpy(), np.int64)


def checks_of(rows: pa.Table) -> dict[str, bool]:
    """Check -> whether it holds."""
    users, size = rows["user_id"].combine_chunks(), _lengths(rows)
    flat = rows["items"].combine_chunks().flatten()
    item, score = flat.field("item_id"), flat.field("score").to_numpy(zero_copy_only=False)
    names = pc.unique(item)
    code = pc.index_in(item, names).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(size)), size)
    return {
        "user_and_model_are_key": len(pc.unique(rows["model_version"])) == 1
        and users.null_count == 0
        and pc.all(pc.less(users[:-1], users[1:])).as_py() is not False,
        "lists_are_not_empty": bool((size >= 1).all()),
        "items_are_distinct": distinct(row * (len(names) + 1) + code),
        "items_are_named": item.null_count == 0 and not pc.any(pc.equal(names, "")).as_py(),
        "scores_are_finite": bool(np.isfinite(score).all()),
        "scores_fall": bool((score[1:] <= score[:-1])[continues(size)].all()),
    }
