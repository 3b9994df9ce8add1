"""What a table's log says of its commits: which moved rows, and whose they are.

Decision 6 in docs/design/decisions.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from jobs.lake import filesystem

RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Commit:
    """One version of a table, as its log tells it."""

    version: int
    moves: bool = True
    """Whether it adds or removes rows: by the protocol, an action that only arranges rows anew
    (OPTIMIZE) says `dataChange = false`. A commit whose file is gone may have moved any."""
    operation: str | None = None
    """None: the commit does not say, or its file is gone."""
    parameters: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    """The run of ours that made it; None: it is not ours."""
    who: str = "an unknown writer"
    time: datetime | None = None
    gone: bool = False
    """Whether the log was cleaned up and no longer has it."""

    def in_words(self) -> str:
        """`version 7 (RESTORE by Apache-Spark/4.1.0, 2026-11-28 23:10 UTC)`"""
        if self.gone:
            return f"version {self.version} (its log file is gone)"
        when = f", {self.time:%Y-%m-%d %H:%M} UTC" if self.time else ""
        return (
            f"version {self.version} ({self.operation or 'no operation given'} by {self.who}{when})"
        )


def commits(path: str, after: int, upto: int) -> Iterator[Commit]:
    """The commits of a table in (after, upto], oldest first.

    Args:
        path: the table's folder or URI.
    """
    for version in range(after + 1, upto + 1):
        file = f"{path}/_delta_log/{version:020}.json"
        if filesystem.exists(file):
            yield _commit(version, filesystem.read_text(file))
        else:
            yield Commit(version, gone=True)


def _commit(version: int, text: str) -> Commit:
    info: dict[str, Any] = {}
    moves = False
    for line in text.splitlines():
        action = json.loads(line) if line.strip() else {}
        info = action.get("commitInfo") or info
        for kind in ("add", "remove"):
            moves = moves or bool(action.get(kind, {}).get("dataChange", kind in action))
    operation = info.get("operation")
    said = info.get("userMetadata")
    # (A RESTORE is nobody's run, whatever a session that made it goes on to say.)
    ours = isinstance(said, str) and RUN_ID.fullmatch(said) and operation != "RESTORE"
    names = [info.get("userName"), info.get("engineInfo") or info.get("clientVersion")]
    stamp = info.get("timestamp")
    return Commit(
        version=version,
        moves=moves,
        operation=operation,
        parameters=info.get("operationParameters") or {},
        run_id=said if ours else None,
        who=" with ".join(str(one) for one in names if one) or "an unknown writer",
        time=datetime.fromtimestamp(stamp / 1000, UTC) if isinstance(stamp, int) else None,
    )
