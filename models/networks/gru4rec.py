"""GRU4Rec: recurrent layers over the sequence (Hidasi 2016/2018; full cross-entropy, ours)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from models.networks.batch import Batch
from models.networks.layers import Dropout, rolled


class GRU4RecSizes(Protocol):
    @property
    def dim(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def dropout(self) -> float: ...


class GRU4Rec(nn.Module):
    """Causal. layers * (6 D^2 + 6 D) parameters; F position features add layers * 3 D F.

    Features are concatenated to each layer's input [ours: the reading that fits paper A's figure].
    """

    cloze = False

    def __init__(self, config: GRU4RecSizes, feature_dim: int = 0) -> None:
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(
            nn.GRU(config.dim + feature_dim, config.dim, batch_first=True)
            for _ in range(config.layers)
        )

    def forward(
        self, x_BLD: torch.Tensor, batch: Batch, features_BLF: torch.Tensor | None = None
    ) -> torch.Tensor:
        # Padding is moved behind the newest token, where a causal layer cannot see it.
        pads = batch.padding.sum(1)
        h = self.dropout(rolled(x_BLD, pads))
        features = None if features_BLF is None else rolled(features_BLF, pads)
        for layer in self.layers:
            h, _ = layer(h if features is None else torch.cat([h, features], dim=-1))
            h = self.dropout(h)
        return rolled(h, -pads)
