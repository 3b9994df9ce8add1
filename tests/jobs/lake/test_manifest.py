"""What the steps of a job tell each other; a version may change between them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from jobs.bronze.manifest import IngestManifest
from jobs.core.errors import SettingsError
from jobs.core.plan import Algorithm, Engine, Publish, Thresholds
from jobs.core.tables import EVENTS, ITEMS, RUNS, SEQUENCES, SESSIONS
from jobs.gold.items import ItemsManifest
from jobs.gold.sequences import SequencesManifest
from jobs.lake.manifest import Manifest
from jobs.recommend.score import ScoreManifest
from jobs.silver.manifest import Counts, SessionizeManifest
from tests.support.spark_tools import Workshop

STAGED = [
    {"path": "staged-1/part-0.parquet", "size": 9, "modified_ms": 1, "rows": 2, "stats": "{}"}
]
# As 0.1.0 and later wrote them: with keys that the plan says now.
INGEST = {
    "batch": "b", "day": date(2024, 6, 1), "base": {"bronze.events": 3}, "empty": False,
    "counts": {"read": 4, "events_new": 2, "events_replaced": 0, "duplicates": 1},
    "rejects": {"late": 1}, "files": ["/a.csv"], "notes": ["a note"], "staged": STAGED,
    "rejects_staged": STAGED, "rejects_changed": 1,
}  # fmt: skip
SESSIONIZE = {
    "batch": "b", "base": 1, "upto": 3, "after": 2, "empty": False, "whole": False, "notes": [],
    "counts": {
        "rows": 3, "new": 1, "changed": 1, "retired": 1, "merged": 1, "runaways": 0,
        "events_before": 5, "events_after": 6, "lo_us": 7, "hi_us": 8,
    },
    "moved": {"came": 1, "gone": 0},
}  # fmt: skip
WHOLE = SESSIONIZE | {
    "whole": True, "after": None, "replace": False, "staged": STAGED,
    "counts": {"rows": 2, "new": 2, "changed": 0, "retired": 0, "merged": 0, "runaways": 1,
               "events_before": 0, "events_after": 9},
}  # fmt: skip
ITEM_ROWS = {
    "base": 1, "upto": 3, "empty": False, "notes": [], "rows": 2,
    "attributes": {"rows": 1, "base": 4, "staged": STAGED, "notes": ["one"]},
}  # fmt: skip
USERS = {
    "base": 1, "upto": 2, "items": 3, "empty": False, "whole": False, "notes": [], "all": True,
    "put_aside": True, "staged": STAGED, "rows": 2, "made": ["/x.parquet"], "many": False,
    "events": 9,
}  # fmt: skip
LISTS = {
    "base": 1, "upto": 2, "version": "7", "uri": "models:/toy/7", "size": 3, "method": "sasrec",
    "excludes": True, "empty": False, "users": 2, "nothing": 1, "kept": 0, "scoring_s": 0.5,
    "made": ["/x.parquet"], "staged": STAGED,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "old", "publish"),
    [
        (IngestManifest, INGEST, Publish.APPEND),
        (IngestManifest, {k: v for k, v in INGEST.items() if k != "staged"}, Publish.MERGE),
        (SessionizeManifest, SESSIONIZE, Publish.MERGE),
        (SessionizeManifest, SESSIONIZE | {"staged": STAGED}, Publish.APPEND),
        (SessionizeManifest, WHOLE, Publish.APPEND),
        (SessionizeManifest, WHOLE | {"replace": True}, Publish.REPLACE),
        (ItemsManifest, ITEM_ROWS, Publish.MERGE),
        (ItemsManifest, ITEM_ROWS | {"staged": STAGED, "attributes": None}, Publish.APPEND),
        (SequencesManifest, USERS, Publish.REPLACE),
        (SequencesManifest, USERS | {"put_aside": False}, Publish.APPEND),
        (SequencesManifest, USERS | {"all": False, "put_aside": False}, Publish.MERGE),
        (ScoreManifest, LISTS, Publish.REPLACE),
    ],
)  # fmt: skip
def test_what_an_earlier_version_computed_is_understood(
    kind: type[Manifest], old: dict[str, Any], publish: Publish
) -> None:
    made = kind.of_json(json.dumps(old, default=str), "here")
    assert made.plan.publish is publish
    assert made.plan.path is Algorithm.EARLIER
    told = asdict(made)
    for name in told.keys() & old.keys():
        known = told[name]
        if isinstance(known, dict):  # (new fields have their defaults)
            known = {key: known[key] for key in old[name]}
        assert known == old[name], name
    empty = kind.of_json(json.dumps(old | {"empty": True}, default=str), "here")
    assert empty.plan.publish is Publish.NOTHING
    assert kind.of_json(made.to_json(), "here") == made


def test_the_engine_of_an_earlier_version_is_kept() -> None:
    for many, engine in ((False, Engine.HERE), (True, Engine.COMPILED)):
        made = SequencesManifest.of_json(json.dumps(USERS | {"many": many}), "here")
        assert made.plan.engine is engine


def test_counts_that_were_never_made_are_none() -> None:
    made = SessionizeManifest.of_json(json.dumps(SESSIONIZE | {"counts": {}}), "here")
    assert made.counts == Counts()


@pytest.mark.parametrize("text", ["{}", '{"empty": false, "base": "three"}'])
def test_what_no_version_wrote_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^here/manifest.json cannot be read.*compute step"):
        SessionizeManifest.of_json(text, "here")


def log(begin: int) -> str:
    return "user,item,ts\n" + "".join(f"u{n},i{n},{begin + 60 * n}\n" for n in range(4))


T = 1_700_000_000


def old_keys(job: str, told: dict[str, Any]) -> dict[str, Any]:
    """A manifest as the version before this one wrote it."""
    plan = told.pop("plan")
    told = {name: value for name, value in told.items() if value is not None}
    if job == "sessionize" and told["whole"]:
        told["replace"] = plan["publish"] == Publish.REPLACE
    if job == "sequences" and not told["empty"]:
        told["all"] = plan["publish"] != Publish.MERGE
        told["put_aside"] = plan["publish"] == Publish.REPLACE
        told["many"] = plan["engine"] != Engine.HERE
    return told


@pytest.mark.slow
def test_a_night_goes_on_after_the_version_changed(spark: Any, tmp_path: Path) -> None:
    """Computed by one version, audited and published by the next; at night two, rows change."""
    shop = Workshop(spark, tmp_path)
    plans = {}
    for batch, begin in (("first", T), ("second", T + 600)):
        shop.land(f"{batch}.csv", log(begin))
        for job, table, sure in (
            ("ingest", EVENTS, IngestManifest), ("sessionize", SESSIONS, SessionizeManifest),
            ("items", ITEMS, ItemsManifest), ("sequences", SEQUENCES, SequencesManifest),
        ):  # fmt: skip
            shop.run(job, None, "compute", batch)
            candidate = shop.context(batch=batch).candidate(table)
            plans[job] = candidate.manifest(sure).plan
            path = Path(candidate.path("manifest.json"))
            path.write_text(json.dumps(old_keys(job, json.loads(path.read_text()))))
            shop.run(job, None, "audit", batch)
            shop.run(job, None, "publish", batch)
        shop.thresholds = Thresholds(few_bytes=-1, rewritten_share=2)
    assert {job: plan.publish for job, plan in plans.items()} == {
        "ingest": Publish.APPEND, "sessionize": Publish.MERGE, "items": Publish.MERGE,
        "sequences": Publish.MERGE,
    }  # fmt: skip
    assert len(shop.rows(EVENTS)) == 8 and len(shop.rows(ITEMS)) == 4
    assert [row["event_count"] for row in shop.rows(SESSIONS)] == [2] * 4
    assert [len(row["item_index"]) for row in shop.rows(SEQUENCES)] == [2] * 4
    runs = {(row["batch"], row["job"], row["step"]): row for row in shop.rows(RUNS)}
    computed = dict(runs["second", "sequences", "compute"]["plans"])
    assert computed == {"sequences": "changed users; this process; publish: merge"}
    published = dict(runs["second", "sequences", "publish"]["plans"])
    assert published == {"sequences": f"{Algorithm.EARLIER}; this process; publish: merge"}


@pytest.mark.slow
@pytest.mark.parametrize("here", [True, False])
def test_plans_are_recorded_and_printed_as_they_are_made(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], here: bool
) -> None:
    shop = Workshop(spark, tmp_path)
    if not here:
        shop.thresholds = Thresholds(short_jobs=True, read_bytes=-1)
    shop.land("1.csv", log(T))
    context = replace(shop.context(), explain_plan=True)
    from jobs.cli import told
    from jobs.pipeline.steps import run_job

    result = run_job(context, "run", "all", {"rebuild": False})
    wanted = {
        "ingest": (Algorithm.STORED_HERE, Engine.HERE, Publish.APPEND)
        if here
        else (Algorithm.FIRST_LINES, Engine.INTERPRETED, Publish.APPEND),
        "sessionize": (Algorithm.CUT_SLICES, Engine.INTERPRETED, Publish.APPEND),
        "items": (Algorithm.COUNT_ALL, Engine.INTERPRETED, Publish.APPEND),
        "sequences": (Algorithm.WEAVE_ALL, Engine.HERE, Publish.APPEND),
    }
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan of ")]
    if not here:
        unknown = (
            "plan of ingest: no event is stored; Spark, interpreted plans; publish: not known yet"
        )
        assert lines.pop(0) == unknown
    assert lines == [
        f"plan of {job}: {path}; {engine}; publish: {how}"
        for job, (path, engine, how) in wanted.items()
    ]
    [row] = shop.rows(RUNS)
    assert dict(row["plans"]) == {
        job: f"{path}; {engine}; publish: {how}" for job, (path, engine, how) in wanted.items()
    }
    assert told(context, "run", "all", result, 1.0)["plans"] == {
        job: {"path": path, "engine": engine, "publish": how}
        for job, (path, engine, how) in wanted.items()
    }
    assert "plans" not in told(replace(context, explain_plan=False), "run", "all", result, 1.0)
