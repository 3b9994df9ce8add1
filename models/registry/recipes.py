"""What `python -m models tune` found: recipes, recorded as MLflow runs of kind `tuned`.

A recipe is the settings of one method for one source, target, preset and split, with the budget
that they were found by. `train --tuned`, `grid --tuned` and the DAG (`[training] tuned`) take the
newest one, or the one whose run is named.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.errors import counted
from models.core.errors import UserError
from models.registry import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

RECIPE, FILE = "tuned", "recipe.json"
NEWEST = "newest"


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a recipe is for; as tags of its run."""

    method: str
    target: str
    preset: str
    split: str
    preprocess: str

    def command(self, source: str) -> str:
        """The command that makes such a recipe."""
        return f"python -m models tune --source {source} {self.options()}"

    def options(self) -> str:
        """The options by which `tune` makes such a recipe and `train` finds it."""
        words = [
            f"--method {self.method}",
            f"--target {self.target} --preset {self.preset} --split {self.split}",
        ]
        if self.preprocess != "gold":
            words.append(f"--preprocess {self.preprocess}")
        return " ".join(words)


@dataclass(frozen=True)
class Recipe:
    """run_id: the MLflow run that has it. values: its `recipe.json`."""

    run_id: str
    values: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Overrides of the preset: what `tune` was given, and what it found."""
        return {**self.values["given"], **self.values["settings"]}

    @property
    def origin(self) -> dict[str, Any]:
        """What a training, and a comparison, say of the tuning that it came from."""
        return {"run_id": self.run_id, **self.values["budget"]}

    def check_cut(self, cut: dict[str, Any], table_version: int) -> None:
        """Raises:
        UserError: what the recipe was chosen on lies in the test period of this cut.
        """
        if cut["split"] in ("temporal", "nightly"):
            seen, test = self.values["cut"]["test_from"], cut["test_from"]
            late = seen > test  # ISO 8601, UTC: their order is that of their texts
            why = f"on events up to {seen}, and the test period begins at {test}"
        else:
            own = self.values["table_version"]
            late = own > table_version
            why = f"on version {own} of gold.sequences, and version {table_version} is asked for"
        if late:
            raise UserError(
                f"the recipe of {self.values['method']} (run {self.run_id}) was chosen {why}: it "
                "would be scored on what it was chosen by. Tune on what is trained on: python -m "
                f"models tune --table-version {table_version}, with the same options for the cut"
            )


def record(client: MlflowClient, experiment: str, key: Key, values: dict[str, Any]) -> str:
    """A recipe as a run of its own; one that says the same is there already."""
    tags = {tracking.KIND: RECIPE, "study": values["study"], **asdict(key)}
    for run in tracking.runs(client, experiment, **tags):
        if _values(client, run.info.run_id) == values:
            return str(run.info.run_id)
    run = client.create_run(experiment, run_name=f"tuned {key.method}", tags=tags)
    run_id = str(run.info.run_id)
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        file = Path(folder) / FILE
        file.write_text(json.dumps(values, indent=1))
        client.log_artifact(run_id, str(file))
    tracking.log_values(
        client,
        run_id,
        params={**values["given"], **values["settings"]},
        metrics={
            "validation_ndcg@10": values["validation_ndcg@10"],
            **{name: float(values["budget"][name]) for name in ("finished", "pruned", "failed")},
        },
    )
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _values(client: MlflowClient, run_id: str) -> dict[str, Any]:
    with tracking.downloaded(client, run_id, FILE) as file:
        values: dict[str, Any] = tracking.read_json(file)
    return values


def newest(client: MlflowClient, experiment: str, key: Key) -> Recipe | None:
    found = tracking.runs(client, experiment, kind=RECIPE, **asdict(key))
    if not found:
        return None
    run_id = str(found[0].info.run_id)
    return Recipe(run_id, _values(client, run_id))


def wanted(source: str, key: Key, run_id: str = NEWEST) -> Recipe | None:
    """The recipe that a training takes; None: the method has no setting that is tuned.

    Raises:
        UserError: there is none, or the run that is named has one of something else.
    """
    from models.networks.methods import tunable

    if not tunable(key.method):
        return None
    if run_id == NEWEST:
        return every(source, [key])[key.method]
    client, _ = tracking.connect(source)
    values = _values(client, run_id)
    for name, value in asdict(key).items():
        if values.get(name) != value:
            raise UserError(
                f"--tuned {run_id}: that recipe is for {name} {values.get(name)}, and {value} is "
                f"asked for. Make one: {key.command(source)}"
            )
    return Recipe(run_id, values)


def every(source: str, keys: Sequence[Key]) -> dict[str, Recipe | None]:
    """The newest recipe of each method; None where a method has no setting that is tuned.

    Raises:
        UserError: some have none; all of them are named, with the commands.
    """
    from models.networks.methods import tunable

    client, experiment = tracking.connect(source)
    found = {
        key.method: newest(client, experiment, key) if tunable(key.method) else None for key in keys
    }
    missing = [key for key in keys if tunable(key.method) and found[key.method] is None]
    if missing:
        commands = "; ".join(key.command(source) for key in missing)
        raise UserError(
            f"no recipe of {', '.join(key.method for key in missing)} for {source!r} (target "
            f"{missing[0].target}, preset {missing[0].preset}, split {missing[0].split}) is recorded "
            f"in {tracking.tracking_uri()}. Make one for each method, by the same --trials and "
            f"--minutes: {commands}"
        )
    return found


def budget_in_words(origin: dict[str, Any]) -> str:
    """`20 trials, 10 min`: what a tuning was allowed, and how many trials that was enough for."""
    tried, trials = origin["tried"], origin["trials"]
    words = counted(trials, "trial") if tried == trials else f"{tried} of {trials} trials"
    return words + (f", {origin['minutes']:g} min" if origin["minutes"] is not None else "")


def described(method: str, recipe: Recipe | None) -> str:
    """A recipe in a line."""
    if recipe is None:
        return f"{method}: has no setting that is tuned"
    settings = ", ".join(f"{name} {value}" for name, value in recipe.settings.items())
    return (
        f"{method}: {settings} (validation NDCG@10 {recipe.values['validation_ndcg@10']:.4f}; "
        f"{budget_in_words(recipe.values['budget'])}; run {recipe.run_id})"
    )


def taken(key: Key, recipe: Recipe | None) -> str:
    """What a training says of its recipe."""
    end = "trained as it is" if recipe is None else "the recipe that is used"
    return f"--tuned: {described(key.method, recipe)}: {end}"
