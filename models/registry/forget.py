"""A person leaves MLflow: their id in evaluations' scores, and pages that show them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.registry import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCORES = ("evaluation/per_user.npz", "evaluation/per_user_last_night.npz")
PAGE = "report.html"
GONE = (
    "<!doctype html><meta charset=utf-8><title>removed</title><p>This page showed a person who has "
    "been forgotten. Their data are gone from the tables that {comparison} was made of: train and "
    "compare anew, then python -m models report --source {source}\n"
)


def forget(source: str, stands_in: Callable[[str], bool], stored: str, pseudonym: str) -> int:
    """Take a person out of the artifacts of a source's runs; how many files were written anew.

    In `per_user….npz` the id becomes the pseudonym: the scores stay, so what was compared on these
    users stays true, and runs still agree about who was asked.
    """
    from mlflow.entities import ViewType

    client, experiment = tracking.connect(source)
    written, token = 0, None
    while True:
        page = client.search_runs(
            [experiment], run_view_type=ViewType.ALL, max_results=500, page_token=token
        )
        for run in page:
            written += _from_run(client, run, source, stands_in, stored, pseudonym)
        token = page.token
        if not token:
            return written


def _from_run(
    client: MlflowClient,
    run: Any,
    source: str,
    stands_in: Callable[[str], bool],
    stored: str,
    pseudonym: str,
) -> int:
    run_id, written = run.info.run_id, 0
    there = {
        one.path for folder in ("", "evaluation") for one in client.list_artifacts(run_id, folder)
    }
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as scratch:
        for scores in there.intersection(SCORES):
            file = Path(client.download_artifacts(run_id, scores, scratch))
            with np.load(file, allow_pickle=False) as stored_arrays:
                arrays = dict(stored_arrays)
            names = [n for n in arrays if n.rpartition(".")[2] == "user_id" and stored in arrays[n]]
            if names:
                for name in names:
                    ids = arrays[name].tolist()
                    changed = [pseudonym if one == stored else one for one in ids]
                    arrays[name] = np.array(changed, dtype=np.str_)
                np.savez_compressed(file, **arrays)
                client.log_artifact(run_id, str(file), "evaluation")
                written += 1
        if PAGE in there:
            file = Path(client.download_artifacts(run_id, PAGE, scratch))
            if stands_in(file.read_text(encoding="utf-8")):
                comparison = run.data.tags.get(tracking.COMPARISON, "…")
                file.write_text(GONE.format(source=source, comparison=comparison))
                client.log_artifact(run_id, str(file))
                written += 1
    return written
