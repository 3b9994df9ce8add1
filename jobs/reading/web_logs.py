"""Access logs of web servers: lines of Apache's and nginx's combined forms."""

from __future__ import annotations

import re
from typing import Any

from jobs.core.source_log import LOG_COLUMNS
from jobs.records.records import FileFacts, Format, Unusable

REQUEST_ON = (
    r' \S+ (\S.*?) \[([^\]]+)\] "(?:([A-Z]+) (.*?)(?: HTTP/[\d.]+)?|[^"]*)" (\d{3}) (\d+|-)'
    r'(?: "((?:[^"\\]|\\.)*)" "((?:[^"\\]|\\.)*)")?\s*$'
)
LINES = {
    "combined_log": re.compile(rf"^(\S+){REQUEST_ON}"),
    "vhost_combined": re.compile(rf"^([^\s:]+|\[[^\]\s]+\])(?::(\d+))? (\S+){REQUEST_ON}"),
}
ADDRESS = r"(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f.]{0,15}){2,8})"
SERVER_FIRST = re.compile(
    rf"^(?:(?:[^\s:]+|\[[^\]\s]+\]):\d{{1,5}} \S+|\S+ {ADDRESS}) \S+ \S.*? \["
)
"""A server's name with its port before the client, or any name before an address. (A client has no
port, and nobody's identity, which is the second field of a combined log, is an address.)"""


def looks_like_vhost(line: str) -> bool:
    """Whether a line has the name of the server before the client, as in vhost_combined."""
    return bool(SERVER_FIRST.match(line))


def log_values(fmt: Format, line: str, facts: FileFacts) -> dict[str, Any] | None:
    """The mapped columns of one line; '-' means nothing.

    Raises:
        Unusable: the file's first line is of the other form: all clients would be the server.
    """
    other = fmt.format == "combined_log" and looks_like_vhost(line)
    if other and facts.lines == 1:
        raise Unusable(
            f"{facts.file} is not a combined_log: it looks like vhost_combined, whose lines begin "
            f"with the server's name: {line[:120]!r}. Set source.format = 'vhost_combined'"
        )
    found = None if other else LINES[fmt.format].match(line)
    if found is None:
        return None
    parts = dict(zip(LOG_COLUMNS[fmt.format], found.groups(), strict=True))
    return {
        ours: None if parts[theirs] == "-" else parts[theirs] for ours, theirs in fmt.mapped.items()
    }
