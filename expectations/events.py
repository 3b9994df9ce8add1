"""What must hold of `bronze.events`."""

from datetime import MAXYEAR, MINYEAR, datetime, timedelta

from expectations.check import Check
from expectations.feedback_rule import IS_KNOWN

FIRST_YEAR, LAST_YEAR = MINYEAR, MAXYEAR
"""The years 1 to 9999: those of Python's datetime, which serving reads times by."""
FIRST_US, LAST_US = (
    (end - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    for end in (datetime.min, datetime.max)
)
"""Their first and last microsecond since 1970, UTC."""


def checks() -> tuple[Check, ...]:
    return (
        Check(name="event_id_is_key", says="an event is in the table once", unique=("event_id",)),
        Check(
            name="ids_are_there",
            says="event, item, and user or device have an id, and no event has empty text as one",
            holds="coalesce(length(event_id) > 0 AND coalesce(user_id, anonymous_id) IS NOT NULL "
            "AND item_id IS NOT NULL, false)",
        ),
        Check(
            name="time_is_plausible",
            says=f"the event has a time, of the years {FIRST_YEAR} to {LAST_YEAR}",
            holds=f"coalesce(year(event_ts) BETWEEN {FIRST_YEAR} AND {LAST_YEAR}, false)",
        ),
        Check(
            name="date_is_the_utc_date",
            says="event_date is the UTC date of event_ts",
            holds="coalesce(event_date = to_date(event_ts), false)",
        ),
        Check(
            name="feedback_is_known",
            says="feedback is positive, negative, exposed or neutral",
            holds=IS_KNOWN.format(x="feedback"),
        ),
        Check(
            name="value_is_finite",
            says="value is null or a finite number",
            holds="value IS NULL OR (NOT isnan(value) AND abs(value) < double('infinity'))",
        ),
        Check(
            name="shown_items_have_ids",
            says="what was shown has an id, and no id is empty text",
            # (No lambda, which Spark would interpret: an overlap is null where one is null.)
            holds="coalesce(NOT arrays_overlap(exposed_with, array('')), exposed_with IS NULL)",
        ),
        Check(
            name="lines_balance",
            says="lines read = new events + duplicates + rejects + lines that were left out",
        ),
        Check(
            name="reject_share_within_bound",
            says="some line was usable, and not more were unusable than quality.max_reject_share "
            "allows",
        ),
    )
