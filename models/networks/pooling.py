"""Item-based session encoders (paper B's ISE): a session's items, as a set, to one vector.

None knows in what order a session's items came. Paper B compared pooling, attention and a small
transformer; the mean won [3p].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from models.core.on_device import OnDevice
from models.core.rows import Ints
from models.networks.layers import working
from models.networks.transformer import Block, TransformerSizes


@dataclass(frozen=True)
class Group(OnDevice):
    """Sessions of similar size, padded to rows x width: element int64[e] of the E elements are at
    row int64[e], column int64[e]."""

    element: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    rows: int
    width: int


class Pooling(nn.Module):
    """float[size, D] of E elements: `forward(x_ED, at_E, size, groups)` pools the elements
    `at_E == n` for each n; 0 where there are none."""

    def __init__(self, config: TransformerSizes) -> None:
        super().__init__()

    def groups(self, at_E: Ints) -> tuple[Group, ...]:
        """What a pooling must know as numbers, worked out where the batch is made."""
        return ()


class Mean(Pooling):
    """The mean. No parameters."""

    def forward(
        self, x_ED: torch.Tensor, at_E: torch.Tensor, size: int, groups: tuple[Group, ...] = ()
    ) -> torch.Tensor:
        total = x_ED.new_zeros(size, x_ED.shape[1]).index_add(0, at_E, x_ED)
        one = torch.ones(1, dtype=torch.long, device=at_E.device).expand(len(at_E))
        count = torch.zeros(size, dtype=torch.long, device=at_E.device).index_add_(0, at_E, one)
        return total / count.clamp(min=1).unsqueeze(1).to(total.dtype)


class Attention(Pooling):
    """Additive attention with a learned query: v . tanh(W x + b), softmax within the session.

    D^2 + 2 D parameters.
    """

    def __init__(self, config: TransformerSizes) -> None:
        super().__init__(config)
        self.key = nn.Linear(config.dim, config.dim)
        self.query = nn.Parameter(torch.randn(config.dim) * config.dim**-0.5)

    def forward(
        self, x_ED: torch.Tensor, at_E: torch.Tensor, size: int, groups: tuple[Group, ...] = ()
    ) -> torch.Tensor:
        logit = (torch.tanh(self.key(x_ED)) @ self.query.to(x_ED.dtype)).float()
        highest = logit.new_full((size,), -torch.inf).scatter_reduce(0, at_E, logit, "amax")
        weight = torch.exp(logit - highest.detach()[at_E])
        total = weight.new_zeros(size).index_add(0, at_E, weight)
        share = (weight / total[at_E]).to(x_ED.dtype)
        return x_ED.new_zeros(size, x_ED.shape[1]).index_add(0, at_E, x_ED * share.unsqueeze(1))


class SetTransformer(Pooling):
    """One transformer block among a session's items, without positions, then the mean.

    12 D^2 + 13 D parameters. Sessions of similar size are worked on together, so that one long
    session does not fill all others up.
    """

    def __init__(self, config: TransformerSizes) -> None:
        super().__init__(config)
        self.block, self.mean = Block(config, 0), Mean(config)

    def groups(self, at_E: Ints) -> tuple[Group, ...]:
        count = np.bincount(at_E)
        order = np.argsort(at_E, kind="stable")
        of = at_E[order]
        column = np.arange(len(order)) - (np.cumsum(count) - count)[of]
        octave = np.ceil(np.log2(np.maximum(count, 1).astype(np.float32))).astype(np.int64)[of]
        found = []
        for one in np.unique(octave):
            mine = octave == one
            _, row = np.unique(of[mine], return_inverse=True)
            place = column[mine]
            element, at, column_of = map(torch.from_numpy, (order[mine], row, place))
            rows, width = int(row.max()) + 1, int(place.max()) + 1
            found.append(Group(element, at, column_of, rows, width))
        return tuple(found)

    def forward(
        self, x_ED: torch.Tensor, at_E: torch.Tensor, size: int, groups: tuple[Group, ...] = ()
    ) -> torch.Tensor:
        seen = torch.empty_like(x_ED)
        if len(x_ED) and not groups:
            groups = tuple(one.to(x_ED.device) for one in self.groups(at_E.cpu().numpy()))
        for group in groups:
            element, at = group.element, (group.row, group.column)
            shape = (group.rows, group.width)
            x = x_ED.new_zeros(*shape, x_ED.shape[1]).index_put(at, x_ED[element])
            there = torch.zeros(shape, dtype=torch.bool, device=x.device)
            there[at] = True
            mask = working(x.new_zeros(()).masked_fill(~there[:, None, None, :], -torch.inf))
            seen = seen.index_put((element,), self.block(x, mask, None)[at].to(seen.dtype))
        mean: torch.Tensor = self.mean(seen, at_E, size)
        return mean


POOLINGS: dict[str, Callable[[TransformerSizes], Pooling]] = {
    "mean": Mean,
    "attention": Attention,
    "transformer": SetTransformer,
}
