"""A stored model asked with raw events: the behaviour of a registered model, without MLflow.

One row an event in, one row a user out, in order of first appearance. Decisions at the edges:
 * Sessions are cut by the rule that the model was trained under. Under the native rule neighbours
   belong together if both `source_session_id` are non-null and equal, or both null and the silence
   is at most the gap; without that column the gap rule cuts. Under the gap rule it is not read.
   What else ends the source's sessions (`native_gap`, `midnight`, `on_max_hours`) does so here, of
   the events that the request has: pieces of a long session are counted from the first of these.
 * A `boundary` of the source is SQL of another engine on columns that a request need not have. It is
   not evaluated: `opens_session` says of a row whether it is true of it and the event before; without
   that column, or where it is null, the rest of the rule cuts.
 * Events are put in the order of the tables: (event_ts, [source_session_id under the native rule],
   tie_break, event_id), nulls last; what these columns leave equal stays in the order of the rows.
 * Unknown items are skipped after sessions are cut. Without a known item: popularity.
 * `event_ts` is a timestamp or an ISO 8601 text; without a zone it is UTC.
 * A row with null `item_id` or `event_ts` names its user and is no event. NaN is a null, but an item
   that is NaN in a row with a time is refused: so pandas reads the ids NA, nan and null of a CSV.
 * Ids are texts and taken as they are; numbers are refused.
 * `request_ts` is read under the policy `known` only, and by the rule of items seen in the last
   days; default the last event's time.
 * `request_session_id`, under `known` and the native rule, names the session that the request is
   made in; without it the silence since the newest event decides.
 * `event_type` and `value` decide about feedback as they do at ingestion; null says nothing. A
   request without any column that the source's `positive` rule reads says nothing at all: its
   events are positive, unless they are negative or exposed.
 * `exposed_with` is a list of item ids, or null; unknown ones are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from expectations import feedback_rule
from expectations.session_rule import SessionRule
from models.core.rows import POSITIVE, Bools, Ints, Rows, run_starts
from models.networks.saved_model import Stored
from models.networks.scoring import exclude
from models.serving.rules import Rules, best_of, moment, only_allowed, permitted

CHUNK_SCORES = 16_000_000
TEXTS = ("user_id", "item_id", "source_session_id", "event_id", "event_type")
NATIVE = "source_session_id"  # the session rule, and the column that it reads
OPENS = "opens_session"


def recommend(
    stored: Stored,
    frame: pd.DataFrame,
    k: int = 10,
    request_ts: str = "",
    request_session_id: str | None = None,
    rules: Rules | None = None,
) -> pd.DataFrame:
    """columns user_id, items (a list of {"item_id", "score"}, score falling, at most k)."""
    if k < 1:
        raise ValueError(f"k = {k}: ask for at least one item")
    if frame["user_id"].isna().any():
        raise ValueError("user_id is null in some rows: every row needs its user")
    for name in TEXTS:
        if name in frame.columns:
            texts(frame[name])
    _no_lost_items(frame)
    user, users = distinct(frame["user_id"])
    told = _told(stored, frame, user, len(users))
    rows = told.rows
    begin, end = rows.start[:-1], rows.start[1:]
    items: list[list[dict[str, Any]]] = [[] for _ in users]
    if (begin == end).any():
        counts = only_allowed(stored.popularity[None, :].to(torch.float64), rules)
        popular = _top(counts, k, stored.item_ids, rules)[0]
        for place in np.flatnonzero(begin == end):
            items[place] = list(popular)
    asked = np.flatnonzero(begin < end)
    now, new = _request(stored, told, asked, request_ts, request_session_id)
    seen_until = _seen_until(told, asked, request_ts, rules)
    step = max(1, min(512, CHUNK_SCORES // max(1, len(stored.item_ids))))
    for low in range(0, len(asked), step):
        part, at = asked[low : low + step], slice(low, low + step)
        scores = stored.model.score(
            rows,
            begin[part],
            end[part],
            None if now is None else now[at],
            None if new is None else new[at],
        )
        if stored.config.model.repeat_policy == "exclude_seen":
            scores = exclude(scores, rows, begin[part], end[part])
        if rules is not None:
            since = None if seen_until is None else seen_until[at]
            scores = permitted(scores, rules, rows, begin[part], end[part], since)
        for place, top in zip(part, _top(scores, k, stored.item_ids, rules), strict=True):
            items[place] = top
    return pd.DataFrame({"user_id": pd.Series(users, dtype=object), "items": items})


def _seen_until(told: Told, asked: Ints, request_ts: str, rules: Rules | None) -> Ints | None:
    """int64[R]: from when on a rule counts days back: the request's time where it is given, else each
    user's newest event, known or not; None: the rules say it, or do not ask.

    Raises:
        ValueError: `request_ts` is not a time.
    """
    if rules is None or rules.seen_us is None:
        return None
    if request_ts:
        return np.full(len(asked), _asked_at(request_ts), dtype=np.int64)
    return told.newest[asked] if rules.now_us is None else None


def _top(
    scores_RV: torch.Tensor, k: int, item_ids: list[str], rules: Rules | None
) -> list[list[dict[str, Any]]]:
    """The k best of each row that the rules allow; equal scores in order of the vocabulary."""
    return [
        [
            {"item_id": item_ids[place], "score": score}
            for place, score in zip(places, scores, strict=True)
            if math.isfinite(score)
        ]
        for places, scores in zip(
            *(part.tolist() for part in best_of(scores_RV, k, rules)), strict=True
        )
    ]


def times(column: pd.Series) -> pd.Series:
    """Timestamps or ISO 8601 texts as UTC; without a zone they are UTC already. Null stays null.

    Raises:
        ValueError: numbers, or a text that is not a time; says which.
    """
    if pd.api.types.is_numeric_dtype(column) and column.notna().any():
        raise ValueError(
            f"event_ts = {column.dropna().iloc[0]}: a number says no unit. Give timestamps, or "
            "texts such as '2024-06-01T10:00:00Z'"
        )
    if pd.api.types.is_datetime64_any_dtype(column):
        zoned = column.dt.tz is not None
        return column.dt.tz_convert("UTC") if zoned else column.dt.tz_localize("UTC")
    try:
        return pd.to_datetime(column, utc=True, format="ISO8601")
    except pd.errors.OutOfBoundsDatetime:
        return _far(column)
    except (ValueError, TypeError) as error:
        raise ValueError(f"event_ts: {error}. Give timestamps, or ISO 8601 texts") from None


def _far(column: pd.Series) -> pd.Series:
    """Times of the years 1 to 9999, some of which nanoseconds cannot say."""
    found = [np.datetime64("NaT") if pd.isna(one) else moment(str(one)) for one in column]
    series = pd.Series(np.array(found, dtype="datetime64[us]"), index=column.index)
    return series.dt.tz_localize("UTC")


def texts(column: pd.Series) -> None:
    """Raises:
    ValueError: something is not text, and not null.
    """
    what = "types of events" if column.name == "event_type" else "ids"
    for value in column:
        if isinstance(value, str) or _is_null(value):
            continue
        way = f"give {str(value)!r} if that is what it has"
        if not pd.api.types.is_scalar(value):
            way = "a row is one event (dataframe_records, dataframe_split or instances)"
        raise ValueError(f"{column.name} = {value!r}: {what} are texts, as the log has them; {way}")


def _is_null(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _no_lost_items(frame: pd.DataFrame) -> None:
    """Raises:
    ValueError: a row has a time and NaN as its item; says where this comes from.
    """
    nan = np.array([isinstance(one, float) for one in frame["item_id"]], dtype=bool)
    lost = nan & frame["event_ts"].notna().to_numpy()
    if lost.any():
        raise ValueError(
            f"item_id is NaN in {int(lost.sum())} of the rows that have an event_ts: so pandas reads "
            "NA, nan, null and None of a CSV file, whatever was meant. Read it with dtype=str, "
            "keep_default_na=False; in a row without an item give None (JSON: null)"
        )


def distinct(column: Iterable[Any]) -> tuple[Ints, list[str]]:
    """Of each text its number among the distinct ones, by first appearance, null -1; and those.

    (`pd.factorize` takes texts that differ only behind a zero character for one.)
    """
    found: dict[str, int] = {}
    code = [found.setdefault(one, len(found)) if isinstance(one, str) else -1 for one in column]
    return np.array(code, dtype=np.int64), list(found)


def whole_numbers(column: pd.Series) -> pd.Series:
    """Int64 with nulls.

    Raises:
        ValueError: something is no whole number.
    """
    try:
        return column.astype("Int64")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{column.name}: {error}. Give whole numbers, or null") from None


@dataclass(frozen=True)
class Told:
    """What a request says of U users.

    `rows`: the events that the model knows. Of each user's newest event, known or not: its time
    `newest` int64[U] (0 without one), its id of a session `native` object[U] (None: null; no array
    where ids are not read), whether it is of a later session than the newest known one, `moved_on`
    bool[U], and when its session, all pieces together, began, `since` int64[U].
    """

    rows: Rows
    newest: Ints
    moved_on: Bools
    native: NDArray[Any] | None
    since: Ints


def rule_of(facts: dict[str, Any], by_ids: bool) -> SessionRule:
    """The rule that a model was trained under.

    Args:
        by_ids: whether the log's own sessions are read.
    """
    more = facts.get("sessions", {})
    found = SessionRule(
        native=by_ids,
        gap_us=int(facts["gap_us"]),
        native_gap=bool(more.get("native_gap", False)),
        midnight=more.get("midnight"),
        boundary="boundary" in more,
    )
    if more.get("on_max_hours") != "split":
        return found
    return replace(found, split=True, max_session_us=int(more["max_session_us"]))


def _told(stored: Stored, frame: pd.DataFrame, user: Ints, num_users: int) -> Told:
    """The events in order, cut into sessions, then without the unknown ones.

    Args:
        user: int64[rows of the frame], 0..num_users-1.
    """
    table, rule = _table(stored, frame, user)
    owner, when = table["user"], table["ts"]
    codes = distinct(table["native"])[0] if rule.native else None
    apart = table["opens"][1:] if rule.boundary else None
    every = np.cumsum(rule.arrays.opens(owner, when, codes, apart))
    index = stored.lookup.get_indexer(table["item"]) + 1
    known = index > 0
    last = np.searchsorted(owner, np.arange(num_users), "right") - 1
    session, known_owner = every[known], owner[known]
    start = np.searchsorted(known_owner, np.arange(num_users + 1))
    newest, moved_on = np.zeros(num_users, np.int64), np.zeros(num_users, bool)
    there = start[1:] > start[:-1]
    newest[there] = when[last[there]]
    moved_on[there] = every[last[there]] > session[start[1:][there] - 1]
    since = newest
    if rule.split:
        whole = replace(rule, split=False).arrays.opens(owner, when, codes, apart)
        begun = np.maximum.accumulate(np.where(whole, np.arange(len(when)), 0))
        since = np.zeros(num_users, np.int64)
        since[there] = when[begun[last[there]]]
    native = None
    if rule.native:
        native = np.full(num_users, None, dtype=object)
        ids = table["native"][last[there]]
        native[there] = [None if pd.isna(one) else one for one in ids]
    running = np.cumsum(run_starts(session, known_owner))
    base = np.concatenate([[0], running])[start[:-1]]
    feedback = table["feedback"][known]
    shown_start, shown = _shown(stored, table["shown"][known])
    rows = Rows(
        item=index[known].astype(np.int32),
        ts=when[known],
        ordinal=(running - base[known_owner]).astype(np.int32),
        positive=feedback == POSITIVE,
        start=start.astype(np.int64),
        feedback=feedback,
        shown_start=shown_start,
        shown=shown,
    )
    return Told(rows, newest, moved_on, native, since)


def _table(
    stored: Stored, frame: pd.DataFrame, user: Ints
) -> tuple[dict[str, NDArray[Any]], SessionRule]:
    """The rows that are events, typed and in order, column by column; and the rule that cuts them.

    (As arrays: of one user's request, pandas' own bookkeeping was most of the time.)
    """
    ts = times(frame["event_ts"])
    by_ids = stored.facts.get("session_rule", "gap") == NATIVE and NATIVE in frame.columns
    rule = rule_of(stored.facts, by_ids)
    columns: dict[str, NDArray[Any]] = {
        "user": user,
        "ts": ts.dt.as_unit("us").astype("int64").to_numpy(),
        "item": _objects(frame["item_id"]),
        "feedback": _feedback(stored.facts.get("feedback", {}), frame),
        "shown": np.full(len(frame), None),
    }
    if "exposed_with" in frame.columns:
        columns["shown"] = _objects(frame["exposed_with"])
    if by_ids:
        columns["native"] = _objects(frame[NATIVE])
    if rule.boundary:
        columns["opens"] = np.zeros(len(frame), bool)
        if OPENS in frame.columns:
            columns["opens"] = frame[OPENS].astype("boolean").fillna(False).to_numpy(bool)
    if "tie_break" in frame.columns:
        columns["tie_break"] = _objects(whole_numbers(frame["tie_break"]))
    if "event_id" in frame.columns:
        texts(frame["event_id"])
        columns["event_id"] = _objects(frame["event_id"])
    events = frame["item_id"].notna().to_numpy() & ts.notna().to_numpy()
    table = {name: column[events] for name, column in columns.items()}
    named = {NATIVE: "native", "tie_break": "tie_break", "event_id": "event_id"}

    def ties(places: Ints) -> dict[str, list[Any]]:
        held = {ours: table[name][places] for ours, name in named.items() if name in table}
        return {n: [None if _is_null(one) else one for one in held[n]] for n in held}

    order = rule.arrays.order(table["user"], table["ts"], ties)
    return {name: column[order] for name, column in table.items()}, rule


def _objects(column: pd.Series) -> NDArray[Any]:
    objects: NDArray[Any] = column.to_numpy(dtype=object)
    return objects


def _shown(stored: Stored, lists: NDArray[Any]) -> tuple[Ints, Ints]:
    """Known items shown with each event: (start int64[E+1], vocabulary index int64[X])."""
    if all(one is None for one in lists):
        return np.zeros(len(lists) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    held = [[] if _is_null(one) else one for one in lists]
    for one in held:
        if not isinstance(one, list | tuple | np.ndarray):
            raise ValueError(f"exposed_with = {one!r}: give a list of item ids, or null")
    flat = pd.Series([item for one in held for item in one], dtype=object, name="exposed_with")
    texts(flat)
    index = np.asarray(stored.lookup.get_indexer(flat.to_numpy()), dtype=np.int64) + 1
    event = np.repeat(np.arange(len(held)), [len(one) for one in held])[index > 0]
    count = np.bincount(event, minlength=len(held))
    return np.concatenate([[0], np.cumsum(count)]), index[index > 0]


def _request(
    stored: Stored, told: Told, asked: Ints, request_ts: str, request_session_id: str | None
) -> tuple[Ints | None, Bools | None]:
    """Time of the request in microseconds and whether it opens a session, of the users `asked`.

    The silence is counted from the newest event at all. Where that one is of a later session than
    the newest known one, the model has heard nothing of the session that is open.

    Raises:
        ValueError: `request_ts` is not a time.
    """
    if stored.config.model.request_time != "known":
        return None, None
    when = told.rows.ts[told.rows.start[1:][asked] - 1]
    named = request_session_id is not None and told.native is not None
    if not request_ts and not named:
        return when, np.zeros(len(when), dtype=bool)
    if request_ts:
        when = np.full(len(when), _asked_at(request_ts), dtype=np.int64)
    # (What a boundary says of an event that has not happened is not known.)
    rule = rule_of(stored.facts, told.native is not None).arrays
    newest = told.newest[asked]
    silent = rule.silent(newest, when)
    if named and told.native is not None:
        apart = np.array([one != request_session_id for one in told.native[asked]], dtype=bool)
        apart |= silent & rule.rule.native_gap
    else:
        apart = silent
    apart |= ~rule.same_day(newest, when)
    if rule.rule.split:
        pieces = (rule.pieces(told.since[asked], one) for one in (newest, when))
        before, now = pieces
        apart |= before != now
    return when, told.moved_on[asked] | apart


def _asked_at(request_ts: str) -> int:
    """In microseconds.

    Raises:
        ValueError: it is not a time.
    """
    try:
        return int(moment(request_ts).astype(np.int64))
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"request_ts = {request_ts!r}: {error}. Give an ISO 8601 text, or none"
        ) from None


def _feedback(rules: dict[str, Any], frame: pd.DataFrame) -> Ints:
    """int8[E], as ingestion judges; without a column that the `positive` rule reads, what no entry
    holds of is positive."""
    positive = rules.get("positive")
    reads = {
        "value" if feedback_rule.CONDITION.match(entry) else "event_type"
        for entry in positive or []
    }
    if reads and reads.isdisjoint(frame.columns):
        rules = {**rules, "positive": None}
    entries = feedback_rule.entries(rules)
    event_type = value = None
    if "event_type" in frame.columns:
        told = frame["event_type"].astype(object)
        event_type = told.where(told.notna(), None).to_numpy()
    if "value" in frame.columns and any(map(feedback_rule.CONDITION.match, entries)):
        value = _values(frame["value"])
    return feedback_rule.codes(rules, event_type, value, len(frame))


def _values(column: pd.Series) -> NDArray[np.float64]:
    """float64[E], NaN for null.

    Raises:
        ValueError: something is no finite number (ingestion rejects such a line).
    """
    try:
        numbers = pd.to_numeric(column).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise ValueError(f"value: {error}. Give numbers, or null") from None
    if np.isinf(numbers).any():
        raise ValueError(f"value = {numbers[np.isinf(numbers)][0]}: give finite numbers, or null")
    return np.asarray(numbers)
