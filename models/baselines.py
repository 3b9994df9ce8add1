"""What every model must beat: popularity, and the user's own most frequent items.

They have no parameters, only counts; they are kept and registered like any other method.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from models.batch import Rows, ragged


class Popularity(nn.Module):
    """`pop`: how often an item had positive feedback in the training rows, the same for everyone."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.count: torch.Tensor
        self.register_buffer("count", torch.zeros(num_items, dtype=torch.float64))

    def fit(self, rows: Rows) -> None:
        count = np.bincount(rows.item[rows.positive], minlength=self.num_items + 1)[1:]
        self.count.copy_(torch.from_numpy(count))

    def score(self, rows: Rows, begin: np.ndarray, end: np.ndarray, *_: object) -> torch.Tensor:
        """float64[R, V] for the histories rows[begin[r]:end[r]]."""
        return self.count.expand(len(begin), -1)


class PersonalTop(Popularity):
    """`personal_top`: the user's most frequent items, equal ones and the rest by popularity.

    score = own count + popularity / (largest popularity + 1). The whole history counts.
    """

    def score(self, rows: Rows, begin: np.ndarray, end: np.ndarray, *_: object) -> torch.Tensor:
        event, row = ragged(begin, end - begin)
        event, row = event[rows.positive[event]], row[rows.positive[event]]
        cell = row * self.num_items + rows.item[event] - 1
        own = np.bincount(cell, minlength=len(begin) * self.num_items)
        own_RV = torch.from_numpy(own.reshape(len(begin), self.num_items))
        return own_RV + self.count / (self.count.max() + 1)
