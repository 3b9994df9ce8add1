"""What `train` and `evaluate` do around the arithmetic: read, record, keep, print."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from models.core import process_group
from models.core.config import Config
from models.core.environment import Say, code_version, peak_rss_mb
from models.core.errors import UserError
from models.core.rows import EXPOSED, Target
from models.data.catalogue import read_side
from models.data.load import Data, load_data
from models.data.paper_a import PAPER_A_GAP_US
from models.data.sequences import cache_folder
from models.data.splits import (
    TEST,
    Filters,
    describe,
    targets,
    users_share,
)
from models.evaluation.evaluate import Result, Sampled, evaluate
from models.evaluation.rescore import describe_report
from models.networks.baselines import Popularity
from models.networks.methods import SESSION_ENCODERS, count_parameters, parse
from models.networks.saved_model import Stored, save
from models.registry import tracking
from models.training.checkpoints import Checkpoints
from models.training.fit import Fitted, fit

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from jobs.core.source_file import Source


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


def train(
    *,
    source: Source,
    lake: str,
    config: Config,
    version: int | None = None,
    split: str | None = None,
    valid_from: int | None = None,
    test_from: int | None = None,
    preprocess: str = "gold",
    comparison: str | None = None,
    variant: str | None = None,
    device: str = "cpu",
    checkpoint_s: float = 60.0,
    sampled: int = 0,
    asked_for: str | None = None,
    say: Say = print,
) -> dict[str, Any] | None:
    """Train one method, score it on the test period, record everything in MLflow.

    `variant` names it among trainings of the same method in a comparison; `asked_for` (tag
    `asked_for`) says by what options it was asked for, so that a grid knows its own.
    A training that was killed goes on from its last checkpoint, in the same MLflow run, when the
    same is asked for again. Under torchrun the first process records and answers; others: None.
    """
    began = time.perf_counter()
    if sampled < 0:
        raise UserError(f"--sampled {sampled}: how many items to draw, 0 for none")
    if not 0 <= checkpoint_s < math.inf:
        raise UserError(f"--checkpoint-s {checkpoint_s}: seconds, 0 or more")
    for named in (comparison, variant):
        if named is not None:
            tracking.check_name(named)
    team, device = process_group.start(device)
    if not team.leads:
        say = _silent
    filters = Filters(**source.filters.model_dump())
    split = split or ("last_item" if preprocess == "paper_a" else "temporal")
    data = load_data(
        lake=lake, source=source.name, filters=filters, version=version, split=split,
        valid_from=valid_from, test_from=test_from, preprocess=preprocess,
    )  # fmt: skip
    if config.train.data_share < 1:
        training = users_share(data.training, data.sequences.user_id, config.train.data_share)
        data = replace(data, training=training)
    origin = int(data.training.rows.ts.min())
    config = replace(config, model=replace(config.model, time_origin_us=origin))
    config, data = _with_side(config, data, source, lake, say)
    facts = _facts(source, data, config, filters, preprocess)
    rows, left = data.training.rows, data.training.counts
    say(
        f"{config.method} on {source.name}, gold.sequences version {data.sequences.version}: "
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
    called = tracking.display_name(config.method, variant)
    key = json.dumps([config.as_dict(), facts, comparison, called, team.size], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    keep = Checkpoints(cache_folder(lake, source.name) / "training" / name, checkpoint_s)
    asked = targets(
        data.events, data.period, TEST, data.training.vocabulary, cast(Target, config.train.target)
    )
    if not len(asked.user):
        raise UserError(_no_target(data, config.train.target, asked.left_out))
    item = rows.item[rows.positive]
    popularity = np.bincount(item, minlength=len(data.item_ids) + 1)[1:]
    lists = [Sampled(sampled, by, popularity) for by in ("random", "popular") if sampled]

    def work(mine: bool, each_epoch: Any = None) -> tuple[Fitted, Result, float]:
        use = keep if team.each(torch.tensor([int(mine)]))[0] else None
        fitted = fit(config, data, say, device, use, team, each_epoch)
        scored_from = time.perf_counter()
        result = evaluate(
            fitted.model, asked, repeat_policy=config.model.repeat_policy, team=team,
            popularity=popularity, sampled=lists,
        )  # fmt: skip
        return fitted, result, time.perf_counter() - scored_from

    try:
        if not team.leads:
            work(False)
            return None
        client, experiment = tracking.connect(source.name)
        tags = {
            tracking.KIND: "train", "method": called, "seed": str(config.train.seed),
            "table_version": str(data.sequences.version),
        }  # fmt: skip
        if comparison:
            tags[tracking.COMPARISON] = comparison
        if asked_for:
            tags[tracking.ASKED_FOR] = asked_for
        commit = code_version()
        if commit:
            tags["mlflow.source.git.commit"] = commit
        title = f"{called} seed {config.train.seed}"
        with keep.alone() as mine:
            if not mine:
                say(f"the same training is running ({keep.folder}): this one keeps no checkpoints")
            earlier = keep.noted().get("mlflow_run_id") if mine else None
            with recorded(client, experiment, title, tags, earlier) as run_id:
                if mine:
                    keep.note(mlflow_run_id=run_id)
                tracking.log_values(
                    client, run_id, params=_flat({**config.as_dict(), "data": facts})
                )
                tracking.log_table(
                    client, run_id, data.sequences.path, data.sequences.version,
                    data.sequences.table_id,
                )  # fmt: skip
                curves = tracking.Curves(client, run_id, say)
                fitted, result, eval_s = work(mine, curves.log)
                curves.finish(fitted.curves)
                report = _report(config, data, fitted, result, eval_s, run_id, facts, device)
                report["method"] = called
                report["seconds"] = round(time.perf_counter() - began, 2)
                report["processes"] = team.size
                _keep(client, run_id, data, config, fitted, result, report, facts)
            if mine:
                keep.remove()
    finally:
        process_group.stop()
    say(describe_report(report))
    return report


def _with_side(
    config: Config, data: Data, source: Source, lake: str, say: Say
) -> tuple[Config, Data]:
    """For models that look at it: what the source's catalogue said of the items at the cut."""
    from jobs.core.tables import ITEM_ATTRIBUTES

    part, base = source.items, parse(config.method)[0]
    if part is None or base not in SESSION_ENCODERS or not config.model.side:
        return config, data
    side = read_side(
        ITEM_ATTRIBUTES.path(lake, source.name), data.item_ids, int(data.training.rows.ts.max()),
        part.categories, part.numbers, f"python -m jobs items --source {source.name}",
    )  # fmt: skip
    if not side.known:
        say(
            f"catalogue: of none of the {len(data.item_ids):,} items was anything known at the "
            f"newest training event ({ITEM_ATTRIBUTES.full_name} version {side.version}, column "
            "known_from): trained without it. A catalogue with {day} in items.landing is known from "
            "its day on; one without is known for always the first time it is read"
        )
        return config, data
    say(
        f"catalogue: something was known of {side.known:,} of {len(data.item_ids):,} items at the "
        f"newest training event ({ITEM_ATTRIBUTES.full_name} version {side.version})"
    )
    model = replace(config.model, categories=side.sizes, numbers=side.value.shape[1])
    return replace(config, model=model), replace(data, side=side)


def _no_target(data: Data, target: str, left_out: dict[str, int]) -> str:
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


def _silent(_: str) -> None:
    """Processes that do not lead say nothing."""


def _facts(
    source: Source, data: Data, config: Config, filters: Filters, preprocess: str
) -> dict[str, Any]:
    """What makes runs comparable, and what serving must know; stored with the model."""
    again = preprocess == "paper_a"
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
        "session_rule": "gap" if again else source.sessions.rule,
        "gap_us": PAPER_A_GAP_US if again else source.sessions.gap_us,
        "feedback": source.feedback.model_dump(),
    }


def _report(
    config: Config,
    data: Data,
    fitted: Fitted,
    result: Result,
    eval_s: float,
    run_id: str,
    facts: dict[str, Any],
    device: str,
) -> dict[str, Any]:
    counted = count_parameters(len(data.item_ids), config)
    return {
        "method": config.method,
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
        "validation_ndcg@10": fitted.validation,
        "counts": result.counts,
        "filters": data.training.counts,
        "precision": fitted.precision,
        "epochs": fitted.epochs,
        "best_epoch": fitted.best_epoch,
        "events_per_second": round(fitted.events_per_second, 1),
        "train_s": round(fitted.seconds, 2),
        "eval_s": round(eval_s, 2),
        "peak_rss_mb": peak_rss_mb(),
        "items": len(data.item_ids),
        "catalogue": data.side is not None,
        "table_version": data.sequences.version,
        "cut": facts["cut"],
        "target": facts["target"],
        "mlflow_run_id": run_id,
        "machine": computes(device),
    }


def computes(device: str = "cpu") -> dict[str, Any]:
    """What rounding depends on: the same gives the same scores to the last bit."""
    from models.core.environment import machine

    names = ("processor", "cpu_capability", "torch")
    here = {name: value for name, value in machine().items() if name in names}
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return here | {"threads": torch.get_num_threads(), "gpu": gpu}


def _keep(
    client: MlflowClient,
    run_id: str,
    data: Data,
    config: Config,
    fitted: Fitted,
    result: Result,
    report: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    values = {"validation_ndcg@10_best": fitted.validation}
    named = dict(report["metrics"])
    for kind, part in report["by_target"].items():
        named |= {f"{kind}_{name}": value for name, value in part["metrics"].items()}
    for name, value in named.items():
        values |= {name if end == "value" else f"{name}_{end}": v for end, v in value.items()}
    for name in (
        "num_params", "num_params_added", "params_added_pct", "epochs", "best_epoch", "seconds",
        "train_s", "eval_s", "events_per_second", "peak_rss_mb",
    ):  # fmt: skip
        values[name] = float(report[name])
    values["unseen_share"] = result.counts["unseen_share"]
    finite = {name: value for name, value in values.items() if np.isfinite(value)}
    tracking.log_values(client, run_id, metrics=finite)
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as scratch:
        folder = Path(scratch)
        popularity = Popularity(len(data.item_ids), config.model)
        popularity.fit(data.training.rows)
        # Asked again, here or when serving, a model computes as it did when it was evaluated.
        computed = replace(config.train, precision=fitted.precision or config.train.precision)
        config = replace(config, train=computed)
        stored = Stored(fitted.model, config, data.item_ids, popularity.count, facts)
        save(stored, folder / "trained")
        place = folder / "evaluation"
        place.mkdir()
        ids = np.array([data.sequences.user_id[u] for u in result.users], dtype=np.str_)
        arrays: dict[str, Any] = {
            name.replace("@", "_at_"): value for name, value in result.values.items()
        }
        for kind, part in result.parts.items():
            users = [data.sequences.user_id[u] for u in part.users]
            arrays[f"{kind}.user_id"] = np.array(users, dtype=np.str_)
            arrays |= {f"{kind}.{n.replace('@', '_at_')}": v for n, v in part.values.items()}
        np.savez_compressed(place / "per_user.npz", user_id=ids, **arrays)
        facts_and_report = {"facts": facts, "report": report}
        (place / "result.json").write_text(json.dumps(facts_and_report, indent=1))
        client.log_artifacts(run_id, scratch)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result
