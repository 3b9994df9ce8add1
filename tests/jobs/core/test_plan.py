"""Plans as a table of cases: facts and thresholds in, an algorithm, an engine and a way to publish
out. No table, no session."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.core.plan import (
    Algorithm,
    Engine,
    IngestFacts,
    ItemsFacts,
    Plan,
    Publish,
    ScoreFacts,
    SequencesFacts,
    SessionizeFacts,
    Thresholds,
    changed_users_engine,
    ingest_plan,
    items_plan,
    score_plan,
    sequences_plan,
    sessionize_plan,
)

HERE, INTERPRETED, COMPILED = Engine.HERE, Engine.INTERPRETED, Engine.COMPILED
LIMITS = Thresholds(
    few_moved=10, few_there=1000, few_bytes=500, few_lines=100, recut_events=50, counted_rows=60,
    changed_sessions=70, smallest_slice=5, slice_events=20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("moved", "there", "short", "many"),
    [
        (10, 1000, None, False), (11, 0, None, True), (0, 1001, None, True),
        (10**9, 10**9, True, False), (0, 0, False, True),
    ],
)  # fmt: skip
def test_few_and_many(moved: int, there: int, short: bool | None, many: bool) -> None:
    """(SESSIONMILL_SHORT_JOBS decides whatever the number of rows.)"""
    limits = replace(LIMITS, short_jobs=short)
    assert limits.many(moved, there) == many
    assert limits.spark(moved, there) is (COMPILED if many else INTERPRETED)
    assert limits.tasks(moved, there) is (COMPILED if many else HERE)
    assert limits.whole_tables() is (INTERPRETED if short else COMPILED)


@pytest.mark.parametrize(
    ("rows", "size", "here"),
    [(10, 500, True), (11, 0, False), (10, 501, False), (10, None, True), (11, None, False)],
)
def test_merges(rows: int, size: int | None, here: bool) -> None:
    limits = replace(LIMITS, merged_rows=10, merged_bytes=500)
    assert limits.in_one_process(rows, size) is here


@pytest.mark.parametrize("word", ["swap files", "rewrite small table", "merge"])
def test_what_earlier_versions_wrote_anew_is_merged(word: str) -> None:
    assert Publish(word) is Publish.MERGE


@pytest.mark.parametrize(("events", "size"), [(4, 5), (20, 11), (38, 20), (1000, 20)])
def test_slices(events: int, size: int) -> None:
    assert LIMITS.slice_size(events, cores=2) == size


LINES = IngestFacts(lines=10, stored=0, native_ids=False, late=False)


@pytest.mark.parametrize(
    ("changes", "path", "engine", "publish"),
    [
        ({}, Algorithm.FIRST_LINES, INTERPRETED, None),
        ({"replaces": False}, Algorithm.FIRST_LINES, INTERPRETED, Publish.APPEND),
        ({"lines": 11}, Algorithm.FIRST_SLICES, COMPILED, Publish.APPEND),
        ({"lines": 11, "late": True}, Algorithm.FIRST_LINES, COMPILED, None),
        ({"lines": 11, "native_ids": True}, Algorithm.FIRST_LINES, COMPILED, None),
        ({"stored": 5}, Algorithm.STORED_SPAN, INTERPRETED, None),
        ({"stored": 1001}, Algorithm.STORED_TIMES, COMPILED, None),
        ({"lines": 100, "stored": 5}, Algorithm.STORED_TIMES, COMPILED, None),
        ({"lines": 101, "stored": 5}, Algorithm.STORED_SPAN, COMPILED, None),
        ({"stored": 5, "native_ids": True}, Algorithm.STORED_ALL, INTERPRETED, None),
        ({"lines": 100, "stored": 5, "native_ids": True, "replaces": True},
         Algorithm.STORED_IDS, COMPILED, Publish.MERGE),
        ({"lines": 101, "stored": 5, "native_ids": True, "replaces": False},
         Algorithm.STORED_ALL, COMPILED, Publish.APPEND),
    ],
)  # fmt: skip
def test_ingest(changes: dict, path: Algorithm, engine: Engine, publish: Publish | None) -> None:
    facts = replace(LINES, **changes)
    assert ingest_plan(facts, LIMITS) == Plan("ingest", path, engine, publish)
    assert ingest_plan(facts, LIMITS, "replay-rejects").job == "replay-rejects"


NIGHT = SessionizeFacts(gap_rule=True, events=900, grown=50, whole=False, replaces=True)


@pytest.mark.parametrize(
    ("changes", "path", "engine", "publish"),
    [
        ({"whole": True, "replaces": False}, Algorithm.CUT_SLICES, COMPILED, Publish.APPEND),
        ({"whole": True}, Algorithm.CUT_SLICES, COMPILED, Publish.REPLACE),
        ({"whole": True, "gap_rule": False, "events": 10}, Algorithm.CUT_USERS, INTERPRETED,
         Publish.REPLACE),
        ({}, Algorithm.RECUT_ARROW, HERE, None),
        ({"moved": 50, "only_opens": True}, Algorithm.RECUT_ARROW, HERE, Publish.APPEND),
        ({"gap_rule": False, "moved": 50, "only_opens": False}, Algorithm.RECUT_ARROW, HERE,
         Publish.MERGE),
        ({"grown": 51}, Algorithm.RECUT_USERS, COMPILED, None),
        ({"grown": -51}, Algorithm.RECUT_USERS, COMPILED, None),
        ({"grown": 0, "moved": 51, "only_opens": False}, Algorithm.RECUT_USERS, COMPILED,
         Publish.MERGE),
    ],
)  # fmt: skip
def test_sessionize(
    changes: dict, path: Algorithm, engine: Engine, publish: Publish | None
) -> None:
    plan = sessionize_plan(replace(NIGHT, **changes), LIMITS)
    assert plan == Plan("sessionize", path, engine, publish)


ITEMS = ItemsFacts(items=60, events=900, grown=60, whole=False)


@pytest.mark.parametrize(
    ("changes", "path", "engine", "publish"),
    [
        ({}, Algorithm.COUNT_ARROW, HERE, Publish.MERGE),
        ({"only_inserts": True}, Algorithm.COUNT_ARROW, HERE, Publish.MERGE),
        ({"grown": 61}, Algorithm.COUNT_CHANGES, COMPILED, Publish.MERGE),
        ({"items": 61}, Algorithm.COUNT_CHANGES, COMPILED, Publish.MERGE),
        ({"only_inserts": False, "grown": 2}, Algorithm.COUNT_CHANGES, INTERPRETED,
         Publish.MERGE),
        ({"whole": True}, Algorithm.COUNT_ALL, COMPILED, Publish.MERGE),
        ({"whole": True, "items": 0}, Algorithm.COUNT_ALL, COMPILED, Publish.APPEND),
        ({"items": 0, "grown": 2}, Algorithm.COUNT_CHANGES, INTERPRETED, Publish.APPEND),
    ],
)  # fmt: skip
def test_items(changes: dict, path: Algorithm, engine: Engine, publish: Publish) -> None:
    plan = items_plan(replace(ITEMS, **changes), LIMITS)
    assert plan == Plan("items", path, engine, publish)


USERS = SequencesFacts(sessions=900, grown=10, whole=False, stored=True, size=501)


@pytest.mark.parametrize(
    ("changes", "path", "engine", "publish"),
    [
        ({"whole": True}, Algorithm.WEAVE_ALL, HERE, Publish.REPLACE),
        ({"whole": True, "stored": False, "grown": 11}, Algorithm.WEAVE_ALL, COMPILED,
         Publish.APPEND),
        ({}, Algorithm.WEAVE_CHANGED, HERE, None),
        ({"share": 0.49}, Algorithm.WEAVE_CHANGED, HERE, Publish.MERGE),
        ({"share": 0.5}, Algorithm.WEAVE_KEPT, HERE, Publish.REPLACE),
        ({"share": 0.1, "size": 500}, Algorithm.WEAVE_KEPT, HERE, Publish.REPLACE),
        ({"share": 0.1, "sessions": 1001}, Algorithm.WEAVE_CHANGED, COMPILED, Publish.MERGE),
    ],
)  # fmt: skip
def test_sequences(changes: dict, path: Algorithm, engine: Engine, publish: Publish | None) -> None:
    plan = sequences_plan(replace(USERS, **changes), LIMITS)
    assert plan == Plan("sequences", path, engine, publish)


@pytest.mark.parametrize(("grown", "engine"), [(5, HERE), (70, HERE), (71, COMPILED)])
def test_changed_users(grown: int, engine: Engine) -> None:
    assert changed_users_engine(replace(USERS, grown=grown), LIMITS) is engine


def test_score() -> None:
    assert score_plan(ScoreFacts(there=True)).publish is Publish.NOTHING
    plan = score_plan(ScoreFacts(there=False))
    assert plan == Plan("score", Algorithm.SCORE_ALL, HERE, Publish.REPLACE)


def test_a_plan_in_words() -> None:
    plan = sessionize_plan(NIGHT, LIMITS)
    words = "sessions around the changes, in Arrow; this process; publish: "
    assert plan.in_words() == words + "not known yet"
    plan = sessionize_plan(replace(NIGHT, only_opens=True), LIMITS)
    assert plan.in_words() == words + "append"
    assert plan.to_json() == {
        "path": "sessions around the changes, in Arrow", "engine": "this process",
        "publish": "append",
    }  # fmt: skip
