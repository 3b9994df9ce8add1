"""`[items]`: the catalogue -> `gold.item_attributes`, with the history of what was known when.

A catalogue says how items are, not how they were. A row says from when on an item's attributes were
known to be these, so that a model can be shown only what was known before its cut:
 * a dated catalogue (`{day}` in its landing) is known from the end of its day on;
 * an undated one from the end of the run's day, without a day from now on; but what it says of an
   item that had no row holds for always (`ALWAYS`), because it does not say since when [ours].
An item whose attributes are as before gets no row; one that leaves the catalogue keeps what is
known of it. A day that is read later than the days after it makes these be read again, so the
order in which days are read changes nothing that a reader sees.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from jobs.core import crash_points
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import SchemaError, SourceError
from jobs.core.landing_globs import DAY_FIELD
from jobs.core.source_log import ItemsPart
from jobs.core.tables import ITEM_ATTRIBUTES
from jobs.lake import filesystem, foreign, foreign_columns
from jobs.lake.context import Context, Result
from jobs.lake.data_files import staging
from jobs.lake.landed import absolute, landed
from jobs.lake.manifest import Staged
from jobs.reading.small_files import columns_of

ALWAYS = datetime(1, 1, 1, tzinfo=UTC)
DAYS = {"%Y": r"\d{4}", "%m": r"\d\d", "%d": r"\d\d", "%y": r"\d\d", "%j": r"\d{3}"}

History = dict[str, list[tuple[datetime, dict[str, str]]]]
"""Item -> (known from, attributes), oldest first."""


def snapshots(part: ItemsPart, day: date | None) -> list[tuple[datetime | None, list[str]]]:
    """(known from, files) of the catalogues to read, oldest first; None: undated, read without a
    day.

    Raises:
        SourceError: an undated catalogue that is not there.
    """
    landing = absolute(part.landing)
    if not DAY_FIELD.search(landing):
        found = [path for path, *_ in landed(landing)]
        if not found:
            raise SourceError(
                f"items.landing = {part.landing!r} matches no file (from {os.getcwd()}): correct "
                "it, or put the catalogue there"
            )
        return [(None if day is None else _end(day), found)]
    dated: dict[date, list[str]] = {}
    for path, *_ in landed(landing):
        of = _date_in(landing, path)
        if of is not None and (day is None or of >= day):
            dated.setdefault(of, []).append(path)
    return [(_end(of), sorted(dated[of])) for of in sorted(dated)]


def _end(day: date) -> datetime:
    return datetime.combine(day + timedelta(days=1), time(), UTC)


def _date_in(landing: str, path: str) -> date | None:
    """The day that a path was matched by."""
    [first, *_] = DAY_FIELD.finditer(landing)
    form = first.group(1) or "%Y-%m-%d"
    digits = re.sub(r"%[YmdyjHMS]", lambda one: DAYS.get(one[0], r"\d\d"), re.escape(form))
    head, tail = landing[: first.start()], landing[first.end() :]
    around = [re.escape(text).replace(r"\*", ".*").replace(r"\?", ".") for text in (head, tail)]
    around[1] = DAY_FIELD.sub(lambda _: ".*", tail) if DAY_FIELD.search(tail) else around[1]
    found = re.fullmatch(f"{around[0]}({digits}){around[1]}", path)
    try:
        return datetime.strptime(found[1], form).date() if found else None
    except ValueError:
        return None


def read(part: ItemsPart, path: str) -> pa.Table:
    """The id and the named columns of a catalogue file, as texts.

    Raises:
        SchemaError: a column is not there, a number is none, or ids are floating-point numbers.
    """
    wanted = [part.id, *part.names]
    rows = columns_of("items", part, path, wanted)
    if pa.types.is_floating(rows.schema.field(part.id).type):
        raise SchemaError(
            f"{path}: items.id = {part.id!r} holds floating-point numbers, which do not say how an "
            "id is written: deliver whole numbers or texts"
        )
    texts_of = {name: pc.cast(rows[name], pa.string()) for name in dict.fromkeys(wanted)}
    for name in part.numbers:
        _refuse_texts(path, name, texts_of[name])
    return pa.table(texts_of)


def _refuse_texts(path: str, name: str, column: pa.ChunkedArray) -> None:
    number = pc.match_substring_regex(column, r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$")
    wrong = column.filter(pc.invert(pc.fill_null(number, True)))
    if len(wrong):
        raise SchemaError(
            f"{path}: {name} = {wrong[0].as_py()!r} is not a number ({len(wrong):,} such rows): name "
            f"the column under items.categories, or correct the file"
        )


def rows_of(part: ItemsPart, paths: list[str]) -> tuple[dict[str, dict[str, str]], int, int]:
    """Item -> its attributes in one catalogue, how many rows spoke of an item once more (the last
    one counts), and how many had no id and are left out."""
    found: dict[str, dict[str, str]] = {}
    names, again, without = part.names, 0, 0
    for path in paths:
        columns = read(part, path).to_pydict()
        lists = [columns[name] for name in names]
        for item, *values in zip(columns[part.id], *lists, strict=True):
            if item is None:
                without += 1
                continue
            again += item in found
            found[item] = {
                name: value for name, value in zip(names, values, strict=True) if value is not None
            }
    return found, again, without


def changes(
    known: History, came: dict[str, dict[str, str]], since: datetime, dated: bool
) -> tuple[list[tuple[str, datetime, dict[str, str]]], int]:
    """Rows that a catalogue adds to what is known (which is brought up to date), and of how many
    items it contradicts what was once said of the same time: the table only grows."""
    added, against = [], 0
    for item, attributes in came.items():
        rows = known.setdefault(item, [])
        start = since if dated or rows else ALWAYS
        before = [values for at, values in rows if at <= start]
        if before and before[-1] == attributes:
            continue
        if any(at == start for at, _ in rows):
            against += 1
            continue
        rows.append((start, attributes))
        rows.sort(key=lambda row: row[0])
        added.append((item, start, attributes))
    return added, against


def history(table: pa.Table) -> History:
    """The table as it is."""
    found: History = {}
    columns = [table[name].to_pylist() for name in ("item_id", "known_from", "attributes")]
    for item, since, attributes in zip(*columns, strict=True):
        found.setdefault(item, []).append((since, dict(attributes)))
    for rows in found.values():
        rows.sort(key=lambda row: row[0])
    return found


@dataclass
class Added:
    """What `publish` must know."""

    rows: int
    """How many the run adds."""
    notes: list[str] = field(default_factory=list)
    base: int = 0
    """The version of `gold.item_attributes` that they were computed from."""
    staged: Staged = field(default_factory=list)
    whole: bool = False
    """Whether they are put in place of all there are."""


def stored(context: Context, base: int) -> tuple[pa.Table, foreign.Change | None]:
    """The table's rows, and whether others changed them; then its rows are those from before.

    What a catalogue said in the past is known from the table alone: catalogues that are gone, or
    that bear no date, cannot say it again.
    """
    lake = context.lake
    found = foreign.changed(lake, ITEM_ATTRIBUTES)
    rows = None if found is None else foreign.rows_at(lake, ITEM_ATTRIBUTES, found.good)
    if rows is None:
        rows = lake.table_of(ITEM_ATTRIBUTES, base, list(ITEM_ATTRIBUTES.columns))
    return rows, found


def compute(context: Context) -> Added | None:
    """Stage the rows that this run adds; what `publish` must know, or None where nothing is new."""
    part, lake = context.source.items, context.lake
    if part is None:
        return None
    foreign.make_ready(context, ITEM_ATTRIBUTES)
    lake.create(ITEM_ATTRIBUTES)
    base = lake.version(ITEM_ATTRIBUTES)
    assert base is not None
    before, changed = stored(context, base)
    known = history(before)
    added: list[tuple[str, datetime, dict[str, str]]] = []
    notes: list[str] = []
    if changed is not None:
        notes.append(f"{changed.in_words()}. The rows of version {changed.good} were put back")
        added = [(item, *one) for item, rows in known.items() for one in rows]
    found = snapshots(part, context.day)
    for since, paths in found:
        came, again, without = rows_of(part, paths)
        if again:
            notes.append(f"{again:,} rows of {paths[-1]} speak of an item again: the last counts")
        if without:
            notes.append(f"{without:,} rows of {paths[-1]} have no {part.id} and are left out")
        dated = DAY_FIELD.search(part.landing) is not None
        more, against = changes(known, came, since or context.started, dated)
        added += more
        if against:
            notes.append(
                f"{paths[-1]}: {against:,} items differ from what was read of the same day before, "
                "which stays; the next day's catalogue can say otherwise"
            )
    if not known:
        why = (
            f"of the files it matched none has a row with {part.id}"
            if found
            else (f"has matched no file so far (from {os.getcwd()})")
        )
        notes.append(
            f"nothing is known of any item: items.landing = {part.landing!r}: {why}; correct it, or "
            "put a catalogue there"
        )
    if not added:
        return Added(0, notes, base)
    schema = arrow_schema(ITEM_ATTRIBUTES.columns)
    columns = list(zip(*sorted(added, key=lambda row: row[:2]), strict=True))
    columns[2] = tuple(list(values.items()) for values in columns[2])
    rows = pa.Table.from_arrays(
        [pa.array(one, field.type) for one, field in zip(columns, schema, strict=True)],
        schema=schema,
    )
    folder = staging(context.run_id)
    filesystem.write_parquet(f"{lake.path(ITEM_ATTRIBUTES)}/{folder}/part-0.parquet", rows)
    staged = lake.entries(ITEM_ATTRIBUTES, folder)
    return Added(len(rows), notes, base, staged, whole=changed is not None)


def item_ids(context: Context, added: Added | None) -> pa.Array:
    """string[N]: the items of which the catalogue says, or once said, anything; without [items]
    none."""
    if added is None:
        return pa.array([], pa.string())
    lake = context.lake
    parts = []
    if not added.whole:
        parts.append(lake.table_of(ITEM_ATTRIBUTES, added.base, ["item_id"])["item_id"])
    for one in added.staged:
        path = f"{lake.path(ITEM_ATTRIBUTES)}/{one['path']}"
        parts.append(filesystem.read_parquet(path, ["item_id"])["item_id"])
    ids = pa.chunked_array([c for one in parts for c in one.cast(pa.string()).chunks], pa.string())
    return pc.unique(ids.filter(pc.not_equal(ids, "")))


def publish(context: Context, added: Added | None, result: Result) -> None:
    """Raises: Conflict: another run added rows since."""
    if added is None:
        return
    result.notes += added.notes
    lake = context.lake
    if added.rows:
        guard, base, staged = lake.guard(ITEM_ATTRIBUTES), added.base, added.staged
        if added.whole:
            foreign_columns.replace_rows(context, ITEM_ATTRIBUTES, staged, base, guard, base + 1)
        else:
            lake.commit(ITEM_ATTRIBUTES, staged, base, guard, base + 1, context.run_id)
        crash_points.point("items.attributes-published")
    result.tables[ITEM_ATTRIBUTES.full_name] = lake.told(ITEM_ATTRIBUTES)
