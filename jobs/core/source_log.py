"""The sections of a source file that say where a log is and how it is written.

Imports pydantic and the standard library only, as all of `jobs/core/source_*.py` do: DAG files read
sources, too.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, get_args
from zoneinfo import available_timezones

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationInfo,
    field_validator,
    model_validator,
)

TYPED = ("parquet", "orc", "avro", "delta", "iceberg", "jdbc")
"""Formats whose columns have types; their rows have no text of their own."""
COMBINED_LOG_COLUMNS = (
    "host", "user", "time", "method", "path", "status", "bytes", "referrer", "user_agent",
)  # fmt: skip
TABLES_OF_OTHERS = {"delta": "a Delta table", "iceberg": "an Iceberg table"}
"""Formats whose landing is a table: its data files are read, and never changed."""
LOG_COLUMNS = {
    "combined_log": COMBINED_LOG_COLUMNS,
    "vhost_combined": ("vhost", "port", *COMBINED_LOG_COLUMNS),
}
"""The columns of web servers' logs, by format."""
COMBINED_LOG_NUMBERS = ("status", "bytes")
"""Columns of a combined log that are numbers in expressions."""
COMBINED_LOG_TIME = "dd/MMM/yyyy:HH:mm:ss Z"
NULL_VALUES = ("",)
"""Texts that mean nothing in every column, unless `null_values` names others."""
NULL_IDS = (
    "NULL", "Null", "null", "\\N", "None", "none", "NONE", "nan", "NaN", "NAN", "undefined", "<NA>",
    "N/A", "n/a",
)  # fmt: skip
"""What databases, Python, pandas and JavaScript write for nothing. Words that may be ids (NA, nil,
unknown, 0) are not among them."""


class Part(BaseModel):
    """A section. The text under a key is its meaning, as docs/reference/source-file.md prints it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """(pydantic reads true as 1.)"""
        if isinstance(value, bool) and info.field_name is not None:
            kind = cls.model_fields[info.field_name].annotation
            if {int, float} & {kind, *get_args(kind)}:
                raise ValueError("write a number, not true or false")
        return value


def _name(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,62}", value):
        raise ValueError(
            "use a letter, then up to 62 letters, digits, '_' or '-': it names a folder, DAGs and "
            "a registered model"
        )
    return value


ColumnName = Annotated[str, Field(min_length=1)]
ColumnType = Literal["bigint", "double", "boolean", "date", "timestamp"]


def _pattern(value: object) -> object:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
    return value


Pattern = Annotated[str, Field(min_length=1), BeforeValidator(_pattern)]


def _zone(value: object) -> object:
    if isinstance(value, str) and value not in available_timezones():
        # (By the city: an abbreviation such as CEST is near to that of another continent, and
        # Etc/GMT+2 is behind UTC.)
        zones = (one for one in sorted(available_timezones()) if "/" in one and "Etc" not in one)
        cities = {zone.rpartition("/")[2].lower(): zone for zone in zones}
        city = value.rpartition("/")[2].lower()
        near = difflib.get_close_matches(city, cities, n=1, cutoff=0.8)
        hint = f"did you mean {cities[near[0]]!r}?" if near else "use a name such as 'Europe/Paris'"
        raise ValueError(f"no such time zone: {hint}")
    return value


Zone = Annotated[str, BeforeValidator(_zone)]


class SourcePart(Part):
    """Where the log is and how it is written."""

    name: Annotated[str, BeforeValidator(_name)]
    """Names the source's folder, DAGs and registered model: a letter, then up to 62 letters,
    digits, `_` or `-`."""
    landing: str = Field(min_length=1)
    """The files of the log, as a glob. `{day}` stands for a date, `{day:%Y/%m/%d}` for one in
    another form."""
    format: Literal[
        "csv", "jsonl", "json", "parquet", "orc", "avro", "delta", "iceberg", "jdbc",
        "combined_log", "vhost_combined", "w3c",
    ]  # fmt: skip
    """How the files are written. `jsonl` has an object in each line; `json` has objects over many
    lines, in arrays or one after another. `combined_log` is the access log of web servers; with
    `vhost_combined` each of its lines begins with the server's name and port. `w3c` is the extended
    log of IIS and CloudFront, whose columns are in lines of `#Fields`. With `delta`, `landing` is
    the folder of a Delta table: rows that were added since the last run are read. With `iceberg`
    it is the folder of an Iceberg table, one of its `.metadata.json`, or
    `iceberg://CATALOG/NAMESPACE.TABLE` by pyiceberg's configuration. With `jdbc`, rows
    of a database's table (`[jdbc]`) are read, and `landing` is the folder where they are kept as
    Parquet files."""
    delimiter: str = Field(default=",", min_length=1)
    """Separates the columns of a CSV file."""
    quote: str = Field(default='"', max_length=1)
    """Encloses fields of a CSV file that have the delimiter or line breaks in them; doubled inside,
    it stands for itself. With `""` nothing is quoted: for logs in which a lone double quote is
    part of a text."""
    escape: str = Field(default="", max_length=1)
    """Takes its meaning from the next character of a CSV file, such as `\\` in `a\\,b`. With the
    backslash, a field that is `\\N` is null unless `null_values` is given."""
    comment: str = ""
    """Lines of a CSV file that begin with this text are skipped."""
    decimal: Literal[".", ","] = "."
    """The decimal mark of numbers in a CSV file. With `,`, dots may separate thousands."""
    header: StrictBool = True
    """Whether a CSV file begins with the names of its columns. Without them, columns are `_0`,
    `_1`, …"""
    null_values: list[str] | None = None
    """Texts that are read as null, in every column. By default empty text, and in `user_id` and
    `item_id` also `NULL`, `None`, `nan` and the like (a source whose tables were made by version
    0.1.0 keeps empty text alone). With `[]` every text is taken as it is."""
    encoding: str = "utf-8"
    """Encoding of text formats. A byte-order mark is dropped."""
    list_separator: str = Field(default="|", min_length=1)
    """Separates the items of `exposed_with` where the log has them as one text."""
    on_new_column: Literal["ignore", "fail"] = "ignore"
    """What happens when a file has a column that the log did not have before."""
    redelivery: Literal["append", "replace"] = "append"
    """What happens when a file comes again with other content. `append`: its new lines are added.
    `replace`: what the file no longer has, and no other file has, is removed, too; of each file its
    newest version counts. A file that is no longer there changes nothing."""
    keep: str | None = Field(default=None, min_length=1)
    """An SQL condition on the log's columns (DuckDB's dialect), such as `method = 'GET' AND status
    BETWEEN 200 AND 299`. Lines for which it is false are left out and counted as `filtered`; lines
    for which it is null, or cannot be computed, are kept."""
    keep_filtered: StrictBool = False
    """Whether lines that `keep` or `[bots]` leave out are stored in `bronze.filtered`, from where
    `python -m jobs replay-filtered` reads them again."""
    types: dict[ColumnName, ColumnType] = {}
    """Types of columns of text formats in SQL expressions: `bigint`, `double`, `boolean`, `date` or
    `timestamp` by column. Other columns are text; `status` and `bytes` of a `combined_log` are
    numbers, and Parquet columns have their own types."""
    explode: str | None = Field(default=None, min_length=1)
    """A column that is a list: each of its elements is a line of its own, with the columns of the
    line. Fields of elements are columns by their names, or as `<list>.<field>`, elements that are
    single values are the column itself, and their place (from 1) is `_position`."""
    explode_separator: str | None = Field(default=None, min_length=1)
    """Separates the elements where the list is one text, such as a blank in `N1-1 N2-0`. Without it,
    a text is read as a JSON array."""
    explode_pattern: Pattern | None = None
    """A regular expression that each element of a text matches as a whole; its named groups are
    columns, such as `(?P<item>.+)-(?P<clicked>[01])`."""

    def nulls(self) -> frozenset[str]:
        """The texts that mean nothing in every column."""
        if self.null_values is not None:
            return frozenset(self.null_values)
        return frozenset((*NULL_VALUES, "\\N") if self.escape == "\\" else NULL_VALUES)

    @model_validator(mode="after")
    def _marks_of_csv(self) -> SourcePart:
        given = {name: getattr(self, name) for name in ("quote", "escape", "comment", "decimal")}
        for name, value in given.items():
            if self.format != "csv" and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"source.{name} = {value!r} is for format = 'csv' only, and source.format = "
                    f"{self.format!r}: leave it out"
                )
        if self.redelivery == "replace" and (table := TABLES_OF_OTHERS.get(self.format)):
            raise ValueError(
                "source.redelivery = 'replace' is for files that are written again, and the data files of "
                f"{table} never are: leave it out"
            )
        if self.redelivery == "replace" and self.format == "jdbc":
            raise ValueError(
                "source.redelivery = 'replace' is for files that are written again, and rows of a "
                "database are written once: leave it out"
            )
        for name in ("quote", "escape"):
            mark = given[name]
            if mark and (mark in "\r\n" or mark in self.delimiter):
                raise ValueError(
                    f"source.{name} = {mark!r} is a line end or part of source.delimiter = "
                    f"{self.delimiter!r}: name another character"
                )
        return self


class LandingPart(Part):
    """Files of the landing that are still being written."""

    partial_line_hours: float = Field(default=1.0, ge=0, le=1000)
    """A last line without a line end waits until its file was not modified for so many hours, and
    is then read as it is. It is counted as `waiting`, and is no line that was read. 0: it is
    read at once. Compressed files and Parquet end whole, and nothing of them waits."""


SECRET_IN_URL = re.compile(r"(?:password|passwd|pwd|secret|token)\s*=", re.IGNORECASE)


class JdbcPart(Part):
    """The table of a database that is the log, where `format = "jdbc"`. Each run reads the rows that
    are new by a column that grows."""

    url: str = Field(min_length=1)
    """The database, such as `postgresql://reader@db.example.com:5432/shop`, in SQLAlchemy's form and
    without a password. `jdbc:` before it may be left in."""
    password_env: str | None = Field(default=None, min_length=1)
    """The environment variable that has the password."""
    password_file: str | None = Field(default=None, min_length=1)
    """The file that has the password. With neither, the driver asks where it always does, such as
    `~/.pgpass`."""
    table: str | None = Field(default=None, min_length=1)
    """The table or view, as SQL names it, such as `public.events`."""
    query: str | None = Field(default=None, min_length=1)
    """In place of a table: a `SELECT` in the database's own SQL."""
    incremental_column: ColumnName
    """The column that grows: a number or a time, best with an index. A run reads the rows in which it
    is at least as large as in the rows that were read before. Rows in which it is null are not read."""
    lag: float = Field(default=0, ge=0)
    """How far back each run looks for rows that were committed late: of a time in seconds, of a number
    in its own unit. Rows that were read before are not read again."""

    @property
    def named(self) -> str:
        """How messages name the log."""
        return f"jdbc.table = {self.table!r}" if self.table else "jdbc.query"

    @model_validator(mode="after")
    def _one_table_and_no_secret(self) -> JdbcPart:
        # (Checked here, not at the field: a message of a field shows its value.)
        before, at, _ = self.url.rpartition("@")
        if (at and ":" in before.partition("://")[2]) or SECRET_IN_URL.search(self.url):
            raise ValueError(
                "jdbc.url has a password: take it out, and name an environment variable "
                "(jdbc.password_env) or a file (jdbc.password_file) that has it"
            )
        if (self.table is None) == (self.query is None):
            raise ValueError(
                "name the log under jdbc.table, or select it by jdbc.query: one of them"
            )
        if self.password_env is not None and self.password_file is not None:
            raise ValueError(
                "jdbc.password_env and jdbc.password_file both say where the password is: leave one "
                "of them out"
            )
        return self


class PrivacyPart(Part):
    """What of a person reaches the tables."""

    hash_user_id: StrictBool = False
    """User ids are hashed with a key (SESSIONMILL_ID_KEY) as they are read, and only the mapped
    columns of rejected lines are kept."""


class QualityPart(Part):
    """How many unusable lines are too many, and what happens then.

    Late lines are usable. A run without a usable line exceeds every share.
    """

    max_reject_share: float = Field(default=0.5, ge=0, le=1)
    """The share of a run's lines that may be unusable."""
    on_exceed: Literal["warn", "fail"] = "fail"
    """`fail`: the run fails and stores the rejected lines only. `warn`: the usable lines are loaded
    with a warning (the default of version 0.1.0)."""


class ItemsPart(Part):
    """A catalogue of attributes of the items. Each of its files has all items."""

    landing: str = Field(min_length=1)
    """The files, as in `[source]`. `{day}`: there is a catalogue for each day."""
    format: Literal["csv", "jsonl", "parquet"]
    """How the files are written."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Separates the columns of a CSV file."""
    id: ColumnName
    """The column that has the item's id."""
    categories: list[ColumnName] = []
    """Columns whose values are categories, such as a brand."""
    numbers: list[ColumnName] = []
    """Columns whose values are numbers, such as a price."""
    texts: list[ColumnName] = []
    """Columns whose values are texts, such as a title: models read their words."""

    @property
    def names(self) -> list[str]:
        """The columns that say something of an item."""
        return [*self.categories, *self.numbers, *self.texts]

    @model_validator(mode="after")
    def _says_something(self) -> ItemsPart:
        names = self.names
        if not names:
            raise ValueError("name the catalogue's columns under categories, numbers, or texts")
        twice = sorted({name for name in names if names.count(name) > 1 or name == self.id})
        if twice:
            raise ValueError(
                f"{twice[0]!r} is named twice: use a column as id, category, number or text, once"
            )
        return self
