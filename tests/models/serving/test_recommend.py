"""Serving puts events in order, cuts them and says what becomes of them as the tables do."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from models.core.rows import EXPOSED, NEGATIVE, NEUTRAL, POSITIVE
from models.networks.baselines import Popularity
from models.networks.methods import config
from models.networks.saved_model import Stored
from models.serving.answer import _feedback, _told, recommend
from tests.support.histories import (
    GAP_S,
    KINDS,
    MAX_HOURS,
    ZONE,
    History,
    in_words,
    make,
    shrunk,
    user_name,
)
from tests.support.oracle import NOTHING_MORE, More, expected_sessions

HISTORIES = 400
ITEMS = [f"i{n}" for n in range(4)]


@cache
def made() -> list[History]:
    return make(HISTORIES, 20261128)


def stored(rule: str, **facts: Any) -> Stored:
    pop = Popularity(len(ITEMS), config("pop").model)
    told = {"gap_us": GAP_S * 1_000_000, "session_rule": rule} | facts
    return Stored(pop, config("pop"), ITEMS, pop.count, told)


def events_of(histories: list[History]) -> pa.Table:
    """Events of many users; ids that are not in the order of anything else."""
    kind, rows = KINDS["native sessions"], []
    for user, history in enumerate(histories):
        for number, line in enumerate(history):
            rows.append(
                {
                    "user_id": f"{user}/{user_name(user)}", "item_id": ITEMS[line.item],
                    "event_ts": kind.moment(line), "event_id": f"{(number * 7919) % 997:03d}",
                    "source_session_id": None if line.session is None else f"s{line.session}",
                    "tie_break": line.tie,
                }
            )  # fmt: skip
    schema = pa.schema(
        {"user_id": pa.string(), "item_id": pa.string(), "event_ts": pa.timestamp("us", "UTC"),
         "event_id": pa.string(), "source_session_id": pa.string(), "tie_break": pa.int64()}
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema)


ALL_KEYS = {
    "native_gap": True, "midnight": ZONE, "on_max_hours": "split",
    "max_session_us": round(MAX_HOURS * 3.6e9),
}  # fmt: skip
MORE = {
    "nothing": ({}, NOTHING_MORE),
    "all keys": (ALL_KEYS, More(native_gap=True, midnight=ZONE, split=True)),
    "boundary": ({"boundary": "prev.item_id = 'i3'"}, More(parted="before_item_id = 'i3'")),
}  # fmt: skip
"""What else ends sessions: as models store it, and as the oracle says it."""


def cut(
    rule: str, events: pa.Table, seed: int, more: str = "nothing"
) -> dict[str, list[tuple[str, int]]]:
    """What serving makes of the events, in any order: (item, session) of each user's."""
    frame = events.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    frame = frame.sample(frac=1, random_state=seed, ignore_index=True)
    user, users = pd.factorize(frame["user_id"])
    facts = {"sessions": MORE[more][0]} if MORE[more][0] else {}
    rows = _told(stored(rule, **facts), frame, user, len(users)).rows
    return {
        name: [
            (ITEMS[rows.item[at] - 1], int(rows.ordinal[at]))
            for at in range(rows.start[place], rows.start[place + 1])
        ]
        for place, name in enumerate(users)
    }


def sessions_of(rule: str, events: pa.Table, more: str) -> list[dict[str, Any]]:
    hours = MAX_HOURS if more == "all keys" else 10_000
    return expected_sessions(
        events, native=rule != "gap", gap_s=GAP_S, max_hours=hours, max_events=10_000,
        more=MORE[more][1],
    )  # fmt: skip


def oracle(rule: str, events: pa.Table, more: str = "nothing") -> dict[str, list[tuple[str, int]]]:
    sessions = sessions_of(rule, events, more)
    users: dict[str, list[tuple[str, int]]] = {}
    count: dict[str, int] = {}
    for one in sessions:
        user = one["user_id"]
        count[user] = count.get(user, 0) + 1
        users.setdefault(user, []).extend((item, count[user]) for item in one["items"])
    return users


def told_where(rule: str, events: pa.Table, more: str) -> pa.Table:
    """Events with `opens_session`, which is null of every other one that opens none."""
    heads = {(one["user_id"], one["events"][0]) for one in sessions_of(rule, events, more)}
    rows = zip(*(events[name].to_pylist() for name in ("user_id", "event_id")), strict=True)
    says = [one in heads or (False if at % 2 else None) for at, one in enumerate(rows)]
    return events.append_column("opens_session", pa.array(says))


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("rule", ["gap", "source_session_id"])
def test_a_request_is_ordered_and_cut_as_the_oracle_says(rule: str, more: str) -> None:
    def failing(some: list[History]) -> list[History]:
        events = events_of(some)
        theirs = oracle(rule, events, more)
        mine = cut(rule, told_where(rule, events, more), 1, more)
        names = [f"{user}/{user_name(user)}" for user in range(len(some))]
        return [h for name, h in zip(names, some, strict=True) if mine[name] != theirs[name]]

    wrong = failing(made())
    assert not wrong, in_words(shrunk(wrong[0], failing))


def test_the_oracle_would_see_another_order_and_another_rule() -> None:
    """The generated histories have what tells the rules apart."""
    events = events_of(made())
    assert cut("source_session_id", events, 1) != oracle("gap", events)
    without = events.drop_columns(["event_id"])
    assert cut("gap", without, 1) != oracle("gap", events)
    assert cut("gap", events.drop_columns(["tie_break"]), 1) != oracle("gap", events)
    for more in ("all keys", "boundary"):
        assert cut("gap", events, 1) != oracle("gap", events, more)
    # Of what a request does not say of boundaries, the rest of the rule decides.
    assert cut("gap", events, 1, "boundary") == oracle("gap", events)


def test_ties_without_columns_stay_in_the_order_of_the_rows() -> None:
    when = pd.Timestamp("2024-03-01", tz="UTC")
    frame = pd.DataFrame({"user_id": "u", "item_id": ["i3", "i0", "i2", "i1"], "event_ts": when})

    def items(**columns: Any) -> list[int]:
        told = _told(stored("gap"), frame.assign(**columns), np.zeros(4, np.int64), 1)
        return [int(item) - 1 for item in told.rows.item]

    assert items() == [3, 0, 2, 1]
    assert items(tie_break=[1, None, -1, 1]) == [2, 3, 1, 0]
    assert items(event_id=["b", None, "a", None]) == [2, 3, 0, 1]
    assert items(event_id=["b", "c", "a", "d"], tie_break=[None, 2, 2, None]) == [2, 0, 3, 1]
    # 64 bits do not fit into a float.
    close = pd.array([2**62 + 1, 2**62, None, 2**62 + 2], dtype="Int64")
    assert items(tie_break=close) == [0, 3, 1, 2]
    with pytest.raises(ValueError, match="event_id = 7: ids are texts"):
        items(event_id=[7, 7, 7, 7])


def test_ids_of_sessions_are_read_under_the_native_rule_only() -> None:
    when = pd.to_datetime([0, 1, 2, 2 + GAP_S, 3 + 2 * GAP_S], unit="s", utc=True)
    frame = pd.DataFrame(
        {"user_id": "u", "item_id": "i0", "event_ts": when,
         "source_session_id": ["a", "a", "b", None, None]}
    )  # fmt: skip

    def ordinals(rule: str, frame: pd.DataFrame = frame) -> list[int]:
        told = _told(stored(rule), frame, np.zeros(len(frame), np.int64), 1)
        return list(told.rows.ordinal.tolist())

    assert ordinals("gap") == [1, 1, 1, 1, 2]
    assert ordinals("source_session_id") == [1, 1, 2, 3, 4]
    assert ordinals("source_session_id", frame.drop(columns="source_session_id")) == [1, 1, 1, 1, 2]
    nothing = Stored(stored("gap").model, config("pop"), ITEMS, stored("gap").popularity,
                     {"gap_us": GAP_S * 1_000_000})  # fmt: skip
    assert _told(nothing, frame, np.zeros(5, np.int64), 1).rows.ordinal.tolist() == [1, 1, 1, 1, 2]


def test_a_request_may_say_in_which_session_it_is_made() -> None:
    import torch

    told: list[bool] = []

    class Listens:
        num_items = len(ITEMS)

        def score(self, rows, begin, end, request_ts=None, new_session=None):  # type: ignore[no-untyped-def]
            told.extend(new_session.tolist())
            return torch.zeros(len(begin), len(ITEMS))

    def opens(
        newest: str | None, session: str | None, silence_s: int, rule: str, **more: Any
    ) -> bool:
        chosen = config("gru4rec+st", "tiny", request_time="known")
        facts = {"gap_us": GAP_S * 1_000_000, "session_rule": rule, "sessions": more}
        model = Stored(Listens(), chosen, ITEMS, torch.ones(len(ITEMS)), facts)  # type: ignore[arg-type]
        frame = pd.DataFrame(
            {"user_id": "u", "item_id": "i0", "source_session_id": [newest],
             "event_ts": pd.to_datetime([0], unit="s", utc=True)}
        )  # fmt: skip
        at = str(np.datetime64(silence_s, "s"))
        recommend(model, frame, 1, at, session)
        return told.pop()

    native = "source_session_id"
    assert not opens("a", "a", 10 * GAP_S, native) and opens("a", "b", 0, native)
    assert opens(None, "b", 0, native) and opens("a", "", 0, native)
    assert not opens("a", None, GAP_S, native) and opens("a", None, GAP_S + 1, native)
    assert not opens("a", "b", GAP_S, "gap") and opens("a", "a", GAP_S + 1, "gap")
    # What else ends sessions. (The newest event is at midnight of UTC, of 1970.)
    assert not opens("a", "a", GAP_S, native, native_gap=True)
    assert opens("a", "a", GAP_S + 1, native, native_gap=True)
    assert not opens("a", None, 0, "gap", midnight="UTC")
    far = {"native_gap": False, "midnight": "Africa/Monrovia"}  # 44.5 minutes behind
    assert not opens("a", "a", 44 * 60 + 29, native, **far)
    assert opens("a", "a", 44 * 60 + 30, native, **far)
    cut_at = {"on_max_hours": "split", "max_session_us": GAP_S * 500_000}
    assert not opens("a", None, GAP_S // 2, "gap", **cut_at)
    assert opens("a", None, GAP_S // 2 + 1, "gap", **cut_at)
    assert not opens("a", None, GAP_S // 2 + 1, "gap", max_session_us=GAP_S * 500_000)


def test_what_a_request_does_not_say_about_feedback() -> None:
    rules = {"positive": ["buy", "value >= 4"], "negative": ["value < 2"], "exposed": ["view"]}
    frame = pd.DataFrame({"event_type": ["buy", "view", None, None], "value": [1.0, 5, 3, None]})
    assert _feedback(rules, frame).tolist() == [NEGATIVE, POSITIVE, NEUTRAL, NEUTRAL]
    # A column that is there and null says as little as the log's would.
    silent = frame.assign(event_type=None, value=None)
    assert _feedback(rules, silent).tolist() == [NEUTRAL] * 4
    assert _feedback(rules, frame[["event_type"]]).tolist() == [POSITIVE, EXPOSED, NEUTRAL, NEUTRAL]
    # Without either column the caller says nothing about feedback.
    assert _feedback(rules, frame[[]]).tolist() == [POSITIVE] * 4
    assert _feedback(rules | {"positive": []}, frame[[]]).tolist() == [NEUTRAL] * 4
    by_value = rules | {"positive": ["value >= 4"]}
    assert _feedback(by_value, frame[["event_type"]]).tolist() == [
        POSITIVE, EXPOSED, POSITIVE, POSITIVE,
    ]  # fmt: skip
    for wrong in ([np.inf, 1, 2, 3], ["a", 1, 2, 3]):
        with pytest.raises(ValueError, match=r"value.*ive (finite )?numbers, or null"):
            _feedback(rules, frame.assign(value=wrong))
