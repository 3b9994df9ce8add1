"""Functions are short enough to read: `make check` counts branches and statements, this counts lines."""

from __future__ import annotations

import ast

from tests.support.airflow_tools import REPO

LINES = 60  # from `def` to the last line
LONG = {  # to be rewritten; nothing is added
    "expectations/sessions.py:checks",
    "jobs/audit/great_expectations.py:judge",
    "jobs/bronze/csv_reader.py:read_csv",
    "jobs/bronze/typed_events.py:typed_events",
    "jobs/gold/sequences.py:fill",
}


def test_no_function_is_longer_than_a_screen() -> None:
    files = [
        file for top in ("expectations", "jobs", "models") for file in REPO.glob(f"{top}/**/*.py")
    ]
    long, functions = set(), 0
    for file in files:
        for one in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                if (one.end_lineno or 0) - one.lineno + 1 > LINES:
                    long.add(f"{file.relative_to(REPO)}:{one.name}")
    assert functions > 500
    assert long <= LONG, f"longer than {LINES} lines: {sorted(long - LONG)}"
