"""A registered model behind `mlflow models serve`, asked over HTTP with raw ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from tests.support.airflow_tools import REPO, local
from tests.support.gold_world import ring, write_gold
from tests.support.make_tools import uv
from tests.support.recorded import World
from tests.support.served_tools import WIRE

# Ids that CSV readers and JSON readers take for numbers or for nothing; the others are i07, i08 …
ODD = ["00123", "1e5", "nan", "NA", "null", "None", "1.0"]
ITEMS = [*ODD, *(f"i{n:02d}" for n in range(len(ODD), 15))]


def only_serving(folder: Path) -> Path:
    """The Python of an environment that has the extra `serving` of this project and nothing else."""
    extra = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needs = extra["optional-dependencies"]["serving"]
    subprocess.run([uv(), "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    python = folder / "bin" / "python"
    # (The base of a virtual environment is its own: none of ours can be seen from there.)
    subprocess.run([uv(), "pip", "install", "--quiet", "--python", str(python), *needs], check=True)
    found = subprocess.run(
        [str(python), "-c", "import jobs, pyspark, airflow"], cwd=folder, capture_output=True
    )
    assert found.returncode == 1
    return python


@pytest.fixture(
    scope="module", params=["here", pytest.param("with the serving extra", marks=pytest.mark.long)]
)
def url(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    named = {f"i{n:02d}": item for n, item in enumerate(ITEMS)}
    users = {user: [(named[e[0]], *e[1:]) for e in events] for user, events in ring().items()}
    write_gold(world.lake, "toy", users)
    world.train("gru4rec+st", "--comparison", "http", "--seed", "1")
    for command in ("compare", "register"):
        asked = ("--source", str(world.source), "--comparison", "http", "--json")
        status, _, _, err = world.run(command, *asked)
        assert status == 0, err
    port, folder = local().free_port(), tmp_path_factory.mktemp("served")
    here = request.param == "here"
    python = Path(sys.executable) if here else only_serving(folder / "environment")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{world.root}/.mlflow/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [str(python), "-m", "mlflow", "models", "serve", "-m", "models:/toy@challenger",
             "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            cwd=folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.terminate()
        server.wait(20)


def sent(url: str, body: bytes, kind: str) -> Any:
    """The answer's predictions; of a refusal, its status and its words."""
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ask(url: str, events: list[dict[str, Any]] | Any, **params: Any) -> Any:
    body = json.dumps({"dataframe_records": events, "params": params}).encode()
    return sent(url, body, "application/json")


def event(user: str, item: str | None, at: str | None) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "event_ts": at}


def ids(answer: list[dict[str, Any]], place: int = 0) -> list[str]:
    return [item["item_id"] for item in answer[place]["items"]]


@pytest.mark.slow
def test_a_json_request_with_raw_ids_is_answered(url: str) -> None:
    ann = [event("ann", "i07", "2024-01-01T10:00:00Z"), event("ann", "i08", "2024-01-01T10:01:00Z")]
    answer = ask(url, ann, k=3)
    assert [row["user_id"] for row in answer] == ["ann"] and len(ids(answer)) == 3
    scores = [item["score"] for item in answer[0]["items"]]
    assert scores == sorted(scores, reverse=True)
    assert len(ids(ask(url, ann))) == 10

    assert ids(ask(url, ann[::-1], k=3)) == ids(answer)  # in any order
    texts = [ann[0] | {"event_ts": "2024-01-01T19:00:00+09:00"}, ann[1]]
    assert ids(ask(url, texts, k=3)) == ids(answer)

    # Nobody has heard of these: what is popular.
    nothing = ask(url, [event("new", None, None)], k=3)
    odd = ask(url, [event("odd", "never seen", "2024-01-01T10:00:00Z")], k=3)
    assert ids(nothing) == ids(odd) and ids(nothing) != ids(answer)
    both = ask(url, [*ann, event("new", None, None)], k=3)
    assert [ids(both, 0), ids(both, 1)] == [ids(answer), ids(nothing)]
    some = [*ann, event("ann", "never seen", "2024-01-01T10:02:00Z")]
    assert ids(ask(url, some, k=3)) == ids(answer)

    assert len(ids(ask(url, ann[:1], k=3))) == 3
    thousand = [
        event("ann", ITEMS[n % 15], f"2024-01-{1 + n // 60:02d}T10:{n % 60:02d}:00Z")
        for n in range(1000)
    ]
    assert len(ids(ask(url, thousand, k=3))) == 3
    everything = ids(ask(url, ann, k=1000))
    assert sorted(everything) == sorted(ITEMS)


@pytest.mark.slow
def test_rules_are_a_parameter_of_a_request(url: str) -> None:
    """The best of what is allowed, as many as were asked for; rules that are none are refused."""
    ann = [event("ann", "i07", "2024-01-01T10:00:00Z"), event("ann", "i08", "2024-01-01T10:01:00Z")]
    everything = ids(ask(url, ann, k=1000))
    blocked = everything[:2]
    assert ids(ask(url, ann, k=3, rules=json.dumps({"blocked": blocked}))) == everything[2:5]
    allowed = {"allowed": everything[::2], "exclude_seen_days": 1}
    seen = ("i07", "i08")
    left = [item for item in everything[::2] if item not in seen]
    assert ids(ask(url, ann, k=1000, rules=json.dumps(allowed))) == left
    # Somebody nobody has heard of is given what is popular and allowed.
    new = [event("new", None, None)]
    popular = ids(ask(url, new, k=1000))
    rules = json.dumps({"blocked": popular[:1]})
    assert ids(ask(url, new, k=3, rules=rules)) == popular[1:4]
    status, words = ask(url, ann, k=3, rules=json.dumps({"block": blocked}))
    assert status == 400 and "'block' is not known: give any of allowed, blocked" in words


def test_ids_come_through_as_they_are_in_every_form(url: str) -> None:
    """Each user has one event, of the item that is called as they are."""
    users = [*ODD, " x", "é", "inf", "never seen"]
    frame = pd.DataFrame(
        {
            "user_id": users, "item_id": users, "source_session_id": users,
            "event_ts": pd.date_range("2024-01-01", periods=len(users), freq="s", tz="UTC"),
        }
    )  # fmt: skip
    answers = [sent(url, write(frame), kind) for kind, write in WIRE.values()]
    answer = answers[0]
    assert all(other == answer for other in answers)
    assert [row["user_id"] for row in answer] == users
    # Each known item has an answer of its own, and unknown ones that of nobody.
    known = {json.dumps(row["items"]) for row in answer[: len(ODD)]}
    rest = {json.dumps(row["items"]) for row in answer[len(ODD) :]}
    assert len(known) == len(ODD) and len(rest) == 1 and not known & rest
    assert {item for row in answer for item in ids([row])} <= set(ITEMS)


def test_csv_is_refused(url: str) -> None:
    """pandas would read NA, nan and null as nothing; nothing can be told about it by the request."""
    status, words = sent(
        url, b"user_id,item_id,event_ts\nann,NA,2024-01-01T10:00:00Z\n", "text/csv"
    )
    assert status == 400 and "Failed to parse input as a Pandas DataFrame" in words


@pytest.mark.parametrize(
    ("events", "params", "says"),
    [
        ([{"item_id": "i07", "event_ts": "2024-01-01T10:00:00Z"}], {}, "user_id"),
        ([event("ann", "i07", "noonish")], {}, "event_ts"),
        ([event("ann", "i07", "2024-01-01T10:00:00Z")], {"k": 0}, "at least one item"),
        ([event("ann", "i07", "2024-01-01T10:00:00Z")], {"k": "many"}, "k"),
        ([event("ann", 7, "2024-01-01T10:00:00Z")], {}, "item_id = 7: ids are texts"),  # type: ignore[arg-type]
        ([event(123, "i07", "2024-01-01T10:00:00Z")], {}, "user_id = 123: ids are texts"),  # type: ignore[arg-type]
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(
    url: str, events: Any, params: dict[str, Any], says: str
) -> None:
    status, words = ask(url, events, **params)
    assert status in (400, 500) and says in words
