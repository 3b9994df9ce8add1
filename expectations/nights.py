"""What a night should be like, beside the nights before it: `[drift]` of the source file says how
far from them is unusual, `jobs/ops/drift.py` how it is measured."""

from expectations.check import Check


def checks() -> tuple[Check, ...]:
    return (
        Check(name="events_as_usual", says="about as many events as on the days before"),
        Check(name="users_as_usual", says="about as many users as on the days before"),
        Check(name="sessions_as_usual", says="about as many sessions as on the days before"),
        Check(
            name="new_items_as_usual",
            says="about the share of items never seen before as on the days before",
        ),
        Check(
            name="gaps_as_usual",
            says="the pauses between events are distributed as on the days before",
        ),
    )
