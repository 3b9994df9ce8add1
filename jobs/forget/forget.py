"""Removes a person: from the tables and all that is left of their older versions, from candidates,
caches, answers and pages, and from the landing files; and sees to it that they do not come back.

The order makes it safe to be killed and run again: first the keyed hash that ingestion obeys, then
the landing, then the events, whose going the other tables follow as they follow every change, then
what older versions kept. Files of older versions that have the person are deleted, whoever pinned
them: those versions cannot be read any more, and registered models that need them are marked
(`rebuildable = false`), as are those that have seen the person (`saw_forgotten = true`).

Of a source with `[identity]` a person's anonymous ids are those with which they logged in, or which a
table gives to them. What has one of these and no user is removed as theirs, and skipped from then on, on a
device that others use, too: what they did there under their own names stays.

What it does not reach, and reports: copies outside the lake and MLflow.

Decision 15 in docs/design/decisions.md.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pyarrow import fs

from jobs.audit import balance, fingerprint_table
from jobs.bronze import replay_rejects
from jobs.core.errors import SettingsError, counted
from jobs.core.settings import settings
from jobs.core.source_file import Source
from jobs.core.source_log import TABLES_OF_OTHERS
from jobs.core.tables import (
    ALL,
    DELIVERIES,
    EVENTS,
    FILTERED,
    FLAGS,
    FORGOTTEN,
    IDENTITIES,
    RECOMMENDATIONS,
    REJECTS,
    RUNS,
    SEQUENCES,
    Table,
)
from jobs.forget.landing_files import from_landing
from jobs.lake import filesystem, foreign
from jobs.lake.context import Context, require_tables
from jobs.lake.delta import Lake
from jobs.ops.model_registry import _from_tracking, _mark, registry_pins
from jobs.pipeline.steps import one_job
from jobs.privacy import pseudonyms
from jobs.privacy.person import Person
from jobs.reading.reject_columns import Ledger
from jobs.reading.stored import Stored, records_of
from jobs.records.file_format import file_format

IDS = ("user_id", "log_user_id", "anonymous_id")
NAMING = (*IDS, "raw", "message")  # columns in which a person may be
NUMBERS = (".bin", ".npy", ".safetensors")  # files of caches that hold no text, and may be large
UNREADABLE = (DeltaError, OSError, pa.ArrowException)


def forget(context: Context, user: str) -> dict[str, Any]:
    """Remove a person from everything that this source has of them.

    Args:
        user: the id as the log has it.

    Raises:
        SettingsError: no key, or the model registry does not answer: nothing was removed.
        TableLost: others put older rows in place of a table of the log: nothing was removed.
    """
    lake, source = context.lake, context.source
    if not user:
        raise SettingsError("--user is empty: name the person by the log's id")
    require_tables(context)
    foreign.refuse_loss(context, EVENTS, REJECTS)
    secret = pseudonyms.keyed(context, source.privacy.hash_user_id)
    hashed = secret.pseudonym(user)
    person = with_anonymous(context, Person(user, hashed if secret.hashes else user), hashed)
    of_anonymous = {
        one if secret.hashes else secret.of_anonymous(one): one for one in person.anonymous
    }
    pins, registry = registry_pins(source.name)
    seen = sorted(
        name for version, names in pins.items() if _has(lake, version, person) for name in names
    )
    _mark(seen, "saw_forgotten", "true")

    lake.create(FORGOTTEN)
    before = hashed in lake.small(FORGOTTEN)["user_hash"].to_pylist()
    lake.put_small(
        FORGOTTEN, [(one, secret.key_check, context.started) for one in (hashed, *of_anonymous)]
    )
    lines = from_landing(context, person, lambda name: secret.of_anonymous(name) in of_anonymous)
    _delete(context, FLAGS, person)  # (while their events say which they are)
    _delete(context, DELIVERIES, person)  # (what it has comes back into bronze.events)
    events = _delete(context, EVENTS, person)
    for job in ("sessionize", "items", "sequences"):
        one_job(context, job, "all", {})
    lists = _delete(context, RECOMMENDATIONS, person)
    rejects = _delete(context, REJECTS, person) + _delete(context, FILTERED, person)
    _from_messages(context, person)
    removed = sum(_purge(context, table, person) for table in ALL) + _from_folders(context, person)
    # (A row of a file with one event is a hash of that event's user and time.)
    fingerprint_table.prune(context, balance.needed(context))
    lost = sorted(
        name for version, names in pins.items() if not _readable(lake, version) for name in names
    )
    _mark(lost, "rebuildable", "false")
    artifacts = _from_tracking(source.name, person, hashed)
    filesystem.remove(lake.folder(IN_WORK, hashed))
    return {
        "source": source.name, "user_hash": hashed, "anonymous_ids": len(of_anonymous), "events": events, "rejects": rejects,
        "lists": lists, "landing_lines": lines, "files_removed": removed,
        "log_table": _table_of_others(source),
        "models_that_saw": seen, "models_not_rebuildable": lost, "registry": registry,
        "artifacts": artifacts, "erased_before": before,
    }  # fmt: skip


def _table_of_others(source: Source) -> str | None:
    """The table that the log is, if it is one."""
    if source.jdbc is not None:
        return source.jdbc.table or "that jdbc.query reads"
    return source.source.landing if source.source.format in TABLES_OF_OTHERS else None


IN_WORK = "_forget"


def with_anonymous(context: Context, person: Person, hashed: str) -> Person:
    """The person with their anonymous ids. They are kept in a file until all is done, because the tables
    do not know them any more after a run that was killed."""
    lake = context.lake
    kept = lake.folder(IN_WORK, hashed) + "/anonymous.json"
    found: set[str] = set()
    if filesystem.exists(kept):
        found |= set(json.loads(filesystem.read_text(kept)))
    for table in (EVENTS, IDENTITIES):
        opened = lake.open(table)
        if opened is None or "anonymous_id" not in {one.name for one in opened.schema().fields}:
            continue
        wanted = ds.field("user_id") == person.stored
        for rows in filesystem.matching(
            filesystem.rows_of(opened), wanted, ["user_id"], ["anonymous_id"]
        ):
            found |= {
                str(one) for one in rows["anonymous_id"].unique().to_pylist() if one is not None
            }
    if found:
        filesystem.write_text(kept, json.dumps(sorted(found)))
    return replace(person, anonymous=frozenset(found))


def in_words(done: dict[str, Any]) -> str:
    """What was done, for a person; without the id."""
    marked = (
        f"Models that have seen them, to be trained anew: {', '.join(done['models_that_saw'])}. "
        if done["models_that_saw"]
        else "No registered model has seen them. "
    )
    lost = (
        f"Their data can no longer be rebuilt: {', '.join(done['models_not_rebuildable'])}. "
        if done["models_not_rebuildable"]
        else ""
    )
    log = (
        f" The log is the table {done['log_table']} of others, which is not changed: delete the rows there."
        if done.get("log_table")
        else ""
    )
    found = any(done[name] for name in ("events", "rejects", "lists", "landing_lines"))
    nothing = (
        ""
        if found
        else " Nothing was left of this user, who was erased before."
        if done["erased_before"]
        else " Nothing of this user was found: use the id as the log has it."
    )
    return (
        f"forget {done['source']}: {counted(done['events'], 'event')}, "
        f"{counted(done['rejects'], 'reject')}, {counted(done['lists'], 'list')} and "
        f"{counted(done['landing_lines'], 'line')} of landing files removed, and "
        f"{counted(done['files_removed'], 'file')} of older versions, candidates and caches. {marked}{lost}"
        f"Ingestion skips {done['user_hash']} from now on. The id was also removed from files in "
        f"MLflow (scores and pages): {done['artifacts']:,}; {done['registry']}. Not reached: copies "
        f"outside the lake and MLflow.{log}{nothing}"
    )


# -- models ---------------------------------------------------------------------------------------


def _has(lake: Lake, version: int, person: Person) -> bool:
    """Whether a version of gold.sequences has the person; one that cannot be read may have had."""
    try:
        table = DeltaTable(filesystem.rust_uri(lake.path(SEQUENCES)), version=version)
        wanted = ds.field("user_id").isin(person.names)
        rows = filesystem.rows_of(table)
        return any(True for _ in filesystem.matching(rows, wanted, ["user_id"], ["user_id"]))
    except UNREADABLE:
        return True


def _readable(lake: Lake, version: int) -> bool:
    try:
        there = lake.file_uris(SEQUENCES, version)
    except UNREADABLE:
        return False
    return all(filesystem.exists(path) for path in there)


# -- tables ---------------------------------------------------------------------------------------


def _condition(context: Context, table: Table, base: int, person: Person) -> Any:
    from pyspark.sql import functions as F

    if table is FLAGS:
        events = context.lake.read(EVENTS).where(F.col("user_id") == F.lit(person.stored))
        return F.col("event_id").isin(
            [row["event_id"] for row in events.select("event_id").collect()]
        )
    if table in (REJECTS, FILTERED):
        place = F.concat_ws("\n", "file", F.col("line").cast("string"), "raw_hash")
        return place.isin(_lines_of(context, table, base, person))
    if table in (EVENTS, DELIVERIES):
        alone = F.col("user_id").isNull() & F.col("anonymous_id").isin(sorted(person.anonymous))
        return (F.col("user_id") == F.lit(person.stored)) | alone
    return F.col("user_id").isin(person.names)


NOBODY = (None, None)
"""The user and the anonymous id of a line that is no record."""


def _lines_of(context: Context, table: Table, base: int, person: Person) -> list[str]:
    """Keys of the stored lines that are the person's: read as records where they are ones, since an
    id that is a number is in many lines; else by the id as a word."""
    from pyspark.sql import functions as F

    lake, source = context.lake, context.source
    secret = pseudonyms.keyed(context, True) if source.privacy.hash_user_id else None
    fmt = replace(file_format(source), privacy=secret)
    ledger, found = Ledger(lake), []
    rows = lake.read(table, base)
    if not _made_by_expression(context):
        raw, named = F.col("raw"), F.lit(False)
        # May be: as it is, or in one of the writings of which `Person` knows.
        for sign in (person.said, person.stored, *person.anonymous, "\\", '""', "&"):
            named = named | raw.contains(sign)
        rows = rows.where(named)
    for row in rows.withColumn("us", F.unix_micros("first_seen_ts")).toLocalIterator():
        file = row["file"]
        try:
            header = row["file_columns"] or ledger.columns_then(file, row["us"])
            if header is None and replay_rejects.by_order(fmt):
                raise KeyError(file)
            # (All elements of a line: it is kept whole.)
            line = Stored(row["raw"], file, row["line"], ledger.columns.get(file, {}), header)
            found_in = [
                (one["user_id"], one["anonymous_id"]) if one["kind"] != "unparsable" else NOBODY
                for one in records_of(fmt, [line])[0]
            ]
        except (KeyError, ValueError):  # a file or a column that is not known any more
            found_in = [NOBODY]
        if any(user in (person.said, person.stored) for user, _ in found_in) or any(
            user is None
            and (name in person.anonymous or (name is None and person.stands_in(row["raw"] or "")))
            for user, name in found_in
        ):
            found.append(f"{row['file']}\n{row['line']}\n{row['raw_hash']}")
    return found


def _made_by_expression(context: Context) -> bool:
    """Whether a line may not have the user's id as it is in the tables."""
    return "user_id" in context.source.columns.expressions()


def _delete(context: Context, table: Table, person: Person) -> int:
    """Delete the person's rows in one commit; how many there were."""
    lake = context.lake
    if lake.version(table) is None:
        return 0
    lake.create(table)  # (one that an earlier version made may lack columns)
    base = lake.version(table)
    assert base is not None
    spark = context.spark
    condition = _condition(context, table, base, person)
    count = int(lake.read(table, base).where(condition).count())
    if count:
        from delta.tables import DeltaTable as SparkDeltaTable

        context.enter(context.thresholds.spark(count, lake.rows(table)))
        target = SparkDeltaTable.forPath(spark, lake.path(table))
        with lake.transaction(table, lake.guard(table), base + 1, context.run_id):
            target.delete(condition)
    return count


def _from_messages(context: Context, person: Person) -> None:
    """What runs said may quote a line."""
    lake = context.lake
    rows = [
        tuple({**row, "message": person.taken_out(row["message"])}.values())
        for row in lake.small(RUNS).to_pylist()
        if row["message"] and person.stands_in(row["message"])
    ]
    if rows:
        lake.put_small(RUNS, rows)


# -- what is left of older versions ---------------------------------------------------------------


def _purge(context: Context, table: Table, person: Person) -> int:
    """Delete the files of older versions that have the person, and forget them in the log."""
    lake = context.lake
    # (A stored line may name the person in another way than the tables do.)
    any_line = table in (REJECTS, FILTERED) and _made_by_expression(context)
    if lake.version(table) is None:
        return 0
    root = lake.path(table)
    found = DeltaTable(filesystem.rust_uri(root))
    current = {os.path.basename(uri) for uri in found.file_uris()}
    columns = [name for name in NAMING if name in table.columns]
    removed = 0
    for path in _below(root):
        if "/_delta_log/" in path or not path.endswith(".parquet"):
            continue
        if os.path.basename(path) in current or not columns:
            continue
        if any_line or _file_has(path, columns, person):
            _drop(path)
            removed += 1
    if columns:
        found.create_checkpoint()  # from here on the table is read without what is taken out below
        for path in _below(f"{root}/_delta_log"):
            removed += _clean_log(path, person, found.version())
    return removed


def _below(folder: str) -> list[str]:
    """All files below a folder, hidden ones too."""
    system, inner = filesystem.located(folder)
    selector = fs.FileSelector(inner, recursive=True, allow_not_found=True)
    infos = system.get_file_info(selector)
    base = folder.rstrip("/")
    return [
        base + one.path.removeprefix(inner.rstrip("/"))
        for one in infos
        if one.type == fs.FileType.File
    ]


def _drop(path: str) -> None:
    """Delete a file, and the checksum that Hadoop keeps beside files of a local disk."""
    system, inner = filesystem.located(path)
    system.delete_file(inner)
    beside = f"{os.path.dirname(inner)}/.{os.path.basename(inner)}.crc"
    if system.get_file_info(beside).type == fs.FileType.File:
        system.delete_file(beside)


def _file_has(path: str, columns: list[str], person: Person) -> bool:
    """Whether a Parquet file has the person in one of these columns."""
    with filesystem.open_seekable(path) as stream:
        file = pq.ParquetFile(stream)
        names = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.metadata.num_row_groups):
            rows = file.read_row_group(group, columns=names)
            for name in names:
                column = rows[name].cast(pa.string())  # (delta-rs writes string views)
                if name in IDS:
                    if pc.any(pc.is_in(column, pa.array(person.names, pa.string()))).as_py():
                        return True
                elif any(person.stands_in(text or "") for text in column.to_pylist()):
                    return True
    return False


def _clean_log(path: str, person: Person, newest: int) -> int:
    """Take the person out of one file of a table's log: statistics, predicates, old checkpoints."""
    name = os.path.basename(path)
    number = name.partition(".")[0]
    if (
        ".checkpoint" in name
        and name.endswith(".parquet")
        and number.isdigit()
        and int(number) < newest
    ):
        told = filesystem.read_parquet(path).to_pylist()
        if person.stands_in(json.dumps(told, default=str, ensure_ascii=False)):
            _drop(path)
            return 1
    elif name.endswith(".json") and number.isdigit():
        text = filesystem.read_text(path)
        lines = [_clean_action(line, person) for line in text.splitlines()]
        if (cleaned := "\n".join(lines) + "\n") != text:
            system, inner = filesystem.located(path)
            beside = f"{os.path.dirname(inner)}/.{name}.crc"
            if system.get_file_info(beside).type == fs.FileType.File:
                system.delete_file(beside)
            filesystem.write_text(path, cleaned)
    elif name.endswith(".crc") and not name.startswith("."):  # Delta's checksum of a version
        told_of = person.stands_in(filesystem.read_text(path))
        if told_of:
            _drop(path)
    return 0


def _clean_action(line: str, person: Person) -> str:
    """One action of a commit without statistics or conditions that name the person."""
    if not person.stands_in(json.dumps(json.loads(line or "null"), ensure_ascii=False)):
        return line
    action = json.loads(line)
    for kind in ("add", "remove"):
        if kind in action and person.stands_in(str(action[kind].get("stats") or "")):
            action[kind].pop("stats")
    if "commitInfo" in action:
        action["commitInfo"].pop("operationParameters", None)
    return json.dumps(action, ensure_ascii=False)


def _from_folders(context: Context, person: Person) -> int:
    """Candidates, caches, answers and pages that name the person; how many there were."""
    lake, removed = context.lake, 0
    base = lake.folder()
    folders = [f"{base}/{name}" for name in ("_candidates", "_cache", "_runs", "_quality")]
    whole = folders[:2]  # a candidate or a cache is of use as a whole only
    if "://" in base:
        whole.append(f"{settings().cache_root()}/{context.source.name}")
        folders.append(whole[-1])
    for folder in folders:
        for path in sorted(path for path in _below(folder) if _mentions(path, person)):
            inside = path.removeprefix(f"{folder}/")
            top = f"{folder}/{inside.partition('/')[0]}"
            if folder in whole and "/" in inside:
                removed += filesystem.exists(top) or _is_folder(top)
                filesystem.remove(top)
            else:
                removed += 1
                _drop(path)
    for path in _below(base):
        if os.path.dirname(path) == base and _mentions(path, person):
            removed += 1
            _drop(path)
    return removed


def _is_folder(path: str) -> bool:
    system, inner = filesystem.located(path)
    return bool(system.get_file_info(inner).type == fs.FileType.Directory)


def _mentions(path: str, person: Person) -> bool:
    system, inner = filesystem.located(path)
    if system.get_file_info(inner).type != fs.FileType.File:
        return False  # gone with its folder
    if path.endswith(NUMBERS):
        return False
    if path.endswith((".parquet", ".arrow")):
        rows = _read_any(path)
        return any(
            person.stands_in(str(text))
            for column, kind in zip(rows.columns, rows.schema.types, strict=True)
            if pa.types.is_string(kind) or pa.types.is_large_string(kind)
            for text in column.to_pylist()
            if text
        )
    with filesystem.open_binary(path) as stream:
        return person.stands_in(stream.read().decode("utf-8", "replace"))


def _read_any(path: str) -> pa.Table:
    if path.endswith(".parquet"):
        return filesystem.read_parquet(path)
    with filesystem.open_seekable(path) as stream:
        return pa.ipc.open_file(stream).read_all()
