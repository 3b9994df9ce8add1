"""Full cross-entropy over the catalogue, only where there is a label, in chunks.

B x L x V logits never exist: hidden states are taken at the N label positions, and the gradients
of one chunk are computed while its logits are there (so they are made once and kept nowhere).
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_LOGITS = 4_000_000  # logits of one chunk: 16 MB in float32


class _FullCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor,
        label_start: torch.Tensor,
        label_class: torch.Tensor,
    ) -> torch.Tensor:
        num, classes = h_ND.shape[0], weight_CD.shape[0]
        step = max(1, CHUNK_LOGITS // classes)
        count = label_start[1:] - label_start[:-1]
        row = torch.repeat_interleave(torch.arange(num, device=h_ND.device), count)
        share = (1.0 / count.to(h_ND.dtype))[row]
        loss = h_ND.new_zeros(())
        grad_h, grad_w = torch.empty_like(h_ND), torch.zeros_like(weight_CD)
        grad_b = torch.zeros_like(bias_C)
        for begin in range(0, num, step):
            end = min(begin + step, num)
            low, high = int(label_start[begin]), int(label_start[end])
            at, cls = row[low:high] - begin, label_class[low:high]
            h = h_ND[begin:end]
            logits = torch.addmm(bias_C, h, weight_CD.T)
            picked = (logits[at, cls] * share[low:high]).sum()
            total = torch.logsumexp(logits, dim=1)
            loss += total.sum() - picked
            error = logits.sub_(total[:, None]).exp_()
            error.index_put_((at, cls), -share[low:high], accumulate=True)
            torch.mm(error, weight_CD, out=grad_h[begin:end])
            grad_w.addmm_(error.T, h)
            grad_b += error.sum(0)
        ctx.save_for_backward(grad_h / num, grad_w / num, grad_b / num)
        return loss / num

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_h, grad_w, grad_b = ctx.saved_tensors
        return grads[0] * grad_h, grads[0] * grad_w, grads[0] * grad_b, None, None


def full_cross_entropy(
    h_ND: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor,
    label_start: torch.Tensor,
    label_class: torch.Tensor,
) -> torch.Tensor:
    """Mean over N positions of the mean over a position's labels of -log softmax.

    label_start int64[N+1], label_class int64[M]: position n has the classes
    label_class[label_start[n]:label_start[n+1]] (one for next item, a set for next session).
    """
    result: torch.Tensor = _FullCrossEntropy.apply(  # type: ignore[no-untyped-call]
        h_ND, weight_CD, bias_C, label_start, label_class
    )
    return result
