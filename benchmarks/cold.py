"""What a catalogue is worth for products that nobody has bought yet.

    python benchmarks/cold.py [--share .1] [--every 5] [--methods …] [--nights 10] [--json]

Takes the grocer's log of `make demo` (every 5th household), and out of it, until the last nights, a
share of the products, drawn by a hash of their ids: as if they came into the shop then. The catalogue
has all of them from the start. The jobs make the tables; every method is trained once, on what lies
before the nights, and asked about them. Prints NDCG@10 and hit rate@10, over users, of all targets
and of those on products that no model has seen an event of, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "infra" / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prepare

from jobs.core.source_file import load_source
from models.evaluation.evaluate import Result
from models.evaluation.metrics import bootstrap
from models.networks.methods import config
from models.training import nightly
from models.training.run import Request

REPO = Path(__file__).resolve().parents[1]
METHODS = "recent_pop,sasrec,sasrec+side,sasrec+habit+side,gru4rec+side,sessionrec-sasrec"
DRAWS = 5000
SOURCE = """\
[source]
name = "launches"
landing = "{folder}/log.csv"
format = "csv"
[columns]
user_id = "household_id"
item_id = "product_id"
event_ts = "transaction_timestamp"
source_session_id = "basket_id"
value = "quantity"
[time]
unit = "yyyy-MM-dd HH:mm:ss"
zone = "UTC"
[feedback]
positive = ["value > 0"]
[sessions]
rule = "source_session_id"
[filters]
min_item_events = 5
[items]
landing = "{folder}/products.csv"
format = "csv"
id = "product_id"
categories = ["department", "brand", "product_category"]
texts = ["product_type"]
"""


def launched(product: str, share: float) -> bool:
    """Whether a product comes into the shop with the last nights."""
    return int(hashlib.sha256(product.encode()).hexdigest()[:8], 16) < share * 16**8


def make(folder: Path, share: float, every: int, nights: int) -> dict[str, int]:
    """The log, the catalogue, the source file, and the tables."""
    prepare.EVERY = every
    log = prepare.load()
    last = log.transaction_timestamp.dt.normalize().max()
    early = log.transaction_timestamp < last - pd.Timedelta(days=nights - 1)
    out = log.product_id.astype(str).map(lambda product: launched(product, share))
    (folder / "log.csv").write_text(prepare.as_csv(log[~(early & out)]), encoding="utf-8")
    products = prepare.shipped(
        "products", ["product_id", "department", "brand", "product_category", "product_type"]
    )
    products = products[products.product_id.isin(log.product_id.unique())]
    products.to_csv(folder / "products.csv", index=False)
    file = folder / "launches.toml"
    file.write_text(SOURCE.format(folder=folder), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "jobs", "run", "--source", str(file)], cwd=REPO, check=True
    )
    return {"events": int((~(early & out)).sum()), "taken out": int((early & out).sum())}


def measured(
    source: Any, method: str, nights: int, seed: int, lake: str, epochs: int | None
) -> dict[str, Any]:
    request = Request(
        source=source,
        lake=lake,
        config=config(method, "small", target="next_session", seed=seed, epochs=epochs),
        split="nightly",
        nights=nights,
        each_night="once",
    )
    prepared, outcome = nightly.unrecorded(request, lambda _: None)
    assert isinstance(prepared, nightly.Backtest)
    return {
        "method": method,
        "items": len(prepared.data.item_ids),
        "best_epoch": outcome.fitted.best_epoch,
        "train_s": round(outcome.fitted.seconds, 1),
        "all": told(outcome.result),
        **{age: told(one) for age, one in outcome.result.ages.items()},
    }


def told(result: Result) -> dict[str, Any]:
    values = result.values["ndcg@10"]
    low, high = bootstrap(values[:, None], DRAWS)[:, 0] if len(values) else (0.0, 0.0)
    return {
        "users": len(values),
        "targets": int(result.counts["targets"]),
        "ndcg@10": float(values.mean()) if len(values) else 0.0,
        "low": float(low),
        "high": float(high),
        "hr@10": float(result.values["hr@10"].mean()) if len(values) else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=METHODS, help="default: %(default)s")
    parser.add_argument("--share", type=float, default=0.1, help="of the products")
    parser.add_argument("--every", type=int, default=5, help="one household in so many")
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="at most")
    parser.add_argument(
        "--folder", help="made there, and used if it is there; default: thrown away"
    )
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as scratch:
        folder = Path(args.folder or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["SESSIONMILL_LAKE"] = lake = str(folder / "lake")
        if not (folder / "launches.toml").exists():
            print(make(folder, args.share, args.every, args.nights), file=sys.stderr)
        source = load_source(str(folder / "launches.toml"))
        found = []
        for method in args.methods.split(","):
            one = measured(source, method, args.nights, args.seed, lake, args.epochs)
            found.append(one)
            print(json.dumps(one), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
