"""What sessionizing costs: the whole chain, a rebuild beside DuckDB and Polars, a night, the audits.

    python benchmarks/sessionize.py --events 20000000 [--json]

Generates its events (a user per 100 events, Zipf items, bursty gaps), loads them through the real
jobs, then times the rebuild of `silver.sessions` from `bronze.events` in turns with DuckDB's and
Polars' own gap queries over the same events writing Parquet, all on the same cores. Then come nights of
0.5 % of the events each (or `--night-events`), a tenth of them late, a tenth delivered before. JVM
start apart; medians, and the range; the history from CSV and from Parquet; raw lines once cold (the first job of the application) and then
warm. Memory is resident bytes, summed over processes: the jobs' (driver, JVM, Python workers) apart
from those of the process in which DuckDB and Polars run. Needs about 200 bytes of disk an event in
TMPDIR.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

START = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())
DAYS = 180
NIGHT = datetime.fromtimestamp(START, UTC).date() + timedelta(days=DAYS)  # after the history's last
GAP_S = 1800
SOURCE = """
[source]
name = "bench"
landing = "{landing}"
format = "{format}"
[columns]
user_id = "user_id"
item_id = "item_id"
event_ts = "ts"
[time]
unit = "s"
"""


class PeakMemory(threading.Thread):
    """The most that this process and its children held, by RSS; the competitors' process apart."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ours, self.theirs, self.competitors = 0, 0, 0
        self.over = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.over.wait(1):
            ours = theirs = 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    held = process.memory_info().rss
                    if process.pid == self.competitors:
                        theirs = held
                    else:
                        ours += held
            self.ours, self.theirs = max(self.ours, ours), max(self.theirs, theirs)


def generate(folder: Path, events: int, files: int) -> None:
    """The history: bursts of some ten events with gaps of 10 s to 25 min, hours or days apart."""
    import duckdb

    db = duckdb.connect()
    folder.mkdir(parents=True)
    users = max(events // 100, 1)
    for part in range(files):
        db.sql(f"""
            COPY (
                SELECT 'u' || (n % {users}) AS user_id,
                       'i' || floor(exp(random() * ln(100000)))::BIGINT AS item_id,
                       to_timestamp({START}
                         + (hash(n % {users}, n // {users} // 10) % ({DAYS} * 86400 - 20000))::BIGINT
                         + ((n // {users}) % 10) * 600 + floor(random() * 900)) AS ts
                FROM range({part * events // files}, {(part + 1) * events // files}) t(n)
                ORDER BY ts
            ) TO '{folder}/{part}.parquet' (FORMAT parquet)
        """)


def generate_night(history: Path, file: Path, count: int, users: int, after: int) -> None:
    """Events of a day after the history's last; a tenth late, a tenth delivered before."""
    import duckdb

    file.parent.mkdir(parents=True, exist_ok=True)
    day = START + (DAYS + after) * 86400
    duckdb.connect().sql(f"""
        COPY (
            SELECT 'u' || floor(random() * {users})::BIGINT AS user_id,
                   'i' || floor(exp(random() * ln(100000)))::BIGINT AS item_id,
                   to_timestamp({day} + floor(random() * 86400)
                     - CASE WHEN random() < .111 THEN floor(random() * 20) * 86400 ELSE 0 END) AS ts
            FROM range({count * 9 // 10})
            UNION ALL
            (SELECT * FROM '{history}/*.parquet' USING SAMPLE {count // 10} ROWS)
        ) TO '{file}' (FORMAT parquet)
    """)


def generate_csv(history: Path, folder: Path, lines: int, files: int = 2) -> None:
    """Raw lines, one in a hundred unusable."""
    import duckdb

    db = duckdb.connect()
    folder.mkdir(parents=True)
    for part in range(files):
        db.sql(f"""
            COPY (SELECT user_id, CASE WHEN random() < .01 THEN '' ELSE item_id END AS item_id,
                         epoch(ts)::BIGINT AS ts
                  FROM '{history}/*.parquet' LIMIT {lines // files} OFFSET {part * (lines // files)})
            TO '{folder}/{part}.csv' (FORMAT csv, HEADER)
        """)


def plain_events(table: str, out: Path) -> None:
    """The deduplicated events as one Parquet file: what DuckDB and Polars read."""
    import duckdb
    from deltalake import DeltaTable

    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("e", DeltaTable(table).to_pyarrow_dataset())
        db.sql(
            f"COPY (SELECT event_id, user_id, item_id, event_ts AS ts FROM e) "
            f"TO '{out}' (FORMAT parquet)"
        )


def duckdb_sessions(events: str, out: Path) -> None:
    import duckdb

    with duckdb.connect() as db:
        db.sql(f"SET threads = {os.cpu_count()}")
        db.sql(f"""
            COPY (
                WITH marked AS (
                    SELECT *, coalesce(ts - lag(ts) OVER w > INTERVAL {GAP_S} SECOND, true) AS opens
                    FROM '{events}' WINDOW w AS (PARTITION BY user_id ORDER BY ts, event_id)
                ), numbered AS (
                    SELECT *, count(*) FILTER (opens) OVER (
                        PARTITION BY user_id ORDER BY ts, event_id ROWS UNBOUNDED PRECEDING) AS n
                    FROM marked
                )
                SELECT user_id, n, min(ts) AS start_ts, max(ts) AS end_ts, count(*) AS event_count,
                       list(struct_pack(event_id, ts, item_id) ORDER BY ts, event_id) AS events
                FROM numbered GROUP BY user_id, n
            ) TO '{out}' (FORMAT parquet)
        """)


def polars_sessions(events: str, out: Path) -> None:
    import polars as pl

    (
        pl.scan_parquet(events)
        .sort("user_id", "ts", "event_id")
        .with_columns(
            ((pl.col("user_id") != pl.col("user_id").shift()).fill_null(True)
             | (pl.col("ts").diff() > pl.duration(seconds=GAP_S))).cum_sum().alias("n")
        )
        .group_by("n", maintain_order=True)
        .agg(
            pl.col("user_id").first(), pl.col("ts").min().alias("start_ts"),
            pl.col("ts").max().alias("end_ts"), pl.len().alias("event_count"),
            pl.struct("event_id", "ts", "item_id").alias("events"),
        )
        .collect()
        .write_parquet(out)
    )  # fmt: skip


class Balance:
    """What the audit of the whole lake (`jobs/audit/balance.py`) takes of a run: seconds in this process,
    and those of the hashes that tasks make of `gold.sequences` while they audit it, by the cores."""

    NAMES = ("hold", "has_sessions_events")

    def __init__(self) -> None:
        from jobs.audit import balance, fingerprint_table

        self.seconds: list[float] = []
        for module, name in (*((balance, one) for one in self.NAMES), (fingerprint_table, "keep")):
            setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, what: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return what(*given)
            finally:
                self.seconds[-1] += time.perf_counter() - began

        return call

    def begin(self) -> None:
        self.seconds.append(0.0)

    def end(self, context: Any) -> None:
        from jobs.audit import fingerprints
        from jobs.core.tables import SEQUENCES
        from jobs.lake import filesystem

        lake = context.lake
        for file in lake.files_of(SEQUENCES, lake.version(SEQUENCES)):
            rows = filesystem.read_parquet(file.path, ["user_id", "event_ts"])
            took = timed(fingerprints.of_sequence_rows, file.path, rows)
            self.seconds[-1] += took / (os.cpu_count() or 1)


def timed(what: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    what(*arguments)
    return time.perf_counter() - began


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), 2), "min": round(min(seconds), 2),
        "max": round(max(seconds), 2),
    }  # fmt: skip


def bench(args: argparse.Namespace, folder: Path, apart: Callable[..., Any]) -> dict[str, Any]:
    """Every figure; `apart` runs a function of other engines in their own process."""
    import great_expectations  # noqa: F401  (its import is no part of what is measured)

    from jobs.core.source_file import load_source
    from jobs.core.tables import EVENTS, SESSIONS
    from jobs.lake.context import Context, checked_batch
    from jobs.lake.delta import Lake
    from jobs.lake.spark import get_spark
    from jobs.pipeline.steps import one_job

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:7.1f} s  {text}", file=sys.stderr, flush=True)

    began = time.perf_counter()
    events, users = args.events, max(args.events // 100, 1)
    csv_lines = min(args.csv_lines, events)
    night_events = args.night_events or events // 200
    history, landing = folder / "history", folder / "landing"
    apart(generate, history, events, 8)
    apart(generate_csv, history, folder / "raw", csv_lines)
    shutil.copytree(history, landing, copy_function=os.link)
    say(f"generated {events:,} events")

    lake_root = folder / "lake"
    spark = get_spark("benchmark")

    def context(name: str, pattern: Path, form: str, day: date | None = None) -> Context:
        file = folder / f"{name}.toml"
        text = SOURCE.format(landing=pattern, format=form).replace('"bench"', f'"{name}"')
        file.write_text(text)
        source = load_source(str(file))
        lake = Lake(lambda: spark, str(lake_root), source.name)
        return Context(source, lake, day, checked_batch(None))

    watch = Balance()

    def chain(
        day: date | None = None, name: str = "bench", files: Path = landing / "*.parquet"
    ) -> dict[str, float]:
        seconds = {}
        watch.begin()
        for job in ("ingest", "sessionize", "items", "sequences"):
            one = context(name, files, files.suffix[1:], day)
            seconds[job] = round(timed(one_job, one, job, "all", {}), 2)
        watch.end(one)
        say(
            f"{day or 'history'} ({files.suffix[1:]}): {seconds}, of which the balance {watch.seconds[-1]:.2f}"
        )
        return seconds

    spark.range(1000).selectExpr("sum(id)").collect()
    raw = []
    for turn in range(1 + args.repeat):
        one = context(f"raw{turn}", folder / "raw" / "*.csv", "csv")
        raw.append(timed(one_job, one, "ingest", "all", {}))
        say(f"csv: {csv_lines:,} lines in {raw[-1]:.1f} s")
        shutil.rmtree(lake_root / f"raw{turn}")
    first_s, ingest_s = raw[0], statistics.median(raw[1:])

    from_csv: dict[str, float] = {}
    if args.csv_chain:
        apart(generate_csv, history, folder / "csv", events, 8)
        from_csv = chain(None, "csv", folder / "csv" / "*.csv")
        shutil.rmtree(folder / "csv")
        shutil.rmtree(lake_root / "csv")
        watch.seconds.clear()
    past = chain()
    lake_bytes = size_of(lake_root / "bench")

    plain = folder / "events.parquet"
    apart(plain_events, EVENTS.path(str(lake_root), "bench"), plain)
    took: dict[str, list[float]] = {name: [] for name in ("spark", "audit", "duckdb", "polars")}
    for turn in range(args.repeat):
        one = context("bench", landing / "*.parquet", "parquet")
        shutil.rmtree(one.lake.path(SESSIONS))
        made = timed(one_job, one, "sessionize", "compute", {})
        took["audit"].append(timed(one_job, one, "sessionize", "audit", {}))
        put = timed(one_job, one, "sessionize", "publish", {})
        took["spark"].append(made + put)
        out = folder / "out.parquet"
        took["duckdb"].append(apart(timed, duckdb_sessions, str(plain), out))
        took["polars"].append(apart(timed, polars_sessions, str(plain), out))
        last = {name: round(seconds[-1], 1) for name, seconds in took.items()}
        say(f"turn {turn + 1} of {args.repeat}: {last}")

    nights = []
    for after in range(args.nights):
        apart(
            generate_night, history, landing / f"night{after}.parquet", night_events, users, after
        )
        nights.append(chain(NIGHT + timedelta(days=after)))
    night = {job: round(statistics.median(one[job] for one in nights), 2) for job in past}
    all_nights = [sum(one.values()) for one in nights]
    median = {name: statistics.median(seconds) for name, seconds in took.items()}
    return {
        "events": events, "ingest_lines_per_s": round(csv_lines / ingest_s),
        "ingest_first_lines_per_s": round(csv_lines / first_s),
        "sessionize_s": spread(took["spark"]), "duckdb_s": spread(took["duckdb"]),
        "polars_s": spread(took["polars"]), "validate_s": spread(took["audit"]),
        "spark_over_duckdb": spread(
            [a / b for a, b in zip(took["spark"], took["duckdb"], strict=True)]
        ),
        "validate_over_sessionize": round(median["audit"] / median["spark"], 3),
        "chain_s": round(sum(past.values()), 2), "chain": past,
        "chain_over_duckdb": round(sum(past.values()) / median["duckdb"], 2),
        "chain_of_csv_s": round(sum(from_csv.values()), 2), "chain_of_csv": from_csv,
        "chain_of_csv_over_duckdb": round(sum(from_csv.values()) / median["duckdb"], 2),
        "night_over_duckdb": round(statistics.median(all_nights) / median["duckdb"], 3),
        "night_events": night_events, "night_s": spread(all_nights), "night": night,
        "night_without_sequences_s": spread(
            [sum(one.values()) - one["sequences"] for one in nights]
        ),
        # The audit of the whole lake: of the first run, which fingerprints everything, and of a night.
        "balance_first_s": round(watch.seconds[0], 2), "balance_s": spread(watch.seconds[1:]),
        "balance_over_duckdb": round(
            statistics.median(watch.seconds[1:]) / median["duckdb"], 4
        ),
        "night_over_chain": round(statistics.median(all_nights) / sum(past.values()), 4),
        "landing_bytes": size_of(history), "lake_bytes": lake_bytes, "cores": os.cpu_count(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--csv-lines", type=int, default=2_000_000)
    parser.add_argument(
        "--night-events", type=int, help="of one night; without: 0.5 %% of --events"
    )
    parser.add_argument("--nights", type=int, default=3, help="nights one after another")
    parser.add_argument("--repeat", type=int, default=5, help="turns of Spark, DuckDB, Polars")
    parser.add_argument(
        "--csv-chain", action=argparse.BooleanOptionalAction, default=True,
        help="the history once more, from CSV lines of which one in a hundred is unusable",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    memory = PeakMemory()
    memory.start()
    others = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    memory.competitors = others.submit(os.getpid).result()
    with others, tempfile.TemporaryDirectory(prefix="sessionmill-bench-") as folder:
        found = bench(args, Path(folder), lambda what, *given: others.submit(what, *given).result())
    memory.over.set()
    found["peak_rss_mb"] = round(memory.ours / 2**20)
    found["competitors_peak_rss_mb"] = round(memory.theirs / 2**20)
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:26} {value}")


if __name__ == "__main__":
    main()
