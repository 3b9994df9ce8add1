"""Features of Delta that others turn on, and which engine can do what with them.

delta-rs 1.6 neither writes tables with row tracking, in-commit timestamps, liquid clustering, default
columns or type widening, nor lets Arrow read tables with deletion vectors. Spark does. So Spark writes
where delta-rs cannot; and where a table has deletion vectors, Spark writes the files that have some
anew without them (`REORG … APPLY (PURGE)`, which moves no row) before anybody reads them. Spark also
writes where rows have to satisfy a condition or where a column is computed: files that are added whole
(`Lake.commit`) are checked by nobody.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from deltalake import DeltaTable

WRITTEN = frozenset(
    {
        "appendOnly", "invariants", "checkConstraints", "changeDataFeed", "generatedColumns",
        "columnMapping", "timestampNtz", "v2Checkpoint", "deletionVectors", "variantType",
        "variantType-preview",
    }
)  # fmt: skip
"""Features of tables that delta-rs 1.6 writes: `protocol.rs` of its source."""
VECTORS, MAPPING = "deletionVectors", "columnMapping"
READ = frozenset(
    {VECTORS, MAPPING, "timestampNtz", "v2Checkpoint", "variantType", "variantType-preview",
     "vacuumProtocolCheck"}
)  # fmt: skip
"""Features of tables that delta-rs 1.6 reads."""


def named(found: DeltaTable) -> set[str]:
    """The features that a table names; those of the old protocol versions are not named."""
    protocol = found.protocol()
    return {str(one) for one in (protocol.writer_features or []) + (protocol.reader_features or [])}


def mapped(found: DeltaTable) -> bool:
    """Whether columns may have other names in the data files (column mapping)."""
    return bool(found.metadata().configuration.get("delta.columnMapping.mode", "none") != "none")


def only_spark_reads_feed(found: DeltaTable) -> bool:
    """Whether the table has a feature with which delta-rs does not read its change feed, or not in
    every case."""
    return mapped(found) or VECTORS in named(found)


def unreadable(found: DeltaTable) -> list[str]:
    """The features of a table because of which delta-rs cannot read it; none: it can."""
    return sorted(set(found.protocol().reader_features or []) - READ)


def only_spark_writes(found: DeltaTable) -> list[str]:
    """The features of a table because of which delta-rs cannot write it; none: it can. (Files of tables
    with column mapping need ids of columns, which ours do not have.)"""
    because = named(found) - WRITTEN | set(checked(found))
    if mapped(found):
        because.add(MAPPING)
    if found.protocol().min_writer_version == 6:
        because.add("identityColumns")
    return sorted(because)


CONSTRAINT = "delta.constraints."
GENERATED = "delta.generationExpression"


def checked(found: DeltaTable) -> list[str]:
    """What a writer has to check or compute, row by row: constraints and columns of the table."""
    properties = found.metadata().configuration
    names = [one.removeprefix(CONSTRAINT) for one in properties if one.startswith(CONSTRAINT)]
    for one in found.schema().fields:
        computed = {GENERATED, "delta.invariants"} & set(one.metadata)
        if computed or not one.nullable:
            names.append(one.name)
    return sorted(names)


ABSOLUTE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]*:/")


def elsewhere(found: DeltaTable) -> list[str]:
    """The data files of a table that lie in another one: it is a shallow clone."""
    paths = pa.table(found.get_add_actions())["path"].to_pylist()
    return [one for one in paths if ABSOLUTE.match(one)]


def has_vectors(found: DeltaTable) -> bool:
    """Whether rows of the version are deleted by deletion vectors only."""
    if VECTORS not in named(found):
        return False
    return any(
        batch.num_rows for batch in pa.RecordBatchReader.from_stream(found.deletion_vectors())
    )


def renamed(found: DeltaTable, columns: Collection[str]) -> dict[str, str]:
    """Columns of ours that others renamed (column mapping): our name -> the name that they have now;
    the same name: dropped, and added anew under another name in the files."""
    if not mapped(found):
        return {}
    names = {}
    for one in found.schema().fields:
        physical = str(one.metadata.get("delta.columnMapping.physicalName", one.name))
        if physical != one.name and {physical, one.name} & set(columns):
            names[physical if physical in columns else one.name] = one.name
    return names
