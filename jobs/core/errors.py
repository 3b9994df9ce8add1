"""What can go wrong, as a tree. Every message names the thing, the value and the fix.

SessionmillError
├── SettingsError     the environment says something that cannot be
├── SourceError       a source file says something that cannot be
├── SchemaError       a landing file is not what the source file promised
├── RejectShareError  more lines unusable than the source's policy allows
├── AuditFailed       a suite found rows that break an invariant: the table stays as it was
├── AuditErrored      a suite could not be evaluated: nothing is known about the rows
├── RuleChanged       the table was made by another session rule
├── TableLost         others put older or other rows in place of a table of the log
├── InputChanged      others changed a derived table that is about to be read
└── Conflict          another run changed the table in the meantime
"""

from __future__ import annotations

import re


class SessionmillError(Exception):
    """Base of every error that a person caused or can mend; printed without a traceback."""


class SettingsError(SessionmillError):
    pass


class SourceError(SessionmillError):
    pass


class SchemaError(SessionmillError):
    pass


class RejectShareError(SessionmillError):
    pass


class AuditFailed(SessionmillError):
    pass


class AuditErrored(SessionmillError):
    pass


class RuleChanged(SessionmillError):
    pass


class TableLost(SessionmillError):
    pass


class InputChanged(SessionmillError):
    """`job` makes the table anew."""

    def __init__(self, said: str, job: str) -> None:
        super().__init__(said)
        self.job = job


class Conflict(SessionmillError):
    pass


def counted(number: int, noun: str) -> str:
    """A number with what it counts: "1 new event", "2,400 new events"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


CAUSE = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)\b.*$", re.MULTILINE)


def of_engine(error: BaseException) -> str | None:
    """What an error of Spark's says, in one line of at most 300 characters; None: it is not Spark's.

    Of an exception in a Python worker that is the last line of the worker's traceback.
    """
    if not type(error).__module__.startswith(("pyspark.", "py4j.")):
        return None
    said = str(error).partition("JVM stacktrace:")[0].strip()
    causes = CAUSE.findall(said) or said.splitlines() or [type(error).__name__]
    return str(causes[-1] if "Traceback" in said else causes[0])[:300]
