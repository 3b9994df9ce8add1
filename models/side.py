"""What a catalogue says of items: read as it was known at the cut, and mixed into item vectors."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.dataset import open_table
from models.metrics import Floats
from models.presets import ModelConfig
from models.rows import Ints

if TYPE_CHECKING:
    from collections.abc import Sequence


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


def read_side(
    path: str, item_ids: Sequence[str], until_us: int, categories: Sequence[str],
    numbers: Sequence[str], make_with: str,
) -> Side:  # fmt: skip
    """What was known of the items at `until_us`; what became known later is not looked at."""
    import pyarrow.compute as pc

    from jobs.files import rows_of

    table = open_table(path, None, make_with)
    rows = rows_of(table).to_table(columns=["item_id", "known_from", "attributes"])
    until = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=until_us)
    rows = rows.filter(pc.less_equal(rows["known_from"], until)).sort_by("known_from")
    wanted = {item: place for place, item in enumerate(item_ids)}
    known: list[dict[str, str]] = [{} for _ in item_ids]
    for item, attributes in zip(
        rows["item_id"].to_pylist(), rows["attributes"].to_pylist(), strict=True
    ):
        if item in wanted:
            known[wanted[item]] = dict(attributes)  # the newest stays
    code = np.zeros((len(item_ids), len(categories)), dtype=np.int64)
    sizes = []
    for column, name in enumerate(categories):
        values = sorted({one[name] for one in known if name in one})
        place = {value: number for number, value in enumerate(values, 1)}
        code[:, column] = [place.get(one.get(name, ""), 0) if name in one else 0 for one in known]
        sizes.append(len(values) + 1)
    value = np.full((len(item_ids), len(numbers)), np.nan)
    for column, name in enumerate(numbers):
        value[:, column] = [float(one[name]) if name in one else np.nan for one in known]
    there = ~np.isnan(value)
    count = np.maximum(1, there.sum(0))
    mean = np.where(there, value, 0).sum(0) / count
    spread = np.sqrt(np.where(there, (value - mean) ** 2, 0).sum(0) / count)
    value = np.where(there, (value - mean) / np.where(spread > 0, spread, 1), 0)
    said = sum(any(name in one for name in (*categories, *numbers)) for one in known)
    return Side(code, tuple(sizes), value, table.version(), said)


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
        """float[N, D], of items `item_N` whose own vectors are `x_ND`."""
        code = self.code[item_N]
        parts = [table(code[:, number]) for number, table in enumerate(self.tables)]
        mixed = torch.cat([x_ND, *parts, self.value[item_N]], dim=-1)
        result: torch.Tensor = x_ND + self.down(functional.gelu(self.up(mixed)))
        return result
