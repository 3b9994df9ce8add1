"""The suite of `gold.recommendations` over the arrays of one data file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

from jobs.lake import filesystem

LISTS_DDL = (
    "holds boolean, first string, last string, version string, rows bigint, least bigint, "
    "most bigint, items array<string>"
)


def recommendations_hold(path: str) -> list[dict[str, Any]]:
    """Whether a file of `gold.recommendations` keeps the checks of rows in
    `expectations/recommendations.py`, all of one model version and each user once and in order;
    its `first` and `last` user, for `apart`; its shortest and longest list, and all its items."""
    rows = filesystem.read_parquet(path)
    users, lists = rows["user_id"].combine_chunks(), rows["items"].combine_chunks()
    version = pc.unique(rows["model_version"])
    size = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    flat = lists.flatten()
    item, score = flat.field("item_id"), flat.field("score").to_numpy(zero_copy_only=False)
    names = pc.unique(item)
    code = pc.index_in(item, names).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(size)), size)
    pairs = np.sort(row * (len(names) + 1) + code)
    inside = row[1:] == row[:-1]
    holds = (
        len(users) > 0
        and users.null_count == 0
        and len(version) == 1
        and pc.all(pc.less(users[:-1], users[1:])).as_py() is not False
        and size.min() >= 1
        and item.null_count == 0
        and pc.any(pc.equal(names, "")).as_py() is not True
        and bool((pairs[1:] != pairs[:-1]).all())
        and bool(np.isfinite(score).all())
        and bool((np.diff(score)[inside] <= 0).all())
    )
    ends = {"first": users[0].as_py(), "last": users[-1].as_py()} if len(users) else {}
    return [{
        "holds": bool(holds), "first": None, "last": None, **ends, "rows": len(users),
        "version": version[0].as_py() if len(version) else None,
        "least": int(size.min(initial=0)) if len(size) == 0 else int(size.min()),
        "most": int(size.max(initial=0)), "items": names.to_pylist(),
    }]  # fmt: skip
