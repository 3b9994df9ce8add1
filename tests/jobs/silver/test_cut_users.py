"""All sessions anew by slices of users are the sessions of one cut, whatever the slices. No Spark."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expectations.session_rule import SessionRule
from jobs.core.arrow_types import arrow_schema
from jobs.core.tables import EVENTS
from jobs.lake import filesystem
from jobs.silver import cut_users
from jobs.silver.cut_arrow import EVENT_FIELDS, cut, cut_of

HOW = cut_of(SessionRule(native=True, gap_us=10))
COLUMNS = {name: EVENTS.columns[name] for name in ("user_id", *EVENT_FIELDS)}
EVENT = st.tuples(
    st.sampled_from(["ann", "bob", "cem", "dée"]), st.integers(0, 80), st.sampled_from([None, "a", "b"])
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    events=st.lists(EVENT, max_size=20), files=st.integers(1, 3), parts=st.integers(1, 5),
    edges=st.lists(st.integers(0, 90), max_size=3, unique=True).map(sorted),
)  # fmt: skip
@example(events=[], files=1, parts=2, edges=[5])
@example(events=[("ann", 5, "a"), ("ann", 4, None), ("bob", 80, "a")], files=2, parts=1, edges=[5])
def test_slices_leave_no_trace(
    events: list[tuple[str, int, str | None]], files: int, parts: int, edges: list[int]
) -> None:
    rows = [
        {"event_id": f"e{number}", "user_id": user, "event_ts": at, "item_id": "i",
         "source_session_id": native, "feedback": "positive", "exposed_with": ["x"] * (at % 3)}
        for number, (user, at, native) in enumerate(events)
    ]  # fmt: skip
    log = pa.Table.from_pylist(rows, schema=arrow_schema(COLUMNS))
    with TemporaryDirectory() as folder:
        stored = [f"{folder}/{number}.parquet" for number in range(files)]
        for number, path in enumerate(stored):
            filesystem.write_parquet(
                path, log.take(pa.array(range(number, len(rows), files), pa.int64()))
            )
        by_user = cut_users.ByUser(HOW, parts, f"{folder}/users")
        users = tuple(one["path"] for path in stored for one in by_user(path))
        by_time = cut_users.CutUsers(HOW, users, tuple(edges), f"{folder}/times")
        times = tuple(one["path"] for part in range(parts) for one in by_time(part))
        lay_out = cut_users.LayOut(times, f"{folder}/out")
        made = [[pq.read_table(one["path"]) for one in lay_out(part)]
                for part in range(len(edges) + 1)]  # fmt: skip
        assert len(list(Path(folder, "out").glob("*.parquet"))) == sum(map(len, made))
    bounds = [0, *edges, 1000]
    found = []
    for part, tables in enumerate(made):
        for table in tables:
            starts = table["start_ts"].cast(pa.int64()).to_pylist()
            assert starts == sorted(starts)
            assert bounds[part] <= starts[0] and starts[-1] < bounds[part + 1]
            found += table.to_pylist()
    wanted, _ = cut(log, HOW)
    assert sorted(found, key=str) == sorted(wanted.to_pylist(), key=str)
