"""What the first lines of a log tell of a source file that is valid and wrong. No JVM."""

from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.bronze import file_checks
from jobs.bronze.file_checks import wrong_unit
from jobs.core.errors import SchemaError
from jobs.core.source_file import load_source
from jobs.records.records import FileFacts

SOURCE = """
[source]
name = "clicks"
landing = "*.csv"
format = "csv"
[columns]
user_id = "user"
item_id = "item"
event_ts = "ts"
[time]
unit = "{unit}"
"""
SECONDS = 1_717_200_303  # 2024-06-01 00:05:03 UTC


class Lake:
    """A lake whose `bronze.events` end in a year; None: it has none."""

    def __init__(self, last_year: int | None = None) -> None:
        self.last_year = last_year

    def version(self, _: Any) -> int | None:
        return None if self.last_year is None else 0

    def rows(self, _: Any) -> int:
        return 0 if self.last_year is None else 1

    def files_of(self, *_: Any) -> list[Any]:
        assert self.last_year is not None
        last = date(self.last_year, 1, 1) - date(1970, 1, 1)
        return [SimpleNamespace(last_us=lambda _: last // timedelta(microseconds=1))]


def begin(folder: Path, unit: str, times: list[str], more: str = "") -> None:
    """Check the beginning of a log with these times."""
    file, log = folder / "clicks.toml", folder / "log.csv"
    file.write_text(SOURCE.format(unit=unit) + more)
    log.write_text("user,item,ts\n" + "".join(f"u,i,{one}\n" for one in times))
    context: Any = SimpleNamespace(source=load_source(str(file)), lake=Lake())
    file_checks.check_beginning(context, [(str(log), log.stat().st_size, 0)])


@pytest.mark.parametrize(
    ("unit", "time", "words"),
    [
        ("ms", f"{SECONDS}", "line 2 is 1970-01-20 21:00:00 in ms, and 2024-06-01 00:05:03 in s"),
        (
            "us",
            f"{SECONDS}123",
            "line 2 is 1970-01-20 21:00:00 in us, and 2024-06-01 00:05:03 in ms",
        ),
        ("s", f"{SECONDS}123", "line 2 is in the year 56,385 in s, and 2024-06-01 00:05:03 in ms"),
        ("ms", f"{SECONDS}123456", "in ms, and 2024-06-01 00:05:03 in us. Correct"),
        ("s", f"{SECONDS}.5", None),
        ("ms", f"{SECONDS}123", None),
        ("us", f"{SECONDS}123456", None),
        ("ms", "86400000", None),  # made up: no unit makes it a year of logs
    ],
)
def test_a_unit_that_is_wrong_by_a_thousand_stops_the_run(
    tmp_path: Path, unit: str, time: str, words: str | None
) -> None:
    if words is None:
        begin(tmp_path, unit, [time, time])
        return
    with pytest.raises(SchemaError) as error:
        begin(tmp_path, unit, [time, time, "soon"])
    said = str(error.value)
    assert words in said and f"time.unit = {unit!r}" in said
    right = words.split(". ")[0].rpartition(" ")[2]
    assert f"set time.unit = {right!r}" in said
    begin(tmp_path, right, [time, time])
    begin(tmp_path, unit, [time, time], more="any_year = true")


def test_nanoseconds_are_no_unit(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="nanoseconds are not read: have the log delivered"):
        begin(tmp_path, "us", [f"{SECONDS}123456789"])


def test_a_log_of_early_years_stays_one(tmp_path: Path) -> None:
    """Of a later night, after all of its files were read."""
    file = tmp_path / "clicks.toml"
    file.write_text(SOURCE.format(unit="ms"))
    one = FileFacts(
        "b.csv", lines=3, units={"s": 2}, first_of={"s": 2}, time_of={"s": f"{SECONDS}"}
    )
    for last_year, said in ((None, True), (1970, False), (2024, True)):
        context: Any = SimpleNamespace(source=load_source(str(file)), lake=Lake(last_year))
        assert any("set time.unit = 's'" in text for text in wrong_unit(context, [one])) is said
    right = FileFacts("a.csv", lines=3, units={"ms": 3}, first_of={"ms": 2}, time_of={"ms": ""})
    assert list(wrong_unit(context, [one, right])) == []  # `mixed_units` says it


def test_a_column_that_is_not_there_is_said_before_spark_starts(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f"user,thing,ts\nu,i,{SECONDS}\n")
    (tmp_path / "clicks.toml").write_text(SOURCE.format(unit="s"))
    context: Any = SimpleNamespace(source=load_source(str(tmp_path / "clicks.toml")), lake=Lake())
    with pytest.raises(SchemaError, match=r"'item'.*thing"):
        file_checks.check_beginning(context, [(str(tmp_path / "log.csv"), 30, 0)])


def test_day_and_month_in_each_other_s_place() -> None:
    june = [date(2024, 6, day) for day in range(1, 11)]
    misread = [date(2024, one.day, one.month) for one in june]
    [note] = file_checks.read_as_months("MM/dd/yyyy HH:mm", misread)
    assert "10 days from 2024-01-06 to 2024-10-06, and none is after day 6 of a month" in note
    assert "time.unit = 'MM/dd/yyyy HH:mm', it is 'dd/MM/yyyy HH:mm'" in note
    for right in (june, [date(2024, month, day) for month in range(1, 9) for day in range(1, 29)]):
        assert file_checks.read_as_months("MM/dd/yyyy", right) == []
    two = [date(2024, 5, 31), date(2024, 6, 1), date(2024, 7, 1)]
    assert file_checks.read_as_months("d.M.yyyy", two) == []


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("yyyy-MM-dd", True),
        ("yyyyMMdd", True),
        ("d/M/yy", True),
        ("dd/MMM/yyyy", False),
        ("MMM dd", False),
    ],
)
def test_where_a_pattern_has_day_and_month(pattern: str, found: bool) -> None:
    assert bool(file_checks.DAY_AND_MONTH.search(pattern)) is found


def test_columns_that_look_swapped(tmp_path: Path) -> None:
    file = tmp_path / "clicks.toml"

    def notes(user: str, item: str) -> list[str]:
        text = SOURCE.format(unit="s").replace('"user"', f'"{user}"').replace('"item"', f'"{item}"')
        file.write_text(text)
        return file_checks.swapped_columns(load_source(str(file)))

    [note] = notes("itemid", "visitorid")
    assert "columns.user_id = 'itemid' and columns.item_id = 'visitorid' look swapped" in note
    for user, item in (
        ("visitorid", "itemid"),
        ("a", "b"),
        ("item", "article"),
        ("user", "customer"),
    ):
        assert notes(user, item) == []
