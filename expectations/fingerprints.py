"""What must hold of `ops.fingerprints`."""

from expectations.check import Check

COUNTED = ("bronze.events", "silver.events", "silver.sessions", "gold.sequences")
"""The tables whose data files have fingerprints: each is made from the one before it."""


def checks() -> tuple[Check, ...]:
    names = ", ".join(f"'{name}'" for name in COUNTED)
    return (
        Check(
            name="file_is_key",
            says="a data file has one row",
            unique=("table_name", "path"),
        ),
        Check(
            name="table_is_known",
            says="a row is of a file of bronze.events, silver.events, silver.sessions or gold.sequences",
            holds=f"coalesce(table_name IN ({names}) AND path <> '', false)",
        ),
        Check(
            name="events_are_counted",
            says="a row has events and their fingerprint; of sessions also those that are not runaway, of "
            "silver.events also by what the log says",
            holds="coalesce(events >= 0 AND digest_xor IS NOT NULL AND digest_sum IS NOT NULL "
            "AND CASE WHEN table_name IN ('silver.sessions', 'silver.events') THEN kept_events BETWEEN 0 AND events "
            "AND kept_xor IS NOT NULL AND kept_sum IS NOT NULL ELSE kept_events IS NULL "
            "AND kept_xor IS NULL AND kept_sum IS NULL END, false)",
        ),
        Check(
            name="rows_are_of_their_files",
            says="the fingerprint of every data file is what the file has",
        ),
        Check(
            name="people_balance",
            says="events of silver.events = events of the version of bronze.events that it was made "
            "from, by time and what the log says of their user",
        ),
        Check(
            name="sessions_balance",
            says="events of silver.sessions = events of the version of bronze.events (with [identity]: "
            "silver.events) that it was made from, by user and time",
        ),
        Check(
            name="sequences_balance",
            says="positions of gold.sequences = events of the sessions that are not runaway, of the "
            "version of silver.sessions that it was made from, by user and time",
        ),
    )
