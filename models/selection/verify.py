"""Is what is served what was scored? A registered model is asked the questions of its test period.

It is asked through its pyfunc, by raw ids and with the columns of the log
(`models/selection/questions.py`), for its whole vocabulary; so a question's rank is that among all
items, ties counted against the model. The metrics are made by `models/evaluation/evaluate.py` and
compared with those that its training recorded, user by user. The same questions are put to the
stored weights directly, and the lists of both are compared: that tells a fault of serving from
rounding.

Equal means to 1e-6. Another processor, another number of threads or other batches round
differently, and where two scores are all but equal a rank may move by that. So there a user's value
also holds if it lies between those that the served scores give when the targets' own scores are
moved by `ROUNDING` of the row's largest score, down and up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.core import rows as core_rows
from models.core.errors import UserError
from models.core.rows import Bools, Ints, ragged
from models.data.raw_events import RawEvents, raw_events
from models.data.splits import Events, Targets
from models.evaluation import metrics
from models.evaluation.evaluate import KS, Result, evaluate
from models.evaluation.rescore import questions, requests, stored_cut
from models.networks.baselines import Popularity
from models.networks.saved_model import Stored, load
from models.networks.scoring import best, exclude, parts
from models.registry import tracking
from models.registry.register import CHAMPION, REFIT_OF, Registered, find
from models.selection.questions import NowQuestions, Questions, one_by_one, worker
from models.training.run import computes

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from jobs.core.source_file import Source

EQUAL = 1e-6
ROUNDING = {"float32": 1e-5, "bfloat16": 2.0**-6}  # ours: of a row's largest score
LISTED = 10  # so many items of a list are compared


def verify(
    source: Source,
    lake: str,
    alias: str | None = CHAMPION,
    number: int | None = None,
    most: int | None = None,
    most_users: int | None = None,
    seed: int = 0,
    opened: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Ask the version that an alias names (None: the one that is served), or version `number`, and
    compare. Of a refit, the lists alone.

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
    if client.get_model_version(source.name, model.version).tags.get(REFIT_OF) is not None:
        return _lists_alone(client, model, source, lake, most or most_users, seed, opened or worker)
    stored, report, values = _recorded(client, model)
    facts = stored.facts
    events, targets = questions(
        stored, source, lake, facts["table_version"], stored_cut(stored), facts["target"]
    )
    _same_table(model, facts, events)
    chosen = _drawn(targets, most, most_users, seed)
    here = report.get("machine") == computes()
    with (
        # (Its process starts, which takes seconds, while the questions are read.)
        (opened or worker)(model.uri) as ask,
        tempfile.TemporaryDirectory(prefix="sessionmill-") as folder,
    ):
        raw = _raw(source, lake, events, np.unique(targets.user[chosen]), Path(folder))
        chosen = chosen[raw.part[targets.user[chosen]] >= 0]
        if not len(chosen):
            raise UserError(
                f"{model.uri} cannot be verified: none of its {len(targets.user):,} questions can be asked "
                f"({len(raw.runaway):,} users with a runaway session, {len(raw.changed):,} whose "
                "events in silver.sessions are not those of gold.sequences)"
            )
        whole = len(chosen) == len(targets.user)
        served = Questions(stored, source, events, raw, ask)
        compared = _Compared(served, targets.select(chosen), exact=here and whole)
        result = compared.result()
    told = _left_out(raw) | {
        "questions": len(chosen),
        "questions_of_the_test": len(targets.user),
        "users": len(result.users),
        "machine": computes(),
        "scored_on": report.get("machine"),
        "same_machine": here,
    }
    return _named(model, facts) | told | _judged(compared, result, report, values, whole)


def _left_out(raw: RawEvents) -> dict[str, Any]:
    """Whose events could not be asked, and by which sessions."""
    return {
        "left_out": {"runaway": len(raw.runaway), "events_differ": len(raw.changed)},
        "silver_version": raw.version,
        "silver_exact": raw.exact,
    }


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
        "model": model.name,
        "version": model.version,
        "method": facts["method"],
        "mlflow_run_id": model.run_id,
        "target": facts["target"],
        "request_time": facts["request_time"],
        "session_rule": facts.get("session_rule", "gap"),
        "table_version": facts["table_version"],
    }


def _recorded(
    client: MlflowClient, model: Registered
) -> tuple[Stored, dict[str, Any], dict[str, Any]]:
    """A version's weights, what its training reported, and its metrics by user."""
    with tracking.downloaded(client, model.run_id, "trained") as folder:
        stored = load(folder)
    with tracking.downloaded(client, model.run_id, "evaluation") as folder:
        report = tracking.read_json(folder / "result.json")["report"]
        file = "per_user.npz"
        if "last_night" in report:  # (of a backtest: the questions of the night of this model)
            report["metrics"], file = report["last_night"]["metrics"], "per_user_last_night.npz"
        with np.load(folder / file, allow_pickle=False) as arrays:
            values = {name.replace("_at_", "@"): arrays[name] for name in arrays.files}
    return stored, report, values


def _drawn(targets: Targets, most: int | None, most_users: int | None, seed: int) -> Ints:
    """int64[N]: the targets that are asked, all of each user's."""
    if most is not None and most < 1:
        raise UserError(f"--most {most}: use 1 or more")
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
    named = SEQUENCES.app_id(source.name, SESSIONS)
    consumed = DeltaTable(gold, version=events.sequences.version).transaction_version(named)
    items = read_items(rust_uri(ITEMS.path(lake, source.name)), make)
    native = source.sessions.rule != "gap"
    return raw_events(silver, consumed, events.sequences, users, items, folder, make, native)


# -- a refit, from which nothing is held out -------------------------------------------------------


def _lists_alone(
    client: MlflowClient,
    model: Registered,
    source: Source,
    lake: str,
    most: int | None,
    seed: int,
    opened: Callable[[str], Any],
) -> dict[str, Any]:
    """The lists that `score` makes, compared with those that the registered model returns, of users
    drawn by `seed` (None: all)."""
    with tracking.downloaded(client, model.run_id, "trained") as folder:
        stored = load(folder)
    facts = stored.facts
    events, everybody = requests(stored, source, lake, facts["table_version"])
    _same_table(model, facts, events)
    chosen = _drawn(everybody, None, most, seed)
    with (
        opened(model.uri) as ask,
        tempfile.TemporaryDirectory(prefix="sessionmill-") as folder_of_raw,
    ):
        raw = _raw(source, lake, events, np.unique(everybody.user[chosen]), Path(folder_of_raw))
        chosen = chosen[raw.part[everybody.user[chosen]] >= 0]
        if not len(chosen):
            raise UserError(
                f"{model.uri} cannot be verified: none of its {len(everybody.user):,} users has the "
                "same events in silver.sessions and gold.sequences"
            )
        asked = everybody.select(chosen)
        compared = _Compared(NowQuestions(stored, source, events, raw, ask), asked, exact=False)
        length = asked.end - asked.begin
        order = np.argsort(length, kind="stable")
        for part in parts(stored.model, order, length[order]):
            compared.compare(asked.select(part))
    served = compared.questions
    holds = not (compared.lists_wrong or served.refused or (raw.exact and len(raw.changed)))
    return (
        _named(model, facts)
        | _left_out(raw)
        | {
            "refit_of": facts["refit_of"],
            "holds": bool(holds),
            "users": len(asked.user),
            "users_of_the_table": len(everybody.user),
            "lists_differ": compared.lists_differ,
            "lists_wrong": compared.lists_wrong,
            "refused": served.refused,
            "refusal": served.refusal,
            "metrics": {},
        }
    )


def _lists_in_words(told: dict[str, Any]) -> str:
    said = (
        f"models:/{told['model']}/{told['version']} ({told['method']}) is a refit of version "
        f"{told['refit_of']}, from which nothing is held out: {told['users']:,} of its "
        f"{told['users_of_the_table']:,} users' lists were asked through its pyfunc. "
        f"{told['lists_differ']:,} differ from those of the stored weights, {told['lists_wrong']:,} "
        "by more than rounding"
    )
    if told["refused"]:
        said += f"; {told['refused']:,} were refused: {told['refusal']}"
    holds = "What is served is what score writes" if told["holds"] else "THIS DOES NOT HOLD"
    return f"{said}. {holds}."


# -- comparing ------------------------------------------------------------------------------------


@dataclass
class _Compared:
    """The scores that are served against those of the stored weights, a part at a time.

    lower, upper int64[M]: the places of the targets' items if their scores were a rounding error
    higher, lower; `first_*` int64[N] likewise, of what came first in each set.
    """

    questions: Questions
    targets: Targets
    exact: bool
    """Scores must be the same to the last bit: same machine, all questions, the same batches."""
    lists_differ: int = 0
    lists_wrong: int = 0
    lower: Ints = field(init=False)
    upper: Ints = field(init=False)
    first_lower: Ints = field(init=False)
    first_upper: Ints = field(init=False)

    def __post_init__(self) -> None:
        size, count = len(self.targets.item), len(self.targets.user)
        self.lower, self.upper = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.first_lower, self.first_upper = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.exact &= not one_by_one(self.stored)

    @property
    def stored(self) -> Stored:
        return self.questions.stored

    @property
    def usual_rounding(self) -> float:
        """Of a row's largest score, where the batches or the machine are others."""
        return ROUNDING.get(self.stored.config.train.precision, ROUNDING["float32"])

    @property
    def rounding(self) -> float:
        exact = self.exact or isinstance(self.stored.model, Popularity)
        return 0.0 if exact else self.usual_rounding

    def result(self) -> Result:
        """The metrics of the registered model's own scores."""
        popularity = self.stored.popularity.long().numpy()
        return evaluate(self.stored.model, self.targets, popularity=popularity, ask=self.part)

    def part(self, part: Targets, index: Ints) -> torch.Tensor:
        """float64[R, V]: the registered model's scores; -inf for what it does not return."""
        scores = self.compare(part)
        self._bounds(part, index, scores)
        return scores

    def compare(self, part: Targets) -> torch.Tensor:
        """As `part`, and the lists compared with those of the weights themselves."""
        own = self.stored.model.score(part.rows, part.begin, part.end, part.request_ts, part.opens)
        if self.stored.facts["repeat_policy"] == "exclude_seen":
            own = exclude(own, part.rows, part.begin, part.end)
        scores, requests = self.questions.scores(part)
        if requests > 1:
            self.exact = False  # other batches than those that were scored
        self._compare_lists(own.double(), scores)
        return scores

    def _bounds(self, part: Targets, index: Ints, scores: torch.Tensor) -> None:
        """Where the targets' items would be if their scores were rounded otherwise."""
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
        """Count the lists that differ from those of the weights themselves, and those that differ
        by more than rounding."""
        differ = (best(own, LISTED)[0] != best(scores, LISTED)[0]).any(dim=1)
        apart = lists_apart(own, scores, self.questions.k, self.usual_rounding)
        self.lists_differ += int((differ | apart).sum())
        self.lists_wrong += int(apart.sum())


def lists_apart(
    own_RV: torch.Tensor, served_RV: torch.Tensor, k: int, rounding: float
) -> torch.Tensor:
    """bool[R]: whether a list that is served differs from the best k of own scores by more than
    rounding: in a score, in an item that it leaves out, or in its length.

    Args:
        served_RV: -inf for what the list does not have; own_RV: -inf for what it must not have.
        rounding: of a row's largest score.
    """
    by = rounding * _largest(own_RV)
    allowed, listed = torch.isfinite(own_RV), torch.isfinite(served_RV)
    apart = torch.where(allowed & listed, (own_RV - served_RV).abs(), 0.0).amax(dim=1) > by
    last = torch.where(listed, served_RV, torch.inf).amin(dim=1)
    apart |= (allowed & ~listed & (own_RV > (last + by)[:, None])).any(dim=1)
    apart |= (listed & ~allowed).any(dim=1)
    return apart | (listed.sum(dim=1) != allowed.sum(dim=1).clamp(max=k))


def _largest(scores_RV: torch.Tensor) -> torch.Tensor:
    """float64[R]: the largest size of a finite score, 1 at least."""
    finite = torch.where(torch.isfinite(scores_RV), scores_RV.abs(), 0.0)
    return finite.amax(dim=1).clamp(min=1.0)


# -- the verdict ----------------------------------------------------------------------------------


def _judged(
    compared: _Compared,
    result: Result,
    report: dict[str, Any],
    values: dict[str, Any],
    whole: bool,
) -> dict[str, Any]:
    by_user: dict[str, dict[str, Any]] = {}
    served, raw = compared.questions, compared.questions.raw
    wrong = 0
    sets = compared.targets.sets
    bounds = [
        metrics.per_target(place, compared.targets.item_start, KS, first if sets else None)
        for place, first in (
            (compared.upper, compared.first_upper),
            (compared.lower, compared.first_lower),
        )
    ]
    kinds = {"": (result, np.ones(len(compared.targets.user), dtype=bool))}
    for kind, part in result.parts.items():
        opens = compared.targets.new_session
        kinds[f"{kind}."] = part, opens if kind == "first" else ~opens
    for prefix, (part, at) in kinds.items():
        if f"{prefix}user_id" not in values:
            continue
        found = _by_user(compared, prefix, part, at, values, bounds)
        by_user |= found
        wrong += sum(one["users_wrong"] for one in found.values())
    plain = _plain(compared, result, report) if whole else {}
    named = {n for n in values if not n.endswith("user_id")}
    holds = not wrong and not compared.lists_wrong and not served.refused
    holds &= all(one["holds"] for one in plain.values())
    holds &= not (raw.exact and len(raw.changed))
    largest = max((abs(one["difference"]) for one in by_user.values()), default=0.0)
    return {
        "holds": bool(holds),
        "exact": bool(largest <= EQUAL and not compared.lists_differ),
        "lists_differ": compared.lists_differ,
        "lists_wrong": compared.lists_wrong,
        "refused": served.refused,
        "refusal": served.refusal,
        "largest_difference": largest,
        "metrics": by_user | plain,
        "not_recomputed": sorted(named - by_user.keys()),
    }


def _by_user(
    compared: _Compared,
    prefix: str,
    part: Result,
    at: Bools,
    values: dict[str, Any],
    bounds: list[dict[str, core_rows.Floats]],
) -> dict[str, dict[str, Any]]:
    """Each metric's mean, stored and recomputed, and how many users' values differ: at all, and by
    more than rounding explains."""
    places = {user: n for n, user in enumerate(values[f"{prefix}user_id"].tolist())}
    ids = [compared.questions.events.sequences.user_id[u] for u in part.users]
    there = np.array([places.get(user, -1) for user in ids], dtype=np.int64)
    lost = int((there < 0).sum())  # never asked when the model was scored
    user = compared.targets.user[at]
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


def _plain(
    compared: _Compared, result: Result, report: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What is no mean over users: of the lists together, and the loss.

    Judged where the scores must be the same to the last bit; the loss elsewhere to rounding. (A
    training that has not recorded its machine counted equal scores in its lists in another order.)
    """
    found = {}
    for name, now in result.catalogue.items():
        then = report["metrics"].get(name, {}).get("value")
        if then is None or not np.isfinite(now) or compared.questions.refused:
            continue
        if name == "test_loss":
            # (What a model leaves out has no score in the answer, so its loss is another one.)
            if compared.stored.facts["repeat_policy"] == "exclude_seen":
                continue
            most = max(EQUAL, 10 * compared.rounding) * max(1.0, abs(then))
        else:
            most = EQUAL if compared.exact else float("inf")
        found[name] = {
            "stored": then,
            "recomputed": now,
            "difference": now - then,
            "holds": bool(abs(now - then) <= most),
        }
    return found


SHOWN = ("ndcg@10", "hr@10", "recall@10", "mrr@10", "first_item_hr@10")


def in_words(told: dict[str, Any]) -> str:
    """A verification as a person reads it."""
    if "refit_of" in told:
        return _lists_in_words(told)
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
