"""Files that are small enough for one process: catalogues, links of identities."""

from __future__ import annotations

from typing import Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from jobs.core.errors import SchemaError
from jobs.core.source_log import NULL_VALUES
from jobs.lake import filesystem


class Described(Protocol):
    """A part of a source file that says how files are read."""

    @property
    def format(self) -> str: ...
    @property
    def delimiter(self) -> str: ...


def columns_of(key: str, part: Described, path: str, wanted: list[str]) -> pa.Table:
    """The columns of a file in CSV, JSON lines or Parquet: those of CSV as texts, others as they are.

    Args:
        key: the part's name in the source file, such as `items`; for messages.

    Raises:
        SchemaError: a column is not there, or the file cannot be read.
    """
    system, inner = filesystem.located(path)
    opened = (
        filesystem.open_seekable(path)
        if part.format == "parquet"
        else system.open_input_stream(inner)
    )
    try:
        with opened as stream:
            if part.format == "csv":
                texts = pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(wanted, pa.string()),
                    strings_can_be_null=True,
                    null_values=list(NULL_VALUES),
                )
                how = pyarrow.csv.ParseOptions(delimiter=part.delimiter, newlines_in_values=True)
                rows = pyarrow.csv.read_csv(stream, parse_options=how, convert_options=texts)
            elif part.format == "jsonl":
                rows = pyarrow.json.read_json(stream)
            else:
                rows = pq.read_table(stream)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise SchemaError(
            f"{path}: cannot be read as {key}.format = {part.format}: {error}. Correct {key}.format or "
            f"{key}.delimiter, or deliver the file again in UTF-8"
        ) from None
    for name in wanted:
        if name not in rows.column_names:
            raise SchemaError(
                f"{path}: column {name!r} of [{key}] is not there: the file has "
                f"{', '.join(rows.column_names)}. Correct the name or {key}.delimiter, or deliver the "
                "file again"
            )
    return rows.select(wanted)
