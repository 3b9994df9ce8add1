"""Lateness: an event is late whose date is more than `lateness_days` before the night's day.

Without a day nothing is late. A night's day is the run's; a line that is replayed is judged by the
day of the night that read it.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column

    from jobs.core.source_rules import SessionsPart


def days_covered(day: date, lateness_days: int) -> list[date]:
    """The dates up to a night's day that are not late, oldest first."""
    return [day - timedelta(days=back) for back in range(lateness_days, -1, -1)]


def oldest_date(day: Column, rule: SessionsPart) -> Column:
    """The oldest date that is not late on a night's day, per line; null where there is no day."""
    from pyspark.sql import functions as F

    return F.date_sub(day, rule.lateness_days)


def is_late(event_date: Column, oldest: Column | None) -> Column:
    """Whether a date is before the oldest that is not late; never null.

    Args:
        oldest: as `oldest_date` has it; None: nothing is late.
    """
    from pyspark.sql import functions as F

    if oldest is None:
        return F.lit(False)
    return F.coalesce(event_date < oldest, F.lit(False))
