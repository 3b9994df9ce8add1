"""NARM: recurrent layers, and an attention over what they have seen (Li et al., CIKM 2017)."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.networks.batch import Batch
from models.networks.gru4rec import GRU4Rec, GRU4RecSizes
from models.networks.layers import Dropout

# Of query + key, held at once: what a processor's cache still holds; a GPU has no use for small ones.
CHUNK_SUMS = {"cpu": 3_000_000, "cuda": 200_000_000}
CHUNK_LEAST = 4  # positions; fewer cost more in calls than the cache gives


class NARM(nn.Module):
    """Causal. GRU4Rec's layers, then 2 D^2 + D for the attention and 2 D^2 for the output.

    c_t = [h_t ; sum over j <= t of v . sigmoid(A1 h_t + A2 h_j) h_j], and B c_t meets the items; the
    weights of the sum are not normalised (eq. 5 to 8 there). F position features are concatenated to
    each recurrent layer's input and to what A1 and A2 read: layers * 3 D F + 2 D F [ours].
    """

    cloze = False

    def __init__(self, config: GRU4RecSizes, feature_dim: int = 0) -> None:
        super().__init__()
        dim = config.dim
        self.gru = GRU4Rec(config, feature_dim)
        self.query = nn.Linear(dim + feature_dim, dim, bias=False)  # A1
        self.key = nn.Linear(dim + feature_dim, dim, bias=False)  # A2
        self.energy = nn.Parameter(torch.randn(dim) * dim**-0.5)  # v
        self.dropout = Dropout(config.dropout)
        self.out = nn.Linear(2 * dim, dim, bias=False)  # B

    def forward(
        self, x_BLD: torch.Tensor, batch: Batch, features_BLF: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = self.gru(x_BLD, batch, features_BLF)
        read = h if features_BLF is None else torch.cat([h, features_BLF], dim=-1)
        query, key = self.query(read), self.key(read)
        seen = h.masked_fill(batch.padding.unsqueeze(-1), 0.0)
        rows, length, dim = h.shape
        step, parts = max(CHUNK_LEAST, CHUNK_SUMS[h.device.type] // (rows * length * dim)), []
        for begin in range(0, length, step):
            end = min(begin + step, length)
            # B x L x L x D never exists: a chunk's sums are made again for its gradients.
            parts.append(
                checkpoint(
                    self._attend, query[:, begin:end], key[:, :end], seen[:, :end],
                    use_reentrant=False, preserve_rng_state=False,
                )
            )  # fmt: skip
        result: torch.Tensor = self.out(self.dropout(torch.cat([h, torch.cat(parts, 1)], dim=-1)))
        return result

    def _attend(
        self, query_BCD: torch.Tensor, key_BJD: torch.Tensor, seen_BJD: torch.Tensor
    ) -> torch.Tensor:
        """For the last C of J positions; position i looks at j <= i."""
        sums = query_BCD.unsqueeze(2) + key_BJD.unsqueeze(1)
        weight = torch.sigmoid(sums) @ self.energy
        return weight.tril(key_BJD.shape[1] - query_BCD.shape[1]) @ seen_BJD
