"""The log's columns to ours, where the source file computes: expressions, `keep` and `[bots]`.

DuckDB evaluates whole Arrow batches. Each expression is in TRY({'v': …}): a line for which it
fails gives null in place of the struct, and the other lines what they give, without a second pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.errors import SourceError
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.records import expressions
from jobs.records.explode import Exploding
from jobs.records.expressions import Computing, Expression, quoted
from jobs.records.records import IDS, RECORD_SCHEMA, Batches, FileFacts, Format, Unusable

WHOLE = "[+-]?[0-9]+"
FAILED = {"value": "bad_value", "tie_break": "bad_tie_break", "event_type": "bad_expression",
          "source_session_id": "bad_expression", "exposed_with": "bad_expression"}  # fmt: skip
"""The reason for a line for which the expression of a column fails. (What else fails is null, and has
a reason of its own.)"""
NOTHING = " "
"""A column for DuckDB, which takes no table without one."""
BOT_LIST = "crawler-user-agents"


def evaluated(
    fmt: Format, batches: Iterable[pa.RecordBatch], facts: FileFacts
) -> Iterator[pa.RecordBatch]:
    """The records of one file with what the source file computes of them.

    Raises:
        Unusable: an expression does not fit the file's columns.
    """
    if fmt.computing is None:
        yield from batches
        return
    exploding = None
    if fmt.computing.explode is not None and not fmt.has_types:
        exploding = Exploding(fmt, facts)
    evaluate = Evaluating(fmt, facts)
    for batch in batches:
        for part in exploding(batch) if exploding else (batch,):
            yield evaluate(part)


@dataclass(frozen=True)
class Query:
    """Some expressions over the columns of `log`, in one statement.

    Its result has for each of them `v0`, `v1`, … and `f0`, `f1`, …: whether it fails.
    """

    names: tuple[str, ...]
    sql: str


class Evaluating:
    """The expressions of one file."""

    def __init__(self, fmt: Format, facts: FileFacts) -> None:
        assert fmt.computing is not None
        self.fmt, self.facts, self.computing = fmt, facts, fmt.computing
        self.batches = Batches(fmt, facts.file, facts)
        self.inputs = fmt.computing.inputs()
        self.bots = bots_of(fmt.computing.patterns) if fmt.computing.user_agent else None
        self.schema: pa.Schema | None = None
        self.kinds: dict[str, str] = {}
        self.queries: list[Query] = []

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = [batch.column(name) for name in self.inputs] or [pa.nulls(batch.num_rows)]
        rows = pa.table(columns, names=list(self.inputs.values()) or [NOTHING])
        if rows.schema != self.schema:
            self.prepare(rows.schema)
        made = dict(zip(batch.schema.names, batch.columns, strict=True))
        lost = pc.equal(batch["kind"], "unparsable")
        kept = pa.repeat(True, batch.num_rows)
        for name, values, failed in self.results(rows):
            if name == "keep":
                kept = values
                self.count_unjudged(batch, failed, lost)
            else:
                self.put(made, name, values, failed)
        bots = pc.if_else(self.of_bots(rows, batch.num_rows), "bot", None)
        nothing = pa.nulls(batch.num_rows, pa.string())
        flags = self.computing.flags
        filtered = pc.if_else(pc.invert(kept), "keep", nothing if flags else bots)
        made["filtered"] = pc.if_else(lost, None, filtered)
        made["flag"] = bots if flags else nothing
        made["kind"] = pc.if_else(lost, "unparsable", made["kind"])
        if self.fmt.hashes and not self.fmt.has_types:
            said = {name: batch.column(name) for name in self.fmt.wanted}
            known = without_user(self.fmt, said, batch.num_rows)
            # (Whose the others are is looked for in their text; it is not kept.)
            made["raw"] = pc.if_else(lost, batch["raw"], known)
        return pa.RecordBatch.from_arrays(
            [made[one.name].cast(one.type) for one in RECORD_SCHEMA], schema=RECORD_SCHEMA
        )

    def prepare(self, schema: pa.Schema) -> None:
        """Bind the expressions to these columns.

        Raises:
            Unusable: they do not fit.
        """
        typed = typed_schema(self.computing, schema)
        try:
            self.kinds = expressions.check(self.computing, typed)
        except SourceError as error:
            raise Unusable(f"{self.facts.file}: {error}") from None
        self.schema = schema
        groups = (IDS, tuple(name for name in self.computing.fields if name not in IDS))
        self.queries = []
        for at, group in enumerate(groups):
            chosen = {n: one for n, one in self.computing.fields.items() if n in group}
            nulls = self.fmt.null_ids if at == 0 else frozenset[str]()
            if at and self.computing.keep is not None:
                chosen["keep"] = self.computing.keep
            if chosen:
                self.queries.append(query(self.computing, chosen, self.kinds, schema, nulls))

    def results(self, rows: pa.Table) -> Iterator[tuple[str, pa.Array, pa.Array]]:
        """Each expression's name, values, and whether it fails, line by line."""
        con = expressions.shared()
        for one in self.queries:
            con.register("log", rows)
            try:
                found = con.sql(one.sql).to_arrow_table().combine_chunks()
            finally:
                con.unregister("log")
            if found.num_rows != rows.num_rows:
                raise AssertionError(f"{found.num_rows} results of {rows.num_rows} lines")
            for at, name in enumerate(one.names):
                values, failed = (_array(found[f"{kind}{at}"]) for kind in "vf")
                yield name, values, failed

    def put(self, made: dict[str, pa.Array], name: str, values: pa.Array, failed: pa.Array) -> None:
        """A column of ours, as an expression gives it."""
        if name == "exposed_with":
            made[name] = pa.array(
                [self.batches.list_of(one) for one in values.to_pylist()], pa.list_(pa.string())
            )
        else:
            values = values.cast(pa.string())
            text = self.batches.without_nulls(name, values)
            if name in expressions.IDS:  # (a pattern that does not match gives empty text)
                text = pc.if_else(pc.equal(text, ""), None, text)
            made[name] = text
        if name == "event_ts":
            made["clock"] = pa.repeat(clock_of(self.kinds[name]), len(values)).cast(pa.string())
        if name in FAILED and pc.any(failed).as_py():
            before = made["kind"]
            first = pc.and_(failed, pc.equal(before, "record"))
            made["kind"] = pc.if_else(first, FAILED[name], before)

    def count_unjudged(self, batch: pa.RecordBatch, failed: pa.Array, lost: pa.Array) -> None:
        """Take note of lines of which `keep` cannot be computed."""
        at = pc.and_(failed, pc.invert(lost))
        number = pc.sum(at).as_py() or 0
        if number and not self.facts.unjudged:
            self.facts.first_unjudged = batch["line"].filter(at)[0].as_py()
        self.facts.unjudged += number

    def of_bots(self, rows: pa.Table, count: int) -> pa.Array:
        if self.bots is None:
            return pa.repeat(False, count)
        agents = _array(rows[self.computing.user_agent]).cast(pa.string()).dictionary_encode()
        are = [self.bots(one) for one in agents.dictionary.to_pylist()]
        return pc.fill_null(pa.array(are, pa.bool_()).take(agents.indices), False)


def without_user(fmt: Format, columns: dict[str, pa.Array], count: int) -> pa.Array:
    """The log's columns of each line as JSON, without those that the user's id is made of.

    Args:
        columns: by name, as `Format.wanted` names them.
    """
    assert fmt.computing is not None
    of_user = fmt.computing.fields.get("user_id")
    user = set(of_user.columns) if of_user else {fmt.wanted["user_id"]}
    left = {fmt.wanted[n]: one for n, one in columns.items() if fmt.wanted.get(n, None) not in user}
    return json_rows(pa.table(left) if left else pa.table({NOTHING: pa.nulls(count)}))


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def clock_of(kind: str) -> str | None:
    """The clock of times of a type of DuckDB's; null where they are texts or numbers."""
    if kind == "TIMESTAMP WITH TIME ZONE":
        return "utc"
    return "local" if kind.startswith("TIMESTAMP") or kind == "DATE" else None


def json_rows(rows: pa.Table) -> pa.Array:
    """Each row as a JSON object."""
    con = expressions.shared()
    con.register("log", rows)
    try:
        fields = ", ".join(f"{quoted(one)}: {quoted(one)}" for one in rows.column_names)
        found = con.sql(f"SELECT CAST(to_json({{{fields}}}) AS VARCHAR) AS v FROM log")
        return _array(found.to_arrow_table()["v"]).cast(pa.string())
    finally:
        con.unregister("log")


# -- statements -----------------------------------------------------------------------------------


TYPED = {
    "bigint": f"CASE WHEN regexp_full_match(trim({{c}}), '{WHOLE}') THEN TRY_CAST(trim({{c}}) AS BIGINT) END",
    "double": "TRY_CAST(trim({c}) AS DOUBLE)",
    "boolean": "TRY_CAST(trim({c}) AS BOOLEAN)",
    "date": "TRY_CAST(trim({c}) AS DATE)",
    "timestamp": "TRY_CAST(trim({c}) AS TIMESTAMP)",
}


def typed_schema(computing: Computing, schema: pa.Schema) -> pa.Schema:
    """The columns as expressions see them: texts with a declared type have it."""
    types = dict(computing.types)
    return pa.schema(
        [
            (one.name, expressions.ARROW[types[one.name]] if _declared(types, one) else one.type)
            for one in schema
        ]
    )


def _declared(types: dict[str, str], column: pa.Field) -> bool:
    return column.name in types and pa.types.is_string(column.type)


def query(
    computing: Computing,
    chosen: dict[str, Expression],
    kinds: dict[str, str],
    schema: pa.Schema,
    null_ids: frozenset[str],
) -> Query:
    """One statement for some expressions.

    Args:
        kinds: the type of each expression's result, by our column's name.
        null_ids: texts that mean nothing in columns of text, beside `null_values`.
    """
    types = dict(computing.types)
    columns, bad = [], {}
    for one in schema:
        name = quoted(one.name)
        if _declared(types, one):
            typed, flag = TYPED[types[one.name]].format(c=name), quoted(f"{one.name}\x1f")
            bad[one.name] = flag
            columns += [f"{typed} AS {name}", f"{name} IS NOT NULL AND ({typed}) IS NULL AS {flag}"]
        elif null_ids and pa.types.is_string(one.type):
            texts = ", ".join("'" + text.replace("'", "''") + "'" for text in sorted(null_ids))
            columns.append(f"CASE WHEN {name} NOT IN ({texts}) THEN {name} END AS {name}")
        else:
            columns.append(name)
    tried, told = [], []
    for at, (ours, expression) in enumerate(chosen.items()):
        value = converted(ours, f"({expression.bound}\n)", kinds.get(ours, "BOOLEAN"))
        flags = [bad[name] for name in expression.columns if name in bad]
        flags = [] if ours == BOUNDARY_VALUES else flags  # (of many columns, one is null then)
        fails = " OR ".join([f"e{at} IS NULL", *(f"({flag})" for flag in flags)])
        # (Of a line on whose condition nothing can be said, nothing is: it is kept.)
        result = f"coalesce(e{at}.v, true)" if ours == "keep" else f"e{at}.v"
        result = f"CASE WHEN {fails} THEN {'true' if ours == 'keep' else 'NULL'} ELSE {result} END"
        tried.append(f"TRY({{'v': {value}}}) AS e{at}")
        told += [f"{result} AS v{at}", f"({fails}) AS f{at}"]
    kept = ", ".join(bad.values())
    inner = f"SELECT {', '.join(columns) or '1'} FROM log"
    middle = f"SELECT {', '.join(tried)}{', ' * bool(kept)}{kept} FROM ({inner})"
    return Query(tuple(chosen), f"SELECT {', '.join(told)} FROM ({middle})")


def converted(ours: str, value: str, kind: str) -> str:
    """An expression's value as the text that typing reads."""
    if ours == "keep":
        return value
    if kind == "JSON":
        return f"({value} ->> '$')"
    if ours == "event_ts" and clock_of(kind) is not None:
        moment = (
            f"CAST({value} AS TIMESTAMPTZ)"
            if clock_of(kind) == "utc"
            else f"CAST({value} AS TIMESTAMP)"
        )
        return f"CAST(epoch_us({moment}) AS VARCHAR)"
    if ours == "exposed_with" and kind != "VARCHAR":
        return f"CAST({value} AS VARCHAR[])"
    if ours in ("value", "tie_break") and kind == "BOOLEAN":
        return f"CAST(CAST({value} AS TINYINT) AS VARCHAR)"
    return f"CAST({value} AS VARCHAR)"


# -- bots -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bots:
    """Which user agents are programs'."""

    patterns: tuple[re.Pattern[str], ...]

    def __call__(self, agent: str | None) -> bool:
        return agent is not None and _is_bot(self, agent)


@lru_cache(65_536)
def _is_bot(bots: Bots, agent: str) -> bool:
    import crawleruseragents

    if crawleruseragents.is_crawler(agent):
        return True
    return any(one.search(agent) for one in bots.patterns)


def bots_of(patterns: Iterable[str]) -> Bots:
    return Bots(tuple(map(re.compile, patterns)))


def bot_list() -> str:
    """The list of bots, with its version."""
    from importlib.metadata import version

    return f"{BOT_LIST} {version(BOT_LIST)}"
