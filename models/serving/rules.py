"""Rules for lists: which items a user may be given, and how many of one category.

They hold inside a list: what they exclude is replaced by the next best item, so that a list has K
items wherever K are allowed. `jobs score` makes them from a source's `[serving]` and its tables; a
serving machine, which has no tables, is given the same as a text (`of_text`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.core.rows import Bools, Ints, Rows, ragged
from models.networks.scoring import best

if TYPE_CHECKING:
    import pandas as pd

DAY_US = 86_400_000_000
KEYS = ("allowed", "blocked", "exclude_seen_days", "as_of", "max_per_category", "category")
WIDER = 4  # ours: by how much more is looked at where a list is not full yet


@dataclass(frozen=True)
class Rules:
    """What lists may hold, over a vocabulary of V items.

    allowed: bool[V]. seen_us: items of events that are at most so long before `now_us`, or before
    the request where that is None, are left out; None: no such rule. most: items of one category in
    a list, 0: no such rule. category: int64[V], a category's number, -1 for none (not counted).
    """

    allowed: Bools
    seen_us: int | None = None
    now_us: int | None = None
    most: int = 0
    category: Ints | None = None


def only_allowed(scores_RV: torch.Tensor, rules: Rules | None) -> torch.Tensor:
    """Scores with -inf for the items that nobody may be given."""
    if rules is None or rules.allowed.all():
        return scores_RV
    return scores_RV.masked_fill(torch.from_numpy(~rules.allowed), -torch.inf)


def permitted(
    scores_RV: torch.Tensor, rules: Rules, rows: Rows, begin: Ints, end: Ints, now: Ints | None
) -> torch.Tensor:
    """Scores of R rows, -inf for what the rules exclude; those that were given stay as they are.

    Args:
        begin, end: int64[R], each row's events in `rows`.
        now: int64[R], the time from which `seen_us` counts back; None: `rules.now_us`, or else the
            row's newest event.
    """
    given, scores_RV = scores_RV, only_allowed(scores_RV, rules)
    if rules.seen_us is None:
        return scores_RV
    if scores_RV is given:
        scores_RV = given.clone()
    if now is None:
        now = rows.ts[end - 1] if rules.now_us is None else np.full(len(begin), rules.now_us)
    event, row = ragged(begin, end - begin)
    late = rows.ts[event] >= (now - rules.seen_us)[row]
    item = rows.item[event[late]].astype(np.int64) - 1
    scores_RV[torch.from_numpy(row[late]), torch.from_numpy(item)] = -torch.inf
    return scores_RV


def best_of(
    scores_RV: torch.Tensor, k: int, rules: Rules | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scoring.best`, with at most `rules.most` items of a category in a list; behind the last
    item that a list may have, the score is -inf.

    Equal to taking the items one by one, the best first, and leaving out those whose category is
    full; so the first so many of a row decide about themselves, and more are looked at only for
    rows in which they do not fill the list.
    """
    if rules is None or not rules.most or rules.category is None:
        return best(scores_RV, k)
    size = min(k, scores_RV.shape[1])
    category = torch.from_numpy(rules.category)
    place = torch.zeros((len(scores_RV), size), dtype=torch.int64)
    score = torch.full((len(scores_RV), size), -torch.inf, dtype=scores_RV.dtype)
    waiting, width = torch.arange(len(scores_RV)), min(2 * size, scores_RV.shape[1])
    while len(waiting):
        # (At first all wait, and a copy of all scores costs as much as the search.)
        some = scores_RV if len(waiting) == len(scores_RV) else scores_RV[waiting]
        places, scores = best(some, width)
        keep = torch.isfinite(scores) & (_number(category[places]) < rules.most)
        all_there = width == scores_RV.shape[1]
        done = (keep.sum(dim=1) >= size) | ~torch.isfinite(scores[:, -1]) | all_there
        # What is kept, in its order, to the front.
        front = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices[:, :size]
        place[waiting[done]] = places.gather(1, front)[done]
        given = scores.masked_fill(~keep, -torch.inf).gather(1, front)
        score[waiting[done]] = given[done]
        waiting, width = waiting[~done], min(WIDER * width, scores_RV.shape[1])
    return place, score


def _number(category_RW: torch.Tensor) -> torch.Tensor:
    """How many of its category are before each place of its row; 0 for no category."""
    sorted_RW, at = category_RW.sort(dim=1, stable=True)
    here = torch.arange(category_RW.shape[1]).expand_as(sorted_RW)
    opens = torch.ones_like(sorted_RW, dtype=torch.bool)
    opens[:, 1:] = sorted_RW[:, 1:] != sorted_RW[:, :-1]
    first = torch.where(opens, here, 0).cummax(dim=1).values
    before = torch.where(sorted_RW < 0, 0, here - first)
    return torch.zeros_like(before).scatter(1, at, before)


def of_text(text: str, lookup: pd.Index) -> Rules:
    """Rules as JSON, as `python -m jobs rules` writes them.

    An object with any of `allowed` (only these item ids), `blocked` (not these), both of which may
    name items that the model does not know; `exclude_seen_days`, counted back from the request's
    time, else from `as_of` (an ISO 8601 text), else from each user's newest event;
    `max_per_category` and `category` (item id -> category).

    Args:
        lookup: the model's item ids.

    Raises:
        ValueError: it says something else; names the key and the fix.
    """
    try:
        told = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"rules = {text[:80]!r}: no JSON ({error}). Give an object") from None
    if not isinstance(told, dict):
        raise ValueError(f"rules = {text[:80]!r}: give an object with any of {', '.join(KEYS)}")
    for key in told:
        if key not in KEYS:
            raise ValueError(f"rules: {key!r} is not known: give any of {', '.join(KEYS)}")
    allowed = np.ones(len(lookup), dtype=bool)
    if told.get("allowed") is not None:
        allowed &= _named(told, "allowed", lookup)
    if told.get("blocked") is not None:
        allowed &= ~_named(told, "blocked", lookup)
    days, as_of = told.get("exclude_seen_days"), told.get("as_of")
    if days is not None and (not isinstance(days, int | float) or not 0 < days <= 36_500):
        raise ValueError(f"rules: exclude_seen_days = {days!r}: give a number of days above 0")
    most, category = _categories(told, lookup)
    return Rules(
        allowed, None if days is None else round(days * DAY_US),
        None if as_of is None else _as_of(as_of), most, category,
    )  # fmt: skip


def moment(text: str) -> np.datetime64:
    """An ISO 8601 text of the years 1 to 9999 in UTC, in microseconds.

    Raises:
        ValueError, OverflowError: it is none.
    """
    found = datetime.fromisoformat(text)
    if found.tzinfo is not None:
        found = found.astimezone(UTC).replace(tzinfo=None)
    return np.datetime64(found, "us")


def _as_of(text: Any) -> int:
    try:
        return int(moment(str(text)).astype(np.int64))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"rules: as_of = {text!r}: {error}. Give an ISO 8601 text") from None


def _named(told: dict[str, Any], key: str, lookup: pd.Index) -> Bools:
    """bool[V]: the items of the vocabulary that a list names."""
    ids = told[key]
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise ValueError(f"rules: {key} = {str(ids)[:80]}: give a list of item ids, as texts")
    named = np.zeros(len(lookup), dtype=bool)
    at = lookup.get_indexer(np.array(ids, dtype=object))
    named[at[at >= 0]] = True
    return named


def _categories(told: dict[str, Any], lookup: pd.Index) -> tuple[int, Ints | None]:
    most, of = told.get("max_per_category"), told.get("category")
    if most is None and of is None:
        return 0, None
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"rules: max_per_category = {most!r}: give a whole number above 0")
    if not isinstance(of, dict):
        raise ValueError(f"rules: category = {str(of)[:80]}: give an object, item id -> category")
    number: dict[str, int] = {}
    codes = [
        -1 if of.get(one) is None else number.setdefault(str(of[one]), len(number))
        for one in lookup
    ]
    return most, np.array(codes, dtype=np.int64)
