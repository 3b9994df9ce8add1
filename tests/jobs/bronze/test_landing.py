"""Landing folders as companies have them, and logs that change under our feet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.bronze import landing
from jobs.core.errors import SchemaError
from jobs.core.tables import EVENTS, FILES, REJECTS
from jobs.lake import filesystem
from tests.support.spark_tools import CLICKS, Workshop

pytestmark = pytest.mark.long

T = 1_700_000_000  # 2023-11-14 22:13:20 UTC
DAY = 86_400
LATENESS = "[sessions]\nlateness_days = 2\n"


def rows(*seconds: int, user: str = "u") -> str:
    return "user,item,ts\n" + "".join(f"{user},i{second},{T + second}\n" for second in seconds)


@pytest.mark.parametrize(
    ("landing", "folder"),
    [
        pytest.param("dt={day}/*.csv", "dt=2023-11-{}/", id="hive folders"),
        pytest.param(
            "log-{day:%Y%m%d}-*.csv", "log-202311{}-", id="days in names", marks=pytest.mark.long
        ),
    ],
)
def test_a_day_reads_its_folders_and_the_late_ones(
    spark: Any, tmp_path: Path, landing: str, folder: str
) -> None:
    shop = Workshop(spark, tmp_path, CLICKS.replace("*.csv", landing) + LATENESS)
    shop.land(folder.format(14) + "a.csv", rows(1, 2))
    shop.land(folder.format(15) + "a.csv", rows(DAY + 1))
    shop.land(folder.format(10) + "a.csv", rows(3))
    first = shop.run("ingest", day="2023-11-14")
    assert (first.read, first.events_new) == (2, 2)  # neither tomorrow nor the 10th
    second = shop.run("ingest", day="2023-11-15")
    assert (second.read, second.events_new) == (1, 1)
    # Delivered late into an older folder, grown, and replaced under the same name.
    shop.land(folder.format(14) + "b.csv", rows(4))
    shop.land(folder.format(14) + "a.csv", rows(1, 2, 5))
    shop.land(folder.format(15) + "a.csv", rows(DAY + 7, DAY + 8))
    third = shop.run("ingest", day="2023-11-16")
    assert (third.read, third.events_new, third.duplicates) == (6, 4, 2)
    assert shop.run("ingest", day="2023-11-14").read == 0  # any day, any order, twice
    history = shop.run("ingest")
    assert (history.read, history.events_new) == (1, 1)  # every date
    assert len(shop.rows(EVENTS)) == 8 and len(shop.rows(FILES)) == 4
    assert not any(row["ingest_file"].startswith("file:") for row in shop.rows(EVENTS))


def test_facts_of_files_are_not_among_their_lines(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, CLICKS)
    paths = [shop.land("1.csv", rows(1, 2) + "u,\n"), shop.land("2.csv", rows(3) + ",i,4\n")]
    shop.run("ingest", step="compute", batch="b")
    candidate = shop.context(batch="b").candidate(EVENTS)
    lines = candidate.arrow("lines", ["file", "line", "reason"]).to_pylist()
    assert sorted((Path(one["file"]).name, one["line"], one["reason"]) for one in lines) == [
        ("1.csv", 2, None), ("1.csv", 3, None), ("1.csv", 4, "unparsable"),
        ("2.csv", 2, None), ("2.csv", 3, "missing_user_id"),
    ]  # fmt: skip
    facts = landing.facts_read(candidate)
    assert [(one.file, one.lines, one.error) for one in facts] == [
        (str(paths[0]), 3, None), (str(paths[1]), 2, None),
    ]  # fmt: skip
    for one, path in zip(facts, paths, strict=True):
        assert one.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (one.size, one.bytes, one.header) == (
            *[path.stat().st_size] * 2,
            ["user", "item", "ts"],
        )


def test_of_two_attempts_of_a_task_the_later_says_what_a_file_was(
    spark: Any, tmp_path: Path
) -> None:
    context = Workshop(spark, tmp_path, CLICKS).context(batch="b")
    candidate = context.candidate(EVENTS)
    for attempt, lines in ((9, 1), (10, 2)):
        files = [{"file": "a.csv", "lines": lines, "of another version": 1}]
        text = json.dumps({"files": files, "lines": []})
        filesystem.write_text(candidate.path(f"{landing.TASKS_FACTS}/{attempt}.json"), text)
    [found] = landing.facts_of_tasks(context, candidate, [("a.csv", 3, 4)])
    assert (found.lines, found.bytes, found.modified_ms) == (2, 3, 4)


def test_lines_that_an_older_version_parsed_are_parsed_again(spark: Any, tmp_path: Path) -> None:
    """(They have the facts of their files among them, as lines numbered 0.)"""
    shop = Workshop(spark, tmp_path, CLICKS)
    shop.land("1.csv", rows(1, 2))
    shop.run("ingest", step="compute", batch="b")
    context = shop.context(batch="b")
    candidate, chosen = context.candidate(EVENTS), landing.landing_files(context)
    assert landing.is_parsed(context, candidate, chosen)
    filesystem.remove(candidate.path(landing.TASKS_FACTS))
    assert not landing.is_parsed(context, candidate, chosen)
    assert shop.run("ingest", batch="b").read == 2


def test_a_column_of_another_type_stops_the_run(spark: Any, tmp_path: Path) -> None:
    toml = CLICKS.replace('event_ts = "ts"', 'event_ts = "ts"\nvalue = "price"')
    shop = Workshop(spark, tmp_path, toml)
    head = "user,item,ts,price\n"
    shop.land("1.csv", head + "".join(f"u,i,{T + second},1.5\n" for second in range(30)))
    shop.run("ingest")
    before = [shop.version(table) for table in (EVENTS, REJECTS, FILES)]
    changed = "".join(f"u,i,2023-11-15 10:00:{second:02d},2\n" for second in range(20))
    shop.land("2.csv", head + changed)
    with pytest.raises(SchemaError, match=r"2\.csv: column 'ts' .*event_ts.* in none of its 20 li"):
        shop.run("ingest")
    shop.land("2.csv", head + "".join(f"u,i,{T + 90 + second},2 EUR\n" for second in range(20)))
    with pytest.raises(SchemaError, match=r"2\.csv: column 'price' .*a number.*2 EUR"):
        shop.run("ingest")
    assert [shop.version(table) for table in (EVENTS, REJECTS, FILES)] == before
    # One good line among them, or a few bad ones alone: rejects, as ever.
    shop.describe(toml + '[quality]\non_exceed = "warn"\n')
    shop.land("2.csv", head + changed + f"u,i,{T + 99},2\n")
    shop.land("3.csv", head + "u,i,soon,2\n")
    result = shop.run("ingest")
    assert (result.events_new, result.rejects) == (1, {"bad_event_ts": 21})


def test_new_columns_are_a_matter_of_policy(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("1.csv", rows(1))
    shop.run("ingest")
    shop.land("2.csv", f"user,agent,item,ts\nu,curl,i2,{T + 2}\n")
    strict = CLICKS.replace('format = "csv"', 'format = "csv"\non_new_column = "fail"')
    shop.describe(strict)
    with pytest.raises(SchemaError, match=r"2\.csv: new column 'agent'.*on_new_column"):
        shop.run("ingest")
    shop.describe(CLICKS)
    assert shop.run("ingest").events_new == 1
    assert {row["item_id"] for row in shop.rows(EVENTS)} == {"i1", "i2"}
