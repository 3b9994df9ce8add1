"""What is minimised: full cross-entropy over the catalogue, or an estimate from sampled items.

B x L x V logits never exist: hidden states are taken at the N label positions, and the gradients
of one chunk of the full loss are computed while its logits are there (so they are made once and
kept nowhere). Hidden states in bfloat16 have their logits, softmax and gradients in bfloat16 too:
what is summed over many positions is summed in float32. The sampled losses draw K items for all
positions at once [ours]; a position's own labels among them are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.core.rows import Ints

FULL_ITEMS = 50_000  # the largest catalogue that `auto` scores in full
# Logits of one chunk: on a CPU 8 MB in float32, which stay in its cache; a GPU wants few and large ones.
CHUNK_LOGITS = {"cpu": 2_000_000, "cuda": 100_000_000}


@dataclass(frozen=True)
class Classes:
    """C classes, of which a loss reads some: `of` int64[n] gives weights [n, D] and biases [n]."""

    number: int
    of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @staticmethod
    def whole(weight_CD: torch.Tensor, bias_C: torch.Tensor) -> Classes:
        return Classes(len(weight_CD), lambda cls: (weight_CD[cls], bias_C[cls]))


@dataclass(frozen=True)
class Added:
    """What is added to single logits, P of them: row int64[P] (rising), cls int64[P], value
    float[P]; no (row, cls) twice. It costs what it has, however many classes there are. host_row:
    `row` on the host."""

    row: torch.Tensor
    cls: torch.Tensor
    value: torch.Tensor
    host_row: Ints

    def at(self, row: torch.Tensor, cls: torch.Tensor, classes: int) -> torch.Tensor:
        """float[M]: of the logits (row, cls), 0 where nothing is added."""
        if not len(self.row):
            return self.value.new_zeros(len(row))
        key, place = torch.sort(self.row * classes + self.cls)
        wanted = row * classes + cls
        found = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
        return self.value[place[found]] * (key[found] == wanted)

    def among(self, drawn_K: torch.Tensor, num: int) -> torch.Tensor:
        """float[num, K]: of the logits of all rows and the classes `drawn_K`."""
        # A class drawn twice has one column, its first; what was not drawn goes to a column beyond.
        order, place = torch.sort(drawn_K, stable=True)
        beyond = len(order)
        at = torch.searchsorted(order, self.cls).clamp(max=beyond - 1)
        column = torch.where(order[at] == self.cls, place[at], beyond)
        none = self.value.new_zeros(num, beyond + 1)
        found = none.index_put((self.row, column), self.value)
        return found.index_select(1, place[torch.searchsorted(order, drawn_K)])


def _together(
    logits: torch.Tensor, at: torch.Tensor, cls: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of labels `cls` of rows `at`, weighed by `share`, in a softmax over all classes;
    and its gradient by the logits."""
    error = torch.softmax(logits, dim=1)
    picked = error[at, cls].to(share.dtype).clamp(min=torch.finfo(share.dtype).tiny)
    error.index_put_((at, cls), -share.to(error.dtype), accumulate=True)
    return -(picked.log() * share).sum(), error


def _apart(
    logits: torch.Tensor, at: torch.Tensor, cls: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, each label in a softmax of its own: itself and what is no label of its row."""
    picked = logits[at, cls].to(share.dtype)
    logits[at, cls] = -torch.inf
    others = torch.logsumexp(logits.to(share.dtype), dim=1)
    wrong = torch.sigmoid(others[at] - picked) * share
    total = torch.zeros_like(others).index_add_(0, at, wrong)
    # Where every class is a label there is nothing to distinguish: softmax has no answer.
    error = torch.softmax(logits, dim=1).nan_to_num(0.0) * total.to(logits.dtype).unsqueeze(1)
    error[at, cls] = -wrong.to(error.dtype)
    return (torch.nn.functional.softplus(others[at] - picked) * share).sum(), error


class _FullCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor,
        label_start: torch.Tensor,
        label_class: torch.Tensor,
        edges: Ints,
        apart: bool,
        value_P: torch.Tensor | None,
        added: Added | None,
    ) -> torch.Tensor:
        num, classes = h_ND.shape[0], weight_CD.shape[0]
        step = max(1, CHUNK_LOGITS[h_ND.device.type] // classes)
        row, share = _rows(label_start, len(label_class), weight_CD.dtype)
        loss = weight_CD.new_zeros(())
        grad_h = torch.empty_like(h_ND)
        grad_w, grad_b = torch.zeros_like(weight_CD), torch.zeros_like(bias_C)
        weight, bias = weight_CD.to(h_ND.dtype), bias_C.to(h_ND.dtype)
        cells, bounds = _cells(added, step, num, classes)
        grad_value = None if value_P is None else torch.empty_like(value_P)
        for begin in range(0, num, step):
            end = min(begin + step, num)
            low, high = int(edges[begin]), int(edges[end])
            at, cls = row[low:high] - begin, label_class[low:high]
            h = h_ND[begin:end]
            of_chunk = _apart if apart else _together
            logits = torch.addmm(bias, h, weight.T)
            here = slice(bounds[begin // step], bounds[begin // step + 1])
            places = cells[here] - begin * classes
            if value_P is not None:
                logits.view(-1).index_add_(0, places, value_P[here].to(logits.dtype))
            its, error = of_chunk(logits, at, cls, share[low:high])
            if grad_value is not None:
                grad_value[here] = error.view(-1).index_select(0, places).to(grad_value.dtype)
            loss += its
            torch.mm(error, weight, out=grad_h[begin:end])
            grad_w += error.T @ h
            grad_b += error.sum(0, dtype=grad_b.dtype)
        found = () if grad_value is None else (grad_value / num,)
        ctx.save_for_backward(grad_h / num, grad_w / num, grad_b / num, *found)
        return loss / num

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_h, grad_w, grad_b, *found = (grads[0] * one for one in ctx.saved_tensors)
        value = found[0] if found else None
        return grad_h, grad_w, grad_b, None, None, None, None, value, None


def _cells(
    added: Added | None, step: int, num: int, classes: int
) -> tuple[torch.Tensor, list[int]]:
    """Places in the logits of all rows, and where those of each chunk of `step` rows begin."""
    if added is None:
        return torch.zeros(0, dtype=torch.long), [0] * (-(-num // step) + 1)
    edges = np.minimum(np.arange(0, num + step, step), num)
    bounds: list[int] = np.searchsorted(added.host_row, edges).tolist()
    return added.row * classes + added.cls, bounds


def _rows(
    label_start: torch.Tensor, labels: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of M labels their positions int64[M], and their shares of these [M]."""
    count = label_start[1:] - label_start[:-1]
    row = torch.arange(len(count), device=count.device)
    row = torch.repeat_interleave(row, count, output_size=labels)
    return row, (1.0 / count.to(dtype))[row]


def on_host(label_start: torch.Tensor) -> Ints:
    """Where labels begin, as numbers; a GPU waits for it, so batches bring theirs along."""
    return label_start.cpu().numpy()


def full_cross_entropy(
    h_ND: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor,
    label_start: torch.Tensor,
    label_class: torch.Tensor,
    added: Added | None = None,
    edges: Ints | None = None,
) -> torch.Tensor:
    """Mean over N positions of the mean over a position's labels of -log softmax.

    label_start int64[N+1], label_class int64[M]: position n has the classes
    label_class[label_start[n]:label_start[n+1]] (one for next item, a set for next session).
    edges: `label_start` on the host.
    """
    edges = on_host(label_start) if edges is None else edges
    result: torch.Tensor = _FullCrossEntropy.apply(  # type: ignore[no-untyped-call]
        h_ND, weight_CD, bias_C, label_start, label_class, edges, False, _value(added), added
    )
    return result


def _value(added: Added | None) -> torch.Tensor | None:
    return None if added is None else added.value


def _meet(
    h_ND: torch.Tensor,
    classes: Classes,
    label_start: torch.Tensor,
    label_class: torch.Tensor,
    drawn_K: torch.Tensor,
    added: Added | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of M labels: position [M], share of its position [M], logit [M]. Logits of the drawn [N, K],
    -inf where a position's own label was drawn."""
    num = h_ND.shape[0]
    (label_weight, label_bias), (weight, bias) = classes.of(label_class), classes.of(drawn_K)
    h_ND = h_ND.to(weight.dtype)
    row, share = _rows(label_start, len(label_class), h_ND.dtype)
    picked = (h_ND[row] * label_weight).sum(-1) + label_bias
    drawn = torch.addmm(bias, h_ND, weight.T)
    if added is not None:
        picked = picked + added.at(row, label_class, classes.number)
        drawn = drawn + added.among(drawn_K, num)
    own = (label_class[:, None] == drawn_K[None, :]).to(h_ND.dtype)
    own = torch.zeros_like(drawn).index_add_(0, row, own) > 0
    return row, share, picked, drawn.masked_fill(own, -torch.inf)


def sampled_softmax(
    h_ND: torch.Tensor,
    classes: Classes,
    label_start: torch.Tensor,
    label_class: torch.Tensor,
    drawn_K: torch.Tensor,
    probability_K: torch.Tensor,
    added: Added | None = None,
) -> torch.Tensor:
    """Softmax of each label against items drawn with `probability_K`, with replacement.

    Log-Q: each drawn logit is lowered by log(K q), so that their sum estimates the catalogue's
    (Bengio & Senecal 2008); the label itself is there for certain and keeps its logit. Means as in
    `full_cross_entropy`; other labels of a position are never among its negatives.
    """
    row, share, picked, drawn = _meet(h_ND, classes, label_start, label_class, drawn_K, added)
    others = torch.logsumexp(drawn - (len(drawn_K) * probability_K).log(), dim=1)
    loss = torch.nn.functional.softplus(others[row] - picked)
    return (loss * share).sum() / h_ND.shape[0]


def gbce(
    h_ND: torch.Tensor,
    classes: Classes,
    label_start: torch.Tensor,
    label_class: torch.Tensor,
    drawn_K: torch.Tensor,
    num_items: int,
    t: float,
    added: Added | None = None,
) -> torch.Tensor:
    """Generalised binary cross-entropy with items drawn uniformly (gSASRec, RecSys 2023).

    -(beta log sig(s+) + sum log(1 - sig(s-))) / (K + 1), a = K / (V - 1),
    beta = a (t (1 - 1/a) + 1/a). V is `num_items`: classes that are no item (padding) are not drawn.
    """
    row, share, picked, drawn = _meet(h_ND, classes, label_start, label_class, drawn_K, added)
    size = len(drawn_K)
    rate = size / max(1, num_items - 1)
    beta = rate * (t * (1 - 1 / rate) + 1 / rate)
    against = torch.nn.functional.softplus(drawn).sum(1)
    loss = beta * torch.nn.functional.softplus(-picked) + against[row]
    return (loss * share).sum() / h_ND.shape[0] / (size + 1)


def session_cross_entropy(
    h_ND: torch.Tensor,
    weight_CD: torch.Tensor,
    bias_C: torch.Tensor,
    label_start: torch.Tensor,
    label_class: torch.Tensor,
    added: Added | None = None,
    edges: Ints | None = None,
) -> torch.Tensor:
    """`full_cross_entropy`, but a position's other labels are not among a label's negatives.

    Mean over positions of the mean over labels p of -log(e^p / (e^p + sum over what is no label of
    e^n)): paper B's retrieval loss with the whole catalogue as its sample. Equal to
    `full_cross_entropy` where positions have one label; 0 where every class is a label.
    """
    edges = on_host(label_start) if edges is None else edges
    result: torch.Tensor = _FullCrossEntropy.apply(  # type: ignore[no-untyped-call]
        h_ND, weight_CD, bias_C, label_start, label_class, edges, True, _value(added), added
    )
    return result


def rank_loss(
    h_ND: torch.Tensor,
    classes: Classes,
    label_start: torch.Tensor,
    label_class: torch.Tensor,
    ignored_start: torch.Tensor,
    ignored_class: torch.Tensor,
    added: Added | None = None,
    num_pairs: int | None = None,
) -> torch.Tensor:
    """Mean over N positions of 1/(|P||I|) sum log(1 + exp(q.i - q.p)), p right, i shown but not chosen.

    A position where nothing was shown but not chosen counts 0 [ours: so parts of a batch, and processes,
    add up to the whole]. num_pairs: how many (p, i) there are; None: they are counted, and a GPU
    waits for it.
    """
    num, device = h_ND.shape[0], h_ND.device
    row = torch.arange(num, device=device)

    def logits(start: torch.Tensor, cls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        of = torch.repeat_interleave(row, start[1:] - start[:-1], output_size=len(cls))
        weight, bias = classes.of(cls)
        found = (h_ND[of].to(weight.dtype) * weight).sum(-1) + bias
        if added is not None:
            found = found + added.at(of, cls, classes.number)
        return of, found

    of, right = logits(label_start, label_class)
    _, shown = logits(ignored_start, ignored_class)
    against = (ignored_start[1:] - ignored_start[:-1])[of]  # of each label
    left = torch.arange(len(of), device=device)
    left = torch.repeat_interleave(left, against, output_size=num_pairs)
    first = torch.cumsum(against, 0) - against
    other = torch.arange(len(left), device=device) - first[left] + ignored_start[of[left]]
    each = torch.nn.functional.softplus(shown[other] - right[left])
    pairs = (label_start[1:] - label_start[:-1])[of] * against
    return (each / pairs[left].to(each.dtype)).sum() / num
