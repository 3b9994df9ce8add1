"""HSTU: attention without softmax, gated, knowing distances and times (Zhai et al., ICML 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from models.networks.batch import Batch
from models.networks.layers import Dropout, Wanted, by_head, check_heads, on_gpu, with_features
from models.networks.transformer import TransformerSizes

TIME_BUCKETS = 129
TEMPERATURE = 0.05


class _Lookup(torch.autograd.Function):
    """table[index] for millions of indices into a hundred entries: gradients by counting."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(table)
        return table.index_select(0, index.reshape(-1)).view(index.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        grad = grads[0]
        if not on_gpu(index):
            counted = torch.bincount(
                index.reshape(-1), grad.reshape(-1).float(), minlength=ctx.size
            )
            return counted.to(grad.dtype), None
        return sums_by_row(index, grad.float(), ctx.size).to(grad.dtype), None


def sums_by_row(index: torch.Tensor, value: torch.Tensor, size: int) -> torch.Tensor:
    """float[size]: the values [..., L] of each index, in two steps: a GPU's bincount waits for the
    largest index, and all at once millions would add to one place."""
    index, value = index.flatten(0, -2), value.flatten(0, -2)
    return value.new_zeros(len(index), size).scatter_add_(1, index, value).sum(0)


class Layer(nn.Module):
    """5 D^2 + D, and 2L-1 + 129 for position and time; F features add F^2 + F.

    U, V, Q, K = split(silu(norm(x) W)); A = silu(Q K' + b_pos[i-j] + b_time[bucket]) / L, causal;
    y = x + W_o dropout(U * norm(A V)). No softmax, no 1/sqrt(D), norms without parameters; b_pos
    and b_time are shared by the heads. Features are projected once a layer and appended to Q and K
    after silu [ours].
    """

    def __init__(self, config: TransformerSizes, feature_dim: int) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.max_len = config.heads, config.max_len
        self.project = nn.Linear(dim, 4 * dim, bias=False)
        self.position = nn.Parameter(torch.randn(2 * config.max_len - 1) * 0.02)
        self.time = nn.Parameter(torch.randn(TIME_BUCKETS) * 0.02)
        self.dropout = Dropout(config.dropout)
        self.out = nn.Linear(dim, dim)
        self.feature = nn.Linear(feature_dim, feature_dim) if feature_dim else None
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(
        self,
        x_BLD: torch.Tensor,
        mask_BLL: torch.Tensor,
        bucket_BLL: torch.Tensor,
        features_BLF: torch.Tensor | None,
        wanted: Wanted | None = None,
    ) -> torch.Tensor:
        """float[B, L, D]; with `wanted` float[N, D]: only these positions are worked out."""
        _, length, dim = x_BLD.shape
        normed = functional.layer_norm(x_BLD, (dim,))
        asking = normed if wanted is None else wanted.of(normed)
        of_u, of_v, of_q, of_k = torch.split(self.project.weight, dim)
        u, q = self._split(asking, of_u, of_q)
        v, k = self._split(normed, of_v, of_k)
        q, k, v = (by_head(one, self.heads) for one in (q, k, v))
        if self.feature is not None and features_BLF is not None:
            q, k = with_features(q, k, self.feature(features_BLF), wanted)
        place = torch.arange(length, device=x_BLD.device)
        at = place[None, :] if wanted is None else wanted.column
        if wanted is not None:
            mask_BLL, bucket_BLL = wanted.of(mask_BLL), wanted.of(bucket_BLL)
        distance = at[:, :, None] - place + self.max_len - 1
        bias = _Lookup.apply(self.position, distance)  # type: ignore[no-untyped-call]
        bias = bias + _Lookup.apply(self.time, bucket_BLL)  # type: ignore[no-untyped-call]
        logits = q @ k.transpose(-1, -2)
        logits = logits + bias.to(logits.dtype).unsqueeze(1)
        weight = functional.silu(logits) * (mask_BLL / self.max_len).to(logits.dtype).unsqueeze(1)
        h = (weight @ v).transpose(1, 2).flatten(2)
        if wanted is not None:
            h, u, x_BLD = wanted.flat(h), wanted.flat(u), wanted.flat(wanted.of(x_BLD))
        result: torch.Tensor = x_BLD + self.out(self.dropout(u * functional.layer_norm(h, (dim,))))
        return result

    @staticmethod
    def _split(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """silu(x W'), one part a weight."""
        mixed = functional.silu(functional.linear(x, torch.cat(weights)))
        return torch.split(mixed, len(weights[0]), dim=-1)


def time_bucket(ts_BL: torch.Tensor) -> torch.Tensor:
    """int64[B, L, L]: floor(ln(max(|t_i - t_j|, 1 s)) / .301), at most 128."""
    seconds = (ts_BL[:, :, None] - ts_BL[:, None, :]).abs() / 1e6
    return (seconds.clamp(min=1).log() / 0.301).floor().clamp(max=TIME_BUCKETS - 1).long()


class HSTU(nn.Module):
    """Causal. Inputs are scaled by sqrt(D), no absolute positions; scored by cosine / .05.

    Row i sees t_i. (The public research code lets it see t_{i+1}, the time of what it predicts.)
    """

    cloze = False
    chooses = True
    temperature = TEMPERATURE

    def __init__(self, config: TransformerSizes, feature_dim: int = 0) -> None:
        super().__init__()
        check_heads(config.dim, config.heads)
        self.layers = nn.ModuleList(Layer(config, feature_dim) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x_BLD: torch.Tensor,
        batch: Batch,
        features_BLF: torch.Tensor | None = None,
        at_N: torch.Tensor | None = None,
        most: int = 0,
    ) -> torch.Tensor:
        x: torch.Tensor = self.dropout(x_BLD * x_BLD.shape[-1] ** 0.5)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = (causal & ~batch.padding[:, None, :]).to(x.dtype)
        bucket = time_bucket(batch.ts)
        wanted = Wanted.if_few(at_N, len(x), length, most)
        for number, layer in enumerate(self.layers, 1):
            last = number == len(self.layers)
            x = layer(x, mask, bucket, features_BLF, wanted if last else None)
        return x if at_N is None or wanted is not None else x.flatten(0, 1).index_select(0, at_N)
