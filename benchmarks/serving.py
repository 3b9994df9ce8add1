"""Answers a second of a counted method, one request at a time and a hundred at once.

    python benchmarks/serving.py --source FILE [--method vsknn] [--model models:/NAME/1] [--requests 1000]

A request is what the session at hand holds before an item of the test period. Measured in process,
in seconds of CPU of this process (what others do on the machine does not count, though it slows
memory and caches): the scores alone; raw ids in and a list of 20 out, as the registered model
does it; and, with --model, a registered version through `mlflow.pyfunc`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

AT_ONCE = 100
K = 20


def per_second(work: Callable[[Any], object], parts: Sequence[Any], requests: int) -> int:
    """Requests a second of CPU, warm."""
    work(parts[0])
    began = time.process_time()
    for part in parts:
        work(part)
    return round(requests / (time.process_time() - began))


def requests_of(data: Any, count: int) -> tuple[Any, Any, Any]:
    """(rows, begin, end) of drawn targets of the test period, each with its session so far."""
    import numpy as np

    from models.data.splits import TEST, targets

    asked = targets(data.events, data.period, TEST, data.training.vocabulary, "next_item")
    rows = asked.rows
    begin = np.maximum(asked.begin, rows.session_start[rows.session[asked.end - 1]])
    drawn = np.random.default_rng(1).permutation(len(begin))[:count]
    return rows, begin[drawn], asked.end[drawn]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import mlflow
    import numpy as np
    import pandas as pd
    import torch

    from jobs.core.settings import settings
    from jobs.core.source_file import load_source
    from models.data.load import load_data
    from models.data.splits import Filters
    from models.networks.methods import build, config
    from models.networks.saved_model import Stored
    from models.serving.answer import recommend

    torch.set_num_threads(1)
    source = load_source(args.source)
    data = load_data(
        lake=settings().lake, source=source.name, filters=Filters(**source.filters.model_dump())
    )
    chosen = config(args.method)
    model = build(len(data.item_ids), chosen)
    model.fit(data.training.rows)
    facts = {"gap_us": source.sessions.gap_us}
    stored = Stored(model, chosen, data.item_ids, torch.ones(len(data.item_ids)), facts)
    rows, begin, end = requests_of(data, args.requests)
    ids = np.array(data.item_ids, dtype=object)

    def frame(places: Sequence[Any]) -> pd.DataFrame:
        parts = [
            pd.DataFrame(
                {
                    "user_id": f"u{place}",
                    "item_id": ids[rows.item[begin[place] : end[place]] - 1],
                    "event_ts": pd.to_datetime(
                        rows.ts[begin[place] : end[place]], unit="us", utc=True
                    ),
                }
            )
            for place in places
        ]
        return pd.concat(parts, ignore_index=True)

    ways: dict[str, Callable[[Any], object]] = {
        "raw ids": lambda asked: recommend(stored, asked, K)
    }
    if args.model:
        registered = mlflow.pyfunc.load_model(args.model)
        ways["pyfunc"] = lambda asked: registered.predict(asked, params={"k": K})
    found: dict[str, Any] = {
        "method": args.method, "requests": len(begin), "items": len(ids),
        "training_events": len(data.training.rows.item),
        "session_items": round(float((end - begin).mean()), 2),
    }  # fmt: skip
    for size in (1, AT_ONCE):
        parts = [range(low, min(low + size, len(begin))) for low in range(0, len(begin), size)]
        asked = [frame(part) for part in parts]
        at = [slice(part[0], part[-1] + 1) for part in parts]
        found[f"scores, {size} at once"] = per_second(
            lambda one: model.score(rows, begin[one], end[one]), at, len(begin)
        )
        for name, way in ways.items():
            found[f"{name}, {size} at once"] = per_second(way, asked, len(begin))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--method", default="vsknn")
    parser.add_argument("--model", help="a registered version, such as models:/globo/1")
    parser.add_argument("--requests", type=int, default=1000)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
