"""A night beside the nights before it: is it the same log still?

The profile of a day (how many sessions began on it, of how many users, with how many events, of
which items, how many of them never seen before, with which pauses between events) is a row of
`ops.nights`: of the night's own day always anew, of days before it only where it is missing, so a
history is read once. Late events therefore count for the days before a day was first looked at.

Counts are compared with the median of the days before, those of the same weekday where there are
three: unusual is what is beyond `factor` *and* four standard deviations of a Poisson count, so a
small log does not cry every night. Pauses are compared with the median distribution of all the days
before, by the population stability index over powers of two of a second. `[drift] policy` says whether an unusual
night is reported (`warn`), stops the line behind the tables (`stop`), or is not checked (`off`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import date, timedelta
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from expectations import nights as suite
from jobs.audit import great_expectations
from jobs.core import webhook
from jobs.core.errors import AuditFailed, SettingsError
from jobs.core.source_rules import MIN_NIGHTS, DriftPart
from jobs.core.tables import ITEMS, NIGHTS, SESSIONS
from jobs.gold.user_slices import read_sessions
from jobs.lake.context import Context, Result
from jobs.lake.delta import Lake

BUCKETS = 24  # the last one: half a year and more
SAME_WEEKDAY = 3
DEVIATIONS = 4.0
LEAST_GAPS = 500  # of fewer pauses a distribution says little
DAY_US = 86_400_000_000


@dataclass
class Profile:
    """What one day was like."""

    events: int = 0
    users: int = 0
    sessions: int = 0
    items: int = 0
    new_items: int = 0
    gaps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))

    @property
    def new_share(self) -> float:
        return self.new_items / max(1, self.items)


def look(context: Context) -> Result:
    """Profile the night's day, compare it with those before, and say what is unusual.

    Raises:
        SettingsError: no day, or no sessions yet.
        AuditFailed: it is unusual, and the source's policy is `stop`.
    """
    rules, lake, day = context.source.drift, context.lake, context.day
    if day is None:
        raise SettingsError("drift looks at one night: give its --day")
    version = lake.version(SESSIONS)
    if version is None:
        raise SettingsError(
            f"there is no table at {lake.path(SESSIONS)}: run python -m jobs run --source "
            f"{context.source.name} first"
        )
    result = Result(tables_in={SESSIONS.full_name: version})
    if rules.policy == "off":
        result.notes.append("Drift check skipped (drift.policy = 'off')")
        return result
    profiles = _profiles(context, version, day, rules.nights)
    result.tables[NIGHTS.full_name] = lake.told(NIGHTS)
    before = {one: profiles[one] for one in profiles if one < day}
    if len(before) < MIN_NIGHTS:
        result.notes.append(
            f"{len(before)} days before {day} are known; from {MIN_NIGHTS} on drift is judged"
        )
        return result
    checks = suite.checks()
    unusual, unknown = compare(day, profiles[day], before, rules)
    counts = {one.name: int(one.name in unusual) for one in checks if one.name not in unknown}
    severity = dict.fromkeys(
        (one.name for one in checks), "fail" if rules.policy == "stop" else "warn"
    )
    verdict = great_expectations.judge(
        context, NIGHTS, {"rows": 1} | counts, checks, severity, unknown
    )
    result.checks[NIGHTS.full_name] = verdict.counts()
    said = [f"{name}: {unusual[name]}" for name in (*verdict.failed, *verdict.warned)]
    if not said:
        more = f": {verdict.in_words()}" if unknown else ""
        result.notes.append(f"{day} is like the {len(before)} days before it{more}")
        return result
    said += [f"{name} was not evaluated: {why}" for name, why in unknown.items()]
    words = (
        f"{context.source.name}: {day} differs from the {len(before)} days before it\n"
        + "\n".join(f"  {one}" for one in said)
    )
    if verdict.failed:
        raise AuditFailed(
            f"{words}\nThe tables have the night as it was delivered; training and scoring were "
            "not started. If the log is right, mark this task as a success (or set [drift] policy "
            "= 'warn' and run it again); if it is not, have the files delivered again and run the "
            "night again"
        )
    result.notes.append(words)
    webhook.send("drift", words, source=context.source.name, day=day, unusual=unusual)
    return result


# -- what is unusual ------------------------------------------------------------------------------


def compare(
    day: date, night: Profile, before: dict[date, Profile], rules: DriftPart
) -> tuple[dict[str, str], dict[str, str]]:
    """What is unusual about a night: the check's name -> its numbers in words; and which checks
    cannot be evaluated: the check's name -> why."""
    found: dict[str, str] = {}
    unknown: dict[str, str] = {}
    same = [one for at, one in before.items() if at.weekday() == day.weekday()]
    whom = same if len(same) >= SAME_WEEKDAY else list(before.values())
    of = f"the {len(whom)} {day:%A}s before" if whom is same else f"the {len(whom)} days before"
    for name in ("events", "users", "sessions"):
        value, usual = getattr(night, name), median(getattr(one, name) for one in whom)
        beyond = value > usual * rules.factor or value * rules.factor < usual
        if beyond and abs(value - usual) > DEVIATIONS * math.sqrt(max(usual, 1.0)):
            found[f"{name}_as_usual"] = (
                f"{value:,} {name}, {usual:,.0f} are usual (median of {of}; factor "
                f"{rules.factor:g} is the limit)"
            )
    usual = median(one.new_share for one in whom)
    noise = math.sqrt(max(usual * (1 - usual), 1e-4) / max(1, night.items))
    if not night.items:
        unknown["new_items_as_usual"] = "the day has no items"
    elif abs(night.new_share - usual) > max(rules.new_items, DEVIATIONS * noise):
        found["new_items_as_usual"] = (
            f"{night.new_items:,} of {night.items:,} items were never seen before "
            f"({night.new_share:.0%}), {usual:.0%} are usual (median of {of}; {rules.new_items:.0%} "
            "more or less is the limit)"
        )
    usual_gaps = _usual_gaps(list(before.values()))
    fewest = int(min(night.gaps.sum(), usual_gaps.sum()))
    if fewest < LEAST_GAPS:
        unknown["gaps_as_usual"] = (
            f"{int(night.gaps.sum()):,} pauses, on the days before {usual_gaps.sum():,.0f}: at "
            f"least {LEAST_GAPS:,} are needed"
        )
    else:
        index = stability_index(night.gaps, usual_gaps)
        if index > rules.psi:
            found["gaps_as_usual"] = (
                f"population stability index {index:.2f} (limit {rules.psi:g}); half of the pauses "
                f"are under {_median_s(night.gaps):,} s, of the days before under "
                f"{_median_s(usual_gaps):,} s"
            )
    return found, unknown


def _usual_gaps(before: list[Profile]) -> NDArray[np.float64]:
    """The pauses of all days before, shared out as on a day in the middle of them: one odd night
    among them changes nothing."""
    shares = np.array([one.gaps / one.gaps.sum() for one in before if one.gaps.sum()])
    if not len(shares):
        return np.zeros(BUCKETS)
    middle = np.median(shares, axis=0)
    number = sum(int(one.gaps.sum()) for one in before)
    return np.asarray(middle / middle.sum() * number) if middle.any() else np.zeros(BUCKETS)


def stability_index(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Population stability index of two histograms, each bucket half a count fuller."""
    p, q = ((one + 0.5) / (one.sum() + 0.5 * len(one)) for one in (ours, theirs))
    return float(((p - q) * np.log(p / q)).sum())


def _median_s(gaps: NDArray[Any]) -> int:
    return int(2 ** np.searchsorted(np.cumsum(gaps), gaps.sum() / 2))


# -- profiles of days -----------------------------------------------------------------------------


def _profiles(context: Context, version: int, day: date, nights: int) -> dict[date, Profile]:
    """The night's day and the days before it since the log's first, at most so many; those that
    were not known are, now."""
    lake = context.lake
    lake.create(NIGHTS)
    files = lake.files_of(SESSIONS, version)
    begins = min((one.first_us("start_ts") for one in files), default=0) // DAY_US
    first = max(day - timedelta(days=nights), _date(begins))
    known = {}
    for row in lake.small(NIGHTS).to_pylist():
        if first <= row["day"] < day:
            gaps = np.array(row["gaps"], np.int64)
            known[row["day"]] = Profile(**{name: row[name] for name in COUNTS}, gaps=gaps)
    span = [first + timedelta(days=at) for at in range((day - first).days)]
    made = profile(lake, version, {day, *span} - set(known))
    lake.put_small(NIGHTS, [
        (at, *(getattr(one, name) for name in COUNTS), one.gaps.tolist(), context.batch,
         context.started)
        for at, one in sorted(made.items())
    ])  # fmt: skip
    return dict(sorted({**known, **made}.items()))


COUNTS = ("events", "users", "sessions", "items", "new_items")


def _date(number: int) -> date:
    """A date from days since 1970; the calendar's first where files do not tell their times."""
    return date(1970, 1, 1) + timedelta(days=max(int(number), -719_000))


def profile(lake: Lake, version: int, days: set[date]) -> dict[date, Profile]:
    """What these days were like, by this version of `silver.sessions`, without runaways."""
    found = {one: Profile() for one in days}
    low, high = (at(days).toordinal() - date(1970, 1, 1).toordinal() for at in (min, max))
    wanted = pa.array(sorted(days), pa.date32())
    users, items = [], []
    for file in lake.files_of(SESSIONS, version):
        if (
            file.last_us("start_ts") < low * DAY_US
            or file.first_us("start_ts") >= (high + 1) * DAY_US
        ):
            continue
        rows = read_sessions(file.path, low * DAY_US, ties=())
        on = rows["start_ts"].cast(pa.timestamp("us")).cast(pa.date32())
        inside = pc.is_in(on, wanted)
        rows, on = rows.filter(inside).combine_chunks(), on.filter(inside).combine_chunks()
        if not rows.num_rows:
            continue
        lists = rows["events"].combine_chunks()
        count = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        number = on.cast(pa.int32()).to_numpy(zero_copy_only=False) - low
        events = lists.flatten()
        _count(found, low, number, count, events.field("event_ts"))
        users.append(pa.table({"day": on, "of": rows["user_id"].combine_chunks()}))
        each = pa.array(np.repeat(number + low, count), pa.int32()).cast(pa.date32())
        items.append(_distinct([pa.table({"day": each, "of": events.field("item_id")})]))
    first_seen = _first_seen(lake)
    for at, many in _per_day(_distinct(users)).items():
        found[at].users = many
    seen = _distinct(items)
    for at, many in _per_day(seen).items():
        found[at].items = many
    if seen.num_rows:
        told = first_seen["on"].take(pc.index_in(seen["of"], value_set=first_seen["item_id"]))
        for at, many in _per_day(seen.filter(pc.equal(told, seen["day"]))).items():
            found[at].new_items = many
    return found


def _count(
    found: dict[date, Profile], low: int, number: NDArray[Any], count: NDArray[Any], event_ts: Any
) -> None:
    """Add one file's sessions, events and pauses to their days (`number` + `low`, since 1970)."""
    us = event_ts.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy(zero_copy_only=False)
    inside = np.ones(max(0, len(us) - 1), bool)
    inside[np.cumsum(count)[:-1] - 1] = (
        False  # from one session's last event to the next one's first
    )
    of_day = np.repeat(number, count)[1:][inside]
    seconds = np.diff(us)[inside] / 1e6
    bucket = np.minimum(np.frexp(np.floor(seconds))[1], BUCKETS - 1)
    for at in np.unique(number):
        mine = found[_date(at + low)]
        mine.sessions += int((number == at).sum())
        mine.events += int(count[number == at].sum())
        mine.gaps += np.bincount(bucket[of_day == at], minlength=BUCKETS)


def _distinct(parts: list[pa.Table]) -> pa.Table:
    if not parts:
        return pa.table({"day": pa.array([], pa.date32()), "of": pa.array([], pa.string())})
    return pa.concat_tables(parts).group_by(["day", "of"]).aggregate([]).combine_chunks()


def _per_day(pairs: pa.Table) -> dict[date, int]:
    counted = pairs.group_by("day").aggregate([([], "count_all")])
    return dict(zip(counted["day"].to_pylist(), counted["count_all"].to_pylist(), strict=True))


def _first_seen(lake: Lake) -> pa.Table:
    """Each item and the date on which it was first seen."""
    items = lake.table_of(ITEMS, int(lake.version(ITEMS) or 0), ["item_id", "first_seen_ts"])
    items = items.combine_chunks()
    on = items["first_seen_ts"].cast(pa.timestamp("us")).cast(pa.date32())
    return pa.table({"item_id": items["item_id"], "on": on}).combine_chunks()
