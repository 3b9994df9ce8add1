"""Commands in pods of their own. Importing Kubernetes' client takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.utils.xcom_sidecar import PodDefaults

from jobs.core.settings import settings
from sessionmill_dags import pods


class PodOperator(KubernetesPodOperator):
    """`python -m <module> <arguments> --json` in a pod made from `SESSIONMILL_POD_TEMPLATE`.

    Image, namespace, volumes, credentials and resources are the template's. Ours are the command,
    a training's GPUs, and that the answer goes where Airflow's side container reads it.
    """

    module = ""
    gpus = 0

    def __init__(self, *, arguments: Sequence[str], **others: Any) -> None:
        pod, base = pods.template(str(settings().pod_template), "SESSIONMILL_POD_TEMPLATE")
        pods.with_gpus(base, self.gpus)
        super().__init__(
            pod_template_dict=pod,
            cmds=["python", "-m", self.module],
            arguments=[*arguments, "--json"],
            env_vars={
                "SESSIONMILL_ANSWER_FILE": f"{PodDefaults.XCOM_MOUNT_PATH}/return.json",
                "SESSIONMILL_MLFLOW_WAIT_S": "900",
            },
            do_xcom_push=True,
            # An image of gigabytes is pulled, a GPU is waited for.
            startup_timeout_seconds=1800,
            schedule_timeout_seconds=3600,
            xcom_sidecar_container_security_context=base.get("securityContext"),
            on_finish_action="delete_succeeded_pod",  # a failed one is there to be looked at
            **others,
        )
