"""What reading raw lines costs, beside DuckDB doing the same work.

    python benchmarks/reading.py --lines 4000000 [--one-file-gib 4] [--json]

The same events as CSV, JSON lines and Parquet, in eight files each, one line in a hundred of CSV and
JSON unusable. Ours: `ingest` into an empty `bronze.events`, audited and published; once as a process
of its own (the JVM's start included) and then warm, in one application. DuckDB: reads, types, hashes
every line (SHA-256), keeps one of each id and writes Parquet, in a process of its own, in turns with
ours. `--one-file-gib`: a single CSV of about so many GiB beside the same lines in eight files. Medians;
ratios are of one run. Needs disk for the lines, three times, in TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import sessionize as sizes  # noqa: E402

FORMATS = ("csv", "jsonl", "parquet")
BYTES_A_LINE = 24  # of the CSV, about


def generate(folder: Path, lines: int, files: int) -> None:
    """The lines in all three formats."""
    import duckdb

    sizes.generate(folder / "events", lines, files)
    db = duckdb.connect()
    for form in FORMATS:
        (folder / form).mkdir()
    for part in range(files):
        rows = f"""SELECT user_id, CASE WHEN random() < .01 THEN '' ELSE item_id END AS item_id,
                          epoch(ts)::BIGINT AS ts FROM '{folder}/events/{part}.parquet'"""
        db.sql(f"COPY ({rows}) TO '{folder}/csv/{part}.csv' (FORMAT csv, HEADER)")
        db.sql(f"COPY ({rows}) TO '{folder}/jsonl/{part}.jsonl' (FORMAT json)")
        shutil.move(folder / "events" / f"{part}.parquet", folder / "parquet")


def by_duckdb(form: str, files: str, out: Path) -> float:
    """Seconds."""
    import duckdb

    read = {
        "csv": f"read_csv('{files}', columns = {{user_id: 'VARCHAR', item_id: 'VARCHAR', ts: 'BIGINT'}})",
        "jsonl": f"read_json('{files}', format = 'newline_delimited', "
        "columns = {user_id: 'VARCHAR', item_id: 'VARCHAR', ts: 'BIGINT'})",
        "parquet": f"(SELECT user_id, item_id, epoch(ts)::BIGINT AS ts FROM read_parquet('{files}'))",
    }[form]
    began = time.perf_counter()
    duckdb.connect().sql(f"""
        COPY (
            SELECT * FROM (
                SELECT user_id, item_id, to_timestamp(ts) AS event_ts,
                       sha256(concat(user_id, '|', item_id, '|', ts)) AS event_id
                FROM {read} WHERE item_id <> ''
            ) QUALIFY row_number() OVER (PARTITION BY event_id) = 1
        ) TO '{out}' (FORMAT parquet)
    """)
    return time.perf_counter() - began


def source_file(folder: Path, name: str, form: str, files: str) -> Path:
    file = folder / f"{name}.toml"
    text = sizes.SOURCE.format(landing=files, format=form).replace('"bench"', f'"{name}"')
    file.write_text(text)
    return file


def cold(folder: Path, form: str, files: str) -> float:
    """Seconds of a process that loads the lines into an empty table."""
    file = source_file(folder, f"cold_{form}", form, files)
    environment = os.environ | {"SESSIONMILL_LAKE": str(folder / "cold"), "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "jobs", "ingest", "--source", str(file)],
        check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    shutil.rmtree(folder / "cold")
    return seconds


def warm(folder: Path) -> Callable[[str, str], float]:
    """What loads lines in one application, and says how many seconds it took."""
    import great_expectations  # noqa: F401  (its import is no part of what is measured)

    from jobs.core.source_file import load_source
    from jobs.lake.context import Context, checked_batch
    from jobs.lake.delta import Lake
    from jobs.lake.spark import get_spark
    from jobs.pipeline.steps import one_job

    spark = get_spark("benchmark")
    spark.range(1000).selectExpr("sum(id)").collect()

    def load(form: str, files: str) -> float:
        source = load_source(str(source_file(folder, f"warm_{form}", form, files)))
        lake = Lake(lambda: spark, str(folder / "warm"), source.name)
        context = Context(source, lake, None, checked_batch(None))
        seconds = sizes.timed(one_job, context, "ingest", "all", {})
        shutil.rmtree(folder / "warm")
        return seconds

    return load


def bench(args: argparse.Namespace, folder: Path, apart: Callable[..., Any]) -> dict[str, Any]:
    apart(generate, folder, args.lines, 8)
    found: dict[str, Any] = {"lines": args.lines}
    files = {form: f"{folder / form}/*.{form}" for form in FORMATS}
    first = {form: cold(folder, form, files[form]) for form in FORMATS}
    load = warm(folder)
    for form in FORMATS:
        load(form, files[form])  # (the first of its kind compiles plans)
        ours, theirs = [], []
        for _ in range(args.repeat):
            ours.append(load(form, files[form]))
            theirs.append(apart(by_duckdb, form, files[form], folder / "out.parquet"))
        duckdb_s = statistics.median(theirs)
        found[form] = {
            "duckdb_s": round(duckdb_s, 2), "process_s": round(first[form], 2),
            "warm_s": round(statistics.median(ours), 2),
            "process_over_duckdb": round(first[form] / duckdb_s, 2),
            "warm_over_duckdb": round(statistics.median(ours) / duckdb_s, 2),
        }  # fmt: skip
        print(form, found[form], file=sys.stderr, flush=True)
    if args.one_file_gib:
        found["one_file"] = one_file(args, folder, apart, load)
    return found


def one_file(
    args: argparse.Namespace, folder: Path, apart: Callable[..., Any], load: Callable[..., float]
) -> dict[str, float]:
    """The same lines in one file and in eight."""
    lines = int(args.one_file_gib * 2**30 / BYTES_A_LINE)
    big = folder / "big"
    apart(sizes.generate, big / "events", lines, 8)
    apart(sizes.generate_csv, big / "events", big / "eight", lines, 8)
    (big / "one").mkdir()
    with (big / "one" / "all.csv").open("wb") as out:
        for number, part in enumerate(sorted((big / "eight").glob("*.csv"))):
            with part.open("rb") as read:
                header = read.readline()
                out.write(header if number == 0 else b"")
                shutil.copyfileobj(read, out, 1 << 24)
    seconds = {name: load("csv", f"{big / name}/*.csv") for name in ("eight", "one")}
    size = (big / "one" / "all.csv").stat().st_size / 2**30
    ratio = round(seconds["one"] / seconds["eight"], 2)
    return {"gib": round(size, 2), "one_s": round(seconds["one"], 1),
            "eight_s": round(seconds["eight"], 1), "one_over_eight": ratio}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=4_000_000)
    parser.add_argument("--repeat", type=int, default=3, help="turns of ours and DuckDB")
    parser.add_argument("--one-file-gib", type=float, default=0, help="without: not measured")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    others = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with others, tempfile.TemporaryDirectory(prefix="sessionmill-bench-") as folder:
        found = bench(args, Path(folder), lambda what, *given: others.submit(what, *given).result())
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:10} {value}")


if __name__ == "__main__":
    main()
