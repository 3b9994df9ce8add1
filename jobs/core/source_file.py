"""A source is a file, not code: reads `infra/sources/<name>.toml` and checks it.

Its sections are in `source_log.py`, `source_events.py` and `source_rules.py`; what they must agree on is here.
A mistake is reported with the field, the value and the remedy before Spark starts.

Decision 14 in docs/design/decisions.md.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, model_validator

from expectations.feedback_rule import CONDITION
from jobs.core.errors import SourceError
from jobs.core.settings import settings
from jobs.core.source_events import (
    FORMS,
    NUMERIC_UNITS,
    ColumnsPart,
    Computed,
    ExposuresPart,
    FeedbackPart,
    IdentityPart,
    TimePart,
    field_of,
)
from jobs.core.source_log import (
    COMBINED_LOG_TIME,
    LOG_COLUMNS,
    ItemsPart,
    JdbcPart,
    LandingPart,
    Part,
    PrivacyPart,
    QualityPart,
    SourcePart,
)
from jobs.core.source_rules import (
    ALWAYS_THERE,
    BOUNDARY_OURS,
    BotsPart,
    DriftPart,
    FiltersPart,
    GatePart,
    SchedulePart,
    ServingPart,
    SessionsPart,
    TrainingPart,
)


class Source(Part):
    """One source file, checked."""

    source: SourcePart
    landing: LandingPart = LandingPart()
    jdbc: JdbcPart | None = None
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
        if (self.jdbc is not None) != (self.source.format == "jdbc"):
            raise ValueError(
                "source.format = 'jdbc' needs the section [jdbc]: the database and its table"
                if self.jdbc is None
                else f"[jdbc] is for source.format = 'jdbc', and format = {self.source.format!r}: leave it out"
            )
        if self.sessions.rule == "source_session_id" and columns.source_session_id is None:
            raise ValueError(
                "sessions.rule = 'source_session_id' needs columns.source_session_id: name the "
                "log's session column, or use rule = 'gap'"
            )
        if self.sessions.native_gap and self.sessions.rule == "gap":
            raise ValueError(
                "sessions.native_gap = true is for sessions.rule = 'source_session_id'. Here rule = "
                "'gap', under which a silence always ends a session: leave it out"
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


TAB_SEPARATED = ("tsv", "tab", "txt")
"""What people write under `source.format` for files that are `csv` with another delimiter."""


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
    message = message.replace("Input should be", "it must be")
    if field == "source.format" and value in TAB_SEPARATED:
        message = """tab-separated files are format = "csv" with delimiter = "\\t\""""
    shown = "" if not where or isinstance(value, dict | BaseModel) else f" = {value!r}"
    return f"{path}: {field}{shown}: {message}" if field else f"{path}: {message}"


def _not_toml(path: Path, error: Exception) -> str:
    """Where the TOML is broken, with the line as it is."""
    said = f"{path}: not valid TOML: {error}"
    if isinstance(error, tomllib.TOMLDecodeError) and (
        at := re.search(r"at line (\d+)", str(error))
    ):
        line = path.read_text(encoding="utf-8").splitlines()[int(at[1]) - 1]
        said += f": {line.strip()}"
    return f"{said}. Texts are in double quotes, and lists and tables are closed"


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
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise SourceError(
            f"--source {name_or_path}: {path} does not exist. {hint}Source files there: "
            f"{', '.join(there) or 'none'}. `python -m jobs guess FILE` prints a first one for a log"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SourceError(_not_toml(path, error)) from None
    try:
        source = Source.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(one), raw, path) for one in error.errors()]
        raise SourceError("\n".join(lines)) from None
    if name_or_path == path.stem and path.stem != source.name:
        _refuse_taken_name(source.name, path)
    return source


def _refuse_taken_name(name: str, path: Path) -> None:
    """A copied source file would write into the other one's tables.

    Raises:
        SourceError: another file of the folder has this name.
    """
    for other in sorted(path.parent.glob("*.toml")):
        if other.samefile(path):
            continue
        try:
            there = tomllib.loads(other.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue  # (its own command says so)
        section = there.get("source")
        if isinstance(section, dict) and section.get("name") == name:
            raise SourceError(
                f"{path}: source.name = {name!r} is the name of {other} too: give one of them another"
            )
