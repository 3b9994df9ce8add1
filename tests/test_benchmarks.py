"""The benchmarks run: figures come from them, so they may not rot between two measurements."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.airflow_tools import REPO


def printed(script: str, *options: str) -> Any:
    """The JSON on the last line of a benchmark."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *options, "--threads", "1", "--json"],
        cwd=REPO, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_epoch_of_training(tmp_path: Path) -> None:
    draw = random.Random(1)
    lines = [
        f"{user}::{draw.randrange(1, 60)}::5::{978_300_000 + 200_000 * session + 60 * place}\n"
        for user in range(1, 41)
        for session in range(8)
        for place in range(10)
    ]
    (tmp_path / "ratings.dat").write_text("".join(lines))
    (row,) = printed(
        "train", "--ratings", str(tmp_path / "ratings.dat"), "--epochs", "1", "--only", "gru4rec"
    )
    wanted = "method preset epoch_s events_per_second eval_s peak_rss_mb ndcg@10"
    assert set(wanted.split()) <= set(row) and row["method"] == "gru4rec"
    assert row["epoch_s"] > 0 and row["epochs"] == 2 and 0 < row["ndcg@10"] < 1


def test_a_history_and_a_list() -> None:
    rows = printed(
        "histories", "--lengths", "50", "--methods", "hstu,sessionrec-hstu", "--items", "300",
        "--dim", "16", "--repeat", "1",
    )  # fmt: skip
    assert [row["method"] for row in rows] == ["hstu", "sessionrec-hstu"]
    assert all(row["train_ms_a_history"] > 0 and row["answer_ms"] > 0 for row in rows)
    (row,) = printed("score", "--users", "200", "--methods", "sasrec", "--items", "90", "--k", "5")
    assert row["users"] == 200 and row["users_per_second"] > 0
