"""Lines that cannot be used: runs that fail for them, what would mend them, texts for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.core.errors import RejectShareError
from jobs.core.source_log import NULL_IDS
from jobs.core.tables import EVENTS, FILES, REJECTS, RUNS, SEQUENCES
from tests.jobs.pipeline.test_kill import run_command
from tests.support.spark_tools import CLICKS, Workshop

T = 1_700_000_000
HEAD = "user,item,ts\n"
JSON_CLICKS = CLICKS.replace("csv", "jsonl")
WARN = '[quality]\non_exceed = "warn"\n'


def good(*users: object) -> str:
    return "".join(f"{user},i{n},{T + n}\n" for n, user in enumerate(users))


def refused(shop: Workshop, **run: Any) -> str:
    """What a run says that fails for its lines."""
    with pytest.raises(RejectShareError) as error:
        shop.run("ingest", **run)
    return str(error.value)


# -- runs that fail -------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_of_which_nothing_is_usable_fails_and_reads_its_files_again(
    spark: Any, tmp_path: Path
) -> None:
    shop = Workshop(spark, tmp_path, JSON_CLICKS)
    rows = [
        {"user": None, "cookie": f"c{n % 3}", "ts": T + n, "page": {"item": f"i{n % 4}"},
         "tags": [{"key": "k", "value": None}, {"key": "k2"}]}
        for n in range(40)
    ]  # fmt: skip
    shop.land("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = run_command(shop, None)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    said = done.stderr[done.stderr.index("run stopped:") :]
    assert "40 of 40 lines cannot be used (100.0%; 40 missing_user_id): none is usable" in said
    for number in (1, 2, 3):
        assert f"line {number} of {shop.landing / 'a.jsonl'}, missing_user_id: '{{" in said
    assert "line 4 of" not in said
    assert "columns.user_id = 'user' is null or not there in these lines" in said
    assert "They have: cookie, ts, page.item, tags[].key. Correct columns.user_id" in said
    assert "A path with [] is a list" in said and "the files are read again" in said
    # Nothing but the lines themselves is published, and no ledger hides the file.
    assert shop.rows(EVENTS) == [] and shop.rows(FILES) == [] and len(shop.rows(REJECTS)) == 40
    assert [row["outcome"] for row in shop.rows(RUNS)] == ["RejectShareError"]

    version = shop.version(REJECTS)
    assert "40 of 40" in refused(shop)
    assert shop.version(REJECTS) == version  # the same lines again are nothing new
    # Half mended: another reason holds, and the table says it once the run has ended well.
    half = JSON_CLICKS.replace('"user"', '"cookie"')
    shop.describe(half)
    assert "columns.item_id = 'item' is null or not there" in refused(shop)
    shop.describe(half.replace('"item"', '"page.item"'))
    result = shop.run()
    assert (result.read, result.events_new, result.rejects) == (40, 40, {})
    assert shop.rows(REJECTS) == [] and len(shop.rows(FILES)) == 1
    assert {row["user_id"] for row in shop.rows(SEQUENCES)} == {"c0", "c1", "c2"}


@pytest.mark.long
def test_lists_of_events_are_told_by_their_paths_which_are_bounded(
    spark: Any, tmp_path: Path
) -> None:
    shop = Workshop(spark, tmp_path, JSON_CLICKS)
    wide = {f"extra{n}": n for n in range(50)}
    basket = [{"sku": n, "at": T + n} for n in range(3)]
    rows = [{"user": n, "ts": T + n, "basket": basket, **wide} for n in range(30)]
    shop.land("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    said = refused(shop)
    assert "columns.item_id = 'item' is null or not there" in said
    assert "They have: user, ts, basket[].sku, basket[].at, extra0," in said
    assert "extra15 and 34 more. Correct columns.item_id" in said and "extra16" not in said.split(
        "They have"
    )[1]  # fmt: skip
    shop.describe(JSON_CLICKS.replace('"item"', '"basket"'))
    said = refused(shop)
    assert "unparsable: columns.item_id = 'basket' is a list or an object" in said
    assert "basket[].sku" in said


MIXED = """user,item,ts,price,n
,i,1700000000,1,1
ann,NULL,1700000000,1,1
ann,i,2024-06-01T10:00:00,1,1
ann,i,1700000000,2 EUR,1
ann,i,1700000000,1,third
ann,i,1700000000,1
"""
MIXED_TOML = CLICKS.replace(
    'event_ts = "ts"', 'event_ts = "ts"\nvalue = "price"\ntie_break = "n"\nevent_id = "note"'
)


@pytest.mark.parametrize("policy", ["fail", "warn"])
def test_each_reason_names_the_keys_that_would_mend_it(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    toml = MIXED_TOML + f'[quality]\non_exceed = "{policy}"\n'
    shop = Workshop(spark, tmp_path, toml)
    lines = MIXED.splitlines()
    text = [f"{line},x" for line in lines]
    text[0], text[-1] = f"{lines[0]},note", lines[-1]
    shop.land("a.csv", "\n".join([*text, "ann,i,1700000000,1,1,"]) + "\n")
    if policy == "fail":
        said = refused(shop)
    else:
        assert shop.run("ingest").events_new == 0
        said = capsys.readouterr().out
    assert "7 of 7 lines cannot be used (100.0%; 1 " in said and "none is usable" in said
    have = "user, item, ts, price, n, note"
    for words in (
        f"missing_user_id: columns.user_id = 'user' is empty, which means nothing "
        f"(source.null_values). Name another column of: {have}",
        "missing_item_id: columns.item_id = 'item' is 'NULL', which means nothing",
        "bad_event_ts: columns.event_ts = 'ts' is '2024-06-01T10:00:00', which is not a time of "
        "time.unit = 's' (zone 'UTC'): it looks like time.unit = 'iso8601'",
        "bad_value: columns.value = 'price' is '2 EUR', which is not a number",
        "bad_tie_break: columns.tie_break = 'n' is 'third', which is not a whole number",
        "missing_event_id: columns.event_id = 'note' is empty",
        "unparsable: the lines are not records of 6 fields",
    ):
        assert words in said, said
    assert ("the files are read again" in said) == (policy == "fail")
    assert ("jobs replay-rejects" in said) == (policy == "warn")
    assert len(shop.rows(FILES)) == (policy == "warn")


@pytest.mark.long
def test_bytes_of_another_encoding_and_lines_of_another_kind_are_told(
    spark: Any, tmp_path: Path
) -> None:
    shop = Workshop(spark, tmp_path)
    text = "".join(f"ann,café{n},{T + n}\n" for n in range(20))
    shop.land("a.csv", (HEAD + text).encode("latin-1"))
    said = refused(shop)
    assert "bytes that are not source.encoding = 'utf-8'" in said and "'latin-1'" in said
    stored = {row["raw"] for row in shop.rows(REJECTS)}
    assert any("caf\\xe9" in raw for raw in stored)
    shop.describe(CLICKS.replace('format = "csv"', 'format = "csv"\nencoding = "latin-1"'))
    assert shop.run("ingest").events_new == 20
    # The rejects of the reading that failed are the same lines under another text.
    assert shop.rows(REJECTS) == []

    web = CLICKS.replace("csv", "log").replace('"log"', '"combined_log"').replace('unit = "s"', "")
    web = web.replace('"user"', '"host"').replace('"item"', '"path"').replace('"ts"', '"time"')
    other = Workshop(spark, tmp_path / "web", web)
    other.land("a.log", "GET /a\n" * 3)
    assert "the lines are not lines of a combined_log: correct source.format" in refused(other)


@pytest.mark.long
def test_parquet_without_values_fails_and_is_read_by_another_column(
    spark: Any, tmp_path: Path
) -> None:
    shop = Workshop(spark, tmp_path, CLICKS.replace("csv", "parquet"))
    columns = {"user": ["a", "b"], "item": pa.nulls(2, pa.string()), "sku": ["x", "y"],
               "ts": [T, T + 1]}  # fmt: skip
    pq.write_table(pa.table(columns), shop.landing / "a.parquet")
    said = refused(shop)
    assert "columns.item_id = 'item' is null" in said and "They have: user, item, sku, ts" in said
    assert len(shop.rows(REJECTS)) == 2
    shop.describe(CLICKS.replace("csv", "parquet").replace('"item"', '"sku"'))
    assert shop.run("ingest").events_new == 2
    assert shop.rows(REJECTS) == []


@pytest.mark.long
def test_one_bad_file_of_many_is_a_note_and_late_lines_are_usable(
    spark: Any, tmp_path: Path
) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("good.csv", HEAD + good("ann", "bob", "cat", "dan"))
    shop.land("bad.csv", HEAD + ",i,1\nann,i,soon\n")
    shop.land("late.csv", HEAD + "".join(f"eve,i,{n}\n" for n in range(30)))
    result = shop.run("ingest", day="2023-11-15")
    assert result.events_new == 4
    assert result.rejects == {"late": 30, "missing_user_id": 1, "bad_event_ts": 1}
    notes = [note for note in result.notes if "none of its" in note]
    assert notes == [
        f"{shop.landing / 'bad.csv'}: none of its 2 lines can be used (1 bad_event_ts, 1 "
        "missing_user_id), such as line 2: ',i,1'. They are in bronze.rejects"
    ]
    assert len(shop.rows(FILES)) == 3
    shop.land("later.csv", HEAD + "".join(f"eve,j,{n}\n" for n in range(5)))
    result = shop.run("ingest", day="2023-11-15")  # nothing new, and nothing wrong
    assert (result.events_new, result.rejects) == (0, {"late": 5})
    shop.land("again.csv", HEAD + good("ann"))
    assert shop.run("ingest").duplicates == 1


@pytest.mark.long
def test_the_share_fails_by_default_and_warns_where_the_source_says_so(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("a.csv", HEAD + good("ann", "bob") + ",i,1\n" * 3)
    said = refused(shop)
    assert "3 of 5 lines cannot be used (60.0%; 3 missing_user_id): more than " in said
    assert shop.rows(EVENTS) == []
    shop.describe(CLICKS + WARN)
    assert shop.run("ingest").events_new == 2
    assert "warning: bronze.events: 3 of 5 lines" in capsys.readouterr().out
    shop.describe(CLICKS + "[quality]\nmax_reject_share = 1\n")
    shop.land("b.csv", HEAD + ",i,1\n")
    assert "1 of 1 lines cannot be used (100.0%; 1 missing_user_id): none is usable" in refused(
        shop
    )
    shop.land("c.csv", HEAD + good("cat") + ",i,1\n" * 9)
    assert shop.run("ingest").events_new == 1
    assert len(shop.rows(FILES)) == 3


@pytest.mark.long
@pytest.mark.parametrize("mended", ["source file", "log"])
def test_a_night_is_computed_again_by_what_was_mended(
    spark: Any, tmp_path: Path, mended: str
) -> None:
    """In Airflow the steps of a cleared night have the same batch."""
    shop = Workshop(spark, tmp_path)
    shop.land("a.csv", HEAD + "ann,i,2024-06-01\nbob,i,2024-06-01\n")
    shop.run("ingest", step="compute", batch="night")
    refused(shop, step="audit", batch="night")
    if mended == "log":
        shop.land("a.csv", HEAD + good("ann", "bob", "cat"))
    else:
        shop.describe(CLICKS.replace('unit = "s"', 'unit = "iso8601"'))
    for step in ("compute", "audit", "publish"):
        result = shop.run("ingest", step=step, batch="night")
    assert (result.events_new, result.rejects) == (3 if mended == "log" else 2, {})
    assert shop.rows(REJECTS) == []


@pytest.mark.long
def test_an_audit_that_is_run_again_writes_no_empty_version(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("a.csv", HEAD + ",i,1\n")
    shop.run("ingest", step="compute", batch="night")
    refused(shop, step="audit", batch="night")
    version = shop.version(REJECTS)
    refused(shop, step="audit", batch="night")
    assert shop.version(REJECTS) == version and len(shop.rows(REJECTS)) == 1


# -- texts for nothing ----------------------------------------------------------------------------

NOTHINGS = ["NULL", "null", "\\N", "None", "nan", "NaN", "undefined"]
IDS = ["NA", "nil", "unknown", "0", "Nullarbor", "none-1"]


def users(shop: Workshop) -> set[str]:
    return {row["user_id"] for row in shop.rows(EVENTS)}


@pytest.mark.long
def test_the_usual_texts_for_nothing_are_no_ids(spark: Any, tmp_path: Path) -> None:
    assert set(NOTHINGS) < set(NULL_IDS) and not set(IDS) & set(NULL_IDS)
    shop = Workshop(spark, tmp_path)
    shop.land("a.csv", HEAD + good(*IDS, *NOTHINGS[:5]) + f"ann,null,{T}\n")
    result = shop.run("ingest")
    assert result.rejects == {"missing_user_id": 5, "missing_item_id": 1}
    assert users(shop) == set(IDS)
    # The rule is the table's: a later night keeps it, in every format; a replay, too.
    shop.land("b.csv", HEAD + "'quoted',i,1\n" + good("bob", *NOTHINGS[5:]).replace("bob", '"bob"'))
    assert shop.run("ingest").rejects == {"missing_user_id": 2}
    replayed = shop.run("replay-rejects")
    assert (replayed.events_new, replayed.rejects["missing_user_id"]) == (0, 7)
    # A list of the source's own is taken as it is given, in all columns.
    shop.describe(CLICKS.replace('format = "csv"', 'format = "csv"\nnull_values = []'))
    replayed = shop.run("replay-rejects")
    assert replayed.events_new == 8 and users(shop) >= set(NOTHINGS)
    assert shop.rows(REJECTS) == []


@pytest.mark.long
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_texts_for_nothing_in_json_and_parquet(spark: Any, tmp_path: Path, form: str) -> None:
    toml = CLICKS.replace("csv", form).replace('event_ts = "ts"', 'event_ts = "ts"\nevent_type="t"')
    shop = Workshop(spark, tmp_path, toml)
    names = ["ann", "bob", "cat", "null", None, "nan"]
    rows = [{"user": name, "item": "i", "ts": T + n, "t": "null"} for n, name in enumerate(names)]
    if form == "jsonl":
        shop.land("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), shop.landing / "a.parquet")
    assert shop.run("ingest").rejects == {"missing_user_id": 3}
    assert {(row["user_id"], row["event_type"]) for row in shop.rows(EVENTS)} == {
        ("ann", "null"), ("bob", "null"), ("cat", "null"),
    }  # fmt: skip


@pytest.mark.long
def test_a_lake_that_was_made_before_keeps_its_rule(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_before = CLICKS.replace('format = "csv"', 'format = "csv"\nnull_values = [""]')
    shop = Workshop(spark, tmp_path, as_before)
    shop.land("a.csv", HEAD + good("ann", "NULL"))
    shop.run("ingest")  # as 0.1.0 did: no rule is stored with the table
    shop.describe(CLICKS)
    shop.land("b.csv", HEAD + good("bob", "NULL", "nan") + ",i,1\n")
    result = shop.run("ingest")
    assert (result.events_new, result.duplicates) == (2, 1)
    assert result.rejects == {"missing_user_id": 1}
    assert users(shop) == {"ann", "NULL", "bob", "nan"}
    assert shop.run("replay-rejects").rejects == {"missing_user_id": 1}
    # One without data has no rule yet, whoever made its tables.
    empty = Workshop(spark, tmp_path / "empty", CLICKS)
    empty.lake.create(EVENTS)
    empty.land("a.csv", HEAD + good("ann", "NULL"))
    assert empty.run("ingest").rejects == {"missing_user_id": 1}


@pytest.mark.long
def test_ids_with_and_without_a_point_are_told(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path)
    shop.land("a.csv", HEAD + good("100", "7.0", "v1.0", "v1"))
    shop.land("b.csv", HEAD + good("100.0", "200.0", "200", "bob"))
    [note] = shop.run("ingest").notes
    assert "column 'user' (columns.user_id) has 2 ids with and without '.0'" in note
    assert "'100' and '100.0'" in note and "whole numbers" in note
    shop.land("c.csv", HEAD + good("300.0", "400.0"))
    assert shop.run("ingest").notes == []
    shop.land("d.csv", HEAD + f"ann,5,{T}\nbob,5.0,{T}\n")
    [note] = shop.run("ingest").notes
    assert "column 'item' (columns.item_id) has 1 ids" in note and "'5' and '5.0'" in note
