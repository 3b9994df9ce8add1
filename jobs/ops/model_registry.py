"""What the model registry says about table versions; tags of models that saw erased users."""

from __future__ import annotations

import os
import time
from pathlib import Path

from jobs.core.errors import SettingsError
from jobs.privacy.person import Person


def _mark(models: list[str], tag: str, value: str) -> None:
    if not models:
        return
    from models.registry import tracking

    client, _ = tracking.connect(models[0].rpartition("/")[0])
    for one in models:
        name, _, version = one.rpartition("/")
        client.set_model_version_tag(name, version, tag, value)


def _from_tracking(source: str, person: Person, hashed: str) -> int:
    """MLflow's files that named the person; the id there is the tables'."""
    if not knows_registry():
        return 0
    from models.registry import forget

    return forget.forget(source, person.stands_in, person.stored, hashed)


def knows_registry() -> bool:
    """Whether there is an MLflow to ask."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or Path(".mlflow/mlflow.db").exists()


def remove_old_refits(source: str, keep_days: float, listed: set[str]) -> list[int]:
    """Numbers of the refits that were removed: older than `keep_days`, without an alias, and without
    lists. None where there is no registry to ask."""
    if not knows_registry():
        return []
    from models.core.errors import UserError
    from models.registry import old_refits

    try:
        before = int((time.time() - keep_days * 86_400) * 1000)
        return old_refits.remove_old_refits(source, before, listed)
    except UserError as error:
        raise SettingsError(str(error)) from error


def registry_pins(source: str) -> tuple[dict[int, list[str]], str]:
    """Versions of `gold.sequences` that registered models name, and in words where was asked."""
    if not knows_registry():
        return {}, (
            "no model registry was asked: MLFLOW_TRACKING_URI is not set, and there is no .mlflow "
            "folder here"
        )
    from models.core.errors import UserError
    from models.registry.register import trained_on

    try:
        pins, where = trained_on(source)
    except UserError as error:
        raise SettingsError(
            f"{error}. The registry is needed to know which versions its models use: nothing "
            "was removed"
        ) from error
    return pins, f"table versions kept for registered models of {where}: {len(pins)}"
