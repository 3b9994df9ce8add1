"""What others did to a table since our last commit, and what it means for a run.

The last commit of ours is named by the table's own log: each carries `Lake.guard` with its version,
and RESTORE takes back rows but no transaction identifiers. (Tables of an earlier version have none:
there the newest version that a run reported counts, and without one the table is taken as it is.)

Commits of others since then that moved rows are, in `bronze`, facts (DELETE, UPDATE, MERGE, appended
rows) or a loss (RESTORE, overwrite); in derived tables they are repaired by making the rows anew. A
commit that only fills columns of others changes nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from deltalake.exceptions import DeltaError

from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import InputChanged, TableLost
from jobs.core.plan import Thresholds
from jobs.core.tables import RUNS, Table
from jobs.lake import features
from jobs.lake.commits import Commit, commits
from jobs.lake.context import Context
from jobs.lake.delta import Lake
from jobs.lake.delta_errors import TableRefused

FACTS = {"DELETE", "UPDATE", "MERGE", "TRUNCATE", "STREAMING UPDATE", "COPY INTO"}


@dataclass(frozen=True)
class Change:
    """Rows of a table that others changed since our last commit."""

    table: Table
    good: int
    """The last version before that."""
    commit: Commit
    """The last one that did."""

    def in_words(self) -> str:
        return f"{self.table.full_name} was changed by another writer: {self.commit.in_words()}"


def last_known(lake: Lake, table: Table) -> int | None:
    """The version of our last commit; None: nobody knows."""
    found = lake.open(table)
    if found is None:
        return None
    own = found.transaction_version(lake.guard(table))
    if own is not None:
        return int(own)
    told = [
        dict(run["tables_out"] or ()).get(table.full_name)
        for run in lake.small(RUNS).select(["outcome", "tables_out"]).to_pylist()
        if run["outcome"] == "ok"
    ]
    versions = [one for one in told if one is not None and one <= found.version()]
    return max(versions, default=None)


def moved(lake: Lake, table: Table, known: int) -> Iterator[Commit]:
    """Commits of others after a version that moved rows, oldest first, without those that a later
    RESTORE took back."""
    newest = lake.version(table)
    assert newest is not None
    standing: dict[int, list[Commit]] = {known: []}
    for one in commits(lake.path(table), known, newest):
        before = standing[one.version - 1]
        back = _restored(one)
        if back is not None and back in standing:
            standing[one.version] = standing[back]
        elif one.moves and one.run_id is None:
            standing[one.version] = [*before, one]
        else:
            standing[one.version] = before
    yield from standing[newest]


def standing(lake: Lake, table: Table) -> list[Commit]:
    """`moved`, since our last commit as far as it is known."""
    known = last_known(lake, table)
    return [] if known is None else list(moved(lake, table, known))


def _restored(commit: Commit) -> int | None:
    """The version that a RESTORE went back to, where it says so."""
    if commit.operation != "RESTORE":
        return None
    text = str(commit.parameters.get("version"))
    return int(text) if text.isdigit() else None


# -- settings of others ---------------------------------------------------------------------------


def make_ready(context: Context, *tables: Table) -> None:
    """See to it that tables can be read and written as others left them, before anything is.

    Raises:
        TableRefused: a column of ours has another name, or delta-rs cannot read the table.
    """
    lake = context.lake
    for table in tables:
        found = lake.open(table)
        if found is None:
            continue
        if cannot := features.unreadable(found):
            raise TableRefused(
                f"{table.full_name}: it has features that delta-rs cannot read, {', '.join(cannot)}. "
                "Nothing was written. DESCRIBE HISTORY shows who turned them on. To undo it in Spark: "
                + "; ".join(
                    f"ALTER TABLE delta.`{lake.path(table)}` DROP FEATURE '{one}'" for one in cannot
                )
            )
        for ours, theirs in features.renamed(found, table.columns).items():
            known = last_known(lake, table)
            since = commits(lake.path(table), -1 if known is None else known, found.version())
            by = [one for one in since if one.operation in ("RENAME COLUMN", "DROP COLUMNS")]
            who = f" by another writer: {by[-1].in_words()}" if by else " by another writer"
            back = f"ALTER TABLE delta.`{lake.path(table)}` RENAME COLUMN {theirs} TO {ours}"
            raise TableRefused(
                f"{table.full_name}: column {ours} was renamed to {theirs}{who}. Nothing was written. "
                f"To undo it in Spark: {back}"
                if ours != theirs
                else f"{table.full_name}: column {ours} was dropped and added again{who}, and its data files "
                "use another name for it. Nothing was written. RESTORE the table to an earlier version"
            )
        if lake.purge_vectors(table, context.run_id):
            print(f"{table.full_name}: files with deletion vectors were rewritten", flush=True)


# -- derived tables: repaired ---------------------------------------------------------------------


def changed(lake: Lake, table: Table) -> Change | None:
    """Whether others changed rows of a derived table since our last commit; None: no, or nobody
    knows of any."""
    known = last_known(lake, table)
    if known is None:
        return None
    found = list(moved(lake, table, known))
    if not found or _same_rows(lake, table, found[0].version - 1):
        return None
    return Change(table, found[0].version - 1, found[-1])


def _same_rows(lake: Lake, table: Table, good: int) -> bool:
    """Whether the table's rows are those of a version, in our columns; not known counts as no."""
    newest = lake.version(table)
    if newest is None or lake.bytes(table) > Thresholds.compared_bytes:
        return False
    then, now = (rows_at(lake, table, version) for version in (good, newest))
    return then is not None and now is not None and then.equals(now)


def rows_at(lake: Lake, table: Table, version: int) -> pa.Table | None:
    """The rows of a version in our columns, in the order of the key; None: it cannot be read any
    more."""
    schema = arrow_schema(table.columns)
    try:
        rows = lake.table_of(table, version, schema.names).cast(schema)
    except (DeltaError, OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return rows.sort_by([(name, "ascending") for name in table.key]).combine_chunks()


REPLACED = "sessionmill.replaced"
"""A property of `bronze.events` whose older versions are others than those that its readers know of:
the run that read the landing again. Readers that were rebuilt since have it, too."""
READING = "reading again: "


def answer(context: Context, target: Table, of: Table) -> None:
    """Note that a table was rebuilt, or needed not to be, from its input as it is."""
    replaced = context.lake.property(of, REPLACED)
    if replaced is not None and replaced != context.lake.property(target, REPLACED):
        context.lake.set_property(target, REPLACED, replaced)


def to_make_anew(context: Context, target: Table, of: Table, upto: int) -> tuple[bool, list[str]]:
    """Whether a derived table is to be made anew from version `upto` of its input, whatever it
    consumed before; and what to say of it."""
    used, found = context.lake.consumed(target, of), changed(context.lake, target)
    if found is not None:
        return True, [f"{found.in_words()}. It was rebuilt from {of.full_name}"]
    replaced = context.lake.property(of, REPLACED)
    known = replaced is None or replaced == context.lake.property(target, REPLACED)
    if not known or (used is not None and used > upto):
        return True, [
            f"{of.full_name} was replaced since version {used}, from which {target.full_name} was made. "
            f"{target.full_name} was rebuilt"
        ]
    return False, []


JOBS = {"silver.sessions": "sessionize", "gold.items": "items", "gold.sequences": "sequences"}
"""Which job makes a table."""


def refuse_changed_input(context: Context, *tables: Table) -> None:
    """Raises: InputChanged: others changed a derived table that is about to be read."""
    for table in tables:
        found = changed(context.lake, table)
        if found is not None:
            job = JOBS[table.full_name]
            raise InputChanged(
                f"{found.in_words()}. Rebuild it first: python -m jobs {job} --source "
                f"{context.source.name}",
                job,
            )


# -- bronze: facts and losses ---------------------------------------------------------------------


def refuse_loss(context: Context, *tables: Table) -> None:
    """Raises: TableLost: others put older or other rows in place of a table of the log."""
    for table in tables:
        lake = context.lake
        if (lake.property(table, REPLACED) or "").startswith(READING):
            raise TableLost(
                f"{table.full_name}: reading all landing files again did not finish. Run it again: "
                f"python -m jobs run --source {context.source.name} --reload"
            )
        known = last_known(lake, table)
        if known is None:
            continue
        for one in moved(lake, table, known):
            if is_loss(one):
                raise TableLost(
                    f"{table.full_name} was restored or overwritten by another writer: "
                    f"{one.in_words()}. Rows may be missing, so the run stopped. To read all landing "
                    f"files again: python -m jobs run --source {context.source.name} --reload. "
                    f"Alternatively, RESTORE the table to version {known} or later"
                )


def is_loss(commit: Commit) -> bool:
    """Whether a commit of others that moved rows is no statement about single rows."""
    if commit.operation is None or commit.operation in FACTS:
        return False
    appended = commit.operation == "WRITE" and commit.parameters.get("mode") == "Append"
    return not appended


def is_older_copy(context: Context, target: Table, of: Table) -> bool:
    """Whether `target` was made from a version of `of` that is not there."""
    used, newest = context.lake.consumed(target, of), context.lake.version(of)
    return used is not None and newest is not None and used > newest


def refuse_older_copy(context: Context, target: Table, of: Table) -> None:
    """Raises: TableLost: `target` was made from a version of `of` that is not there."""
    used, newest = context.lake.consumed(target, of), context.lake.version(of)
    if is_older_copy(context, target, of):
        raise TableLost(
            f"{of.full_name} is at version {newest}, but {target.full_name} was made from version "
            f"{used}: the table was deleted or replaced by an older copy. To read all landing files "
            f"again: python -m jobs run --source {context.source.name} --reload"
        )
