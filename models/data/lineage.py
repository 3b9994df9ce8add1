"""Which runs made a version of gold.sequences, from `ops.runs` and the table's own history."""

from __future__ import annotations

from typing import Any


def moved(lake: str, source: str, version: int) -> int:
    """The version of gold.sequences whose rows a version has: itself, or the newest one before it
    that has rows moved (packing files makes versions, too)."""
    from deltalake import DeltaTable

    from jobs.core.tables import SEQUENCES
    from jobs.lake.delta import QUIET
    from jobs.lake.filesystem import rust_uri

    table = DeltaTable(rust_uri(SEQUENCES.path(lake, source)), version=version)
    changes = [c["version"] for c in table.history() if c.get("operation") not in QUIET]
    return max((v for v in changes if v is not None and v <= version), default=version)


def runs_of(lake: str, source: str) -> list[dict[str, Any]]:
    """The rows of `ops.runs`; none where there is no such table."""
    from deltalake import DeltaTable
    from deltalake.exceptions import TableNotFoundError

    from jobs.core.tables import RUNS
    from jobs.lake.filesystem import rows_of, rust_uri

    try:
        table = DeltaTable(rust_uri(RUNS.path(lake, source)))
    except TableNotFoundError:
        return []
    rows: list[dict[str, Any]] = rows_of(table).to_table().to_pylist()
    return rows


def published(runs: list[dict[str, Any]], table: str, newest: int) -> tuple[int, Any] | None:
    """The newest published version of a table up to `newest`, and the run that published it.

    Of the runs that ended well and name that version it is the first: a later run that found nothing
    to do names the version that it found. None: no run names one.

    Args:
        runs: rows of `ops.runs`.
        table: its full name, such as `gold.sequences`.
    """
    made = [
        (version, run)
        for run in sorted(runs, key=lambda row: row["started_ts"])
        if run["outcome"] == "ok"
        and (version := dict(run["tables_out"] or ()).get(table)) is not None
        and version <= newest
    ]
    return max(made, key=lambda one: one[0], default=None)


def publishers(runs: list[dict[str, Any]], version: int) -> list[dict[str, Any]]:
    """The run that ended well and published this version of gold.sequences; none where there is no
    such run."""
    from jobs.core.tables import SEQUENCES

    ours = [run for run in runs if run["job"] in ("run", "sequences")]
    found = published(ours, SEQUENCES.full_name, version)
    return [found[1]] if found is not None and found[0] == version else []
