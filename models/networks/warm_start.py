"""A trained model's weights taken over into one of the same settings with more items.

Weights of items go over by `item_id`. What is new begins where it is expected to end [ours]:

 * an item's vector: the mean of the vectors of the known items that its sessions hold, each as
   often as it is beside it; where there is none, the mean of all known items
 * its bias: the log of its share of the events, as in a training that begins. The bias of a known
   item moves by as much as the log of its share has moved
 * the vector of a category's new value: the mean of the values known before
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from models.core.errors import UserError
from models.core.rows import Bools, Floats, Ints, Rows
from models.networks.recommender import Recommender
from models.networks.saved_model import Stored

Tensors = Mapping[str, torch.Tensor]
VECTORS = ("item.weight", "output.weight")  # rows 0..V, and more where there are other tokens
COUNTED = ("side.code", "side.value", "side.words")  # filled from the catalogue


@dataclass(frozen=True)
class Carried:
    """known, beside, others: items whose weights were there, whose vector is of what they are
    beside, and whose is the mean of all."""

    known: int
    beside: int
    others: int


def carry_over(
    model: Recommender,
    old: Stored,
    item_ids: list[str],
    rows: Rows,
    values: Mapping[str, list[str]] | None = None,
) -> Carried:
    """Overwrite the weights of `model`, which knows `item_ids` and has counted `rows`.

    Args:
        rows: all events, of the model's vocabulary.
        values: category -> its values, in the order of `model`'s codes from 1.

    Raises:
        UserError: the models are not of the same settings.
    """
    assert isinstance(old.model, Recommender)
    place = pd.Index(old.item_ids, dtype=object).get_indexer(pd.Index(item_ids, dtype=object))
    known = place >= 0
    beside = _beside(rows, known)
    theirs, mine = old.model.state_dict(), model.state_dict()
    new = dict(mine)
    for name, value in theirs.items():
        if name in COUNTED:
            continue
        if name in VECTORS:
            new[name] = _vectors(mine[name], value, place, beside)
        elif name in ("bias", "output.bias"):
            new[name] = _biases(mine[name], value, old, place, model)
        elif name.startswith("side.tables.") and value.shape[1:] == mine[name].shape[1:]:
            number = int(name.split(".")[2])
            new[name] = _categories(mine[name], value, number, old, values or {})
        elif value.shape == mine[name].shape:
            new[name] = value
        else:
            raise UserError(
                f"{old.facts['method']}: {name} has the shape {tuple(value.shape)}, and "
                f"{tuple(mine[name].shape)} is needed: the settings or the catalogue's columns have "
                "changed. Give --from-scratch"
            )
    model.load_state_dict(new)
    model.clear_unseen()
    some = np.asarray(beside.sum(axis=1)).ravel() > 0
    return Carried(int(known.sum()), int((~known & some).sum()), int((~known & ~some).sum()))


def _beside(rows: Rows, known: Bools) -> sparse.csr_matrix:
    """float64[V, V]: of each new item, its share of the known ones that are in its sessions; rows
    of known items are empty."""
    size, sessions = len(known), len(rows.session_start) - 1
    item, session = rows.item.astype(np.int64) - 1, rows.session
    old = known[item]

    def matrix(of: Bools) -> sparse.csr_matrix:
        ones = np.ones(int(of.sum()))
        return sparse.csr_matrix((ones, (item[of], session[of])), shape=(size, sessions))

    pairs = (matrix(~old) @ matrix(old).T).tocsr()
    total = np.asarray(pairs.sum(axis=1)).ravel()
    return sparse.diags(1 / np.where(total > 0, total, 1)) @ pairs


def _vectors(
    mine: torch.Tensor, theirs: torch.Tensor, place: Ints, beside: sparse.csr_matrix
) -> torch.Tensor:
    """Row 0 and those after the items are the same tokens in both."""
    size, had = len(place), theirs.shape[0]
    known = place >= 0
    result = mine.clone()
    result[0] = theirs[0]
    extra = mine.shape[0] - 1 - size
    if extra:
        result[size + 1 :] = theirs[had - extra :]
    own = np.zeros((size, *theirs.shape[1:]))
    own[known] = theirs[1 + place[known]].numpy()
    vectors = beside @ own
    none = ~known & (np.asarray(beside.sum(axis=1)).ravel() == 0)
    vectors[none] = own[known].mean(axis=0)
    vectors[known] = own[known]
    result[1 : size + 1] = torch.from_numpy(vectors).to(mine.dtype)
    return result


def log_share(count: Floats) -> Floats:
    """What biases begin with; see `Recommender.fit`."""
    share: Floats = np.log((count + 1) / (count.sum() + len(count)))
    centred: Floats = share - share.mean()
    return centred


def _biases(
    mine: torch.Tensor, theirs: torch.Tensor, old: Stored, place: Ints, model: Recommender
) -> torch.Tensor:
    known = place >= 0
    first = len(mine) - len(place)  # a class that is no item
    moved = np.log(model.share.double().cpu().numpy())
    moved = moved - moved.mean()
    was = log_share(old.popularity.double().numpy())
    learnt = theirs[len(theirs) - len(was) :].double().numpy() - was
    result = mine.clone()
    result[:first] = theirs[:first]
    value = moved.copy()
    value[known] += learnt[place[known]]
    result[first:] = torch.from_numpy(value).to(mine.dtype)
    return result


def _categories(
    mine: torch.Tensor,
    theirs: torch.Tensor,
    number: int,
    old: Stored,
    values: Mapping[str, list[str]],
) -> torch.Tensor:
    had = list(old.facts.get("categories", {}).values())
    now = list(values.values())
    if number >= len(had) or number >= len(now):
        return mine  # (made before values were kept)
    place = pd.Index(had[number], dtype=object).get_indexer(pd.Index(now[number], dtype=object))
    result = mine.clone()
    result[0] = theirs[0]
    mean = theirs[1:].mean(dim=0) if len(theirs) > 1 else theirs[0]
    for row, at in enumerate(place, 1):
        result[row] = theirs[1 + at] if at >= 0 else mean
    return result
