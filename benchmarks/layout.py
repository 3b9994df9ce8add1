"""How a lake is best laid out: what maintenance could do to it, and what the next night then costs.

    python benchmarks/layout.py --events 5000000 --past-nights 30 [--json]

Builds a lake of a history and many nights through the real jobs, then takes copies of it: as the
nights left it, packed in the order of time, with row groups and files of several sizes, and packed
by Z-order, on the user or on time and user (all by delta-rs). On each copy: seconds of packing, the
next night's jobs, and the rows of one user and of one day, read by delta-rs with a filter. Layouts
take turns; medians are printed. Events and their generators are those of
`benchmarks/sessionize.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

from deltalake import DeltaTable, WriterProperties

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sessionize import NIGHT, SOURCE, generate, generate_night, timed


@dataclass(frozen=True)
class Layout:
    """What delta-rs is asked to do to `silver.events` and `silver.sessions`."""

    packed: bool = True
    z_order: tuple[str, ...] = ()
    file_bytes: int = 128 * 2**20
    groups: tuple[int | None, int | None] = (None, None)
    """Rows of a row group, of events and of sessions; None: the writer's, a million."""

    def lay(self, delta: DeltaTable, start: str, group: int | None) -> None:
        how = WriterProperties(max_row_group_size=group) if group else None
        if self.z_order:
            columns = [one.format(start=start) for one in self.z_order]
            delta.optimize.z_order(columns, target_size=self.file_bytes, writer_properties=how)
        elif self.packed:
            delta.optimize.compact(target_size=self.file_bytes, writer_properties=how)


JOBS = ("ingest", "sessionize", "items", "sequences")
LAYOUTS = {
    "as the nights left it": Layout(packed=False),
    "packed": Layout(),
    "packed, small groups": Layout(groups=(50_000, 5_000)),
    "packed, small groups, 32 MiB": Layout(groups=(50_000, 5_000), file_bytes=32 * 2**20),
    "packed, small groups, 16 MiB": Layout(groups=(50_000, 5_000), file_bytes=16 * 2**20),
    "Z-order by user": Layout(z_order=("user_id",), groups=(50_000, 5_000)),
    "Z-order by time and user": Layout(z_order=("{start}", "user_id"), groups=(50_000, 5_000)),
}


def bench(events: int, past: int, repeat: int, folder: Path) -> list[dict[str, Any]]:
    import great_expectations  # noqa: F401  (its import is no part of what is measured)

    from jobs.core.source_file import load_source
    from jobs.core.tables import EVENTS, SESSIONS
    from jobs.lake.context import Context, checked_batch
    from jobs.lake.delta import Lake
    from jobs.lake.spark import get_spark
    from jobs.pipeline.steps import one_job

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
        for job in JOBS:
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
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in LAYOUTS}
    for turn in range(repeat):
        for name, layout in LAYOUTS.items():
            root = folder / "copy"
            shutil.copytree(built, root)
            tables = zip((EVENTS, SESSIONS), ("event_ts", "start_ts"), layout.groups, strict=True)
            packing = sum(
                timed(layout.lay, DeltaTable(table.path(str(root), "bench")), start, group)
                for table, start, group in tables
            )
            sessions = SESSIONS.path(str(root), "bench")
            one_user = read(sessions, [("user_id", "=", "u77")])
            one_day = read(
                sessions, [("start_ts", ">=", noon), ("start_ts", "<", noon + timedelta(days=1))]
            )
            row: dict[str, Any] = {
                "packing_s": packing, "files": len(DeltaTable(sessions).file_uris()),
                "one_user_s": statistics.median(timed(one_user) for _ in range(5)),
                "one_day_s": statistics.median(timed(one_day) for _ in range(5)),
                **night(root, past),
            }  # fmt: skip
            measured[name].append(row)
            print(turn, name, row, file=sys.stderr, flush=True)
            shutil.rmtree(root)
    return [
        {"layout": name}
        | {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        | {"night_s": round(statistics.median(sum(row[job] for job in JOBS) for row in rows), 2)}
        for name, rows in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--past-nights", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=3, help="turns, each of all layouts")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sessionmill-bench-") as folder:
        found = bench(args.events, args.past_nights, args.repeat, Path(folder))
    if args.json:
        print(json.dumps(found))
        return
    for row in found:
        print(
            f"{row['layout']:28} packing {row['packing_s']:6.2f} s, {row['files']:4.0f} files of "
            f"sessions, a night {row['night_s']:6.2f} s (ingest {row['ingest']:.2f}, sessionize "
            f"{row['sessionize']:.2f}, sequences {row['sequences']:.2f}), one user {row['one_user_s']:.3f} s, one day "
            f"{row['one_day_s']:.3f} s"
        )


if __name__ == "__main__":
    main()
