"""Flat arrays of rows in order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def run_starts(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """bool[N]: whether a run of equal rows begins here: the row differs from the one before it in
    some column, or is the first. (As `models.core.rows.run_starts`; what is served has no jobs.)"""
    starts = np.zeros(len(columns[0]), dtype=bool)
    starts[:1] = True
    for column in columns:
        starts[1:] |= column[1:] != column[:-1]
    return starts
