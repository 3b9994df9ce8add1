"""What must hold of `gold.sequences`."""

from expectations.check import Check
from expectations.feedback_rule import IS_KNOWN


def checks() -> tuple[Check, ...]:
    return (
        Check(name="user_id_is_key", says="a user has one row", unique=("user_id",)),
        Check(
            name="arrays_are_parallel",
            says="all arrays of a row have one element a position, at least one",
            holds="coalesce(size(item_index) >= 1 AND size(event_ts) = size(item_index) "
            "AND size(session_ordinal) = size(item_index) "
            "AND size(feedback) = size(item_index) "
            "AND size(exposed_items) = size(item_index), false)",
        ),
        Check(
            name="items_are_known",
            says="every position has an item index from 1",
            array="item_index",
            each="coalesce({x} >= 1, false)",
        ),
        Check(
            name="exposed_items_are_known",
            says="everything shown has an item index from 1",
            array="exposed_items",
            each="{x} IS NOT NULL AND forall({x}, i -> coalesce(i >= 1, false))",
        ),
        Check(
            name="oldest_first",
            says="time never runs back along a sequence",
            array="event_ts",
            pair="coalesce({a} <= {b}, false)",
        ),
        Check(
            name="ordinals_begin_with_one",
            says="a user's first session is number 1",
            holds="coalesce(get(session_ordinal, 0) = 1, false)",
        ),
        Check(
            name="ordinals_are_dense",
            says="sessions are numbered 1, 2, 3, … without a hole",
            array="session_ordinal",
            pair="coalesce({b} - {a} IN (0, 1), false)",
        ),
        Check(
            name="feedback_is_known",
            says="feedback is positive, negative, exposed or neutral",
            array="feedback",
            each=IS_KNOWN,
        ),
        Check(
            name="positions_balance",
            says="positions of the batch = events of its users' sessions that are not runaway",
        ),
    )
