"""SASRec (causal) and BERT4Rec (cloze): one pre-norm transformer, one flag.

Kang & McAuley 2018, Sun 2019; sizes and details as in paper A's reference code.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from models.networks.batch import Batch
from models.networks.layers import (
    Dropout,
    Wanted,
    attention,
    by_head,
    check_heads,
    dropout,
    on_gpu,
    rolled,
    with_features,
    working,
)


class TransformerSizes(Protocol):
    @property
    def dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def max_len(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def attention_dropout(self) -> float: ...
    @property
    def reference(self) -> bool: ...
    @property
    def table_std(self) -> float: ...
    @property
    def positions(self) -> str: ...


class Block(nn.Module):
    """Attention and a 4D feed-forward net, pre-norm: 12 D^2 + 13 D; F features add F^2 + F.

    Features are projected once a layer and appended to queries and keys of every head; values stay
    as they are; logits are scaled by 1/sqrt(D/H + F) [code].
    """

    def __init__(self, config: TransformerSizes, feature_dim: int) -> None:
        super().__init__()
        dim = config.dim
        check_heads(dim, config.heads)
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        # The reference drops inside the feed-forward net and after each block too.
        self.inner = config.dropout if config.reference else 0.0
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = Dropout(config.dropout)
        self.feature = nn.Linear(feature_dim, feature_dim) if feature_dim else None

    def forward(
        self,
        x_BLD: torch.Tensor,
        mask: torch.Tensor | None,
        features_BLF: torch.Tensor | None,
        wanted: Wanted | None = None,
    ) -> torch.Tensor:
        """float[B, L, D]; with `wanted` float[N, D]: these positions look at all, and only they
        are worked out. mask: as of `attention`."""
        normed = working(self.norm_1(x_BLD))
        h = self._attend(normed, mask, features_BLF, wanted)
        if wanted is not None:
            h, x_BLD = wanted.flat(h), wanted.flat(wanted.of(x_BLD))
        x = x_BLD + self.dropout(self.out(h))
        h = functional.gelu(self.up(working(self.norm_2(x))), approximate="tanh")
        h = self.down(dropout(h, self.inner, self.training))
        return dropout(x + self.dropout(h), self.inner, self.training)

    def _attend(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        features: torch.Tensor | None,
        wanted: Wanted | None,
    ) -> torch.Tensor:
        asking = x if wanted is None else wanted.of(x)
        given = ((self.query, asking), (self.key, x), (self.value, x))
        q, k, v = (by_head(layer(of), self.heads) for layer, of in given)
        if self.feature is not None and features is not None:
            q, k = with_features(q, k, self.feature(features), wanted)
        if wanted is not None:
            mask = wanted.hidden(mask, x)
        p = self.attention_dropout if self.training else 0.0
        h = attention(q, k, v, mask, p)
        return h.transpose(1, 2).reshape(len(x), asking.shape[1], -1)


class Transformer(nn.Module):
    """L*D positions and the blocks; a final norm (2D) unless it is the reference's net.

    Positions count from the newest token, which is always L-1 [code]: how many tokens follow is known
    from a token's position, in training as in no request. `from_oldest` the first token of a row is 0,
    and nothing that follows, were it one session token more, changes an output [ours].

    `reference` also keeps the padding row (D) of the segment table that the reference carries
    unused in every variant, so that parameter counts agree to the last one.
    """

    cloze = False
    chooses = True

    def __init__(self, config: TransformerSizes, feature_dim: int = 0) -> None:
        super().__init__()
        self.from_oldest = config.positions == "from_oldest"
        self.position = nn.Parameter(torch.randn(config.max_len, config.dim) * config.table_std)
        self.blocks = nn.ModuleList(Block(config, feature_dim) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)
        self.norm = nn.Identity() if config.reference else nn.LayerNorm(config.dim)
        self.unused_segment = nn.Parameter(torch.zeros(config.dim)) if config.reference else None

    def forward(
        self,
        x_BLD: torch.Tensor,
        batch: Batch,
        features_BLF: torch.Tensor | None = None,
        at_N: torch.Tensor | None = None,
        most: int = 0,
    ) -> torch.Tensor:
        rows, length, _ = x_BLD.shape
        if self.from_oldest:
            position = self.position[((~batch.padding).cumsum(1) - 1).clamp(min=0)]
        else:
            position = self.position[batch.max_len - length :]
        x = self.dropout(x_BLD + position)
        # Where padding comes last, "causal" is all of the mask, and fused kernels read none.
        last = not self.cloze and on_gpu(x)
        mask = None
        if not last:
            mask = working(x.new_zeros(()).masked_fill(~self._mask(batch.padding), -torch.inf))
        else:
            pads = batch.padding.sum(1)
            x = rolled(x, pads)
            features_BLF = None if features_BLF is None else rolled(features_BLF, pads)
            if at_N is not None:
                row = at_N // length
                at_N = torch.maximum(at_N - pads[row], row * length)  # (padding: any of its row)
        wanted = Wanted.if_few(at_N, rows, length, most)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, mask, features_BLF, wanted if number == len(self.blocks) else None)
        if at_N is None:
            x = rolled(x, -batch.padding.sum(1)) if last else x
        elif wanted is None:
            x = x.flatten(0, 1).index_select(0, at_N)
        result: torch.Tensor = self.norm(x)
        return result

    def _mask(self, padding_BL: torch.Tensor) -> torch.Tensor:
        """True where position i may look at j: never at padding, but everyone at oneself."""
        mask = ~padding_BL[:, None, None, :]
        length = padding_BL.shape[1]
        if not self.cloze:
            mask = (
                mask & torch.ones(length, length, dtype=torch.bool, device=padding_BL.device).tril()
            )
            mask = mask | torch.eye(length, dtype=torch.bool, device=padding_BL.device)
        return mask


class SASRec(Transformer):
    """Causal: position i sees nothing after i."""


class BERT4Rec(Transformer):
    """Cloze: every position sees every other; what is to be predicted is hidden by [MASK]."""

    cloze = True
