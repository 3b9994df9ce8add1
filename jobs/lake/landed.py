"""Which files lie in a landing."""

from __future__ import annotations

import os
import re
from datetime import date

from jobs.core.errors import SourceError
from jobs.core.landing_globs import landing_patterns
from jobs.lake import filesystem

NO_LOG = re.compile(
    r"""
    .*\.(tmp|temp|part|partial|inprogress|in-progress|crdownload|swp|bak|lock)  # being written
    | .*~
    | .*\.(crc|md5|sha1|sha224|sha256|sha384|sha512|asc|sig)      # of another file
    | (md5|sha1|sha224|sha256|sha384|sha512)sums?(\.txt)?
    | checksums?(\.(txt|md5|sha1|sha256|sha512))?
    | (readme|licen[cs]e|changelog)(\.(md|txt|rst|html?))?
    | thumbs\.db | desktop\.ini
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Names of files that lie beside logs. (Those that begin with `_` or `.` are left out as well:
`_SUCCESS`, `_temporary`.)"""


def absolute(landing: str) -> str:
    """A landing pattern as a URI, or from the root of the file system; `~` is this user's home."""
    return landing if "://" in landing else os.path.abspath(os.path.expanduser(landing))


def landed(
    landing: str,
    day: date | None = None,
    lateness_days: int = 0,
    skipped: list[str] | None = None,
) -> list[tuple[str, int, int]]:
    """Files of a landing: (path, bytes, modified ms), sorted; the days are `landing_patterns`'s.

    What is hidden, still being written, or no log by its name is left out, unless the pattern
    itself names it, or its ending.

    Args:
        skipped: gets what is left out.
    """
    patterns = landing_patterns(absolute(landing), day, lateness_days)
    found: dict[str, tuple[str, int, int]] = {}
    for pattern in patterns:
        for file in filesystem.glob(pattern, skipped):
            if _is_no_log(file[0], pattern):
                if skipped is not None:
                    skipped.append(file[0])
            else:
                found[file[0]] = file
    return sorted(found.values())


def _is_no_log(path: str, pattern: str) -> bool:
    name, asked = path.rpartition("/")[2], pattern.rpartition("/")[2]
    if not NO_LOG.fullmatch(name) or name == asked:
        return False
    ending = re.search(r"\.[A-Za-z0-9-]+$", asked)
    return ending is None or not name.endswith(ending[0])


MOST_FOLDERS = 100
"""So many folders are asked whether they are a table's: on an object store each costs requests."""
TABLES = {"_delta_log": "Delta table", ".hoodie": "Hudi table"}
WAYS_OUT = {
    "Delta table": "set source.format = 'delta' and source.landing to this folder",
    "Iceberg table": "set source.format = 'iceberg' and source.landing to this folder",
    "Hudi table": "have its rows exported as Parquet, or converted to a Delta table",
}


def refuse_tables(landing: str, paths: list[str]) -> None:
    """A table's files are not the table: some of them are of older versions, and rows in others are
    deleted.

    Args:
        paths: files that the landing matches.

    Raises:
        SourceError: they lie in the folder of a table.
    """
    folders: dict[str, None] = {}
    for path in paths:
        place = path.rpartition("/")[0]
        while place and place not in folders and not place.endswith(":/"):
            folders[place] = None
            place = place.rpartition("/")[0]
    # (Folders of partitions are no roots; and a table is found by the uppermost folders.)
    roots = [one for one in folders if "=" not in one.rpartition("/")[2]]
    for folder in sorted(roots, key=lambda one: one.count("/"))[:MOST_FOLDERS]:
        if kind := _table_in(folder):
            raise SourceError(
                f"source.landing = {landing!r} has files of the {kind} {folder}, which are not its "
                f"rows: some are of older versions, and deleted rows stay in them. "
                f"{WAYS_OUT[kind].capitalize()}"
            )


def _table_in(folder: str) -> str | None:
    for name, kind in TABLES.items():
        if filesystem.exists(f"{folder}/{name}"):
            return kind
    if filesystem.glob(f"{folder}/metadata/*.metadata.json"):
        return "Iceberg table"
    return None
