"""What several backbones are built of: dropout and attention, cheap where there is no GPU.

Dropout's random numbers, one float an element, are a tenth of the time of training a transformer on
a CPU, and more the more of the rest is bfloat16. Here an element takes one random byte.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from models.core.errors import UserError

# oneDNN keeps code and buffers for each shape it has met, 1,024 of them: ragged batches meet new
# ones all the time, and memory grows by 100 MB an epoch. It reads this when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "24")

BYTE = 256
MULTIPLE = 8  # fused attention reads widths of a multiple of 16 bytes
SHORT = 512  # ours: rows up to this length have their attention weights made, on CPUs
FEW = 0.7  # ours: below this share of the positions, the last block is worked out for them alone


class _ByteDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: int) -> torch.Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
        words.random_(-(2**63), None)
        drawn = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # Compared into x's own type: by way of bool it takes ten times as long.
        factor = torch.ge(drawn, dropped, out=torch.empty_like(x, requires_grad=False))
        factor.mul_(BYTE / (BYTE - dropped))
        ctx.save_for_backward(factor)
        kept: torch.Tensor = x * factor
        return kept

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Dropout; on a CPU with p rounded to a multiple of 1/256, and kept elements scaled by what was
    in fact dropped."""
    if not training or p == 0:
        return x
    dropped = round(p * BYTE)
    if x.device.type != "cpu" or not 0 < dropped < BYTE:
        return functional.dropout(x, p)
    result: torch.Tensor = _ByteDropout.apply(x, dropped)  # type: ignore[no-untyped-call]
    return result


class Dropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p, self.training)


def check_heads(dim: int, heads: int) -> None:
    """Raises:
    UserError: heads do not share the width evenly.
    """
    if dim % heads:
        raise UserError(
            f"dim {dim} must be a multiple of heads {heads}: choose another --dim or --heads"
        )


def by_head(x_BLD: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, H, L, D/H]"""
    return x_BLD.view(*x_BLD.shape[:2], heads, -1).transpose(1, 2)


def with_features(
    q: torch.Tensor, k: torch.Tensor, features_BLF: torch.Tensor, wanted: Wanted | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same features of a position appended to the query and the key of its every head."""
    theirs = features_BLF if wanted is None else wanted.of(features_BLF)
    both = ((q, theirs), (k, features_BLF))
    q, k = (torch.cat([x, f[:, None].expand(-1, x.shape[1], -1, -1)], -1) for x, f in both)
    return q, k


def working(x: torch.Tensor) -> torch.Tensor:
    """In the type that matrix products are done in: under autocast what several of them read is
    converted once, not for each."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def on_gpu(x: torch.Tensor) -> bool:
    """Whether what is best on a GPU is done: attention by a fused kernel, which knows what is causal
    and need not read a mask; nothing that waits for a value."""
    return x.device.type != "cpu"


def rolled(x_BLF: torch.Tensor, by_B: torch.Tensor) -> torch.Tensor:
    """Every row moved `by` columns to the left; what leaves there comes back on the right."""
    length = x_BLF.shape[1]
    at = (torch.arange(length, device=x_BLF.device) + by_B.unsqueeze(1)) % length
    return x_BLF.gather(1, at.unsqueeze(-1).expand_as(x_BLF))


def attention(
    q_BHMF: torch.Tensor,
    k_BHLF: torch.Tensor,
    v_BHLE: torch.Tensor,
    hidden: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    """Softmax attention scaled by 1/sqrt(F), with dropout p on its weights: [B, H, M, E].

    Args:
        hidden: of q's type, added to the logits: 0, or -inf where a query must not look. None:
            query i looks at keys j <= i (where attention is a GPU's).

    On CPUs the weights are made: that takes half the time of PyTorch's fused kernel at these
    lengths, which knows no dropout either (LAB_LOG.md). Elsewhere, and for long rows, values
    narrower than keys are filled up with zeros: fused kernels want one width, on GPUs a multiple
    of eight.
    """
    scale = q_BHMF.shape[-1] ** -0.5
    if not on_gpu(q_BHMF) and (p > 0 or k_BHLF.shape[2] <= SHORT):
        weight = torch.softmax((q_BHMF * scale) @ k_BHLF.transpose(-1, -2) + hidden, dim=-1)
        return dropout(weight, p, True) @ v_BHLE
    width, kept = k_BHLF.shape[-1], v_BHLE.shape[-1]
    if on_gpu(q_BHMF) and width % MULTIPLE:
        width += MULTIPLE - width % MULTIPLE
        q_BHMF, k_BHLF = (
            functional.pad(one, (0, width - one.shape[-1])) for one in (q_BHMF, k_BHLF)
        )
    h = functional.scaled_dot_product_attention(
        q_BHMF,
        k_BHLF,
        functional.pad(v_BHLE, (0, width - kept)),
        attn_mask=hidden,
        dropout_p=p,
        is_causal=hidden is None,
        scale=scale,
    )
    return h[..., :kept]


class Wanted:
    """The positions that are asked for, N of B x L: as queries of each row, padded to M a row.

    A last layer is worked out for them alone: labels of a cloze model, the newest position when
    predicting. column int64[B, M]: their columns; at int64[N]: where they are in B x M, in the order asked.
    `most`: of one row, at most; 0: not known, and a GPU waits until they are counted.
    """

    def __init__(self, at_N: torch.Tensor, rows: int, length: int, most: int = 0) -> None:
        row, column = at_N // length, at_N % length
        in_order, order = torch.sort(row, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(at_N), device=at_N.device)
        first = torch.searchsorted(in_order, torch.arange(rows, device=at_N.device))
        place = place - first[row]
        most = most or int(place.max()) + 1
        self.at = row * most + place
        self.column = at_N.new_full((rows * most,), length - 1)
        self.column[self.at] = column
        self.column = self.column.view(rows, most)

    @staticmethod
    def if_few(at_N: torch.Tensor | None, rows: int, length: int, most: int = 0) -> Wanted | None:
        """None: all positions, or nearly all, are asked for."""
        if at_N is None or len(at_N) >= FEW * rows * length:
            return None
        return Wanted(at_N, rows, length, most)

    def of(self, x_BLF: torch.Tensor) -> torch.Tensor:
        """[B, M, F]"""
        return x_BLF.gather(1, self.column.unsqueeze(-1).expand(-1, -1, x_BLF.shape[-1]))

    def hidden(self, hidden: torch.Tensor | None, x_BLF: torch.Tensor) -> torch.Tensor:
        """[B, 1, M or 1, L]: what `attention` takes for these queries, of all positions' [B or 1,
        1, L or 1, L]; None: position i looks at j <= i. Of x's type."""
        if hidden is None:
            place = torch.arange(x_BLF.shape[1], device=x_BLF.device)
            later = place > self.column.unsqueeze(-1)
            return x_BLF.new_zeros(()).masked_fill(later, -torch.inf).unsqueeze(1)
        if hidden.shape[2] == 1:
            return hidden
        rows = hidden.expand(len(x_BLF), -1, -1, -1).squeeze(1)
        return self.of(rows).unsqueeze(1)

    def flat(self, x_BMF: torch.Tensor) -> torch.Tensor:
        """[N, F]: without what fills the rows up."""
        return x_BMF.flatten(0, 1).index_select(0, self.at)
