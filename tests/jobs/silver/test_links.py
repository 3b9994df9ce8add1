"""Links follow from logins, in any order; another engine says the same (`expectations/identities.py`)."""

from __future__ import annotations

import random
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from expectations.identities import AGAINST_LOGINS, BROKEN_LINKS, WRONG_PERSONS
from jobs.core import person_ids
from jobs.lake.time_slices import CLOCK
from jobs.silver import links, person_files

Login = tuple[str, str, int]
DAY = links.DAY_US


def spans_of(logins: list[Login], alone: bool = False) -> pa.Table:
    columns = list(zip(*logins, strict=True)) or [(), (), ()]
    texts = [pa.array(columns[at], pa.string()) for at in (0, 1)]
    return links.spans_of(*texts, pa.array(columns[2], pa.int64()), alone=alone)


def in_files(logins: list[Login], files: int, rule: str) -> pa.Table:
    """As a run finds them: in files, those that are contested one by one."""
    parts = [spans_of(logins[at::files]) for at in range(files)]
    spans = pa.concat_tables(parts)
    if rule == "last":
        unclear = set(links.contested(spans).to_pylist())
        left = [row for row in spans.to_pylist() if row["anonymous_id"] not in unclear]
        again = spans_of([one for one in logins if one[0] in unclear], alone=True)
        spans = pa.concat_tables([pa.Table.from_pylist(left, schema=links.SPANS), again])
    return spans


def whose(logins: list[Login], rule: str, max_days: float | None, name: str, at: int) -> str | None:
    """The sentence of ARCHITECTURE.md, event by event."""
    named: dict[int, str] = {}
    for cookie, user, when in logins:
        if cookie == name:
            named[when] = max(user, named.get(when, user))
    if not named:
        return None
    first = min(named)
    if at < first and max_days is not None and first - at > max_days * DAY:
        return None
    before = [when for when in named if when <= at]
    return named[max(before) if before and rule == "last" else first]


@pytest.mark.parametrize("rule", ["last", "first"])
@pytest.mark.parametrize("seed", range(30))
def test_an_event_belongs_to_whom_the_sentence_says(rule: str, seed: int) -> None:
    draw = random.Random(seed)
    times = [draw.randrange(0, 40) * DAY // 4 for _ in range(draw.randrange(1, 40))]
    logins = [(draw.choice("xyz"), draw.choice("ABC"), at) for at in times]
    bound = draw.choice([None, 0.5, 3.0])
    asked = [(name, at) for name in "xyzw" for at in range(-8 * DAY, 12 * DAY, DAY // 8)]
    names, moments = pa.array([one[0] for one in asked]), np.array([one[1] for one in asked])
    expected = [whose(logins, rule, bound, *one) for one in asked]
    for order in range(3):
        draw.shuffle(logins)
        spans = in_files(logins, draw.randrange(1, 5), rule)
        given = links.links_of(spans, rule, bound)
        assert links.linked(given, names, moments).to_pylist() == expected, order
        assert given.equals(links.links_of(spans_of(logins, alone=True), rule, bound))


def rows_of(given: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = given.to_pylist()
    return rows


def test_no_login_no_link() -> None:
    nothing = links.links_of(spans_of([]), "last", None)
    assert nothing.num_rows == 0 and nothing.schema == links.LINKS
    assert links.linked(nothing, pa.array(["x"]), np.array([1])).to_pylist() == [None]
    assert links.contested(spans_of([])).to_pylist() == []


def test_a_link_holds_to_the_next_ones_login() -> None:
    given = rows_of(
        links.links_of(spans_of([("x", "A", 5), ("x", "A", 6), ("x", "B", 9)]), "last", None)
    )
    assert [(row["user_id"], row["from_ts"], row["to_ts"]) for row in given] == [
        ("A", None, given[1]["since_ts"]), ("B", given[1]["since_ts"], None),
    ]  # fmt: skip


def test_no_user_has_the_name_of_an_anonymous_id() -> None:
    users = ["a", "anonymous:x", "~anonymous:x", "~a", "xanonymous:", ""]
    made = person_ids.of_users(pa.array(users)).to_pylist()
    assert made == ["a", "~anonymous:x", "~~anonymous:x", "~a", "xanonymous:", ""]
    assert len({*made, *person_ids.of_anonymous(pa.array(["x", "~x"])).to_pylist()}) == 8


def finds(query: str, **tables: pa.Table) -> bool:
    """Whether SQL over some tables finds a row."""
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        for name, rows in tables.items():
            db.register(name, rows)
        return db.execute(query).fetchone() is not None


def changed(rows: pa.Table, at: int, **values: Any) -> pa.Table:
    made = rows.to_pylist()
    made[at] |= values
    return pa.Table.from_pylist(made, schema=rows.schema)


@pytest.mark.parametrize("rule", ["last", "first"])
def test_the_audit_refuses_links_that_no_login_makes(rule: str) -> None:
    logins = [("x", "A", 5), ("x", "B", 9), ("x", "A", 12), ("y", "C", 7)]
    given = links.links_of(spans_of(logins), rule, None)
    said = pa.table({
        "anonymous_id": [one[0] for one in logins], "user_id": [one[1] for one in logins],
        "login_ts": pa.array([one[2] for one in logins]).cast(CLOCK),
    })  # fmt: skip
    against = AGAINST_LOGINS[rule]
    assert not finds(BROKEN_LINKS, identities=given) and not finds(
        against, identities=given, logins=said
    )
    late = pa.scalar(6, CLOCK).as_py()
    for broken in (
        changed(given, 0, user_id="C"), changed(given, 0, since_ts=late), given.slice(1), given.slice(0, 1),
    ):  # fmt: skip
        assert finds(against, identities=broken, logins=said)
    if rule == "last":
        for broken in (
            changed(given, 0, to_ts=late), changed(given, 1, user_id="A"), changed(given, 1, from_ts=late),
            changed(given, 0, to_ts=None),
        ):  # fmt: skip
            assert finds(BROKEN_LINKS, identities=broken)


def test_the_audit_refuses_events_of_others() -> None:
    given = links.links_of(spans_of([("x", "A", 5), ("x", "anonymous:y", 9)]), "last", 2e-12)
    rows = [
        ("A", "A", "y", 1), ("anonymous:x", None, "x", 1), ("A", None, "x", 5), ("A", None, "x", 8),
        ("~anonymous:y", None, "x", 9), ("anonymous:y", None, "y", 9), ("~anonymous:y", "anonymous:y", None, 3),
    ]  # fmt: skip
    columns = [list(one) for one in zip(*rows, strict=True)]
    events = pa.table({
        "event_id": [str(at) for at in range(len(rows))], "user_id": columns[0],
        "log_user_id": columns[1], "anonymous_id": columns[2],
        "event_ts": pa.array(columns[3]).cast(CLOCK),
    })  # fmt: skip
    assert not finds(WRONG_PERSONS, events=events, identities=given)
    for at in range(len(rows)):
        wrong = changed(events, at, user_id="D")
        assert finds(WRONG_PERSONS, events=wrong, identities=given)
    made = person_files.persons(
        *(events[name].combine_chunks() for name in ("log_user_id", "anonymous_id")),
        events["event_ts"].cast(pa.int64()).to_numpy(), given,
    )  # fmt: skip
    assert made.to_pylist() == columns[0]
