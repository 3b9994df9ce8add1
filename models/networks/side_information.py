"""What a catalogue says of items: read as it was known at the cut, and mixed into item vectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from models.core.config import ModelConfig
from models.core.rows import Floats, Ints


@dataclass(frozen=True)
class Side:
    """Attributes of V items, from one version of gold.item_attributes.

    code int64[V, C] (a category's values from 1, 0 where nothing is known), sizes (so many codes
    each category has, 0 counted), value float64[V, M] (mean 0, deviation 1 over the items that
    have one; 0 for the others), known (of so many items something).
    """

    code: Ints
    sizes: tuple[int, ...]
    value: Floats
    version: int
    known: int
    values: dict[str, list[str]] = field(default_factory=dict)


def _table(size: int, width: int) -> nn.Embedding:
    """Row 0, where nothing is known, is a constant. Others start as far out as items do."""
    table = nn.Embedding(size, width, padding_idx=0)
    nn.init.normal_(table.weight, std=width**-0.5)
    with torch.no_grad():
        table.weight[0].zero_()
    return table


class SideInformation(nn.Module):
    """e + W_2 gelu(W_1 [e; categories; numbers]): item vectors with what the catalogue says.

    Paper B's concatenation and MLP; that it is added to the item's own vector, beginning at 0, is
    ours: it starts as the model without. Parameters: `side_dim` a value of a category and, counted
    though it stays 0, of "not known"; (D + C side_dim + M) D + D of W_1, D^2 + D of W_2.
    """

    def __init__(self, num_items: int, config: ModelConfig) -> None:
        super().__init__()
        sizes, dim, width = config.categories, config.dim, config.side_dim
        self.tables = nn.ModuleList(_table(size, width) for size in sizes)
        self.up = nn.Linear(dim + len(sizes) * width + config.numbers, dim)
        self.down = nn.Linear(dim, dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.code: torch.Tensor  # of items 0..V: 0 is padding
        self.value: torch.Tensor
        self.register_buffer("code", torch.zeros(num_items + 1, len(sizes), dtype=torch.long))
        self.register_buffer("value", torch.zeros(num_items + 1, config.numbers))

    def fill(self, side: Side) -> None:
        self.code[1:] = torch.from_numpy(side.code)
        self.value[1:] = torch.from_numpy(side.value).to(self.value.dtype)

    def forward(self, item_N: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        """float[..., N, D], of items `item_N` whose own vectors are `x_ND`."""
        code = self.code[item_N]
        parts = [table(code[..., number]) for number, table in enumerate(self.tables)]
        mixed = torch.cat([x_ND, *parts, self.value[item_N]], dim=-1)
        result: torch.Tensor = x_ND + self.down(functional.gelu(self.up(mixed)))
        return result
