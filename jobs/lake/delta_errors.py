"""The many errors of Delta and delta-rs, as our few."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs.core.errors import Conflict, SessionmillError, of_engine
from jobs.core.tables import ALL, Table


class TableRefused(SessionmillError):
    """An engine cannot read or write a table as others left it."""


class FeedGone(SessionmillError):
    """The change data feed no longer reaches back far enough: rebuild from the whole table."""


GONE = (
    "DELTA_MISSING_CHANGE_DATA", "DELTA_MISSING_FILES", "DELTA_VERSION_NOT_FOUND",
    "DELTA_FILE_NOT_FOUND", "DELTA_TRUNCATED_TRANSACTION_LOG", "DELTA_LOG_FILE_NOT_FOUND",
    "DELTA_CHANGE_DATA_FILE_NOT_FOUND", "FILE_NOT_EXIST", "FileNotFoundException",
    "VersionNotFoundException", "is out of range", "Cannot time travel",
    "not found", "No such file", "Invalid table version", "Invalid version",  # delta-rs's
    "DELTA_CHANGE_DATA_FEED_INCOMPATIBLE", "Change Data not enabled", "does not have change data enabled", "CHANGE DATA FEED scans",
)  # fmt: skip


@contextmanager
def feed_gone(table: Table, after: int, upto: int) -> Iterator[None]:
    """What a feed says when its log or its files were cleaned away, as one error."""
    try:
        yield
    except SessionmillError:
        raise  # (one of ours says what it is: another file may be missing)
    except Exception as error:
        if any(word in str(error) for word in GONE):
            raise FeedGone(
                f"{table.full_name} versions {after + 1} to {upto}: {str(error)[:200]}"
            ) from error
        raise


CONFLICTS = (
    "Concurrent",
    "ProtocolChanged",
    "MetadataChanged",
    "DELTA_CONCURRENT",  # Spark's
    "CommitFailedError",  # delta-rs's
)


REFUSALS = (
    "Unsupported table features",
    "append-only",
    "does not support writer version",
    "does not support reader version",
    "Table features must be specified",
)
"""What delta-rs calls a failed commit, and no other run has caused."""


@contextmanager
def conflicts(table: Table) -> Iterator[None]:
    """Delta's many conflict errors as our one."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__} {error}"[:600]
        if any(word in said for word in CONFLICTS) and not any(word in said for word in REFUSALS):
            raise Conflict(f"{table.full_name} was changed by another run meanwhile") from error
        if (refused := in_words(table, error)) is not None:
            raise refused from error
        raise


def retried(attempts: int, again: Callable[[int], Any]) -> Any:
    """Call `again(attempt)` until it raises no Conflict, at most `attempts` times."""
    for attempt in range(1, attempts + 1):
        try:
            return again(attempt)
        except Conflict:
            if attempt == attempts:
                raise
    raise AssertionError("unreachable")


WHY = {
    "append-only": (
        "it is append-only, but nights update its rows",
        "ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.appendOnly' = 'false')",
    ),
    "Unsupported table features": (
        "it has features that delta-rs cannot write",
        "ALTER TABLE delta.`{path}` DROP FEATURE …",
    ),
    "CHECK constraint": (
        "rows violate a constraint that was added to it",
        "ALTER TABLE delta.`{path}` DROP CONSTRAINT …",
    ),
    "failed validation check": (
        "rows violate a constraint that was added to it",
        "ALTER TABLE delta.`{path}` DROP CONSTRAINT …",
    ),
    "violate": (
        "rows violate a constraint that was added to it",
        "ALTER TABLE delta.`{path}` DROP CONSTRAINT …",
    ),
    "NOT NULL": (
        "a column that was added to it does not allow nulls",
        "ALTER TABLE delta.`{path}` ALTER COLUMN … DROP NOT NULL",
    ),
}
"""Words of an engine -> (what is the case, the statement that takes it back)."""


def in_words(table: Table, error: BaseException) -> TableRefused | None:
    """An error of an engine about a table as a sentence; None: it is not an engine's."""
    if not type(error).__module__.startswith(ENGINES):
        return None
    said = of_engine(error) or _line(error)
    for word, (why, remedy) in WHY.items():
        if word in str(error):
            path = "<lake>/<source>/" + table.full_name.replace(".", "/")
            return TableRefused(
                f"{table.full_name} cannot be written: {why}. DESCRIBE HISTORY shows who set it. To "
                f"undo it in Spark: {remedy.format(path=path)}. The engine reported: {said}"
            )
    return None


# -- what no job expects: the first line that a person sees ----------------------------------------

NAMES = "|".join(f"{one.layer}/{one.name}" for one in ALL)
TABLE = re.compile(rf"(?P<path>[^\s'\"`]*?/(?P<table>{NAMES}))(?![\w.])")
FILE = re.compile(r"[\w.=-]+\.(?:parquet|json|crc|bin)\b")
ENGINES = ("deltalake", "_internal", "pyarrow", "pyspark", "py4j")
CAUSES = (
    (re.compile(r"(?<!magic bytes )not found|no such file|not exist|filenotfound|404", re.IGNORECASE), "is missing"),
    (re.compile(r"magic bytes|corrupt|deserialize|footer|not a parquet|snappy|thrift|end of file"
                r"|malformed|json|EOF|unexpected end", re.IGNORECASE), "is damaged"),
)  # fmt: skip


def first_line(error: BaseException) -> str | None:
    """What an unexpected error about a table says, as a sentence with table, file, cause and remedy;
    None: it is neither about a table nor an engine's."""
    said = " ".join(f"{type(one).__name__}: {one}" for one in _chain(error))
    found = TABLE.search(said)
    engine = of_engine(error)
    if found is None:
        if engine is None and not type(error).__module__.startswith(ENGINES):
            return None
        who = "a task of Spark" if engine else "an engine"
        return f"{who} failed: {engine or _line(error)}. {AGAIN}"
    table = found["table"].replace("/", ".")
    file = FILE.search(said)
    cause = next((words for pattern, words in CAUSES if pattern.search(said)), None)
    what = f"{table}: file {file[0]} {cause}" if file and cause else f"{table} cannot be used"
    path = found["path"]
    if cause is None:
        remedy = AGAIN
    elif "_delta_log" in said and file and file[0].endswith("json"):
        remedy = f"Restore the table's log ({path}/_delta_log) from a backup"
    elif table.startswith("bronze"):
        again = f"python -m jobs run --source {path.split('/')[-3]} --reload"
        without = "Without one" if cause == "is missing" else "Without one, delete the file, and"
        remedy = f"Restore the file from a backup. {without} read all landing files again: {again}"
    elif table.startswith("ops"):
        remedy = f"Restore the file from a backup, or delete {path}: it is made again"
    else:
        remedy = (
            f"Restore the file from a backup, or delete {path}: the next run rebuilds the table"
        )
    return f"{what}. {remedy}. The engine reported: {engine or _line(error)}"


AGAIN = (
    "The published tables are as their last commits left them. Run it again; if it fails again, "
    "report it with what follows"
)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
