"""What tests of logs that are tables of a database share."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.airflow_tools import local

TOML = """
[source]
name = "clicks"
landing = "{landing}"
format = "jdbc"

[jdbc]
url = "sqlite:///{database}"
table = "events"
incremental_column = "id"

[columns]
user_id = "user"
item_id = "item"
event_ts = "at"
"""


class Shop:
    """A database of SQLite with a table `events`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "shop.db"
        self.db = sqlite3.connect(self.path)
        self.run('CREATE TABLE events (id INTEGER, "user" TEXT, item TEXT, at TEXT)')

    def run(self, statement: str, rows: Any = ((),)) -> None:
        with self.db:
            self.db.executemany(statement, rows)

    def sell(self, *ids: int, user: str | None = "ann") -> None:
        rows = [(one, user, f"i{one}", f"2024-06-01T10:00:{one:02}Z") for one in ids]
        self.run("INSERT INTO events VALUES (?, ?, ?, ?)", rows)

    def toml(self, **keys: Any) -> str:
        """A source file with keys of [jdbc] in place of others; None: without the key."""
        made = TOML.replace("{database}", str(self.path))
        for key, value in keys.items():
            lines = [one for one in made.splitlines() if not one.startswith(f"{key} = ")]
            said = [] if value is None else [f"{key} = {value!r}"]
            at = lines.index("[jdbc]") + 1
            made = "\n".join([*lines[:at], *said, *lines[at:]]) + "\n"
        return made


def launched(server: Any, state: Path, port: int) -> str:
    """Start a PostgreSQL of this machine's own; its URL with the password."""
    server.create(state)
    how = server.command(state, port)
    local().launch(state, "postgres", how.pop("args"), dict(os.environ), **how)
    url = str(server.own_url(state, port))
    deadline = time.monotonic() + 60
    while not server.is_up(url):
        assert time.monotonic() < deadline, (state / "logs" / "postgres.log").read_text()
        time.sleep(0.1)
    return url


@contextmanager
def postgres_of_our_own(state: Path) -> Iterator[str]:
    """The URL of a server that is there for a test; skips where there is no PostgreSQL."""
    import pytest

    local()
    import postgres  # (infra/airflow is on the path, now)

    try:
        postgres.binary("initdb")
    except postgres.NoPostgres as error:
        pytest.skip(str(error))
    try:
        yield launched(postgres, state, local().free_port())
    finally:
        local().stop(state)
        postgres.remove(state)
