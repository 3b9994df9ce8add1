"""What must hold of `gold.recommendations`."""

from expectations.check import Check


def checks() -> tuple[Check, ...]:
    return (
        Check(
            name="user_and_model_are_key",
            says="a user has one list of a model version",
            unique=("user_id", "model_version"),
        ),
        Check(
            name="lists_are_not_empty",
            says="every list has at least one item",
            holds="coalesce(size(items) >= 1, false)",
        ),
        Check(
            name="items_are_distinct",
            says="no list has an item twice",
            holds="size(array_distinct(transform(items, x -> x.item_id))) = size(items)",
        ),
        Check(
            name="items_are_named",
            says="every item has its id",
            array="items",
            each="coalesce({x}.item_id <> '', false)",
        ),
        Check(
            name="scores_are_finite",
            says="every score is a finite number",
            array="items",
            each="coalesce(abs({x}.score) < double('infinity'), false)",
        ),
        Check(
            name="scores_fall",
            says="no score is above the one before it",
            array="items",
            pair="coalesce({a}.score >= {b}.score, false)",
        ),
        Check(name="items_are_known", says="every item of the new lists is one of gold.items"),
        Check(
            name="lists_are_whole",
            says="the new lists have as many items as were asked for, or all that may be returned",
        ),
        Check(
            name="users_balance",
            says="users of the new lists + users who may be given nothing = users of gold.sequences",
        ),
        Check(
            name="items_are_allowed",
            says="every item of the new lists satisfies serving.where and is not in "
            "serving.block_list",
        ),
        Check(
            name="seen_items_are_left_out",
            says="no new list has an item of the user's last serving.exclude_seen_days",
        ),
        Check(
            name="categories_are_bounded",
            says="no new list has more than serving.max_per_category items of a category",
        ),
    )
