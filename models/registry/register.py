"""Every method's best seed of a comparison becomes a version of the source's registered model.

A version is a pyfunc from code: weights in safetensors, no pickle. It takes raw ids and times, and
loads without this repository, Spark or Airflow; its code has a name of its own
(`models/registry/packaging.py`). The winner gets the alias `challenger`; `champion`
is given by `models/selection/gate.py`. Registering a comparison twice makes no second version of a run.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.core.errors import UserError
from models.registry import tracking
from models.registry.packaging import package

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHALLENGER, CHAMPION, SERVING = "challenger", "champion", "serving"
REFIT_OF = "refit_of"  # tag of a refit: the version whose recipe it is
SAW_FORGOTTEN = "saw_forgotten"  # tag that `jobs forget` gives to versions that saw the person
ROOT, ENTRY = Path(__file__).parents[1], "models.serving.pyfunc"
BESIDE = (Path(__file__).parents[2] / "expectations",)  # what serving needs of it is shipped, too
OPTIONAL = (
    "source_session_id", "event_type", "value", "tie_break", "event_id", "exposed_with",
)  # fmt: skip
OPENS = "opens_session"  # of models whose source has sessions.boundary
REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "safetensors", "pyarrow", "scipy")


def register(source: str, comparison: str) -> dict[str, Any]:
    """Register the methods of a comparison that `compare` has recorded."""
    client, experiment = tracking.connect(source)
    found = tracking.runs(client, experiment, kind="compare", comparison=comparison)
    if not found:
        others = tracking.comparisons_there(client, experiment, "compare", comparison)
        raise UserError(
            f"comparison {comparison!r} of {source!r} is not recorded in "
            f"{tracking.tracking_uri()}{others}. To record it, run `python -m models compare --source {source} "
            f"--comparison {comparison}`"
        )
    with tracking.downloaded(client, found[0].info.run_id, "compare.json") as file:
        outcome = tracking.read_json(file)
    _ensure_model(client, source)
    versions = [_version(client, source, outcome, row) for row in outcome["methods"]]
    winner = next(v for v in versions if v["method"] == outcome["winner"])
    client.set_registered_model_alias(source, CHALLENGER, winner["version"])
    return {
        "model": source,
        "comparison": comparison,
        "versions": versions,
        "challenger": {"method": winner["method"], "version": winner["version"]},
        "uri": f"models:/{source}@{CHALLENGER}",
    }


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name, description=f"Recommenders of the source {name}, one version a method."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version(
    client: MlflowClient, name: str, outcome: dict[str, Any], row: dict[str, Any]
) -> dict[str, Any]:
    run_id = row["mlflow_run_id"]
    there = [v for v in client.search_model_versions(f"run_id = '{run_id}'") if v.name == name]
    if there:
        number, new = min(int(version.version) for version in there), False
    else:
        number, new = _make(client, name, outcome, row), True
    return {"method": row["method"], "version": number, "mlflow_run_id": run_id, "new": new}


def _make(client: MlflowClient, name: str, outcome: dict[str, Any], row: dict[str, Any]) -> int:
    says = f"{row['method']}, seed {row['seed']}: NDCG@10 {row['ndcg@10']:.4f}"
    with tracking.downloaded(client, row["mlflow_run_id"], "trained") as folder:
        return make_version(client, name, row["mlflow_run_id"], folder, _tags(outcome, row), says)


def make_version(
    client: MlflowClient, name: str, run_id: str, trained: Path, tags: dict[str, Any], says: str
) -> int:
    """The model in the folder `trained`, of a run, as a version of the registered model."""
    import mlflow
    import mlflow.pyfunc

    logging.getLogger("mlflow.pyfunc").setLevel(logging.ERROR)
    with served(trained) as parts, mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(name="model", **parts)
    version = client.create_model_version(
        name,
        info.model_uri,
        run_id=run_id,
        tags={key: str(value) for key, value in tags.items()},
        model_id=info.model_id,
        description=says,
    )
    return int(version.version)


@contextmanager
def served(trained: Path) -> Iterator[dict[str, Any]]:
    """A trained model's folder as what MLflow's `log_model` and `save_model` are given."""
    item_ids = tracking.read_json(trained / "items.json")
    facts = tracking.read_json(trained / "model.json")["facts"]
    code = package(ROOT, ENTRY, BESIDE)
    with tempfile.TemporaryDirectory() as scratch:
        loader, folder = code.write(Path(scratch))
        with code.importable(Path(scratch)):
            yield {
                "python_model": str(loader),
                "artifacts": {"model": str(trained)},
                "code_paths": [str(folder)],
                "signature": signature("boundary" in facts.get("sessions", {})),
                "input_example": (example(item_ids), {"k": 10, "request_ts": ""}),
                "pip_requirements": [f"{p}=={importlib.metadata.version(p)}" for p in REQUIREMENTS],
            }


def _tags(outcome: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    names = (
        "method", "seed", "num_params", "num_params_added", "params_added_pct",
        "ndcg@10", "ndcg@10_low", "ndcg@10_high", "hr@10", "hr@10_low", "hr@10_high",
        "validation_ndcg@10",
    )  # fmt: skip
    tags = {name.replace("@", "_at_"): row[name] for name in names}
    return tags | {
        "comparison": outcome["comparison"],
        "table": "gold.sequences",
        "table_version": outcome["table_version"],
        "cut": json.dumps(outcome["cut"]),
        "target": outcome["target"],
        "request_time": outcome["request_time"],
        "vs_vanilla": json.dumps(row["vs_vanilla"]),
        "tuning": json.dumps(row.get("tuning")),
    }


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    run_id: str
    aliased: frozenset[str]
    """All versions of the model that have an alias."""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def aliases_of(client: MlflowClient, source: str) -> dict[str, str] | None:
    """Alias -> version of the source's registered model; None: there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(source).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return {name: str(version) for name, version in found.items()}


def versions_of(client: MlflowClient, source: str) -> list[int]:
    """The numbers of the registered model's versions, rising."""
    return sorted(int(one.version) for one in client.search_model_versions(f"name = '{source}'"))


def refits_of(client: MlflowClient, source: str, version: str) -> list[ModelVersion]:
    """The refits of a version, the oldest first."""
    found = client.search_model_versions(f"name = '{source}' and tags.{REFIT_OF} = '{version}'")
    return sorted(found, key=lambda one: int(one.version))


def serve(client: MlflowClient, source: str, champion: str) -> str:
    """Give the alias `serving` to the newest refit of the champion, or to the champion itself where
    there is none; the version that has it now."""
    refits = refits_of(client, source, champion)
    version = str(refits[-1].version) if refits else champion
    client.set_registered_model_alias(source, SERVING, version)
    return version


def served_alias(client: MlflowClient, source: str) -> str:
    """`serving` where it names the champion or a refit of it, else `champion`: in a registry that
    knows no refits, or where another champion's alias has moved and `serving` not yet."""
    aliases = aliases_of(client, source) or {}
    version, champion = aliases.get(SERVING), aliases.get(CHAMPION)
    if version is None:
        return CHAMPION
    of = client.get_model_version(source, version).tags.get(REFIT_OF, version)
    return SERVING if of == champion else CHAMPION


def find(
    client: MlflowClient, source: str, alias: str | None, number: int | None = None
) -> Registered:
    """The version that an alias names (None: the one that is served), or version `number`.

    Raises:
        UserError: there is none; says which there are.
    """
    from mlflow.exceptions import MlflowException

    aliases = aliases_of(client, source)
    if aliases is None:
        raise UserError(
            f"no model {source!r} is registered in {tracking.tracking_uri()}: run `python -m models "
            f"register --source {source} --comparison …` first"
        )
    if alias is None:
        alias = served_alias(client, source)
    wanted = str(number) if number is not None else aliases.get(alias)
    if wanted is None:
        there = ", ".join(f"{name} (version {v})" for name, v in sorted(aliases.items())) or "none"
        raise UserError(
            f"the registered model {source!r} has no alias {alias!r}; it has {there}. Name one of "
            "them with --alias, or a version with --model-version"
        )
    try:
        found = client.get_model_version(source, wanted)
    except MlflowException:
        raise UserError(
            f"the registered model {source!r} has no version {wanted}; it has "
            f"{', '.join(map(str, versions_of(client, source))) or 'none'}"
        ) from None
    return Registered(source, wanted, str(found.run_id), frozenset(aliases.values()))


def trained_on(source: str) -> tuple[dict[int, list[str]], str]:
    """Versions of the source's `gold.sequences` with the registered models made from them, and the
    registry that was asked. Of refits, one is made every night: those that no alias names are left
    out.

    Raises:
        UserError: MLflow does not answer.
    """
    client, _ = tracking.connect(source)
    aliased = set((aliases_of(client, source) or {}).values())
    found: dict[int, list[str]] = {}
    token = None
    while True:
        page = client.search_model_versions(f"name = '{source}'", 1000, page_token=token)
        for version in page:
            named = REFIT_OF not in version.tags or str(version.version) in aliased
            if "table_version" in version.tags and named:
                name = f"{source}/{version.version}"
                found.setdefault(int(version.tags["table_version"]), []).append(name)
        token = page.token
        if not token:
            return found, tracking.tracking_uri()


def signature(boundary: bool = False) -> ModelSignature:
    """Events in, nested recommendations out; parameters `k`, `request_ts`, `request_session_id`,
    `rules`.

    Args:
        boundary: whether an expression of the source ends sessions, so that requests may say where.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array, Object, Property

    text = DataType.string
    # MLflow's own types refuse what `serving` reads or refuses with words: times that have a zone,
    # whole numbers with nulls, columns of an empty frame or without a value. And they change texts:
    # under `string` a null of the JSON forms `instances` and `inputs`, or in a list, becomes the
    # text "None". With `string` alone MLflow would take CSV, too, and read the ids NA, nan and null
    # as nothing.
    inputs = Schema(
        [ColSpec(AnyType(), name) for name in ("user_id", "item_id", "event_ts")]
        + [ColSpec(AnyType(), name, required=False) for name in OPTIONAL + (OPENS,) * boundary]
    )
    item = Object([Property("item_id", text), Property("score", DataType.double)])
    outputs = Schema([ColSpec(text, "user_id"), ColSpec(Array(item), "items")])
    params = ParamSchema(
        [
            ParamSpec("k", DataType.long, 10),
            ParamSpec("request_ts", DataType.string, ""),
            ParamSpec("request_session_id", DataType.string, None),  # (an empty text is an id)
            ParamSpec("rules", DataType.string, ""),
        ]
    )
    return ModelSignature(inputs=inputs, outputs=outputs, params=params)


def example(item_ids: list[str]) -> pd.DataFrame:
    """Two users: one with two events of known items, one without history."""
    import pandas as pd

    when = pd.to_datetime(["2024-01-01T10:00:00", "2024-01-01T10:05:00", None])
    items = [item_ids[0], item_ids[1], None]
    return pd.DataFrame({"user_id": ["ann", "ann", "bob"], "item_id": items, "event_ts": when})
