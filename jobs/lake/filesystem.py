"""Files on any file system, without a JVM: folders, `s3a://`, `gs://`, `abfss://`, `hdfs://`.

Credentials are the environment's, as for delta-rs (`AWS_…`, `GOOGLE_APPLICATION_CREDENTIALS`).
"""

from __future__ import annotations

import fnmatch
import functools
import operator
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

if TYPE_CHECKING:
    from deltalake import DeltaTable

HIDDEN = ("_", ".")
MAGIC = re.compile(r"[*?\[]")


def rust_uri(path: str) -> str:
    """Arrow and delta-rs say s3:// where Hadoop says s3a://."""
    return re.sub(r"^s3[an]://", "s3://", path)


def located(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path on it."""
    if "://" in path:
        found, inner = fs.FileSystem.from_uri(rust_uri(path))
        return found, inner
    return fs.LocalFileSystem(), re.sub(r"^file:", "", path)


def data_name(stored: str) -> str:
    """A data file's path below its table. A table's log has it encoded, as in a URL (Delta's protocol,
    "Add File and Remove File")."""
    return unquote(stored)


def data_path(root: str, stored: str) -> str:
    """A data file as a path or URI.

    Args:
        root: the table's folder or URI.
        stored: what the table's log has. The files of a clone are named whole.
    """
    if "://" in stored:
        return stored  # (`located` decodes it)
    name = data_name(stored)
    return name if name.startswith("/") else f"{root}/{name}"


NOT_FOR_ARROW = {"deletionVectors", "columnMapping", "v2Checkpoint"}
"""Features of tables that delta-rs reads, and does not hand to Arrow."""


def rows_of(table: DeltaTable) -> ds.Dataset:
    """The rows of a table's version, for Arrow to read by its own file systems.

    (Those that delta-rs hands it are Python that Arrow's threads call. One of them that is late,
    when Python is ending, ends the process by SIGABRT: 5 of 60 commands on a busy machine.)

    What delta-rs makes of the log's statistics is left out: in 1.6 it takes a column without bounds
    to be beyond every value, so a filter by one loses rows. Arrow prunes by the files' footers.
    """
    system, inner = located(table.table_uri)
    below = fs.SubTreeFileSystem(inner, system)
    if NOT_FOR_ARROW & set(table.protocol().reader_features or []):
        return _plain_rows(table, below)
    # (Spark's default for times is INT96, which Arrow takes for nanoseconds.)
    micros = ds.ParquetReadOptions(coerce_int96_timestamp_unit="us")
    made = table.to_pyarrow_dataset(filesystem=below, parquet_read_options=micros)
    by = table.metadata().partition_columns  # of ours there are none

    def partition(known: ds.Expression) -> ds.Expression | None:
        values = ds.get_partition_keys(known)
        each = [
            ds.field(n).is_null() if values.get(n) is None else ds.field(n) == values[n] for n in by
        ]
        return functools.reduce(operator.and_, each) if each else None

    parts = [
        one.format.make_fragment(one.path, one.filesystem, partition(one.partition_expression))
        for one in made.get_fragments()
    ]
    return ds.FileSystemDataset(parts, made.schema, made.format, made.filesystem)


def _plain_rows(table: DeltaTable, below: fs.FileSystem) -> ds.Dataset:
    """The rows of a table that delta-rs does not hand to Arrow, though its files are as others.

    Raises:
        ValueError: rows are deleted by deletion vectors only.
    """
    adds = pa.table(table.get_add_actions(flatten=True))
    if pa.table(table.deletion_vectors()).num_rows:
        raise ValueError(f"{table.table_uri} has deletion vectors")
    how = ds.ParquetFileFormat(coerce_int96_timestamp_unit="us")
    parts = [how.make_fragment(data_name(one), below) for one in adds["path"].to_pylist()]
    schema = pa.schema(table.schema().to_arrow())
    return ds.FileSystemDataset(parts, schema, how, below)


def matching(
    data: ds.Dataset, where: ds.Expression, by: list[str], columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """The rows for which a condition on texts holds, row group by row group.

    A filter of the dataset itself fails on files that hold views of texts (`DataParquet`): Arrow
    cannot compare views. So the columns of the condition are read first, in the usual layout.

    Args:
        by: the columns of the condition.
        columns: those that are wanted; None: all.
    """
    wanted = data.schema.names if columns is None else columns
    for fragment in data.get_fragments():
        try:  # those that have none by their statistics are left out
            groups = fragment.split_by_row_group(where, schema=data.schema)
        except pa.ArrowNotImplementedError:
            groups = fragment.split_by_row_group()
        for group in groups:
            keys = group.to_table(data.schema, columns=by)
            held = keys.filter(where).num_rows
            if held:
                rows = group.to_table(data.schema, columns=list(dict.fromkeys([*wanted, *by])))
                rows = rows if held == keys.num_rows else rows.filter(where)
                yield rows.select(wanted).combine_chunks()


def open_binary(path: str) -> BinaryIO:
    system, inner = located(path)
    if isinstance(system, fs.LocalFileSystem):
        return open(inner, "rb")
    stream: BinaryIO = system.open_input_stream(inner)
    return stream


def open_seekable(path: str) -> pa.NativeFile:
    """For readers of footers and of single batches."""
    system, inner = located(path)
    return system.open_input_file(inner)


def open_new(path: str) -> pa.NativeFile:
    """A file to write, its folder made where there is none."""
    system, inner = located(path)
    system.create_dir(inner.rpartition("/")[0], recursive=True)
    return system.open_output_stream(inner)


def exists(path: str) -> bool:
    system, inner = located(path)
    return bool(system.get_file_info(inner).type != fs.FileType.NotFound)


def facts(path: str) -> tuple[int, int]:
    """Bytes and modified ms of a file that is there, as `glob` tells them."""
    system, inner = located(path)
    info = system.get_file_info(inner)
    return int(info.size), (info.mtime_ns or 0) // 1_000_000


def read_text(path: str) -> str:
    with open_binary(path) as stream:
        return stream.read().decode("utf-8")


def write_text(path: str, text: str) -> None:
    """Write a small file whole: under another name first, then renamed."""
    system, inner = located(path)
    system.create_dir(inner.rpartition("/")[0], recursive=True)
    with system.open_output_stream(inner + ".partial") as stream:
        stream.write(text.encode("utf-8"))
    system.move(inner + ".partial", inner)


def move(path: str, to: str) -> None:
    """Give a file another name on its file system."""
    system, inner = located(path)
    system.move(inner, located(to)[1])


def write_parquet(path: str, rows: pa.Table, group: int | None = None) -> None:
    """Write rows as one file of row groups of `group` rows, its folder made where there is none.

    Dictionaries are texts in the file: without Arrow's own note of its schema nobody reads them as
    anything else.
    """
    system, inner = located(path)
    system.create_dir(inner.rpartition("/")[0], recursive=True)
    names = [one for field in rows.schema for one in leaves(field.name, field.type)]
    coded = [one for one in names if one.rpartition(".")[2] not in NEARLY_UNIQUE]
    plain = not any(map(pa.types.is_dictionary, rows.schema.types))
    pq.write_table(
        rows, inner, filesystem=system, row_group_size=group, use_dictionary=coded or False,
        compression={one: "NONE" if _is_hash(rows, one) else "SNAPPY" for one in names},
        store_schema=plain,
    )  # fmt: skip


HASHED = {"event_id", "session_id"}
NEARLY_UNIQUE = HASHED | {"event_ts", "start_ts", "end_ts"}
"""Columns that are not worth a dictionary. Parquet gives it up at a megabyte, having built it: times
cost two to four times as much to write so, and are larger (LAB_LOG.md)."""
HASH = re.compile("[0-9a-f]{32}")


def leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    """Parquet's names of the columns of a field."""
    if pa.types.is_struct(kind):
        for part in kind:
            yield from leaves(f"{path}.{part.name}", part.type)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from leaves(f"{path}.list.element", kind.value_type)
    elif pa.types.is_map(kind):
        yield from leaves(f"{path}.key_value.key", kind.key_type)
        yield from leaves(f"{path}.key_value.value", kind.item_type)
    else:
        yield path


def _is_hash(rows: pa.Table, leaf: str) -> bool:
    """Whether a column has our hashes, by its first value. Snappy takes an eighth off them, and as long
    as all the rest of an event (LAB_LOG.md)."""
    name, *inner = leaf.split(".")
    if leaf.rpartition(".")[2] not in HASHED or not rows.num_rows:
        return False
    first = rows[name].slice(0, 1)
    for part in inner:
        if part == "list":
            first = pc.list_flatten(first)
        elif part != "element":
            first = pc.struct_field(first, part)
    values = first.drop_null()
    return len(values) > 0 and HASH.fullmatch(str(values[0])) is not None


class DataParquet(pq.ParquetFile):
    """A Parquet file of a table, whoever wrote it; rows have texts and lists of the usual layout.

    What Arrow's other layouts (views, dictionaries, 64-bit offsets) wrote is read back in them, because the writer
    leaves a note in the file: delta-rs's MERGE writes views. Few functions take both. Columns may
    have nulls, as in our own files: that MERGE notes for some that they have none, and tables of
    both kinds would not go together. Spark's default for times, INT96, is read as microseconds.
    """

    def __init__(self, source: Any, **options: Any) -> None:
        super().__init__(source, coerce_int96_timestamp_unit="us", **options)
        self._dictionaries = tuple(options.get("read_dictionary") or ())

    def read(self, *arguments: Any, **options: Any) -> pa.Table:
        return usual(super().read(*arguments, **options), self._dictionaries)

    def read_row_group(self, *arguments: Any, **options: Any) -> pa.Table:
        return usual(super().read_row_group(*arguments, **options), self._dictionaries)

    def read_row_groups(self, *arguments: Any, **options: Any) -> pa.Table:
        return usual(super().read_row_groups(*arguments, **options), self._dictionaries)


@contextmanager
def data_file(path: str, **options: Any) -> Iterator[DataParquet]:
    """A table's file; what Arrow says of a damaged one names it."""
    with open_seekable(path) as stream:
        try:
            yield DataParquet(stream, **options)
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(f"{path}: {error}") from error


def usual(rows: pa.Table, dictionaries: Collection[str] = ()) -> pa.Table:
    """The same rows, texts and lists in the usual layout, all columns nullable.

    Args:
        dictionaries: columns of which the reader wants dictionaries.
    """
    asked = [one.name in dictionaries and pa.types.is_dictionary(one.type) for one in rows.schema]
    wanted = pa.schema(
        [
            one.with_nullable(True) if dictionary else _usual_field(one)
            for one, dictionary in zip(rows.schema, asked, strict=True)
        ]
    )
    return rows if wanted.equals(rows.schema) else rows.cast(wanted)


def _usual_field(field: pa.Field) -> pa.Field:
    return field.with_type(_usual(field.type)).with_nullable(True)


def _usual(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_dictionary(kind):
        return _usual(kind.value_type)
    if types.is_string_view(kind) or types.is_large_string(kind):
        return pa.string()
    if types.is_binary_view(kind) or types.is_large_binary(kind):
        return pa.binary()
    if types.is_struct(kind):
        return pa.struct([_usual_field(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(_usual(kind.key_type), _usual(kind.item_type))
    if (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    ):
        return pa.list_(_usual_field(kind.value_field))
    return kind


def read_parquet(path: str, columns: list[str] | None = None) -> pa.Table:
    """A file, or some of its columns, for a task that has one thread."""
    with data_file(path) as file:
        return file.read(columns, use_threads=False).combine_chunks()


def remove(folder: str) -> None:
    """Remove a folder with all that is in it, if it is there."""
    system, inner = located(folder)
    if system.get_file_info(inner).type == fs.FileType.Directory:
        system.delete_dir(inner)


def remove_file(path: str) -> None:
    """Remove a file that is there."""
    system, inner = located(path)
    system.delete_file(inner)


def listed(folder: str, hidden: list[str] | None = None) -> list[fs.FileInfo]:
    """Files below a folder, hidden ones and hidden folders left out.

    Args:
        hidden: gets what is left out.
    """
    system, inner = located(folder)
    found = []
    for info in system.get_file_info(fs.FileSelector(inner, allow_not_found=True)):
        if info.base_name.startswith(HIDDEN):
            if hidden is not None:
                hidden.append(_like(folder, info.path))
            continue
        folder_too = info.type == fs.FileType.Directory
        found += listed(_like(folder, info.path), hidden) if folder_too else [info]
    return found


def glob(pattern: str, hidden: list[str] | None = None) -> list[tuple[str, int, int]]:
    """Files under a folder, a file, a glob or a URI: (path, bytes, modified ms), sorted.

    `*`, `?` and `[…]` match inside one name, `{a,b}` either; what matches and is a folder means
    all files below it. Names that begin with `_` or `.` are left out.

    Args:
        hidden: gets what is left out.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for one in _alternatives(pattern):
        head = re.match(r"^[a-z0-9]+://[^/]*|", one)
        root = head.group(0) if head else ""
        for place in _matches(root, one[len(root) :].split("/"), hidden):
            system, inner = located(place)
            info = system.get_file_info(inner)
            if info.type == fs.FileType.NotFound:
                continue
            for file in [info] if info.type == fs.FileType.File else listed(place, hidden):
                path = _like(place, file.path)
                modified = (file.mtime_ns or 0) // 1_000_000
                found[path] = (path, int(file.size or 0), int(modified))
    return sorted(found.values())


def _matches(place: str, names: list[str], hidden: list[str] | None = None) -> list[str]:
    """Places that a pattern's remaining names lead to, from a place without magic."""
    for at, name in enumerate(names):
        if MAGIC.search(name):
            there = [
                info.base_name
                for info in _children(place or "/")
                if fnmatch.fnmatchcase(info.base_name, name)
            ]
            if hidden is not None:
                hidden += [f"{place}/{one}" for one in there if one.startswith(HIDDEN)]
            there = sorted(one for one in there if not one.startswith(HIDDEN))
            rest = names[at + 1 :]
            return [hit for one in there for hit in _matches(f"{place}/{one}", rest, hidden)]
        if name or not place:
            place = f"{place}/{name}" if place or at else name
    return [place]


def _children(folder: str) -> list[fs.FileInfo]:
    system, inner = located(folder)
    found: list[fs.FileInfo] = system.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    return found


def _alternatives(pattern: str) -> list[str]:
    """`a{b,c}` as `ab` and `ac`."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [
        one for text in found.group(1).split(",") for one in _alternatives(before + text + after)
    ]


def _like(place: str, inner: str) -> str:
    """A path on a file system as the URI of its kind, where `place` is one."""
    scheme = re.match(r"^([a-z0-9]+)://", place)
    if not scheme:
        return inner
    if scheme.group(1) in ("hdfs", "abfs", "abfss", "viewfs"):  # the authority is not in the path
        root = re.match(r"^[a-z0-9]+://[^/]*", place)
        assert root
        return f"{root.group(0)}/{inner.lstrip('/')}"
    return f"{scheme.group(1)}://{inner.lstrip('/')}"
