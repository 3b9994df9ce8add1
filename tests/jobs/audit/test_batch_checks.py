"""Checks of a whole batch: a candidate is broken between compute and audit, and the audit names it.

Each is asked in Arrow and in Spark; and of whole published tables (`jobs validate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import functions as F

from jobs.audit import arrow_columns, great_expectations
from jobs.bronze import ingest
from jobs.bronze.night import is_here
from jobs.cli import told
from jobs.core.errors import AuditErrored, AuditFailed, SessionmillError
from jobs.core.plan import Thresholds
from jobs.core.settings import settings
from jobs.core.tables import EVENTS, SEQUENCES, SESSIONS
from jobs.gold import sequences
from jobs.pipeline import published
from jobs.silver import audit as silver_audit
from jobs.silver import sessionize
from jobs.silver.manifest import SessionizeManifest
from tests.jobs.audit.test_suite import named
from tests.support.spark_tools import CLICKS, Workshop

pytestmark = pytest.mark.slow

T = 1_700_000_000
Rows = list[dict[str, Any]]


def log(users: str, begin: int, many: int) -> str:
    """A click every ten minutes of each user."""
    lines = [f"{user},i{n},{begin + 600 * n}" for user in users for n in range(many)]
    return "\n".join(["user,item,ts", *lines]) + "\n"


@pytest.fixture(scope="module")
def night(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A first load and a night that changes a session and opens one; their candidates are left."""
    shop = Workshop(spark, tmp_path_factory.mktemp("night"))
    for batch, (users, begin, many) in {
        "first": ("abc", T, 6), "more": ("ad", T + 6 * 600, 4),
    }.items():  # fmt: skip
        shop.land(f"{batch}.csv", log(users, begin, many))
        for job in ("ingest", "sessionize", "items", "sequences"):
            for step in ("all",) if job in ("ingest", "items") else ("compute", "publish"):
                shop.run(job, None, step, batch)
        shop.thresholds = Thresholds(few_bytes=-1, rewritten_share=2)
    shop.thresholds = None
    return shop


@contextmanager
def spoiled(paths: list[str], spoil: Callable[[Rows], Any]) -> Iterator[None]:
    """Data files with other rows, put back afterwards."""
    [path, *_] = (Path(one) for one in paths)
    whole = path.read_bytes()
    path.with_name(f".{path.name}.crc").unlink(missing_ok=True)
    table = pq.read_table(path)
    rows = table.to_pylist()
    spoil(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    yield
    path.write_bytes(whole)


def lost_event(rows: Rows) -> None:
    longest = max(rows, key=lambda row: row["event_count"])
    del longest["events"][2]
    longest["event_count"] -= 1


def doubled_event(rows: Rows) -> None:
    """An event of one session stands in another, too, in place of one of its own."""
    longer = [row for row in rows if row["event_count"] > 1]
    one = longer[0]
    other = next(row for row in longer if row["user_id"] != one["user_id"])
    other["events"][1]["event_id"] = one["events"][1]["event_id"]


def lost_line(rows: Rows) -> None:
    """(Line 0 describes the file.)"""
    rows.remove(next(row for row in rows if row["line"] > 2))


def doubled_line(rows: Rows) -> None:
    rows.append(next(row for row in rows if row["line"] > 2))


def lost_user(rows: Rows) -> None:
    del rows[-1]


def lost_position(rows: Rows) -> None:
    for name, value in rows[0].items():
        if isinstance(value, list):
            rows[0][name] = value[:-1]


@pytest.mark.parametrize("way", ["arrow", "spark"])
@pytest.mark.parametrize(
    ("batch", "spoil", "broken"),
    [
        ("first", lost_event, {"events_balance"}),
        ("first", doubled_event, {"events_balance", "each_event_once"}),
        ("more", lost_event, {"events_balance"}),
        ("more", doubled_event, {"each_event_once"}),
    ],
)
@pytest.mark.long
def test_events_lost_or_doubled_among_sessions_are_named(
    night: Workshop, monkeypatch: pytest.MonkeyPatch, way: str, batch: str, spoil: Any,
    broken: set[str],
) -> None:  # fmt: skip
    context = night.context(batch=batch)
    candidate = context.candidate(SESSIONS)
    manifest = candidate.manifest(SessionizeManifest)
    assert manifest.whole == (batch == "first")
    paths = candidate.files("sessions")
    if manifest.whole:
        paths = [f"{night.lake.path(SESSIONS)}/{one['path']}" for one in manifest.staged or []]
    if way == "spark":
        monkeypatch.setattr(silver_audit, "facts_by_arrow", lambda *_: None)
    with spoiled(paths, spoil), pytest.raises(AuditFailed) as raised:
        sessionize.audit(context, candidate)
    assert named(raised.value) == broken


@pytest.mark.long
@pytest.mark.parametrize("way", ["arrow", "spark"])
@pytest.mark.parametrize(("batch", "spoil"), [("first", lost_user), ("more", lost_position)])
def test_positions_lost_among_sequences_are_named(
    night: Workshop, monkeypatch: pytest.MonkeyPatch, way: str, batch: str, spoil: Any
) -> None:
    context = night.context(batch=batch)
    candidate = context.candidate(SEQUENCES)
    manifest = candidate.manifest(sequences.SequencesManifest)
    assert (manifest.staged is not None) == (batch == "first")
    if way == "spark":
        monkeypatch.setattr(arrow_columns, "apart", lambda _: False)
    with spoiled(manifest.made, spoil), pytest.raises(AuditFailed) as raised:
        sequences.audit(context, candidate)
    assert named(raised.value) == {"positions_balance"}


def test_the_candidates_pass_as_they_were_made(night: Workshop) -> None:
    for batch in ("first", "more"):
        context = night.context(batch=batch)
        for module, table in ((sessionize, SESSIONS), (sequences, SEQUENCES)):
            module.audit(context, context.candidate(table))


NATIVE = CLICKS.replace('event_ts = "ts"', 'event_ts = "ts"\nevent_id = "item"')


@pytest.mark.parametrize(
    ("toml", "short", "thresholds"),
    [
        (CLICKS, "true", None),
        (CLICKS, "true", Thresholds(short_jobs=True, read_bytes=-1)),
        (CLICKS, "false", None),
        (NATIVE, "true", None),
    ],
    ids=["in one process", "in order", "by slices", "native ids"],
)  # fmt: skip
def test_a_line_lost_or_doubled_after_it_was_read_is_named(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toml: str, short: str,
    thresholds: Thresholds | None,
) -> None:  # fmt: skip
    """(A compute that was killed begins again at the parsed lines.)"""
    monkeypatch.setenv("SESSIONMILL_SHORT_JOBS", short)
    settings.cache_clear()
    shop = Workshop(spark, tmp_path, toml)
    shop.thresholds = thresholds
    shop.land("log.csv", log("a", T, 6))
    context = shop.context(batch="night")
    candidate = ingest.compute(context)
    judged = short == "true" and (thresholds is not None or toml == NATIVE)
    here = short == "true" and not judged
    assert (candidate.has("judged"), is_here(candidate)) == (judged, here)
    ingest.audit(context, candidate)
    for spoil in (lost_line, doubled_line):
        with spoiled(candidate.files("lines"), spoil):
            ingest.compute(context)
            with pytest.raises(AuditFailed) as raised:
                ingest.audit(context, candidate)
        assert named(raised.value) == {"lines_balance"}
    settings.cache_clear()


@pytest.mark.parametrize("way", ["arrow", "spark"])
def test_too_many_rejects_are_named(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    quality = '\n[quality]\nmax_reject_share = 0.1\non_exceed = "fail"\n'
    shop = Workshop(spark, tmp_path, CLICKS + quality)
    shop.land("log.csv", log("a", T, 6) + f"a,,{T}\n" * 2)
    if way == "spark":
        monkeypatch.setattr(arrow_columns, "apart", lambda _: False)
    with pytest.raises(SessionmillError) as raised:
        shop.run("ingest")
    failed = raised.value if isinstance(raised.value, AuditFailed) else raised.value.__cause__
    assert isinstance(failed, AuditFailed)
    assert named(failed) == {"reject_share_within_bound"}


def test_every_check_of_a_batch_has_its_break() -> None:
    """Those above; (lists: tests/jobs/recommend/test_score.py; nights: tests/jobs/ops/test_drift.py)."""
    from tests.jobs.audit.test_suite import BATCH

    assert {name for table in (EVENTS, SESSIONS, SEQUENCES) for name in BATCH[table]} == {
        "lines_balance", "reject_share_within_bound", "events_balance", "each_event_once",
        "positions_balance",
    }  # fmt: skip


# -- whole tables ---------------------------------------------------------------------------------


def test_whole_tables_are_held_against_what_they_were_made_from(night: Workshop) -> None:
    context, lake = night.context(), night.lake
    whole = {"events_balance": True, "each_event_once": True}
    rows = lake.read(SESSIONS)
    twice = F.transform("events", lambda e, n: F.when(n == 1, F.col("events")[0]).otherwise(e))
    for change, held in (
        (rows, whole),
        (rows.where("user_id <> 'a'"), whole | {"events_balance": False}),
        (rows.withColumn("events", twice), dict.fromkeys(whole, False)),
        (rows.unionByName(rows.where("user_id = 'a'")), dict.fromkeys(whole, False)),
    ):
        facts = published.session_facts(context, change)
        assert facts.held == held and facts.unknown == {}
    rows = lake.read(SEQUENCES)
    lost = F.when(F.col("user_id") == "a", F.slice("item_index", 1, 3)).otherwise(
        F.col("item_index")
    )
    for change, holds in (
        (rows, True), (rows.where("user_id <> 'a'"), False),
        (rows.withColumn("item_index", lost), False),
        (rows.withColumn("user_id", F.translate("user_id", "ad", "da")), False),
    ):  # fmt: skip
        facts = published.sequence_facts(context, change)
        assert facts.held == {"positions_balance": holds} and facts.unknown == {}


def test_an_input_that_is_gone_is_not_evaluated(
    night: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "readable", lambda *_: 999)
    context, lake = night.context(), night.lake
    facts = published.session_facts(context, lake.read(SESSIONS))
    assert facts.held == {"each_event_once": True}
    assert facts.unknown == {"events_balance": "bronze.events version 999 cannot be read any more"}
    facts = published.sequence_facts(context, lake.read(SEQUENCES))
    assert facts.held == {} and set(facts.unknown) == {"positions_balance"}


def test_what_belongs_to_a_run_is_not_evaluated_and_not_green(night: Workshop) -> None:
    """In the words, in JSON, in Great Expectations' result and on its page."""
    result = night.run("validate", options={"table": EVENTS.full_name})
    why = "it belongs to a run: the audit of each night evaluates it"
    missing = {"lines_balance": why, "reject_share_within_bound": why}
    [note] = result.notes
    assert note == (
        f"bronze.events version {night.version(EVENTS)}: 7 of 9 checks hold, 2 were not "
        f"evaluated: lines_balance ({why}), reject_share_within_bound ({why})"
    )
    context = night.context(batch="told")
    outcome = told(context, "validate", "all", result, 1.0)
    assert outcome["checks"] == {
        EVENTS.full_name: {
            "version": night.version(EVENTS), "checks": 9, "held": 7, "failed": {}, "warned": {},
            "not_evaluated": missing,
        }
    }  # fmt: skip
    quality = Path(great_expectations.docs_folder(context))
    newest = max(quality.glob("results/clicks/bronze/events/**/*.json"), key=modified)
    text = newest.read_text()
    assert '"evaluated_expectations": 7' in text and f'"why": "{why}"' in text
    page = max(quality.glob("data_docs/**/validations/**/events/**/*.html"), key=modified)
    assert (quality / "data_docs/expectations/clicks/bronze/events.html").exists()
    shown = page.read_text()
    assert "Succeeded, 2 of 9 checks not evaluated" in shown
    assert "Not evaluated" in shown and shown.count(why) == 2
    assert shown.count("fa-check-circle") == 7, "one tick a check that holds, none for the status"
    assert shown.count("fa-question-circle text-warning") == 3


def modified(path: Path) -> float:
    return path.stat().st_mtime


def test_a_job_that_states_nothing_stops(night: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silver_audit, "balance", lambda *_: {"events_balance": True})
    context = night.context(batch="more")
    with pytest.raises(AuditErrored, match=r"silver.sessions: 1 of 9 checks were not evaluated"):
        sessionize.audit(context, context.candidate(SESSIONS))


def test_one_part_that_is_unknown_makes_a_check_unknown_unless_one_fails() -> None:
    facts = published.Facts()
    facts.put("a", {"one": True, "other": "no model"})
    facts.put("b", {"one": False, "other": "no model"})
    facts.put("c", {"one": True})
    facts.put("d", {})
    assert facts.held == {"b": False, "c": True, "d": True}
    assert facts.unknown == {"a": "other: no model"}
