"""What must hold of `ops.lists`: conditions that Spark and DataFusion understand alike."""

from collections.abc import Iterable

from expectations.check import Check

JUDGED = ("served", "recent_pop", "personal_top")
LIST_METRICS = ("hr_at_10", "ndcg_at_10")


def _all(conditions: Iterable[str]) -> str:
    """(A value that is null breaks them.)"""
    return f"coalesce({' and '.join(conditions)}, false)"


def _inside(name: str) -> str:
    return f"{name} between {name}_low - 1e-9 and {name}_high + 1e-9"  # (sums round)


def checks() -> tuple[Check, ...]:
    names = [f"{one}_{metric}" for one in JUDGED for metric in LIST_METRICS]
    return (
        Check(
            name="night_and_model_are_key",
            says="a night has one row of a model version",
            unique=("source", "night", "model_version"),
        ),
        Check(
            name="clock_is_known",
            says="lists are chosen by the time of their publication, or by the log's time",
            holds="coalesce(clock in ('published', 'log'), false)",
        ),
        Check(
            name="users_are_counted",
            says="a row has at least one user and at least one target for each, and no more new "
            "users than users",
            holds="coalesce(users >= 1 and targets >= users and new_users between 0 and users and "
            "events_left_out >= 0, false)",
        ),
        Check(
            name="values_are_shares",
            says="hit rates and NDCG are between 0 and 1",
            holds=_all(f"{name} between 0 and 1" for name in names),
        ),
        Check(
            name="intervals_have_their_value",
            says="a value is inside its interval",
            holds=_all(map(_inside, names)),
        ),
        Check(
            name="known_users_have_values",
            says="a row with known users has their values, inside their intervals, and no other has",
            holds="case when new_users = users then "
            + _all(f"known_{name} is null" for name in names)
            + f" else {_all(_inside(f'known_{name}') for name in names)} end",
        ),
    )
