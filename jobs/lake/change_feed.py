"""What may become of a row: the words of a candidate, and those of Delta's change feed for the same.

A candidate says `change`: new, changed, retired (or same: left out). The feed's `_change_type` says
it of rows as they were (`GONE`) and as they are (`CAME`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow.compute as pc

if TYPE_CHECKING:
    import pyarrow as pa

NEW, CHANGED, RETIRED, SAME = "new", "changed", "retired", "same"
CHANGES = (NEW, CHANGED, RETIRED)
PUT = f"change <> '{RETIRED}'"
"""Spark SQL: rows of a candidate that are to be in the table."""

TYPE, VERSION = "_change_type", "_commit_version"
INSERT, DELETE = "insert", "delete"
PREIMAGE, POSTIMAGE = "update_preimage", "update_postimage"
GONE = (DELETE, PREIMAGE)
CAME = (INSERT, POSTIMAGE)


def is_put(rows: pa.Table) -> pa.ChunkedArray:
    """`PUT`, of the rows of a candidate in Arrow."""
    return pc.not_equal(rows["change"], RETIRED)


def only_came(feed: pa.Table) -> bool:
    """Whether all rows of a feed are new ones: none was changed or removed."""
    return pc.all(pc.equal(feed[TYPE], INSERT)).as_py() is not False
