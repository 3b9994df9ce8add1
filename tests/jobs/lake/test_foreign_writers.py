"""Tables that others have written to with their own tools: the next night is as if nobody had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs.core.plan import Thresholds
from jobs.core.tables import EVENTS, ITEMS, SEQUENCES, SESSIONS, Table
from tests.support.spark_tools import CLICKS, Workshop

TABLES = (EVENTS, SESSIONS, ITEMS, SEQUENCES)
T, DAY = 1_700_000_000, 86_400
HEADER = "user,item,ts\n"
FIRST = "".join(
    f"u{user},i{item},{T + DAY * user + 60 * item}\n" for user in range(4) for item in range(5)
)
# A session goes on, one is opened between two others, one user is new.
SECOND = f"u1,i9,{T + DAY + 300}\nu2,i1,{T + DAY}\nu7,i8,{T}\n"


def merged_with_itself(table: DeltaTable, key: str) -> None:
    """As a MERGE that changes nothing: all rows are written anew, their texts as views."""
    rows = pa.table(table.to_pyarrow_table())
    on = f"t.{key} = s.{key}"
    table.merge(rows, on, "s", "t").when_matched_update_all().execute()


def compacted(table: DeltaTable, key: str) -> None:
    table.optimize.compact()


def z_ordered(table: DeltaTable, key: str) -> None:
    table.optimize.z_order([key])


def state(shop: Workshop) -> dict[str, list[dict[str, Any]]]:
    return {
        table.full_name: shop.rows(table, drop=("ingest_file", "ingest_ts")) for table in TABLES
    }


def key_of(table: Table) -> str:
    [key] = table.key
    return key


@pytest.mark.parametrize(
    ("act", "many"),
    [
        (merged_with_itself, False),
        pytest.param(merged_with_itself, True, marks=pytest.mark.long),
        pytest.param(compacted, False, marks=pytest.mark.long),
        pytest.param(z_ordered, True, marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_a_night_after_others_wrote_is_as_without(
    spark: Any, tmp_path: Path, act: Any, many: bool
) -> None:
    limits = Thresholds(few_moved=-1, smallest_slice=2, read_bytes=-1) if many else None
    ours, touched = (Workshop(spark, tmp_path / name, CLICKS, limits) for name in ("o", "t"))
    for shop in (ours, touched):
        shop.land("1.csv", HEADER + FIRST)
        shop.run()
    for table in TABLES:
        act(touched.table(table), key_of(table))
    for shop in (ours, touched):
        shop.land("2.csv", HEADER + SECOND)
    results = [shop.run() for shop in (ours, touched)]
    assert results[0].counts() == results[1].counts()
    assert state(ours) == state(touched)
