"""A training that its comparison cannot be compared with says so before it begins."""

from types import SimpleNamespace
from typing import Any

import pytest

from models.training import run

ASKED = {"data.cut.split": "temporal", "data.target": "next_item", "data.table_version": 1}


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ([], None),
        ([{"data.cut.split": "temporal", "data.target": "next_item", "data.method": "pop"}], None),
        (
            [{"data.table_version": "1"}, {"data.cut.split": "nightly"}],
            "cut.split nightly and here tem",
        ),
        ([{"data.table_version": "3"}], "table_version 3 and here 1"),
    ],
)
def test_what_is_asked_otherwise(
    monkeypatch: pytest.MonkeyPatch, there: list[dict[str, str]], said: str | None
) -> None:
    runs = [SimpleNamespace(data=SimpleNamespace(params=one)) for one in there]
    monkeypatch.setattr(run.tracking, "runs", lambda *_, **__: runs)
    client: Any = None
    assert run.not_comparable(client, "0", None, ASKED) == []
    lines = run.not_comparable(client, "0", "first", ASKED)
    if said is None:
        assert lines == []
    else:
        [line] = lines
        assert said in line and "that comparison 'first' has" in line and "--comparison" in line
