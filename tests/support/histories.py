"""Small histories full of edges, for the property that arrival order does not matter.

One history is one user: lines, each with the nights on which it arrives. Hypothesis makes them;
many are batched as users of one source, so that one run of the real job tries hundreds. What
becomes of the lines is computed here from the sentences of ARCHITECTURE.md, line by line.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.oracle import NOTHING_MORE, More

GAP_S, LATENESS_DAYS, MAX_HOURS, MAX_EVENTS = 600, 5, 2, 7
ZONE = "Europe/Paris"
# Three nights around the hour that clocks leave out; the first is the 30th of March 2024.
NIGHTS = [date(2024, 3, 30), date(2024, 3, 31), date(2024, 4, 2)]
START = datetime(2024, 3, 31, 0, tzinfo=UTC)
# From one line to the next: exactly the gap, just over, nothing; a runaway's hours; days.
STEPS_S = (0, 0, 1, 60, GAP_S - 1, GAP_S, GAP_S, GAP_S + 1, 1500, 3600, 40_000, 86_400, 300_000)


@dataclass(frozen=True)
class Line:
    """One line of a log, in our terms, and the nights (0 to 2) on which it arrives.

    `at_s` counts from START on the clock that the log shows; `native_id` is used by sources with
    `event_id`, `session` (null: none) by those with `source_session_id`, `cookie` and `login` (null:
    none) by those with `[identity]`, `campaign` (null: none) by those with a boundary; `fault` makes
    the line unusable.
    """

    at_s: int
    item: int
    nights: tuple[int, ...]
    session: int | None = None
    tie: int | None = None
    native_id: int = 0
    fault: str | None = None
    cookie: int | None = 0
    login: int | None = 0
    campaign: int | None = None


History = tuple[Line, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of source: what of a line its log shows."""

    name: str
    toml: str
    native_rule: bool = False
    native_ids: bool = False
    local_times: bool = False
    link: str | None = None
    """`[identity] link`; null: users are known."""
    max_days: float | None = None
    file_order: bool = False
    again: bool = False
    """Whether files come again, and take the place of what they were."""
    behaviour: dict[str, int] | None = None
    """`[bots]`, as the oracle takes it."""
    more: More = NOTHING_MORE
    columns: tuple[str, ...] = field(default=())

    def names(self, user: int) -> list[str]:
        """All names by which a log may say whose a history's events are (`said`)."""
        if self.link is None:
            return [user_name(user)]
        lines = [Line(0, 0, (), login=one) for one in LOGINS[1:]]
        lines += [Line(0, 0, (), login=None, cookie=one) for one in COOKIES[1:]]
        return [self.said(user, line) for line in lines]

    def persons(self, user: int) -> list[str]:
        """All persons whom a history's events may have in silver and gold."""
        if self.link is None:
            return [user_name(user)]
        of_users = [self.said(user, Line(0, 0, (), login=one)) for one in LOGINS[1:]]
        of_users = [f"~{name}" if name.startswith("anonymous:") else name for name in of_users]
        return [*of_users, *(f"anonymous:c{user}-{one}" for one in COOKIES[1:])]

    def said(self, user: int, line: Line) -> str:
        """Whose a line is, by itself. (Some users have the name of an anonymous id.)"""
        if self.link is None or line.login == 0:
            return user_name(user)
        if line.login is None:
            return f"cookie c{user}-{line.cookie}"
        return f"anonymous:c{user}-0" if user % 3 == 0 else f"{user_name(user)}+"

    def cookie(self, user: int, line: Line) -> str:
        """The anonymous id that is stored with a line; empty: none."""
        return "" if self.link is None or line.cookie is None else f"c{user}-{line.cookie}"

    def fault(self, line: Line) -> str | None:
        nobody = self.link is not None and line.login is None and line.cookie is None
        return "missing_user_id" if nobody else line.fault

    def fields(self, user: int, line: Line) -> list[str]:
        """The line's fields, as its log has them."""
        name = quoted(self.said(user, line))
        if self.link is not None and line.login is None:
            name = ""
        item = "" if line.fault == "missing_item_id" else f"i{line.item}"
        when = "soon" if line.fault == "bad_event_ts" else self.clock(line)
        texts = {
            "u": name, "i": item, "t": when, "n": "" if line.tie is None else str(line.tie),
            "s": "" if line.session is None else f"s{line.session}",
            "id": quoted(f"{user_name(user)}#{line.native_id}"),
            "c": self.cookie(user, line), "k": self.campaign(line),
        }  # fmt: skip
        return [texts[column] for column in self.columns]

    def clock(self, line: Line) -> str:
        if self.local_times:
            return f"{START.replace(tzinfo=None) + timedelta(seconds=line.at_s):%Y-%m-%dT%H:%M:%S}"
        return str(int(START.timestamp()) + line.at_s)

    def moment(self, line: Line) -> datetime:
        """The line's time in UTC; a missing hour moves forward, a doubled one takes the earlier."""
        if self.local_times:
            return local_moment(line.at_s)
        return START + timedelta(seconds=line.at_s)

    def identity(self, line: Line) -> tuple[Any, ...]:
        """What makes two lines of a user one event."""
        if self.native_ids:
            return (line.native_id,)
        session = line.session if "s" in self.columns else None
        tie = line.tie if "n" in self.columns else None
        whose: tuple[int | None, ...] = ()
        if self.link is not None:
            whose = (line.login, line.cookie if line.login is None else None)
        return (self.moment(line), line.item, session, tie, *whose)

    def placed(self, line: Line) -> tuple[Any, ...]:
        """Of two lines of one event, the one with the smaller one survives."""
        campaign = line.campaign if self.reads_campaign else None
        cookie = line.cookie if self.link is not None else None
        return (
            self.moment(line) if self.native_ids else 0, cookie is None, cookie or 0,
            campaign is None, campaign or 0,
        )  # fmt: skip

    @property
    def reads_campaign(self) -> bool:
        return "k" in self.columns

    def campaign(self, line: Line) -> str:
        """The campaign that is stored with a line; empty: none."""
        return f"k{line.campaign}" if self.reads_campaign and line.campaign is not None else ""

    def text(self, user: int, line: Line) -> str:
        return ",".join(self.fields(user, line))


class Computed(Kind):
    """A log of lists, of which every column is computed and one element of two is left out."""

    @property
    def plain(self) -> Kind:
        """The log of single lines that says the same."""
        return Kind(self.name, self.toml, columns=("u", "i", "t", "n"))

    def fields(self, user: int, line: Line) -> list[str]:
        name, *texts = self.plain.fields(user, line)
        element = dict(zip(("i", "t", "n"), texts, strict=True))
        listed = json.dumps([element | {"of": "robot"}, element], separators=(",", ":"))
        return [name, quoted(listed)]

    def identity(self, line: Line) -> tuple[Any, ...]:
        return self.plain.identity(line)


def local_moment(at_s: int) -> datetime:
    """What a clock in ZONE shows at_s after START's, in UTC."""
    return (START.replace(tzinfo=ZoneInfo(ZONE)) + timedelta(seconds=at_s)).astimezone(UTC)


def toml(columns: str, time: str, rule: str) -> str:
    return f"""
[source]
name = "log"
landing = "{{landing}}/*.csv"
format = "csv"
[columns]
user_id = "u"
item_id = "i"
event_ts = "t"
{columns}
[time]
{time}
[sessions]
rule = "{rule}"
gap_s = {GAP_S}
lateness_days = {LATENESS_DAYS}
max_session_hours = {MAX_HOURS}
max_session_events = {MAX_EVENTS}
[quality]
on_exceed = "warn"
"""


REPLACE = 'redelivery = "replace"'


def again(text: str) -> str:
    """A source file whose files take the place of what they were."""
    return text.replace('format = "csv"', f'format = "csv"\n{REPLACE}')


def with_sessions(text: str, *keys: str) -> str:
    """A source file with more keys in `[sessions]`."""
    return text.replace("[sessions]\n", "\n".join(("[sessions]", *keys, "")))


SPLIT, MIDNIGHT, NATIVE_GAP = 'on_max_hours = "split"', f'midnight = "{ZONE}"', "native_gap = true"
BOUNDARY = "boundary = \"prev.k <> next.k OR prev.item_id = 'i3'\""
PARTED = (
    "coalesce(before_boundary_values ->> 'k' <> boundary_values ->> 'k', false) "
    "OR before_item_id = 'i3'"
)
IN_FILES = 'tie_break = { order = "file" }'


def computed() -> str:
    """A source file as the others, its columns computed from elements of a list."""
    text = toml(TIE, UNIX, GAP).replace(
        'format = "csv"', 'format = "csv"\nexplode = "e"\nkeep = "of <> \'robot\'"'
    )
    start, end = text.index("[columns]"), text.index("[time]")
    return text[:start] + COMPUTED + text[end:]


COMPUTED = """
[columns]
user_id = { sql = "u || ''" }
item_id = { sql = "'i' || CAST(substr(i, 2) AS INTEGER)" }
event_ts = { sql = "e.t" }
tie_break = { sql = "CAST(n AS BIGINT)" }
"""
NATIVE_SESSION, TIE, NATIVE_ID = 'source_session_id = "s"', 'tie_break = "n"', 'event_id = "id"'
UNIX, LOCAL = 'unit = "s"', f'unit = "iso8601"\nzone = "{ZONE}"'
GAP, NATIVE = "gap", "source_session_id"
BEHAVIOUR = {"events_per_minute": 2, "events_without_pause": 3, "pause_us": (GAP_S - 1) * 1_000_000}
BOTS = f"[bots]\nevents_per_minute = 2\nevents_without_pause = 3\npause_s = {GAP_S - 1}\n"
COOKIES, LOGINS = (None, 0, 1), (None, 0, 1)
"""Devices, and those who use them, of a history."""


def identity(link: str, max_days: float | None = None) -> str:
    bound = "" if max_days is None else f"max_days = {max_days}"
    return f'[identity]\nanonymous_id = "c"\nlink = "{link}"\n{bound}\n'


KINDS = {
    kind.name: kind
    for kind in (
        Kind("gap", toml(TIE, UNIX, GAP), columns=("u", "i", "t", "n")),
        Kind(
            "native sessions and ids, local times",
            toml(f"{NATIVE_SESSION}\n{NATIVE_ID}", LOCAL, NATIVE),
            native_rule=True, native_ids=True, local_times=True, columns=("u", "i", "t", "s", "id"),
        ),
        Kind(
            "gap, native ids, local times", toml(NATIVE_ID, LOCAL, GAP),
            native_ids=True, local_times=True, columns=("u", "i", "t", "id"),
        ),
        Kind(
            "native sessions", toml(f"{NATIVE_SESSION}\n{TIE}", UNIX, NATIVE),
            native_rule=True, columns=("u", "i", "t", "s", "n"),
        ),
        Kind(
            "people", toml(TIE, UNIX, GAP) + identity("last"), link="last",
            columns=("u", "c", "i", "t", "n"),
        ),
        Kind(
            "people, the first login, native sessions and ids",
            toml(f"{NATIVE_SESSION}\n{NATIVE_ID}", UNIX, NATIVE) + identity("first", 2.0),
            native_rule=True, native_ids=True, link="first", max_days=2.0,
            columns=("u", "c", "i", "t", "s", "id"),
        ),
        Kind(
            "people, at most two days back, native ids",
            toml(NATIVE_ID, UNIX, GAP) + identity("last", 2.0), native_ids=True, link="last",
            max_days=2.0, columns=("u", "c", "i", "t", "id"),
        ),
        Kind("order in files", toml(IN_FILES, UNIX, GAP), file_order=True, columns=("u", "i", "t")),
        Kind(
            "order in files, native ids", toml(f"{IN_FILES}\n{NATIVE_ID}", UNIX, GAP),
            native_ids=True, file_order=True, columns=("u", "i", "t", "id"),
        ),
        Kind("sessions of programs", toml(TIE, UNIX, GAP) + BOTS, behaviour=BEHAVIOUR,
             columns=("u", "i", "t", "n")),
        Kind(
            "sessions of programs, native sessions and ids",
            toml(f"{NATIVE_SESSION}\n{NATIVE_ID}", UNIX, NATIVE) + BOTS, behaviour=BEHAVIOUR,
            native_rule=True, native_ids=True, columns=("u", "i", "t", "s", "id"),
        ),
        Kind("files that come again", again(toml(TIE, UNIX, GAP)), again=True,
             columns=("u", "i", "t", "n")),
        Kind(
            "files that come again, native ids", again(toml(NATIVE_ID, LOCAL, GAP)),
            native_ids=True, local_times=True, again=True, columns=("u", "i", "t", "id"),
        ),
        Kind(
            "files that come again, order in files", again(toml(IN_FILES, UNIX, GAP)),
            file_order=True, again=True, columns=("u", "i", "t"),
        ),
        Kind(
            "files that come again, native ids in the order of files",
            again(toml(f"{IN_FILES}\n{NATIVE_ID}", UNIX, GAP)),
            native_ids=True, file_order=True, again=True, columns=("u", "i", "t", "id"),
        ),
        Kind(
            "files that come again, people", again(toml(TIE, UNIX, GAP)) + identity("last"),
            link="last", again=True, columns=("u", "c", "i", "t", "n"),
        ),
        Kind(
            "split", with_sessions(toml(TIE, UNIX, GAP), SPLIT), more=More(split=True),
            columns=("u", "i", "t", "n"),
        ),
        Kind(
            "midnight, people", with_sessions(toml(TIE, UNIX, GAP), MIDNIGHT) + identity("last"),
            link="last", more=More(midnight=ZONE), columns=("u", "c", "i", "t", "n"),
        ),
        Kind(
            "native sessions, split",
            with_sessions(toml(f"{NATIVE_SESSION}\n{TIE}", UNIX, NATIVE), SPLIT),
            native_rule=True, more=More(split=True), columns=("u", "i", "t", "s", "n"),
        ),
        Kind(
            "native sessions with a gap, split, midnight",
            with_sessions(
                toml(f"{NATIVE_SESSION}\n{TIE}", UNIX, NATIVE), NATIVE_GAP, SPLIT, MIDNIGHT
            ),
            native_rule=True, more=More(native_gap=True, midnight=ZONE, split=True),
            columns=("u", "i", "t", "s", "n"),
        ),
        Kind(
            "boundary", with_sessions(toml(TIE, UNIX, GAP), BOUNDARY), more=More(parted=PARTED),
            columns=("u", "i", "t", "n", "k"),
        ),
        Kind(
            "boundary, people, native sessions and ids",
            with_sessions(
                toml(f"{NATIVE_SESSION}\n{NATIVE_ID}", UNIX, NATIVE), BOUNDARY, SPLIT
            ) + identity("last"),
            native_rule=True, native_ids=True, link="last", more=More(parted=PARTED, split=True),
            columns=("u", "c", "i", "t", "s", "id", "k"),
        ),
        Computed("computed, exploded and filtered", computed(), columns=("u", "e")),
    )
}  # fmt: skip


def user_name(user: int) -> str:
    """Names that are no integers, or negative ones, are part of the exercise."""
    return [f"{user}", f"-{user}", f"{user},x", f'"{user}"'][user % 4]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if '"' in text or "," in text else text


# -- making ------------------------------------------------------------------------------------

arrivals = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """One user's lines. Where times repeat, ids that order them (ties) differ or do not."""
    now = draw(st.sampled_from([-8, -6, -3, -1, 0, 0, 1])) * 86_400
    now += draw(st.sampled_from([0, 1800, 5400, 7200, 86_100]))
    native = 0
    lines = []
    for number in range(draw(st.integers(1, 12))):
        now += draw(st.sampled_from(STEPS_S))
        native = draw(st.sampled_from([native, native, 0, 1, 2]))
        lines.append(
            Line(
                at_s=now, item=draw(st.integers(0, 3)), nights=draw(arrivals),
                session=draw(st.sampled_from([native, native, native, None])),
                tie=draw(st.sampled_from([None, None, 0, 1, -1])),
                native_id=draw(st.sampled_from([number] * 6 + list(range(number)))),
                fault=draw(st.sampled_from([None] * 19 + ["missing_item_id", "bad_event_ts"])),
                cookie=draw(st.sampled_from([0, 0, 0, 0, 1, 1, None])),
                login=draw(st.sampled_from([None, None, None, 0, 0, 1])),
                # (Not drawn: other kinds keep their histories.)
                campaign=(None, 0, 0, 1)[(now // 60 + 3 * number) % 4],
            )
        )  # fmt: skip
    # An id that comes again has another time, on a clock with a missing hour too: which of two
    # lines with one time survives is decided by a hash that only the jobs know.
    taken: set[tuple[int, datetime]] = set()
    clear = []
    for number, line in enumerate(lines):
        moment = local_moment(line.at_s)
        native = number if (line.native_id, moment) in taken else line.native_id
        taken.add((native, moment))
        clear.append(replace(line, native_id=native))
    return tuple(clear)


@functools.cache
def make(count: int, seed: int) -> tuple[History, ...]:
    """Histories by Hypothesis, the same for a seed."""
    from hypothesis import seed as seeded

    made: list[History] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(histories())
    def collect(history: History) -> None:
        made.append(history)

    collect()
    return tuple(made)


# -- what becomes of the lines -------------------------------------------------------------------


@dataclass
class Fate:
    """What a history's lines become: events by identity, late and unusable lines by their text.

    A late line whose id (another line's, too) is stored later is a duplicate when it is read
    again, and then leaves the rejects.
    """

    events: dict[tuple[Any, ...], Line] = field(default_factory=dict)
    late: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    unusable: set[tuple[str, str]] = field(default_factory=set)
    places: dict[tuple[Any, ...], tuple[str, int]] = field(default_factory=dict)
    """Where files come again: of each event the file and the line that count."""


def fate(kind: Kind, user: int, history: History, nights: Iterable[date | None]) -> Fate:
    """The fate of a history's lines after some nights (None: a run without a day).

    Duplicates are recognised before lateness is judged, and lateness line by line before choosing
    among lines of one id; a stored event is replaced by a smaller line whose own date is in bound.
    """
    found = Fate()
    for number, day in enumerate(nights):
        arrived = [
            line for line in history for night in line.nights if night == number or day is None
        ]
        oldest = day - timedelta(days=LATENESS_DAYS) if day else date.min
        stored = dict(found.events)
        for line in arrived:
            text = kind.text(user, line)
            if fault := kind.fault(line):
                found.unusable.add((text, fault))
                continue
            identity, too_old = kind.identity(line), kind.moment(line).date() < oldest
            if identity not in stored and too_old:
                found.late[text] = identity
            elif identity not in found.events:
                found.events[identity] = line
            elif (kind.native_ids or kind.link or kind.reads_campaign) and not too_old:
                found.events[identity] = min(found.events[identity], line, key=kind.placed)
    return found


Delivery = tuple[str, int, str, int]
"""A line's text, and the night, the file and the line with which it came."""


COMES_AGAIN = ("again.csv", "other.csv")
"""Files that every night brings anew."""


def file_of(text: str, night: int, number: int) -> str:
    """The file in which a line comes.

    Args:
        number: how often it came before in that night.
    """
    told = text if number == 0 else f"{text} {night} {number}"
    return (*COMES_AGAIN, f"{night}.csv")[zlib.crc32(told.encode()) % 3]


Stored = tuple[Line, tuple[str, int]]
"""A line that counts, and its place: file and line."""


def fate_of_files(
    kind: Kind,
    user: int,
    history: History,
    deliveries: Iterable[Delivery],
    nights: list[date | None],
) -> Fate:
    """`fate` where the newest version of each file counts.

    What a file has of an event is its smallest line that was not too old on its night. It goes when
    the file comes again without it, unless it is too old then. A line that is too old confirms the
    event as it was stored before the night.
    """
    lines = {kind.text(user, line): line for line in history}
    mine = [one for one in deliveries if one[0] in lines]
    of_files: dict[tuple[Any, ...], dict[str, Stored]] = {}
    late: dict[str, dict[str, tuple[Any, ...]]] = {}
    unusable: dict[str, set[tuple[str, str]]] = {}

    def size(one: Stored) -> tuple[Any, ...]:
        return (kind.placed(one[0]), one[1] if kind.file_order else ())

    for number, day in enumerate(nights):
        oldest = day - timedelta(days=LATENESS_DAYS) if day else date.min
        last = len(NIGHTS) - 1
        read = [
            (lines[text], (file, line))
            for text, night, file, line in mine
            for again in [file.rpartition("/")[2] in COMES_AGAIN]
            if (night == number if day else night == last or not again)
        ]
        stored = {name: min(found.values(), key=size) for name, found in of_files.items()}
        confirmed, came = set(), dict[tuple[Any, str], Stored]()
        for files in (late, unusable):
            for file in [one for one in files if one.rpartition("/")[2] in COMES_AGAIN]:
                del files[file]
        for line, place in read:
            file, name = place[0], kind.identity(line)
            if fault := kind.fault(line):
                unusable.setdefault(file, set()).add((kind.text(user, line), fault))
            elif kind.moment(line).date() >= oldest:
                one = (line, place)
                came[name, file] = min(came.get((name, file), one), one, key=size)
            elif name in stored:
                confirmed.add((name, file))
            else:
                late.setdefault(file, {})[kind.text(user, line)] = name
        confirmed -= came.keys()
        for name, found in of_files.items():
            for file, one in list(found.items()):
                again = file.rpartition("/")[2] in COMES_AGAIN
                in_reach = kind.moment(one[0]).date() >= oldest
                if again and in_reach and (name, file) not in confirmed:
                    del found[file]
        for name, file in confirmed:
            of_files.setdefault(name, {}).setdefault(file, stored[name])
        for (name, file), one in came.items():
            found = of_files.setdefault(name, {})
            found[file] = min(found.get(file, one), one, key=size)
        of_files = {name: found for name, found in of_files.items() if found}
    best = {name: min(found.values(), key=size) for name, found in of_files.items()}
    return Fate(
        {name: line for name, (line, _) in best.items()},
        {text: name for found in late.values() for text, name in found.items()},
        {one for found in unusable.values() for one in found},
        {name: place for name, (_, place) in best.items()},
    )


def in_order_of_files(
    kind: Kind, user: int, found: Fate, deliveries: Iterable[Delivery], nights: list[date | None]
) -> list[tuple[datetime, str]]:
    """Time and item of a user's events, those of one time in the order of file and line: of all
    deliveries of the event that were not too old on their night, the first."""
    if kind.again:
        told = [
            (kind.moment(line), found.places[name], f"i{line.item}")
            for name, line in found.events.items()
        ]
        return [(moment, item) for moment, _, item in sorted(told)]
    first: dict[str, list[tuple[int, tuple[str, int]]]] = {}
    for text, night, file, line in deliveries:
        first.setdefault(text, []).append((night, (file, line)))
    placed = []
    for line in found.events.values():
        moment = kind.moment(line)
        places = [
            place
            for night, place in first[kind.text(user, line)]
            for day in [nights[night] if len(nights) > 1 else None]
            if day is None or moment.date() >= day - timedelta(days=LATENESS_DAYS)
        ]
        placed.append((moment, min(places), f"i{line.item}"))
    return [(moment, item) for moment, _, item in sorted(placed)]


# -- shrinking -----------------------------------------------------------------------------------


def smaller(history: History) -> list[History]:
    """Histories that are a step simpler: a line less, or a line with less about it."""
    found = [history[:at] + history[at + 1 :] for at in range(len(history)) if len(history) > 1]
    for at, line in enumerate(history):
        for simple in (
            replace(line, nights=line.nights[:1]), replace(line, nights=(0,)),
            replace(line, tie=None), replace(line, session=0), replace(line, item=0),
            replace(line, fault=None), replace(line, native_id=at), replace(line, login=0),
            replace(line, cookie=0), replace(line, campaign=None),
        ):  # fmt: skip
            if simple != line:
                found.append((*history[:at], simple, *history[at + 1 :]))
    return found


def shrunk(history: History, failing: Callable[[list[History]], list[History]]) -> History:
    """The simplest failing history that single steps lead to; each round tries all steps at once.

    Args:
        failing: those of some histories that fail, when run together.
    """
    while steps := failing(smaller(history)):
        history = min(steps, key=lambda one: (len(one), repr(one)))
    return history


def in_words(history: History) -> str:
    return "\n".join(f"  {line}" for line in history)
