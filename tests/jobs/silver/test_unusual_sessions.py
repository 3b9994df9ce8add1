"""What a run says of sessions if the rule does not seem to fit the log. No JVM."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.core.source_file import load_source
from jobs.silver.sessionize import unusual

SOURCE = """
[source]
name = "clicks"
landing = "*.csv"
format = "csv"
[columns]
user_id = "user"
item_id = "item"
event_ts = "ts"
[sessions]
gap_s = {gap_s}
"""


@pytest.mark.parametrize(
    ("gap_s", "events", "runaways", "words"),
    [
        (30, 110, 0, ["a session has 1.10 events in the mean. sessions.gap_s = 30 is in seconds"]),
        (30, 900, 0, []),  # a fast log
        (1800, 110, 0, []),  # a log of single visits
        (1_800_000, 900, 40, ["40 of 100 sessions are runaway", "sessions.gap_s = 1,800,000"]),
        (1800, 900, 20, []),
    ],
)
def test_a_gap_that_does_not_fit(
    tmp_path: Path, gap_s: int, events: int, runaways: int, words: list[str]
) -> None:
    (tmp_path / "clicks.toml").write_text(SOURCE.format(gap_s=gap_s))
    lake = SimpleNamespace(session_events=lambda: None, rows=lambda _: events)
    context: Any = SimpleNamespace(source=load_source(str(tmp_path / "clicks.toml")), lake=lake)
    notes = unusual(context, 100, runaways)
    assert bool(notes) is bool(words)
    for word in words:
        assert word in notes[0] and "python -m jobs run --source clicks --rebuild" in notes[0]
