"""How a lake is best laid out: what maintenance could do to it, and what the next night then costs.

    python benchmarks/layout.py --events 5000000 --past-nights 30 [--json]

Builds a lake of a history and many nights through the real jobs, then takes copies of it: as the
nights left it, packed in the order of time (what `jobs maintain` does), and packed by Z-order, on
the user or on time and user (by delta-rs). On each copy: seconds of packing, the next night's jobs,
and the rows of one user and of one day, read by delta-rs with a filter. Events and their
generators are those of `benchmarks/sessionize.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sessionize import NIGHT, SOURCE, generate, generate_night, size_of, timed

LAYOUTS: dict[str, tuple[str, ...] | None] = {  # columns of the Z-order; (): packed; None: as it is
    "as the nights left it": None,
    "packed, in order of time": (),
    "Z-order by user": ("user_id",),
    "Z-order by time and user": ("{start}", "user_id"),
}


def bench(events: int, past: int, folder: Path) -> list[dict[str, Any]]:
    import great_expectations  # noqa: F401  (its import is no part of what is measured)
    from deltalake import DeltaTable

    from jobs.context import Context, checked_batch
    from jobs.delta import Lake
    from jobs.maintain import TARGET_BYTES
    from jobs.sources import load_source
    from jobs.spark import get_spark
    from jobs.steps import one_job
    from jobs.tables import EVENTS, SESSIONS

    users, night_events = max(events // 100, 1), events // 200
    history, landing = folder / "history", folder / "landing"
    generate(history, events, 8)
    shutil.copytree(history, landing)
    file = folder / "bench.toml"
    file.write_text(SOURCE.format(landing=landing / "*.parquet", format="parquet"))
    source, spark = load_source(str(file)), get_spark("benchmark")

    def night(root: Path, after: int | None) -> dict[str, float]:
        day = None if after is None else NIGHT + timedelta(days=after)
        seconds = {}
        for job in ("ingest", "sessionize", "items", "sequences"):
            one = Context(source, Lake(lambda: spark, str(root), "bench"), day, checked_batch(None))
            seconds[job] = round(timed(one_job, one, job, "all", {}), 2)
        return seconds

    built = folder / "lake"
    night(built, None)
    for after in range(past):
        generate_night(history, landing / f"night{after}.parquet", night_events, users, after)
        night(built, after)
        print(f"night {after + 1} of {past}", file=sys.stderr, flush=True)
    generate_night(history, landing / "last.parquet", night_events, users, past)

    def read(table: str, conditions: list[tuple[str, str, Any]]) -> Callable[[], Any]:
        return lambda: DeltaTable(table).to_pyarrow_table(filters=conditions, columns=["user_id"])

    noon = datetime.combine(NIGHT - timedelta(days=20), time(12), UTC)
    found = []
    for name, columns in LAYOUTS.items():
        root = folder / "copy"
        shutil.copytree(built, root)
        packing = 0.0
        for table, start in ((EVENTS, "event_ts"), (SESSIONS, "start_ts")):
            delta = DeltaTable(table.path(str(root), "bench"))
            if columns:
                order = [one.format(start=start) for one in columns]
                packing += timed(
                    lambda d=delta, o=order: d.optimize.z_order(o, target_size=TARGET_BYTES)
                )
            elif columns is not None:
                packing += timed(lambda d=delta: d.optimize.compact(target_size=TARGET_BYTES))
        sessions = SESSIONS.path(str(root), "bench")
        one_user = read(sessions, [("user_id", "=", "u77")])
        one_day = read(
            sessions, [("start_ts", ">=", noon), ("start_ts", "<", noon + timedelta(days=1))]
        )
        row: dict[str, Any] = {
            "layout": name, "packing_s": round(packing, 2),
            "files": len(DeltaTable(sessions).file_uris()),
            "one_user_s": round(statistics.median(timed(one_user) for _ in range(5)), 3),
            "one_day_s": round(statistics.median(timed(one_day) for _ in range(5)), 3),
            "lake_bytes": size_of(root),
        }  # fmt: skip
        row["night"] = night(root, past)
        row["night_s"] = round(sum(row["night"].values()), 2)
        found.append(row)
        print(row, file=sys.stderr, flush=True)
        shutil.rmtree(root)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--past-nights", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sessionmill-bench-") as folder:
        found = bench(args.events, args.past_nights, Path(folder))
    if args.json:
        print(json.dumps(found))
        return
    for row in found:
        print(
            f"{row['layout']:26} packing {row['packing_s']:6.2f} s, {row['files']:4} files of "
            f"sessions, a night {row['night_s']:6.2f} s, one user {row['one_user_s']:.3f} s, one day "
            f"{row['one_day_s']:.3f} s"
        )


if __name__ == "__main__":
    main()
