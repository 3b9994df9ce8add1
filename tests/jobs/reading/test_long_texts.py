"""Long texts, and columns of which nothing is known: no night stops for them, and no row is lost."""

from __future__ import annotations

import io
import json
import math
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, Schema
from deltalake.transaction import AddAction
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.bronze.quality import of_unparsable
from jobs.bronze.replay_rejects import is_cut
from jobs.cli import main
from jobs.core.errors import of_engine
from jobs.core.plan import Thresholds
from jobs.core.tables import EVENTS, ITEMS, REJECTS, SEQUENCES, SESSIONS
from jobs.lake import filesystem, time_slices
from jobs.lake.data_files import DataFile
from jobs.lake.private_delta import LONGEST_STATISTIC, statistics
from jobs.ops import maintain
from jobs.reading import readers
from jobs.reading.readers import read_file
from jobs.records import byte_streams
from jobs.records.records import CUT, LONGEST_RECORD, LONGEST_TEXT, FileFacts, Format
from tests.support.spark_tools import CLICKS, Workshop

T = 1_700_000_000

# -- statistics -----------------------------------------------------------------------------------

COLUMNS = pa.schema(
    [
        ("text", pa.string()), ("number", pa.int64()), ("at", pa.timestamp("us", "UTC")),
        ("day", pa.date32()), ("real", pa.float64()), ("data", pa.binary()), ("yes", pa.bool_()),
        ("listed", pa.list_(pa.string())), ("mapped", pa.map_(pa.string(), pa.string())),
        ("nested", pa.struct([("text", pa.string())])),
    ]
)  # fmt: skip
SHORT = st.text(st.sampled_from("aZé\U0001f600"), max_size=3)
MOMENT = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))
ROW = st.fixed_dictionaries(
    {
        "text": st.none() | SHORT | st.builds(lambda text, n: text * n, SHORT, st.integers(20, 3000)),
        "number": st.none() | st.integers(-(2**63), 2**63 - 1),
        "at": st.none() | MOMENT,
        "day": st.none() | st.dates(),
        "real": st.none() | st.floats(),
        "data": st.none() | st.binary(max_size=3),
        "yes": st.none() | st.booleans(),
        "listed": st.none() | st.lists(st.none() | SHORT, max_size=2),
        "mapped": st.none() | st.dictionaries(SHORT, st.none() | SHORT, max_size=2).map(
            lambda one: list(one.items())
        ),
        "nested": st.none() | st.fixed_dictionaries({"text": st.none() | SHORT}),
    }
)  # fmt: skip


def bound(name: str, text: Any) -> Any:
    if name == "at":
        return datetime.fromisoformat(text)
    return date.fromisoformat(text) if name == "day" else text


def check(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said of a file holds of all its rows; returns it."""
    found = statistics(str(path))
    stats: dict[str, Any] = json.loads(found["stats"])
    assert found["rows"] == stats["numRecords"] == len(rows)
    for name, nulls in stats["nullCount"].items():
        assert nulls == sum(row[name] is None for row in rows), name
    assert stats["minValues"].keys() == stats["maxValues"].keys() <= stats["nullCount"].keys()
    assert not {"listed", "mapped", "nested", "real", "data"} & stats["minValues"].keys()
    for name in stats["minValues"]:
        low, high = (bound(name, stats[side][name]) for side in ("minValues", "maxValues"))
        there = [row[name] for row in rows if row[name] is not None]
        assert there and low <= min(there) and max(there) <= high, name
        assert len(str(low)) <= LONGEST_STATISTIC and len(str(high)) <= LONGEST_STATISTIC
    return stats


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(ROW, max_size=12), group=st.integers(1, 5),
    told=st.sampled_from([True, False, ["number", "at"]]),
)  # fmt: skip
def test_bounds_contain_all_values_or_are_left_out(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], group: int, told: Any
) -> None:
    path = tmp_path_factory.mktemp("one") / "a.parquet"
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    pq.write_table(table, path, row_group_size=group, write_statistics=told)
    stats = check(path, rows)
    flat = {"text", "number", "at", "day", "real", "data", "yes"}
    if rows and told is not True:
        flat = set(told or [])
    assert stats["nullCount"].keys() == flat


def test_a_file_without_row_groups_has_no_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, COLUMNS):
        pass
    assert pq.ParquetFile(path).metadata.num_row_groups == 0
    assert check(path, [])["minValues"] == {}


@pytest.mark.parametrize("rows", [
    [],
    [{"text": "x" * 3000}, {"text": None}],
    [{"text": "x" * 100_000, "at": datetime(7, 1, 1, tzinfo=UTC)}, {"at": datetime(999, 1, 1, tzinfo=UTC)}],
    [{"text": "a", "number": 1, "real": math.nan}, {"text": "b", "real": 1.0}],
    [{"text": None, "listed": [None, "a"]}, {"text": None, "listed": []}],
    [{"day": date(1, 1, 1)}, {"day": date(9999, 12, 31)}],
])  # fmt: skip
def test_what_spark_writes_is_read_back_by_the_bounds(
    spark: Any, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    """By delta-rs, which leaves out files whose statistics say that no row can be meant."""
    names = ("text", "number", "at", "day", "real", "listed")
    whole = [{name: row.get(name) for name in names} for row in rows]
    ddl = "text string, number bigint, at timestamp, day date, real double, listed array<string>"
    table = [tuple(row.values()) for row in whole]
    spark.createDataFrame(table, ddl).coalesce(1).write.parquet(str(tmp_path / "t"))
    [path] = (tmp_path / "t").glob("*.parquet")
    stats = check(path, whole)
    if any(len(row["text"] or "") > 2048 for row in whole):
        assert "text" not in stats["nullCount"]  # what parquet-java does not say
    DeltaTable.create(str(tmp_path / "t"), Schema.from_arrow(pq.read_schema(path)))
    found = DeltaTable(str(tmp_path / "t"))
    add = AddAction(path.name, path.stat().st_size, {}, 0, True, json.dumps(stats))
    found.create_write_transaction([add], "append", found.schema())
    rows_of = filesystem.rows_of(DeltaTable(str(tmp_path / "t")))
    for name in names[:4]:
        wanted = sum(row[name] is None for row in whole)
        assert rows_of.to_table(filter=ds.field(name).is_null()).num_rows == wanted, name
        for value in {row[name] for row in whole} - {None}:
            wanted = sum(row[name] == value for row in whole)
            assert rows_of.to_table(filter=ds.field(name) == value).num_rows == wanted, name
            condition = (
                f"{name} = {value!r}" if name in ("text", "number") else f"{name} = '{value}'"
            )
            delta = spark.read.format("delta").load(str(tmp_path / "t"))
            assert delta.where(condition).count() == wanted


def test_a_data_file_of_which_the_log_knows_nothing_may_contain_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3]}), path)
    file = DataFile(str(path), {"num_records": None})
    assert file.rows == 3
    assert (file.first_us("at"), file.last_us("at")) == (-(2**63), 2**63 - 1)


def test_extents_of_a_file_without_statistics_are_read_from_its_rows(tmp_path: Path) -> None:
    found = []
    for told in (True, False):
        path = str(tmp_path / f"{told}.parquet")
        times = pa.array([5, 3, None, None, 9], pa.timestamp("us", "UTC"))
        pq.write_table(pa.table({"event_ts": times}), path, row_group_size=2, write_statistics=told)
        found.append([one[1:] for one in time_slices.extents([path])])
    assert found[0] == found[1] == [(3, 5, 2), (9, 9, 1)]


# -- reading --------------------------------------------------------------------------------------

MAPPED = {"user_id": "u", "item_id": "i", "event_ts": "t"}
BOUNDS = {"longest_record": 60, "longest_text": 20}
LONG, LONGER = "x" * 30, "y" * 70


def read(fmt: Format, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    facts = FileFacts(str(path))
    rows = [row for batch in read_file(fmt, str(path), facts) for row in batch.to_pylist()]
    return rows, vars(facts)


def log_of(form: str, rows: list[tuple[str, str, str]]) -> bytes:
    if form == "jsonl":
        names = ("u", "i", "t", "note")
        lines = [json.dumps(dict(zip(names, [*row, "n" * 10]))) for row in rows]
    else:
        lines = ["u,i,t,note", *(f"{u},{i},{t},{'n' * 10}" for u, i, t in rows)]
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("form", ["csv", "jsonl", "latin1"])
def test_a_record_that_is_too_long_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, block: int
) -> None:
    monkeypatch.setattr(byte_streams, "BLOCK_BYTES", block)
    encoding = "latin-1" if form == "latin1" else "utf-8"
    kind = "jsonl" if form == "jsonl" else "csv"
    sizes = {"longest_record": 150, "longest_text": 60} if form == "jsonl" else BOUNDS
    long, longer = ("x" * 61, "y" * 500) if form == "jsonl" else (LONG, LONGER)
    path = tmp_path / f"log.{kind}"
    path.write_bytes(log_of(kind, [("a", "1", "1"), ("b", long, "2"), ("c", "3", "3"),
                                   ("d", longer, "4"), ("e", "5", "5")]))  # fmt: skip
    rows, facts = read(Format(kind, MAPPED, encoding=encoding, **sizes), path)  # type: ignore[arg-type]
    assert [(row["kind"], row["user_id"]) for row in rows] == [
        ("record", "a"), ("unparsable", None), ("record", "c"), ("unparsable", None),
        ("record", "e"),
    ]  # fmt: skip
    first = 1 if kind == "jsonl" else 2
    assert [row["line"] for row in rows] == list(range(first, first + 5))
    assert facts["lines"] == 5 and (facts["too_long"], facts["first_too_long"]) == (2, first + 1)
    most = sizes["longest_text"]
    assert all(len(row["raw"]) <= most + 60 for row in rows)
    middle = rows[1]["raw"]
    assert middle[most:].startswith(CUT) and re.search(r"\[cut: \d+ characters\]$", middle)
    assert rows[3]["raw"].endswith(f"more than {sizes['longest_record']} characters]")
    # Without bounds (as `forget` reads) they are records like any other.
    rows, facts = read(Format(kind, MAPPED, encoding=encoding, longest_record=10**9,
                              longest_text=10**9), path)  # fmt: skip
    assert [row["item_id"] for row in rows] == ["1", long, "3", longer, "5"]
    assert facts["too_long"] == 0


def test_a_long_payload_that_nobody_maps_is_no_reason_to_reject(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"u": "a", "i": "1", "t": "1", "page": "' + "z" * 15 + '"}\n')
    fmt = Format("jsonl", MAPPED, longest_record=60, longest_text=20)
    [row], facts = read(fmt, path)
    assert (row["kind"], row["item_id"], facts["too_long"]) == ("record", "1", 0)
    assert row["raw"].startswith('{"u": "a", "i": "1", ') and CUT in row["raw"]


def test_a_quoted_record_of_many_long_lines_is_none(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('u,i,t,note\na,"' + "x\n" * 40 + '",1,n\nb,2,2,n\n')
    rows, _ = read(Format("csv", MAPPED, **BOUNDS), path)  # type: ignore[arg-type]
    assert (rows[0]["kind"], rows[0]["line"], rows[0]["raw"]) == ("unparsable", 2, 'a,"x')
    assert (rows[-1]["kind"], rows[-1]["user_id"], rows[-1]["line"]) == ("record", "b", 43)


def test_a_parquet_cell_that_is_too_long_costs_its_row_only(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    shown = [["p"], ["q" * 11, "r" * 11], None, ["s"]]
    pq.write_table(pa.table({"u": ["a", "b", "c", "d"], "i": ["1", "2", LONG, "4"],
                             "t": [1, 2, 3, 4], "shown": shown}), path)  # fmt: skip
    fmt = Format("parquet", {**MAPPED, "exposed_with": "shown"}, **BOUNDS)  # type: ignore[arg-type]
    rows, facts = read(fmt, path)
    kinds = ["record", "unparsable", "unparsable", "record"]
    assert [row["kind"] for row in rows] == kinds
    assert [row["exposed_with"] for row in rows] == [["p"], None, None, ["s"]]
    assert rows[2]["item_id"] == LONG[:20] + CUT + "30 characters]"
    assert (facts["too_long"], facts["first_too_long"]) == (2, 2)


PARTS = st.lists(
    st.sampled_from(["a", "bb", "\n", "\r", "\r\n", "c" * 9]), max_size=20
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(parts=PARTS, cut=st.integers(1, 9), most=st.none() | st.integers(0, 12))
def test_lines_are_the_same_wherever_a_text_is_cut(
    parts: list[str], cut: int, most: int | None
) -> None:
    text = "".join(parts)
    pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
    wanted = io.StringIO(text, newline="").readlines()
    for form in (pieces, [one.encode() for one in pieces]):
        got: list[str] = []
        for whole in byte_streams.whole_lines(byte_streams.shortened(form, most)):  # type: ignore[type-var]
            lines = whole if isinstance(whole, str) else whole.decode()
            got += io.StringIO(lines, newline="").readlines()
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted):
            if most is None or len(other.rstrip("\r\n")) <= most:
                assert one == other
            else:
                assert most < len(one.rstrip("\r\n")) <= max(most + cut, most + 1)
                assert other.startswith(one.rstrip("\r\n"))


def test_a_fault_of_the_reader_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr(readers, "json_values", broken)
    path = tmp_path / "log.jsonl"
    path.write_text("[]\n")  # (is left to `json_values`)
    _, facts = read(Format("jsonl", MAPPED), path)
    assert facts["error"].startswith(f"{path}: reading it failed after 1 lines (RuntimeError: what")
    assert "Traceback" in capsys.readouterr().err


# -- nights ---------------------------------------------------------------------------------------

HEAD = "user,item,ts\n"
ITEM, USER = "i" * 5_000, "u" * 100_000
REJECT = f"u1,{'x' * 2_100},never\n"


def versions(shop: Workshop) -> list[int]:
    return [shop.version(table) for table in (EVENTS, REJECTS, SESSIONS, ITEMS, SEQUENCES)]


def positions(shop: Workshop) -> dict[str, list[str]]:
    name = {row["item_index"]: row["item_id"] for row in shop.rows(ITEMS)}
    return {row["user_id"]: [name[at] for at in row["item_index"]] for row in shop.rows(SEQUENCES)}


@pytest.mark.long
def test_nights_with_long_rejects_and_ids(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("a.csv", HEAD + f"u1,i1,{T}\nu1,{ITEM},{T + 10}\n{USER},i2,{T}\n" + REJECT)
    shop.land("empty.csv", "")
    shop.land("nothing.csv", HEAD)
    first = shop.run(day="2023-11-14")
    assert (first.read, first.events_new, first.rejects) == (4, 3, {"bad_event_ts": 1})
    before = versions(shop)
    assert shop.run().read == 0 and versions(shop) == before  # the rerun

    # The next night: known long ids, new ones, a late line that is long.
    other = "j" * 100_000
    shop.land("b.csv", HEAD + f"u1,{ITEM},{T + 20}\n{USER},{other},{T + 86_400}\n"
              f"u1,{'l' * 3_000},5\nu1,i1,{T}\n" + REJECT)  # fmt: skip
    second = shop.run(day="2023-11-15")
    assert (second.read, second.events_new, second.duplicates) == (5, 2, 1)
    assert second.rejects == {"late": 1, "bad_event_ts": 1} and second.sessions_changed == 1
    assert positions(shop) == {"u1": ["i1", ITEM, ITEM], USER: ["i2", other]}
    assert sorted(len(row["raw"]) for row in shop.rows(REJECTS)) == sorted(
        [len(REJECT) - 1, len(REJECT) - 1, 3_000 + 5]
    )
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (3, 0)
    done = maintain.maintain(shop.context(), 1, {})
    assert done["tables"][EVENTS.full_name]["files_after"] == 1
    assert positions(shop) == {"u1": ["i1", ITEM, ITEM], USER: ["i2", other]}
    shop.run("validate")
    before = versions(shop)
    assert shop.run().read == 0 and versions(shop) == before


@pytest.mark.long
@pytest.mark.parametrize("native", [False, True])
def test_nights_with_long_texts_by_sparks_own_writes(
    spark: Any, tmp_path: Path, native: bool
) -> None:
    """Candidates, MERGE and rebuilds as larger logs have them; replays and reloads."""
    toml = CLICKS.replace("csv", "jsonl") + "[quality]\nmax_reject_share = 0.9\n"
    if native:
        toml = toml.replace('"ts"\n', '"ts"\nevent_id = "id"\nsource_session_id = "s"\n')
        toml += '[sessions]\nrule = "source_session_id"\n'
    limits = Thresholds(
        few_moved=-1, merged_rows=-1, few_bytes=-1, smallest_slice=10, read_bytes=-1
    )
    shop = Workshop(spark, tmp_path, toml, limits)
    sizes = (3, 2_049, 5_000, 70_000)

    def lines(night: int) -> str:
        made = []
        for number in range(16):
            at = T + night * 86_400 + 60 * number
            item, user = "abc"[number % 3] * sizes[number % 4], "u1" if number % 5 else USER
            row = {
                "user": user,
                "item": item,
                "ts": at,
                "s": "s" * 2_100,
                "id": f"{night}-{number}",
            }
            made.append(row)
        bad = {"user": "u1", "item": "z" * 2_500, "ts": "x" * 3_000, "id": "q"}
        return "".join(json.dumps(one) + "\n" for one in [*made, bad])

    for night in range(3):
        shop.land(f"{night}.jsonl", lines(night))
        result = shop.run(day=f"2023-11-{14 + night}")
        assert (result.read, result.events_new, result.rejects) == (17, 16, {"bad_event_ts": 1})
    shop.land("0.jsonl", lines(0) + lines(5))
    again = shop.run(day="2023-11-19")
    assert (again.read, again.events_new, again.duplicates) == (34, 16, 16)
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (4, 0)
    before = positions(shop)
    shop.run(options={"rebuild": True})
    reloaded = shop.run(options={"reload": True})
    assert (reloaded.read, reloaded.events_new, reloaded.duplicates) == (68, 0, 64)
    assert positions(shop) == before and len(before["u1"]) + len(before[USER]) == 64
    shop.run("validate")


FULL = """
[source]
name = "clicks"
landing = "{landing}/*.jsonl"
format = "jsonl"
[columns]
user_id = "user"
item_id = "item"
event_ts = "ts"
event_type = "type"
source_session_id = "session"
exposed_with = "shown"
event_id = "id"
[time]
unit = "s"
[sessions]
rule = "source_session_id"
"""


@pytest.mark.long
def test_every_column_may_be_long_and_native_events_are_replaced(
    spark: Any, tmp_path: Path
) -> None:
    shop = Workshop(spark, tmp_path, FULL)
    long = {name: name[0] * 5_000 for name in ("type", "session", "id")}
    shown = ["s" * 5_000, "i1"]
    rows: list[dict[str, Any]] = [
        {"user": "u1", "item": "i1", "ts": T + 5, "shown": shown, **long},
        {"user": "u1", "item": ITEM, "ts": T + 9, "session": long["session"], "id": "e2"},
        {"user": USER, "item": "i1", "ts": T, "id": "e3", "type": None, "shown": []},
    ]
    shop.land("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert shop.run().events_new == 3
    rows[0]["ts"] = T  # an earlier line of the same id
    new = {"user": "u1", "item": "i2", "ts": T + 7, "session": long["session"], "id": "e4"}
    shop.land("b.jsonl", "".join(json.dumps(row) + "\n" for row in [rows[0], new]))
    night = shop.run()
    assert (night.events_new, night.events_replaced) == (1, 1)
    assert positions(shop) == {"u1": ["i1", "i2", ITEM], USER: ["i1"]}
    [one] = [row for row in shop.rows(SESSIONS) if row["user_id"] == "u1"]
    assert one["events"][0]["exposed_with"] == shown and one["event_count"] == 3
    assert {row["item_id"] for row in shop.rows(ITEMS)} == {"i1", "i2", ITEM, shown[0]}
    shop.run("validate")


@pytest.mark.long
def test_a_file_whose_optional_columns_are_all_null(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, FULL.replace("jsonl", "parquet").replace(
        'event_id = "id"\n', "").replace('rule = "source_session_id"', ""))  # fmt: skip
    for night, users in enumerate((["u1", "u2"], ["u1", "u3"])):
        count = len(users)
        table = pa.table({
            "user": users, "item": ["i1", ITEM], "ts": [T + 10 * night] * count,
            "type": pa.nulls(count, pa.string()), "session": pa.nulls(count, pa.string()),
            "shown": pa.nulls(count, pa.list_(pa.string())),
        })  # fmt: skip
        pq.write_table(table, shop.landing / f"{night}.parquet", write_statistics=night == 0)
        pq.write_table(table.slice(0, 0), shop.landing / f"empty{night}.parquet")
        assert shop.run().events_new == 2
    assert positions(shop) == {"u1": ["i1", "i1"], "u2": [ITEM], "u3": [ITEM]}
    actions = pa.table(shop.table(EVENTS).get_add_actions(flatten=True)).to_pylist()
    assert sum(one["null_count.event_type"] for one in actions) == 4


@pytest.mark.long
def test_lines_of_which_only_the_beginning_is_kept_are_refused_by_name(
    spark: Any, tmp_path: Path
) -> None:
    wrong = CLICKS.replace("csv", "jsonl") + "[quality]\nmax_reject_share = 0.8\n"
    shop = Workshop(spark, tmp_path, wrong)
    page = "p" * (LONGEST_TEXT + 5)
    at = "2023-11-14T22:13:20Z"
    rows = [
        {"user": "u1", "item": "i1", "ts": at, "page": page}, {"user": "u1", "item": "i2", "ts": at},
        {"user": "u2", "item": page, "ts": at}, {"user": "u3", "item": "i3", "ts": T},
    ]  # fmt: skip
    path = shop.land("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    first = shop.run("ingest")
    assert first.rejects == {"bad_event_ts": 2, "unparsable": 1} and first.events_new == 1
    [told] = [note for note in first.notes if "too long" in note]
    assert "1 records are too long and were rejected as unparsable" in told
    assert f"line 3 of {path}" in told and f"{LONGEST_RECORD:,} characters" in told
    assert all(len(row["raw"]) < LONGEST_TEXT + 60 for row in shop.rows(REJECTS))

    shop.describe(wrong.replace('unit = "s"', 'unit = "iso8601"'))
    replayed = shop.run("replay-rejects")
    assert (replayed.read, replayed.events_new) == (1, 1)  # the short one
    [told] = [note for note in replayed.notes if "not read again" in note]
    assert told.startswith("2 rejected lines") and f"line 1 of {path}" in told
    assert "touch the file" in told and shop.lake.read(REJECTS).where(is_cut()).count() == 2

    path.write_bytes(path.read_bytes() + b"\n")  # (as good as touching it)
    again = shop.run("ingest")
    assert (again.events_new, again.duplicates) == (1, 1)
    assert {row["reason"] for row in shop.rows(REJECTS)} == {"unparsable", "bad_event_ts"}
    assert sorted(row["item_id"] for row in shop.rows(EVENTS)) == ["i1", "i2", "i3"]


@pytest.mark.long
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "combined_log"])
def test_a_record_of_twenty_megabytes(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    huge = "x" * 20_000_000
    toml = CLICKS.replace("csv", form)
    shop = Workshop(spark, tmp_path, toml)
    good = [("u1", "i1", T), ("u2", "i2", T + 5)]
    rows = [good[0], ("u1", huge, T), good[1]]
    if form == "parquet":
        table = pa.table(dict(zip(("user", "item", "ts"), map(list, zip(*rows)))))
        pq.write_table(table, shop.landing / "a.parquet")
    elif form == "combined_log":
        shop.describe(toml.replace("*.combined_log", "*.log").replace('"user"', '"host"')
                      .replace('"item"', '"path"').replace('"ts"', '"time"')
                      .replace('[time]\nunit = "s"', ""))  # fmt: skip
        line = '{} - - [14/Nov/2023:22:13:20 +0000] "GET /{} HTTP/1.1" 200 5\n'
        shop.land("a.log", "".join(line.format(user, item) for user, item, _ in rows))
    elif form == "jsonl":
        shop.land("a.jsonl", "".join(
            json.dumps({"user": u, "item": i, "ts": t}) + "\n" for u, i, t in rows))  # fmt: skip
    else:
        shop.land("a.csv", HEAD + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    for night in (0, 1):
        result = shop.run()
        if not night:
            assert (result.read, result.events_new, result.rejects) == (3, 2, {"unparsable": 1})
            assert "1 records are too long" in " ".join(result.notes)
    [reject] = shop.rows(REJECTS)
    assert LONGEST_TEXT < len(reject["raw"]) < LONGEST_TEXT + 60
    assert set(positions(shop)) == {"u1", "u2"}
    assert "PythonException" not in capsys.readouterr().err


# -- what engines say -----------------------------------------------------------------------------


def test_an_error_of_an_engine_begins_with_a_sentence(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import cli

    shop = Workshop(spark, tmp_path)

    def broken(batches: Any) -> Any:
        yield from ()
        raise ValueError("what nobody thought of")

    def fail(*_: Any) -> None:
        spark.range(3).mapInArrow(broken, "id long").collect()

    monkeypatch.setattr(cli, "execute", fail)
    assert main(["run", "--source", str(shop.file)]) == 1
    said = capsys.readouterr().err.splitlines()
    begin = next(at for at, line in enumerate(said) if line.startswith("run stopped: "))
    assert said[begin].startswith("run stopped: a task of Spark failed: ValueError: what nobody")
    assert said[begin + 1].startswith("Traceback")
    assert of_engine(ValueError("ours")) is None


def test_a_line_that_is_too_long_is_not_taken_for_another_format() -> None:
    cut = {"raw": "p" * LONGEST_TEXT + CUT + "1,048,581 characters]", "file_columns": None}
    fmt = Format(format="jsonl", mapped={"item_id": "item"})
    assert "the lines are too long" in of_unparsable(fmt, [cut])
    assert "not JSON objects" in of_unparsable(fmt, [cut, {"raw": "p", "file_columns": None}])
