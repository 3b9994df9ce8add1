"""What pods look like: templates are files that settings name. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

GPU = "nvidia.com/gpu"


def template(file: str, setting: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A template's pod, and its container `base`, which is the one that works.

    Raises:
        ValueError: the file has no pod with such a container.
    """
    try:
        pod: dict[str, Any] = yaml.safe_load(Path(file).read_text())
        [base] = [one for one in pod["spec"]["containers"] if one["name"] == "base"]
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{setting} = {file}: no pod with a container named 'base' "
            f"({type(error).__name__}: {error}); infra/kubernetes/ has one to begin with"
        ) from None
    return pod, base


def with_gpus(base: dict[str, Any], gpus: int) -> None:
    """Limit a container to so many GPUs; none asks for none."""
    if gpus:
        base.setdefault("resources", {}).setdefault("limits", {})[GPU] = gpus


def spark_conf(file: str) -> dict[str, str]:
    """Configuration of a `spark-submit` whose driver and executors are such pods."""
    pod, base = template(file, "SESSIONMILL_SPARK_POD_TEMPLATE")
    conf = {
        "spark.kubernetes.container.image": base["image"],
        "spark.kubernetes.authenticate.driver.serviceAccountName": pod["spec"][
            "serviceAccountName"
        ],
        "spark.kubernetes.namespace": pod["metadata"]["namespace"],
    }
    for role in ("driver", "executor"):
        conf[f"spark.kubernetes.{role}.podTemplateFile"] = file
        conf[f"spark.kubernetes.{role}.podTemplateContainerName"] = "base"
    return conf
