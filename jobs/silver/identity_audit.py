"""The audits of `silver.identities` and `silver.events`, over the rows that a run is about to publish.

DuckDB evaluates the texts of `expectations/identities.py`; rows that break a check are named by Spark, in
the suite's own words.
"""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa

from expectations.identities import AGAINST_LOGINS, BROKEN_LINKS, WRONG_PERSONS
from jobs.audit import suite
from jobs.core.tables import EVENTS, IDENTITIES, PERSON_EVENTS
from jobs.lake.change_feed import RETIRED
from jobs.lake.context import Context
from jobs.lake.tasks import run
from jobs.silver import person_files


def of_links(context: Context, given: pa.Table, logins: pa.Table) -> None:
    """Audit links, all of some anonymous ids.

    Args:
        logins: those that they follow from, as `links.SPANS`.

    Raises:
        AuditFailed, AuditErrored.
    """
    ends = [
        logins.select(["anonymous_id", "user_id", name]).rename_columns(
            ["anonymous_id", "user_id", "us"]
        )
        for name in ("since", "until")
    ]
    with duckdb.connect(config={"threads": 1}) as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("identities", given)
        db.register("ends", pa.concat_tables(ends))
        db.execute(
            "CREATE VIEW logins AS SELECT anonymous_id, user_id, "
            "timezone('UTC', make_timestamp(us)) AS login_ts FROM ends"
        )
        facts = {
            "links_follow": _none(db, BROKEN_LINKS),
            "links_are_the_logins": _none(db, AGAINST_LOGINS[against(context)]),
        }
        checks = suite.suite(context, IDENTITIES)
        whole = all(_none(db, broken_rows(one, "identities")) for one in checks if _of_rows(one))
    if whole:
        suite.audit_certified(context, IDENTITIES, given.num_rows, facts)
        return
    engine = context.thresholds.spark(given.num_rows)
    rows = context.enter(engine).createDataFrame(given, IDENTITIES.ddl)
    suite.audit_candidate(context, IDENTITIES, rows, facts, engine)


def against(context: Context) -> str:
    """By which statement links are compared with logins."""
    who = context.source.identity
    return "first" if who is not None and who.link == "first" else "last"


def of_events(
    context: Context, paths: list[str], links: str, number: int, balance: tuple[int, int]
) -> None:
    """Audit rows of `silver.events`.

    Args:
        paths: the files of the rows; of a candidate with `change`.
        links: a file: all links that may concern them; number: how many rows there are.
        balance: how many rows the table will have, and how many `bronze.events` has.

    Raises:
        AuditFailed, AuditErrored.
    """
    checks = [one for one in suite.suite(context, PERSON_EVENTS) if _of_rows(one)]
    task = Held(links, tuple(broken_rows(one, "events") for one in checks))
    limits = context.thresholds
    done = run(context.tasks(limits.tasks(number)), task, paths, HELD_DDL, "string")
    facts = {
        "persons_are_theirs": not any(one["wrong"] for one in done),
        "people_balance": balance[0] == balance[1],
    }
    if not any(one["broken"] for one in done):
        suite.audit_certified(context, PERSON_EVENTS, number, facts)
        return
    engine = limits.spark(number, context.lake.rows(EVENTS))
    rows = context.enter(engine).read.option("mergeSchema", "true").parquet(*paths)
    if "change" in rows.columns:
        rows = rows.where(f"change <> '{RETIRED}'")
    suite.audit_candidate(
        context, PERSON_EVENTS, rows.select(*PERSON_EVENTS.columns), facts, engine
    )


HELD_DDL = "wrong bigint, broken bigint"


class Held:
    """A task: how many rows of a file of `silver.events`, or of a candidate, have not the person that
    links name, and how many break a check of rows. (DuckDB joins and compares times, where
    `links.linked` searches.)"""

    def __init__(self, links: str, broken: tuple[str, ...]) -> None:
        self.links, self.broken = links, broken

    def __call__(self, path: str) -> list[dict[str, Any]]:
        return [person_files.counted(path, self.links, WRONG_PERSONS, self.broken)]


def _of_rows(check: Any) -> bool:
    return bool(check.condition or check.unique)


def broken_rows(check: Any, table: str) -> str:
    """SQL: the rows that break a check."""
    if check.unique:
        columns = ", ".join(check.unique)
        return f"SELECT {columns} FROM {table} GROUP BY {columns} HAVING count(*) > 1"
    return f"SELECT 1 FROM {table} WHERE NOT ({check.condition})"


def _none(db: duckdb.DuckDBPyConnection, query: str) -> bool:
    return db.execute(f"SELECT * FROM ({query}) LIMIT 1").fetchone() is None
