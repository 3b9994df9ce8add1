"""The sections of a source file that say what an event is: columns, times, feedback, exposures, who acted."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, StrictBool, Tag, model_validator

from expectations.feedback_rule import CONDITION, entries, uses_value
from jobs.core.source_log import ColumnName, Part, Zone

NUMERIC_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}


class Computed(Part):
    """A column that is computed, `{ sql = "…" }`, or looked up in a list of keys and values,
    `{ key = "…", of = "…" }`."""

    sql: str | None = Field(default=None, min_length=1)
    key: str | None = Field(default=None, min_length=1)
    of: ColumnName = "event_params"

    @model_validator(mode="after")
    def _one_of_two(self) -> Computed:
        if (self.sql is None) == (self.key is None):
            raise ValueError(
                'write a column\'s name, { sql = "…" } with an expression, or { key = "…", of = "…" } '
                "with a key and the list of keys and values that has it"
            )
        if self.sql is not None and "of" in self.model_fields_set:
            raise ValueError(
                "`of` goes with `key`, not with `sql`: name the columns in the expression"
            )
        return self


def _form(value: object) -> str:
    if isinstance(value, list | tuple):
        return "pair"
    return _form_of_one(value)


def _form_of_one(value: object) -> str:
    return "table" if isinstance(value, dict | Computed) else "name"


Column = Annotated[
    Annotated[ColumnName, Tag("name")] | Annotated[Computed, Tag("table")],
    Discriminator(_form_of_one),
]
Pair = Annotated[list[ColumnName], Field(min_length=2, max_length=2)]
TimeColumn = Annotated[
    Annotated[ColumnName, Tag("name")]
    | Annotated[Computed, Tag("table")]
    | Annotated[Pair, Tag("pair")],
    Discriminator(_form),
]
FORMS = ("name", "table", "pair", "order")
"""What pydantic puts into the place of a mistake in a `Column`."""


class FileOrder(Part):
    """The order in which the log's files have the events."""

    order: Literal["file"]


def _form_of_tie(value: object) -> str:
    ordered = isinstance(value, FileOrder) or (isinstance(value, dict) and "order" in value)
    return "order" if ordered else _form_of_one(value)


TieColumn = Annotated[
    Annotated[ColumnName, Tag("name")]
    | Annotated[Computed, Tag("table")]
    | Annotated[FileOrder, Tag("order")],
    Discriminator(_form_of_tie),
]


class ColumnsPart(Part):
    """Which column of the log is which of ours. `a.b` is a field inside another (JSON, Parquet, ORC,
    Avro). A table `{ sql = "…" }` computes a column by an SQL expression on the log's columns
    (DuckDB's dialect), and `{ key = "…", of = "…" }` takes the value of a key from a list of keys and
    values."""

    user_id: Column | None = None
    """Who acted. Required, unless `[identity]` names it."""
    item_id: Column
    """On which item."""
    event_ts: TimeColumn
    """When; how it is written is said under `[time]`. Of two columns, such as `["date", "time"]`,
    the texts are joined by a blank, or the second is a number to be added (`[time] offset`)."""
    event_type: Column | None = None
    """What kind of event it is, such as `view` or `purchase`; read by `[feedback]`."""
    source_session_id: Column | None = None
    """The log's own session; used by `sessions.rule = "source_session_id"`."""
    exposed_with: Column | None = None
    """The items that were shown with the event."""
    value: Column | None = None
    """A number, such as a rating or a quantity; read by conditions of `[feedback]`."""
    event_id: Column | None = None
    """The log's own id of the event. Without it, the id is a hash of all mapped columns."""
    tie_break: TieColumn | None = None
    """A whole number that orders events of one user and time. `{ order = "file" }`: they are in the
    order of file name and line; of an event that came several times, of the first of these."""

    def mapped(self) -> dict[str, str]:
        """Our name -> the log's name, or the expression, for the columns that are mapped;
        `event_ts_2` is the second of two columns of the time."""
        return self.named() | self.expressions()

    def named(self) -> dict[str, str]:
        """Our name -> the log's name, for the columns that are not computed."""
        found: dict[str, str] = {}
        for ours, said in self:
            if isinstance(said, list):
                found |= {ours: said[0], f"{ours}_2": said[1]}
            elif isinstance(said, str):
                found[ours] = said
            elif isinstance(said, Computed) and said.key is not None:
                found[ours] = f"{said.of}[{said.key}]"
        return found

    def expressions(self) -> dict[str, str]:
        """Our name -> the expression, for the columns that are computed."""
        return {
            ours: said.sql
            for ours, said in self
            if isinstance(said, Computed) and said.sql is not None
        }

    @property
    def file_order(self) -> bool:
        """Whether events of one user and time are in the order of their files."""
        return isinstance(self.tie_break, FileOrder)


def _unit(value: object) -> object:
    if isinstance(value, list):
        if not value or len(set(map(str, value))) < len(value):
            raise ValueError("write one or more units, each once")
        return [_unit(one) for one in value]
    if isinstance(value, str) and value not in NUMERIC_UNITS and value != "iso8601":
        if not re.search("[yu]", value) or not re.search("[dD]", value):
            raise ValueError(
                "use s, ms, us (a number since 1970), iso8601, or a pattern with year and day "
                "such as 'yyyy-MM-dd HH:mm:ss'"
            )
        unknown = set(re.sub(r"'[^']*'", "", value)) & set("ABCIJKLNOPQRTUWYbceijlnopqrtuvw") - set(
            "Lu"
        )
        if unknown:
            raise ValueError(
                f"pattern letter {sorted(unknown)[0]!r} is not understood: y M d H h m s S a "
                "for the parts, E for the weekday, X x Z z V for the zone, texts in single quotes"
            )
        letters = re.sub(r"'[^']*'", "", value)
        if "D" in letters and "M" in letters:
            raise ValueError("D is the day of the year: write d for the day of the month")
        if "d" in letters and not set("ML") & set(letters):
            raise ValueError("m is the minute: write M for the month")
        if "h" in letters and "a" not in letters:
            raise ValueError(
                "h is the hour from 1 to 12 and needs a (AM or PM): write H for 0 to 23"
            )
    return value


class TimePart(Part):
    """How the log writes time."""

    unit: Annotated[str | list[str], BeforeValidator(_unit)] = "iso8601"
    """`s`, `ms` or `us`: a number since 1970. `iso8601`: YYYY-MM-DD, then nothing, or T or a blank
    and HH:MM, HH:MM:SS or HH:MM:SS.fff, then nothing, Z, or an offset such as +02:00. Otherwise a
    pattern such as `yyyy-MM-dd HH:mm:ss`. Of a list of units, a time is read by the first that
    it fits; a number fits one of several numeric units if it lies in the years 1985 to 2100. The
    default of web servers' logs is `dd/MMM/yyyy:HH:mm:ss Z`."""
    offset: Literal["s", "ms", "us"] | None = None
    """Where `event_ts` names two columns: the unit of the second, a number that is added to the
    time in the first."""
    zone: Zone = "UTC"
    """Time zone of times that are written without one. Numbers since 1970 are UTC by definition."""
    any_year: StrictBool = False
    """Times of any year are right. Without it, a run stops before it writes anything where most times
    of a file would be of 1970 or of a far future, and another unit puts them into the years 1973 to
    2286: `unit` is probably wrong by a factor of 1,000."""

    @property
    def units(self) -> list[str]:
        return [self.unit] if isinstance(self.unit, str) else self.unit

    @property
    def numeric_unit(self) -> str | None:
        """The unit in which all times are numbers, if there is one."""
        one = self.units[0]
        return one if len(self.units) == 1 and one in NUMERIC_UNITS else None

    @staticmethod
    def pattern_has_zone(unit: str) -> bool:
        return bool(re.search("[XxZzVO]", re.sub(r"'[^']*'", "", unit)))


class FeedbackPart(Part):
    """What an event says of its item: event types, or conditions on `value` such as `value >= 4`.

    They are tried in the order negative, positive, exposed."""

    positive: list[str] | None = None
    """The user chose the item. By default every event that is not negative or exposed; with a list,
    events that are in none of the three are neutral."""
    negative: list[str] = []
    """The user rejected the item."""
    exposed: list[str] = []
    """The item was only shown."""

    @model_validator(mode="after")
    def _conditions_parse(self) -> FeedbackPart:
        for entry in self.entries():
            if re.match(r"\s*value\s*[<>=!]", entry) and not CONDITION.match(entry):
                raise ValueError(
                    f"condition {entry!r} is not understood: write 'value >= 4' with one of "
                    ">= <= > < == !="
                )
        return self

    def entries(self) -> list[str]:
        return entries(dict(self))

    def uses_value(self) -> bool:
        return uses_value(dict(self))


LINKS = ("link_1", "link_2", "link_3")
"""What we call the log's columns that `[exposures]` matches by."""


class ExposuresPart(Part):
    """A second file of what was shown, matched by columns that the log has, too."""

    landing: str = Field(min_length=1)
    """The files, as in `[source]`."""
    format: Literal["csv", "jsonl", "parquet"]
    """How the files are written."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Separates the columns of a CSV file."""
    item_id: ColumnName
    """The column that has the id of the item that was shown."""
    match: dict[ColumnName, ColumnName] = Field(min_length=1, max_length=len(LINKS))
    """The log's column = this file's column. They match if their texts are equal."""
    prominence: dict[ColumnName, list[str]] = {}
    """This file's column = its values, the most prominent first: decides which exposures are
    kept."""
    most: int = Field(default=20, ge=1, le=1000)
    """How many exposures of one match are kept, at most."""

    def mapped(self) -> dict[str, str]:
        """Our name -> the log's name, of the columns to match by."""
        return dict(zip(LINKS, self.match, strict=False))


def field_of(ours: str) -> str:
    """The field of a source file that maps this column of ours, or (`field:column`) reads one of the
    log's."""
    if ours == "event_ts_2":
        return "columns.event_ts"
    if ":" in ours:
        return ours.partition(":")[0]
    if ours in LINKS:
        return "exposures.match"
    return f"identity.{ours}" if ours == "anonymous_id" else f"columns.{ours}"


class LinkTable(Part):
    """Files that say which anonymous id is which user, and since when."""

    landing: str = Field(min_length=1)
    """The files, as in `[source]`, without `{day}`. All of them are read in every run."""
    format: Literal["csv", "jsonl", "parquet"]
    """How the files are written."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Separates the columns of a CSV file."""
    anonymous_id: ColumnName
    """The column that has the anonymous id."""
    user_id: ColumnName
    """The column that has the user."""
    since: ColumnName
    """The column that has the time since when."""
    unit: Literal["s", "ms", "us", "iso8601"] = "iso8601"
    """How times are written, as in `[time]`."""
    zone: Zone = "UTC"
    """Time zone of times that are written without one."""

    @model_validator(mode="after")
    def _no_days(self) -> LinkTable:
        if "{day" in self.landing:
            raise ValueError(
                f"identity.link.landing = {self.landing!r}: all of its files are read, so {{day}} is not "
                "allowed. Write * in its place"
            )
        return self


class IdentityPart(Part):
    """Who acted before logging in. Sessions and sequences are those of a person: the user where the
    log says who it is, else the user that the anonymous id belongs to, else the anonymous id."""

    anonymous_id: ColumnName
    """The column that has the id of a device or browser, such as a cookie."""
    user_id: ColumnName | None = None
    """The column that has the user once known: another way to write `columns.user_id`."""
    link: Annotated[
        Annotated[Literal["last", "first"], Tag("word")] | Annotated[LinkTable, Tag("table")],
        Discriminator(lambda value: "word" if isinstance(value, str) else "table"),
    ] = "last"
    """Whose events without a user are. `last`: of the user who logged in last with the anonymous id
    before the event or at its time; before any login, of the first one who did. `first`: always of
    the first one who did. A table `{ landing, format, delimiter, anonymous_id, user_id, since, unit,
    zone }`: files say it, and logins do not."""
    max_days: float | None = Field(default=None, gt=0, le=36_500)
    """How many days before the first login events still get its user. Without it, all do."""

    def rule_text(self) -> str:
        """The rule as stored with `silver.events`."""
        link = self.link if isinstance(self.link, str) else "table"
        return json.dumps({"link": link, "max_days": self.max_days}, sort_keys=True)
