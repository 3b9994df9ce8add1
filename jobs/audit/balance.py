"""The balance of a lake: the events of `bronze.events`, `silver.events` (of sources with `[identity]`),
`silver.sessions` and `gold.sequences` are the same ones. It is asked of all data files, every night.

The statement: fingerprints (`jobs/audit/fingerprints.py`, kept in `ops.fingerprints`) of a derived
table's files add up to those of its input's, at the version that it was made from; of gold, without
runaway sessions. A run asks it of the stored tables before it computes anything, because what it
computes continues the rows that are there, and again when it has published, because what was written
may be less than what was audited. (All of `gold.sequences` made anew is compared with it before, too.)

A difference is looked at twice: all files are read again first, so that wrong rows of
`ops.fingerprints` are corrected and no alarm.

Decision 7 in docs/design/decisions.md.
"""

from __future__ import annotations

import pyarrow as pa
from deltalake.exceptions import DeltaError
from pyarrow import fs

from jobs.audit import fingerprint_table
from jobs.audit.fingerprint_table import Snapshot, of_opened, snapshot
from jobs.audit.fingerprints import Row, Sum, summed, table_of
from jobs.core.errors import AuditFailed
from jobs.core.tables import EVENTS, FINGERPRINTS, PERSON_EVENTS, SEQUENCES, SESSIONS, Table
from jobs.lake import features, filesystem, foreign
from jobs.lake.commits import commits
from jobs.lake.context import Context
from jobs.lake.delta import Lake

DERIVED = (PERSON_EVENTS, SESSIONS, SEQUENCES)


def input_of(lake: Lake, target: Table) -> Table:
    """What a derived table is made from."""
    if target is SESSIONS:
        return lake.session_events()
    return EVENTS if target is PERSON_EVENTS else SESSIONS


def hold(context: Context, target: Table) -> list[str]:
    """See to it that a derived table has the events of its input, and both their data files.

    Returns:
        What to say of it; why the tables could not be compared, if so.

    Raises:
        AuditFailed: events or files are missing, or too many; names the command that repairs it.
    """
    sides = sides_of(context, target)
    if isinstance(sides, str):
        return [f"{target.full_name} was not compared with its input: {sides}"] if sides else []
    of, made, newest = sides
    for one in (newest, made):
        files_are_there(context, one)
    try:
        rows = fingerprint_table.rows_of(context, of, made)
    except Exception:
        if of is newest or not (gone := files_gone(context, of)):
            raise
        return [
            f"{target.full_name} was not compared with {of.in_words()}, from which it was made: "
            f"{len(gone)} of its data files cannot be read any more"
        ]
    there, wanted = sums(target, rows)
    if there == wanted:
        return []
    lost = [] if of is newest else [path for path, _ in files_gone(context, of)]
    rows, wrong = fingerprint_table.rows_anew(context, of, made, gone=lost)
    there, wanted = sums(target, rows)
    if there == wanted:
        return [
            f"{FINGERPRINTS.full_name}: {wrong} rows were not what their files have. They were made again"
        ]
    if foreign.changed(context.lake, target) is not None:
        return []  # (others were faster: their change is the next run's to repair)
    raise AuditFailed(in_words(context, of, made, there, wanted))


def sums(target: Table, rows: list[pa.Table]) -> tuple[Sum, Sum]:
    """What a derived table has, and what it should have.

    Args:
        rows: of the input's files, and of the table's.
    """
    of, made = rows
    return summed(made, kept=target is PERSON_EVENTS), summed(of, kept=target is SEQUENCES)


def sides_of(context: Context, target: Table) -> tuple[Snapshot, Snapshot, Snapshot] | str:
    """The versions to compare, the input's and the table's own, and the newest one of the input; or why
    there are none (empty: the table was never made).

    Where no row of the input has moved since the version that the table was made from, its newest
    version is taken: whoever only arranges rows anew must not lose any.
    """
    lake, of = context.lake, input_of(context.lake, target)
    made, there = lake.open(target), lake.open(of)
    used = None if made is None else made.transaction_version(lake.app_id(target, of))
    if made is None or used is None or there is None or used > there.version():
        return ""
    newest = of_opened(of, there)
    moved = any(one.moves for one in commits(lake.path(of), used, newest.version))
    try:
        sides = snapshot(lake, of, used) if moved else newest, of_opened(target, made), newest
    except DeltaError as error:
        return f"{of.full_name} version {used} cannot be opened any more ({str(error)[:200]})"
    for one in sides:
        if features.has_vectors(one.opened):
            return f"{one.in_words()} has deletion vectors, which the next run removes first"
    return sides


def in_words(context: Context, of: Snapshot, made: Snapshot, there: Sum, wanted: Sum) -> str:
    """What is wrong, and what repairs it."""
    name, more = made.table.full_name, there[0] - wanted[0]
    events = f"the {wanted[0]:,} events of {of.in_words()}"
    if made.table is SEQUENCES:
        events += " that are in no runaway session"
    if more:
        many = f"{abs(more):,} event{'s' * (abs(more) != 1)}"
        said = f"{made.in_words()} has {many} {'more' if more > 0 else 'fewer'} than {events}"
    else:
        said = (
            f"{made.in_words()} has as many events as {events}, but others: users or times differ"
        )
    command, why = "--rebuild", f"To make {name} again"
    if more > 0 and made.table is not SEQUENCES:
        command = "--reload --rebuild"
        why = (
            f"Either {of.table.full_name} lost them, or {name} has some twice. To read all landing files "
            "again and make all other tables from them"
        )
    return (
        f"{said}, from which it was made. All data files were read again to be sure. {why}: "
        f"python -m jobs run --source {context.source.name} {command}"
    )


# -- files ----------------------------------------------------------------------------------------


def files_are_there(context: Context, of: Snapshot) -> None:
    """See to it that the data files which the log names are there, as large as it says.

    On an object store a table of very many files is not looked at (`Thresholds.listed_files`).

    Raises:
        AuditFailed: one is missing, or has another size.
    """
    gone = files_gone(context, of)
    if not gone:
        return
    path, said = gone[0]
    if others := len(gone) - 1:
        said += f" {others:,} more of its {of.files.num_rows:,} files are missing or damaged."
    remedy = "Restore the file from a backup"
    if of.table is not EVENTS:
        again = f"python -m jobs run --source {context.source.name} --rebuild"
        remedy += f", or make the table again: {again}"
    name = path.rpartition("/")[2]
    raise AuditFailed(f"{of.table.full_name}: file {name} is {said} {remedy}")


def files_gone(context: Context, of: Snapshot) -> list[tuple[str, str]]:
    """The data files that are not as the log says: path, and what is the case."""
    sizes = dict(zip(of.paths.to_pylist(), of.files["size_bytes"].to_pylist(), strict=True))
    found = sizes_of(context, of.table, list(sizes))
    if found is None:
        return []
    gone = []
    for path, size in sizes.items():
        has = found.get(path)
        if has is None:
            gone.append((path, "missing."))
        elif has != size:
            gone.append((path, f"damaged. It has {has:,} bytes; the log says {size:,}."))
    return gone


def sizes_of(context: Context, table: Table, paths: list[str]) -> dict[str, int] | None:
    """The bytes of those data files that are there; None: they are too many to ask for.

    On a disk each is asked for; on an object store, where every question is a request, the table's
    folder is listed.
    """
    lake = context.lake
    root = lake.path(table)
    system, inner = filesystem.located(root)
    elsewhere = [one for one in paths if one.startswith("/") or "://" in one]
    if isinstance(system, fs.LocalFileSystem) or elsewhere:
        whole = [filesystem.data_path(lake.path(table), one) for one in paths]
        infos = system.get_file_info([filesystem.located(one)[1] for one in whole])
        return {
            path: int(info.size)
            for path, info in zip(paths, infos, strict=True)
            if info.type == fs.FileType.File
        }
    if len(paths) > context.thresholds.listed_files:
        return None
    below = inner.rstrip("/") + "/"
    listed = system.get_file_info(fs.FileSelector(inner, recursive=True))
    return {one.path.removeprefix(below): int(one.size or 0) for one in listed}


# -- a candidate ----------------------------------------------------------------------------------


def has_sessions_events(context: Context, version: int, rows: list[Row]) -> bool:
    """Whether files of `gold.sequences` have the events of a version of `silver.sessions`."""
    made, of = table_of(rows), snapshot(context.lake, SESSIONS, version)
    there, wanted = sums(SEQUENCES, [*fingerprint_table.rows_of(context, of), made])
    if there != wanted:
        anew, _ = fingerprint_table.rows_anew(context, of)
        there, wanted = sums(SEQUENCES, [*anew, made])
    return there == wanted


# -- whole tables -----------------------------------------------------------------------------------


BALANCES = {
    PERSON_EVENTS: "people_balance",
    SESSIONS: "sessions_balance",
    SEQUENCES: "sequences_balance",
}
"""By table: the check that it has the events of its input."""


def validated(context: Context) -> tuple[dict[str, bool], dict[str, str]]:
    """The checks of `ops.fingerprints` that speak of all files, all of which are read: check -> whether
    it holds; check -> why it was not evaluated. Nothing is written."""
    lake = context.lake
    held, unknown = {"rows_are_of_their_files": True}, {}
    read: dict[tuple[str, int], pa.Table] = {}

    def rows_of(of: Snapshot) -> pa.Table:
        key = (of.table.full_name, of.version)
        if key not in read:
            read[key] = fingerprint_table.made_of(context, of, of.paths)
        return read[key]

    stored = lake.small(FINGERPRINTS)
    for table in (EVENTS, *DERIVED):
        if lake.version(table) is not None:
            one = snapshot(lake, table)
            known = fingerprint_table.kept(stored, one)
            held["rows_are_of_their_files"] &= not fingerprint_table.wrong(known, rows_of(one))
    for target, check in BALANCES.items():
        if target is PERSON_EVENTS and lake.version(target) is None:
            held[check] = True  # (sessions are cut from bronze.events)
            continue
        sides = sides_of(context, target)
        if isinstance(sides, str):
            unknown[check] = sides or f"{target.full_name} was not made yet"
        elif gone := files_gone(context, sides[0]):
            unknown[check] = (
                f"{len(gone)} data files of {sides[0].in_words()} cannot be read any more"
            )
        else:
            there, wanted = sums(target, [rows_of(one) for one in sides[:2]])
            held[check] = there == wanted
    return held, unknown


def needed(context: Context) -> list[Snapshot]:
    """The versions whose fingerprints the next runs may ask for."""
    lake, found = context.lake, []
    for table in (EVENTS, *DERIVED):
        if lake.version(table) is not None:
            found.append(snapshot(lake, table))
    for target in DERIVED:
        of = input_of(lake, target)
        used = lake.consumed(target, of)
        if used is not None and used < (lake.version(of) or 0):
            try:
                found.append(snapshot(lake, of, used))
            except DeltaError:
                continue  # (its log is gone: nobody can ask for it)
    return found
