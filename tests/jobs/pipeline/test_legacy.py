"""What version 0.1.0 made goes on: its lakes, its recorded comparisons, its registered models.

The archive holds what three nights and fifteen trainings left (tests/fixtures/make_lake_0_1_0.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from jobs.core.settings import settings
from jobs.core.tables import (
    EVENTS,
    FILES,
    IDENTITIES,
    ITEMS,
    PERSON_EVENTS,
    RECOMMENDATIONS,
    REJECTS,
    SEQUENCES,
    SESSIONS,
)
from jobs.lake.context import Result
from models import cli as models_cli
from tests.support.legacy import ARCHIVE, SOURCES, Legacy, OldShop, digest
from tests.support.oracle import expected_sequences, expected_sessions

pytestmark = pytest.mark.slow

FOURTH = "2024-03-04"
OF_NIGHTS = (EVENTS, REJECTS, SESSIONS, ITEMS, SEQUENCES)


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Legacy]:
    there = Legacy(tmp_path_factory.mktemp("legacy"))
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SESSIONMILL_LAKE", str(there.lake))
        patch.setenv("MLFLOW_TRACKING_URI", there.tracking_uri)
        settings.cache_clear()
        os.chdir(there.root)
        yield there
        os.chdir(before)
    settings.cache_clear()


def answered(main: Any, *words: str) -> dict[str, Any]:
    """A command of today: the JSON of its last line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*words, "--json"])
    assert status == 0, out.getvalue() + err.getvalue()
    found: dict[str, Any] = json.loads(out.getvalue().strip().splitlines()[-1])
    return found


def models(legacy: Legacy, command: str, *words: str) -> dict[str, Any]:
    return answered(models_cli.main, command, "--source", legacy.source("shop"), *words)


def rows_at(legacy: Legacy, name: str, version: int | None = None) -> list[dict[str, Any]]:
    """Rows of <source>/<layer>/<table>."""
    table = DeltaTable(str(legacy.lake / name), version=version)
    found: list[dict[str, Any]] = table.to_pyarrow_table().to_pylist()
    return found


# -- tables and nights -----------------------------------------------------------------------------


def test_the_tables_are_read_as_they_were_written(legacy: Legacy) -> None:
    told = legacy.told["tables"]
    assert {f"shop/{table.layer}/{table.name}" for table in (*OF_NIGHTS, RECOMMENDATIONS)} <= set(
        told
    )
    for name, one in told.items():
        rows = rows_at(legacy, name, one["version"])
        assert len(rows) == one["rows"] > 0 or "library" in name, name
        if not name.endswith(FILES.full_name.replace(".", "/")):  # (its paths are the new place's)
            assert digest(rows) == one["digest"], name
    texts = {row["user_id"] for row in rows_at(legacy, "shop/bronze/events")}
    assert {"NULL", "nan", "00123", "1e5"} <= texts


@dataclass
class Fourth:
    """A source's fourth night, under the code of today."""

    shop: OldShop
    old: dict[str, list[dict[str, Any]]]  # table -> rows before it
    idle: dict[str, tuple[int, int]]  # table -> versions before and after a run that finds nothing
    files: list[str]  # what arrived
    result: Result

    def now(self, table: Any) -> list[dict[str, Any]]:
        return self.shop.rows(table)


@pytest.fixture(scope="module")
def longer(legacy: Legacy) -> dict[str, Any]:
    """The champion's lists before the fourth night: asked for as they are, then longer."""
    from jobs.cli import main

    words = ("score", "--source", legacy.source("shop"), "--k")
    old = rows_at(legacy, "shop/gold/recommendations")
    again = answered(main, *words, str(legacy.told["k"]))
    versions = [again["tables"][RECOMMENDATIONS.full_name]["version"]]
    answered(main, *words, str(legacy.told["k"] + 3))
    return {"old": old, "versions": versions, "new": rows_at(legacy, "shop/gold/recommendations")}


@pytest.fixture(scope="module", params=SOURCES)
def fourth(request: pytest.FixtureRequest, spark: Any, legacy: Legacy, longer: Any) -> Fourth:
    del longer  # (scores the sequences of three nights)
    shop = OldShop(spark, legacy, request.param)
    old = {table.full_name: shop.rows(table) for table in OF_NIGHTS}
    before = {table.full_name: shop.version(table) for table in OF_NIGHTS}
    shop.run(day="2024-03-03", batch="again")
    idle = {t.full_name: (before[t.full_name], shop.version(t)) for t in OF_NIGHTS}
    files = shop.arrive()
    return Fourth(shop, old, idle, files, shop.run(day=FOURTH, batch="night-4"))


@pytest.mark.long
def test_a_run_that_finds_nothing_new_writes_no_version(fourth: Fourth) -> None:
    assert all(before == after for before, after in fourth.idle.values()), fourth.idle


def test_the_fourth_night_reads_what_is_new_and_nothing_else(fourth: Fourth) -> None:
    """The ledger of 0.1.0 still says what was read."""
    assert sorted(fourth.result.files) == fourth.files and len(fourth.files) == 2
    result = fourth.result
    assert result.read == result.events_new + result.duplicates + sum(result.rejects.values())
    assert result.events_new > 100 and result.duplicates > 100
    if fourth.shop.source.name == "shop":
        assert result.rejects == {"late": 1, "missing_item_id": 1, "missing_user_id": 1}
        assert result.sessions_merged + result.sessions_changed >= 5
    else:
        assert result.rejects == {"late": 1} and result.events_replaced == 5


def test_the_fourth_night_lands_as_the_oracle_says(fourth: Fourth) -> None:
    rule = fourth.shop.source.sessions
    events = fourth.shop.table(EVENTS).to_pyarrow_table()
    expected = expected_sessions(
        events, native=rule.rule != "gap", gap_s=rule.gap_s, max_hours=rule.max_session_hours,
        max_events=rule.max_session_events,
    )  # fmt: skip
    found = sorted(
        (row["user_id"], row["session_id"], row["runaway"], [e["event_id"] for e in row["events"]])
        for row in fourth.now(SESSIONS)
    )
    assert found == sorted(
        (row["user_id"], row["session_id"], row["runaway"], row["events"]) for row in expected
    )
    item_of = {row["item_index"]: row["item_id"] for row in fourth.now(ITEMS)}
    assert {
        row["user_id"]: [
            (item_of[index], ordinal)
            for index, ordinal in zip(row["item_index"], row["session_ordinal"], strict=True)
        ]
        for row in fourth.now(SEQUENCES)
    } == expected_sequences(expected)
    counted = Counter(events["item_id"].to_pylist())
    assert {row["item_id"]: row["event_count"] for row in fourth.now(ITEMS)} == counted


def test_events_are_what_the_log_says(fourth: Fourth) -> None:
    """Counted from the lines of all files, without the jobs: an event for each line that is one."""
    if fourth.shop.source.name == "shop":
        lines = {
            tuple(line.split(","))
            for file in fourth.shop.landing.iterdir()
            for line in file.read_text().splitlines()[1:]
        }
        usable = {
            line for line in lines
            if len(line) == 7 and line[0] and line[1] and line[2].isdigit() and line[4] != "many"
        }  # fmt: skip
        [late] = [row["raw"] for row in fourth.now(REJECTS) if row["reason"] == "late"]
        wanted = Counter(line[:2] for line in usable - {tuple(late.split(","))})
    else:
        records = [
            json.loads(line)
            for file in fourth.shop.landing.iterdir()
            for line in file.read_text().splitlines()
        ]
        of_id = {r["id"]: r for r in records if r["id"] and r["reader"] and r["id"] != "0-late"}
        wanted = Counter((r["reader"], r["book"]["isbn"]) for r in of_id.values())
    found = Counter((row["user_id"], row["item_id"]) for row in fourth.now(EVENTS))
    assert found == wanted


def test_identity_can_be_added(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every event is of a user, so all persons, and all sessions, are what they were."""
    shop = OldShop(spark, Legacy(tmp_path), "shop")
    monkeypatch.chdir(tmp_path)
    before = shop.rows(SESSIONS)
    shop.file.write_text(shop.file.read_text() + '\n[identity]\nanonymous_id = "no"\n')
    done = shop.run(day="2024-03-03")
    assert done.events_new == 0
    assert shop.rows(SESSIONS) == [row | {"boundary_values": None} for row in before]
    people = {row["event_id"]: row["user_id"] for row in shop.rows(PERSON_EVENTS)}
    assert people == {row["event_id"]: row["user_id"] for row in shop.rows(EVENTS)}
    assert any("--reload" in note for note in done.notes) and shop.rows(IDENTITIES) == []


def test_ids_of_what_was_there_stay(fourth: Fourth) -> None:
    now = {row["event_id"]: row for row in fourth.now(EVENTS)}
    new = now[next(iter(now))].keys() - fourth.old[EVENTS.full_name][0].keys()
    assert new == {"anonymous_id", "boundary_values"}
    assert not any(row[name] for row in now.values() for name in new)
    moved = [
        row for row in fourth.old[EVENTS.full_name]
        if now[row["event_id"]] != row | dict.fromkeys(new)
    ]  # fmt: skip
    assert len(moved) == fourth.result.events_replaced
    index = {row["item_id"]: row["item_index"] for row in fourth.now(ITEMS)}
    old_items = fourth.old[ITEMS.full_name]
    assert len(old_items) > 10
    assert {row["item_id"]: index[row["item_id"]] for row in old_items} == {
        row["item_id"]: row["item_index"] for row in old_items
    }
    sessions = {row["session_id"]: row for row in fourth.now(SESSIONS)}
    before = fourth.old[SESSIONS.full_name]
    gone = [row for row in before if row["session_id"] not in sessions]
    none = {"boundary_values": None}
    other = [row for row in before if sessions.get(row["session_id"], row | none) != row | none]
    assert len(gone) == fourth.result.sessions_retired
    assert len(other) == fourth.result.sessions_changed
    assert len(before) - len(gone) - len(other) > 100
    kept = {(row["raw"], row["reason"]) for row in fourth.now(REJECTS)}
    assert {(row["raw"], row["reason"]) for row in fourth.old[REJECTS.full_name]} <= kept


def test_all_files_read_again_are_duplicates(fourth: Fourth) -> None:
    """Without the ledger: every id is made again as 0.1.0 made it, or there would be new events."""
    shutil.rmtree(FILES.path(str(fourth.shop.lake_root), fourth.shop.source.name))
    before = {table.full_name: fourth.shop.version(table) for table in OF_NIGHTS}
    result = fourth.shop.run(batch="everything")  # without a day: nothing is late
    late = fourth.result.rejects["late"]  # so that line has its day at last
    assert (result.events_new, result.events_replaced) == (late, 0)
    assert result.duplicates > 500
    assert fourth.shop.version(EVENTS) == before[EVENTS.full_name] + 1
    assert result.sessions_new + result.sessions_changed <= 2


# -- models ----------------------------------------------------------------------------------------


def same_numbers(now: Any, then: Any, at: str = "") -> None:
    """Every number of the old answer in the new one, which may say more, and in other words."""
    if isinstance(then, dict):
        for name, value in then.items():
            same_numbers(now[name], value, f"{at}.{name}")
    elif isinstance(then, list):
        assert len(now) == len(then), at
        for place, (one, value) in enumerate(zip(now, then, strict=True)):
            same_numbers(one, value, f"{at}[{place}]")
    elif isinstance(then, int | float):
        assert now == pytest.approx(then, abs=1e-9), at


@pytest.mark.parametrize("name", ["items", "sessions"])
def test_an_old_comparison_is_read(legacy: Legacy, name: str) -> None:
    told = legacy.told["compared"][name]
    found = models(legacy, "compare", "--comparison", name)
    for key in ("winner", "users", "mlflow_run_id", "cut", "table_version"):
        assert found[key] == told[key], key
    assert [row["method"] for row in found["methods"]] == [row["method"] for row in told["methods"]]
    same_numbers(found["methods"], told["methods"])
    page = models(legacy, "report", "--comparison", name, "--out", str(legacy.root / "page.html"))
    text = Path(page["page"]).read_text()
    assert all(row["method"] in text for row in told["methods"])


def test_old_models_score_as_they_did(legacy: Legacy) -> None:
    """Every backbone and encoding, read by the code of today, asked about its test period again."""
    rows = [
        row for name in ("items", "sessions") for row in legacy.told["compared"][name]["methods"]
    ]
    assert len(rows) == 15
    for row in rows:
        found = models(legacy, "evaluate", "--run-id", row["mlflow_run_id"], "--threads", "1")
        for metric in ("ndcg@10", "hr@10"):
            assert found["metrics"][metric]["value"] == pytest.approx(row[metric], abs=1e-6), row


def close(lists: list[dict[str, Any]], told: list[dict[str, Any]]) -> None:
    """The same items in the same order, scores to 1e-6."""
    assert [[one["item_id"] for one in row["items"]] for row in lists] == [
        [one["item_id"] for one in row["items"]] for row in told
    ]
    for row, then in zip(lists, told, strict=True):
        assert row["user_id"] == then["user_id"]
        assert [one["score"] for one in row["items"]] == pytest.approx(
            [one["score"] for one in then["items"]], abs=1e-6, rel=1e-6
        )


ASKED = """
import json, sys
if sys.argv[3] == "today":
    import models.serving  # the package of that name that the process has
import pandas as pd
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
given = json.loads(sys.argv[2])
frame = pd.DataFrame(given["request"])
frame["event_ts"] = pd.to_datetime(frame["event_ts"], utc=True)
client = mlflow.MlflowClient()
told = {}
for version in client.search_model_versions("name = 'shop'"):
    model = mlflow.pyfunc.load_model(f"models:/shop/{version.version}")
    told[version.version] = model.predict(frame, params={"k": given["k"]}).to_dict("records")
print(json.dumps(told, default=list))
"""


@pytest.mark.parametrize("code", ["its own", "today"])
def test_registered_models_answer_as_they_did(legacy: Legacy, code: str, tmp_path: Path) -> None:
    """In a process of a serving machine, and in one that has imported the package of today."""
    repo = str(Path(__file__).parents[3])
    given = {name: legacy.told[name] for name in ("request", "k")}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ASKED, legacy.tracking_uri, json.dumps(given), code],
        cwd=tmp_path, env=env | ({"PYTHONPATH": repo} if code == "today" else {}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    told = legacy.told["lists"]
    assert set(found) == set(told) and len(told) == 15
    for version, then in told.items():
        close(found[version], then["lists"])


def test_the_old_champion_makes_its_lists(legacy: Legacy, longer: dict[str, Any]) -> None:
    """The lists of 0.1.0 are known to be there; longer ones begin as they do."""
    told = legacy.told["tables"]["shop/gold/recommendations"]
    assert longer["versions"] == [told["version"]]
    k = legacy.told["k"]
    old, new = (sorted(longer[name], key=lambda row: row["user_id"]) for name in ("old", "new"))
    assert len(old) == told["rows"] and all(len(row["items"]) == k + 3 for row in new)
    close([row | {"items": row["items"][:k]} for row in new], old)
    assert {row["model_version"] for row in new} == {row["model_version"] for row in old}


def test_the_archive_is_small_and_names_no_machine() -> None:
    """(MLflow's files name a temporary folder that was gone at once; that is no place.)"""
    assert ARCHIVE.stat().st_size < 1_000_000
    with tarfile.open(ARCHIVE) as tar:
        texts = [file.read() for one in tar if (file := tar.extractfile(one)) is not None]
    assert len(texts) > 100
    for text in texts:
        assert not re.search(rb"/(home|root|work)/|site-packages", text)
