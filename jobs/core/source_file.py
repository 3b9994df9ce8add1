"""A source is a file, not code: reads `infra/sources/<name>.toml` and checks it.

Imports pydantic and the standard library only: DAG files read sources too.
A mistake is reported with the field, the value and the remedy before Spark starts.

Decision 14 in docs/design/decisions.md.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from zoneinfo import available_timezones

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    StrictBool,
    Tag,
    ValidationError,
    model_validator,
)

from expectations.feedback_rule import CONDITION, entries, uses_value
from jobs.core.errors import SourceError
from jobs.core.settings import settings

if TYPE_CHECKING:
    from expectations.behaviour_rule import BehaviourRule
    from expectations.session_rule import SessionRule

COMBINED_LOG_COLUMNS = (
    "host", "user", "time", "method", "path", "status", "bytes", "referrer", "user_agent",
)  # fmt: skip
TYPED = ("parquet", "orc", "avro", "delta")
"""Formats whose columns have types; their rows have no text of their own."""
LOG_COLUMNS = {
    "combined_log": COMBINED_LOG_COLUMNS,
    "vhost_combined": ("vhost", "port", *COMBINED_LOG_COLUMNS),
}
"""The columns of web servers' logs, by format."""
COMBINED_LOG_NUMBERS = ("status", "bytes")
"""Columns of a combined log that are numbers in expressions."""
COMBINED_LOG_TIME = "dd/MMM/yyyy:HH:mm:ss Z"
NUMERIC_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
MIN_NIGHTS = 7  # ours: before, what is usual is not known
NULL_VALUES = ("",)
"""Texts that mean nothing in every column, unless `null_values` names others."""
NULL_IDS = (
    "NULL", "Null", "null", "\\N", "None", "none", "NONE", "nan", "NaN", "NAN", "undefined", "<NA>",
    "N/A", "n/a",
)  # fmt: skip
"""What databases, Python, pandas and JavaScript write for nothing. Words that may be ids (NA, nil,
unknown, 0) are not among them."""


SIDES = ("prev", "next")
"""What an event and the one after it are called in `sessions.boundary`."""
BOUNDARY_VALUES = "boundary_values"
"""The column that has what `sessions.boundary` reads of the log's columns."""
BOUNDARY_OURS = {
    "event_id", "event_ts", "item_id", "feedback", "event_type", "value", "tie_break",
    "source_session_id", "exposed_with",
}  # fmt: skip
"""Columns of ours that it may read. The first four every event has, the others where they are mapped."""
ALWAYS_THERE = {"event_id", "event_ts", "item_id", "feedback"}


class Part(BaseModel):
    """A section. The text under a key is its meaning, as docs/reference/source-file.md prints it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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


class SourcePart(Part):
    """Where the log is and how it is written."""

    name: Annotated[str, BeforeValidator(_name)]
    """Names the source's folder, DAGs and registered model: a letter, then up to 62 letters,
    digits, `_` or `-`."""
    landing: str = Field(min_length=1)
    """The files of the log, as a glob. `{day}` stands for a date, `{day:%Y/%m/%d}` for one in
    another form."""
    format: Literal[
        "csv", "jsonl", "json", "parquet", "orc", "avro", "delta", "combined_log", "vhost_combined",
        "w3c",
    ]  # fmt: skip
    """How the files are written. `jsonl` has an object in each line; `json` has objects over many
    lines, in arrays or one after another. `combined_log` is the access log of web servers; with
    `vhost_combined` each of its lines begins with the server's name and port. `w3c` is the extended
    log of IIS and CloudFront, whose columns are in lines of `#Fields`. With `delta`, `landing` is
    the folder of a Delta table: rows that were added since the last run are read."""
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
        if self.redelivery == "replace" and self.format == "delta":
            raise ValueError(
                "source.redelivery = 'replace' is for files that are written again, and the data files of a "
                "Delta table never are: leave it out"
            )
        for name in ("quote", "escape"):
            mark = given[name]
            if mark and (mark in "\r\n" or mark in self.delimiter):
                raise ValueError(
                    f"source.{name} = {mark!r} is a line end or part of source.delimiter = "
                    f"{self.delimiter!r}: name another character"
                )
        return self


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


def _zone(value: object) -> object:
    if isinstance(value, str) and value not in available_timezones():
        near = difflib.get_close_matches(value, available_timezones(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "use a name such as 'Europe/Paris'"
        raise ValueError(f"no such time zone: {hint}")
    return value


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
    zone: Annotated[str, BeforeValidator(_zone)] = "UTC"
    """Time zone of times that are written without one. Numbers since 1970 are UTC by definition."""

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


class SessionsPart(Part):
    """Where one session ends and the next begins."""

    rule: Literal["gap", "source_session_id"] = "gap"
    """`gap`: a silence ends a session. `source_session_id`: the log's own sessions; a silence
    decides between events that have none."""
    gap_s: float = Field(default=1800, gt=0, le=10 * 366 * 86400)
    """A silence of more than this many seconds ends a session; exactly this many do not."""
    lateness_days: int = Field(default=30, ge=0)
    """With `--day D`, events dated before D minus this many days are rejected as late."""
    max_session_hours: float = Field(default=24, gt=0)
    """Longer sessions are flagged as runaway: kept in silver, left out of gold."""
    on_max_hours: Literal["flag", "split"] = "flag"
    """What happens to sessions longer than `max_session_hours`. `flag`: they are runaway. `split`: they
    are cut into pieces, counted from the first event: the first has the events up to
    `max_session_hours` after it, the second those up to twice that, and so on."""
    max_session_events: int = Field(default=5000, ge=1)
    """Sessions with more events are flagged as runaway, too."""
    native_gap: StrictBool = False
    """Under `rule = "source_session_id"`, whether a silence of more than `gap_s` also ends a session
    of the log."""
    boundary: str | None = Field(default=None, min_length=1)
    """An SQL condition (DuckDB's dialect) on an event, `next`, and the one before it, `prev`, such as
    `prev.event_type = 'logout'` or `prev.campaign <> next.campaign`. Where it is true, a session
    begins at `next`. `event_ts`, `item_id`, `event_type` and the like are our columns; other names are
    columns of the log, which are texts unless `[source] types` says otherwise."""
    midnight: Annotated[str, BeforeValidator(_zone)] | None = None
    """A time zone, such as `Europe/Amsterdam`, whose midnight ends sessions: events on different days
    there are in different sessions. By default midnight ends none."""
    _bots: BotsPart | None = PrivateAttr(default=None)

    @property
    def gap_us(self) -> int:
        return round(self.gap_s * 1_000_000)

    @property
    def max_session_us(self) -> int:
        return round(self.max_session_hours * 3_600_000_000)

    @property
    def session_rule(self) -> SessionRule:
        from expectations.session_rule import SessionRule  # (needs NumPy; DAG files do not)

        return SessionRule(
            native=self.rule != "gap", gap_us=self.gap_us, max_session_us=self.max_session_us,
            max_session_events=self.max_session_events, behaviour=self.behaviour,
            native_gap=self.native_gap, midnight=self.midnight, split=self.on_max_hours == "split",
            boundary=self.boundary is not None,
        )  # fmt: skip

    @property
    def behaviour(self) -> BehaviourRule | None:
        """What [bots] says of sessions (`Source` gives it)."""
        return None if self._bots is None else self._bots.behaviour

    def rule_text(self) -> str:
        """The rule, as far as this section says it."""
        rule: dict[str, Any] = {
            "rule": self.rule,
            "gap_us": self.gap_us,
            "max_session_us": self.max_session_us,
            "max_session_events": self.max_session_events,
        }
        return json.dumps(rule | self.more_rules() | self._rules_of_behaviour(), sort_keys=True)

    def more_rules(self) -> dict[str, Any]:
        """The keys of later versions that are not their default, as they are stored with tables and
        models: those of earlier versions have none."""
        names = ("on_max_hours", "native_gap", "midnight", "boundary")
        said = {name: getattr(self, name) for name in names}
        return {n: one for n, one in said.items() if one != type(self).model_fields[n].default}

    def _rules_of_behaviour(self) -> dict[str, Any]:
        """What a rule text says of sessions of programs: without such keys nothing, as in the texts of
        earlier versions."""
        return (
            {} if self.behaviour is None else {k: v for k, v in vars(self.behaviour).items() if v}
        )


class BotsPart(Part):
    """What programs did: lines, by their user agent (by the list of the package `crawler-user-agents`,
    whose version `ops.runs` has, and by own patterns), and sessions, by their pace."""

    user_agent: ColumnName | None = None
    """The log's column that has the user agent. Lines without one are kept. By default no line is
    looked at."""
    policy: Literal["filter", "flag"] = "filter"
    """What happens to lines of bots. `filter`: they are left out and counted as `filtered`. `flag`: they
    are events like others, and their ids are in `bronze.flags`."""
    patterns: list[Pattern] = []
    """More regular expressions; a user agent that has a match of one is a bot's."""
    events_per_minute: int | None = Field(default=None, ge=1)
    """A session with more events than this in some sixty seconds is flagged: its `runaway` is `rate`. It is
    kept in silver and left out of gold, as other runaway sessions are."""
    events_without_pause: int | None = Field(default=None, ge=1)
    """A session in which more events than this follow each other without a pause is flagged: its `runaway`
    is `no_pause`."""
    pause_s: float = Field(default=30, gt=0, le=10 * 366 * 86400)
    """A pause is longer than this many seconds."""

    @model_validator(mode="after")
    def _says_how(self) -> BotsPart:
        given = self.model_fields_set
        paces = (self.events_per_minute, self.events_without_pause)
        if self.user_agent is None and paces == (None, None):
            raise ValueError(
                "[bots] does not say how bots are recognised: name the column of the user agent "
                "(user_agent), or set events_per_minute or events_without_pause"
            )
        for name in ("policy", "patterns"):
            if self.user_agent is None and name in given:
                raise ValueError(
                    f"bots.{name} = {getattr(self, name)!r} is about user agents: name their column "
                    "(bots.user_agent), or leave it out"
                )
        if self.events_without_pause is None and "pause_s" in given:
            raise ValueError(
                f"bots.pause_s = {self.pause_s:g} needs bots.events_without_pause: how many events without "
                "such a pause are too many"
            )
        return self

    @property
    def behaviour(self) -> BehaviourRule | None:
        """How sessions of programs are recognised; None: they are not."""
        from expectations.behaviour_rule import BehaviourRule  # (needs NumPy; DAG files do not)

        if self.events_per_minute is None and self.events_without_pause is None:
            return None
        pause_us = 0 if self.events_without_pause is None else round(self.pause_s * 1_000_000)
        return BehaviourRule(
            events_per_minute=self.events_per_minute,
            events_without_pause=self.events_without_pause,
            pause_us=pause_us,
        )


class QualityPart(Part):
    """How many unusable lines are too many, and what happens then.

    Late lines are usable. A run without a usable line exceeds every share.
    """

    max_reject_share: float = Field(default=0.5, ge=0, le=1)
    """The share of a run's lines that may be unusable."""
    on_exceed: Literal["warn", "fail"] = "fail"
    """`fail`: the run fails and stores the rejected lines only. `warn`: the usable lines are loaded
    with a warning (the default of version 0.1.0)."""


class FiltersPart(Part):
    """What models are trained on. Silver and gold keep everything.

    The filters are applied once each, in this order."""

    min_item_events: int = Field(default=5, ge=1)
    """Items with fewer training events are left out."""
    min_session_events: int = Field(default=1, ge=1)
    """Sessions with fewer training events are left out."""
    min_user_sessions: int = Field(default=2, ge=1)
    """Users with fewer training sessions are left out."""


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
    zone: Annotated[str, BeforeValidator(_zone)] = "UTC"
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


class GatePart(Part):
    """What a model must show before it becomes the champion."""

    margin: float = Field(default=0.0, ge=0, lt=1)
    """The lower end of the interval of the difference in NDCG@10 must be above this."""
    min_users: int = Field(default=100, ge=2)
    """With fewer users in the test period the model is refused: an interval says little."""
    min_coverage: float = Field(default=0.0, ge=0, le=1)
    """The smallest share of the vocabulary that is in some user's list of ten."""
    max_latency_ms: float = Field(default=50.0, gt=0)
    """The largest 99th percentile of the time to answer for one user, in process, in
    milliseconds."""


def _cron(value: object) -> object:
    field = r"[\d*,/#LW?A-Za-z-]+"
    forms = rf"never|@[a-z]+|{field}(\s+{field}){{4}}"
    if isinstance(value, str) and not re.fullmatch(forms, value):
        raise ValueError("use five fields such as '0 2 * * *', or 'never'")
    return value


class TrainingPart(Part):
    """What the scheduled DAG trains after a night."""

    methods: list[str] = ["pop", "personal_top", "gru4rec", "gru4rec+st", "bert4rec", "bert4rec+st"]
    """The methods that are trained and compared."""
    target: Literal["next_item", "next_session"] = "next_item"
    """What is predicted: the next item, or the set of items of the next session."""
    split: Literal["temporal", "nightly", "last_session", "last_item"] | None = None
    """What methods are evaluated on. `nightly`: each of the last nights (UTC days), with a model that
    was trained on everything before it. `temporal`: the newest tenth of the log. `last_session`,
    `last_item`: each user's last session or event. The default is `nightly` where the log has five
    nights or more, else `temporal`."""
    preset: str = "small"
    """How large the models are and how long they are trained."""
    train_until: Literal["validation", "test"] = "validation"
    """The period of the log before which training rows and vocabulary end. `test`: once the best
    epoch is known, every method is trained again with the validation period, for as many epochs. Not
    used under `split = "nightly"`, which trains on everything before each night."""
    seeds: list[int] = [1]
    """Every method is trained once with each seed; baselines once."""
    tuned: StrictBool = False
    """Whether every method is trained by its newest recipe (`python -m models tune`). A method that
    could be tuned and has no recipe ends the run before anything is trained."""
    nightly: bool = False
    """Whether every night with new sequences trains and compares all methods; otherwise only `cron`
    does, and between its runs refits keep what is served fresh."""
    refit: StrictBool = True
    """Whether the champion's recipe is trained on every night's events before lists are made."""
    cron: Annotated[str, BeforeValidator(_cron)] = "0 6 * * 0"
    """When methods are also trained, UTC, unless they were trained on the newest sequences
    already: five fields, a preset such as `@daily`, or `never`."""
    deadline_hours: float = Field(default=24.0, gt=0, le=1000)
    """The webhook reports a training as late if it has not ended this long after it was due."""


class ServingPart(Part):
    """Rules for the lists that users get, and when these are worth too little. Rules hold inside a
    list: it is filled up with the next best items that they allow."""

    where: str | None = Field(default=None, min_length=1)
    """An SQL condition on the columns of `gold.items` and the catalogue's attributes, by their
    names, such as `in_stock = 'true' and price < 20`. Only items of which it is true are listed.
    Categories are texts; names are case sensitive; names with blanks are in double quotes."""
    exclude_seen_days: float | None = Field(default=None, gt=0, le=36_500)
    """Items that the user had an event with in so many days before the newest event of all (in a
    request: before its time) are not listed."""
    max_per_category: int | None = Field(default=None, ge=1)
    """How many items of one category a list may have. Items without a category are not counted."""
    category: ColumnName | None = None
    """The attribute of the catalogue that `max_per_category` counts by."""
    block_list: str | None = Field(default=None, min_length=1)
    """A file with one item id a line, UTF-8. These items are not listed."""
    nights: int = Field(default=3, ge=1, le=366)
    """The webhook gets a message when the lists were worth less than counting in so many nights
    in a row."""
    deadline_hours: float = Field(default=8.0, gt=0, le=1000)
    """The webhook reports lists as late if they have not been made this long after they were due."""

    @model_validator(mode="after")
    def _counts_by_something(self) -> ServingPart:
        if self.max_per_category is not None and self.category is None:
            raise ValueError(
                f"max_per_category = {self.max_per_category} needs category: name the attribute of "
                "the catalogue that it counts by"
            )
        if self.category is not None and self.max_per_category is None:
            raise ValueError(
                f"category = {self.category!r} needs max_per_category: how many items of one "
                "category a list may have"
            )
        return self

    @property
    def has_rules(self) -> bool:
        rules = (self.where, self.exclude_seen_days, self.max_per_category, self.block_list)
        return any(one is not None for one in rules)


class LandingPart(Part):
    """Files of the landing that are still being written."""

    partial_line_hours: float = Field(default=1.0, ge=0, le=1000)
    """A last line without a line end waits until its file was not modified for so many hours, and
    is then read as it is. It is counted as `waiting`, and is no line that was read. 0: it is
    read at once. Compressed files and Parquet end whole, and nothing of them waits."""


class PrivacyPart(Part):
    """What of a person reaches the tables."""

    hash_user_id: StrictBool = False
    """User ids are hashed with a key (SESSIONMILL_ID_KEY) as they are read, and only the mapped
    columns of rejected lines are kept."""


class DriftPart(Part):
    """When a night differs from the nights before it, and what happens then."""

    policy: Literal["warn", "stop", "off"] = "warn"
    """`stop`: the night's tables are kept, but nothing is trained or scored on them until a person
    has looked. `off`: drift is not checked."""
    nights: int = Field(default=28, ge=MIN_NIGHTS, le=366)
    """How many nights before it are compared."""
    factor: float = Field(default=2.0, gt=1)
    """Events, users and sessions drift if there are this many times the usual number, or fewer than
    the usual number divided by this."""
    new_items: float = Field(default=0.1, gt=0, le=1)
    """How far the share of items never seen before may be from the usual share."""
    psi: float = Field(default=0.25, gt=0)
    """The largest population stability index of the pauses between events, against the nights
    before."""


class SchedulePart(Part):
    """When the night runs."""

    cron: Annotated[str, BeforeValidator(_cron)] = "0 2 * * *"
    """Five fields, UTC, a preset such as `@daily`, or `never`: by hand only."""
    start: date | None = None
    """The first day that the schedule catches up from. Without it, there is no catch-up."""
    wait_hours: float = Field(default=4.0, ge=0, le=1000)
    """Where `landing` has `{day}`, a night waits this long for its day's first file; 0: not at
    all."""
    deadline_hours: float = Field(default=8.0, gt=0, le=1000)
    """The webhook reports a night as late if it has not ended this long after it was due."""


class Source(Part):
    """One source file, checked."""

    source: SourcePart
    landing: LandingPart = LandingPart()
    columns: ColumnsPart
    time: TimePart = TimePart()
    feedback: FeedbackPart = FeedbackPart()
    sessions: SessionsPart = SessionsPart()
    bots: BotsPart | None = None
    quality: QualityPart = QualityPart()
    filters: FiltersPart = FiltersPart()
    items: ItemsPart | None = None
    exposures: ExposuresPart | None = None
    identity: IdentityPart | None = None
    training: TrainingPart = TrainingPart()
    gate: GatePart = GatePart()
    schedule: SchedulePart = SchedulePart()
    drift: DriftPart = DriftPart()
    serving: ServingPart = ServingPart()
    privacy: PrivacyPart = PrivacyPart()

    @property
    def name(self) -> str:
        return self.source.name

    def mapped(self) -> dict[str, str]:
        """Our name -> the log's name, for all columns that are read."""
        return self.named() | self.columns.expressions()

    def named(self) -> dict[str, str]:
        """Our name -> the log's name, for the columns that are not computed."""
        found = self.columns.named() | (self.exposures.mapped() if self.exposures else {})
        who = self.identity
        if who is not None:
            found |= {"anonymous_id": who.anonymous_id}
            found |= {"user_id": who.user_id} if who.user_id else {}
        return found

    @property
    def leaves_out(self) -> bool:
        """Whether lines are left out by `keep` or `[bots]`."""
        bots = self.agents is not None and self.agents.policy == "filter"
        return self.source.keep is not None or bots

    @property
    def agents(self) -> BotsPart | None:
        """[bots], where it tells lines by their user agent."""
        return self.bots if self.bots is not None and self.bots.user_agent is not None else None

    @property
    def computes(self) -> bool:
        """Whether something happens to the log's columns before they are ours."""
        filters = self.source.keep is not None or self.agents is not None
        more = self.source.explode is not None or self.boundary_reads_log
        return bool(self.columns.expressions()) or filters or more

    def boundary_columns(self) -> set[str]:
        """Our columns that `sessions.boundary` may name; every other name is a column of the log."""
        mapped = {name for name, said in self.columns if said is not None}
        mapped |= {"exposed_with"} if self.exposures is not None else set()
        return ALWAYS_THERE | (BOUNDARY_OURS & mapped)

    @property
    def boundary_reads_log(self) -> bool:
        """Whether `sessions.boundary` may name columns of the log that are not ours."""
        found = re.findall(
            r"\b(?:prev|next)\b(?:\.(\w+)(?![\w.]))?", self.sessions.boundary or "", re.I
        )
        return not self.boundary_columns().issuperset(found)

    def session_rule_text(self) -> str:
        """The rule as stored with `silver.sessions`: a table made by another one is not touched."""
        rule = json.loads(self.sessions.rule_text())
        if self.sessions.boundary is not None:
            named = {one for one in self.source.types if one in self.sessions.boundary}
            rule["boundary_types"] = {one: self.source.types[one] for one in sorted(named)}
        return json.dumps(rule, sort_keys=True)

    @model_validator(mode="before")
    @classmethod
    def _web_servers_agree_on_time(cls, file: Any) -> Any:
        match file:
            case {"source": {"format": "combined_log" | "vhost_combined"}, **rest}:
                time = rest.get("time", {})
                if isinstance(time, dict):
                    return file | {"time": {"unit": COMBINED_LOG_TIME} | time}
        return file

    @model_validator(mode="after")
    def _sessions_know_of_bots(self) -> Source:
        if self.bots is not None:  # (a part that is not given is shared by all sources)
            self.__dict__["sessions"] = self.sessions.model_copy()
            self.sessions._bots = self.bots
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> Source:
        columns = self.columns
        self._names_the_user_once()
        if self.sessions.rule == "source_session_id" and columns.source_session_id is None:
            raise ValueError(
                "sessions.rule = 'source_session_id' needs columns.source_session_id: name the "
                "log's session column, or use rule = 'gap'"
            )
        if self.sessions.native_gap and self.sessions.rule == "gap":
            raise ValueError(
                "sessions.native_gap = true is for sessions.rule = 'source_session_id'. Here rule = "
                "'gap', under which a silence always ends a session: leave native_gap out"
            )
        if self.feedback.uses_value() and columns.value is None:
            raise ValueError(
                "feedback names `value`, but columns.value is not mapped: name the log's column"
            )
        typed = [entry for entry in self.feedback.entries() if not CONDITION.match(entry)]
        if typed and columns.event_type is None:
            raise ValueError(
                f"feedback names the event type {typed[0]!r}, but columns.event_type is not "
                "mapped: name the log's column"
            )
        if self.exposures is not None and columns.exposed_with is not None:
            raise ValueError(
                f"columns.exposed_with = {columns.exposed_with!r} and [exposures] both say what was "
                "shown: leave one of them out"
            )
        self._category_is_one_of_the_catalogue()
        self._times_are_of_one_form()
        self._explode_keys_agree()
        if known := LOG_COLUMNS.get(self.source.format):
            for ours, theirs in self.named().items():
                if theirs not in known and self.source.explode is None:
                    raise ValueError(
                        f"{field_of(ours)} = {theirs!r}: a {self.source.format} has no such "
                        f"column: use one of {', '.join(known)}"
                    )
        if self.source.format == "csv" and not self.source.header:
            for ours, theirs in self.named().items():
                if not re.fullmatch(r"_\d+", theirs) and self.source.explode is None:
                    raise ValueError(
                        f"{field_of(ours)} = {theirs!r}: without a header columns are named _0, _1, …"
                    )
        return self

    def _times_are_of_one_form(self) -> None:
        two, time = isinstance(self.columns.event_ts, list), self.time
        if time.offset and not two:
            raise ValueError(
                f"time.offset = {time.offset!r} is the unit of a second column: name two under "
                "columns.event_ts, or leave it out"
            )
        number = next((one for one in time.units if one in NUMERIC_UNITS), None)
        if two and number and not time.offset:
            raise ValueError(
                f"columns.event_ts = {self.columns.event_ts!r} are joined by a blank, which is not a "
                f"number (time.unit = {number!r}): set time.offset to the unit of the second column, "
                "or time.unit to a pattern for both"
            )

    def _names_the_user_once(self) -> None:
        ours, who = self.columns.user_id, self.identity
        theirs = None if who is None else who.user_id
        if ours is None and theirs is None:
            raise ValueError("columns.user_id is missing: add it under [columns]")
        if ours and theirs and ours != theirs:
            raise ValueError(
                f"columns.user_id = {ours!r} and identity.user_id = {theirs!r} both name the user: "
                "leave one of them out"
            )
        if who is not None and who.anonymous_id == (ours or theirs):
            raise ValueError(
                f"identity.anonymous_id = {who.anonymous_id!r} is the column of the user, too: name "
                "the column that is there before anybody logs in"
            )

    def _category_is_one_of_the_catalogue(self) -> None:
        category = self.serving.category
        known = [] if self.items is None else self.items.categories
        if category is not None and category not in known:
            there = f"known are {', '.join(known)}" if known else "there are none"
            raise ValueError(
                f"serving.category = {category!r} is not one of items.categories: {there}; add it "
                "there, or name another"
            )

    def _explode_keys_agree(self) -> None:
        one = self.source
        if one.explode is None and (one.explode_separator or one.explode_pattern):
            key = "explode_separator" if one.explode_separator else "explode_pattern"
            raise ValueError(f"source.{key} needs source.explode: name the column that is a list")
        if one.explode_pattern is not None and one.explode_separator is None:
            raise ValueError(
                "source.explode_pattern needs source.explode_separator: set it to what separates "
                "the elements"
            )
        if one.keep_filtered and not self.leaves_out:
            raise ValueError(
                "source.keep_filtered = true, but nothing is left out: write source.keep or [bots]"
            )

    def digest(self) -> str:
        """Names what the file says: two runs by different source files differ in it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


def _explain(error: dict[str, Any], raw: dict[str, Any], path: Path) -> str:
    """One pydantic error as: file, field, value, remedy."""
    where = [str(part) for part in error["loc"]]
    if len(where) > 2 and where[0] == "columns" and where[2] in FORMS:
        del where[2]
    field = ".".join(where)
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "missing" and len(where) == 1:
        return f"{path}: [{field}] is missing: add the section with its keys"
    if kind == "missing":
        return f"{path}: {field} is missing: add it under [{where[0]}]"
    if kind == "model_type":
        return (
            f"{path}: {field} = {error['input']!r}: {field} is a section: write [{field}], and its "
            "keys under it"
        )
    if kind == "extra_forbidden":
        part: Any = Source
        for step in where[:-1]:
            if part is ColumnsPart:
                part = Computed
                continue
            kind_of = part.model_fields[step].annotation
            # A section that may be left out is `Part | None`.
            part = next((one for one in get_args(kind_of) if one is not type(None)), kind_of)
        known = list(part.model_fields)
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"{path}: {field} is not a field: {hint}"
    value = error.get("input")
    shown = "" if not where or isinstance(value, dict | BaseModel) else f" = {value!r}"
    return f"{path}: {field}{shown}: {message}" if field else f"{path}: {message}"


def source_path(name_or_path: str) -> Path:
    """The file that `--source` means: a path, or a name in the sources folder."""
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        return Path(name_or_path)
    return Path(settings().sources) / f"{name_or_path}.toml"


def load_source(name_or_path: str) -> Source:
    """Read and check a source file.

    Raises:
        SourceError: with every mistake of the file, one a line.
    """
    path = source_path(name_or_path)
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.toml"))
        near = difflib.get_close_matches(path.stem, there, n=1)
        hint = (
            f"did you mean {near[0]!r}? " if near else ""
        ) + f"source files there: {', '.join(there) or 'none'}"
        raise SourceError(
            f"--source {name_or_path}: {path} does not exist ({hint}). Write it: "
            "`python -m jobs guess FILE` prints a first one for a log"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not valid TOML: {error}") from None
    try:
        return Source.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(one), raw, path) for one in error.errors()]
        raise SourceError("\n".join(lines)) from None
