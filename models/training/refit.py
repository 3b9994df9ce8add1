"""`refit`: the recipe of a registered version, trained on everything in gold.sequences.

What `compare` and the gate decide about is a recipe: a method, its settings, and how many epochs are
best, measured on events that were held out. What is served is that recipe, trained on everything up to
the newest event: a version of its own, to which the alias `serving` goes. Nothing is held out from
it, so it has no scores of its own; those of its recipe are beside it as `recipe_ndcg@10` and so
on, and nothing scores it on what it was trained on.

From scratch, it is trained for as many epochs as were best. Warm, which is the rule, the weights of
the newest refit (or of the recipe's version) are taken over (`models/networks/warm_start.py`), and a
few epochs teach what happened since. Baselines are counted anew.

Decision 12 in docs/design/decisions.md.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.core.config import Config
from models.core.environment import Say
from models.core.errors import UserError
from models.data.load import Data, load_all, load_data
from models.data.sequences import cache_folder
from models.data.splits import Cut, Filters, describe, stamp
from models.networks.baselines import Popularity
from models.networks.methods import count_parameters
from models.networks.recommender import Recommender
from models.networks.saved_model import Stored, load, save
from models.registry import tracking
from models.registry.register import (
    CHAMPION,
    REFIT_OF,
    SAW_FORGOTTEN,
    SERVING,
    Registered,
    aliases_of,
    find,
    make_version,
    refits_of,
    serve,
)
from models.training.checkpoints import Checkpoints
from models.training.fit import Fitted, fit_for
from models.training.run import as_stored, code_tags, computes, facts_of, flat, recorded
from models.training.sides import lists_catalogue, with_sides
from models.training.warm import WARM_EPOCHS, WARM_RATE, fit_warm

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from jobs.core.source_file import Source

KIND = "refit"
SCORES = ("ndcg@10", "hr@10", "recall@10", "mrr@10")  # of the recipe, shown beside a refit


@dataclass(frozen=True, kw_only=True)
class Request:
    """One refit as it is asked for.

    number: of the version whose recipe is trained; None: the one that `alias` names. version: of
    gold.sequences; None: the newest. checkpoint_s: seconds between checkpoints.
    """

    source: Source
    lake: str
    alias: str = CHAMPION
    number: int | None = None
    version: int | None = None
    from_scratch: bool = False
    device: str = "cpu"
    checkpoint_s: float = 60.0


@dataclass(frozen=True)
class Recipe:
    """A version whose scores were measured on held-out events.

    epochs: how many are best; 0 for what is counted. scores: `recipe_ndcg@10` and so on.
    """

    model: Registered
    stored: Stored
    epochs: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Before:
    """The model whose weights are taken over.

    until: the newest event that it was trained on, microseconds since 1970.
    """

    model: Registered
    stored: Stored
    until: int


@dataclass(frozen=True)
class Task:
    """All that a refit's outcome follows from."""

    recipe: Recipe
    data: Data
    config: Config
    before: Before | None

    @property
    def until(self) -> int:
        """The newest event, microseconds since 1970."""
        return int(self.data.events.ts.max())

    @property
    def how(self) -> str:
        """In words, as a tag of the version."""
        if isinstance(self.recipe.stored.model, Popularity):
            return "counted"
        return (
            "from scratch" if self.before is None else f"from version {self.before.model.version}"
        )


def refit(request: Request, say: Say = print) -> dict[str, Any]:
    """Teach a recipe everything, register it, and give it the alias `serving` if its recipe is the
    champion's.

    A refit that was killed continues where it stopped when the same is asked for again. One that is there
    is not made twice.

    Raises:
        UserError: there is no such version or table; or the same refit is running.
    """
    began = time.perf_counter()
    source = request.source
    client, experiment = tracking.connect(source.name)
    recipe = recipe_of(client, _origin(client, source.name, request))
    filters = Filters(**recipe.stored.facts["filters"])
    data = load_all(
        lake=request.lake,
        source=source.name,
        filters=filters,
        version=request.version,
        listed=lists_catalogue(recipe.stored.config, source),
    )
    there = _there(client, source.name, recipe, data, request.from_scratch)
    if there is not None:
        number, how = int(there.version), there.tags["warm"]
        told = {"new": False, "how": how, "mlflow_run_id": str(there.run_id)}
        until = int(data.events.ts.max())
    else:
        task = _task(client, source, recipe, data, request, say)
        number, told = _taught(client, experiment, request, task, say)
        told, until = {"new": True, "how": task.how, **told}, task.until
    champion = (aliases_of(client, source.name) or {}).get(CHAMPION)
    serving = serve(client, source.name, champion) if champion == recipe.model.version else None
    return {
        "model": source.name,
        "version": number,
        "refit_of": int(recipe.model.version),
        "method": recipe.stored.facts["method"],
        "table_version": data.sequences.version,
        "trained_until": stamp(until),
        "items": len(data.item_ids),
        "serving": serving and int(serving),
        **told,
        **recipe.scores,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _origin(client: MlflowClient, source: str, request: Request) -> Registered:
    """The version that is meant; of a refit, the one whose recipe it is."""
    found = find(client, source, request.alias, request.number)
    of = client.get_model_version(source, found.version).tags.get(REFIT_OF)
    return found if of is None else find(client, source, CHAMPION, int(of))


def recipe_of(client: MlflowClient, model: Registered) -> Recipe:
    """What a version was made by; of a version that is no refit."""
    with tracking.downloaded(client, model.run_id, "trained") as folder:
        stored = load(folder)
    if stored.facts.get("preprocess", "gold") != "gold":
        raise UserError(
            f"{model.uri} was trained on what --preprocess {stored.facts['preprocess']} left of "
            "gold.sequences: a refit is trained on gold.sequences as it is. Register a model of gold"
        )
    with tracking.downloaded(client, model.run_id, "evaluation/result.json") as file:
        report = tracking.read_json(file)["report"]
    scores = {
        f"recipe_{n}": report["metrics"][n]["value"] for n in SCORES if n in report["metrics"]
    }
    return Recipe(model, stored, int(report["best_epoch"]), scores)


def trained_on(
    recipe: Recipe, source: Source, lake: str, version: int, cut: Cut, say: Say = print
) -> Stored:
    """The recipe on what lies before a cut of a table version: from scratch, for as many epochs as
    were best when it was chosen."""
    facts = recipe.stored.facts
    filters = Filters(**facts["filters"])
    data = load_data(
        lake=lake,
        source=source.name,
        filters=filters,
        version=version,
        split=cut.split,
        valid_from=cut.valid_from,
        test_from=cut.test_from,
        preprocess=facts.get("preprocess", "gold"),
        train_until=cut.train_until,
        listed=lists_catalogue(recipe.stored.config, source),
    )
    config, data = with_sides(_since_the_first(recipe.stored.config, data), data, source, lake, say)
    fitted = fit_for(config, data, recipe.epochs, say)
    told = facts_of(source, data, config, filters, facts.get("preprocess", "gold"))
    return as_stored(fitted, config, data, told)


def _since_the_first(config: Config, data: Data) -> Config:
    """Times are counted from the first training event."""
    origin = int(data.training.rows.ts.min())
    return replace(config, model=replace(config.model, time_origin_us=origin))


def _there(
    client: MlflowClient, source: str, recipe: Recipe, data: Data, from_scratch: bool
) -> Any | None:
    """The refit of this recipe on this version of the table, if it has been made."""
    for one in reversed(refits_of(client, source, recipe.model.version)):
        same = one.tags["table_version"] == str(data.sequences.version)
        same = same and one.tags.get("table_id") == data.sequences.table_id
        if same and (not from_scratch or not one.tags["warm"].startswith("from version")):
            return one
    return None


def _task(
    client: MlflowClient,
    source: Source,
    recipe: Recipe,
    data: Data,
    request: Request,
    say: Say,
) -> Task:
    config, data = with_sides(recipe.stored.config, data, source, request.lake, say)
    before = None
    if not request.from_scratch and isinstance(recipe.stored.model, Recommender):
        before = _before(client, source.name, recipe, data)
    if before is None:
        config = _since_the_first(config, data)
    return Task(recipe, data, config, before)


def _before(client: MlflowClient, source: str, recipe: Recipe, data: Data) -> Before | None:
    """The newest refit that knows nothing beyond these events, or the recipe's own version; None: all
    know more than is in the table now, or have seen a user who was forgotten since."""
    newest = int(data.events.ts.max())
    table = data.sequences
    for one in reversed(refits_of(client, source, recipe.model.version)):
        if SAW_FORGOTTEN in one.tags:  # (older ones without an alias are not marked)
            break
        until = int(one.tags["trained_until_us"])
        older = int(one.tags["table_version"]) <= table.version
        if until <= newest and older and one.tags.get("table_id") == table.table_id:
            model = find(client, source, SERVING, int(one.version))
            with tracking.downloaded(client, model.run_id, "trained") as folder:
                return Before(model, load(folder), until)
    facts = recipe.stored.facts
    if facts["table_version"] > table.version or facts["table_id"] != table.table_id:
        return None
    if SAW_FORGOTTEN in client.get_model_version(source, recipe.model.version).tags:
        return None
    return Before(recipe.model, recipe.stored, _taught_until(recipe.stored, data))


def _taught_until(stored: Stored, data: Data) -> int:
    """Before when a recipe's training rows end; under the rules by user everything may be new."""
    cut = stored.facts["cut"]
    name = "test_from" if cut.get("train_until") == "test" else "valid_from"
    if cut.get(name) is None:
        return int(data.events.ts.min()) - 1
    return int(np.datetime64(cut[name].removesuffix("Z"), "us").astype(np.int64)) - 1


def _taught(
    client: MlflowClient, experiment: str, request: Request, task: Task, say: Say
) -> tuple[int, dict[str, Any]]:
    """Train, record, register: the version's number, and what it cost."""
    source, recipe, data = request.source, task.recipe, task.data
    keep = _checkpoints(request, task)
    title = f"refit of version {recipe.model.version}, table version {data.sequences.version}"
    with keep.alone() as mine:
        if not mine:
            raise UserError(
                f"the {title} is running in another process ({keep.folder}): wait until it ends"
            )
        earlier = keep.noted().get("mlflow_run_id")
        tags = _tags(task)
        with recorded(client, experiment, title, _run_tags(tags), earlier) as run_id:
            keep.note(mlflow_run_id=run_id)
            # (Killed after this: a run that is not finished goes on; a version that it made is found.)
            made = client.search_model_versions(f"run_id = '{run_id}'")
            fitted = _fitted(request, task, keep, say)
            told = _costs(fitted, computes(request.device))
            sequences = data.sequences
            tracking.log_table(
                client, run_id, sequences.path, sequences.version, sequences.table_id
            )
            numbers = {k: v for k, v in told.items() if isinstance(v, int | float)}
            params = flat({"recipe": recipe.stored.config.as_dict(), "how": task.how})
            tracking.log_values(client, run_id, params=params, metrics=numbers | recipe.scores)
            with tempfile.TemporaryDirectory(prefix="sessionmill-") as scratch:
                save(_stored(source, task, fitted), Path(scratch) / "trained")
                client.log_artifacts(run_id, scratch)
                says = (
                    f"{recipe.stored.facts['method']}: version {recipe.model.version}'s recipe, "
                    f"trained on everything until {stamp(task.until)}"
                )
                number = (
                    int(made[0].version)
                    if made
                    else make_version(
                        client, source.name, run_id, Path(scratch) / "trained", tags, says
                    )
                )
        keep.remove()
    return number, {"mlflow_run_id": run_id, **told}


def _fitted(request: Request, task: Task, keep: Checkpoints, say: Say) -> Fitted:
    config, data, before = task.config, task.data, task.before
    say(
        f"{config.method}, {task.how}: {len(data.training.rows.item):,} events, "
        f"{len(data.item_ids):,} items"
    )
    if before is None:
        return fit_for(config, data, task.recipe.epochs, say, request.device, keep)
    return fit_warm(
        config, data, before.stored, before.until, task.recipe.epochs, say, request.device, keep
    )


def _checkpoints(request: Request, task: Task) -> Checkpoints:
    """In a folder named after all that the outcome follows from."""
    sequences, before = task.data.sequences, task.before
    key = [
        KIND, task.config.as_dict(), task.recipe.model.version, sequences.version,
        sequences.table_id, task.how, before and before.until, WARM_EPOCHS, WARM_RATE,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder(request.lake, request.source.name) / "training" / name
    return Checkpoints(folder, request.checkpoint_s)


def _stored(source: Source, task: Task, fitted: Fitted) -> Stored:
    """As the recipe's settings say, which the next refit goes by; with what it was trained on."""
    data, recipe = task.data, task.recipe
    filters = Filters(**recipe.stored.facts["filters"])
    facts = facts_of(source, data, task.config, filters, "gold") | {
        REFIT_OF: int(recipe.model.version),
        "trained_until": stamp(task.until),
    }
    return as_stored(fitted, task.config, data, facts)


def _tags(task: Task) -> dict[str, Any]:
    """Of the registered version."""
    recipe, sequences = task.recipe, task.data.sequences
    counted = count_parameters(len(task.data.item_ids), task.config)
    return {
        "method": recipe.stored.facts["method"],
        "seed": task.config.train.seed,
        REFIT_OF: recipe.model.version,
        "trained_until": stamp(task.until),
        "trained_until_us": task.until,
        "warm": task.how,
        "table": "gold.sequences",
        "table_version": sequences.version,
        "table_id": sequences.table_id,
        "cut": json.dumps(describe(task.data.cut)),
        "target": task.config.train.target,
        "request_time": task.config.model.request_time,
        **{name: counted[name] for name in ("num_params", "num_params_added", "params_added_pct")},
        **{name.replace("@", "_at_"): value for name, value in recipe.scores.items()},
    }


def _run_tags(tags: dict[str, Any]) -> dict[str, str]:
    named = ("method", "seed", REFIT_OF, "trained_until", "table_version", "warm")
    return {tracking.KIND: KIND, **{name: str(tags[name]) for name in named}, **code_tags()}


def _costs(fitted: Fitted, machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "epochs": fitted.epochs,
        "train_s": round(fitted.seconds, 2),
        "events_per_second": round(fitted.events_per_second, 1),
        "machine": machine,
    }


def in_words(done: dict[str, Any]) -> str:
    """What was done, for a person."""
    name = f"version {done['version']} of {done['model']}"
    of = f"version {done['refit_of']} ({done['method']})"
    said = (
        f"{name} is a refit of {of}, {done['how']}: it was trained on everything until "
        f"{done['trained_until']} (gold.sequences version {done['table_version']}, "
        f"{done['items']:,} items)"
    )
    said += f", in {done['seconds']:.0f} s" if done["new"] else "; it was there already"
    if done["serving"] is None:
        return said + f". The alias {SERVING} stays where it is: {of} is not the champion"
    if done["serving"] == done["version"]:
        return said + f". It has the alias {SERVING}"
    return said + f". The alias {SERVING} is version {done['serving']}, a newer refit"
