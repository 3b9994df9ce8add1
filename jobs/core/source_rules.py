"""The sections of a source file that say what is made of the events: sessions, trainings, lists, nights."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, StrictBool, model_validator

from jobs.core.source_log import ColumnName, Part, Pattern, Zone

if TYPE_CHECKING:
    from expectations.behaviour_rule import BehaviourRule
    from expectations.session_rule import SessionRule

MIN_NIGHTS = 7  # ours: before, what is usual is not known
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


SCALED = {"gap_us": ("gap_s", 1_000_000), "max_session_us": ("max_session_hours", 3_600_000_000)}
"""Keys of stored rules that the source file has in another unit."""


def rules_apart(stored: str, wanted: str) -> str:
    """What two rules of sessions, as they are stored with tables, say differently, by the keys of the
    source file."""
    was, now = json.loads(stored), json.loads(wanted)
    said = []
    for key in sorted({*was, *now}):
        if was.get(key) == now.get(key):
            continue
        part = "bots" if key in BotsPart.model_fields else "sessions"
        name, each = SCALED.get(key, (key, None))
        before, after = (
            f"{one[key] / each:.15g}" if each and key in one else json.dumps(one.get(key))
            for one in (was, now)
        )
        said.append(f"{part}.{name} was {before} and is {after}".replace("null", "not set"))
    return ", ".join(said)


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
    midnight: Zone | None = None
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


class FiltersPart(Part):
    """What models are trained on. Silver and gold keep everything.

    The filters are applied once each, in this order."""

    min_item_events: int = Field(default=5, ge=1)
    """Items with fewer training events are left out."""
    min_session_events: int = Field(default=1, ge=1)
    """Sessions with fewer training events are left out."""
    min_user_sessions: int = Field(default=2, ge=1)
    """Users with fewer training sessions are left out."""


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
