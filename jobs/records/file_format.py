"""How the files of a source are written, from its source file."""

from __future__ import annotations

from jobs.core.source_file import Source
from jobs.records.boundary import with_boundary
from jobs.records.expressions import Names, computing_of, names_of
from jobs.records.records import Format

AS_FILES = {"delta": "parquet", "iceberg": "parquet", "jdbc": "parquet"}
"""How the files of tables of others are written."""


def file_format(source: Source) -> Format:
    """How the files are written; what a source's tables say of it is in `reading_format`."""
    computing = with_boundary(computing_of(source), source)
    wanted, names = source.named(), Names({})
    if computing is not None:
        wanted = wanted | computing.inputs()
        if computing.explode is not None:
            names = names_of(computing.explode, wanted)
    return Format(
        format=AS_FILES.get(source.source.format, source.source.format), mapped=names.line or wanted, computing=computing,
        wanted={} if computing is None else wanted, names=names,
        delimiter=source.source.delimiter, header=source.source.header,
        quote=source.source.quote, escape=source.source.escape, comment=source.source.comment,
        null_values=source.source.nulls(), encoding=source.source.encoding,
        list_separator=source.source.list_separator, unit=source.time.numeric_unit,
    )  # fmt: skip
