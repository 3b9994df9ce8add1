"""A source is a file, not code: reads `infra/sources/<name>.toml` and checks it.

Imports pydantic and the standard library only: DAG files read sources too.
A mistake is reported with the field, the value and the remedy before Spark starts.
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
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from jobs.core.errors import SourceError
from jobs.core.settings import settings

if TYPE_CHECKING:
    from expectations.session_rule import SessionRule

COMBINED_LOG_COLUMNS = (
    "host", "user", "time", "method", "path", "status", "bytes", "referrer", "user_agent",
)  # fmt: skip
COMBINED_LOG_TIME = "dd/MMM/yyyy:HH:mm:ss Z"
CONDITION = re.compile(r"^\s*value\s*(>=|<=|>|<|==|!=)\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*$")
NUMERIC_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
MIN_NIGHTS = 7  # ours: before, nobody knows what is usual
NULL_IDS = (
    "NULL", "Null", "null", "\\N", "None", "none", "NONE", "nan", "NaN", "NAN", "undefined", "<NA>",
    "N/A", "n/a",
)  # fmt: skip
"""What databases, Python, pandas and JavaScript write for nothing. Words that may be ids (NA, nil,
unknown, 0) are not among them."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _name(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,62}", value):
        raise ValueError(
            "use a letter, then up to 62 letters, digits, '_' or '-': it names a folder, DAGs and "
            "a registered model"
        )
    return value


class SourcePart(Part):
    """`[source]`: where the log lies and how it is written."""

    name: Annotated[str, BeforeValidator(_name)]
    landing: str = Field(min_length=1)
    format: Literal["csv", "jsonl", "parquet", "combined_log"]
    delimiter: str = Field(default=",", min_length=1)
    header: StrictBool = True
    null_values: list[str] | None = None
    """Texts that mean nothing, in every column. Not given: empty text, and `NULL_IDS` in `user_id`
    and `item_id`; a source whose tables were made by version 0.1.0 goes on with empty text alone."""
    encoding: str = "utf-8"
    """Of text formats; a byte-order mark is recognised and dropped."""
    list_separator: str = Field(default="|", min_length=1)
    """Separates the items of `exposed_with` where the log has them as one text."""
    on_new_column: Literal["ignore", "fail"] = "ignore"
    """What a column does that the log did not have before."""


ColumnName = Annotated[str, Field(min_length=1)]


class ColumnsPart(Part):
    """`[columns]`: theirs to ours. `a.b` reaches into nested JSON."""

    user_id: ColumnName
    item_id: ColumnName
    event_ts: ColumnName
    event_type: ColumnName | None = None
    source_session_id: ColumnName | None = None
    exposed_with: ColumnName | None = None
    value: ColumnName | None = None
    event_id: ColumnName | None = None
    tie_break: ColumnName | None = None

    def mapped(self) -> dict[str, str]:
        """Our name -> the log's name, for the columns that are mapped."""
        return {ours: theirs for ours, theirs in self if theirs is not None}


def _zone(value: object) -> object:
    if isinstance(value, str) and value not in available_timezones():
        near = difflib.get_close_matches(value, available_timezones(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "use a name such as 'Europe/Paris'"
        raise ValueError(f"no such time zone: {hint}")
    return value


def _unit(value: object) -> object:
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
            raise ValueError("h is the hour of a half day, which needs a (AM, PM): write H")
    return value


class TimePart(Part):
    """`[time]`: how the log writes time."""

    unit: Annotated[str, BeforeValidator(_unit)] = "iso8601"
    """A number since 1970 (`s`, `ms`, `us`); a pattern; or `iso8601`: YYYY-MM-DD, then nothing, or
    T or a blank and HH:MM, HH:MM:SS or HH:MM:SS.fff, then nothing, Z, or an offset such as +02:00."""
    zone: Annotated[str, BeforeValidator(_zone)] = "UTC"
    """Of times written without a zone; numbers since 1970 are UTC by definition."""

    @property
    def pattern_has_zone(self) -> bool:
        return bool(re.search("[XxZzVO]", re.sub(r"'[^']*'", "", self.unit)))


class FeedbackPart(Part):
    """`[feedback]`: event types or conditions on `value`, tried negative, positive, exposed."""

    positive: list[str] | None = None
    negative: list[str] = []
    exposed: list[str] = []

    @model_validator(mode="after")
    def _conditions_parse(self) -> FeedbackPart:
        for entry in [*(self.positive or []), *self.negative, *self.exposed]:
            if re.match(r"\s*value\s*[<>=!]", entry) and not CONDITION.match(entry):
                raise ValueError(
                    f"condition {entry!r} is not understood: write 'value >= 4' with one of "
                    ">= <= > < == !="
                )
        return self

    def uses_value(self) -> bool:
        entries = [*(self.positive or []), *self.negative, *self.exposed]
        return any(CONDITION.match(entry) for entry in entries)


class SessionsPart(Part):
    """`[sessions]`: what cuts one session from the next."""

    rule: Literal["gap", "source_session_id"] = "gap"
    gap_s: float = Field(default=1800, gt=0, le=10 * 366 * 86400)
    lateness_days: int = Field(default=30, ge=0)
    max_session_hours: float = Field(default=24, gt=0)
    max_session_events: int = Field(default=5000, ge=1)

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
            max_session_events=self.max_session_events,
        )  # fmt: skip

    def rule_text(self) -> str:
        """The rule as stored with `silver.sessions`: a table made by another one is not touched."""
        rule = {
            "rule": self.rule, "gap_us": self.gap_us, "max_session_us": self.max_session_us,
            "max_session_events": self.max_session_events,
        }  # fmt: skip
        return json.dumps(rule, sort_keys=True)


class QualityPart(Part):
    """`[quality]`: how many unusable lines are too many, and what happens then.

    Late lines are usable. A run of which no line is usable exceeds every share.
    """

    max_reject_share: float = Field(default=0.5, ge=0, le=1)
    on_exceed: Literal["warn", "fail"] = "fail"


class FiltersPart(Part):
    """`[filters]`: what models train on, never what silver and gold keep."""

    min_item_events: int = Field(default=5, ge=1)
    min_session_events: int = Field(default=1, ge=1)
    min_user_sessions: int = Field(default=2, ge=1)


class ItemsPart(Part):
    """`[items]`: a catalogue, which says how items are; each file of it has all items."""

    landing: str = Field(min_length=1)
    """Files, as of `[source]`. `{day}`: a catalogue for each day."""
    format: Literal["csv", "jsonl", "parquet"]
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    id: ColumnName
    categories: list[ColumnName] = []
    numbers: list[ColumnName] = []

    @model_validator(mode="after")
    def _says_something(self) -> ItemsPart:
        names = [*self.categories, *self.numbers]
        if not names:
            raise ValueError("name the catalogue's columns under categories, numbers, or both")
        twice = sorted({name for name in names if names.count(name) > 1 or name == self.id})
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice: a column is id, category or number")
        return self


LINKS = ("link_1", "link_2", "link_3")
"""What we call the log's columns that `[exposures]` matches by."""


class ExposuresPart(Part):
    """`[exposures]`: a second file of what was shown, found by columns that the log has too."""

    landing: str = Field(min_length=1)
    """Files, as of `[source]`."""
    format: Literal["csv", "jsonl", "parquet"]
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    item_id: ColumnName
    match: dict[ColumnName, ColumnName] = Field(min_length=1, max_length=len(LINKS))
    """The log's column -> this file's; compared as texts."""
    prominence: dict[ColumnName, list[str]] = {}
    """This file's column -> its values, the most prominent first: which exposures are kept."""
    most: int = Field(default=20, ge=1, le=1000)
    """So many of one match are kept."""

    def mapped(self) -> dict[str, str]:
        """Our name -> the log's name, of the columns to match by."""
        return dict(zip(LINKS, self.match, strict=False))


def field_of(ours: str) -> str:
    """The field of a source file that maps this column of ours."""
    return "exposures.match" if ours in LINKS else f"columns.{ours}"


class GatePart(Part):
    """`[gate]`: what a model must show before it becomes the champion."""

    margin: float = Field(default=0.0, ge=0, lt=1)
    """By how much NDCG@10 must be better at least, at the interval's lower end."""
    min_users: int = Field(default=100, ge=2)
    """Of fewer users in the test period an interval says little."""
    min_coverage: float = Field(default=0.0, ge=0, le=1)
    """The share of the vocabulary that stands in some list of ten, at least."""
    max_latency_ms: float = Field(default=50.0, gt=0)
    """One user asked in process: the 99th percentile, at most."""


def _cron(value: object) -> object:
    field = r"[\d*,/#LW?A-Za-z-]+"
    forms = rf"never|@[a-z]+|{field}(\s+{field}){{4}}"
    if isinstance(value, str) and not re.fullmatch(forms, value):
        raise ValueError("use five fields such as '0 2 * * *', or 'never'")
    return value


class TrainingPart(Part):
    """`[training]`: what the scheduled DAG trains after a night."""

    methods: list[str] = ["pop", "personal_top", "gru4rec", "gru4rec+st", "bert4rec", "bert4rec+st"]
    target: Literal["next_item", "next_session"] = "next_item"
    preset: str = "small"
    seeds: list[int] = [1]
    nightly: bool = True
    """Whether every night with new sequences trains; if not, only `cron` does."""
    cron: Annotated[str, BeforeValidator(_cron)] = "0 6 * * 0"
    """When they are trained in any case, UTC (where the newest sequences were not yet); never: only
    by nights and by hand."""
    deadline_hours: float = Field(default=24.0, gt=0, le=1000)
    """A training that has not ended so long after it was due is told to the webhook as late."""


class PrivacyPart(Part):
    """`[privacy]`: what of a person reaches the tables."""

    hash_user_id: StrictBool = False
    """User ids are hashed with a key (SESSIONMILL_ID_KEY) as they are read, and rejected lines are
    kept as their mapped columns only."""


class DriftPart(Part):
    """`[drift]`: when a night is unlike the nights before it, and what then."""

    policy: Literal["warn", "stop", "off"] = "warn"
    """stop: the night's tables stand, but nobody trains on them or scores until a person looked."""
    nights: int = Field(default=28, ge=MIN_NIGHTS, le=366)
    """So many nights before it are looked at."""
    factor: float = Field(default=2.0, gt=1)
    """Events, users, sessions: so many times the usual, or that part of it, is unusual."""
    new_items: float = Field(default=0.1, gt=0, le=1)
    """By how much the share of items never seen before may differ from the usual."""
    psi: float = Field(default=0.25, gt=0)
    """Population stability index of the pauses between events, against the nights before."""


class SchedulePart(Part):
    """`[schedule]`: when the night runs."""

    cron: Annotated[str, BeforeValidator(_cron)] = "0 2 * * *"
    start: date | None = None
    """The first day that the schedule catches up from; none: no catch-up."""
    wait_hours: float = Field(default=4.0, ge=0, le=1000)
    """Where `landing` has {day}: so long after its time a night waits for its day's first file."""
    deadline_hours: float = Field(default=8.0, gt=0, le=1000)
    """A night that has not ended so long after it was due is told to the webhook as late."""


class Source(Part):
    """One source file, checked."""

    source: SourcePart
    columns: ColumnsPart
    time: TimePart = TimePart()
    feedback: FeedbackPart = FeedbackPart()
    sessions: SessionsPart = SessionsPart()
    quality: QualityPart = QualityPart()
    filters: FiltersPart = FiltersPart()
    items: ItemsPart | None = None
    exposures: ExposuresPart | None = None
    training: TrainingPart = TrainingPart()
    gate: GatePart = GatePart()
    schedule: SchedulePart = SchedulePart()
    drift: DriftPart = DriftPart()
    privacy: PrivacyPart = PrivacyPart()

    @property
    def name(self) -> str:
        return self.source.name

    def mapped(self) -> dict[str, str]:
        """Our name -> the log's name, for all columns that are read."""
        return self.columns.mapped() | (self.exposures.mapped() if self.exposures else {})

    @model_validator(mode="before")
    @classmethod
    def _web_servers_agree_on_time(cls, file: Any) -> Any:
        match file:
            case {"source": {"format": "combined_log"}, **rest}:
                time = rest.get("time", {})
                if isinstance(time, dict):
                    return file | {"time": {"unit": COMBINED_LOG_TIME} | time}
        return file

    @model_validator(mode="after")
    def _parts_agree(self) -> Source:
        columns = self.columns
        if self.sessions.rule == "source_session_id" and columns.source_session_id is None:
            raise ValueError(
                "sessions.rule = 'source_session_id' needs columns.source_session_id: name the "
                "log's session column, or use rule = 'gap'"
            )
        if self.feedback.uses_value() and columns.value is None:
            raise ValueError(
                "feedback speaks of `value`, but columns.value is not mapped: name the log's column"
            )
        typed = [
            entry
            for entry in [*(self.feedback.positive or []), *self.feedback.negative,
                          *self.feedback.exposed]
            if not CONDITION.match(entry)
        ]  # fmt: skip
        if typed and columns.event_type is None:
            raise ValueError(
                f"feedback speaks of the event type {typed[0]!r}, but columns.event_type is not "
                "mapped: name the log's column"
            )
        if self.exposures is not None and columns.exposed_with is not None:
            raise ValueError(
                f"columns.exposed_with = {columns.exposed_with!r} and [exposures] both say what was "
                "shown: leave one of them out"
            )
        if self.source.format == "combined_log":
            for ours, theirs in self.mapped().items():
                if theirs not in COMBINED_LOG_COLUMNS:
                    raise ValueError(
                        f"{field_of(ours)} = {theirs!r}: a combined_log has the columns "
                        f"{', '.join(COMBINED_LOG_COLUMNS)}"
                    )
        if self.source.format == "csv" and not self.source.header:
            for ours, theirs in self.mapped().items():
                if not re.fullmatch(r"_\d+", theirs):
                    raise ValueError(
                        f"{field_of(ours)} = {theirs!r}: without a header columns are named _0, _1, …"
                    )
        return self

    def digest(self) -> str:
        """Names what the file says: two runs by different source files differ in it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


def _explain(error: dict[str, Any], raw: dict[str, Any], path: Path) -> str:
    """One pydantic error as: file, field, value, remedy."""
    where = [str(part) for part in error["loc"]]
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
        known = f"sources there: {', '.join(there)}" if there else "there is no source file there"
        raise SourceError(f"--source {name_or_path}: {path} does not exist ({known})")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not valid TOML: {error}") from None
    try:
        return Source.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(one), raw, path) for one in error.errors()]
        raise SourceError("\n".join(lines)) from None
