"""The questions of a test period as requests to a registered model, and its answers as scores.

A request has the columns of the log (`models/data/raw_events.py`), all events before its time, and
k = the size of the vocabulary, so that an answer has every item's score; where lists alone are
compared, k = the length of a list.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from models.core.errors import UserError
from models.core.rows import Ints
from models.data.raw_events import RawEvents
from models.data.splits import Events, Targets, stamp
from models.networks.saved_model import Stored
from models.registry import tracking
from models.selection import verify_worker
from models.serving.answer import NATIVE, OPENS

if TYPE_CHECKING:
    from jobs.core.source_file import Source

MOST_ROWS, MOST_SCORES = 1_000_000, 3_000_000  # ours: of one request, and of its answer
LIST_ITEMS = 100  # items of a list, as `score` writes them where no --k is given
Ask = Callable[[pa.Table], pa.Table]


@contextmanager
def worker(uri: str) -> Iterator[Ask]:
    """The registered model in a process of its own, with the code that it was logged with.

    Raises:
        UserError: the process ended; with what it said last.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["MLFLOW_TRACKING_URI"] = tracking.tracking_uri()
    program = str(Path(verify_worker.__file__).absolute())
    command = [sys.executable, "-P", program, uri, str(torch.get_num_threads())]
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
            )
        assert process.stdin is not None and process.stdout is not None
        to_it, from_it = process.stdin, process.stdout

        def ask(question: pa.Table) -> pa.Table:
            try:
                verify_worker.send(to_it, question)  # type: ignore[arg-type]
                told = verify_worker.receive(from_it)  # type: ignore[arg-type]
            except BrokenPipeError:
                told = None
            if told is None:
                process.wait()
                text = log.read_text(errors="replace").strip()[-2000:]
                raise UserError(f"{uri} does not load, or ended while it was asked: {text}")
            return told

        try:
            yield ask
        finally:
            process.kill()
            process.wait()
            to_it.close() if not to_it.closed else None
            from_it.close()


@contextmanager
def loaded_here(uri: str) -> Iterator[Ask]:
    """The registered model in this process: with the code that this process has imported."""
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(uri)
    yield lambda question: verify_worker.answer(model, question)


class Questions:
    """Puts targets to a registered model; counts those that it refuses, and keeps why."""

    def __init__(
        self, stored: Stored, source: Source, events: Events, raw: RawEvents, ask: Ask
    ) -> None:
        self.stored, self.events, self.raw, self.ask = stored, events, raw, ask
        self.refused = 0
        self.refusal: str | None = None
        self.k = len(stored.item_ids)
        mapped = {*source.columns.mapped(), "user_id", "event_id"}
        if source.exposures is not None:
            mapped.add("exposed_with")
        # (What a boundary says of two events is given to the models that were trained under one.)
        told = "boundary" in stored.facts.get("sessions", {})
        names = [n for n in raw.parts[0].schema.names if n != OPENS or told]
        self.columns = [n for n in names if n in mapped or n in raw.filled]

    def scores(self, part: Targets) -> tuple[torch.Tensor, int]:
        """float64[R, V], -inf for what the model does not return; and in how many requests."""
        shape = len(part.user), len(self.stored.item_ids)
        scores = torch.full(shape, -torch.inf, dtype=torch.float64)
        requests = self._requests(part)
        for rows in requests:
            scores[torch.from_numpy(rows)] = self._answered(part, rows)
        return scores, len(requests)

    def _requests(self, part: Targets) -> list[Ints]:
        """The rows of a part that are asked together."""
        count = len(part.user)
        if one_by_one(self.stored):
            return list(np.arange(count)[:, None])
        length = np.diff(self.events.start)[part.user]
        most = max(1, MOST_SCORES // max(1, self.k))
        number = np.maximum(np.arange(count) // most, np.cumsum(length) // MOST_ROWS)
        return [np.flatnonzero(number == one) for one in np.unique(number)]

    def _answered(self, part: Targets, rows: Ints) -> torch.Tensor:
        names = _names([self.events.sequences.user_id[u] for u in part.user[rows]])
        given: dict[str, Any] = {"k": self.k}
        batches = [self._history(part, int(row)) for row in rows]
        if one_by_one(self.stored):
            (row,) = rows.tolist()
            given["request_ts"] = stamp(int(part.request_ts[row]))
            session = self._session(part, row, batches[0])
            if session is not None:
                given["request_session_id"] = session
        sent = pa.Table.from_batches(batches).select(self.columns)
        each = np.repeat(np.arange(len(rows)), [batch.num_rows for batch in batches])
        users = pa.array(names, pa.string()).take(pa.array(each))
        sent = sent.add_column(0, "user_id", users)
        sent = sent.replace_schema_metadata({verify_worker.PARAMS: json.dumps(given).encode()})
        return self._read(self.ask(sent), names)

    def _history(self, part: Targets, row: int) -> pa.RecordBatch:
        """All that lies before a target, of unknown items too."""
        assert part.at is not None
        user = int(part.user[row])
        held = self.events.index[self.events.start[user] : part.at[row]]
        return self.raw.rows(user, held - self.events.sequences.start[user])

    def _session(self, part: Targets, row: int, before: pa.RecordBatch) -> str | None:
        """The session that a question under the native rule is asked in; None: silence decides."""
        if self.stored.facts.get("session_rule") != NATIVE or NATIVE not in self.columns:
            return None
        assert part.at is not None
        place = self.events.index[part.at[row]] - self.events.sequences.start[part.user[row]]
        rows = self.raw.rows(int(part.user[row]), np.array([place]))
        own: str | None = rows[NATIVE][0].as_py()
        newest: str | None = (
            before[NATIVE][before.num_rows - 1].as_py() if before.num_rows else None
        )
        if own is None and newest is not None:
            return newest + "\x1f"  # any other session: an event without an id opens one
        return own

    def _read(self, told: pa.Table, names: list[str]) -> torch.Tensor:
        """float64[R, V] from an answer."""
        V = len(self.stored.item_ids)
        scores = torch.full((len(names), V), -torch.inf, dtype=torch.float64)
        error = (told.schema.metadata or {}).get(verify_worker.ERROR)
        if error is None and told["user_id"].to_pylist() != names:
            error = b"the answer's users are not those of the request, in order"
        if error is not None:
            self.refused += len(names)
            self.refusal = self.refusal or error.decode()
            return scores
        lists = told["items"].combine_chunks()
        lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
        pair = lists.flatten()
        item = pair.field("item_id")
        known = self.stored.lookup.get_indexer(item.dictionary.to_pylist())
        column = known[item.indices.to_numpy(zero_copy_only=False)]
        row = np.repeat(np.arange(len(names)), np.diff(lists.offsets.to_numpy()))
        value = pair.field("score").to_numpy(zero_copy_only=False)
        there = column >= 0
        at = torch.from_numpy(row[there]), torch.from_numpy(column[there])
        scores[at] = torch.from_numpy(value[there].copy())
        return scores


class NowQuestions(Questions):
    """Requests for lists at the time of each user's newest event, in its session."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.k = min(self.k, LIST_ITEMS)

    def _session(self, part: Targets, row: int, before: pa.RecordBatch) -> str | None:
        return None


def one_by_one(stored: Stored) -> bool:
    """A request has one time, and so has a question under `known`."""
    return bool(stored.facts["request_time"] == "known")


def _names(users: list[str]) -> list[str]:
    """Who asks: the users' own ids; where one asks again in the same request, the id behind a
    number, because a request has one question of a user."""
    seen: set[str] = set()
    names = []
    for number, user in enumerate(users):
        name = user if user not in seen else f"{number}\x1f{user}"
        seen.add(name)
        names.append(name)
    return names
