"""Is what is served what was scored? A registered model is asked the questions of its test period.

It is asked through its pyfunc, by raw ids and with the columns of the log (`models/data/raw_events.py`),
with k = the size of its vocabulary; so a question's rank is that among all items, ties counted
against the model. The metrics are made by `models/evaluation/evaluate.py` and held against those that its
training recorded, user by user. The same questions are put to the stored weights directly, and the
lists of both are compared: that tells a fault of serving from rounding.

Equal means to 1e-6. Another processor, another number of threads or other batches round
differently, and where two scores are all but equal a rank may move by that. So there a user's value
also holds if it lies between those that the served scores give when the targets' own scores are
moved by `ROUNDING` of the row's largest score, down and up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from models.core import rows as core_rows
from models.core.errors import UserError
from models.core.rows import Bools, Ints, ragged
from models.data.raw_events import RawEvents, raw_events
from models.data.splits import Events, Targets, stamp
from models.evaluation import metrics
from models.evaluation.evaluate import KS, Result, evaluate
from models.evaluation.rescore import questions, stored_cut
from models.networks.baselines import Popularity
from models.networks.saved_model import Stored, load
from models.networks.scoring import best, exclude
from models.registry import tracking
from models.registry.register import CHAMPION, Registered, find
from models.selection import verify_worker
from models.serving.recommend import NATIVE
from models.training.run import computes

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from jobs.core.source_file import Source

EQUAL = 1e-6
ROUNDING = {"float32": 1e-5, "bfloat16": 2.0**-6}  # ours: of a row's largest score
LISTED = 10  # so many items of a list are compared
MOST_ROWS, MOST_SCORES = 1_000_000, 3_000_000  # ours: of one request, and of its answer
Ask = Callable[[pa.Table], pa.Table]


def verify(
    source: Source,
    lake: str,
    alias: str = CHAMPION,
    number: int | None = None,
    most: int | None = None,
    most_users: int | None = None,
    seed: int = 0,
    opened: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Ask the version that an alias names, or version `number`, and compare.

    Args:
        most: at most so many questions, of whole users drawn by `seed`; None: all.
        most_users: at most so many users, drawn likewise.
        opened: a context that gives the registered model of a URI as an `Ask`; default: a process
            of its own.

    Raises:
        UserError: there is no such model, or nothing that it could be asked.
    """
    client, _ = tracking.connect(source.name)
    model = find(client, source.name, alias, number)
    stored, report, values = _recorded(client, model)
    facts = stored.facts
    events, targets = questions(
        stored, source, lake, facts["table_version"], stored_cut(stored), facts["target"]
    )
    _same_table(model, facts, events)
    chosen = _drawn(targets, most, most_users, seed)
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        raw = _raw(source, lake, events, np.unique(targets.user[chosen]), Path(folder))
        chosen = chosen[raw.part[targets.user[chosen]] >= 0]
        if not len(chosen):
            raise UserError(
                f"{model.uri}: none of its {len(targets.user):,} questions can be asked "
                f"({len(raw.runaway):,} users with a runaway session, {len(raw.changed):,} whose "
                "events in silver.sessions are not those of gold.sequences)"
            )
        whole = len(chosen) == len(targets.user)
        here = report.get("machine") == computes()
        asking = _Asking(stored, source, events, targets.select(chosen), raw, here and whole)
        with (opened or worker)(model.uri) as ask:
            asking.ask = ask
            result = evaluate(
                stored.model, asking.targets, popularity=stored.popularity.long().numpy(),
                ask=asking.part,
            )  # fmt: skip
    told = {
        "questions": len(chosen), "questions_of_the_test": len(targets.user),
        "users": len(result.users),
        "left_out": {"runaway": len(raw.runaway), "events_differ": len(raw.changed)},
        "silver_version": raw.version, "silver_exact": raw.exact,
        "machine": computes(), "scored_on": report.get("machine"), "same_machine": here,
    }  # fmt: skip
    return _named(model, facts) | told | _judged(asking, result, report, values, whole)


def _same_table(model: Registered, facts: dict[str, Any], events: Events) -> None:
    table = events.sequences
    if table.table_id != facts["table_id"]:
        raise UserError(
            f"{table.path} is not the table that {model.uri} was scored on (table id "
            f"{table.table_id}, then {facts['table_id']}): it has been made anew. Train, compare "
            "and register on the new one"
        )


def _named(model: Registered, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model.name, "version": model.version, "method": facts["method"],
        "mlflow_run_id": model.run_id, "target": facts["target"],
        "request_time": facts["request_time"], "session_rule": facts.get("session_rule", "gap"),
        "table_version": facts["table_version"],
    }  # fmt: skip


def _recorded(
    client: MlflowClient, model: Registered
) -> tuple[Stored, dict[str, Any], dict[str, Any]]:
    """A version's weights, what its training reported, and its metrics by user."""
    with tracking.downloaded(client, model.run_id, "trained") as folder:
        stored = load(folder)
    with tracking.downloaded(client, model.run_id, "evaluation") as folder:
        report = tracking.read_json(folder / "result.json")["report"]
        with np.load(folder / "per_user.npz", allow_pickle=False) as arrays:
            values = {name.replace("_at_", "@"): arrays[name] for name in arrays.files}
    return stored, report, values


def _drawn(targets: Targets, most: int | None, most_users: int | None, seed: int) -> Ints:
    """int64[N]: the targets that are asked, all of each user's."""
    if most is not None and most < 1:
        raise UserError(f"--most {most}: ask at least one question")
    users, count = np.unique(targets.user, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(users))[:most_users]
    if most is not None:
        fits = np.cumsum(count[order]) <= most
        fits[:1] = True  # (one user at least)
        order = order[fits]
    return np.flatnonzero(np.isin(targets.user, users[order]))


def _raw(source: Source, lake: str, events: Events, users: Ints, folder: Path) -> RawEvents:
    from deltalake import DeltaTable

    from jobs.core.tables import ITEMS, SEQUENCES, SESSIONS
    from jobs.lake.filesystem import rust_uri
    from models.data.sequences import read_items

    make = f"python -m jobs run --source {source.name}"
    gold, silver = (rust_uri(one.path(lake, source.name)) for one in (SEQUENCES, SESSIONS))
    named = (
        f"{source.name}/{SEQUENCES.full_name}<-{SESSIONS.full_name}"  # as jobs.delta.Lake.app_id
    )
    consumed = DeltaTable(gold, version=events.sequences.version).transaction_version(named)
    items = read_items(rust_uri(ITEMS.path(lake, source.name)), make)
    return raw_events(silver, consumed, events.sequences, users, items, folder, make)


# -- the registered model -------------------------------------------------------------------------


@contextmanager
def worker(uri: str) -> Iterator[Ask]:
    """The registered model in a process of its own, with the code that it was logged with.

    Raises:
        UserError: the process ended; with what it said last.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["MLFLOW_TRACKING_URI"] = tracking.tracking_uri()
    command = [sys.executable, "-P", str(Path(verify_worker.__file__).absolute()), uri,
               str(torch.get_num_threads())]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=said,
            )  # fmt: skip
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


# -- asking ---------------------------------------------------------------------------------------


@dataclass
class _Asking:
    """Puts the targets to the registered model, a part at a time, and keeps what is to compare.

    lower, upper int64[M]: the places of the targets' items if their scores were a rounding error
    higher, lower; `first_*` int64[N] likewise, of what came first in each set.
    """

    stored: Stored
    source: Source
    events: Events
    targets: Targets
    raw: RawEvents
    exact: bool
    """Scores must be the same to the last bit: same machine, all questions, the same batches."""
    ask: Ask | None = None
    lists_differ: int = 0
    lists_wrong: int = 0
    refused: int = 0
    refusal: str | None = None
    lower: Ints = field(init=False)
    upper: Ints = field(init=False)
    first_lower: Ints = field(init=False)
    first_upper: Ints = field(init=False)
    columns: list[str] = field(init=False)
    pending: list[tuple[Ints, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        size, count = len(self.targets.item), len(self.targets.user)
        self.lower, self.upper = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.first_lower, self.first_upper = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.exact &= not self.one_by_one
        mapped = {*self.source.columns.mapped(), "event_id"}
        if self.source.exposures is not None:
            mapped.add("exposed_with")
        names = self.raw.parts[0].schema.names
        self.columns = [n for n in names if n in mapped or n in self.raw.filled]

    @property
    def one_by_one(self) -> bool:
        """A request has one time, and so has a question under `known`."""
        return bool(self.stored.facts["request_time"] == "known")

    @property
    def rounding(self) -> float:
        if self.exact or isinstance(self.stored.model, Popularity):
            return 0.0
        return ROUNDING.get(self.stored.config.train.precision, ROUNDING["float32"])

    def part(self, part: Targets, index: Ints) -> torch.Tensor:
        """float64[R, V]: the registered model's scores; -inf for what it does not return."""
        own = self.stored.model.score(part.rows, part.begin, part.end, part.request_ts, part.opens)
        if self.stored.facts["repeat_policy"] == "exclude_seen":
            own = exclude(own, part.rows, part.begin, part.end)
        scores = torch.full(own.shape, -torch.inf, dtype=torch.float64)
        some = self._requests(part)
        if len(some) > 1:
            self.exact = False  # other batches than those that were scored
        for rows in some:
            scores[torch.from_numpy(rows)] = self._answered(part, rows)
        self._bounds(part, index, scores)
        self._compare_lists(own.double(), scores)
        return scores

    def _requests(self, part: Targets) -> list[Ints]:
        """The rows of a part that are asked together."""
        count = len(part.user)
        if self.one_by_one:
            return list(np.arange(count)[:, None])
        length = np.diff(self.events.start)[part.user]
        most = max(1, MOST_SCORES // max(1, len(self.stored.item_ids)))
        number = np.maximum(np.arange(count) // most, np.cumsum(length) // MOST_ROWS)
        return [np.flatnonzero(number == one) for one in np.unique(number)]

    def _answered(self, part: Targets, rows: Ints) -> torch.Tensor:
        assert self.ask is not None
        names = _names([self.events.sequences.user_id[u] for u in part.user[rows]])
        given: dict[str, Any] = {"k": len(self.stored.item_ids)}
        batches = [self._history(part, int(row)) for row in rows]
        if self.one_by_one:
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
        return self._scores(self.ask(sent), names)

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

    def _scores(self, told: pa.Table, names: list[str]) -> torch.Tensor:
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

    def _bounds(self, part: Targets, index: Ints, scores: torch.Tensor) -> None:
        """Where the targets' items would stand if their scores were rounded otherwise."""
        targets, size = self.targets, np.diff(part.item_start)
        where, row = ragged(targets.item_start[:-1][index], size)
        by = self.rounding * _largest(scores)
        known = part.item > 0
        at = torch.from_numpy(row[known]), torch.from_numpy(part.item[known].astype(np.int64) - 1)
        alone = np.arange(len(index) + 1), part.item[part.item_start[:-1]]
        for sign, place, first in (
            (1, self.lower, self.first_lower),
            (-1, self.upper, self.first_upper),
        ):
            moved = scores.clone()
            moved[at] = scores[at] + sign * by[at[0]]
            place[where] = metrics.ranks(moved, part.item_start, part.item)
            if targets.sets:
                first[index] = metrics.ranks(moved, *alone)

    def _compare_lists(self, own: torch.Tensor, scores: torch.Tensor) -> None:
        """Count the lists that differ from those of the weights themselves, and those whose scores
        differ by more than rounding."""
        differ = (best(own, LISTED)[0] != best(scores, LISTED)[0]).any(dim=1)
        by = ROUNDING.get(self.stored.config.train.precision, ROUNDING["float32"]) * _largest(own)
        finite = torch.isfinite(own) & torch.isfinite(scores)
        apart = torch.where(finite, (own - scores).abs(), 0.0).amax(dim=1) > by
        apart |= (torch.isfinite(own) != torch.isfinite(scores)).any(dim=1)
        self.lists_differ += int((differ | apart).sum())
        self.lists_wrong += int(apart.sum())


def _largest(scores_RV: torch.Tensor) -> torch.Tensor:
    """float64[R]: the largest size of a finite score, 1 at least."""
    finite = torch.where(torch.isfinite(scores_RV), scores_RV.abs(), 0.0)
    return finite.amax(dim=1).clamp(min=1.0)


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


# -- the verdict ----------------------------------------------------------------------------------


def _judged(
    asking: _Asking, result: Result, report: dict[str, Any], values: dict[str, Any], whole: bool
) -> dict[str, Any]:
    compared: dict[str, dict[str, Any]] = {}
    wrong = 0
    sets = asking.targets.sets
    bounds = [
        metrics.per_target(place, asking.targets.item_start, KS, first if sets else None)
        for place, first in (
            (asking.upper, asking.first_upper),
            (asking.lower, asking.first_lower),
        )
    ]
    kinds = {"": (result, np.ones(len(asking.targets.user), dtype=bool))}
    for kind, part in result.parts.items():
        opens = asking.targets.new_session
        kinds[f"{kind}."] = part, opens if kind == "first" else ~opens
    for prefix, (part, at) in kinds.items():
        if f"{prefix}user_id" not in values:
            continue
        found = _by_user(asking, prefix, part, at, values, bounds)
        compared |= found
        wrong += sum(one["users_wrong"] for one in found.values())
    plain = _plain(asking, result, report) if whole else {}
    named = {n for n in values if not n.endswith("user_id")}
    holds = not wrong and not asking.lists_wrong and not asking.refused
    holds &= all(one["holds"] for one in plain.values())
    holds &= not (asking.raw.exact and len(asking.raw.changed))
    largest = max((abs(one["difference"]) for one in compared.values()), default=0.0)
    return {
        "holds": bool(holds), "exact": bool(largest <= EQUAL and not asking.lists_differ),
        "lists_differ": asking.lists_differ, "lists_wrong": asking.lists_wrong,
        "refused": asking.refused, "refusal": asking.refusal,
        "largest_difference": largest, "metrics": compared | plain,
        "not_recomputed": sorted(named - compared.keys()),
    }  # fmt: skip


def _by_user(
    asking: _Asking, prefix: str, part: Result, at: Bools, values: dict[str, Any],
    bounds: list[dict[str, core_rows.Floats]],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Each metric's mean, stored and recomputed, and how many users' values differ: at all, and by
    more than rounding explains."""
    places = {user: n for n, user in enumerate(values[f"{prefix}user_id"].tolist())}
    ids = [asking.events.sequences.user_id[u] for u in part.users]
    there = np.array([places.get(user, -1) for user in ids], dtype=np.int64)
    lost = int((there < 0).sum())  # never asked when the model was scored
    user = asking.targets.user[at]
    low, high = (metrics.per_user({n: v[at] for n, v in b.items()}, user)[1] for b in bounds)
    found = {}
    for name, value in part.values.items():
        stored = values.get(f"{prefix}{name}")
        if stored is None:
            continue
        then, now, known = stored[there[there >= 0]], value, there >= 0
        differs = np.abs(then - now[known]) > EQUAL
        within = (then >= low[name][known] - EQUAL) & (then <= high[name][known] + EQUAL)
        found[f"{prefix}{name}"] = {
            "stored": float(then.mean()) if len(then) else None,
            "recomputed": float(now.mean()),
            "difference": float(now[known].mean() - then.mean()) if len(then) else 0.0,
            "users_differ": int(differs.sum()) + lost,
            "users_wrong": int((differs & ~within).sum()) + lost,
        }
    return found


def _plain(asking: _Asking, result: Result, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is no mean over users: of the lists together, and the loss.

    Judged where the scores must be the same to the last bit; the loss elsewhere to rounding. (A
    training that has not recorded its machine counted equal scores in its lists in another order.)
    """
    found = {}
    for name, now in result.catalogue.items():
        then = report["metrics"].get(name, {}).get("value")
        if then is None or not np.isfinite(now) or asking.refused:
            continue
        if name == "test_loss":
            # (What a model leaves out has no score in the answer, so its loss is another one.)
            if asking.stored.facts["repeat_policy"] == "exclude_seen":
                continue
            most = max(EQUAL, 10 * asking.rounding) * max(1.0, abs(then))
        else:
            most = EQUAL if asking.exact else float("inf")
        found[name] = {
            "stored": then, "recomputed": now, "difference": now - then,
            "holds": bool(abs(now - then) <= most),
        }  # fmt: skip
    return found


SHOWN = ("ndcg@10", "hr@10", "recall@10", "mrr@10", "first_item_hr@10")


def in_words(told: dict[str, Any]) -> str:
    """A verification as a person reads it."""
    lines = [
        f"models:/{told['model']}/{told['version']} ({told['method']}) was asked "
        f"{told['questions']:,} of the {told['questions_of_the_test']:,} questions of its test "
        f"period, of {told['users']:,} users, through its pyfunc."
    ]
    left = told["left_out"]
    if left["runaway"]:
        lines.append(f"Left out: {left['runaway']:,} users with a runaway session.")
    if left["events_differ"]:
        lines.append(
            f"Left out: {left['events_differ']:,} users whose events in silver.sessions version "
            f"{told['silver_version']} are not those of gold.sequences version "
            f"{told['table_version']}."
        )
    for name in SHOWN:
        if told["metrics"].get(name, {}).get("stored") is not None:
            one = told["metrics"][name]
            lines.append(
                f"{name}: stored {one['stored']:.6f}, served {one['recomputed']:.6f}, difference "
                f"{one['difference']:+.1e}; {one['users_differ']:,} users differ, "
                f"{one['users_wrong']:,} by more than rounding."
            )
    lines += [
        f"{name}: stored {one['stored']:.6f}, served {one['recomputed']:.6f}. This does not hold."
        for name, one in told["metrics"].items()
        if not one.get("holds", True)
    ]
    lines.append(
        f"{told['lists_differ']:,} lists differ from those of the stored weights, "
        f"{told['lists_wrong']:,} by more than rounding."
    )
    if told["refused"]:
        lines.append(f"{told['refused']:,} questions were refused: {told['refusal']}")
    if not told["same_machine"]:
        lines.append(
            "It was scored on another machine, or with another number of threads: values are "
            "compared within rounding."
        )
    verdict = "What is served is what was scored" if told["holds"] else "THIS DOES NOT HOLD"
    how = "to 1e-6" if told["exact"] else "within rounding"
    lines.append(f"{verdict}, {how}." if told["holds"] else f"{verdict}.")
    return "\n".join(lines)
