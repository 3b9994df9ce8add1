"""`[identity] link = { landing = … }`: files that say which anonymous id is which user, and since when."""

from __future__ import annotations

import os
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from expectations.events import FIRST_US, LAST_US
from jobs.core.errors import SchemaError, SourceError
from jobs.core.source_events import NUMERIC_UNITS, LinkTable
from jobs.core.source_log import NULL_IDS, NULL_VALUES
from jobs.lake.context import Context
from jobs.lake.landed import landed
from jobs.privacy.pseudonyms import privacy_of
from jobs.reading.small_files import columns_of
from jobs.silver import links


def spans_of_table(context: Context, part: LinkTable) -> tuple[pa.Table, list[str]]:
    """The rows of all files as logins (`links.SPANS`), and what to say of them.

    Raises:
        SourceError: there is no file.
        SchemaError: a file is not as the source file describes it.
    """
    paths = [path for path, *_ in landed(part.landing)]
    if not paths:
        raise SourceError(
            f"identity.link.landing = {part.landing!r} matches no file (from {os.getcwd()}): correct "
            "it, or put the table there"
        )
    rows = pa.concat_tables([texts_of(part, path) for path in paths])
    nulls = pa.array([*NULL_VALUES, *NULL_IDS], pa.string())
    names, users = (
        pc.if_else(pc.is_in(rows[name], nulls), None, rows[name])
        for name in (part.anonymous_id, part.user_id)
    )
    times = times_of(part, rows[part.since])
    privacy = privacy_of(context)
    if privacy is not None:
        names, users = privacy.of_links(names, users)
    spans = links.spans_of(names, users, times, alone=True)
    usable = pc.and_(
        pc.and_(pc.is_valid(rows[part.anonymous_id]), pc.is_valid(rows[part.user_id])),
        pc.is_valid(times),
    )
    lacking = rows.num_rows - int(pc.sum(usable).as_py() or 0)
    notes = []
    if lacking:
        notes.append(
            f"{lacking:,} of {rows.num_rows:,} rows of {part.landing} lack {part.anonymous_id}, "
            f"{part.user_id} or a time in {part.since}, and were skipped"
        )
    return spans, notes


def texts_of(part: LinkTable, path: str) -> pa.Table:
    """The three columns of a file, as texts.

    Raises:
        SchemaError: a column is not there, or the file cannot be read.
    """
    wanted = [part.anonymous_id, part.user_id, part.since]
    rows = columns_of("identity.link", part, path, wanted)
    for name in wanted:
        if name != part.since and pa.types.is_floating(rows.schema.field(name).type):
            raise SchemaError(
                f"{path}: column {name!r} has floating-point numbers, which do not say how an id is "
                "written: deliver whole numbers or texts"
            )
    return pa.table({name: _text(rows[name]) for name in wanted})


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(column.type):
        form = "%Y-%m-%dT%H:%M:%S" + ("Z" if column.type.tz else "")
        utc = pa.timestamp("us", "UTC" if column.type.tz else None)
        return pc.strftime(column.cast(utc, safe=False), format=form).cast(pa.string())
    return column.cast(pa.string())


def times_of(part: LinkTable, texts: pa.ChunkedArray) -> pa.Array:
    """Times in microseconds; null where a text is none."""
    rows: Any = pa.table({"text": texts})
    with duckdb.connect(config={"threads": 1}) as db:
        db.execute(f"SET TimeZone = '{part.zone}'")
        db.register("given", rows)
        if part.unit == "iso8601":
            made = "epoch_us(try_cast(trim(text) AS TIMESTAMPTZ))"
        else:
            each = NUMERIC_UNITS[part.unit]
            made = f"CAST(floor(try_cast(trim(text) AS DECIMAL(28, 9)) * {each}) AS BIGINT)"
        query = f"SELECT {made} AS us FROM given"
        found = db.sql(
            f"SELECT CASE WHEN us BETWEEN {FIRST_US} AND {LAST_US} THEN us END AS us FROM ({query})"
        ).to_arrow_table()
    return found["us"].combine_chunks().cast(pa.int64())
