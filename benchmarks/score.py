"""Lists for all users: how many a second, and how much of it is the model's forward pass.

    python benchmarks/score.py [--users 100000] [--items 10000] [--k 100] [--dim 64] [--rules] [--json]

Made-up histories, models that have learnt nothing (their cost is the same). Apart: the forward
pass with the scores of the catalogue, the choice of the best K, Arrow tables, and Parquet files
written; then one user asked alone, in process. Seconds of the clock, and of the processor, which say
more on a machine that does other things, too. `--rules` lists what rules allow: nine items of ten, and
at most three of a category.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

METHODS = ("sasrec", "gru4rec", "hstu", "sessionrec-sasrec", "personal_top")


def measure(method: str, args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    from jobs.lake import filesystem
    from models.core.rows import Rows
    from models.networks.methods import build, config
    from models.networks.saved_model import Stored
    from models.networks.scoring import best, parts
    from models.selection.gate import latency
    from models.serving.all_users import lists
    from models.serving.rules import Rules

    dice = np.random.default_rng(5)
    length = np.clip(dice.geometric(1 / args.events, args.users), 1, 500)
    start = np.concatenate([[0], np.cumsum(length)])
    place = np.arange(start[-1]) - np.repeat(start[:-1], length)
    rows = Rows(
        item=(dice.integers(args.items, size=start[-1]) + 1).astype(np.int32),
        ts=place.astype(np.int64) * 600_000_000,
        ordinal=(place // 5 + 1).astype(np.int32),
        positive=np.ones(start[-1], dtype=bool),
        start=start,
    )
    chosen = config(method, "small", dim=args.dim)
    model = build(args.items, chosen)
    model.fit(rows)
    model.eval()
    ids = [f"item-{n}" for n in range(args.items)]
    stored = Stored(model, chosen, ids, torch.ones(args.items), {"gap_us": 1_800_000_000})
    rules = None
    if args.rules:
        allowed, category = dice.random(args.items) < 0.9, dice.integers(0, 200, args.items)
        rules = Rules(allowed, most=3, category=category)
    some = min(args.users, 16_384)
    size = np.diff(start)[:some]
    order = np.argsort(size, kind="stable")
    chunk = parts(model, order, size[order])
    spent = dict.fromkeys(("forward_s", "best_s", "forward_cpu_s", "best_cpu_s"), 0.0)
    for users in chunk:
        began = clocks()
        scores = model.score(rows, start[users], start[users + 1])
        middle = clocks()
        best(scores, args.k)
        for name, since, until in (("forward", began, middle), ("best", middle, clocks())):
            spent[f"{name}_s"] += until[0] - since[0]
            spent[f"{name}_cpu_s"] += until[1] - since[1]
    with tempfile.TemporaryDirectory() as folder:
        began = clocks()
        for number, (_, table) in enumerate(lists(stored, rows, args.k, rules)):
            filesystem.write_parquet(f"{folder}/{number}.parquet", table)
        seconds, cpu = (until - since for since, until in zip(began, clocks(), strict=True))
    return {
        "method": method, "users": args.users, "items": args.items, "k": args.k, "dim": args.dim,
        "users_per_second": round(args.users / seconds),
        **{name: round(value * args.users / some, 2) for name, value in spent.items()},
        "seconds": round(seconds, 2), "cpu_s": round(cpu, 2), "rules": args.rules, "one_user": latency(stored, 50.0),
    }  # fmt: skip


def clocks() -> tuple[float, float]:
    """Seconds of the clock, and of this process on all of its processors."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=20, help="of a user, in the mean")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rules", action="store_true", help="lists by rules")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    found = []
    for method in args.methods.split(","):
        found.append(measure(method, args))
        print(found[-1], file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
