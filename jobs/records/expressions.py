"""SQL expressions of a source file: parsed, checked, and what a format carries of them.

The dialect is DuckDB's. Expressions see one record each: no other table, no aggregate, nothing that
differs from run to run (the clock, chance, settings), no file and no network. They are checked by
DuckDB's own parser before anything is read, and by its binder as soon as the columns are known.

Decision 9 in docs/design/decisions.md.
"""

from __future__ import annotations

import difflib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.core.errors import SourceError
from jobs.core.source_events import NUMERIC_UNITS
from jobs.core.source_file import Source
from jobs.core.source_log import COMBINED_LOG_NUMBERS, LOG_COLUMNS
from jobs.records.paths import root

if TYPE_CHECKING:
    import duckdb  # (not needed where nothing is computed)

CLOCKS = {
    "current_catalog", "current_date", "current_role", "current_schema", "current_time",
    "current_timestamp", "current_user", "localtime", "localtimestamp", "session_user",
}  # fmt: skip
"""Words that SQL reads without parentheses, and that differ from run to run."""
STATES = {"version", "today", "now", "get_current_time", "get_current_timestamp", "getenv"}
"""Functions of the machine and the moment that DuckDB may call consistent, or may not have."""
POSITION = "_position"
"""The column that has an element's place in its list, from 1."""
OF_LINE = "_line."
"""Before the name of a column of the line that its elements have, too."""
FIELD = "source.explode:"
HEAD = "SELECT (\n"
"""Before an expression; a comment at its end does not swallow what follows."""
WHOLE_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT",
                 "UINTEGER", "UBIGINT", "UHUGEINT", "BIGNUM")  # fmt: skip
FLOATS = ("FLOAT", "DOUBLE", "DECIMAL")
ARROW = {
    "bigint": pa.int64(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
"""Declared types of columns."""
IDS = ("user_id", "item_id", "event_id", "event_type", "source_session_id")
"""Our columns that are texts."""
CONFIG: dict[str, Any] = {
    "threads": 1,  # (a Spark task has one core)
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}


@dataclass(frozen=True)
class Expression:
    """One expression of a source file.

    Args:
        field: where it is, such as `columns.item_id`.
        sql: as it was written.
        columns: the log's columns that it reads, in the order in which they are named.
        bound: the expression with these columns as quoted names.
    """

    field: str
    sql: str
    columns: tuple[str, ...]
    bound: str


@dataclass(frozen=True)
class Explode:
    """How one line becomes many.

    Args:
        column: the log's column that is a list.
        separator: what separates the elements of a text; None: a text is a JSON array.
        pattern: of a text's elements; its named groups are columns.
    """

    column: str
    separator: str | None = None
    pattern: str | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(re.compile(self.pattern).groupindex) if self.pattern else ()


@dataclass(frozen=True)
class Names:
    """Where the columns of an exploded line are.

    Args:
        line: name -> column of the line.
        elements: name -> path inside the element; empty: the element itself.
        either: names in both, of which the file says which it is.
        positions: names of the element's place.
    """

    line: dict[str, str]
    elements: dict[str, str] = field(default_factory=dict)
    either: frozenset[str] = frozenset()
    positions: tuple[str, ...] = ()


def names_of(explode: Explode, wanted: dict[str, str]) -> Names:
    """Args: wanted: name -> the log's column, as the source file says."""
    line = {f"{FIELD}{explode.column}": explode.column}
    elements: dict[str, str] = {}
    either, positions = [], []
    for name, theirs in wanted.items():
        if theirs == POSITION:
            positions.append(name)
        elif theirs == explode.column:
            elements[name] = ""
        elif theirs.startswith(f"{explode.column}."):
            elements[name] = theirs[len(explode.column) + 1 :]
        elif theirs in explode.groups:
            elements[name] = theirs
        elif theirs.startswith(OF_LINE):
            line[name] = theirs.removeprefix(OF_LINE)
        else:
            line[name] = theirs
            if explode.separator is None:
                elements[name] = theirs
                either.append(name)
    return Names(line, elements, frozenset(either), tuple(positions))


@dataclass(frozen=True)
class Computing:
    """What happens to the log's columns before they are ours; plain values, sent to the workers.

    Args:
        fields: our column -> its expression.
        types: the log's column -> its type in expressions, of text formats.
        user_agent: the log's column that has it, where lines of bots are left out.
        patterns: own patterns of bots.
        flags: whether bots are flagged, not left out.
        units: those of `time.unit`.
    """

    fields: dict[str, Expression]
    keep: Expression | None = None
    types: tuple[tuple[str, str], ...] = ()
    user_agent: str | None = None
    patterns: tuple[str, ...] = ()
    flags: bool = False
    units: tuple[str, ...] = ("iso8601",)
    explode: Explode | None = None

    def expressions(self) -> list[Expression]:
        return [*self.fields.values(), *([self.keep] if self.keep else [])]

    def inputs(self) -> dict[str, str]:
        """`field:column` -> the log's column, of all columns that are read beside those that are
        ours: each once, under the first field that names it."""
        found: dict[str, str] = {}
        for one in self.expressions():
            for column in one.columns:
                found.setdefault(column, one.field)
        if self.user_agent is not None:
            found.setdefault(self.user_agent, "bots.user_agent")
        return {f"{field}:{column}": column for column, field in found.items()}


def computing_of(source: Source) -> Computing | None:
    """What a source file computes; None: nothing.

    Raises:
        SourceError: an expression cannot be used.
    """
    if not source.computes:
        return None
    one = source.source
    types: dict[str, str] = dict(one.types)
    if one.explode is not None:
        types.setdefault(POSITION, "bigint")
    if one.format in LOG_COLUMNS:
        types = dict.fromkeys(COMBINED_LOG_NUMBERS, "bigint") | types
    made = Computing(
        {
            ours: parsed(f"columns.{ours}.sql", sql)
            for ours, sql in source.columns.expressions().items()
        },
        None if one.keep is None else parsed("source.keep", one.keep),
        tuple(types.items()),
        None if source.agents is None else source.agents.user_agent,
        () if source.agents is None else tuple(source.agents.patterns),
        source.agents is not None and source.agents.policy == "flag",
        tuple(source.time.units),
        Explode(one.explode, one.explode_separator, one.explode_pattern) if one.explode else None,
    )
    known: dict[str, str] = {}
    for column in made.inputs().values():
        other = known.setdefault(column.lower(), column)
        if other != column:
            raise SourceError(
                f"expressions name the columns {other!r} and {column!r}, which differ in upper and "
                "lower case only, and SQL does not distinguish them: use one of them"
            )
    if one.format in LOG_COLUMNS and made.explode is None:
        check_names(made, LOG_COLUMNS[one.format], f"a {one.format}")
        kinds = [(name, types.get(name, "")) for name in made.inputs().values()]
        check(made, pa.schema([(name, ARROW.get(kind, pa.string())) for name, kind in kinds]))
    return made


# -- DuckDB ---------------------------------------------------------------------------------------


def connection() -> duckdb.DuckDBPyConnection:
    """A database in memory that reads no file, opens no connection, and stays so."""
    import duckdb

    made = duckdb.connect(":memory:", config=CONFIG)
    for setting in ("TimeZone = 'UTC'", "errors_as_json = true", "lock_configuration = true"):
        made.execute(f"SET {setting}").fetchall()
    return made


_local = threading.local()


def shared() -> duckdb.DuckDBPyConnection:
    """This thread's connection."""
    if not hasattr(_local, "connection"):
        _local.connection = connection()
    found: duckdb.DuckDBPyConnection = _local.connection
    return found


def said(error: duckdb.Error) -> dict[str, Any]:
    """What an error of DuckDB's says: `exception_message`, and `position` where it has one."""
    text = str(error)
    try:
        told: dict[str, Any] = json.loads(text[text.index("{") :])
        return told
    except ValueError:
        return {"exception_message": text}


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# -- parsing --------------------------------------------------------------------------------------


def parsed(field: str, sql: str) -> Expression:
    """An expression, parsed.

    Raises:
        SourceError: it is none, or names what an expression may not name.
    """
    text = f"{HEAD}{sql}\n)"
    asked = shared().execute("SELECT json_serialize_sql(?)", [text]).fetchall()
    tree = json.loads(asked[0][0])
    if tree["error"]:
        place = int(tree.get("position") or len(HEAD)) - len(HEAD)
        if place >= len(sql.encode()):
            raise mistake(field, sql, "syntax error: it ends before it is complete")
        hint = ". If a word of SQL is a column, write it in double quotes"
        raise mistake(field, sql, tree["error_message"] + hint, place)
    node = tree["statements"][0]["node"]
    whole = len(tree["statements"]) == 1 and node.get("type") == "SELECT_NODE"
    empty = whole and node["from_table"]["type"] == "EMPTY" and len(node["select_list"]) == 1
    if not empty or node["select_list"][0]["alias"] or _is_row(node["select_list"][0]):
        raise mistake(field, sql, "write one expression on the columns of the log")
    references: list[dict[str, Any]] = []
    for one in _nodes(node["select_list"][0], frozenset()):
        if one["class"] == "COLUMN_REF":
            references.append(one)
        else:
            _refuse(field, sql, one)
    return _named(field, sql, text.encode(), references)


def _is_row(node: dict[str, Any]) -> bool:
    """Whether the parentheses around the expression became a row: nothing, or a list, is in them."""
    return bool(node.get("function_name") == "row" and node["query_location"] < len(HEAD))


def _nodes(node: Any, bound: frozenset[str]) -> Iterator[dict[str, Any]]:
    """All nodes of a tree, without the names that lambdas bind."""
    if isinstance(node, list):
        for one in node:
            yield from _nodes(one, bound)
    elif isinstance(node, dict):
        if node.get("class") == "LAMBDA":
            names = {one["column_names"][0] for one in _references(node["lhs"])}
            yield from _nodes(node["expr"], bound | names)
            return
        if node.get("class") == "COLUMN_REF":
            if node["column_names"][0] not in bound:
                yield node
            return
        if "class" in node:
            yield node
        for inner in node.values():
            yield from _nodes(inner, bound)


def _references(node: Any) -> Iterator[dict[str, Any]]:
    return (one for one in _nodes(node, frozenset()) if one["class"] == "COLUMN_REF")


REFUSED = {
    "SUBQUERY": "a subquery: an expression reads the columns of one line",
    "WINDOW": "a window function: an expression reads the columns of one line",
    "STAR": "*: name the columns",
    "PARAMETER": "a parameter: write the value",
    "POSITIONAL_REFERENCE": "a column by its number: write its name",
}


def _refuse(field: str, sql: str, node: dict[str, Any]) -> None:
    """Raises: SourceError: an expression may not have this."""
    place = node.get("query_location", 0) - len(HEAD)
    if node["class"] in REFUSED:
        raise mistake(field, sql, f"this is {REFUSED[node['class']]}", place)
    if node["class"] != "FUNCTION":
        return
    name = str(node["function_name"]).lower()
    changing, aggregates = _functions()
    ages = name == "age" and len(node["arguments"]) == 1
    if name in changing or name in STATES or ages or name.startswith("pg_"):
        raise mistake(
            field,
            sql,
            f"the function {name} gives another result in another run, so replays could "
            "not repeat a night: use the columns of the line",
            place,
        )
    if name in aggregates or name == "unnest":
        raise mistake(
            field,
            sql,
            f"the function {name} makes one value of many rows, or many of one: an "
            "expression reads the columns of one line",
            place,
        )


def _functions() -> tuple[set[str], set[str]]:
    """Functions whose results change from call to call or from run to run, and aggregates."""
    if not hasattr(_local, "functions"):
        rows = (
            shared()
            .execute(
                "SELECT lower(function_name), function_type, stability FROM duckdb_functions()"
            )
            .fetchall()
        )
        changing = {name for name, _, stability in rows if stability not in (None, "CONSISTENT")}
        scalar = {name for name, kind, _ in rows if kind in ("scalar", "macro")}
        _local.functions = changing, {n for n, kind, _ in rows if kind == "aggregate"} - scalar
    found: tuple[set[str], set[str]] = _local.functions
    return found


def _named(field: str, sql: str, text: bytes, references: list[dict[str, Any]]) -> Expression:
    """The expression with the log's columns as quoted names; `a.b` is one column of the log."""
    columns: list[str] = []
    pieces, at = [], len(HEAD)
    for one in sorted(references, key=lambda one: one["query_location"]):
        start, length = one["query_location"], one["query_location_length"]
        name = ".".join(one["column_names"])
        if name.lower() in CLOCKS and text[start : start + 1] != b'"':
            raise mistake(
                field, sql, f"{name} gives another result in another run, so replays could not "
                "repeat a night: use the columns of the line (a column of this name is in double "
                "quotes)", start - len(HEAD),
            )  # fmt: skip
        columns.append(name)
        pieces += [text[at:start], quoted(name).encode()]
        at = start + length
    pieces.append(text[at : len(text) - len("\n)")])
    return Expression(field, sql, tuple(dict.fromkeys(columns)), b"".join(pieces).decode())


def mistake(field: str, sql: str, what: str, place: int | None = None) -> SourceError:
    """Args: place: the byte of the expression at which it is, from 0."""
    where = ""
    if place is not None and 0 <= place <= len(sql.encode()):
        before = sql.encode()[:place].decode("utf-8", "replace")
        rest = sql[len(before) :].split("\n")[0][:30]
        where = f", character {len(before) + 1}" + (f" ({rest!r})" if rest else "")
    return SourceError(f"{field} = {sql!r}{where}: {what}")


# -- binding --------------------------------------------------------------------------------------


def check_names(
    computing: Computing, there: Iterable[str], file: str, certain: bool = True
) -> None:
    """Raises: SourceError: an expression names a column that the log does not have.

    Args:
        certain: whether a column that is not there cannot be in another line. Where it can, only a
            name that is nearly one of those that are there is refused.
    """
    names = list(there)
    for name, _ in computing.types:
        if certain and name not in names and name != POSITION:
            near = nearest(name, names)
            hint = f"did you mean {near!r}?" if near else "leave it out"
            raise SourceError(f"source.types names {name!r}, and {file} has no such column: {hint}")
    for one in computing.expressions():
        for column in one.columns:
            near = nearest(column, names)
            if column in names or root(column) in names or not (certain or near):
                continue
            place = re.search(rf"(?<!\w){re.escape(column)}(?!\w)", one.sql)
            at = len(one.sql[: place.start()].encode()) if place else None
            listed = ", ".join(map(repr, names[:20])) or "none"
            hint = f"did you mean {near!r}?" if near else f"it has {listed}"
            raise mistake(one.field, one.sql, f"{file} has no column {column!r}: {hint}", at)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Which of the names is meant; None: none is near."""
    names = list(names)
    same = [one for one in names if one.lower() == name.lower()]
    return next(iter(same or difflib.get_close_matches(name, names, n=1)), None)


def check(computing: Computing, columns: pa.Schema) -> dict[str, str]:
    """What kind of value each expression gives, by DuckDB's binder.

    Args:
        columns: the log's columns that the expressions read, with their types.

    Returns:
        The type of each expression, by our column's name.

    Raises:
        SourceError: an expression does not fit these columns, or its result its field.
    """
    con = shared()
    con.register("log", columns.empty_table())
    try:
        kinds = {}
        for ours, one in computing.fields.items():
            kinds[ours] = kind_of(con, one)
            problem = unfit(ours, kinds[ours], computing.units)
            if problem:
                raise mistake(one.field, one.sql, f"it gives {kinds[ours]}, and {problem}")
        if computing.keep is not None:
            kind = kind_of(con, computing.keep)
            if kind != "BOOLEAN":
                raise mistake(
                    computing.keep.field,
                    computing.keep.sql,
                    f"it gives {kind}, and must be a "
                    'condition: true or false (a column of text may be declared: types = { … = "boolean" })',
                )
        return kinds
    finally:
        con.unregister("log")


def kind_of(con: duckdb.DuckDBPyConnection, one: Expression) -> str:
    """The type of an expression on the columns of `log`.

    Raises:
        SourceError: it has none.
    """
    import duckdb

    try:
        kind = _type(con, one.bound)
    except duckdb.Error as error:
        raise _unbound(con, one, error) from None
    mixed = _mixed(con, one)
    if mixed is not None:
        raise mistake(one.field, one.sql, mixed)
    return kind


def _type(con: duckdb.DuckDBPyConnection, bound: str) -> str:
    return str(con.execute(f"DESCRIBE SELECT ({bound}\n) AS v FROM log").fetchall()[0][1])


def _unbound(con: duckdb.DuckDBPyConnection, one: Expression, error: duckdb.Error) -> SourceError:
    told = said(error)
    first = str(told["exception_message"]).split("\n")[0].strip(" .")
    place = told.get("position")
    at = None
    if place is not None:
        # (The position is one of the text with quoted names: that of the last text before it which
        # both have.)
        at = _place(one, int(place) - len("DESCRIBE SELECT ("))
    kinds = {row[0]: row[1] for row in con.execute("DESCRIBE log").fetchall()}
    texts = [name for name in one.columns if kinds.get(name) == "VARCHAR"]
    hint = ""
    if texts and re.search("explicit (type )?cast", first):
        meant = next((given for word, given in MEANT if word in first), "bigint")
        hint = (
            f". Columns of text formats are text ({', '.join(texts)}) unless they have another type, "
            f'such as types = {{ {_key(texts[0])} = "{meant}" }} under [source]'
        )
    return mistake(one.field, one.sql, f"{first}{hint}", at)


MEANT = (
    ("BOOLEAN", "boolean"), ("TIMESTAMP", "timestamp"), ("DATE", "date"), ("DECIMAL", "double"),
    ("DOUBLE", "double"),
)  # fmt: skip
"""The word of DuckDB's for a type with which a text is compared, and the type to declare."""


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _place(one: Expression, place: int) -> int | None:
    """A byte of `bound` as one of `sql`."""
    shift = 0
    for found in re.finditer(rb'"(?:[^"]|"")*"', one.bound.encode()):
        if found.start() >= place:
            break
        name = found.group().decode()[1:-1].replace('""', '"')
        start = found.start() - shift
        if name in one.columns and one.sql.encode()[start : start + 1] != b'"':
            shift += 2
    return place - shift


def _mixed(con: duckdb.DuckDBPyConnection, one: Expression) -> str | None:
    """What to say of a text that is compared with a number, where DuckDB would convert one of them
    without a word: `'10.4'` would be 10."""
    text = f"{HEAD}{one.bound}\n)"
    asked = con.execute("SELECT json_serialize_sql(?)", [text]).fetchall()
    for node in _nodes(
        json.loads(asked[0][0])["statements"][0]["node"]["select_list"], frozenset()
    ):
        if node["class"] == "COMPARISON":
            sides = [node["left"], node["right"]]
        elif node.get("type") in ("COMPARE_IN", "COMPARE_NOT_IN"):
            sides = node["children"]
        else:
            continue
        kinds = {_kind_of_node(con, text.encode(), side) for side in sides}
        if "VARCHAR" in kinds and any(kind.startswith((*WHOLE_NUMBERS, *FLOATS)) for kind in kinds):
            names = [one["column_names"][0] for side in sides for one in _references(side)]
            given = _key(names[0]) if names else "column"
            return (
                f"a text is compared with a number ({', '.join(names)}): give the column its type, "
                f'types = {{ {given} = "bigint" }} under [source], or write the other side as text'
            )
    return None


def _kind_of_node(con: duckdb.DuckDBPyConnection, text: bytes, node: dict[str, Any]) -> str:
    """The type of a part of an expression where it is a column or a value; else empty."""
    if node["class"] == "CONSTANT":
        kind = str(node["literal"]["kind"])
        # (A text in quotes takes the other side's type, by SQL's rule.)
        return kind if kind.startswith((*WHOLE_NUMBERS, *FLOATS)) else ""
    if node["class"] != "COLUMN_REF":
        return ""
    return _type(con, quoted(node["column_names"][0]))


def unfit(ours: str, kind: str, units: Sequence[str]) -> str:
    """Why a type is none for a column of ours; empty: it is one.

    Args:
        units: those of `time.unit`.
    """
    whole = kind in WHOLE_NUMBERS
    if ours == "event_ts":
        if (whole or kind.startswith(FLOATS)) and not set(units) & set(NUMERIC_UNITS):
            return f"time.unit = {', '.join(map(repr, units))} is one of texts: set 's', 'ms' or 'us', or make it a TIMESTAMP"
        fits = (
            whole or kind.startswith(("TIMESTAMP", *FLOATS)) or kind in ("VARCHAR", "DATE", "JSON")
        )
        return "" if fits else "a time is TIMESTAMP, DATE, or a text or number of time.unit"
    if ours == "value":
        fits = whole or kind.startswith(FLOATS) or kind in ("VARCHAR", "BOOLEAN", "JSON")
        return "" if fits else "value is a number"
    if ours == "tie_break":
        fits = whole or kind in ("VARCHAR", "BOOLEAN", "JSON")
        return "" if fits else "tie_break is a whole number: CAST it to BIGINT"
    if ours == "exposed_with":
        inner = kind.removesuffix("[]")
        fits = inner in ("VARCHAR", "JSON") or (inner != kind and inner in WHOLE_NUMBERS)
        return "" if fits else "exposed_with is a list of texts, or a text with separators"
    if kind.startswith(FLOATS):
        return "ids never pass through floating point: CAST it to BIGINT or VARCHAR"
    fits = (
        whole or kind in ("VARCHAR", "UUID", "BOOLEAN", "DATE", "JSON") or kind.startswith("ENUM")
    )
    return "" if fits else f"{ours} is a text: CAST it to VARCHAR"
