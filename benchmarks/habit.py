"""What `+habit` costs: an epoch with it over an epoch without it, in turns.

    python benchmarks/habit.py --source FILE [--split last_item] [--backbones sasrec,gru4rec] [--turns 3] [--json]

Reads gold.sequences of the source's lake, as `python -m models train` does. In each turn the backbone is trained
for `--epochs` epochs, then the backbone with `+habit` for as many; the first epoch is warm-up. All are
joint epochs: the ones in which the head learns alone cost less. The figure is the median over turns of
the ratio of processor seconds, on one thread, so what others do on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.core.settings import settings
from jobs.core.source_file import Source, load_source
from models.data.load import Data, load_data
from models.data.splits import Filters
from models.networks.methods import config
from models.training.fit import fit


def epoch_cpu_s(method: str, data: Data, source: Source, epochs: int) -> float:
    """Processor seconds of an epoch: the median of those after the first."""
    training = source.training
    chosen = config(
        method, training.preset, target=training.target, epochs=epochs, patience=epochs,
        habit_epochs=0, validation_targets=0,
    )  # fmt: skip
    at = [time.process_time()]
    fit(chosen, data, lambda _: None, each_epoch=lambda *_: at.append(time.process_time()))
    return median(after - before for before, after in pairwise(at[1:]))


def measured(backbone: str, data: Data, source: Source, epochs: int, turns: int) -> dict[str, Any]:
    seconds = [
        [epoch_cpu_s(method, data, source, epochs) for method in (backbone, f"{backbone}+habit")]
        for _ in range(turns)
    ]
    ratios = [beside / alone for alone, beside in seconds]
    return {
        "backbone": backbone,
        "events": len(data.training.rows.item),
        "items": len(data.item_ids),
        "epoch_cpu_s": median(alone for alone, _ in seconds),
        "epoch_cpu_s_habit": median(beside for _, beside in seconds),
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="a source's name or its file")
    parser.add_argument("--split", help="default: as the source file says")
    parser.add_argument("--backbones", default="sasrec,gru4rec", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="the first is not timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error(f"--epochs {args.epochs}: 2 or more, because the first is not timed")
    import torch

    torch.set_num_threads(args.threads)
    source, rows = load_source(args.source), []
    data = load_data(
        lake=settings().table_root(),
        source=source.name,
        filters=Filters(**source.filters.model_dump()),
        split=args.split or source.training.split,
    )
    for backbone in args.backbones.split(","):
        one = measured(backbone, data, source, args.epochs, args.turns)
        rows.append(one)
        low, high = one["ratio_range"]
        print(
            f"{backbone}, {one['events']:,} training events, {one['items']:,} items: an epoch "
            f"{one['epoch_cpu_s']:.1f} s, with +habit {one['epoch_cpu_s_habit']:.1f} s: "
            f"{one['ratio']:.2f} times ({low:.2f} to {high:.2f})",
            flush=True,
        )
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
