"""What a warm refit costs and gives, night by night, beside a training from scratch.

    python benchmarks/refit.py --source FILE [--methods …] [--nights N] [--json]

Reads gold.sequences of the source's lake. Before each of the last nights every method is trained from
scratch on all that lies before it, and, in a second backtest, goes on from the night before; both are
asked about the night. Prints NDCG@10 of both over the nights after the first, the paired difference
over users with its 95 % interval, and the processor's seconds of the warm trainings as a share of
those from scratch. One thread, so that methods of one machine can be held against each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.core.settings import settings
from jobs.core.source_file import load_source
from models.evaluation.metrics import bootstrap
from models.networks.methods import config
from models.training import nightly
from models.training.run import Request

METHODS = "sasrec,gru4rec,bert4rec,hstu,sessionrec-sasrec"
DRAWS = 5000


def judged(source: Any, method: str, nights: int | None, each: str, seed: int) -> nightly.Outcome:
    target = "next_session" if method.startswith("sessionrec") else "next_item"
    request = Request(
        source=source,
        lake=settings().table_root(),
        config=config(method, source.training.preset, target=target, seed=seed),
        split="nightly",
        nights=nights,
        each_night=each,
    )
    outcome: nightly.Outcome = nightly.unrecorded(request, lambda _: None)[1]
    return outcome


def after_the_first(outcome: nightly.Outcome, name: str) -> float:
    """Summed over the nights whose models are not the same in both."""
    return float(sum(night[name] for night in outcome.by_night[1:]))


def measured(source: Any, method: str, nights: int | None, seed: int) -> dict[str, Any]:
    scratch, warm = (judged(source, method, nights, each, seed) for each in ("scratch", "warm"))
    assert np.array_equal(scratch.result.users, warm.result.users)
    difference = warm.result.values["ndcg@10"] - scratch.result.values["ndcg@10"]
    low, high = bootstrap(difference[:, None], DRAWS)[:, 0]
    spent = [after_the_first(one, "train_s") for one in (warm, scratch)]
    return {
        "method": method,
        "best_epoch": scratch.fitted.best_epoch,
        "nights": len(scratch.by_night),
        "users": len(difference),
        "ndcg@10_warm": warm.result.mean("ndcg@10"),
        "ndcg@10_scratch": scratch.result.mean("ndcg@10"),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "warm_s": spent[0],
        "scratch_s": spent[1],
        "cost": spent[0] / spent[1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="a source's name or its file")
    parser.add_argument("--methods", default=METHODS, help="default: %(default)s")
    parser.add_argument("--nights", type=int, help="default: as train --split nightly")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Trainings take their seconds by this clock; a process that waits for others costs nothing.
    time.perf_counter = time.process_time
    source, rows = load_source(args.source), []
    for method in args.methods.split(","):
        one = measured(source, method, args.nights, args.seed)
        rows.append(one)
        print(
            f"{method} ({one['best_epoch']} epochs, {one['nights']} nights, {one['users']:,} users): "
            f"warm {one['ndcg@10_warm']:.4f}, from scratch {one['ndcg@10_scratch']:.4f}, difference "
            f"{one['difference']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]; "
            f"{one['warm_s']:.1f} s of {one['scratch_s']:.1f} s: {one['cost']:.3f}",
            flush=True,
        )
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
