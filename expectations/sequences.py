"""What must hold of `gold.sequences`."""

from expectations.check import Check

_PAIRS = (
    "forall(zip_with(slice({array}, 1, greatest(size({array}) - 1, 0)), "
    "slice({array}, 2, greatest(size({array}) - 1, 0)), (a, b) -> {condition}), ok -> ok)"
)


def checks() -> tuple[Check, ...]:
    return (
        Check(
            name="user_id_is_key", says="a user has one row",
            unique=("user_id",),
        ),
        Check(
            name="arrays_are_parallel",
            says="all arrays of a row have one element a position, at least one",
            holds="coalesce(size(item_index) >= 1 AND size(event_ts) = size(item_index) "
                  "AND size(session_ordinal) = size(item_index) "
                  "AND size(feedback) = size(item_index) "
                  "AND size(exposed_items) = size(item_index), false)",
        ),
        Check(
            name="items_are_known", says="every position and exposure has an item index from 1",
            holds="forall(item_index, i -> coalesce(i >= 1, false)) AND forall(exposed_items, "
                  "shown -> shown IS NOT NULL AND forall(shown, i -> coalesce(i >= 1, false)))",
        ),
        Check(
            name="oldest_first", says="time never runs back along a sequence",
            holds=_PAIRS.format(array="event_ts", condition="coalesce(a <= b, false)"),
        ),
        Check(
            name="ordinals_are_dense", says="sessions are numbered 1, 2, 3, … without a hole",
            holds="coalesce(session_ordinal[0] = 1, false) AND "
                  + _PAIRS.format(array="session_ordinal",
                                  condition="coalesce(b - a IN (0, 1), false)"),
        ),
        Check(
            name="feedback_is_known", says="feedback is positive, negative, exposed or neutral",
            holds="forall(feedback, f -> coalesce(f IN ('positive', 'negative', 'exposed', "
                  "'neutral'), false))",
        ),
        Check(
            name="positions_balance",
            says="positions of the batch = events of its users' sessions that are not runaway",
        ),
    )  # fmt: skip
