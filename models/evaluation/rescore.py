"""A stored model scored again, on a version of `gold.sequences`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jobs.core.errors import counted
from models.core.environment import Say
from models.core.errors import UserError
from models.core.rows import Ints, Target
from models.data.load import prepared
from models.data.nights import AGES, last_night
from models.data.sequences import cache_folder
from models.data.splits import (
    TEST,
    Cut,
    Events,
    Targets,
    describe,
    known_rows,
    periods,
    targets,
    vocabulary_of,
)
from models.evaluation.evaluate import Result, evaluate
from models.networks.saved_model import Stored, load
from models.registry import tracking

if TYPE_CHECKING:
    from jobs.core.source_file import Source

SHOWN = ("ndcg@10", "hr@10", "recall@10", "mrr@10", "first_item_hr@10")


def rescored(
    stored: Stored, source: Source, lake: str, version: int | None, cut: Cut, target: str
) -> tuple[int, list[str], Result]:
    """A stored model's score on the test period of a cut of a table version (None: the newest):
    the version, the users that it was evaluated on, and the result."""
    events, asked = questions(stored, source, lake, version, cut, target)
    result = evaluate(
        stored.model,
        asked,
        repeat_policy=stored.facts["repeat_policy"],
        popularity=stored.popularity.long().numpy(),
    )
    sequences = events.sequences
    return sequences.version, [sequences.user_id[u] for u in result.users], result


def questions(
    stored: Stored, source: Source, lake: str, version: int | None, cut: Cut, target: str
) -> tuple[Events, Targets]:
    """What a stored model is asked in the test period of a cut of a table version (None: the
    newest), and the events that it is evaluated on."""
    _refuse_what_was_taught(stored, cut)
    events, vocabulary = _as_told(stored, source, lake, version)
    asked = targets(events, periods(events, cut), TEST, vocabulary, cast(Target, target))
    return events, asked


def requests(
    stored: Stored, source: Source, lake: str, version: int | None
) -> tuple[Events, Targets]:
    """What `score` asks a stored model of every user with a known item, at the time of their newest
    event; and the events of the table version. Nothing is known of what follows: the targets have
    no item."""
    events, vocabulary = _as_told(stored, source, lake, version)
    rows, before, _ = known_rows(events, vocabulary)
    begin, end = before[events.start[:-1]], before[events.start[1:]]
    user = np.flatnonzero(end > begin)
    begin, end, none = begin[user], end[user], np.zeros(len(user), dtype=bool)
    nothing = np.zeros(len(user) + 1, dtype=np.int64)
    asked = Targets(
        rows, user, begin, end, rows.ts[end - 1], none, none, nothing, nothing[:0], {},
        at=events.start[user + 1],
    )  # fmt: skip
    return events, asked


def _as_told(stored: Stored, source: Source, lake: str, version: int | None) -> tuple[Events, Ints]:
    """The events of a table version as the model gets them, and the model's vocabulary in it."""
    from jobs.core.tables import ITEMS, SEQUENCES
    from models.data.sequences import open_sequences, read_items

    make = f"python -m jobs run --source {source.name}"
    path = SEQUENCES.path(lake, source.name)
    sequences = open_sequences(path, version, cache_folder(lake, source.name), make)
    events = prepared(Events.of(sequences), stored.facts.get("preprocess", "gold"))
    index, names = read_items(ITEMS.path(lake, source.name), make)
    return events, vocabulary_of(stored.item_ids, index, names)


def _refuse_what_was_taught(stored: Stored, cut: Cut) -> None:
    """Raises:
    UserError: the model is a refit, and the test period begins before it ends what it was trained on.
    """
    until = stored.facts.get("trained_until")
    if until is None:
        return
    taught = parse_ts(until)
    assert taught is not None
    if cut.test_from is None or cut.test_from <= taught:
        raise UserError(
            f"this model is a refit of version {stored.facts['refit_of']}, trained on everything until "
            f"{until}: nothing before that is held out from it. The scores of its recipe are those of "
            f"version {stored.facts['refit_of']}"
        )


def stored_cut(stored: Stored) -> Cut:
    """The cut that a model was trained on; of a backtest its last night, before which the model that
    is kept was trained."""
    cut = stored.facts["cut"]
    whole = Cut(
        split=cut["split"],
        valid_from=parse_ts(cut["valid_from"]),
        test_from=parse_ts(cut["test_from"]),
        train_until=cut.get("train_until", "validation"),
        test_until=parse_ts(cut.get("test_until")),
        nights=cut.get("nights"),
    )
    return last_night(whole) if whole.split == "nightly" else whole


def score_again(
    *, source: Source, lake: str, run_id: str, version: int | None, say: Say = print
) -> dict[str, Any]:
    """`evaluate`: a stored run's model on its own cut, at its own table version or another one."""
    client, _ = tracking.connect(source.name)
    with tracking.downloaded(client, run_id, "trained") as folder:
        stored = load(folder)
    facts = stored.facts
    if facts["source"] != source.name:
        raise UserError(
            f"run {run_id} is of source {facts['source']!r}, not {source.name!r}: name that --source"
        )
    began = time.perf_counter()
    at = facts["table_version"] if version is None else version
    cut = stored_cut(stored)
    _, _, result = rescored(stored, source, lake, at, cut, facts["target"])
    report = {
        "method": facts["method"],
        "source": source.name,
        "mlflow_run_id": run_id,
        "table_version": at,
        "cut": describe(cut),
        "target": facts["target"],
        "metrics": result.summary() | result.plain(),
        "counts": result.counts,
        "seconds": round(time.perf_counter() - began, 2),
    }
    say(describe_report(report))
    return report


def describe_report(report: dict[str, Any]) -> str:
    """The result of a run as a paragraph."""
    scores = ", ".join(
        f"{name} {report['metrics'][name]['value']:.4f} "
        f"[{report['metrics'][name]['low']:.4f}, {report['metrics'][name]['high']:.4f}]"
        for name in SHOWN
        if name in report["metrics"]
    )
    counts = report["counts"]
    text = (
        f"{report['method']}, {report['target'].replace('_', ' ')}, full ranking, gold.sequences "
        f"version {report['table_version']}: {scores} over {counts['users']:,} users and "
        f"{counts['targets']:,} targets ({100 * counts['unseen_share']:.1f} % of the items unseen "
        f"in training; {counts['users_without_history']:,} users without history left out"
    )
    if counts.get("first_of_a_session") in (0, counts["targets"]):
        text += (
            "; each is inside a session" if not counts["first_of_a_session"] else "; each opens one"
        )
    if counts.get("sampled_short"):
        text += (
            f"; for {counts['sampled_short']:,} of them there were fewer unseen items than --sampled "
            "asks for: lists of what there is"
        )
    text += ")"
    if "by_age" in report:
        text += f"; by age of the item: {ages_in_words(report['by_age'])}"
    if "num_params" in report:
        text += (
            f". {report['num_params']:,} parameters, {report['num_params_added']:,} added "
            f"({report['params_added_pct']:.2f} %); {_epochs(report)}"
            f"{report['seconds']:.0f} s, {report['peak_rss_mb']:,.0f} MB"
        )
    return text + f". MLflow run {report['mlflow_run_id']}"


def _epochs(report: dict[str, Any]) -> str:
    """Empty for a method that counts: it has no epochs."""
    if not report["epochs"]:
        return ""
    return (
        f"{counted(report['epochs'], 'epoch')}, best {report['best_epoch']}, "
        f"{report['events_per_second']:,.0f} events/s, "
    )


def ages_in_words(by_age: dict[str, Any]) -> str:
    """`first seen that night 0.0000 (12 targets), …`, NDCG@10."""
    return ", ".join(
        f"{AGES.get(age, age)} {part['metrics']['ndcg@10']['value']:.4f} "
        f"({part['counts']['targets']:,} targets)"
        for age, part in by_age.items()
        if part["counts"]["targets"]
    )


def parse_ts(text: str | None) -> int | None:
    """Microseconds of an ISO 8601 time (UTC where it names no zone), None for None."""
    from datetime import UTC, datetime, timedelta

    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"{text!r} is not a time: write 2017-10-01 or 2017-10-01T12:00:00Z"
        ) from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
