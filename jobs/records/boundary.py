"""A boundary between two neighbouring events by an SQL expression: `sessions.boundary`.

The dialect, and what is refused, is that of the source file's other expressions. `prev.x` and
`next.x` are columns of an event and of the one after it in the total order. Columns that are ours
are read from the tables; the log's other columns are stored with each event as one JSON text
(`VALUES`), because events that come late are cut together with stored ones.

The expression is evaluated by DuckDB, for what cuts and for what audits alike: it has no rendering
in Spark SQL, whose functions of one name give other results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.core.arrow_types import arrow_schema
from jobs.core.source_file import Source
from jobs.core.source_rules import BOUNDARY_VALUES, SIDES
from jobs.core.tables import EVENTS
from jobs.records import expressions
from jobs.records.evaluate import TYPED
from jobs.records.expressions import Computing, Expression, mistake, nearest, quoted

FIELD = "sessions.boundary"
VALUES = BOUNDARY_VALUES
STEP = 1_000_000
"""So many pairs are asked of together."""


@dataclass(frozen=True)
class Boundary:
    """The expression; plain values, sent to the workers.

    Args:
        expression: its columns are `prev.x` and `next.x`.
        ours: columns of ours that it reads, of either side.
        log: the log's columns that it reads, with their declared types (empty: text).
    """

    expression: Expression
    ours: tuple[str, ...]
    log: tuple[tuple[str, str], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of events that `opens` reads."""
        return (*self.ours, *self.stored)

    @property
    def stored(self) -> tuple[str, ...]:
        """The column of the values of the log's columns, if it reads any."""
        return (VALUES,) if self.log else ()

    def opens(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> NDArray[np.bool_]:
        """bool[N]: whether the second event of each pair opens a session. Where the expression is
        null, or cannot be computed, it does not.

        Args:
            before, after: `columns` of both, as Arrow arrays by name.
        """
        pairs = self.inputs(before, after)
        found = np.zeros(pairs.num_rows, bool)
        con = expressions.shared()
        for low in range(0, pairs.num_rows, STEP):
            con.register("log", pairs.slice(low, STEP))
            try:
                said = con.sql(self.query).to_arrow_table()["v"].combine_chunks()
            finally:
                con.unregister("log")
            found[low : low + len(said)] = said.to_numpy(zero_copy_only=False)
        return found

    def inputs(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> pa.Table:
        sides = zip(SIDES, (before, after), strict=True)
        return pa.table({f"{side}.{n}": has[n] for side, has in sides for n in self.columns})

    @property
    def query(self) -> str:
        return (
            f"SELECT coalesce(e.v, false) AS v FROM (SELECT TRY({{'v': ({self.expression.bound}\n)}}) "
            f"AS e FROM ({self.named()}))"
        )

    def named(self) -> str:
        """SQL: the columns of the expression, of `inputs`."""
        own = [quoted(f"{side}.{name}") for side in SIDES for name in self.ours]
        for side in SIDES:
            for name, kind in self.log:
                key = "/" + name.replace("~", "~0").replace("/", "~1").replace("'", "''")
                text = f"({quoted(f'{side}.{VALUES}')} ->> '{key}')"
                typed = TYPED[kind].format(c=text) if kind else text
                own.append(f"{typed} AS {quoted(f'{side}.{name}')}")
        return f"SELECT {', '.join(own)} FROM log"


def boundary_of(source: Source) -> Boundary | None:
    """The boundary of a source file; None: there is none.

    Raises:
        SourceError: it cannot be used.
    """
    sql = source.sessions.boundary
    if sql is None:
        return None
    one = expressions.parsed(FIELD, sql)
    named = dict.fromkeys(_column(one, name) for name in one.columns)
    if not named:
        raise mistake(FIELD, sql, "it names no column of prev or next, such as prev.event_type")
    known: dict[str, str] = {}
    for name in named:
        if known.setdefault(name.lower(), name) != name:
            raise mistake(
                FIELD,
                sql,
                f"the columns {known[name.lower()]!r} and {name!r} differ in upper and lower "
                "case only, and SQL does not distinguish them: use one of them",
            )
    ours = source.boundary_columns()
    log = [(name, source.source.types.get(name, "")) for name in named if name not in ours]
    made = Boundary(one, tuple(name for name in named if name in ours), tuple(log))
    _refuse_persons(source, made)
    _check(made)
    return made


def _column(one: Expression, name: str) -> str:
    """The column of an event that `prev.x` or `next.x` names.

    Raises:
        SourceError: it names none.
    """
    side, _, column = name.partition(".")
    if side in SIDES and column:
        return column
    near = nearest(side, SIDES)
    hint = (
        f"did you mean {near}.{column}?" if near and column else f"write prev.{name} or next.{name}"
    )
    place = one.sql.find(name)
    at = len(one.sql[:place].encode()) if place >= 0 else None
    raise mistake(FIELD, one.sql, f"{name!r} is not a column of the events: {hint}", at)


def _refuse_persons(source: Source, made: Boundary) -> None:
    """Raises: SourceError: ids that are hashed would be stored as they are."""
    if not source.privacy.hash_user_id:
        return
    named = source.named()
    ids = {named[name] for name in ("user_id", "anonymous_id") if name in named}
    for name, sql in source.columns.expressions().items():
        if name == "user_id":
            ids |= set(expressions.parsed("columns.user_id.sql", sql).columns)
    for name, _ in made.log:
        if name in ids:
            raise mistake(
                FIELD,
                made.expression.sql,
                f"{name!r} says who the user is. It would be stored as it is, although "
                "privacy.hash_user_id = true: name other columns",
            )


def _check(made: Boundary) -> None:
    """Raises: SourceError: the expression does not fit its columns, or is no condition."""
    kinds = {name: EVENTS.columns[name] for name in made.ours}
    kinds |= {name: kind or "string" for name, kind in made.log}
    columns = {f"{side}.{name}": kind for side in SIDES for name, kind in kinds.items()}
    naive = {f"{side}.{name}" for side in SIDES for name, kind in made.log if kind == "timestamp"}
    schema = pa.schema(
        [
            (one.name, pa.timestamp("us") if one.name in naive else one.type)
            for one in arrow_schema(columns)
        ]
    )
    con = expressions.shared()
    con.register("log", schema.empty_table())
    try:
        kind = expressions.kind_of(con, made.expression)
    finally:
        con.unregister("log")
    if kind != "BOOLEAN":
        raise mistake(
            FIELD,
            made.expression.sql,
            f"it gives {kind}, and must be a condition: true where a session begins at next",
        )


def with_boundary(computing: Computing | None, source: Source) -> Computing | None:
    """What a source file computes of each line: the values that its boundary reads, too.

    Raises:
        SourceError: the boundary cannot be used.
    """
    made = boundary_of(source)
    if made is None or not made.log:
        return computing
    assert computing is not None  # (`Source.computes`)
    names = tuple(name for name, _ in made.log)
    texts = [f"CAST({quoted(name)} AS VARCHAR)" for name in names]
    keys = ["'" + name.replace("'", "''") + "'" for name in names]
    pairs = ", ".join(f"{key}: {text}" for key, text in zip(keys, texts, strict=True))
    bound = (
        f"CASE WHEN coalesce({', '.join(texts)}) IS NOT NULL "
        f"THEN CAST(to_json({{{pairs}}}) AS VARCHAR) END"
    )
    values = Expression(FIELD, made.expression.sql, names, bound)
    return replace(computing, fields=computing.fields | {VALUES: values})
