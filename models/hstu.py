"""HSTU: attention without softmax, gated, knowing distances and times (Zhai et al., ICML 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from models.batch import Batch
from models.errors import UserError
from models.layers import Dropout
from models.transformer import TransformerSizes

TIME_BUCKETS = 129
TEMPERATURE = 0.05


class _Lookup(torch.autograd.Function):
    """table[index] for millions of indices into a hundred entries: gradients by counting."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(table)
        return table[index]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        grad = grads[0].reshape(-1)
        counted = torch.bincount(index.reshape(-1), grad.float(), minlength=ctx.size)
        return counted.to(grad.dtype), None


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
    ) -> torch.Tensor:
        rows, length, dim = x_BLD.shape
        mixed = functional.silu(self.project(functional.layer_norm(x_BLD, (dim,))))
        gate, *parts = torch.split(mixed, dim, dim=-1)
        shape = (rows, length, self.heads, dim // self.heads)
        v, q, k = (part.view(shape).transpose(1, 2) for part in parts)
        if self.feature is not None and features_BLF is not None:
            extra = self.feature(features_BLF).unsqueeze(1).expand(-1, self.heads, -1, -1)
            q, k = torch.cat([q, extra], dim=-1), torch.cat([k, extra], dim=-1)
        place = torch.arange(length, device=x_BLD.device)
        bias = self.position[place[:, None] - place[None, :] + self.max_len - 1]
        bias = bias + _Lookup.apply(self.time, bucket_BLL)  # type: ignore[no-untyped-call]
        logits = q @ k.transpose(-1, -2) + bias.unsqueeze(1)
        weight = functional.silu(logits) * (mask_BLL / self.max_len).unsqueeze(1)
        h = (weight @ v).transpose(1, 2).reshape(rows, length, dim)
        result: torch.Tensor = x_BLD + self.out(
            self.dropout(gate * functional.layer_norm(h, (dim,)))
        )
        return result


def time_bucket(ts_BL: torch.Tensor) -> torch.Tensor:
    """int64[B, L, L]: floor(ln(max(|t_i - t_j|, 1 s)) / .301), at most 128."""
    seconds = (ts_BL[:, :, None] - ts_BL[:, None, :]).abs() / 1e6
    return (seconds.clamp(min=1).log() / 0.301).floor().clamp(max=TIME_BUCKETS - 1).long()


class HSTU(nn.Module):
    """Causal. Inputs are scaled by sqrt(D), no absolute positions; scored by cosine / .05.

    Row i sees t_i. (The public research code lets it see t_{i+1}, the time of what it predicts.)
    """

    cloze = False
    temperature = TEMPERATURE

    def __init__(self, config: TransformerSizes, feature_dim: int = 0) -> None:
        super().__init__()
        if config.dim % config.heads:
            raise UserError(f"dim {config.dim} must be a multiple of heads {config.heads}")
        self.layers = nn.ModuleList(Layer(config, feature_dim) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x_BLD: torch.Tensor, batch: Batch, features_BLF: torch.Tensor | None = None
    ) -> torch.Tensor:
        x: torch.Tensor = self.dropout(x_BLD * x_BLD.shape[-1] ** 0.5)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = (causal & ~batch.padding[:, None, :]).to(x.dtype)
        bucket = time_bucket(batch.ts)
        for layer in self.layers:
            x = layer(x, mask, bucket, features_BLF)
        return x
