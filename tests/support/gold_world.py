"""Small gold tables that the other model tests are told on, and how they are read."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import SESSIONS
from models.core.errors import UserError
from models.core.rows import Rows
from models.data.load import Data, load_data
from models.data.sequences import open_sequences
from models.data.splits import Filters

torch.set_num_threads(1)  # the models here are tiny: threads would only wait for each other

SECOND = 1_000_000
DAY = 86_400 * SECOND
# item_id, us, session ordinal, and where they matter feedback, items shown with it
Event = tuple[str, int, int] | tuple[str, int, int, str] | tuple[str, int, int, str, Sequence[str]]


def write_gold(
    lake: Path, source: str, users: dict[str, Sequence[Event]], items: Sequence[str] | None = None
) -> None:
    """gold.sequences and gold.items as the jobs would leave them."""
    from deltalake import write_deltalake  # (not on a GPU machine: benchmarks/gpu.py)

    seen: dict[str, int] = {item: i for i, item in enumerate(items or [], 1)}
    for events in users.values():
        for event in events:
            for item in (event[0], *(event[4] if len(event) > 4 else ())):
                seen.setdefault(item, len(seen) + 1)
    names = list(users)
    stamps = pa.timestamp("us", tz="UTC")
    table = pa.table(
        {
            "user_id": pa.array(names, pa.string()),
            "item_index": pa.array(
                [[seen[e[0]] for e in users[n]] for n in names], pa.list_(pa.int32())
            ),
            "event_ts": pa.array([[e[1] for e in users[n]] for n in names], pa.list_(stamps)),
            "session_ordinal": pa.array(
                [[e[2] for e in users[n]] for n in names], pa.list_(pa.int32())
            ),
            "feedback": pa.array(
                [[e[3] if len(e) > 3 else "positive" for e in users[n]] for n in names],
                pa.list_(pa.string()),
            ),
            "exposed_items": pa.array(
                [
                    [[seen[i] for i in (e[4] if len(e) > 4 else ())] for e in users[n]]
                    for n in names
                ],
                pa.list_(pa.list_(pa.int32())),
            ),
        }
    )
    write_deltalake(str(lake / source / "gold" / "sequences"), table, mode="overwrite")
    count = Counter(event[0] for events in users.values() for event in events)
    gold_items = pa.table(
        {
            "item_id": pa.array(list(seen), pa.string()),
            "item_index": pa.array(list(seen.values()), pa.int32()),
            "first_seen_ts": pa.array([0] * len(seen), stamps),
            "event_count": pa.array([count[item] for item in seen], pa.int64()),
        }
    )
    write_deltalake(str(lake / source / "gold" / "items"), gold_items, mode="overwrite")


def write_silver(lake: Path, source: str, users: dict[str, Sequence[Event]]) -> None:
    """silver.sessions that `write_gold` could have been made from."""
    from deltalake import write_deltalake  # (not on a GPU machine: benchmarks/gpu.py)

    rows = []
    for user, events in users.items():
        for ordinal in sorted({event[2] for event in events}):
            told = [(n, event) for n, event in enumerate(events) if event[2] == ordinal]
            start, end = told[0][1][1], told[-1][1][1]
            rows.append({
                "session_id": f"{user}/{ordinal}", "user_id": user, "start_ts": start,
                "end_ts": end, "start_date": start // DAY, "event_count": len(told),
                "runaway": None,
                "events": [
                    {"event_id": f"{user}/{n:05d}", "item_id": event[0], "event_ts": event[1],
                     "feedback": event[3] if len(event) > 3 else "positive",
                     "exposed_with": list(event[4]) if len(event) > 4 else None}
                    for n, event in told
                ],
            })  # fmt: skip
    table = pa.Table.from_pylist(rows, arrow_schema(SESSIONS.columns))
    write_deltalake(str(lake / source / "silver" / "sessions"), table, mode="overwrite")


def attributes_table(
    lake: Path, rows: list[tuple[str, int, dict[str, str]]], source: str = "toy"
) -> None:
    """gold.item_attributes from (item, known from in us, attributes)."""
    from deltalake import write_deltalake  # (not on a GPU machine: benchmarks/gpu.py)

    table = pa.table(
        {
            "item_id": pa.array([row[0] for row in rows], pa.string()),
            "known_from": pa.array([row[1] for row in rows], pa.timestamp("us", "UTC")),
            "attributes": pa.array(
                [list(row[2].items()) for row in rows], pa.map_(pa.string(), pa.string())
            ),
        }
    )
    write_deltalake(str(lake / source / "gold" / "item_attributes"), table, mode="append")


def ring(
    users: int = 60, events: int = 40, items: int = 15, seed: int = 0
) -> dict[str, list[Event]]:
    """A planted pattern: what follows item i is item i+1, across sessions of four too."""
    rng = np.random.default_rng(seed)
    story: dict[str, list[Event]] = {}
    for user in range(users):
        start, base = int(rng.integers(items)), int(rng.integers(DAY))
        story[f"u{user:03d}"] = [
            (f"i{(start + e) % items:02d}", base + (e // 4) * DAY + (e % 4) * SECOND, e // 4 + 1)
            for e in range(events)
        ]
    return story


def favourites(users: int = 40, seed: int = 0) -> dict[str, list[Event]]:
    """Baskets: each user buys two own favourites of ten in most of the 20 sessions, and bread."""
    rng = np.random.default_rng(seed)
    story: dict[str, list[Event]] = {}
    for user in range(users):
        own = rng.choice(10, 2, replace=False)
        events: list[Event] = []
        for session in range(1, 21):
            basket = [f"own{i}" for i in own if rng.random() < 0.8]
            basket += ["bread"] if rng.random() < 0.4 else []
            events += [
                (item, session * DAY + user * SECOND, session) for item in basket or ["milk"]
            ]
        ordinal = {s: i for i, s in enumerate(sorted({e[2] for e in events}), 1)}
        story[f"u{user:03d}"] = [(e[0], e[1], ordinal[e[2]]) for e in events]
    return story


NIGHTS, GROUPS, OLD, NEW = 8, 6, 40, 12  # of `launches`


def launches(lake: Path, before_the_last: bool = False) -> dict[str, list[Event]]:
    """After any item of a group comes any item of the next one, two a night. In the last night half
    of the events are on items that were never seen, and were in the catalogue since the night before.
    Others come into the catalogue that night. `before_the_last`: the log as it is before it."""
    dice = np.random.default_rng(6)
    users: dict[str, list[Event]] = {}
    for user in range(160):
        start, base = int(dice.integers(GROUPS)), int(dice.integers(DAY // 2))
        events: list[Event] = []
        for e in range(2 * (NIGHTS - before_the_last)):
            new = e >= 2 * (NIGHTS - 1) and dice.random() < 0.5
            item = f"n{int(dice.integers(NEW)):02d}" if new else f"o{int(dice.integers(OLD)):02d}"
            at = (e // 2) * DAY + base + (e % 2) * SECOND
            events.append((f"c{(start + e) % GROUPS}-{item}", at, 1 + e // 2))
        users[f"u{user:03d}"] = events
    groups = [f"c{group}" for group in range(GROUPS)]
    old = [f"{group}-o{i:02d}" for group in groups for i in range(OLD)]
    new = [f"{group}-n{i:02d}" for group in groups for i in range(NEW)]
    later = [f"{group}-x{i:02d}" for group in groups for i in range(3)]
    write_gold(lake, "toy", users, [*old, *new, *later])
    night = (NIGHTS - 1) * DAY
    attributes_table(
        lake,
        [(item, 0, {"group": item[:2]}) for item in old]
        + [(item, night - DAY, {"group": item[:2]}) for item in new]
        + [(item, night, {"group": item[:2]}) for item in later],
    )
    return users


def data_of(lake: Path, source: str = "toy", **options: object) -> Data:
    filters = options.pop(
        "filters", Filters(min_item_events=1, min_session_events=1, min_user_sessions=1)
    )
    return load_data(lake=str(lake), source=source, filters=filters, **options)  # type: ignore[arg-type]


def rows_of(*users: Sequence[tuple[int, int, int]], positive: Sequence[bool] | None = None) -> Rows:
    """Rows from (vocabulary index, seconds, ordinal) triples."""
    flat = [event for user in users for event in user]
    return Rows(
        item=np.array([e[0] for e in flat], dtype=np.int32),
        ts=np.array([e[1] * SECOND for e in flat], dtype=np.int64),
        ordinal=np.array([e[2] for e in flat], dtype=np.int32),
        positive=np.array(positive if positive is not None else [True] * len(flat)),
        start=np.cumsum([0, *(len(user) for user in users)]).astype(np.int64),
    )


def evidence(rows: Rows, feedback: list[int], shown: dict[int, list[int]] | None = None) -> Rows:
    """Rows that also know feedback, and what was shown with event number e."""
    shown = shown or {}
    parts = [shown.get(e, []) for e in range(len(rows.item))]
    return replace(
        rows,
        feedback=np.array(feedback, dtype=np.int8),
        positive=np.array(feedback) == 0,
        shown_start=np.cumsum([0, *(len(part) for part in parts)]),
        shown=np.array([i for part in parts for i in part], dtype=np.int32),
    )


STORY: dict[str, list[Event]] = {
    "bob": [("x", 10, 1), ("y", 20, 1, "exposed"), ("x", 5000, 2)],
    "ann": [("z", 7, 1)],
}


def test_arrays_are_the_table_with_users_in_order(tmp_path: Path) -> None:
    from deltalake import DeltaTable

    write_gold(tmp_path, "toy", STORY)
    path = str(tmp_path / "toy/gold/sequences")
    table_id = str(DeltaTable(path).metadata().id)
    got = open_sequences(path, None, tmp_path / "cache", "make")
    assert got.user_id == ["ann", "bob"]
    assert got.length.tolist() == [1, 3]
    bob = slice(int(got.start[1]), int(got.start[1]) + 3)
    assert got.item[bob].tolist() == [1, 2, 1]
    assert got.ts[bob].tolist() == [10, 20, 5000]
    assert got.session[bob].tolist() == [1, 1, 2]
    assert got.feedback[bob].tolist() == [0, 2, 0]
    assert got.exposed_count.sum() == 0
    assert got.table_id == table_id


def test_a_pinned_version_stays_what_it_was(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", STORY)
    write_gold(tmp_path, "toy", {"ann": [("z", 7, 1), ("q", 8, 1)]})
    path = str(tmp_path / "toy/gold/sequences")
    cache = tmp_path / "cache"
    assert open_sequences(path, 0, cache, "make").length.tolist() == [1, 3]
    assert open_sequences(path, 1, cache, "make").length.tolist() == [2]
    assert open_sequences(path, None, cache, "make").version == 1
    with pytest.raises(UserError, match=r"no version 7 .*0 to 1"):
        open_sequences(path, 7, cache, "make")


def test_a_missing_table_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make it with `python -m jobs run --source toy`"):
        data_of(tmp_path)


def test_two_processes_may_make_the_arrays_at_once(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", ring())
    path, cache = str(tmp_path / "toy/gold/sequences"), tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from models.data.sequences import open_sequences; "
        "print(open_sequences(sys.argv[1], None, Path(sys.argv[2]), 'make').item.sum())"
    )
    command = [sys.executable, "-c", code, path, str(cache)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {worker.communicate(timeout=120)[0].strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0]
    assert said == {str(open_sequences(path, None, cache, "make").item.sum())}
    assert [p.name for p in cache.iterdir() if p.name.startswith(".")] == []
