"""What others did to a table since our last commit, and what it means for a run.

The last commit of ours is named by the table's own log: each carries `Lake.guard` with its version,
and RESTORE takes back rows but no transaction identifiers. (Tables of an earlier version have none:
there the newest version that a run reported counts, and without one the table is taken as it is.)

Commits of others since then that moved rows are, in `bronze`, facts (DELETE, UPDATE, MERGE, appended
rows) or a loss (RESTORE, overwrite); in derived tables they are repaired by making the rows anew. A
commit that only fills columns of others changes nothing of ours.

Decisions 6 and 7 in docs/design/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deltalake import DeltaTable

from jobs.core.errors import InputChanged, TableLost
from jobs.core.tables import ITEMS, NUMBERING, PERSON_EVENTS, RUNS, SESSIONS, Table
from jobs.lake import features, filesystem
from jobs.lake.commits import Commit, commits
from jobs.lake.context import Context
from jobs.lake.delta import Lake
from jobs.lake.delta_errors import TableRefused
from jobs.lake.foreign_rows import rows_at, same_rows

__all__ = ["rows_at"]

REPLACED = "sessionmill.replaced"
"""A property of `bronze.events` whose older versions are others than those that its readers know of:
the run that read the landing again. Readers that were rebuilt since have it, too."""
READING = "reading again: "
OLDER_COPY = "sessionmill.older_copy"
"""The same of `silver.sessions`: the run that found an older copy in its place."""

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
    """The version of our last commit; None: not known."""
    found = lake.open(table)
    if found is None:
        return None
    own = found.transaction_version(lake.guard(table))
    if own is not None:
        return int(own)
    return max((one for one in reported(lake, table) if one <= found.version()), default=None)


def reported(lake: Lake, table: Table) -> list[int]:
    """The versions that runs which ended well reported of a table, oldest run first."""
    found = lake.open(RUNS)
    if found is None:
        return []
    columns = ["started_ts", "outcome", "tables_out"]
    rows = filesystem.rows_of(found).to_table(columns=columns).sort_by("started_ts").to_pylist()
    told = [dict(one["tables_out"] or ()) for one in rows if one["outcome"] == "ok"]
    return [one[table.full_name] for one in told if table.full_name in one]


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
    """The version that a RESTORE went back to, where its commit names it."""
    if commit.operation != "RESTORE":
        return None
    text = str(commit.parameters.get("version"))
    return int(text) if text.isdigit() else None


# -- settings of others ---------------------------------------------------------------------------


def make_ready(context: Context, *tables: Table) -> None:
    """See to it that tables can be read and written as others left them, before anything is.

    Raises:
        TableRefused: a column of ours has another name, the table is partitioned, or delta-rs cannot
            read it.
    """
    lake = context.lake
    for table in tables:
        found = lake.open(table)
        if found is None:
            continue
        refuse_unreadable(lake, table, found)
        refuse_renamed(lake, table, found)
        refuse_partitioned(lake, table, found)
        if lake.purge_vectors(table, context.run_id):
            print(f"{table.full_name}: files with deletion vectors were rewritten", flush=True)
        tell_readers_of_older_copy(context, table)


def refuse_unreadable(lake: Lake, table: Table, found: DeltaTable) -> None:
    """Raises: TableRefused: the table has features that delta-rs does not read."""
    cannot = features.unreadable(found)
    if not cannot:
        return
    path = lake.path(table)
    undo = "To undo it in Spark: " + "; ".join(
        f"ALTER TABLE delta.`{path}` DROP FEATURE '{one}'" for one in cannot
    )
    raise TableRefused(
        f"{table.full_name}: it has features that delta-rs cannot read, {', '.join(cannot)}. Nothing was "
        f"written. DESCRIBE HISTORY shows who turned them on. {undo}"
    )


def refuse_renamed(lake: Lake, table: Table, found: DeltaTable) -> None:
    """Raises: TableRefused: a column of ours was renamed, or dropped and added again."""
    for ours, theirs in features.renamed(found, table.columns).items():
        who = _by_whom(lake, table, found, "RENAME COLUMN", "DROP COLUMNS")
        back = f"ALTER TABLE delta.`{lake.path(table)}` RENAME COLUMN {theirs} TO {ours}"
        raise TableRefused(
            f"{table.full_name}: column {ours} was renamed to {theirs}{who}. Nothing was written. "
            f"To undo it in Spark: {back}"
            if ours != theirs
            else f"{table.full_name}: column {ours} was dropped and added again{who}, and its data files "
            "use another name for it. Nothing was written. RESTORE the table to an earlier version"
        )


def refuse_partitioned(lake: Lake, table: Table, found: DeltaTable) -> None:
    """Raises: TableRefused: others wrote the table with partitions. (The jobs read and add data files
    that have all columns.)"""
    by = found.metadata().partition_columns
    if not by:
        return
    who = _by_whom(
        lake, table, found, "WRITE", "REPLACE TABLE AS SELECT", "CREATE OR REPLACE TABLE AS SELECT"
    )
    known = last_known(lake, table)
    version = "an earlier version" if known is None else f"VERSION AS OF {known}"
    raise TableRefused(
        f"{table.full_name} was partitioned by {', '.join(by)}{who}. The jobs need it without partitions. "
        f"Nothing was written. To undo it in Spark: RESTORE TABLE delta.`{lake.path(table)}` TO {version}"
    )


def _by_whom(lake: Lake, table: Table, found: DeltaTable, *operations: str) -> str:
    """Who made the last commit of some operations since ours, for a sentence."""
    known = last_known(lake, table)
    since = commits(lake.path(table), -1 if known is None else known, found.version())
    by = [one for one in since if one.operation in operations]
    return " by another writer" + (f": {by[-1].in_words()}" if by else "")


READERS_ASK = {PERSON_EVENTS: OLDER_COPY, SESSIONS: OLDER_COPY, ITEMS: NUMBERING}
"""The property of a derived table by which its readers know that its versions are others than those
that they have read."""


def tell_readers_of_older_copy(context: Context, table: Table) -> None:
    """Where a derived table is an older one than a run reported last: it continues from where it is, by
    the changes of its own input, and what reads it is rebuilt. A new item may have got another number,
    and a version that was read may come again with other rows."""
    lake, told = context.lake, reported(context.lake, table) if table in READERS_ASK else []
    newest = lake.version(table)
    if not told or newest is None or newest >= told[-1]:
        return
    lake.set_property(table, READERS_ASK[table], context.run_id)
    print(
        f"{table.full_name} is at version {newest}, but a run before reported version {told[-1]}: it was "
        "replaced by an older copy. The tables that are made from it are rebuilt",
        flush=True,
    )


# -- derived tables: repaired ---------------------------------------------------------------------


def changed(lake: Lake, table: Table) -> Change | None:
    """Whether others changed rows of a derived table since our last commit; None: no, or none is
    known."""
    known = last_known(lake, table)
    if known is None:
        return None
    found, newest = list(moved(lake, table, known)), lake.version(table)
    if not found or newest is None or same_rows(lake, table, found[0].version - 1, newest):
        return None
    return Change(table, found[0].version - 1, found[-1])


def answer(context: Context, target: Table, of: Table) -> None:
    """Note that a table was rebuilt, or needed not to be, from its input as it is."""
    for name, said in _unanswered(context.lake, target, of).items():
        context.lake.set_property(target, name, said)


def _unanswered(lake: Lake, target: Table, of: Table) -> dict[str, str]:
    """Properties that say that versions of `of` are others than those that `target` was made from."""
    said = {name: lake.property(of, name) for name in (REPLACED, OLDER_COPY)}
    return {
        name: one
        for name, one in said.items()
        if one is not None and one != lake.property(target, name)
    }


def to_make_anew(context: Context, target: Table, of: Table, upto: int) -> tuple[bool, list[str]]:
    """Whether a derived table is to be made anew from version `upto` of its input, whatever it
    consumed before; and what to say of it."""
    used, found = context.lake.consumed(target, of), changed(context.lake, target)
    if found is not None:
        return True, [f"{found.in_words()}. It was rebuilt from {of.full_name}"]
    replaced = _unanswered(context.lake, target, of)
    if replaced or (used is not None and used > upto):
        return True, [
            f"{of.full_name} was replaced since version {used}, from which {target.full_name} was made. "
            f"{target.full_name} was rebuilt"
        ]
    return False, []


JOBS = {
    "silver.events": "sessionize",
    "silver.sessions": "sessionize",
    "gold.items": "items",
    "gold.sequences": "sequences",
}
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


def begin_reading_again(context: Context, *tables: Table) -> list[str]:
    """Take missing data files out of tables of the log before the landing is read again. Returns what
    to say of it. (What reads the events is rebuilt: the change feed does not have what was in them.)"""
    lake, notes = context.lake, []
    for table in tables:
        missing = lake.missing_files(table)
        if not missing and not any(one.operation == FSCK for one in standing(lake, table)):
            continue
        lake.set_property(table, REPLACED, READING + context.run_id)
        if missing:
            lake.drop_missing(table, context.run_id)
            notes.append(
                f"{table.full_name}: {len(missing):,} data files are missing and were taken out of the "
                f"table, the first is {missing[0]}. All landing files were read again"
            )
    return notes


def end_reading_again(context: Context, *tables: Table) -> None:
    """Note that all landing files were read again."""
    for table in tables:
        if (context.lake.property(table, REPLACED) or "").startswith(READING):
            context.lake.set_property(table, REPLACED, context.run_id)


FSCK = "FSCK"
"""delta-rs's operation that takes missing data files out of a table."""


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
