"""What `train` does around the arithmetic: read, record, keep, print."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from models.core import process_group
from models.core.config import EACH_NIGHT, Config
from models.core.environment import Say, code_version, peak_rss_mb
from models.core.errors import UserError
from models.core.process_group import ALONE, Team
from models.core.rows import EXPOSED, Ints, Target
from models.data.load import Data, load_data
from models.data.paper_a import gap_us, same_events
from models.data.sequences import cache_folder
from models.data.splits import (
    TEST,
    Filters,
    Targets,
    describe,
    targets,
    users_share,
)
from models.evaluation.evaluate import Result, Sampled, evaluate
from models.evaluation.rescore import describe_report
from models.networks.baselines import Popularity
from models.networks.methods import count_parameters, parse
from models.networks.saved_model import Stored, save
from models.registry import tracking
from models.registry.recipes import Recipe
from models.training.checkpoints import Checkpoints
from models.training.fit import Fitted, fit
from models.training.options import split_of
from models.training.sides import lists_catalogue, silent, with_sides

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from jobs.core.source_file import Source


LOGGED = (  # of a report, as metrics
    "num_params", "num_params_added", "params_added_pct", "epochs", "best_epoch", "seconds",
    "train_s", "eval_s", "events_per_second", "peak_rss_mb",
)  # fmt: skip
EachEpoch = Callable[[int, dict[str, list[float]]], None]


@contextmanager
def recorded(
    client: MlflowClient, experiment: str, name: str, tags: dict[str, str], earlier: str | None
) -> Iterator[str]:
    """A run that ends FINISHED, or FAILED where the block does not end; `earlier` goes on if it
    is there and has not finished."""
    run_id = earlier if earlier and tracking.reopened(client, earlier) else None
    if run_id is None:
        run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
    try:
        yield run_id
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One training as it is asked for.

    version: of `gold.sequences`; None: the newest. split: None: what `preprocess`, the source file or
    the log goes with. nights, each_night: of `--split nightly`; None: by the log, and from scratch.
    train_until: the period before which training rows end; None: the source file's.
    valid_from, test_from: where the periods begin, microseconds since 1970; None: by the data.
    variant: names it among trainings of the same method in a comparison. checkpoint_s: seconds
    between checkpoints. sampled: how many items to draw for `sampled_…`, 0 for none. asked_for
    (a tag): by what options it was asked for, so that a grid knows its own. recipe: what `tune`
    found, where the configuration has its settings.
    """

    source: Source
    lake: str
    config: Config
    version: int | None = None
    split: str | None = None
    valid_from: int | None = None
    test_from: int | None = None
    train_until: str | None = None
    nights: int | None = None
    each_night: str | None = None
    preprocess: str = "gold"
    comparison: str | None = None
    variant: str | None = None
    device: str = "cpu"
    checkpoint_s: float = 60.0
    sampled: int = 0
    asked_for: str | None = None
    recipe: Recipe | None = None

    def check(self) -> None:
        """Raises:
        UserError: a number out of its range, or a name that MLflow does not take.
        """
        if self.sampled < 0:
            raise UserError(
                f"--sampled {self.sampled}: use the number of items to draw, 0 for none"
            )
        if not 0 <= self.checkpoint_s < math.inf:
            raise UserError(
                f"--checkpoint-s {self.checkpoint_s}: use a number of seconds, 0 or more"
            )
        for named in (self.comparison, self.variant):
            if named is not None:
                tracking.check_name(named)


@dataclass(frozen=True)
class Learnt:
    """What a training learns from, and nothing of what it is scored on; the configuration says
    what the data decide. facts: what makes runs comparable."""

    config: Config
    data: Data
    facts: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What a training begins with, read and checked; the configuration says what the data decide.

    targets: of the test period. facts: what makes runs comparable. called: the method's name in a
    comparison.
    """

    config: Config
    data: Data
    targets: Targets
    facts: dict[str, Any]
    called: str
    popularity: Ints  # int64[V]: positive training events of each item


@dataclass(frozen=True)
class Outcome:
    """A fitted model and its score on the test period.

    by_night: what was seen in each test night, where there are several; then `last` is the score of
    the last one, whose model `fitted` has.
    """

    fitted: Fitted
    result: Result
    eval_s: float
    by_night: list[dict[str, Any]] = field(default_factory=list)
    last: Result | None = None


@dataclass(frozen=True)
class Work:
    """How a training is done: where it computes, and what it tells of itself."""

    say: Say
    device: str = "cpu"
    keep: Checkpoints | None = None
    team: Team = ALONE
    each_epoch: EachEpoch | None = None


def train(
    request: Request,
    say: Say = print,
    prepare: Callable[[Request, Say], Prepared] | None = None,
    judge: Callable[[Request, Prepared, Work], Outcome] | None = None,
) -> dict[str, Any] | None:
    """Train one method, score it on the test period, record everything in MLflow.

    `prepare` and `judge` do it in another way (`models/training/nightly.py`). A training that was killed continues from its last checkpoint, in the same MLflow run, when the
    same is asked for again. Under torchrun the first process records and answers; others: None.
    """
    began = time.perf_counter()
    request.check()
    team, device = process_group.start(request.device)
    if not team.is_main_process:
        say = silent
    prepared = (prepare or _prepare)(request, say)
    keep = checkpoints_of(request, prepared, team)

    def work(mine: bool, each_epoch: EachEpoch | None = None) -> Outcome:
        use = keep if team.each(torch.tensor([int(mine)]))[0] else None
        how = Work(say, device, use, team, each_epoch)
        return (judge or _judged)(request, prepared, how)

    try:
        if not team.is_main_process:
            work(False)
            return None
        with _tracked(request, prepared, keep, say) as run:
            outcome = work(run.mine, run.curves.log)
            run.curves.finish(outcome.fitted.curves)
            report = _report(prepared, outcome, run.run_id, device)
            report["seconds"] = round(time.perf_counter() - began, 2)
            report["processes"] = team.size
            report["tuning"] = request.recipe.origin if request.recipe else None
            _keep(run, prepared, outcome, report)
    finally:
        process_group.stop()
    say(describe_report(report))
    return report


def _judged(request: Request, prepared: Prepared, how: Work) -> Outcome:
    """Trained once, and scored on the one test period."""
    data, config = prepared.data, prepared.config
    fitted = fit(config, data, how.say, how.device, how.keep, how.team, how.each_epoch)
    return scored(fitted, prepared, request.sampled, how.team)


def read(request: Request, say: Say) -> Learnt:
    """The tables, cut and filtered, and the configuration that fits them."""
    source, config = request.source, request.config
    filters = Filters(**source.filters.model_dump())
    data = load_data(
        lake=request.lake,
        source=source.name,
        filters=filters,
        version=request.version,
        split=split_of(
            request.split,
            request.preprocess,
            pinned=request.valid_from is not None or request.test_from is not None,
            nightly=request.nights is not None or request.each_night is not None,
            by_source=source.training.split,
        ),
        valid_from=request.valid_from,
        test_from=request.test_from,
        preprocess=request.preprocess,
        train_until=request.train_until or _until(request),
        nights=request.nights,
        listed=lists_catalogue(config, source),
    )
    config, data = fitted_to(request, data, say)
    facts = facts_of(source, data, config, filters, request.preprocess)
    if data.cut.split == "nightly":
        facts["each_night"] = request.each_night or EACH_NIGHT[0]
    elif request.each_night is not None:
        raise UserError(
            f"--each-night {request.each_night} is for --split nightly, and the split is "
            f"{data.cut.split}: leave it out"
        )
    _announce(config, data, source.name, say)
    return Learnt(config, data, facts)


def fitted_to(request: Request, data: Data, say: Say) -> tuple[Config, Data]:
    """The configuration that the data decide, and what it takes of them."""
    config = request.config
    data = _share_of(data, config.train.data_share)
    origin = int(data.training.rows.ts.min())
    config = replace(config, model=replace(config.model, time_origin_us=origin))
    return with_sides(config, data, request.source, request.lake, say)


def _prepare(request: Request, say: Say) -> Prepared:
    learnt = read(request, say)
    config, data, facts = learnt.config, learnt.data, learnt.facts
    if data.cut.split == "nightly":
        raise ValueError("models.training.nightly trains under --split nightly: a model a night")
    if request.recipe is not None:
        request.recipe.check_cut(facts["cut"], data.sequences.version)
    asked = targets(
        data.events, data.period, TEST, data.training.vocabulary, cast(Target, config.train.target)
    )
    if not len(asked.user):
        raise UserError(no_target(data, config.train.target, asked.left_out))
    return prepared_of(request, config, data, asked, facts)


def prepared_of(
    request: Request, config: Config, data: Data, asked: Targets, facts: dict[str, Any]
) -> Prepared:
    """What is trained on `data` and asked these targets."""
    item = data.training.rows.item[data.training.rows.positive]
    popularity = np.bincount(item, minlength=len(data.item_ids) + 1)[1:]
    called = tracking.display_name(config.method, request.variant)
    return Prepared(config, data, asked, facts, called, popularity)


def _until(request: Request) -> str:
    """The source's; what the papers did where a paper's preparation is asked for."""
    return (
        "validation"
        if same_events(request.preprocess) != "gold"
        else request.source.training.train_until
    )


def _share_of(data: Data, share: float) -> Data:
    if share >= 1:
        return data
    return replace(
        data,
        training=users_share(data.training, data.sequences.user_id, share),
        selection=None if data.selection is None else _share_of(data.selection, share),
    )


def _announce(config: Config, data: Data, source: str, say: Say) -> None:
    rows, left = data.training.rows, data.training.counts
    say(
        f"{config.method} on {source}, gold.sequences version {data.sequences.version}: "
        f"{len(rows.item):,} training events of {len(data.training.user):,} users, "
        f"{len(data.item_ids):,} items (before filters {left['before the cut']['events']:,} events)"
    )
    if rows.feedback is not None and "fb" in parse(config.method)[1]:
        shown = int((rows.feedback == EXPOSED).sum())
        if shown:
            say(
                f"{shown:,} of these events are exposures themselves ([feedback] exposed): a "
                "next-item model reads them as events, whatever --exposures says"
            )


def checkpoints_of(request: Request, prepared: Prepared, team: Team) -> Checkpoints:
    """In a folder named after all that a training's outcome follows from."""
    config, facts, called = prepared.config, prepared.facts, prepared.called
    key = [config.as_dict(), facts, request.comparison, called, team.size]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder(request.lake, request.source.name) / "training" / name
    return Checkpoints(folder, request.checkpoint_s)


def scored(fitted: Fitted, prepared: Prepared, sampled: int, team: Team, **how: Any) -> Outcome:
    """A model's score on what is asked; `how`: more arguments of `evaluate`."""
    began = time.perf_counter()
    popularity = prepared.popularity
    result = evaluate(
        fitted.model,
        prepared.targets,
        repeat_policy=prepared.config.model.repeat_policy,
        team=team,
        popularity=popularity,
        sampled=[Sampled(sampled, by, popularity) for by in ("random", "popular") if sampled],
        **how,
    )
    return Outcome(fitted, result, time.perf_counter() - began)


@dataclass(frozen=True)
class Tracked:
    """The MLflow run of a training. mine: this process has the checkpoints to itself."""

    client: MlflowClient
    run_id: str
    curves: tracking.Curves
    mine: bool


@contextmanager
def _tracked(
    request: Request, prepared: Prepared, keep: Checkpoints, say: Say
) -> Iterator[Tracked]:
    """The run in which a training is recorded, with its parameters and its table; an earlier one
    goes on. Where the block ends well, so does the run, and its checkpoints are removed."""
    config, sequences = prepared.config, prepared.data.sequences
    client, experiment = tracking.connect(request.source.name)
    title = f"{prepared.called} seed {config.train.seed}"
    tags = _run_tags(request, prepared)
    with keep.alone() as mine:
        if not mine:
            say(f"the same training is running ({keep.folder}): this one keeps no checkpoints")
        earlier = keep.noted().get("mlflow_run_id") if mine else None
        with recorded(client, experiment, title, tags, earlier) as run_id:
            if mine:
                keep.note(mlflow_run_id=run_id)
            params = flat({**config.as_dict(), "data": prepared.facts})
            if request.recipe is not None:
                params |= flat({"tuning": request.recipe.origin})
            for line in not_comparable(client, experiment, request.comparison, params):
                say(line)
            tracking.log_values(client, run_id, params=params)
            tracking.log_table(
                client, run_id, sequences.path, sequences.version, sequences.table_id
            )
            yield Tracked(client, run_id, tracking.Curves(client, run_id, say), mine)
        if mine:
            keep.remove()


ASKED = ("data.table_", "data.cut.", "data.target", "data.request_time", "data.repeat_policy")
"""Beginnings of the parameters in which the trainings of a comparison agree."""


def not_comparable(
    client: MlflowClient, experiment: str, comparison: str | None, params: dict[str, Any]
) -> list[str]:
    """What to say, before hours are spent, of a training that cannot be compared with one that its
    comparison has."""
    found = (
        tracking.runs(client, experiment, kind="train", comparison=comparison) if comparison else []
    )
    mine = {name: str(value) for name, value in params.items() if name.startswith(ASKED)}
    others = [
        {name: one.data.params[name] for name in mine if name in one.data.params} for one in found
    ]
    there = next((one for one in others if one.items() - mine.items()), None)
    if there is None:
        return []
    apart = [
        f"{name.removeprefix('data.')} {value} and here {mine[name]}"
        for name, value in there.items()
        if value != mine[name]
    ]
    return [
        f"warning: this training cannot be compared with those that comparison {comparison!r} has: "
        f"{', '.join(apart)}. Stop it (Ctrl-C), and give the same options, or another --comparison"
    ]


def _run_tags(request: Request, prepared: Prepared) -> dict[str, str]:
    tags = {
        tracking.KIND: "train",
        "method": prepared.called,
        "seed": str(prepared.config.train.seed),
        "table_version": str(prepared.data.sequences.version),
    }
    if request.comparison:
        tags[tracking.COMPARISON] = request.comparison
    if request.asked_for:
        tags[tracking.ASKED_FOR] = request.asked_for
    if request.recipe is not None:
        tags[tracking.TUNING] = request.recipe.run_id
    return tags | code_tags()


def code_tags() -> dict[str, str]:
    """MLflow's tag of the commit that runs, if it is known."""
    commit = code_version()
    return {"mlflow.source.git.commit": commit} if commit else {}


def no_target(data: Data, target: str, left_out: dict[str, int]) -> str:
    rows, remedy = data.training.rows, "load more days"
    if not rows.positive.any():
        remedy = (
            f"there are {len(rows.item):,} training events. None of them is positive: look at "
            "[feedback] in the source file"
        )
    elif data.cut.split == "temporal":
        remedy += ", or move the cut with --valid-from and --test-from"
    elif target == "next_session" and data.cut.split == "last_item":
        remedy = "a last item is a session only where it is alone in it: --split last_session"
    return (
        f"the test period of {data.sequences.path} under --split {data.cut.split} has no target "
        f"({target.replace('_', ' ')}) of a user with a history ({left_out}): {remedy}"
    )


def facts_of(
    source: Source, data: Data, config: Config, filters: Filters, preprocess: str
) -> dict[str, Any]:
    """What makes runs comparable, and what serving must know; stored with the model."""
    again = gap_us(preprocess)
    return {
        "preprocess": preprocess,
        "method": config.method,
        "source": source.name,
        "table": "gold.sequences",
        "table_version": data.sequences.version,
        "table_id": data.sequences.table_id,
        "cut": describe(data.cut),
        "target": config.train.target,
        "request_time": config.model.request_time,
        "repeat_policy": config.model.repeat_policy,
        "filters": asdict(filters),
        "attributes_version": None if data.side is None else data.side.version,
        "session_rule": source.sessions.rule if again is None else "gap",
        "gap_us": source.sessions.gap_us if again is None else again,
        **(more_rules(source) if again is None else {}),
        "feedback": source.feedback.model_dump(),
    }


def more_rules(source: Source) -> dict[str, Any]:
    """What else ends sessions, where something does: models of earlier versions have no such key."""
    more = source.sessions.more_rules()
    if "on_max_hours" in more:
        more["max_session_us"] = source.sessions.max_session_us
    return {"sessions": more} if more else {}


def _report(prepared: Prepared, outcome: Outcome, run_id: str, device: str) -> dict[str, Any]:
    config, data, facts = prepared.config, prepared.data, prepared.facts
    fitted, result = outcome.fitted, outcome.result
    counted = count_parameters(len(data.item_ids), config)
    return {
        "method": prepared.called,
        "seed": config.train.seed,
        "source": facts["source"],
        "num_params": counted["num_params"],
        "num_params_added": counted["num_params_added"],
        "params_added_pct": counted["params_added_pct"],
        "metrics": result.summary() | result.plain(),
        "by_target": {
            kind: {"metrics": part.summary(), "counts": part.counts}
            for kind, part in result.parts.items()
        },
        **_by_age(result),
        **_by_night(outcome),
        "validation_ndcg@10": fitted.validation,
        "counts": result.counts,
        "filters": data.training.counts,
        "precision": fitted.precision,
        "epochs": fitted.epochs,
        "best_epoch": fitted.best_epoch,
        "events_per_second": round(fitted.events_per_second, 1),
        "train_s": round(fitted.seconds, 2),
        "eval_s": round(outcome.eval_s, 2),
        "peak_rss_mb": peak_rss_mb(),
        "items": len(data.item_ids),
        "catalogue": data.side is not None,
        "table_version": data.sequences.version,
        "cut": facts["cut"],
        "target": facts["target"],
        "mlflow_run_id": run_id,
        "machine": computes(device),
    }


def _by_age(result: Result) -> dict[str, Any]:
    found = {
        age: {"metrics": part.summary(), "counts": part.counts} for age, part in result.ages.items()
    }
    return {"by_age": found} if found else {}


def _by_night(outcome: Outcome) -> dict[str, Any]:
    """Each night, and the metrics of the last one, which `verify` recomputes."""
    if outcome.last is None:
        return {}
    last = {**outcome.by_night[-1], "metrics": outcome.last.summary() | outcome.last.plain()}
    return {"by_night": outcome.by_night, "last_night": last}


def computes(device: str = "cpu") -> dict[str, Any]:
    """What rounding depends on: the same gives the same scores to the last bit."""
    from models.core.environment import machine

    names = ("processor", "cpu_capability", "torch")
    here = {name: value for name, value in machine().items() if name in names}
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return here | {"threads": torch.get_num_threads(), "gpu": gpu}


def _keep(run: Tracked, prepared: Prepared, outcome: Outcome, report: dict[str, Any]) -> None:
    """Metrics, the model, and its score of each user, into the run."""
    tracking.log_values(run.client, run.run_id, metrics=_values(outcome, report))
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as scratch:
        folder = Path(scratch)
        save(stored_of(prepared, outcome.fitted), folder / "trained")
        place = folder / "evaluation"
        place.mkdir()
        user_id = prepared.data.sequences.user_id
        _save_per_user(outcome.result, user_id, place / "per_user.npz")
        if outcome.last is not None:
            last = replace(outcome.last, ages={})
            _save_per_user(last, user_id, place / "per_user_last_night.npz")
        facts_and_report = {"facts": prepared.facts, "report": report}
        (place / "result.json").write_text(json.dumps(facts_and_report, indent=1))
        run.client.log_artifacts(run.run_id, scratch)


def _values(outcome: Outcome, report: dict[str, Any]) -> dict[str, float]:
    """The finite ones of a run's metrics."""
    values = {"validation_ndcg@10_best": outcome.fitted.validation}
    named = dict(report["metrics"])
    for kind, part in {**report["by_target"], **report.get("by_age", {})}.items():
        named |= {f"{kind}_{name}": value for name, value in part["metrics"].items()}
    for name, value in named.items():
        values |= {name if end == "value" else f"{name}_{end}": v for end, v in value.items()}
    values |= {name: float(report[name]) for name in LOGGED}
    values["unseen_share"] = outcome.result.counts["unseen_share"]
    return {name: value for name, value in values.items() if np.isfinite(value)}


def stored_of(prepared: Prepared, fitted: Fitted) -> Stored:
    """The model as it is kept: asked again, here or when serving, it computes as it did when it
    was evaluated."""
    config, data = prepared.config, prepared.data
    return as_stored(fitted, config, data, prepared.facts)


def as_stored(fitted: Fitted, config: Config, data: Data, facts: dict[str, Any]) -> Stored:
    """A fitted model with the counts of its rows, and with the values of its catalogue."""
    popularity = Popularity(len(data.item_ids), config.model)
    popularity.fit(data.training.rows)
    computed = replace(config.train, precision=fitted.precision or config.train.precision)
    config = replace(config, train=computed)
    if data.side is not None:
        facts = facts | {"categories": data.side.values}
    return Stored(fitted.model, config, data.item_ids, popularity.count, facts)


def _save_per_user(result: Result, user_id: list[str], file: Path) -> None:
    """Arrays of one element a user: `user_id` and the metrics; those by kind of target, and by age
    of the item, likewise."""
    ids = np.array([user_id[u] for u in result.users], dtype=np.str_)
    arrays: dict[str, Any] = {
        name.replace("@", "_at_"): value for name, value in result.values.items()
    }
    for kind, part in {**result.parts, **result.ages}.items():
        arrays[f"{kind}.user_id"] = np.array([user_id[u] for u in part.users], dtype=np.str_)
        arrays |= {f"{kind}.{n.replace('@', '_at_')}": v for n, v in part.values.items()}
    np.savez_compressed(file, user_id=ids, **arrays)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result
