"""Arrival order does not matter: hundreds of generated histories, the real jobs, another engine.

Each history arrives over three nights, in any order, with repeats, late lines and faults; after
the nights, and again after one load of everything into an empty lake, sessions, sequences, items
and rejects must be what the oracle makes of the set of accepted events.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.core.plan import Thresholds
from jobs.core.tables import EVENTS, ITEMS, REJECTS, SEQUENCES, SESSIONS
from jobs.lake import time_slices
from jobs.silver import audit as silver_audit
from tests.support import histories
from tests.support.histories import (
    COMES_AGAIN,
    GAP_S,
    KINDS,
    MAX_EVENTS,
    MAX_HOURS,
    NIGHTS,
    Fate,
    History,
    Kind,
    Line,
)
from tests.support.oracle import (
    expected_sequences,
    expected_sessions,
    with_behaviour,
    with_persons,
)
from tests.support.spark_tools import Workshop

HISTORIES = 252  # of each of two kinds: 504


class Mill:
    """Runs histories as users of one source, by nights or at once, and names those that differ."""

    def __init__(self, spark: Any, folder: Path, kind: Kind, limits: Thresholds) -> None:
        self.spark, self.folder, self.kind, self.limits = spark, folder, kind, limits
        self.numbers, self.turns = itertools.count(), itertools.count()
        self.places: dict[str, list[int]] = {}

    def failing(self, batch: Sequence[History], by_nights: bool) -> dict[int, str]:
        """Users (places in the batch) whose tables are not the oracle's, and what differs."""
        if not batch:
            return {}
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        self.deliveries: list[histories.Delivery] = []
        shop = Workshop(self.spark, folder, self.kind.toml)
        nights = NIGHTS if by_nights else [None]
        for number in range(len(NIGHTS)):
            self.land(shop, batch, number)
            if by_nights:
                limits = replace(self.limits, smallest_slice=10)
                if number == 1:  # as if they were many: Spark reads, and merges into all tables
                    limits = replace(limits, few_bytes=-1, rewritten_share=2, read_bytes=-1)
                if number == 2:  # what is cut again goes through Spark
                    limits = replace(limits, recut_events=-1, counted_rows=-1, changed_sessions=-1)
                if number == 1 and not self.kind.native_rule:
                    limits = replace(limits, few_moved=-1)
                shop.thresholds = limits
                shop.run_steps(str(NIGHTS[number]), f"night-{number}")
        if not by_nights:
            # As if they were many: first loads have ways of their own, which take turns here.
            shop.thresholds = replace(self.limits, few_moved=-1, smallest_slice=10, read_bytes=-1)
            with pytest.MonkeyPatch.context() as patch:
                if next(self.turns) % 2:
                    patch.setattr(time_slices, "parted", lambda *_: None)
                shop.run()
        self.places = defaultdict(list)
        for place, (text, *_) in enumerate(self.deliveries):
            self.places[text].append(place)
        fates = [self.fate(user, history, nights) for user, history in enumerate(batch)]
        return self.differences(shop, fates, nights)

    def fate(self, user: int, history: History, nights: list[Any]) -> Fate:
        if self.kind.again:
            mine = self.delivered(user, history)
            return histories.fate_of_files(self.kind, user, history, mine, nights)
        return histories.fate(self.kind, user, history, nights)

    def delivered(self, user: int, lines: Iterable[Line]) -> list[histories.Delivery]:
        """The deliveries of some of a user's lines, as they came. (Looking through those of all users, for
        each user, took minutes.)"""
        texts = {self.kind.text(user, line) for line in lines}
        places = sorted(place for text in texts for place in self.places[text])
        return [self.deliveries[place] for place in places]

    def land(self, shop: Workshop, batch: Sequence[History], night: int) -> None:
        """What arrives on a night: a new file, and an older one that has grown; or a new file, and
        others that come again."""
        if self.kind.again:
            self.land_again(shop, batch, night)
            return
        lines = [
            self.kind.text(user, line)
            for user, history in enumerate(batch)
            for line in history
            for at in line.nights
            if at == night
        ]
        random.Random(len(lines)).shuffle(lines)
        half = len(lines) // 2
        grown = shop.landing / "grows.csv"
        head = ",".join(self.kind.columns)
        before = grown.read_text() if grown.exists() else head + "\n"
        at = before.count("\n") + 1
        shop.land("grows.csv", before + "".join(f"{line}\n" for line in lines[:half]))
        shop.land(f"{night}.csv", "\n".join([head, *lines[half:]]) + "\n")
        for file, first, some in (
            ("grows.csv", at, lines[:half]),
            (f"{night}.csv", 2, lines[half:]),
        ):
            path = str(shop.landing / file)
            self.deliveries += [(line, night, path, n) for n, line in enumerate(some, first)]

    def land_again(self, shop: Workshop, batch: Sequence[History], night: int) -> None:
        files: dict[str, list[str]] = {name: [] for name in (*COMES_AGAIN, f"{night}.csv")}
        for user, history in enumerate(batch):
            for line in history:
                text = self.kind.text(user, line)
                for number in range(line.nights.count(night)):
                    files[histories.file_of(text, night, number)].append(text)
        head = ",".join(self.kind.columns)
        for name, some in files.items():
            random.Random(len(some)).shuffle(some)
            path = str(shop.land(name, "\n".join([head, *some]) + "\n"))
            self.deliveries += [(line, night, path, n) for n, line in enumerate(some, 2)]

    def accepted(self, fates: list[Fate]) -> dict[str, Any]:
        """Whose each accepted event is, as the log says it, with its anonymous id and campaign."""
        wanted: dict[str, Any] = defaultdict(list)
        for user, one in enumerate(fates):
            for line in one.events.values():
                cookie = self.kind.cookie(user, line)
                told = (self.kind.moment(line), f"i{line.item}", cookie, self.kind.campaign(line))
                wanted[self.kind.said(user, line)].append(told)
        return {name: sorted(events) for name, events in wanted.items()}

    def orders(
        self, events: pa.Table, user_of: dict[str, int], fates: list[Fate], nights: list[Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Each user's events by time and `tie_break`, and by time, file and line."""
        rows = events.sort_by([("event_ts", "ascending"), ("tie_break", "ascending")])
        placed: dict[str, Any] = defaultdict(list)
        for row in rows.select(["user_id", "event_ts", "item_id"]).to_pylist():
            placed[row["user_id"]].append((row["event_ts"], row["item_id"]))
        wanted = {
            name: histories.in_order_of_files(
                self.kind,
                user,
                fates[user],
                self.delivered(user, fates[user].events.values()),
                nights,
            )
            for name, user in user_of.items()
            if fates[user].events
        }
        return placed, wanted

    def count_items(self, events: pa.Table, items: dict[int, dict[str, Any]]) -> None:
        counted: dict[str, tuple[int, datetime]] = {}
        for row in events.select(["item_id", "event_ts"]).to_pylist():
            count, first = counted.get(row["item_id"], (0, row["event_ts"]))
            counted[row["item_id"]] = (count + 1, min(first, row["event_ts"]))
        for item in items.values():
            assert (item["event_count"], item["first_seen_ts"]) == counted.get(
                item["item_id"], (0, item["first_seen_ts"])
            )

    def differences(self, shop: Workshop, fates: list[Fate], nights: list[Any]) -> dict[int, str]:
        kind = self.kind
        by_log, by_person = (
            {name: user for user in range(len(fates)) for name in names(user)}
            for names in (kind.names, kind.persons)
        )
        found: dict[int, str] = {}

        def compare(
            what: str, got: dict[str, Any], wanted: dict[str, Any],
            users: dict[str, int] = by_person,
        ) -> None:  # fmt: skip
            assert not got.keys() - users.keys()
            for name, user in users.items():
                if got.get(name) != wanted.get(name):
                    found.setdefault(
                        user, f"{what}\n  got    {got.get(name)}\n  wanted {wanted.get(name)}"
                    )

        def read(table: Any) -> pa.Table:
            return shop.table(table).to_pyarrow_table()

        events = read(EVENTS)
        compare("accepted events", by_log_of(events), self.accepted(fates), by_log)

        if kind.file_order:
            compare("order in files", *self.orders(events, by_log, fates, nights), by_log)
        people = events
        if kind.link is not None:
            people = with_persons(events, kind.link, kind.max_days)
        expected = expected_sessions(
            people, native=self.kind.native_rule, gap_s=GAP_S, max_hours=MAX_HOURS,
            max_events=MAX_EVENTS, more=kind.more,
        )  # fmt: skip
        expected = with_behaviour(expected, people, kind.behaviour)
        cut: dict[str, Any] = defaultdict(list)
        for row in read(SESSIONS).to_pylist():
            assert row["start_date"] == row["start_ts"].date()
            assert row["event_count"] == len(row["events"])
            cut[row["user_id"]].append(
                (row["session_id"], row["runaway"], [one["event_id"] for one in row["events"]])
            )
        wanted: dict[str, Any] = defaultdict(list)
        for row in expected:
            wanted[row["user_id"]].append((row["session_id"], row["runaway"], row["events"]))
        compare("sessions", {n: sorted(c) for n, c in cut.items()},
                {n: sorted(c) for n, c in wanted.items()})  # fmt: skip

        indexed = {row["item_index"]: row for row in read(ITEMS).to_pylist()}
        assert sorted(indexed) == list(range(1, len(indexed) + 1))
        found_sequences = {
            row["user_id"]: [
                (indexed[index]["item_id"], ordinal)
                for index, ordinal in zip(row["item_index"], row["session_ordinal"], strict=True)
            ]
            for row in read(SEQUENCES).to_pylist()
        }
        compare("sequences", found_sequences, expected_sequences(expected))

        self.count_items(events, indexed)
        rejected(read(REJECTS), fates, found)
        return found


def rejected(rejects: pa.Table, fates: list[Fate], found: dict[int, str]) -> None:
    """Compare the rejects with what becomes of the lines; users that differ are added to `found`."""
    stored: dict[str, set[str]] = defaultdict(set)
    for row in rejects.to_pylist():
        stored[row["raw"]].add(row["reason"])
    for user, one in enumerate(fates):
        late = {text for text, identity in one.late.items() if identity not in one.events}
        for text, reason in one.unusable | {(text, "late") for text in late}:
            if reason not in stored[text]:
                found.setdefault(user, f"the line {text} is no reject for being {reason}")
    for one in fates:  # (lines of nobody may have one text)
        for text, reason in one.unusable | {(text, "late") for text in one.late}:
            stored[text].discard(reason)
    left = {text: reasons for text, reasons in stored.items() if reasons}
    assert not left, f"rejects that nothing explains: {left}"


def by_log_of(events: pa.Table) -> dict[str, Any]:
    """`Mill.accepted`, of `bronze.events`."""
    found: dict[str, Any] = defaultdict(list)
    for row in events.to_pylist():
        name, cookie = row["user_id"], row["anonymous_id"]
        campaign = json.loads(row["boundary_values"] or "{}").get("k")
        told = (row["event_ts"], row["item_id"], cookie or "", campaign or "")
        found[f"cookie {cookie}" if name is None else name].append(told)
    return {name: sorted(events) for name, events in found.items()}


def check(
    spark: Any, folder: Path, kind: Kind, batch: Sequence[History], orders: tuple[bool, ...],
    limits: Thresholds | None = None,
) -> None:  # fmt: skip
    mill = Mill(spark, folder, kind, limits or Thresholds())
    for by_nights in orders:
        with pytest.MonkeyPatch.context() as patch:  # what is right is audited without Spark SQL
            patch.setattr(silver_audit, "after_image", lambda *_: pytest.fail("Arrow refused it"))
            found = mill.failing(batch, by_nights)
        if found:
            user = next(iter(found))

            def still(steps: list[History], nights: bool = by_nights) -> list[History]:
                return [steps[at] for at in mill.failing(steps, nights)]

            small = histories.shrunk(batch[user], still)
            [(_, what)] = mill.failing([small], by_nights).items()
            pytest.fail(
                f"{len(found)} of {len(batch)} histories ({kind.name}, "
                f"{'three nights' if by_nights else 'one load'}) differ. The simplest found:\n"
                f"{histories.in_words(small)}\n{what}"
            )


@pytest.mark.parametrize(
    ("name", "orders"),
    [
        ("gap", (True,)),
        pytest.param("native sessions and ids, local times", (False,), marks=pytest.mark.slow),
        pytest.param("people", (True,), marks=pytest.mark.slow),
        pytest.param("files that come again", (True,), marks=pytest.mark.slow),
        pytest.param("sessions of programs", (True,), marks=pytest.mark.slow),
        pytest.param("order in files", (True,), marks=pytest.mark.long),
        pytest.param(
            "native sessions with a gap, split, midnight", (True, False), marks=pytest.mark.slow
        ),
        pytest.param("split", (True,), marks=pytest.mark.slow),
        pytest.param("boundary", (True, False), marks=pytest.mark.slow),
        pytest.param("boundary, people, native sessions and ids", (True,), marks=pytest.mark.slow),
        pytest.param("computed, exploded and filtered", (True,), marks=pytest.mark.long),
    ],
)
def test_any_arrival_gives_the_oracles_tables(
    spark: Any, tmp_path: Path, name: str, orders: tuple[bool, ...]
) -> None:
    check(spark, tmp_path, KINDS[name], histories.make(HISTORIES, seed=len(name)), orders)


@pytest.mark.long
@pytest.mark.parametrize("round_", range(2))
@pytest.mark.parametrize("name", KINDS)
def test_any_arrival_of_thousands(spark: Any, tmp_path: Path, name: str, round_: int) -> None:
    # In one of the rounds plans are compiled and rows merged by Spark, as they are for larger logs.
    limits = (
        Thresholds(few_moved=-1, merged_rows=-1, read_bytes=-1) if round_ == 0 else Thresholds()
    )
    batch = histories.make(2500, seed=1000 + round_)  # in one run: a Spark job costs more
    check(spark, tmp_path, KINDS[name], batch, (True, False), limits)
