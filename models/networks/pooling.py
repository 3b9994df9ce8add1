"""Item-based session encoders (paper B's ISE): a session's items, as a set, to one vector.

None knows in what order a session's items came. Paper B compared pooling, attention and a small
transformer; the mean won [3p].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from models.networks.layers import working
from models.networks.transformer import Block, TransformerSizes


class Mean(nn.Module):
    """The mean. No parameters."""

    def __init__(self, config: TransformerSizes) -> None:
        super().__init__()

    def forward(self, x_ED: torch.Tensor, at_E: torch.Tensor, size: int) -> torch.Tensor:
        """float[size, D]: of the elements `at_E == n` for each n; 0 where there are none."""
        total = x_ED.new_zeros(size, x_ED.shape[1]).index_add(0, at_E, x_ED)
        count = torch.bincount(at_E, minlength=size).clamp(min=1)
        return total / count.unsqueeze(1).to(total.dtype)


class Attention(nn.Module):
    """Additive attention with a learned query: v . tanh(W x + b), softmax within the session.

    D^2 + 2 D parameters.
    """

    def __init__(self, config: TransformerSizes) -> None:
        super().__init__()
        self.key = nn.Linear(config.dim, config.dim)
        self.query = nn.Parameter(torch.randn(config.dim) * config.dim**-0.5)

    def forward(self, x_ED: torch.Tensor, at_E: torch.Tensor, size: int) -> torch.Tensor:
        logit = (torch.tanh(self.key(x_ED)) @ self.query.to(x_ED.dtype)).float()
        highest = logit.new_full((size,), -torch.inf).scatter_reduce(0, at_E, logit, "amax")
        weight = torch.exp(logit - highest.detach()[at_E])
        total = weight.new_zeros(size).index_add(0, at_E, weight)
        share = (weight / total[at_E]).to(x_ED.dtype)
        return x_ED.new_zeros(size, x_ED.shape[1]).index_add(0, at_E, x_ED * share.unsqueeze(1))


class SetTransformer(nn.Module):
    """One transformer block among a session's items, without positions, then the mean.

    12 D^2 + 13 D parameters. Sessions of similar size are worked on together, so that one long
    session does not fill all others up.
    """

    def __init__(self, config: TransformerSizes) -> None:
        super().__init__()
        self.block, self.mean = Block(config, 0), Mean(config)

    def forward(self, x_ED: torch.Tensor, at_E: torch.Tensor, size: int) -> torch.Tensor:
        count = torch.bincount(at_E, minlength=size)
        order = torch.argsort(at_E, stable=True)
        first = torch.cumsum(count, 0) - count
        column = torch.arange(len(order), device=order.device) - first[at_E[order]]
        octave = count.clamp(min=1).float().log2().ceil().long()[at_E[order]]
        seen = torch.empty_like(x_ED)
        for one in torch.unique(octave).tolist():
            mine = octave == one
            element, place = order[mine], column[mine]
            _, row = torch.unique(at_E[element], return_inverse=True)
            shape = (int(row.max()) + 1, int(place.max()) + 1)
            x = x_ED.new_zeros(*shape, x_ED.shape[1]).index_put((row, place), x_ED[element])
            there = torch.zeros(shape, dtype=torch.bool, device=x.device)
            there[row, place] = True
            mask = working(x.new_zeros(()).masked_fill(~there[:, None, None, :], -torch.inf))
            seen = seen.index_put((element,), self.block(x, mask, None)[row, place].to(seen.dtype))
        mean: torch.Tensor = self.mean(seen, at_E, size)
        return mean


POOLINGS: dict[str, Callable[[TransformerSizes], nn.Module]] = {
    "mean": Mean,
    "attention": Attention,
    "transformer": SetTransformer,
}
