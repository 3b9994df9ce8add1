"""What a catalogue said of items at a time, from `gold.item_attributes`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np

from models.data.sequences import open_table
from models.networks.side_information import Side, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa


def _known(path: str, until_us: int, make_with: str) -> tuple[pa.Table, int]:
    """Rows known at a time, oldest first, and the table's version."""
    import pyarrow.compute as pc

    from jobs.lake.filesystem import rows_of

    table = open_table(path, None, make_with)
    rows = rows_of(table).to_table(columns=["item_id", "known_from", "attributes"])
    until = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=until_us)
    rows = rows.filter(pc.less_equal(rows["known_from"], until)).sort_by("known_from")
    return rows, table.version()


def listed_items(path: str, until_us: int, make_with: str) -> set[str]:
    """The items of which the catalogue said anything until `until_us`, whether they have events or
    not."""
    return set(_known(path, until_us, make_with)[0]["item_id"].to_pylist())


def read_side(
    path: str,
    item_ids: Sequence[str],
    until_us: int,
    categories: Sequence[str],
    numbers: Sequence[str],
    make_with: str,
    texts: Sequence[str] = (),
) -> Side:
    """What was known of the items at `until_us`; what became known later is not looked at."""
    rows, version = _known(path, until_us, make_with)
    wanted = {item: place for place, item in enumerate(item_ids)}
    known: list[dict[str, str]] = [{} for _ in item_ids]
    for item, attributes in zip(
        rows["item_id"].to_pylist(), rows["attributes"].to_pylist(), strict=True
    ):
        if item in wanted:
            known[wanted[item]] = dict(attributes)  # the newest stays
    code = np.zeros((len(item_ids), len(categories)), dtype=np.int64)
    sizes, held = [], {}
    for column, name in enumerate(categories):
        values = sorted({one[name] for one in known if name in one})
        place = {value: number for number, value in enumerate(values, 1)}
        code[:, column] = [place.get(one.get(name, ""), 0) if name in one else 0 for one in known]
        sizes.append(len(values) + 1)
        held[name] = values
    value = np.full((len(item_ids), len(numbers)), np.nan)
    for column, name in enumerate(numbers):
        value[:, column] = [float(one[name]) if name in one else np.nan for one in known]
    there = ~np.isnan(value)
    count = np.maximum(1, there.sum(0))
    mean = np.where(there, value, 0).sum(0) / count
    spread = np.sqrt(np.where(there, (value - mean) ** 2, 0).sum(0) / count)
    value = np.where(there, (value - mean) / np.where(spread > 0, spread, 1), 0)
    said = sum(any(name in one for name in (*categories, *numbers, *texts)) for one in known)
    words = [words_of([one.get(name, "") for one in known]) for name in texts]
    stacked = np.stack(words, axis=1) if words else None
    return Side(code, tuple(sizes), value, version, said, held, stacked)
