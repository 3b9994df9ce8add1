"""Where a user's list comes from: list, refit, recipe, comparison, table version, files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.core.errors import UserError
from models.data.lineage import moved, publishers, runs_of
from models.registry import tracking
from models.registry.register import REFIT_OF, aliases_of, served_alias

if TYPE_CHECKING:
    from jobs.core.source_file import Source

SHOWN = 10


def explain(source: Source, lake: str, user: str, number: int | None = None) -> dict[str, Any]:
    """What is known of a user's list in gold.recommendations.

    Args:
        number: the model version whose list is meant; None: the one that is served.

    Returns:
        `list` (model version, when it was made, the first items), `served` (that version: what it
        was trained on, until when, how), `recipe` (method, scores, comparison, what the gate said),
        `tables` (the version of gold.sequences, the runs that published it, the files they read).

    Raises:
        UserError: there is no such list, or its version is no longer registered.
    """
    client, _ = tracking.connect(source.name)
    wanted = str(number) if number is not None else _served(client, source.name)
    row = _list(source, lake, user, wanted)
    served = _version(client, source.name, row["model_version"])
    of = served.tags.get(REFIT_OF)
    recipe = served if of is None else _version(client, source.name, of)
    made_of = int(served.tags["table_version"])
    return {
        "source": source.name,
        "user": user,
        "list": {
            "model_version": int(row["model_version"]),
            "made": row["created_ts"].isoformat(),
            "size": len(row["items"]),
            "items": row["items"][:SHOWN],
        },
        "served": {
            "version": int(served.version),
            "refit_of": of and int(of),
            "how": served.tags.get("warm", "as it was compared"),
            "trained_until": served.tags.get("trained_until"),
            "table_version": made_of,
            "mlflow_run_id": str(served.run_id),
        },
        "recipe": {
            "version": int(recipe.version),
            "method": recipe.tags["method"],
            "seed": int(recipe.tags["seed"]),
            "ndcg@10": float(recipe.tags["ndcg_at_10"]),
            "comparison": recipe.tags["comparison"],
            "table_version": int(recipe.tags["table_version"]),
            "gate": recipe.tags.get("gate"),
            "gate_says": recipe.tags.get("gate_says"),
            "mlflow_run_id": str(recipe.run_id),
        },
        "tables": _tables(source.name, lake, made_of),
    }


def _served(client: Any, source: str) -> str:
    found = (aliases_of(client, source) or {}).get(served_alias(client, source))
    if found is None:
        raise UserError(
            f"{source!r} has no champion: nothing is served. Name a registered version (--model-version), "
            f"or make a champion: python -m models register, then promote, with --source {source}"
        )
    return found


def _version(client: Any, source: str, number: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(source, number)
    except MlflowException:
        raise UserError(
            f"version {number} of {source!r} is no longer registered: what it was made of is not known"
        ) from None


def _list(source: Source, lake: str, user: str, version: str) -> dict[str, Any]:
    import pyarrow.dataset as ds

    from jobs.core.tables import RECOMMENDATIONS
    from jobs.lake.filesystem import matching, rows_of
    from models.data.sequences import open_table

    path = RECOMMENDATIONS.path(lake, source.name)
    table = open_table(path, None, f"python -m jobs score --source {source.name}")
    own = ds.field("user_id") == user
    rows = [
        row for part in matching(rows_of(table), own, ["user_id"], None) for row in part.to_pylist()
    ]
    found: dict[str, Any] | None = next(
        (row for row in rows if row["model_version"] == version), None
    )
    if found is None:
        there = ", ".join(sorted({row["model_version"] for row in rows}))
        make = f"make it with python -m jobs score --source {source.name}"
        remedy = (
            f"; it has lists by {there}: name one with --model-version, or {make}"
            if there
            else f": write the user as the log has it; if the user is new, {make}"
        )
        raise UserError(f"{path} has no list of user {user!r} by version {version}{remedy}")
    return found


def _tables(source: str, lake: str, version: int) -> dict[str, Any]:
    runs = runs_of(lake, source)
    wanted = moved(lake, source, version)
    made = publishers(runs, wanted)
    batches = {run["batch"] for run in made}
    return {
        "gold.sequences": version,
        "rows_of": wanted,
        "published_by": [
            {name: str(run[name]) for name in ("run_id", "batch", "day", "started_ts")}
            for run in made
        ],
        "versions_read": {
            name: number for run in made for name, number in dict(run["tables_in"] or ()).items()
        },
        "files": sorted(
            {
                file
                for run in runs
                if run["batch"] in batches
                and run["outcome"] == "ok"
                and run["job"] in ("run", "ingest")
                for file in run["files"] or ()
            }
        ),
    }


def in_words(found: dict[str, Any]) -> str:
    """The answer as a person reads it."""
    listed, served, recipe, tables = (
        found[name] for name in ("list", "served", "recipe", "tables")
    )
    first = ", ".join(item["item_id"] for item in listed["items"])
    lines = [
        f"user {found['user']}: {listed['size']} items, made {listed['made']} by version "
        f"{listed['model_version']} of {found['source']}: {first}"
        + (" …" if listed["size"] > len(listed["items"]) else "")
    ]
    if served["refit_of"] is not None:
        lines.append(
            f"version {served['version']} is a refit of version {served['refit_of']}, "
            f"{served['how']}: trained on everything until {served['trained_until']} (MLflow run "
            f"{served['mlflow_run_id']})"
        )
    lines.append(
        f"its recipe is version {recipe['version']}: {recipe['method']}, seed {recipe['seed']}, "
        f"NDCG@10 {recipe['ndcg@10']:.4f} in comparison {recipe['comparison']} on gold.sequences "
        f"version {recipe['table_version']}; the gate: {recipe['gate'] or 'not asked'}"
    )
    by = "".join(f"{run['run_id']} (batch {run['batch']})" for run in tables["published_by"])
    lines.append(
        f"it was trained on gold.sequences version {tables['gold.sequences']}, published by run "
        f"{by or 'unknown: ops.runs has none'}"
    )
    if tables["files"]:
        lines.append(f"files read by that batch: {', '.join(tables['files'])}")
    return "\n".join(lines)
