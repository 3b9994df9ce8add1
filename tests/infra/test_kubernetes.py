"""What would be sent to a Kubernetes: manifests, and the pods that tasks ask for, each held against
Kubernetes' own schemas. (There is no cluster here: that they start is not shown.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.dags.test_dags import REPO, write_source

MANIFESTS = sorted((REPO / "infra" / "kubernetes").glob("*.yaml"))
SCHEMA = kubernetes_validate.latest_version()
GPU = "nvidia.com/gpu"

# In a process of its own: whether there are pods is decided when the DAG files are read.
RENDER = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from kubernetes.client import ApiClient

bag = DagBag(dag_folder=sys.argv[1])
if bag.import_errors:
    print(*bag.import_errors.values(), file=sys.stderr)
    sys.exit(1)
training, scoring = bag.dags["train_methods.clicks"], bag.dags["score_daily.clicks"]
tasks = {
    "train": training.get_task("train").unmap({"arguments": ["train", "--method", "a;b"]}),
    "compare": training.get_task("compare"), "report": training.get_task("report"),
    "score": scoring.get_task("score"),
}
pods = {
    name: ApiClient().sanitize_for_serialization(task.build_pod_request_obj(dry_run=True))
    for name, task in tasks.items()
}
spark = bag.dags["sessions_daily.clicks"].get_task("events.compute")
hook = spark._get_hook()
print(json.dumps({"pods": pods, "spark": hook._build_spark_submit_command(spark.application)}))
"""


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_a_manifest_says_what_kubernetes_knows(file: Path) -> None:
    said = [one for one in yaml.safe_load_all(file.read_text()) if one]
    assert said
    for one in said:
        kubernetes_validate.validate(one, SCHEMA, strict=True)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "sessionmill"


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["kind"] == "Pod":
        return [manifest["spec"]]
    return [manifest["spec"]["template"]["spec"]] if manifest["kind"] == "Deployment" else []


def test_nobody_is_root_and_no_secret_is_written_down() -> None:
    told = "".join(file.read_text() for file in MANIFESTS)
    every = [one for file in MANIFESTS for one in yaml.safe_load_all(file.read_text()) if one]
    pods = [pod for one in every for pod in pods_of(one)]
    assert len(pods) == 4 and "kind: Secret" not in told
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["image"].endswith(":latest") and ":" in container["image"]


def rendered(
    folder: Path, **settings: str
) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    write_source(folder, "clicks")
    env = os.environ | {
        "AIRFLOW_HOME": str(folder / "airflow"), "SESSIONMILL_SOURCES": str(folder),
        "SESSIONMILL_POD_TEMPLATE": str(REPO / "infra" / "kubernetes" / "pod.yaml"),
        "SESSIONMILL_SPARK_POD_TEMPLATE": str(REPO / "infra" / "kubernetes" / "spark-pod.yaml"),
    }  # fmt: skip
    manifest = (REPO / "infra" / "kubernetes" / "airflow.yaml").read_text()
    [told] = [
        one["data"]
        for one in yaml.safe_load_all(manifest)
        if one["kind"] == "ConfigMap" and one["metadata"]["name"] == "airflow"
    ]
    connections = {name: told[name] for name in told if name.startswith("AIRFLOW_CONN_")}
    done = subprocess.run(
        [sys.executable, "-c", RENDER, str(REPO / "dags")], env=env | connections | settings,
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return (json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}), done


def test_commands_run_in_pods_and_trainings_have_a_gpu(tmp_path: Path) -> None:
    found, done = rendered(tmp_path, SESSIONMILL_TRAINING_GPUS="2")
    assert done.returncode == 0, done.stderr[-4000:]
    for name, pod in found["pods"].items():
        kubernetes_validate.validate(pod, SCHEMA, strict=True)
        containers = {one["name"]: one for one in pod["spec"]["containers"]}
        base, side = containers["base"], containers["airflow-xcom-sidecar"]
        assert base["image"] == "registry.example.com/sessionmill/train:0.2.0"
        assert base["command"] == ["python", "-m", "jobs" if name == "score" else "models"]
        assert base["args"][0] == name and base["args"][-1] == "--json"
        assert (base["resources"]["limits"].get(GPU) == "2") == (name == "train")
        assert base["resources"]["limits"]["memory"] == "16Gi"
        env = {one["name"]: one["value"] for one in base["env"]}
        assert env["SESSIONMILL_ANSWER_FILE"] == "/airflow/xcom/return.json"
        assert {"secretRef": {"name": "sessionmill-commands"}} in base["envFrom"]
        mounts = {one["mountPath"] for one in base["volumeMounts"]}
        assert mounts >= {"/airflow/xcom", "/etc/sessionmill/sources", "/tmp"}
        assert side["securityContext"] == base["securityContext"]
        assert pod["metadata"]["namespace"] == "sessionmill"
        assert pod["spec"]["restartPolicy"] == "Never"
    # No shell: what a person typed is one word.
    train = found["pods"]["train"]["spec"]["containers"][0]
    assert train["args"] == ["train", "--method", "a;b", "--json"]

    words = found["spark"]
    assert words[:3] == ["spark-submit", "--master", "k8s://https://kubernetes.default.svc:443"]
    assert words[words.index("--deploy-mode") + 1] == "cluster"
    conf = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "--conf")
    assert conf["spark.kubernetes.container.image"].endswith("/spark:0.2.0")
    assert conf["spark.kubernetes.driver.podTemplateFile"].endswith("spark-pod.yaml")
    assert conf["spark.kubernetes.authenticate.driver.serviceAccountName"] == "spark"
    at = words.index(f"local://{REPO}/jobs/__main__.py")
    assert words[at + 1 : at + 4] == ["ingest", "--source", "clicks"]


def test_a_template_that_is_none_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("spec: {containers: [{name: other}]}\n")
    _, done = rendered(tmp_path, SESSIONMILL_POD_TEMPLATE=str(bad))
    assert f"SESSIONMILL_POD_TEMPLATE = {bad}: no pod with a container named 'base'" in done.stderr


def test_an_answer_is_written_where_a_pod_is_read(tmp_path: Path) -> None:
    there = tmp_path / "return.json"
    done = subprocess.run(
        [sys.executable, "-m", "models", "params", "--method", "sasrec", "--items", "9", "--json"],
        env=os.environ | {"SESSIONMILL_ANSWER_FILE": str(there)},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(there.read_text()) == json.loads(done.stdout.splitlines()[-1])
