"""What a commit costs: the ways by which the jobs publish, beside others that Delta has.

    python benchmarks/publish.py --events 20000000 [--json]

Makes the events and a night of `benchmarks/sessionize.py`, computes and audits the night's sessions,
and then publishes the same candidate on copies of the lake, in turns: as `sessionize` does (by
delta-rs's MERGE) and by Spark's MERGE, each with a change feed and pruned by the same times. After
each the table must hold the same rows, and the feed must tell the same changes; and the sessions of
the next night are computed on what each has left. Then the whole of `silver.sessions`, staged,
becomes an empty table's rows: by a commit that names the files (`jobs/lake/private_delta.py`), by
delta-rs and by Spark, which write them. Medians and ranges of the turns; the JVM runs, warm.
Needs about 300 bytes of disk an event in TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sessionize as bench  # (the events and nights of the other script)

SUM = "sum(hash(session_id, event_count, epoch_us(end_ts), list_transform(events, lambda e: e.event_id)))"


def copied(lake: Path, to: Path) -> Path:
    """A copy of a lake: data files as hard links (nobody writes into them), the rest in full."""

    def put(old: str, new: str) -> None:
        if "_delta_log" in old or not old.endswith(".parquet"):
            shutil.copy2(old, new)
        else:
            os.link(old, new)

    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(lake, to, copy_function=put)
    return to


def digest(path: str) -> tuple[Any, ...]:
    """Rows and a sum of hashes of a table, and of its newest commit's changes, by another engine."""
    import duckdb
    import pyarrow as pa
    from deltalake import DeltaTable

    table = DeltaTable(path)
    with duckdb.connect() as db:
        db.register("t", table.to_pyarrow_dataset())
        rows = db.sql(f"SELECT count(*), {SUM} FROM t").fetchall()
        version = table.version()
        feed = pa.table(table.load_cdf(starting_version=version, ending_version=version))
        db.register("f", feed)
        told = db.sql(
            f"SELECT _change_type, count(*), {SUM} FROM f GROUP BY 1 ORDER BY 1"
        ).fetchall()
    return rows, told


def by_delta_rs(context: Any) -> None:
    from jobs.pipeline.steps import one_job

    one_job(context, "sessionize", "publish", {})


def by_spark(context: Any) -> None:
    from dataclasses import replace

    by_delta_rs(replace(context, thresholds=replace(context.thresholds, merged_rows=0)))


def whole_by_files(context: Any, staged: Any) -> None:
    from jobs.core.tables import EVENTS, SESSIONS

    app = context.lake.app_id(SESSIONS, EVENTS)
    context.lake.commit(SESSIONS, staged, 0, app, 1, "run")


def whole_by_delta_rs(context: Any, staged: Any) -> None:
    import pyarrow.dataset as ds
    from deltalake import write_deltalake

    from jobs.core.arrow_types import arrow_schema
    from jobs.core.tables import SESSIONS

    path = context.lake.path(SESSIONS)
    files = ds.dataset([f"{path}/{one['path']}" for one in staged], arrow_schema(SESSIONS.columns))
    write_deltalake(path, files.scanner(batch_size=SESSIONS.group).to_reader(), mode="append")


def whole_by_spark(context: Any, staged: Any) -> None:
    from jobs.core.tables import SESSIONS

    rows = context.lake.staged(SESSIONS, staged)
    rows.write.format("delta").mode("append").save(context.lake.path(SESSIONS))


NIGHT_WAYS: dict[str, Callable[..., None]] = {
    "delta-rs MERGE": by_delta_rs, "Spark MERGE": by_spark,
}  # fmt: skip
WHOLE_WAYS: dict[str, Callable[..., None]] = {
    "files named": whole_by_files, "delta-rs": whole_by_delta_rs, "Spark": whole_by_spark,
}  # fmt: skip


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from jobs.core.source_file import load_source
    from jobs.core.tables import EVENTS, SESSIONS
    from jobs.lake.context import Context, checked_batch
    from jobs.lake.delta import Lake
    from jobs.lake.spark import get_spark
    from jobs.pipeline.steps import one_job

    spark = get_spark("benchmark")
    history, landing, root = folder / "history", folder / "landing", folder / "lake"
    bench.generate(history, args.events, 8)
    shutil.copytree(history, landing, copy_function=os.link)
    (folder / "bench.toml").write_text(
        bench.SOURCE.format(landing=landing / "*.parquet", format="parquet")
    )
    source = load_source(str(folder / "bench.toml"))

    def context(lake: Path, day: date | None = None, batch: str = "bench") -> Context:
        return Context(source, Lake(lambda: spark, str(lake), "bench"), day, checked_batch(batch))

    def land_night(number: int) -> date:
        bench.generate_night(
            history, landing / f"night{number}.parquet", args.night_events or args.events // 200,
            max(args.events // 100, 1), number,
        )  # fmt: skip
        day = bench.NIGHT + timedelta(days=number)
        one_job(context(root, day, f"night{number}"), "ingest", "all", {})
        return day

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for job in ("ingest", "sessionize"):
        one_job(context(root), job, "all", {})
    night = land_night(0)
    for step in ("compute", "audit"):
        one_job(context(root, night), "sessionize", step, {})
    next_night = land_night(1)

    took: dict[str, list[float]] = {name: [] for name in NIGHT_WAYS}
    after: dict[str, list[float]] = {name: [] for name in NIGHT_WAYS}
    held: dict[str, Any] = {}
    for turn in range(args.repeat):
        for name, way in NIGHT_WAYS.items():
            one = context(copied(root, folder / "copy"), night)
            took[name].append(bench.timed(way, one))
            say(f"night, turn {turn + 1}, {name}: {took[name][-1]:.1f} s")
            then = context(folder / "copy", next_night, "next")
            after[name].append(bench.timed(one_job, then, "sessionize", "compute", {}))
            say(f"the next night's sessions: {after[name][-1]:.1f} s")
            if turn == 0:
                held[name] = digest(one.lake.path(SESSIONS))
    if len({str(one) for one in held.values()}) != 1:
        raise SystemExit(f"the ways do not give the same table and feed: {held}")

    shutil.rmtree(root / "bench" / "silver")
    shutil.rmtree(root / "bench" / "_candidates", ignore_errors=True)
    one = context(root)
    one_job(one, "sessionize", "compute", {})
    from jobs.silver.manifest import SessionizeManifest

    staged = one.candidate(SESSIONS).manifest(SessionizeManifest).staged
    whole: dict[str, list[float]] = {name: [] for name in WHOLE_WAYS}
    for turn in range(args.repeat):
        for name, way in WHOLE_WAYS.items():
            here = context(copied(root, folder / "copy"))
            whole[name].append(bench.timed(way, here, staged))
            say(f"whole, turn {turn + 1}, {name}: {whole[name][-1]:.1f} s")
            if here.lake.rows(SESSIONS) != sum(entry["rows"] for entry in staged or []):
                raise SystemExit(f"{name}: rows are missing")
    return {
        "events": args.events, "stored_events": one.lake.rows(EVENTS),
        "night_s": {name: bench.spread(seconds) for name, seconds in took.items()},
        "next_night_s": {name: bench.spread(seconds) for name, seconds in after.items()},
        "whole_s": {name: bench.spread(seconds) for name, seconds in whole.items()},
        "cores": os.cpu_count(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--night-events", type=int, help="without: 0.5 %% of --events")
    parser.add_argument("--repeat", type=int, default=3, help="turns")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sessionmill-bench-") as folder:
        found = measure(args, Path(folder))
    print(f"{time.perf_counter() - began:.0f} s in all", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
