"""What a catalogue is worth for products that nobody has bought yet.

    python benchmarks/cold.py [--share .1] [--every 5] [--methods …] [--nights 10] [--json]

Takes the grocer's log of `make demo` (every 5th household), and out of it, until the last nights, a
share of the products, drawn by a hash of their ids: as if they came into the shop then. The catalogue
has all of them from the start. The jobs make the tables; every method is trained once, on what lies
before the nights, and asked about the baskets of the nights. Prints, over targets on products that no
model has seen an event of: how far up they stand among these products alone (mean share of the others
above them; by lot .5), their hit rate@10 on a shelf of these products alone, beside what lot would
give, and how often they are among the best 10 and 100 of all products.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "infra" / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prepare

from jobs.core.source_file import load_source
from models.core.rows import Bools
from models.data.load import load_data
from models.data.nights import nights_asked
from models.data.splits import TEST, Filters, Targets, targets
from models.evaluation.evaluate import evaluate
from models.evaluation.metrics import bootstrap
from models.networks.methods import config
from models.networks.recommender import Recommender
from models.training.fit import fit_for
from models.training.sides import with_sides

REPO = Path(__file__).resolve().parents[1]
METHODS = "sasrec+side,gru4rec+side,sessionrec-sasrec"
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
    source: Any, method: str, nights: int, seed: int, lake: str, epochs: int
) -> dict[str, Any]:
    chosen = config(method, "small", target="next_session", seed=seed, epochs=epochs)
    filters = Filters(**source.filters.model_dump())
    data = load_data(
        lake=lake, source=source.name, filters=filters, split="nightly", nights=nights, listed=True
    )
    assert data.at is not None
    first = nights_asked(data.sequences, data.cut)[0]
    data = data.at(replace(data.cut, valid_from=first, test_from=first))
    origin = int(data.training.rows.ts.min())
    chosen = replace(chosen, model=replace(chosen.model, time_origin_us=origin))
    chosen, data = with_sides(chosen, data, source, lake, print)
    fitted = fit_for(chosen, data, epochs, lambda said: print(said, file=sys.stderr))
    model = fitted.model
    assert isinstance(model, Recommender)
    asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_session")
    unseen = model.unseen.numpy()
    return {
        "method": method,
        "items": len(data.item_ids),
        "unseen_items": int(unseen.sum()),
        "train_s": round(fitted.seconds, 1),
        "ndcg@10": evaluate(model, asked, (10,)).mean("ndcg@10"),
        **placed(model, asked, unseen),
    }


def placed(model: Recommender, asked: Targets, unseen: Bools) -> dict[str, Any]:
    """Where the targets among the unseen items stand."""
    above, shelf, ten, hundred = [], [], [], []
    for low in range(0, len(asked.user), 64):
        part = asked.select(np.arange(low, min(low + 64, len(asked.user))))
        scores = model.score(part.rows, part.begin, part.end, part.request_ts, part.opens).numpy()
        of = np.repeat(np.arange(len(part.user)), np.diff(part.item_start))
        for row, item in zip(of, part.item - 1, strict=True):
            if item < 0 or not unseen[item]:
                continue
            place = int((scores[row, unseen] > scores[row, item]).sum())
            among_all = int((scores[row] > scores[row, item]).sum())
            above.append(place / (unseen.sum() - 1))
            shelf.append(place < 10)
            ten.append(among_all < 10)
            hundred.append(among_all < 100)
    if not above:  # this model lists nothing that has no event: it reads no catalogue
        return {"targets": 0}
    low_end, high_end = bootstrap(np.array(above)[:, None], DRAWS)[:, 0]
    return {
        "targets": len(above),
        "share_above": float(np.mean(above)),
        "share_above_low": float(low_end),
        "share_above_high": float(high_end),
        "shelf_hr@10": float(np.mean(shelf)),
        "shelf_by_lot": 10 / float(unseen.sum()),
        "all_hr@10": float(np.mean(ten)),
        "all_hr@100": float(np.mean(hundred)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=METHODS, help="default: %(default)s")
    parser.add_argument("--share", type=float, default=0.1, help="of the products")
    parser.add_argument("--every", type=int, default=5, help="one household in so many")
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=12)
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
