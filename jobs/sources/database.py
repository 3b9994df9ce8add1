"""A log that is a table of a database: its new rows, kept as Parquet files in the landing.

Each run asks for the rows in which a column that grows is at least as large as before, in its order,
and writes those that were not read before as files of the folder `source.landing`. From there they are
read as any log of Parquet. A file is named by the largest value in it (`Mark`), so the files of the
landing and the ledger say how far the table was read, and no other state is needed: a run that was
killed goes on behind its last whole file. A row that is committed late, with a value that was passed
already, is found within `[jdbc] lag`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.core import crash_points
from jobs.core.errors import SourceError
from jobs.core.landing_globs import DAY_FIELD
from jobs.core.source_log import JdbcPart
from jobs.core.tables import FILES
from jobs.lake import filesystem
from jobs.lake.context import Context
from jobs.lake.landed import absolute
from jobs.records.evaluate import json_rows
from jobs.sources.database_rows import (
    KINDS,
    Column,
    Growing,
    Mark,
    before,
    kind_of,
    latest,
    table_of,
    together,
)

try:  # (one extra of its own: jdbc)
    import sqlalchemy as sql
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
    from sqlalchemy.pool import NullPool
except ModuleNotFoundError as missing:  # pragma: no cover
    raise SourceError(
        "source.format = 'jdbc' needs SQLAlchemy: pip install 'sessionmill[jdbc]', and the driver of "
        "the database"
    ) from missing

CHUNK = 20_000  # rows
FILE_ROWS = 1_000_000
FILE_BYTES = 256 * 1024 * 1024
"""Of a file, in memory."""
GROUP_ROWS = 100_000
LOG = "sessionmill_log"
SHAPE = b"sessionmill.table"
"""Of a file of rows: what the table was when they were read."""
WORDS_OF_ERROR = 400


def folder_of(landing: str) -> str:
    """The folder where a table's rows are kept.

    Raises:
        SourceError: `landing` is a pattern.
    """
    if filesystem.MAGIC.search(landing) or DAY_FIELD.search(landing):
        raise SourceError(
            f"source.landing = {landing!r}: with format = 'jdbc' it is the folder where the rows that "
            "were read are kept, without a pattern"
        )
    return absolute(landing).rstrip("/")


def fetch(context: Context) -> list[str]:
    """Write the table's new rows to files of the landing; what to say of it.

    Raises:
        SourceError: the database or the table cannot be read as the source file says.
    """
    part = context.source.jdbc
    assert part is not None
    folder = folder_of(context.source.source.landing)
    ledger = context.lake.small(FILES)["file"].to_pylist()
    read = {path for path in ledger if path.startswith(f"{folder}/")}
    with Log.opened(part) as log:
        files = _whole_files(folder, read, log.shape)
        marks = marks_of(log.growing, [*files, *read])
        newest = log.newest()
        notes = log.of_nulls()
        if newest is None:
            return notes
        upper = latest(newest, context.started.astimezone(UTC))
        if upper != newest:
            notes.append(
                f"{log.named} has rows in which {part.incremental_column} is up to {newest}: those "
                "that are more than a day ahead are not read before their time comes"
            )
        upto = _checked(part, log, newest, marks)
        if upto is not None and newest < upto:
            notes.append(
                f"{log.named} has {part.incremental_column} up to {newest}, and rows up to {upto} were "
                "read before: if it was emptied or restored, name another folder under source.landing, "
                "into which the whole table is read once more"
            )
        lower = None if upto is None else before(upto, part.lag)
        known = set() if lower is None else _known(files, log.growing, lower)
        for last, rows in _files(log.chunks(lower, upper), upto, known):
            rows = rows.replace_schema_metadata({SHAPE: log.shape})
            _put(folder, Mark(log.growing, last), context.batch, rows)
            crash_points.point("ingest.extracted")
    return notes


def marks_of(column: str, paths: list[str]) -> list[Mark]:
    """How far the table was read, as the files that were made of it say.

    Args:
        column: the one that grows.

    Raises:
        SourceError: they were made by another column.
    """
    marks = [one for one in map(Mark.of, dict.fromkeys(paths)) if one is not None]
    for one in marks:
        if not one.is_of(column):
            raise SourceError(
                f"jdbc.incremental_column = {column!r}, and the table was read by "
                f"{one.column!r} before: name that one, or another folder under source.landing, into "
                "which the whole table is read once more (rows that are stored count as duplicates)"
            )
    return marks


def _checked(part: JdbcPart, log: Log, newest: Growing, marks: list[Mark]) -> Any:
    """Up to where the table was read; None: never.

    Raises:
        SourceError: the column is of no kind that can be read by, or of another than before.
    """
    kind = kind_of(newest)
    said = f"jdbc.incremental_column = {part.incremental_column!r}"
    if kind not in KINDS:
        raise SourceError(
            f"{said} is {kind} in {log.named}: name a column of numbers or times that grows"
        )
    if kind == "text" and part.lag:
        raise SourceError(
            f"jdbc.lag = {part.lag:g}: {said} is text in {log.named}, and a lag needs a number or a "
            "time: leave it out, or compute one in jdbc.query"
        )
    other = next((one for one in marks if kind_of(one.value) != kind), None)
    if other is not None:
        raise SourceError(
            f"{said} is a {kind} in {log.named}, and was a {kind_of(other.value)} ({other.value}) "
            "before: name another folder under source.landing, into which the whole table is read once "
            "more (rows that are stored count as duplicates)"
        )
    values: list[Any] = [one.value for one in marks]
    return max(values, default=None)


@dataclass(frozen=True)
class Chunk:
    """Some rows that follow each other, with the values of the column that grows in the first and the
    last of them."""

    first: Any
    last: Any
    rows: pa.Table


def _files(
    chunks: Iterable[Chunk], upto: Any, known: set[bytes]
) -> Iterator[tuple[Growing, pa.Table]]:
    """The rows of each file to be written, with the value up to which the table was read then.

    Args:
        known: the rows that were read before; none of them is larger than `upto`.
    """
    made: list[pa.Table] = []
    last: Any = None
    for chunk in chunks:
        rows, last = chunk.rows, chunk.last
        if known and chunk.first <= upto:
            seen = pa.array([key in known for key in _keys(rows)], pa.bool_())
            rows = rows.filter(pc.invert(seen))
        if rows.num_rows:
            made.append(rows)
        if sum(map(len, made)) >= FILE_ROWS or sum(one.nbytes for one in made) >= FILE_BYTES:
            yield last, together(made)
            made = []
    if made:
        yield last, together(made)


def _keys(rows: pa.Table) -> Iterator[bytes]:
    """Rows that say the same have the same key, whatever the types of their columns."""
    for text in json_rows(rows).to_pylist():
        yield hashlib.blake2b(text.encode(), digest_size=16).digest()


def _known(files: list[str], column: str, lower: Any) -> set[bytes]:
    """The rows of files of the landing that a run may meet again.

    Args:
        column: the one that grows.
    """
    found: set[bytes] = set()
    for path in files:
        mark = Mark.of(path)
        if mark is not None and mark.value >= lower:
            with filesystem.open_seekable(path) as stream:
                for batch in pq.ParquetFile(stream).iter_batches(CHUNK):
                    found.update(_keys(_from(pa.table(batch), column, lower)))
    return found


def _from(rows: pa.Table, column: str, lower: Any) -> pa.Table:
    """The rows from a value on, or all, where the column is stored as text: more do no harm."""
    try:
        return rows.filter(pc.greater_equal(rows[column], pa.scalar(lower)))
    except (pa.ArrowException, KeyError):
        return rows


def _whole_files(folder: str, read: set[str], shape: bytes) -> list[str]:
    """The files of the landing. Removed, and so written anew, are those that a run was killed in, and
    those that no run has read yet if the table was another then: they may be why a run stopped.

    Args:
        read: the files that the ledger knows.
        shape: what the table is now.
    """
    cut: list[str] = []
    kept = []
    for path, *_ in filesystem.glob(folder, cut):
        if Mark.of(path) is not None and path not in read and _shape(path) != shape:
            filesystem.remove_file(path)
        else:
            kept.append(path)
    for path in cut:
        if path.rpartition("/")[2].startswith("_rows-"):
            filesystem.remove_file(path)
    return kept


def _shape(path: str) -> bytes | None:
    with filesystem.open_seekable(path) as stream:
        metadata = pq.read_schema(stream).metadata or {}
    shape: bytes | None = metadata.get(SHAPE)
    return shape


def _put(folder: str, mark: Mark, batch: str, rows: pa.Table) -> None:
    """A file of the landing, complete or not at all, and beside those that are there."""
    names = (mark.name(batch, number) for number in count())
    name = next(one for one in names if not filesystem.exists(f"{folder}/{one}"))
    filesystem.write_parquet(f"{folder}/_{name}", rows, GROUP_ROWS)
    filesystem.move(f"{folder}/_{name}", f"{folder}/{name}")


# -- the database ----------------------------------------------------------------------------------


class Log:
    """The table or query of a source file, over a connection."""

    def __init__(self, part: JdbcPart, connection: sql.Connection, secret: str | None) -> None:
        self.part, self.connection, self.secret = part, connection, secret
        self.named = part.named
        inner = f"({part.query.strip().rstrip(';')})" if part.query else part.table or ""
        # (A colon would be a parameter.)
        self.relation = sql.text(f"{inner} {LOG}".replace(":", "\\:"))
        self.columns = self._columns()
        self.growing = self._growing()
        quoted = connection.dialect.identifier_preparer.quote_identifier(self.growing)
        self.at: sql.ColumnElement[Any] = sql.literal_column(quoted)

    @classmethod
    @contextmanager
    def opened(cls, part: JdbcPart) -> Iterator[Log]:
        """Raises: SourceError: the database or the table cannot be reached."""
        engine, secret = engine_of(part)
        try:
            with _plainly(f"jdbc.url = {part.url!r}: the database cannot be reached", secret):
                connection = engine.connect()
            with connection:
                yield cls(part, connection, secret)
        finally:
            engine.dispose()

    def _asked(self, what: Any) -> sql.Select[Any]:
        return sql.select(what).select_from(self.relation)

    def _all(self) -> sql.Select[Any]:
        return self._asked(sql.literal_column("*"))

    def _columns(self) -> list[Column]:
        """Raises: SourceError: there is no such table, or it has a name twice."""
        with self.plainly():
            found = self.connection.execute(self._all().where(sql.text("1 = 0")))
            described = found.cursor.description if found.cursor is not None else ()
        said = repr((self.part.table, self.part.query, [(one[0], one[1]) for one in described]))
        self.shape = hashlib.blake2b(said.encode(), digest_size=16).hexdigest().encode()
        names = [one[0] for one in described]
        for name in names:
            if names.count(name) > 1:
                raise SourceError(
                    f"{self.named} has the column {name!r} twice: rename one in jdbc.query"
                )
        return [Column(one[0], _scale(one)) for one in described]

    def _growing(self) -> str:
        """The name of the column that grows, as the database has it.

        Raises:
            SourceError: there is none.
        """
        wanted = self.part.incremental_column
        names = [one.name for one in self.columns]
        alike = [one for one in names if one.lower() == wanted.lower()]
        if wanted in names or len(alike) == 1:
            return wanted if wanted in names else alike[0]
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
        raise SourceError(
            f"jdbc.incremental_column = {wanted!r}: {self.named} has no such column: {hint}"
        )

    def newest(self) -> Any:
        """The largest value of the column that grows; None: there is no row that has one."""
        with self.plainly():
            return self.connection.execute(self._asked(sql.func.max(self.at))).scalar()

    def of_nulls(self) -> list[str]:
        """What to say of rows that cannot be read, because the column that grows is null in them."""
        with self.plainly():
            asked = self._asked(sql.literal_column("1")).where(self.at.is_(None)).limit(1)
            if self.connection.execute(asked).first() is None:
                return []
        return [
            f"{self.named} has rows in which {self.growing} is null: they are not read. Fill them, "
            "or name another column under jdbc.incremental_column"
        ]

    def chunks(self, lower: Growing | None, upper: Growing) -> Iterator[Chunk]:
        """The rows between two values, both included, in order."""
        asked = self._all().where(self.at <= upper).order_by(self.at)
        if lower is not None:
            asked = asked.where(self.at >= lower)
        place = [one.name for one in self.columns].index(self.growing)
        with self.plainly():
            streamed = self.connection.execution_options(yield_per=CHUNK)
            for rows in streamed.execute(asked).partitions():
                yield Chunk(rows[0][place], rows[-1][place], table_of(self.columns, rows))

    def plainly(self) -> Any:
        return _plainly(f"{self.named} cannot be read", self.secret)


def _scale(described: Any) -> int | None:
    """The digits behind the point that a database declares for a column of decimals."""
    precision, scale = described[4], described[5]
    declared = isinstance(precision, int) and 0 < precision <= 38 and isinstance(scale, int)
    return scale if declared and 0 <= scale <= precision else None


@contextmanager
def _plainly(what: str, secret: str | None) -> Iterator[None]:
    """What a driver says as a sentence, without the password."""
    try:
        yield
    except (SQLAlchemyError, ValueError, OverflowError) as error:
        # (Values outside of Python's, such as PostgreSQL's `infinity`, are no errors of the driver.)
        lines = str(getattr(error, "orig", None) or error).strip().splitlines() or [repr(error)]
        said = lines[0][:WORDS_OF_ERROR]
        said = said.replace(secret, "…") if secret else said
        raise SourceError(f"{what}: {said}. Correct [jdbc], or the database's grants") from None


def engine_of(part: JdbcPart) -> tuple[sql.Engine, str | None]:
    """What connects to the database, and its password.

    Raises:
        SourceError: the address cannot be used, or the password is not where it should be.
    """
    text = part.url.removeprefix("jdbc:")
    if text.startswith("sqlite:") and "://" not in text:
        text = f"sqlite:///{text.removeprefix('sqlite:')}"  # (as JDBC's driver has it)
    secret = _password(part)
    try:
        url = _with_driver(sql.make_url(text))
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise SourceError(f"jdbc.url = {part.url!r}: there is no file {url.database!r}")
        # JSON is text in a log.
        more = {"json_deserializer": str} if url.get_backend_name() == "postgresql" else {}
        engine = sql.create_engine(
            url if secret is None else url.set(password=secret),
            poolclass=NullPool,
            hide_parameters=True,
            **more,
        )
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise SourceError(
            f"jdbc.url = {part.url!r} needs a driver that is not installed ({error}): install the "
            "package for this database (PostgreSQL: pip install 'sessionmill[postgres]')"
        ) from None
    except (ArgumentError, ValueError):
        raise SourceError(
            f"jdbc.url = {part.url!r} is no address of a database: write "
            "postgresql://user@host:5432/database, or as SQLAlchemy's documentation has it"
        ) from None
    return engine, secret


def _with_driver(url: sql.URL) -> sql.URL:
    """PostgreSQL by the driver that is installed, where none is named."""
    if url.drivername not in ("postgresql", "postgres"):
        return url
    there = "psycopg" if find_spec("psycopg") else "psycopg2"
    return url.set(drivername=f"postgresql+{there}")


def _password(part: JdbcPart) -> str | None:
    if part.password_env is not None:
        secret = os.environ.get(part.password_env)
        if not secret:
            raise SourceError(
                f"jdbc.password_env = {part.password_env!r}: this environment variable is not set"
            )
        return secret
    if part.password_file is not None:
        try:
            return Path(part.password_file).read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise SourceError(
                f"jdbc.password_file = {part.password_file!r} cannot be read: {error.strerror}"
            ) from None
    return None
