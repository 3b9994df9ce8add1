"""The log's columns of the events of `gold.sequences`: what a caller of a served model would send.

`silver.sessions`, at the version that the sequences were made from, has every column of an event.
Its sessions are read as a stream through delta-rs, parted by user into files of about a million
events, and each of these is put in order and compared with `gold.sequences`, position by position.
So memory does not grow with the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from expectations.session_rule import SessionRule
from models.core.errors import UserError
from models.core.rows import Bools, Ints, ragged
from models.data.sequences import Sequences, open_table

if TYPE_CHECKING:
    from deltalake import DeltaTable

PART_EVENTS = 1_000_000  # ours
BATCH = 32_768  # sessions; ours
CLOCK = pa.timestamp("us", "UTC")
COLUMNS = {
    "item_id": pa.string(), "event_ts": CLOCK, "source_session_id": pa.string(),
    "event_type": pa.string(), "value": pa.float64(), "tie_break": pa.int64(),
    "event_id": pa.string(), "exposed_with": pa.list_(pa.string()),
}  # fmt: skip
OPENS = "opens_session"
"""Whether an event is the first of its session."""


@dataclass(frozen=True)
class RawEvents:
    """Events of users with the log's columns, one row a position of their `gold.sequences`.

    part, first int64[U]: which of `parts` has a user's rows, and where they begin; -1: left out.
    runaway, changed: users (places in `Sequences`) that were left out, and why. `filled`: columns
    that are not null throughout. `version`: of `silver.sessions`; `exact`: it is the one that the
    sequences were made from.
    """

    parts: list[pa.RecordBatch]
    part: Ints
    first: Ints
    runaway: Ints
    changed: Ints
    filled: frozenset[str]
    version: int
    exact: bool

    def rows(self, user: int, positions: Ints) -> pa.RecordBatch:
        """Some positions of a user's sequence, rising."""
        batch, first = self.parts[self.part[user]], int(self.first[user])
        if not len(positions):
            return batch.slice(0, 0)
        low, size = int(positions[0]), len(positions)
        if int(positions[-1]) - low + 1 == size:
            return batch.slice(first + low, size)
        return batch.take(pa.array(first + positions))


def raw_events(
    sessions_path: str,
    consumed: int | None,
    sequences: Sequences,
    users: Ints,
    items: tuple[Ints, list[str]],
    folder: Path,
    make_with: str,
    native: bool = True,
) -> RawEvents:
    """The rows of these users (places in `sequences`, rising).

    Args:
        native: whether the log's own sessions were cut, whose ids then order events of one time.
        consumed: version of `silver.sessions` that the sequences were made from; where it is not
            known, or its files are gone, the newest one is read.
        items: `gold.items` as (item_index, item_id).
        folder: for the files; they are read as long as the answer is used.
    """
    failed: Exception | None = None
    for version in dict.fromkeys([consumed, None]):
        try:
            table = open_table(sessions_path, version, make_with)
            rule = SessionRule(native=native, gap_us=0)  # (order knows no gap)
            found = _Reading(sequences, users, folder / f"v{version}", rule)
            found.scatter(table)
            return found.gathered(items, int(table.version()), version is not None)
        except (FileNotFoundError, UserError) as error:
            failed = error
    if isinstance(failed, UserError):
        raise failed
    raise UserError(f"{sessions_path} cannot be read ({failed}): make it with `{make_with}`")


@dataclass
class _Reading:
    sequences: Sequences
    users: Ints
    folder: Path
    rule: SessionRule
    runaway: set[int] = field(default_factory=set)
    edges: Ints = field(init=False)

    def __post_init__(self) -> None:
        # The place among `users` at which each further part begins.
        events = np.cumsum(self.sequences.length[self.users])
        total = int(events[-1]) if len(events) else 0
        marks = np.arange(PART_EVENTS, total, PART_EVENTS)
        self.edges = np.unique(np.searchsorted(events, marks, side="right"))
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.arrow"

    def scatter(self, table: DeltaTable) -> None:
        """Sessions that are not runaway, into a file of each part."""
        writers: dict[int, Any] = {}
        try:
            for place, rows in self._sessions(table):
                part = np.searchsorted(self.edges, place, side="right")
                for number in np.unique(part):
                    mine = np.flatnonzero(part == number)
                    some = rows.take(pa.array(mine)).append_column("place", pa.array(place[mine]))
                    if number not in writers:
                        file = str(self.file(int(number)))
                        writers[number] = pa.ipc.new_stream(file, some.schema)
                    writers[number].write_table(some)
        finally:
            for writer in writers.values():
                writer.close()

    def _sessions(self, table: DeltaTable) -> Iterator[tuple[Ints, pa.Table]]:
        """(place among `users` of each session's, `start_ts` and `events`)."""
        import pyarrow.dataset as ds

        from jobs.lake.filesystem import matching, rows_of

        wanted = pa.array([self.sequences.user_id[u] for u in self.users], pa.string())
        few = 2 * len(self.users) < len(self.sequences.user_id)
        sessions, names = rows_of(table), ["user_id", "start_ts", "runaway", "events"]
        batches: Iterator[pa.RecordBatch] = sessions.to_batches(
            columns=names, batch_size=BATCH, batch_readahead=2, fragment_readahead=1
        )
        if few:
            found = matching(sessions, ds.field("user_id").isin(wanted), ["user_id"], names)
            batches = (batch for part in found for batch in part.to_batches())
        for batch in batches:
            place = pc.index_in(batch["user_id"].cast(pa.string()), value_set=wanted)
            there, normal = pc.is_valid(place), pc.is_null(batch["runaway"])
            self.runaway.update(place.filter(pc.and_(there, pc.invert(normal))).to_pylist())
            keep = pc.and_(there, normal)
            rows = pa.table(
                {"start_ts": batch["start_ts"].cast(CLOCK), "events": _typed(batch["events"])}
            )
            yield place.filter(keep).to_numpy(zero_copy_only=False), rows.filter(keep)

    def gathered(self, items: tuple[Ints, list[str]], version: int, exact: bool) -> RawEvents:
        count = len(self.sequences.user_id)
        part, first = np.full(count, -1), np.full(count, -1)
        runaway = np.sort(self.users[sorted(self.runaway)])
        batches: list[pa.RecordBatch] = []
        filled: set[str] = set()
        names = _by_index(*items)
        for number in range(len(self.edges) + 1):
            file = self.file(number)
            if not file.is_file():
                continue
            users, begin, events = self._ordered(file)
            same = _same(self.sequences, self.users[users], begin, events, names)
            same &= ~np.isin(users, list(self.runaway))
            index, _ = ragged(begin[:-1][same], np.diff(begin)[same])
            kept = events.take(pa.array(index)).combine_chunks()
            file.unlink()
            batches.append(_on_disk(kept, self.folder / f"rows-{number:05d}.arrow"))
            mine = self.users[users[same]]
            part[mine] = len(batches) - 1
            size = np.diff(begin)[same]
            first[mine] = np.cumsum(size) - size
            filled |= {n for n in kept.column_names if kept[n].null_count < kept.num_rows}
        lost = self.users[part[self.users] < 0]
        return RawEvents(
            batches,
            part,
            first,
            runaway,
            np.setdiff1d(lost, runaway),
            frozenset(filled),
            version,
            exact,
        )

    def _ordered(self, file: Path) -> tuple[Ints, Ints, pa.Table]:
        """Users of a part (places among `users`), where the rows of each begin (and one past the
        last), and the rows, in the total order."""
        with pa.memory_map(str(file)) as stream:
            sessions = pa.ipc.open_stream(stream).read_all().combine_chunks()
        lists = _whole(sessions["events"])
        offsets = lists.offsets.to_numpy()
        events = lists.values
        heads = events.take(pa.array(offsets[:-1]))
        starts = _whole(sessions["start_ts"]).cast(CLOCK).cast(pa.int64()).to_numpy()

        def ties(places: Ints) -> dict[str, Any]:
            return {name: heads.field(name).take(pa.array(places)) for name in self.rule.ties}

        order = self.rule.arrays.order(sessions["place"].to_numpy(), starts, ties)
        size = np.diff(offsets)[order]
        index, _ = ragged(offsets[:-1][order].astype(np.int64), size)
        place = sessions["place"].to_numpy()[order]
        users, begins = np.unique(place, return_index=True)
        rows = pa.Table.from_struct_array(events).take(pa.array(index))
        start = np.concatenate([[0], np.cumsum(size)])
        opens = np.zeros(len(index), bool)
        opens[start[:-1][size > 0]] = True
        rows = rows.append_column(OPENS, pa.array(opens))
        return users, np.append(start[begins], len(index)), rows


def _whole(column: pa.ChunkedArray) -> Any:
    made = column.combine_chunks()
    return made.chunk(0) if isinstance(made, pa.ChunkedArray) else made


def _typed(events: pa.Array) -> pa.Array:
    """The lists of events with the columns of `COLUMNS`."""
    kept = pa.struct(list(COLUMNS.items()))
    flat = events.flatten()
    told = {field.name for field in flat.type}
    parts = [
        flat.field(name).cast(kind) if name in told else pa.nulls(len(flat), kind)
        for name, kind in COLUMNS.items()
    ]
    count = pc.fill_null(pc.list_value_length(events), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(count)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(parts, fields=list(kept)))


def _by_index(index: Ints, names: list[str]) -> Callable[[Ints], pa.Array]:
    """item_index -> item_id."""
    place = np.full(int(index.max(initial=0)) + 1, 0, dtype=np.int64)
    place[index] = np.arange(len(names))
    ids = pa.array(names, pa.string())
    return lambda wanted: ids.take(pa.array(place[wanted]))


def _same(
    sequences: Sequences,
    users: Ints,
    begin: Ints,
    events: pa.Table,
    names: Callable[[Ints], pa.Array],
) -> Bools:
    """bool[users]: are the events of each user those of the sequence, one by one?"""
    size, length = np.diff(begin), sequences.length[users].astype(np.int64)
    same: NDArray[np.bool_] = size == length
    index, row = ragged(begin[:-1][same], size[same])
    at, _ = ragged(sequences.start[users][same].astype(np.int64), length[same])
    mine = events.select(["item_id", "event_ts"]).take(pa.array(index))
    equal = pc.equal(_whole(mine["item_id"]), names(np.asarray(sequences.item[at])))
    times = _whole(mine["event_ts"]).cast(pa.int64()).to_numpy(zero_copy_only=False)
    unlike = ~(pc.fill_null(equal, False).to_numpy(zero_copy_only=False))
    unlike |= times != np.asarray(sequences.ts[at])
    wrong = np.bincount(row[unlike], minlength=int(same.sum())) > 0
    same[np.flatnonzero(same)[wrong]] = False
    return same


def _on_disk(rows: pa.Table, file: Path) -> pa.RecordBatch:
    """The same rows, mapped from a file."""
    batch = rows.to_batches()[0] if rows.num_rows else pa.RecordBatch.from_pylist([], rows.schema)
    with pa.ipc.new_file(str(file), rows.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
