"""Which files a landing pattern of a source file means, by day."""

from __future__ import annotations

import re
from datetime import date

from jobs.core.lateness import days_covered

DAY_FIELD = re.compile(r"\{day(?::([^{}]*))?\}")


def landing_patterns(landing: str, day: date | None, lateness_days: int) -> list[str]:
    """The globs that a landing pattern means.

    With a day, `{day}` covers the days from `day - lateness_days` to `day`, so that a file
    delivered late into an older folder is read; without one it matches every date.
    """
    if not DAY_FIELD.search(landing):
        return [landing]
    if day is None:
        anything = DAY_FIELD.sub(lambda found: _shape(found.group(1) or "%Y-%m-%d"), landing)
        return [anything]
    return [_on(landing, one) for one in days_covered(day, lateness_days)]


def _on(landing: str, day: date) -> str:
    """A landing pattern with its day filled in."""
    return DAY_FIELD.sub(lambda found: day.strftime(found.group(1) or "%Y-%m-%d"), landing)


def _shape(form: str) -> str:
    """A date format as a glob of digits."""
    sample = date(2000, 10, 20).strftime(form)
    return re.sub(r"\d", "[0-9]", sample)
