"""Which files lie in a landing."""

from __future__ import annotations

import os
from datetime import date

from jobs.core.landing_globs import landing_patterns
from jobs.lake import filesystem


def absolute(landing: str) -> str:
    """A landing pattern as a URI, or from the root of the file system."""
    return landing if "://" in landing else os.path.abspath(landing)


def landed(
    landing: str, day: date | None = None, lateness_days: int = 0
) -> list[tuple[str, int, int]]:
    """Files of a landing: (path, bytes, modified ms), sorted; the days are `landing_patterns`'s."""
    patterns = landing_patterns(absolute(landing), day, lateness_days)
    found = {file[0]: file for pattern in patterns for file in filesystem.glob(pattern)}
    return sorted(found.values())
