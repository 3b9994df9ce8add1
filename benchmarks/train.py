"""What an epoch of training costs: seconds, events a second, peak memory, and what it learnt.

    python benchmarks/train.py --ratings ratings.dat.gz [--epochs 3] [--only NAME,…] [--json]

Takes a MovieLens file (`user::item::rating::timestamp`, gzip or not) through paper A's
preprocessing, without Spark, and trains the configurations of `CONFIGURATIONS` one after another,
each in a process of its own, for whole epochs; evaluation (full ranking of all users) apart. The
first epoch is warm-up and not timed; of the others the median and the range are printed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PEERS = {  # two blocks of 256: a size at which public libraries can be run beside
    "dim": 256, "heads": 2, "layers": 2, "max_len": 200, "batch_size": 128, "dropout": 0.2,
    "learning_rate": 1e-3, "all_windows": False, "patience": 10**6,
}  # fmt: skip
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> method, preset, changes
    "paper_a": ("bert4rec+st+sse+tsa", "paper_a_ml1m", {}),
    "sasrec": ("sasrec", "small", PEERS),
    "bert4rec": ("bert4rec", "small", PEERS | {"mask_share": 0.2}),
    "hstu": ("hstu", "small", PEERS),
    "gru4rec": ("gru4rec", "small", PEERS),
}


def read(ratings: Path) -> Any:
    """The file as the arrays of gold.sequences; sessions by gaps of 24 hours."""
    import numpy as np

    from models.core.rows import run_starts
    from models.data.sequences import Sequences

    opener = gzip.open if ratings.suffix == ".gz" else open
    with opener(ratings, "rt", encoding="latin-1") as lines:
        rows = np.fromstring(lines.read().replace("::", " "), dtype=np.int64, sep=" ").reshape(
            -1, 4
        )
    rows = rows[np.lexsort((rows[:, 3], rows[:, 0]))]  # stable: ties stay in the file's order
    users, user = np.unique(rows[:, 0], return_inverse=True)
    length = np.bincount(user)
    start = np.cumsum(length) - length
    ts = rows[:, 3] * 1_000_000
    opens = run_starts(user)
    opens[1:] |= np.diff(ts) > 86_400_000_000
    session = np.cumsum(opens)
    nothing = np.zeros(len(rows), dtype=np.int32)
    return Sequences(
        path=str(ratings), version=0, table_id="", user_id=[str(u) for u in users],
        start=start, length=length, item=rows[:, 1].astype(np.int32), ts=ts,
        session=(session - session[start][user] + 1).astype(np.int32),
        feedback=nothing.astype(np.int8), exposed=nothing[:0], exposed_count=nothing,
    )  # fmt: skip


def measure(name: str, ratings: Path, epochs: int, threads: int, device: str) -> dict[str, Any]:
    """One configuration, in this process."""
    import torch

    from models.core.environment import peak_rss_mb
    from models.data.load import Data
    from models.data.paper_a import paper_a
    from models.data.splits import TEST, Cut, Events, Filters, periods, targets, training_rows
    from models.evaluation.evaluate import evaluate
    from models.networks.methods import config
    from models.training.fit import fit

    torch.set_num_threads(threads)
    events = paper_a(Events.of(read(ratings)))
    cut = Cut(split="last_item")
    period = periods(events, cut)
    every = Filters(min_item_events=1, min_session_events=1, min_user_sessions=1)
    training = training_rows(events, period, every, whole_vocabulary=True)
    items = [str(item) for item in training.vocabulary]
    data = Data(events.sequences, events, cut, period, training, items)
    method, preset, changes = CONFIGURATIONS[name]
    # Without a validation target the last epoch's weights are kept, as the score below says.
    chosen = config(method, preset, epochs=epochs + 1, validation_targets=0, **changes)
    fitted = fit(chosen, data, lambda text: print(f"  {name}: {text}", file=sys.stderr), device)
    timed = fitted.curves["epoch_s"][1:]
    asked = targets(events, period, TEST, training.vocabulary, "next_item")
    began = time.perf_counter()
    result = evaluate(fitted.model, asked, (10,))
    return {
        "method": method,
        "preset": name,
        "num_params": sum(p.numel() for p in fitted.model.parameters()),
        "epoch_s": round(median(timed), 2),
        "epoch_s_range": [round(min(timed), 2), round(max(timed), 2)],
        "events_per_second": round(len(training.rows.item) / median(timed)),
        "eval_s": round(time.perf_counter() - began, 2),
        "peak_rss_mb": peak_rss_mb(),
        "epochs": epochs + 1,
        "ndcg@10": round(result.mean("ndcg@10"), 4),
        "hr@10": round(result.mean("hr@10"), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3, help="timed ones, after one of warm-up")
    parser.add_argument("--only", help=f"of {', '.join(CONFIGURATIONS)}, by comma")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in this process, JSON on its last line
    args = parser.parse_args()
    if args.one:
        done = measure(args.one, args.ratings, args.epochs, args.threads, args.device)
        print(json.dumps(done))
        return
    names = args.only.split(",") if args.only else list(CONFIGURATIONS)
    found = []
    for name in names:
        if name not in CONFIGURATIONS:
            parser.error(f"--only {name}: one of {', '.join(CONFIGURATIONS)}")
        command = [
            sys.executable, __file__, "--ratings", str(args.ratings), "--one", name, "--epochs",
            str(args.epochs), "--threads", str(args.threads), "--device", args.device,
        ]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    if args.json:
        print(json.dumps(found))
        return
    for row in found:
        low, high = row["epoch_s_range"]
        print(
            f"{row['preset']:10} {row['method']:22} {row['num_params']:>10,} parameters "
            f"{row['epoch_s']:7.2f} s an epoch ({low} to {high}) "
            f"{row['events_per_second']:>8,} events/s, evaluation {row['eval_s']} s, "
            f"{row['peak_rss_mb']:,.0f} MB, NDCG@10 {row['ndcg@10']} after {row['epochs']} epochs"
        )


if __name__ == "__main__":
    main()
