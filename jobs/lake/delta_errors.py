"""The many errors of Delta and delta-rs, as our few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs.core.errors import Conflict, SessionmillError
from jobs.core.tables import Table


class FeedGone(SessionmillError):
    """The change data feed no longer reaches back far enough: rebuild from the whole table."""


GONE = (
    "DELTA_MISSING_CHANGE_DATA", "DELTA_MISSING_FILES", "DELTA_VERSION_NOT_FOUND",
    "DELTA_FILE_NOT_FOUND", "DELTA_TRUNCATED_TRANSACTION_LOG", "DELTA_LOG_FILE_NOT_FOUND",
    "DELTA_CHANGE_DATA_FILE_NOT_FOUND", "FILE_NOT_EXIST", "FileNotFoundException",
    "VersionNotFoundException", "is out of range", "Cannot time travel",
    "not found", "No such file", "Invalid table version", "Invalid version",  # delta-rs's
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


@contextmanager
def conflicts(table: Table) -> Iterator[None]:
    """Delta's many conflict errors as our one."""
    try:
        yield
    except Exception as error:
        if any(word in f"{type(error).__name__} {error}"[:600] for word in CONFLICTS):
            raise Conflict(f"{table.full_name} was changed by another run meanwhile") from error
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
