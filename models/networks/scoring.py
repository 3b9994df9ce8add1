"""From scores to lists: which users are scored together, what is excluded, the K best."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.core.rows import Ints, Rows, ragged

CHUNK_SCORES = 16_000_000
CHUNK_ROWS = 512


def exclude(scores_RV: torch.Tensor, rows: Rows, begin: Ints, end: Ints) -> torch.Tensor:
    """`repeat_policy = "exclude_seen"`: items of the history are never returned."""
    event, row = ragged(begin, end - begin)
    scores_RV = scores_RV.clone()
    scores_RV[
        torch.from_numpy(row), torch.from_numpy(rows.item[event].astype(np.int64) - 1)
    ] = -torch.inf
    return scores_RV


def parts(model: Any, order: Ints, length: Ints) -> list[Ints]:
    """`order` in parts that are scored together: `length` (of the histories, rising) says how many
    fit, at most 512 and as many as have 16 million scores."""
    most = max(1, min(CHUNK_ROWS, CHUNK_SCORES // max(1, model.num_items)))
    tokens = getattr(model, "tokens_at_once", None)
    longest = np.minimum(length, model.config.max_len) if tokens else length
    found, low = [], 0
    while low < len(order):
        size = most
        if tokens:
            padded = np.arange(1, most + 1)[: len(order) - low] * longest[low : low + most]
            size = max(1, int(np.searchsorted(padded, tokens, side="right")))
        found.append(order[low : low + size])
        low += size
    return found


GROUP = 8


def _highest(scores_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk` in two steps: of V/8 groups of 8 scores, the k with the highest maxima hold the k best.

    A third of the time at 10,000 items and k = 100 (LAB_LOG.md); the same answer, ties apart.
    """
    rows, size = scores_RV.shape
    groups = size // GROUP
    if groups <= 2 * k:
        return scores_RV.topk(k, dim=1)
    inside = scores_RV[:, : GROUP * groups].view(rows, GROUP, groups)
    top = inside.amax(dim=1).topk(k, dim=1, sorted=False).indices
    place = (top[:, None, :] + groups * torch.arange(GROUP)[:, None]).view(rows, GROUP * k)
    if size > GROUP * groups:
        rest = torch.arange(GROUP * groups, size).expand(rows, -1)
        place = torch.cat([place, rest], dim=1)
    score, at = scores_RV.gather(1, place).topk(k, dim=1)
    return score, place.gather(1, at)


def best(scores_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row, falling, equal scores in order of the vocabulary: (place int64[R, K],
    score [R, K]), K = min(k, V). May include non-finite scores; callers drop them.
    """
    size = min(k, scores_RV.shape[1])
    score, place = _highest(scores_RV, min(size + 1, scores_RV.shape[1]))
    # Of equals at the end of the list, topk takes any: is there one more of them?
    more = score[:, -1] == score[:, size - 1]
    if score.shape[1] == size:
        more = torch.zeros_like(more)  # the list is the whole vocabulary
    place, order = place[:, :size].sort(dim=1)
    score, falls = score[:, :size].gather(1, order).sort(dim=1, descending=True, stable=True)
    place = place.gather(1, falls)
    for row in torch.nonzero(more).squeeze(1).tolist():
        at = torch.nonzero(scores_RV[row] >= score[row, -1]).squeeze(1)
        value, falls = torch.sort(scores_RV[row][at], descending=True, stable=True)
        place[row], score[row] = at[falls][:size], value[:size]
    return place, score
