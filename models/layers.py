"""What several backbones are built of: dropout and attention, cheap where there is no GPU.

Dropout's random numbers, one float an element, are a tenth of the time of training a transformer on
a CPU, and more the more of the rest is bfloat16. Here an element takes one random byte.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

BYTE = 256


class _ByteDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: int) -> torch.Tensor:
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
        words.random_(-(2**63), None)
        drawn = words.view(torch.uint8)[: x.numel()].view(x.shape)
        ctx.scale = BYTE / (BYTE - dropped)
        keep = drawn >= dropped
        ctx.save_for_backward(keep)
        kept: torch.Tensor = x * keep * ctx.scale
        return kept

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return grads[0] * keep * ctx.scale, None


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


def attention(
    q_BHMF: torch.Tensor,
    k_BHLF: torch.Tensor,
    v_BHLE: torch.Tensor,
    mask: torch.Tensor,
    p: float,
) -> torch.Tensor:
    """Softmax attention scaled by 1/sqrt(F), with dropout p on its weights: [B, H, M, E].

    Values narrower than keys are filled up with zeros: PyTorch's fused kernels want one width. With dropout the weights are made: fused kernels on CPUs have none.
    """
    scale = q_BHMF.shape[-1] ** -0.5
    if p == 0 or q_BHMF.device.type != "cpu":
        width = v_BHLE.shape[-1]
        v_BHLE = functional.pad(v_BHLE, (0, k_BHLF.shape[-1] - width))
        h = functional.scaled_dot_product_attention(
            q_BHMF, k_BHLF, v_BHLE, attn_mask=mask, dropout_p=p, scale=scale
        )
        return h[..., :width]
    logits = (q_BHMF * scale) @ k_BHLF.transpose(-1, -2)
    weight = torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)
    return dropout(weight, p, True) @ v_BHLE
