"""How tables are read without a JVM."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyarrow import fs

from jobs.core.tables import ITEMS
from jobs.lake import filesystem
from jobs.lake.delta import Lake
from jobs.lake.filesystem import DataParquet, data_file, matching, read_parquet, rows_of
from jobs.sources import delta
from tests.support.airflow_tools import REPO


@pytest.mark.parametrize("folder", ["plain", "a blank", "über"])
def test_rows_come_by_arrows_own_file_system(tmp_path: Path, folder: str) -> None:
    path, days = tmp_path / folder / "table", ["2024-03-01", "2024-03-02"]
    for number, day in enumerate(days):
        rows = pa.table({"user": [f"u{number}"], "day": [day]})
        write_deltalake(str(path), rows, mode="append", partition_by=["day"])
    first = rows_of(DeltaTable(str(path), version=0))
    assert first.to_table().to_pylist() == [{"user": "u0", "day": days[0]}]
    both = rows_of(DeltaTable(str(path)))
    assert sorted(both.to_table()["day"].to_pylist()) == days
    assert not isinstance(both.filesystem, fs.PyFileSystem)
    assert isinstance(both.filesystem.base_fs, fs.LocalFileSystem)


def test_files_are_found_by_the_names_that_the_log_has(tmp_path: Path) -> None:
    # (A log has names as in URLs: the folder `kind=add to cart` is `kind=add%20to%20cart` there.)
    kinds = ["add to cart", "50 %", "über/unter", "a:b", "plain"]
    lake = Lake(lambda: pytest.fail("no JVM is needed"), str(tmp_path / "a läke"), "clicks")
    path = lake.path(ITEMS)
    write_deltalake(path, pa.table({"kind": kinds, "n": range(5)}), partition_by=["kind"])
    found = lake.files_of(ITEMS, 0)
    assert len(found) == 5 and all(filesystem.exists(one.path) for one in found)
    assert sorted(read_parquet(one.path)["n"][0].as_py() for one in found) == [0, 1, 2, 3, 4]
    assert lake.file_uris(ITEMS, 0) == [one.path for one in found]
    names = {filesystem.data_name(one.told["path"]) for one in found}
    assert {one.path for one in rows_of(DeltaTable(path)).get_fragments()} == names
    assert rows_of(DeltaTable(path)).to_table().num_rows == 5
    assert delta.files_of(path) == sorted(delta.files_of(path)) and len(delta.files_of(path)) == 5
    assert all(filesystem.exists(one) for one, *_ in delta.files_of(path))


def test_nobody_reads_tables_by_pythons() -> None:
    """(What Arrow's threads call in Python ends the process by SIGABRT when they are late.)"""
    found = [
        f"{file.relative_to(REPO)}: {line.strip()}"
        for part in ("dags", "expectations", "infra", "jobs", "models")
        for file in (REPO / part).rglob("*.py")
        for line in file.read_text().splitlines()
        if ".to_pyarrow_dataset(" in line or ".to_pyarrow_table(" in line
    ]
    assert found == [
        "jobs/lake/filesystem.py: made = table.to_pyarrow_dataset("
        "filesystem=below, parquet_read_options=micros)"
    ]


def test_views_are_read_in_the_usual_layout(tmp_path: Path) -> None:
    views = pa.table({"id": pa.array(["a"], pa.string_view()), "ids": [["b"]]})
    views = views.cast(pa.schema({"id": pa.string_view(), "ids": pa.list_(pa.string_view())}))
    pq.write_table(views, tmp_path / "views.parquet")
    assert pq.read_table(tmp_path / "views.parquet").schema.equals(views.schema)
    file = DataParquet(str(tmp_path / "views.parquet"))
    usual = pa.schema({"id": pa.string(), "ids": pa.list_(pa.string())})
    for rows in (file.read(), file.read_row_group(0), file.read_row_groups([0])):
        assert rows.schema.types == usual.types and rows.to_pylist() == views.to_pylist()


def test_dictionaries_are_read_in_the_usual_layout(tmp_path: Path) -> None:
    """(A writer of Arrow's that keeps its dictionaries.)"""
    path = str(tmp_path / "table")
    write_deltalake(path, pa.table({"id": ["a", "b"], "n": [1, 2]}))
    [file] = DeltaTable(path).file_uris()
    ids = pa.array(["a", "b"]).dictionary_encode()
    pq.write_table(pa.table({"id": ids, "n": [1, 2]}), file.removeprefix("file://"))
    whole = read_parquet(file.removeprefix("file://"))
    assert whole.schema.types == [pa.string(), pa.int64()]
    assert whole.to_pylist() == [{"id": "a", "n": 1}, {"id": "b", "n": 2}]
    with data_file(file.removeprefix("file://"), read_dictionary=["id"]) as asked:
        assert pa.types.is_dictionary(asked.read().schema.field("id").type)
    rows = rows_of(DeltaTable(path))
    assert rows.to_table().cast(whole.schema).equals(whole)
    [found] = matching(rows, ds.field("id") == "b", ["id"])
    assert found.to_pylist() == [{"id": "b", "n": 2}]


def test_a_condition_on_texts_holds_in_files_of_any_writer(tmp_path: Path) -> None:
    """delta-rs's MERGE writes views of texts, which Arrow does not compare."""
    path = str(tmp_path / "table")
    for names in (["a", "b"], ["c", "d"]):
        write_deltalake(path, pa.table({"id": names, "n": [1, 2]}), mode="append")
    merge = DeltaTable(path).merge(pa.table({"id": ["c"], "n": [7]}), "t.id = s.id", "s", "t")
    merge.when_matched_update_all().execute()
    rows = rows_of(DeltaTable(path))
    with pytest.raises(pa.ArrowNotImplementedError):  # `matching` may go when this is no more
        rows.to_table(filter=ds.field("id") == "c")
    for wanted, found in ((["c"], [7]), (["a", "d"], [1, 2]), (["e"], [])):
        parts = list(matching(rows, ds.field("id").isin(wanted), ["id"], ["n"]))
        assert sorted(n for part in parts for n in part["n"].to_pylist()) == found
        assert all(part.schema == pa.schema({"n": pa.int64()}) for part in parts)
    [whole] = matching(rows, ds.field("id") == "c", ["id"])
    assert whole.to_pylist() == [{"id": "c", "n": 7}]
    assert whole.schema.types == [pa.string(), pa.int64()]


def test_files_go_together_whatever_they_say_of_nulls(tmp_path: Path) -> None:
    """delta-rs's MERGE notes `not null` where the table does; our own files do not."""
    kinds = [("id", pa.string()), ("lists", pa.list_(pa.struct([("n", pa.int32())])))]
    rows = pa.table({"id": ["a"], "lists": [[{"n": 1}]]}, pa.schema(kinds))
    strict = pa.list_(pa.field("element", pa.struct([pa.field("n", pa.int32(), False)]), False))
    fields = [pa.field("id", pa.string(), False), pa.field("lists", strict, False)]
    pq.write_table(rows, tmp_path / "ours.parquet")
    pq.write_table(rows.cast(pa.schema(fields)), tmp_path / "theirs.parquet")
    both = [read_parquet(str(tmp_path / f"{name}.parquet")) for name in ("ours", "theirs")]
    assert pa.concat_tables(both).to_pylist() == 2 * rows.to_pylist()


HASHES = ["0123456789abcdef" * 2, "fedcba9876543210" * 2]


@pytest.mark.parametrize("ids, codec", [(HASHES, "UNCOMPRESSED"), (["7", "8"], "SNAPPY")])
def test_only_our_own_hashes_are_not_compressed(tmp_path: Path, ids: list[str], codec: str) -> None:
    events = [[{"event_id": one, "item_id": "i"}] for one in ids]
    rows = pa.table({"user_id": ["u", "v"], "event_id": ids, "events": events})
    rows = pa.concat_tables([rows, rows])
    path = str(tmp_path / "rows.parquet")
    filesystem.write_parquet(path, rows, 1)
    meta = pq.ParquetFile(path).metadata.row_group(0)
    known = {meta.column(at).path_in_schema: meta.column(at) for at in range(meta.num_columns)}
    compressed = {name: one.compression for name, one in known.items()}
    assert compressed == {
        "user_id": "SNAPPY", "event_id": codec,
        "events.list.element.event_id": codec, "events.list.element.item_id": "SNAPPY",
    }  # fmt: skip
    assert filesystem.read_parquet(path).equals(rows.combine_chunks())


def test_dictionaries_are_texts_in_files(tmp_path: Path) -> None:
    """Whoever reads the file, with Arrow's note of a schema or without."""
    texts = pa.array(["a", None, "b", "a"])
    path = str(tmp_path / "rows.parquet")
    filesystem.write_parquet(path, pa.table({"file": texts.dictionary_encode()}))
    assert pq.read_schema(path).field("file").type == pa.string()
    assert filesystem.read_parquet(path)["file"].combine_chunks().equals(texts)
