"""Whether lists break a rule of `[serving]`, by names, from the tables and the source file alone: of
what made the lists (scores, masks over a model's vocabulary) nothing is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.tables import ITEMS, SEQUENCES
from jobs.recommend import rules

if TYPE_CHECKING:
    from jobs.lake.context import Context

CHECKS = ("items_are_allowed", "seen_items_are_left_out", "categories_are_bounded")
"""Of `expectations/recommendations.py`."""


def none() -> dict[str, bool]:
    """What holds of lists that are made without rules."""
    return dict.fromkeys(CHECKS, True)


def rules_held(context: Context, upto: int, users: pa.Array, lists: pa.Array) -> dict[str, bool]:
    """Check -> whether it holds.

    Args:
        upto: the version of `gold.sequences` that was scored.
        users, lists: of each list, whose it is and the ids of its items: N texts, N lists of texts.
    """
    serving = context.source.serving
    item = lists.flatten()
    row = np.repeat(np.arange(len(lists)), pc.fill_null(pc.list_value_length(lists), 0).to_numpy())
    found = none()
    names = pc.unique(item)
    items = rules.item_table(context) if serving.where or serving.category else None
    if serving.where is not None:
        others = rules.satisfying(items, serving.where, "IS NOT TRUE")
        found["items_are_allowed"] &= not _any_among(names, others)
    if serving.block_list is not None:
        found["items_are_allowed"] &= not _any_among(names, rules.block_list(serving))
    if serving.exclude_seen_days is not None:
        window = round(serving.exclude_seen_days * rules.DAY_US)
        found["seen_items_are_left_out"] = not _any_seen(context, upto, window, users, row, item)
    if serving.category is not None and len(item):
        assert serving.max_per_category is not None
        values = rules.category_of(items, serving.category, item)
        pairs = pa.table({"row": pa.array(row), "category": values}).filter(pc.is_valid(values))
        counted = pairs.group_by(["row", "category"]).aggregate([([], "count_all")])["count_all"]
        found["categories_are_bounded"] = (pc.max(counted).as_py() or 0) <= serving.max_per_category
    return found


def _any_among(names: pa.Array, wanted: pa.Array) -> bool:
    return bool(pc.any(pc.is_in(names, wanted), min_count=0).as_py())


def _any_seen(
    context: Context, upto: int, window: int, users: pa.Array, row: np.ndarray, item: pa.Array
) -> bool:
    """Whether a list has an item of an event of its user's, `window` us before the newest event of
    all or later."""
    lake = context.lake
    histories = lake.table_of(
        SEQUENCES, upto, ["user_id", "item_index", "event_ts"]
    ).combine_chunks()
    known = lake.table_of(ITEMS, int(lake.version(ITEMS) or 0), ["item_id", "item_index"])
    events = histories["event_ts"].combine_chunks()
    ts = events.flatten().cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    if not len(ts):
        return False
    user = np.repeat(np.arange(len(events)), pc.list_value_length(events).to_numpy())
    late = ts >= ts.max() - window
    index = histories["item_index"].combine_chunks().flatten().to_numpy().astype(np.int64)
    size = int(pc.max(known["item_index"]).as_py() or 0) + 1
    had = np.unique(user[late] * size + index[late])
    place = pc.index_in(item, known["item_id"].combine_chunks())
    listed = pc.fill_null(known["item_index"].combine_chunks().take(place), 0).to_numpy()
    owner = pc.fill_null(pc.index_in(users, histories["user_id"].combine_chunks()), -1).to_numpy()
    pairs = owner[row].astype(np.int64) * size + listed
    at = np.minimum(np.searchsorted(had, pairs), max(0, len(had) - 1))
    return bool(len(had)) and bool((had[at] == pairs).any())
