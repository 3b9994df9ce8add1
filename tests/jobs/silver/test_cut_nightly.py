"""A night's cut is the cut of what is there afterwards: events come, go and are replaced. No Spark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expectations.session_rule import SessionRule
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import EVENTS, SESSIONS
from jobs.lake import filesystem
from jobs.records.boundary import VALUES, Boundary
from jobs.records.expressions import parsed
from jobs.silver import cut_arrow, cut_nightly

GAP_US = 10
GAP, NATIVE = (
    SessionRule(native=native, gap_us=GAP_US, max_session_us=40, max_session_events=5)
    for native in (False, True)
)
BOUNDARY = Boundary(
    parsed("sessions.boundary", "prev.campaign = '1' AND next.item_id = 'i0'"),
    ours=("item_id",), log=(("campaign", ""),),
)  # fmt: skip
RULES = {
    "gap": GAP, "native": NATIVE, "native with a gap": replace(NATIVE, native_gap=True),
    "split": replace(GAP, split=True, max_session_us=8),
    "native split": replace(NATIVE, split=True, max_session_us=12),
    "midnight": replace(GAP, midnight="UTC"), "native midnight": replace(NATIVE, midnight="UTC"),
    "all": replace(NATIVE, native_gap=True, midnight="UTC", split=True, max_session_us=12),
}  # fmt: skip
HOW = {name: cut_arrow.cut_of(rule) for name, rule in RULES.items()}
HOW |= {
    f"{name}, boundary": cut_arrow.cut_of(replace(RULES[name], boundary=True), BOUNDARY)
    for name in ("gap", "native", "all")
}
COLUMNS = {name: EVENTS.columns[name] for name in ("user_id", *cut_arrow.EVENT_FIELDS, VALUES)}
Event = tuple[str, int, int | None, str | None, int]
EVENT = st.tuples(
    st.sampled_from(["ann", "bob"]), st.integers(-40, 40), st.sampled_from([None, 0, 1]),
    st.sampled_from([None, "a", "a", "b"]), st.integers(0, 1),
)  # fmt: skip
"""User, time (us), tie break, id of a session, item."""
# Of each id: what is there before (null: nothing), and what in each of two commits (no change: 0).
CHANGE = st.one_of(st.just(0), st.none(), EVENT)
HISTORY = st.lists(st.tuples(st.one_of(st.none(), EVENT), CHANGE, CHANGE), min_size=1, max_size=14)
History = list[tuple[Event | None, Any, Any]]


def row(number: int, event: Event) -> dict[str, Any]:
    user, at, tie, native, item = event
    return {
        "event_id": f"e{(number * 7) % 100:02d}", "user_id": user, "event_ts": at, "item_id": f"i{item}",
        "tie_break": tie, "source_session_id": native, "feedback": "positive",
        "exposed_with": ["x"] if item else None, VALUES: f'{{"campaign":"{item}"}}',
    }  # fmt: skip


def table(rows: list[dict[str, Any]], extra: dict[str, str] | None = None) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=arrow_schema(COLUMNS | (extra or {})))


def feed_of(history: History) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Events before, the change feed of two commits, and events after."""
    before, feed, after = [], [], []
    for number, (was, *steps) in enumerate(history):
        before += [row(number, was)] if was else []
        now = was
        for version, step in enumerate(steps):
            if step == 0 or (step is None and now is None):
                continue
            kinds = [(now, "delete" if step is None else "update_preimage")] if now else []
            kinds += [(step, "update_postimage" if now else "insert")] if step else []
            feed += [row(number, event) | {"_change_type": kind, "_commit_version": version}
                     for event, kind in kinds]  # fmt: skip
            now = step
        after += [row(number, now)] if now else []
    told = {"_change_type": "string", "_commit_version": "bigint"}
    return table(before), table(feed[::-1], told), table(after)


def around(folder: str, paths: list[str], moved: pa.Table, rule: SessionRule) -> pa.Table:
    """The stored sessions that the changes may alter."""
    places = moved["user_id"], moved["event_ts"], moved["event_ts"]
    of_user = not rule.silence_parts
    keys = (cut_nightly.keys_of if of_user else cut_nightly.spans_of)(*places)
    path = f"{folder}/keys.parquet"
    filesystem.write_parquet(path, keys)

    def ask(task: Any) -> list[pa.Table]:
        return [filesystem.read_parquet(one["path"]) for file in paths for one in task(file)]

    keys = cut_nightly.reached(keys, rule, path, f"{folder}/edges", ask)
    filesystem.write_parquet(path, keys)
    near = cut_nightly.Near(f"{folder}/keys.parquet", rule, f"{folder}/near")
    schema = arrow_schema(SESSIONS.columns)
    found = [filesystem.read_parquet(one["path"]) for path in paths for one in near(path)]
    return pa.concat_tables([schema.empty_table(), *(rows.cast(schema) for rows in found)])


def by_id(rows: pa.Table) -> dict[str, dict[str, Any]]:
    named = rows.select(list(SESSIONS.columns)).to_pylist()
    assert len(named) == len({one["session_id"] for one in named})
    return {one["session_id"]: one for one in named}


A, B = ("ann", 0, None, "a", 0), ("ann", 1, None, "b", 0)


@pytest.mark.parametrize("name", HOW)
@settings(max_examples=30, deadline=None)
@given(history=HISTORY)
@example(history=[(A, None, 0), (A, 0, 0)])  # one goes
@example(history=[(("ann", at, None, None, 0), *change, 0) for at, change in
                  ((0, [0]), (9, [None]), (18, [0]))])  # the one in the middle goes  # fmt: skip
@example(history=[(A, None, A)])  # goes and comes again, the same
@example(history=[(None, A, None)])  # comes and goes
@example(history=[(A, ("bob", 0, None, "a", 0), 0)])  # moves to another user
@example(history=[(A, (*A[:4], 1), 0)])  # the same place, another content
# Silence parts none of these; what lies between two changes, and is near none of them, is cut with them.
@example(history=[(("ann", at, None, None, 0), 0, 0) for at in range(-18, 19, 6)]
         + [(None, ("ann", at, None, None, 0), 0) for at in (-28, 28)])  # fmt: skip
# As many events under the same first one, but others: b comes between, a in front of it.
@example(history=[(("ann", at, None, "a", 0), 0, 0) for at in (0, 30, 31)]
         + [(None, ("ann", at, None, name, 0), 0) for at, name in ((1, "a"), (2, "a"), (3, "b"))])  # fmt: skip
def test_a_night_gives_the_sessions_of_what_is_there(history: History, name: str) -> None:
    before, feed, after = feed_of(history)
    how = HOW[name]
    gone, came = cut_nightly.net(feed)
    old, _ = cut_arrow.cut(before, how)
    wanted = by_id(cut_arrow.cut(after, how)[0])
    with TemporaryDirectory() as folder:
        half = old.num_rows // 2
        paths = [f"{folder}/{number}.parquet" for number in range(2)]
        for path, part in zip(paths, (old.slice(0, half), old.slice(half)), strict=True):
            filesystem.write_parquet(path, part, 2)
        stored = around(folder, paths, pa.concat_tables([gone, came]), how.rule)
        changed = cut_nightly.recut(stored, gone, came, how)
    kinds = {kind: changed.filter(pc.equal(changed["change"], kind)) for kind in
             ("new", "changed", "retired")}  # fmt: skip
    there = by_id(old)
    assert by_id(kinds["retired"]).items() <= there.items()
    assert by_id(kinds["new"]).keys().isdisjoint(there)
    for session, one in by_id(kinds["changed"]).items():
        assert there[session] != one
    put = by_id(kinds["new"]) | by_id(kinds["changed"])
    kept = {n: one for n, one in there.items() if n not in by_id(kinds["retired"])}
    assert kept | put == wanted
    counts = cut_nightly.counted(changed)
    assert counts["events_before"] + came.num_rows - gone.num_rows == counts["events_after"]
    of = {event["event_id"]: n for n, one in there.items() for event in one["events"]}
    for event in came["event_id"].to_pylist():
        of.pop(event, None)
    for one in changed.filter(pc.not_equal(changed["change"], "retired")).to_pylist():
        held = {of[event["event_id"]] for event in one["events"] if event["event_id"] in of}
        assert one["merged"] == (len(held) > 1)


def test_a_file_without_a_session_near_is_not_copied(tmp_path: Path) -> None:
    """A file without a session near the changes is not written again."""
    how = HOW["gap"]
    old, _ = cut_arrow.cut(table([row(1, ("ann", 0, None, None, 0))]), how)
    filesystem.write_parquet(f"{tmp_path}/0.parquet", old)
    far = table([row(2, ("ann", GAP_US + 1, None, None, 0))])
    assert around(str(tmp_path), [f"{tmp_path}/0.parquet"], far, how.rule).num_rows == 0
    assert not (tmp_path / "near").exists()


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        (["a", "b"], ["a", "b"], False), (None, None, False), ([None, "a"], [None, "a"], False),
        ([], [], False), (["a", "b"], ["b", "a"], True), (["a"], ["a", "b"], True),
        ([], None, True), ([None], ["a"], True),
    ],
)  # fmt: skip
def test_an_event_has_changed_if_what_was_exposed_with_it_has(
    before: Any, after: Any, changed: bool
) -> None:
    """Beside an event of another list that stays as it is."""
    still = row(1, A) | {"exposed_with": ["b", None]}
    one, other = (row(2, B) | {"exposed_with": shown} for shown in (before, after))
    steps = [(still, "update_preimage"), (still, "update_postimage"), (one, "update_preimage"),
             (other, "update_postimage")]  # fmt: skip
    feed = [event | {"_change_type": kind, "_commit_version": 1} for event, kind in steps]
    gone, came = cut_nightly.net(
        table(feed, {"_change_type": "string", "_commit_version": "bigint"})
    )
    assert gone["exposed_with"].to_pylist() == ([before] if changed else [])
    assert came["exposed_with"].to_pylist() == ([after] if changed else [])
