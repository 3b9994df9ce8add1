"""A log that is an Iceberg table of others: the data files of its newest snapshot.

As in `delta.py`, the ledger knows which of them were read, and what others do to the table becomes the
same: rows that were added are new lines, files that were rewritten are read again, and rows that were
deleted stay here.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.core.errors import SourceError
from jobs.core.landing_globs import DAY_FIELD
from jobs.lake import filesystem
from jobs.lake.landed import absolute

if TYPE_CHECKING:
    from pyiceberg.table import Table

CATALOG = re.compile(r"iceberg://([^/]+)/(.+)")
"""A landing that names a catalog of pyiceberg's configuration, and a table in it."""
VERSION = re.compile(r"v?(\d+)(?:-[^/]*)?(?:\.gz)?\.metadata\.json")
FIELD_ID = b"PARQUET:field_id"


def files_of(landing: str) -> list[tuple[str, int, int]]:
    """The data files of the table: (path, bytes, 0), sorted. (They never change.)

    Raises:
        SourceError: `landing` is not an Iceberg table, or one whose files are not its rows.
    """
    table = _opened(landing)
    found = {}
    for task in table.scan().plan_files():
        path = re.sub(r"^file:(?://)?", "", task.file.file_path)
        if task.delete_files:
            raise SourceError(
                f"source.landing = {landing!r} has deleted rows that are still in its data files, such "
                f"as {path}: have them removed (Spark: CALL system.rewrite_data_files(table => '…', "
                "options => map('delete-file-threshold', '1')))"
            )
        if task.file.file_format.name != "PARQUET":
            raise SourceError(
                f"source.landing = {landing!r} has data files that are not Parquet, such as {path}: "
                "have the table rewritten (write.format.default = parquet)"
            )
        found[path] = int(task.file.file_size_in_bytes)
    _refuse_other_names(landing, table, list(found))
    return sorted((path, size, 0) for path, size in found.items())


def schema_of(landing: str) -> pa.Schema:
    """The table's columns, as Arrow has their types."""
    return _opened(landing).schema().as_arrow()


def _opened(landing: str) -> Table:
    if filesystem.MAGIC.search(landing) or DAY_FIELD.search(landing):
        raise SourceError(
            f"source.landing = {landing!r}: with format = 'iceberg' it is the folder of a table, without "
            "a pattern"
        )
    try:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.exceptions import NoSuchIcebergTableError, NoSuchTableError
        from pyiceberg.table import StaticTable
    except ModuleNotFoundError as error:
        raise SourceError(
            f"source.format = 'iceberg' needs pyiceberg ({error}): pip install 'sessionmill[iceberg]'"
        ) from None
    try:
        if found := CATALOG.fullmatch(landing):
            return load_catalog(found[1]).load_table(found[2])
        return StaticTable.from_metadata(_newest_metadata(landing))
    except (NoSuchTableError, NoSuchIcebergTableError, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise SourceError(f"source.landing = {landing!r} cannot be opened: {first}") from None


def _newest_metadata(landing: str) -> str:
    """The newest metadata file of a table's folder, or the file that `landing` is.

    Raises:
        SourceError: there is none, or it is not known which is the newest.
    """
    place = absolute(landing).rstrip("/")
    if place.endswith(".metadata.json"):
        return place
    folder = f"{place}/metadata"
    if filesystem.exists(f"{folder}/version-hint.text"):
        hint = filesystem.read_text(f"{folder}/version-hint.text").strip()
        return f"{folder}/v{hint}.metadata.json" if hint.isdigit() else f"{folder}/{hint}"
    versions: dict[int, list[str]] = {}
    for path, *_ in filesystem.glob(f"{folder}/*.metadata.json"):
        if found := VERSION.fullmatch(path.rpartition("/")[2]):
            versions.setdefault(int(found[1]), []).append(path)
    if not versions:
        raise SourceError(
            f"source.landing = {landing!r} is not an Iceberg table (from {os.getcwd()}): name the folder "
            "that has the folder metadata, a .metadata.json, or iceberg://CATALOG/NAMESPACE.TABLE"
        )
    newest = versions[max(versions)]
    if len(newest) > 1:
        raise SourceError(
            f"source.landing = {landing!r} has {len(newest)} metadata files of one version, and only its "
            "catalog knows which is the table: set source.landing = 'iceberg://CATALOG/NAMESPACE.TABLE'"
        )
    return newest[0]


def _refuse_other_names(landing: str, table: Table, paths: list[str]) -> None:
    """Iceberg knows columns by numbers: after a change of names older files have the older ones.

    Raises:
        SourceError: some file has a column by another name than the table.
    """
    now = _names(table.schema())
    before = [_names(one) for one in table.schemas().values()]
    by_name = {name: number for number, name in now.items()}
    if all(
        now.get(number, name) == name and by_name.get(name, number) == number
        for one in before
        for number, name in one.items()
    ):
        return
    for path in paths:
        with filesystem.open_seekable(path) as stream:
            schema = pq.read_schema(stream)
        for field in schema:
            number = int((field.metadata or {}).get(FIELD_ID, -1))
            renamed = now.get(number, field.name) != field.name
            reused = by_name.get(field.name, number) != number
            if number >= 0 and (renamed or reused):
                raise SourceError(
                    f"source.landing = {landing!r}: a column of {path} is {field.name!r} there, and "
                    f"{now.get(number, 'another column')!r} in the table: have the files rewritten "
                    "(Spark: CALL system.rewrite_data_files(table => '…', options => map('rewrite-all', "
                    "'true')))"
                )


def _names(schema: Any) -> dict[int, str]:
    """The columns by their numbers; those inside others keep their names or go with them."""
    return {field.field_id: field.name for field in schema.fields}
