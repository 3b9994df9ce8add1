"""`ops.fingerprints`: the fingerprint of each data file, made once (`jobs/audit/fingerprints.py`).

Data files never change under a name, so a row stays true whatever versions name its file: also after
a RESTORE, of the table or of `ops.fingerprints`. A row that is missing is made again from its file.
Rows of files that nothing needs any more are removed by `jobs maintain`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from jobs.audit.arrow_columns import one_array
from jobs.audit.fingerprints import FIELDS, OF_FILE, PRINTED_DDL, Row, table_of
from jobs.core.plan import Engine
from jobs.core.tables import FINGERPRINTS, Table
from jobs.lake import filesystem
from jobs.lake.context import Context
from jobs.lake.delta import Lake
from jobs.lake.tasks import run


@dataclass(frozen=True)
class Snapshot:
    """A version of a table."""

    table: Table
    opened: DeltaTable
    files: pa.Table
    """`path` (below the table), `size_bytes`, and what else the log says of its data files."""

    @property
    def version(self) -> int:
        return int(self.opened.version())

    @property
    def paths(self) -> pa.Array:
        return one_array(self.files["path"]).cast(pa.string())

    def in_words(self) -> str:
        return f"{self.table.full_name} version {self.version}"


def snapshot(lake: Lake, table: Table, version: int | None = None) -> Snapshot:
    """A version of a table; None: the newest.

    Raises:
        DeltaError: there is no such version, or its log was cleaned up.
    """
    return of_opened(table, DeltaTable(filesystem.rust_uri(lake.path(table)), version=version))


def of_opened(table: Table, found: DeltaTable) -> Snapshot:
    return Snapshot(table, found, pa.table(found.get_add_actions()))


def rows_of(context: Context, *snapshots: Snapshot) -> list[pa.Table]:
    """The rows of all files of some versions (`path`, FIELDS): those that are kept, and those that are
    not yet, which are made and kept."""
    lake = context.lake
    lake.create(FINGERPRINTS, upgrade=False)
    stored = lake.small(FINGERPRINTS)
    found, new = [], []
    for one in snapshots:
        known = kept(stored, one)
        todo = one.paths.filter(pc.invert(pc.is_in(one.paths, value_set=one_array(known["path"]))))
        made = made_of(context, one, todo)
        found.append(pa.concat_tables([known, made]))
        new.append((one.table, made.to_pylist()))
    put(context, new)
    return found


def rows_anew(
    context: Context, *snapshots: Snapshot, gone: Collection[str] = ()
) -> tuple[list[pa.Table], int]:
    """`rows_of`, all of them made of the files, and how many others were kept: wrong ones, which are
    replaced.

    Args:
        gone: files that cannot be read any more: their rows are those that are kept.
    """
    stored = context.lake.small(FINGERPRINTS)
    lost = pa.array(list(gone), pa.string())
    found, new = [], []
    for one in snapshots:
        known = kept(stored, one)
        made = made_of(context, one, one.paths.filter(pc.invert(pc.is_in(one.paths, lost))))
        found.append(pa.concat_tables([known.filter(pc.is_in(known["path"], lost)), made]))
        new.append((one.table, wrong(known, made)))
    put(context, new)
    return found, sum(len(rows) for _, rows in new)


def kept(stored: pa.Table, of: Snapshot) -> pa.Table:
    """Those rows of `ops.fingerprints` that are of a version's files."""
    ours = stored.filter(pc.equal(stored["table_name"], of.table.full_name))
    place = pc.index_in(of.paths, value_set=one_array(ours["path"]).cast(pa.string()))
    return ours.take(place.drop_null()).select(["path", *FIELDS]).cast(table_of([]).schema)


def wrong(known: pa.Table, made: pa.Table) -> list[Row]:
    """The rows of files that are known as something else."""
    before = {row["path"]: row for row in known.to_pylist()}
    return [row for row in made.to_pylist() if before.get(row["path"], row) != row]


def put(context: Context, new: list[tuple[Table, list[Row]]]) -> None:
    """Keep rows; nothing is written where there are none."""
    made = [
        (table.full_name, row["path"], *(row[name] for name in FIELDS), context.started)
        for table, rows in new
        for row in rows
    ]
    if made:
        context.lake.put_small(FINGERPRINTS, made)


def keep(context: Context, *made: tuple[Table, list[Row]]) -> None:
    """Keep rows that tasks made while they had the files in memory anyway. (The row of a file that is
    never committed is removed with those of files that are gone.)"""
    lake = context.lake
    lake.create(FINGERPRINTS, upgrade=False)
    new = []
    for table, rows in made:
        root = f"{lake.path(table)}/"
        new.append((table, [row | {"path": row["path"].removeprefix(root)} for row in rows]))
    put(context, new)


def made_of(context: Context, of: Snapshot, paths: pa.Array) -> pa.Table:
    """Rows of some files of a version: `path`, FIELDS."""
    names = paths.to_pylist()
    root = context.lake.path(of.table)
    where = {filesystem.data_path(root, name): name for name in names}
    task, made = OF_FILE[of.table.full_name], []
    if names:
        chosen = of.files.filter(pc.is_in(of.paths, value_set=paths))
        many = (pc.sum(chosen["num_records"]).as_py() or 0) > context.thresholds.fingerprinted_rows
        if many:
            made = run(context.tasks(Engine.COMPILED), task, list(where), PRINTED_DDL, "string")
        else:
            with ThreadPoolExecutor(min(8, len(where))) as pool:
                made = [row for rows in pool.map(task, where) for row in rows]
    return table_of([one | {"path": where[one["path"]]} for one in made])


def prune(context: Context, needed: Sequence[Snapshot]) -> int:
    """Remove the rows of files that are in none of some versions; how many there were."""
    lake = context.lake
    if lake.version(FINGERPRINTS) is None:
        return 0
    stored = lake.small(FINGERPRINTS)
    active = {(one.table.full_name, path) for one in needed for path in one.paths.to_pylist()}
    keys = zip(stored["table_name"].to_pylist(), stored["path"].to_pylist(), strict=True)
    gone = pa.array([key not in active for key in keys], pa.bool_())
    rows = stored.filter(gone)
    if rows.num_rows:
        lake.drop_small(FINGERPRINTS, rows)
    return int(rows.num_rows)
