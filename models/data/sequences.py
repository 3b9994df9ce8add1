"""gold.sequences at one Delta version, as flat memory-mapped arrays that all methods share.

Read through delta-rs (no JVM), written from a stream of record batches, so that memory does not
grow with the table. One folder a version, made once under `<lake>/<source>/_cache/` and renamed
into place: two processes at once are safe, a reader never sees half of it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.core.errors import UserError
from models.core.rows import FEEDBACK

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

FORMAT = 1  # of the cache folder; raise it when the arrays change
ARRAYS = {
    "item": np.int32, "ts": np.int64, "session": np.int32, "feedback": np.int8,
    "exposed": np.int32, "exposed_count": np.int32, "length": np.int64,
}  # fmt: skip
COLUMNS = ("user_id", "item_index", "event_ts", "session_ordinal", "feedback", "exposed_items")


@dataclass(frozen=True)
class Sequences:
    """E events of U users, users in order of `user_id`, each user's events oldest first.

    item int32[E] (gold's item_index), ts int64[E] (us UTC), session int32[E] (ordinal from 1),
    feedback int8[E] (a code of models.core.rows), user u owns start[u]..start[u]+length[u]-1;
    exposed int32[X] with exposed_count int32[E].
    """

    path: str
    version: int
    table_id: str
    user_id: list[str]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    item: NDArray[np.int32]
    ts: NDArray[np.int64]
    session: NDArray[np.int32]
    feedback: NDArray[np.int8]
    exposed: NDArray[np.int32]
    exposed_count: NDArray[np.int32]


def open_table(path: str, version: int | None, make_with: str) -> DeltaTable:
    """A Delta table at a version (None: the newest)."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    try:
        table = DeltaTable(path)
    except (TableNotFoundError, FileNotFoundError):
        raise UserError(f"there is no table at {path}: make it with `{make_with}`") from None
    newest = table.version()
    if version is None or version == newest:
        return table
    there = sorted(commit["version"] for commit in table.history())
    try:
        if version < 0 or version > newest:
            raise DeltaError("no such version")
        return DeltaTable(path, version=version)
    except (DeltaError, OSError) as error:
        raise UserError(
            f"{path} has no version {version} ({error}): it has {there[0]} to {there[-1]}"
        ) from None


def cache_folder(lake: str, source: str) -> Path:
    """Beside the source's tables; for a lake behind a URI, in `SESSIONMILL_CACHE`."""
    if "://" in lake:
        from jobs.core.settings import settings  # (a serving machine has no jobs)

        return Path(settings().cache_root()) / source
    return Path(lake) / source / "_cache"


def open_sequences(path: str, version: int | None, cache: Path, make_with: str) -> Sequences:
    """The arrays of a version of gold.sequences, read from the table if nobody has done so yet."""
    table = open_table(path, version, make_with)
    there = {field.name for field in table.schema().fields}
    if missing := [name for name in COLUMNS if name not in there]:
        raise UserError(
            f"{path} version {table.version()} has no column {', '.join(missing)}: something else "
            f"wrote it. Move it away and run `{make_with}`, or give an earlier --table-version"
        )
    table_id = str(table.metadata().id)
    folder = cache / f"sequences-{table_id[:8]}-v{table.version()}-f{FORMAT}"
    if not (folder / "meta.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = cache / f".making-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        scratch.mkdir()
        try:
            try:
                _write(table, scratch)
            except FileNotFoundError as error:
                raise UserError(
                    f"{path} version {table.version()} cannot be read any more ({error}): `jobs "
                    "forget` or `jobs maintain` removed its files. Train and compare anew on a "
                    "version that is there"
                ) from None
            try:
                scratch.rename(folder)
            except OSError:
                if not (folder / "meta.json").is_file():
                    raise  # otherwise another process was faster with the same content
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return _open(folder, path, table.version(), table_id)


def read_items(path: str, make_with: str) -> tuple[NDArray[np.int64], list[str]]:
    """gold.items, newest version (an `item_index` never moves): (item_index, item_id)."""
    import pyarrow as pa

    from jobs.lake.filesystem import rows_of

    table = open_table(path, None, make_with)
    batches = rows_of(table).to_table(columns=["item_index", "item_id"])
    index = batches["item_index"].cast(pa.int64()).to_numpy()
    return index, [str(item) for item in batches["item_id"].to_pylist()]


def _batches(table: DeltaTable) -> Iterator[pa.RecordBatch]:
    from jobs.lake.filesystem import rows_of

    yield from rows_of(table).to_batches(columns=list(COLUMNS), batch_size=4096)


def _flat(array: Any) -> Any:
    """The values of a list array, without those that a slice or a null hides."""
    return array.flatten()


def _write(table: DeltaTable, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = pa.array(FEEDBACK)
    users: list[str] = []
    files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}

    def append(name: str, values: Any) -> None:
        array = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values
        files[name].write(np.ascontiguousarray(array, dtype=ARRAYS[name]).tobytes())

    try:
        for batch in _batches(table):
            column = {name: batch.column(name) for name in COLUMNS}
            users.extend(column["user_id"].to_pylist())
            feedback = pc.index_in(_flat(column["feedback"]).cast(pa.string()), codes)
            if feedback.null_count:
                raise UserError(
                    f"gold.sequences has feedback that is not one of {FEEDBACK}: something else wrote it. "
                    "Make it again: python -m jobs sequences --source SOURCE --rebuild"
                )
            stamps = _flat(column["event_ts"]).cast(pa.timestamp("us", tz="UTC"))
            exposed = _flat(column["exposed_items"])
            append("item", _flat(column["item_index"]))
            append("ts", stamps.cast(pa.int64()))
            append("session", _flat(column["session_ordinal"]))
            append("feedback", feedback)
            append("exposed", _flat(exposed))
            append("exposed_count", pc.fill_null(pc.list_value_length(exposed), 0))
            append("length", pc.list_value_length(column["item_index"]))
    finally:
        for file in files.values():
            file.close()
    # Files of a table come in any order: users are put in order of their id.
    order = sorted(range(len(users)), key=users.__getitem__)
    np.save(folder / "order.npy", np.array(order, dtype=np.int64))
    with (folder / "users.json").open("w", encoding="utf-8") as listing:
        json.dump([users[i] for i in order], listing)
    (folder / "meta.json").write_text(json.dumps({"users": len(users)}))


def _open(folder: Path, path: str, version: int, table_id: str) -> Sequences:
    def load(name: str) -> Any:
        file = folder / f"{name}.bin"
        if file.stat().st_size == 0:
            return np.zeros(0, dtype=ARRAYS[name])
        return np.memmap(file, dtype=ARRAYS[name], mode="r")

    order = np.load(folder / "order.npy", allow_pickle=False)
    length = load("length")
    start = np.cumsum(length) - length
    return Sequences(
        path=path,
        version=version,
        table_id=table_id,
        user_id=json.loads((folder / "users.json").read_text(encoding="utf-8")),
        start=start[order],
        length=np.asarray(length)[order],
        **{name: load(name) for name in ARRAYS if name != "length"},
    )
