"""Refits that nobody needs any more go, with their files: one is made every night."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from models.registry import tracking
from models.registry.register import REFIT_OF, aliases_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def remove_old_refits(source: str, before_ms: int, listed: Collection[str]) -> list[int]:
    """Remove the refits that were made before a time and that no alias names.

    Args:
        before_ms: milliseconds since 1970.
        listed: versions whose lists are kept; they stay.

    Returns:
        The numbers of the versions removed, rising. Their runs are deleted (MLflow's garbage
        collection takes the rest of them); their files are gone.
    """
    client, _ = tracking.connect(source)
    stay = {*(aliases_of(client, source) or {}).values(), *listed}
    old = [
        one
        for one in client.search_model_versions(f"name = '{source}'", 1000)
        if REFIT_OF in one.tags
        and str(one.version) not in stay
        and one.creation_timestamp < before_ms
    ]
    for one in old:
        _remove(client, one)
    return sorted(int(one.version) for one in old)


def _remove(client: MlflowClient, version: ModelVersion) -> None:
    """The version last: killed in between, the next call finds it and goes on."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        run = client.get_run(str(version.run_id))
        places = [run.info.artifact_uri]
        for output in run.outputs.model_outputs if run.outputs else []:
            places.append(client.get_logged_model(output.model_id).artifact_location)
        for place in places:
            get_artifact_repository(place).delete_artifacts()
        client.delete_run(run.info.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # somebody else was faster
            raise
    client.delete_model_version(version.name, str(version.version))
