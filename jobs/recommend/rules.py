"""`[serving]` of a source file -> the rules that a model's lists are made by.

`where` is asked by DataFusion, the SQL engine of delta-rs, over one table made for it: the columns of
`gold.items`, and an attribute of the catalogue a column, as the newest row of `gold.item_attributes`
has it. It must be true: where it is null (an item of which the catalogue says nothing), the item is
not listed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.errors import SettingsError
from jobs.core.source_rules import ServingPart
from jobs.core.tables import ITEM_ATTRIBUTES, ITEMS, SEQUENCES
from jobs.lake import filesystem
from jobs.lake.landed import absolute

if TYPE_CHECKING:
    from jobs.lake.context import Context
    from models.core.rows import Bools, Ints, Rows
    from models.networks.saved_model import Stored
    from models.serving.rules import Rules

DAY_US = 86_400_000_000
SQL = {"datafusion.sql_parser.enable_ident_normalization": "false"}  # names as they are written
SHOWN_COLUMNS = 30
PLACE = "_serving", "rules.json"


@dataclass(frozen=True)
class Resolved:
    """The rules as they are for one model and one version of `gold.sequences`.

    digest: names what they allow; a list made by others is another list. removed: items of the
    vocabulary that each rule excludes, by its key. notes: for a person.
    """

    rules: Rules
    digest: str
    removed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def resolve(context: Context, item_ids: list[str], upto: int) -> Resolved | None:
    """The source's rules over a vocabulary; None: there are none.

    Raises:
        SettingsError: a rule cannot be evaluated, or excludes every item.
    """
    from models.serving.rules import Rules

    serving = context.source.serving
    if not serving.has_rules:
        return None
    items = item_table(context)
    vocabulary = pa.array(item_ids, pa.string())
    allowed = np.ones(len(item_ids), dtype=bool)
    removed: dict[str, int] = {}
    notes: list[str] = []
    for key, excluded in _excluded(serving, items, vocabulary, notes).items():
        removed[key] = int(excluded.sum())
        allowed &= ~excluded
        if not allowed.any():
            raise SettingsError(
                f"serving.{key} = {getattr(serving, key)!r} leaves none of the {len(item_ids):,} items "
                "that the model knows: nothing could be listed. Correct it, or leave it out"
            )
    category, most = None, serving.max_per_category or 0
    if most:
        assert serving.category is not None
        category = _codes(items, serving.category, vocabulary)
    seen_us = now_us = None
    if serving.exclude_seen_days is not None:
        seen_us, now_us = round(serving.exclude_seen_days * DAY_US), newest_event(context, upto)
    rules = Rules(allowed, seen_us, now_us, most, category)
    return Resolved(rules, _digest(rules, vocabulary), removed, notes)


def _excluded(
    serving: ServingPart, items: pa.Table, vocabulary: pa.Array, notes: list[str]
) -> dict[str, Bools]:
    """Key of a rule -> the items of the vocabulary that it excludes: bool[V]."""
    found = {}
    if serving.where is not None:
        found["where"] = ~_among(vocabulary, satisfying(items, serving.where))
    if serving.block_list is not None:
        blocked = block_list(serving)
        unknown = len(blocked) - int(_among(blocked, items["item_id"].combine_chunks()).sum())
        if unknown:
            notes.append(
                f"{unknown:,} of {len(blocked):,} ids in serving.block_list are not in gold.items"
            )
        found["block_list"] = _among(vocabulary, blocked)
    return found


def _among(ids: pa.Array, wanted: pa.Array) -> Bools:
    return np.asarray(pc.is_in(ids, wanted).to_numpy(zero_copy_only=False), dtype=bool)


def _codes(items: pa.Table, name: str, vocabulary: pa.Array) -> Ints:
    """int64[V]: the number of each item's category, -1 without one."""
    values = category_of(items, name, vocabulary).dictionary_encode()
    return np.asarray(pc.fill_null(values.indices, -1).to_numpy(), dtype=np.int64)


def category_of(items: pa.Table, name: str, ids: pa.Array) -> pa.Array:
    """The value of an attribute for each item, null without one."""
    at = pc.index_in(ids, items["item_id"].combine_chunks())
    return items[name].combine_chunks().take(at)


def _digest(rules: Rules, vocabulary: pa.Array) -> str:
    told = hashlib.sha256(json.dumps([rules.seen_us, rules.now_us, rules.most]).encode())
    for buffer in (*vocabulary.buffers(), rules.allowed.tobytes()):
        told.update(buffer or b"")
    told.update(b"" if rules.category is None else rules.category.tobytes())
    return told.hexdigest()[:16]


# -- what the tables say --------------------------------------------------------------------------


def newest_event(context: Context, upto: int) -> int:
    """The time of the newest event of a version of `gold.sequences`, in microseconds."""
    times = context.lake.table_of(SEQUENCES, upto, ["event_ts"])["event_ts"]
    newest = max(
        (pc.max(part.flatten()).value or 0 for part in times.chunks if len(part)), default=0
    )
    return int(newest)


def item_table(context: Context) -> pa.Table:
    """`gold.items` with a column for each attribute of the catalogue: numbers float64, others text;
    null where the catalogue does not say it. An attribute named like an earlier column, whatever its
    case, has none."""
    lake = context.lake
    version = lake.version(ITEMS)
    assert version is not None
    items = lake.table_of(ITEMS, version, list(ITEMS.columns)).combine_chunks()
    part = context.source.items
    numbers = set() if part is None else set(part.numbers)
    attributes = _newest_attributes(context, items["item_id"].combine_chunks())
    declared = [] if part is None else [*part.categories, *part.numbers]
    taken = {name.lower() for name in items.column_names}
    for name in dict.fromkeys([*declared, *attributes]):
        if name.lower() in taken:
            continue
        taken.add(name.lower())
        column = attributes.get(name, pa.nulls(items.num_rows, pa.string()))
        if name in numbers:
            column = _as_numbers(column)
        items = items.append_column(name, column)
    return items


def _as_numbers(column: pa.Array) -> pa.Array:
    try:
        return pc.cast(pc.utf8_trim_whitespace(column), pa.float64())
    except pa.ArrowInvalid:  # it was a category in catalogues before
        return column


def _newest_attributes(context: Context, ids: pa.Array) -> dict[str, pa.Array]:
    """Attribute -> its newest value for each item."""
    lake = context.lake
    version = lake.version(ITEM_ATTRIBUTES)
    if version is None:
        return {}
    rows = lake.table_of(ITEM_ATTRIBUTES, version, list(ITEM_ATTRIBUTES.columns))
    rows = rows.sort_by("known_from").combine_chunks()
    if not rows.num_rows:
        return {}
    item = pc.fill_null(pc.index_in(rows["item_id"].combine_chunks(), ids), -1).to_numpy()
    last = np.full(len(ids), -1)
    known = item >= 0
    np.maximum.at(last, item[known], np.flatnonzero(known))
    said = rows["attributes"].combine_chunks().take(pa.array(last[last >= 0]))
    length = np.diff(said.offsets.to_numpy())
    of = np.repeat(np.flatnonzero(last >= 0), length)
    keys, values = said.keys, said.items
    found = {}
    for name in pc.unique(keys).to_pylist():
        mine = pc.equal(keys, name)
        place = np.full(len(ids), -1)
        place[of[mine.to_numpy(zero_copy_only=False)]] = np.arange(pc.sum(mine).as_py())
        found[name] = values.filter(mine).take(pa.array(place, mask=place < 0))
    return found


def satisfying(items: pa.Table, condition: str, holds: str = "IS TRUE") -> pa.Array:
    """The ids of the items of which a condition is true; with `IS NOT TRUE`, of the others.

    Raises:
        SettingsError: it names an unknown column, or is no condition.
    """
    from deltalake import DeltaTable, QueryBuilder, write_deltalake

    with tempfile.TemporaryDirectory(prefix="sessionmill-rules-") as folder:
        write_deltalake(folder, items)
        asked = QueryBuilder(SQL).register("items", DeltaTable(folder))
        try:
            # (In lines of its own: it may end with a comment.)
            found = asked.execute(f"SELECT item_id FROM items WHERE (\n{condition}\n) {holds}")
            ids = pa.table(found.read_all())["item_id"]
        except Exception as error:  # (delta-rs raises several, Exception itself among them)
            raise _no_condition(items, condition, error) from None
    return ids.cast(pa.string()).combine_chunks()


def _no_condition(items: pa.Table, condition: str, error: Exception) -> SettingsError:
    said = " ".join(str(error).split(" You can use double quotes")[0].split())
    for more in ("Valid fields are", "Column names are case sensitive"):
        said = said.partition(more)[0].strip()
    names = items.column_names
    shown = ", ".join(names[:SHOWN_COLUMNS]) + (", …" if len(names) > SHOWN_COLUMNS else "")
    return SettingsError(
        f"serving.where = {condition!r} is not an SQL condition on the items: {said[:400]} Correct it in "
        f"the source file; the columns are {shown} (names are case sensitive, texts are in single "
        "quotes)"
    )


def block_list(serving: ServingPart) -> pa.Array:
    """The ids of the block list, each once.

    Raises:
        SettingsError: there is no such file, or it is not text.
    """
    assert serving.block_list is not None
    path = absolute(serving.block_list)
    try:
        text = filesystem.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"serving.block_list = {serving.block_list!r} cannot be read ({path}: {error}): write a "
            "file with one item id a line, UTF-8, or leave the key out"
        ) from None
    lines = text.removeprefix("\ufeff").split("\n")
    ids = [line.removesuffix("\r") for line in lines]
    return pa.array(list(dict.fromkeys(one for one in ids if one)), pa.string())


# -- how long lists can be ------------------------------------------------------------------------


def possible(stored: Stored, rows: Rows, rules: Rules | None, all_seen: bool) -> Ints:
    """int64[U]: how many items of the model's vocabulary each user may be given.

    Args:
        all_seen: whether everything that a user has seen is left out.
    """
    users, size = len(rows.start) - 1, len(stored.item_ids)
    allowed = np.ones(size, dtype=bool) if rules is None else rules.allowed
    user = np.repeat(np.arange(users), np.diff(rows.start))
    gone = np.full(len(rows.item), all_seen)
    if rules is not None and rules.seen_us is not None and rules.now_us is not None:
        gone = gone | (rows.ts >= rules.now_us - rules.seen_us)
    item = rows.item.astype(np.int64) - 1
    gone = gone & allowed[item]
    pairs = np.unique(user[gone] * size + item[gone])
    owner, item = pairs // size, pairs % size
    if rules is None or not rules.most or rules.category is None:
        return int(allowed.sum()) - np.bincount(owner, minlength=users)
    category, most = rules.category, rules.most
    there = np.bincount(
        category[allowed & (category >= 0)], minlength=int(category.max(initial=0)) + 1
    )
    full = int(np.minimum(there, most).sum()) + int((allowed & (category < 0)).sum())
    free = np.bincount(owner[category[item] < 0], minlength=users)
    held = category[item] >= 0
    groups, lost = np.unique(owner[held] * len(there) + category[item[held]], return_counts=True)
    of, left = groups // len(there), there[groups % len(there)]
    fewer = np.minimum(left, most) - np.minimum(left - lost, most)
    return full - free - np.bincount(of, weights=fewer, minlength=users).astype(np.int64)


# -- for a machine without tables -----------------------------------------------------------------


def export(context: Context) -> dict[str, Any]:
    """`[serving]` as a registered model takes it (parameter `rules`), over all of `gold.items`;
    written to `<lake>/<source>/_serving/rules.json`.

    Raises:
        SettingsError: there are no tables, no rules, or one cannot be evaluated.
    """
    lake, source = context.lake, context.source
    upto = lake.version(SEQUENCES)
    if upto is None or lake.version(ITEMS) is None:
        raise SettingsError(
            f"there is no table at {lake.path(SEQUENCES)}: run python -m jobs run --source {source.name} first"
        )
    items = item_table(context)
    ids = items["item_id"].to_pylist()
    found = resolve(context, ids, upto)
    if found is None:
        raise SettingsError(
            f"[serving] of {source.name} has no rules: add where, exclude_seen_days, "
            "max_per_category or block_list to the source file"
        )
    told = in_json(found.rules, items, source.serving)
    path = lake.folder(*PLACE)
    filesystem.write_text(path, json.dumps(told, ensure_ascii=False))
    return {
        "source": source.name, "file": path, "items": len(ids),
        "allowed": int(found.rules.allowed.sum()), "removed": found.removed, "notes": found.notes,
    }  # fmt: skip


def in_json(rules: Rules, items: pa.Table, serving: ServingPart) -> dict[str, Any]:
    """As `models.serving.rules.of_text` reads it. Args: rules: over the rows of `items`."""
    ids, told = items["item_id"], dict[str, Any]()
    few = rules.allowed.sum() * 2 < len(rules.allowed)
    named = rules.allowed if few else ~rules.allowed
    if not rules.allowed.all():
        told["allowed" if few else "blocked"] = ids.filter(pa.array(named)).to_pylist()
    if rules.now_us is not None:
        told["exclude_seen_days"] = serving.exclude_seen_days
        newest = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=rules.now_us)
        told["as_of"] = newest.isoformat()
    if serving.category is not None:
        told["max_per_category"] = serving.max_per_category
        of = items.select(["item_id", serving.category]).filter(
            pc.field(serving.category).is_valid()
        )
        told["category"] = dict(zip(*(column.to_pylist() for column in of.columns), strict=True))
    return told


def in_words(told: dict[str, Any]) -> str:
    gone = ", ".join(f"{key} excludes {count:,}" for key, count in told["removed"].items())
    lines = [
        f"{told['file']}: {told['allowed']:,} of {told['items']:,} items may be listed"
        + (f" ({gone})" if gone else "")
        + ". Give the file's text to a registered model as the parameter rules."
    ]
    return "\n".join(lines + [f"note: {note}" for note in told["notes"]])
