"""What a user's history costs, by its length: next-session models beside next-item ones.

    python benchmarks/histories.py [--lengths 50,…,5000] [--loss full] [--plot FILE.svg] [--json]

Histories of N events in sessions of `--session` items, made from a seed; every method sees all N.
Same width and depth. A training step (forwards, backwards, optimiser) over several such users, and
the answer to one request, in a process of its own for each method and length; medians of
`--repeat` after one of warm-up. The two losses say different things: over the whole catalogue most
of a next-item model's time goes into logits at N positions, with few drawn items it is the layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

METHODS = ("sasrec", "hstu", "sessionrec-sasrec", "sessionrec-hstu", "sessionrec-gru4rec")
LENGTHS = (50, 100, 200, 500, 1000, 2000, 5000)
STEP_EVENTS = 20_000  # of all users of a step, so that short histories are timed in company


def histories(users: int, length: int, session: int, items: int) -> Any:
    """`Rows`: `users` histories of `length` events, Zipf items, a session a day."""
    import numpy as np

    from models.core.rows import Rows

    rng = np.random.default_rng(7)
    share = 1 / np.arange(1, items + 1)
    day, second = 86_400_000_000, 1_000_000
    place = np.tile(np.arange(length), users)
    return Rows(
        item=(rng.choice(items, users * length, p=share / share.sum()) + 1).astype(np.int32),
        ts=(place // session * day + place % session * second).astype(np.int64),
        ordinal=(place // session + 1).astype(np.int32),
        positive=np.ones(users * length, dtype=bool),
        start=np.arange(users + 1, dtype=np.int64) * length,
    )


def timed(work: Callable[[], object], repeat: int) -> float:
    seconds = []
    for _ in range(1 + repeat):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def measure(method: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One method at one length, in this process."""
    import torch

    from models.core.environment import peak_rss_mb
    from models.networks.methods import config, recommender
    from models.training.epoch import Epoch
    from models.training.fit import Run

    torch.set_num_threads(args.threads)
    sessions = method.startswith("sessionrec")
    users = max(2, STEP_EVENTS // length)
    rows = histories(users, length, args.session, args.items)
    chosen = config(
        method, "small", dim=args.dim, layers=args.layers, loss=args.loss, all_windows=False,
        max_len=-(-length // args.session) if sessions else length, batch_size=users,
        target="next_session" if sessions else "next_item",
    )  # fmt: skip
    model = recommender(args.items, chosen)
    model.fit(rows)
    before = peak_rss_mb()
    run = Run(model, chosen, rows, args.device, Epoch(model, rows, chosen, 1).team)
    epoch = Epoch(model, rows, chosen, 1, device=args.device)

    def step() -> None:
        run.step(epoch[0], 0.5)

    model.train()
    train_s = timed(step, args.repeat)
    model.eval()
    one = rows.start[:1], rows.start[1:2]
    answer_s = timed(lambda: model.score(rows, *one), 5 * args.repeat)
    return {
        "method": method, "events": length, "users": users,
        "num_params": sum(p.numel() for p in model.parameters()),
        "train_ms_a_history": round(1000 * train_s / users, 3),
        "train_us_an_event": round(1e6 * train_s / users / length, 2),
        "answer_ms": round(1000 * answer_s, 2),
        "peak_rss_mb": peak_rss_mb(), "peak_rss_mb_before": before,
    }  # fmt: skip


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Training time and answer time against length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "sessionmill"
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, label in (
        (axes[0], "train_ms_a_history", "training a history, ms"),
        (axes[1], "answer_ms", "answering a request, ms"),
    ):
        for method in dict.fromkeys(row["method"] for row in found):
            own = [row for row in found if row["method"] == method]
            axis.loglog(
                [r["events"] for r in own], [r[name] for r in own], marker="o", ms=4, label=method,
                ls="-" if method.startswith("sessionrec") else "--",
            )  # fmt: skip
        axis.set_xlabel("events of the history")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both", lw=0.4)
    axes[0].legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def table(found: list[dict[str, Any]], methods: list[str]) -> str:
    """One row a length: ms a history by method, and how much cheaper sessions are."""
    by = {(row["method"], row["events"]): row for row in found}
    head = [f"| events | {' | '.join(methods)} | hstu / sessionrec-hstu |"]
    head.append("|---" * (len(methods) + 2) + "|")
    for length in dict.fromkeys(row["events"] for row in found):
        cells, parts = [], ("train_ms_a_history", "answer_ms", "peak_rss_mb")
        for method in methods:
            row = by.get((method, length))
            cells.append(", ".join(f"{row[part]:,.4g}" for part in parts) if row else "")
        pair = [by.get((name, length)) for name in ("hstu", "sessionrec-hstu")]
        ratio = [f"{pair[0][p] / pair[1][p]:.1f}" for p in parts[:2]] if all(pair) else []
        head.append(f"| {length:,} | {' | '.join(cells)} | {', '.join(ratio)} |")
    return "\n".join(head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--session", type=int, default=10, help="items of a session")
    parser.add_argument("--items", type=int, default=10_000, help="V")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--loss", default="full", help="full, or sampled with 256 items")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # METHOD:LENGTH, in this process
    args = parser.parse_args()
    if args.one:
        method, _, length = args.one.partition(":")
        print(json.dumps(measure(method, int(length), args)))
        return
    found = []
    methods = args.methods.split(",")
    for length in map(int, args.lengths.split(",")):
        for method in methods:  # in turns, so that a slow minute is everyone's
            command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{method}:{length}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], file=sys.stderr, flush=True)
    if args.plot:
        plot(found, args.plot)
    if args.json:
        print(json.dumps(found))
    else:
        print("training a history in ms, answering a request in ms, peak memory in MB\n")
        print(table(found, methods))


if __name__ == "__main__":
    main()
