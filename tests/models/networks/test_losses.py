"""Losses: equal to the obvious formulas, in value and in gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from models.networks.losses import (
    Added,
    Classes,
    full_cross_entropy,
    gbce,
    rank_loss,
    sampled_softmax,
    session_cross_entropy,
)
from tests.support.device import DEVICE

tensor, arange = (partial(make, device=DEVICE) for make in (torch.tensor, torch.arange))
SETS = [[0], [3, 10], [1, 2, 5], [4], [10], [0, 9], [6]]
START = tensor([0, 1, 3, 6, 7, 8, 10, 11])
CLASSES = tensor([c for s in SETS for c in s])


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    h, w, b = (
        torch.randn(*s, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for s in ((7, 4), (11, 4), (11,))
    )
    return h, w, b


@pytest.mark.parametrize("chunk", [4_000_000, 30])
def test_the_loss_is_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "models.networks.losses.CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), chunk)
    )
    h, w, b = given()
    got = full_cross_entropy(h, w, b, START, CLASSES)
    log_p = torch.log_softmax(h @ w.T + b, dim=1)
    want = torch.stack([-log_p[i, s].mean() for i, s in enumerate(SETS)]).mean()
    assert torch.allclose(got, want)
    mine = torch.autograd.grad(3 * got, (h, w, b))
    theirs = torch.autograd.grad(3 * want, (h, w, b))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("chunk", [4_000_000, 30])
def test_what_is_right_is_no_negative_of_what_else_is_right(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "models.networks.losses.CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), chunk)
    )
    h, w, b = given()
    got = session_cross_entropy(h, w, b, START, CLASSES)
    s = h @ w.T + b
    want = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for n, right in enumerate(SETS):
        wrong = torch.stack([s[n, c].exp() for c in range(11) if c not in right]).sum()
        for p in right:
            want = want - torch.log(s[n, p].exp() / (s[n, p].exp() + wrong)) / len(right) / 7
    assert torch.allclose(got, want)
    mine = torch.autograd.grad(3 * got, (h, w, b))
    theirs = torch.autograd.grad(3 * want, (h, w, b))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other)


def test_with_one_label_a_position_it_is_cross_entropy() -> None:
    h, w, b = given()
    start, label = arange(8), tensor([3, 0, 10, 5, 5, 1, 7])
    for loss in (full_cross_entropy, session_cross_entropy):
        want = torch.nn.functional.cross_entropy(h @ w.T + b, label)
        assert torch.allclose(loss(h, w, b, start, label), want)


def test_a_session_of_all_items_teaches_nothing_and_breaks_nothing() -> None:
    h, w, b = given()
    start, label = tensor([0, 11, *range(12, 18)]), tensor([*range(11), *range(6)])
    loss = session_cross_entropy(h, w, b, start, label)
    gradients = torch.autograd.grad(loss, (h, w, b))
    assert torch.isfinite(loss) and all(torch.isfinite(one).all() for one in gradients)
    assert (gradients[0][0] == 0).all() and (gradients[0][1:] != 0).any()
    alone = session_cross_entropy(h[1:], w, b, start[1:] - 11, label[11:])
    assert torch.allclose(loss, alone * 6 / 7)


def test_rank_loss_is_the_mean_over_pairs_of_right_and_shown_in_vain() -> None:
    h, w, b = given()
    shown = [[4, 5], [], [0], [], [1, 2, 3], [5], []]
    start = tensor([0, *tensor([len(one) for one in shown]).cumsum(0).tolist()])
    got = rank_loss(
        h, Classes.whole(w, b), START, CLASSES, start, tensor([c for s in shown for c in s])
    )
    s = h @ w.T + b
    want = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for n, (right, vain) in enumerate(zip(SETS, shown, strict=True)):
        for p in right:
            for i in vain:
                want = want + torch.log(1 + torch.exp(s[n, i] - s[n, p])) / (len(right) * len(vain))
    assert torch.allclose(got, want / 7)
    mine = torch.autograd.grad(got, (h, w, b))
    theirs = torch.autograd.grad(want / 7, (h, w, b))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other)


def test_sampling_everything_once_is_the_full_softmax_without_the_other_labels() -> None:
    h, w, b = given()
    everything = arange(11)
    got = sampled_softmax(
        h, Classes.whole(w, b), START, CLASSES, everything, torch.full((11,), 1 / 11, device=DEVICE)
    )
    s = h @ w.T + b
    want = torch.stack(
        [
            torch.stack(
                [
                    torch.logsumexp(s[i, [c for c in range(11) if c == one or c not in many]], 0)
                    - s[i, one]
                    for one in many
                ]
            ).mean()
            for i, many in enumerate(SETS)
        ]
    ).mean()
    assert torch.allclose(got, want)


def test_the_estimate_of_log_q_has_no_bias_where_items_are_drawn_unevenly() -> None:
    """exp of what is softplus'd estimates the sum over the catalogue without the label."""
    h, w, b = given()
    q = torch.softmax(torch.linspace(0, 2, 11, device=DEVICE), 0).double()
    drawn = torch.multinomial(q, 200_000, replacement=True)
    start, label = tensor([0, 1]), tensor([3])
    got = sampled_softmax(h[:1], Classes.whole(w, b), start, label, drawn, q[drawn])
    want = full_cross_entropy(h[:1], w, b, start, label)
    assert got.item() == pytest.approx(want.item(), rel=0.01)
    plain = sampled_softmax(
        h[:1],
        Classes.whole(w, b),
        start,
        label,
        drawn,
        torch.full((200_000,), 1 / 11, device=DEVICE),
    )
    assert abs(plain.item() - want.item()) > 0.05


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_is_its_formula(t: float) -> None:
    h, w, b = given()
    drawn = tensor([2, 7, 8, 1])
    got = gbce(
        h, Classes.whole(w, b), START, CLASSES, drawn, 9, t
    )  # of eleven classes, two are no item
    a = 4 / 8
    beta = a * (t * (1 - 1 / a) + 1 / a)
    s = h @ w.T + b
    terms = []
    for i, many in enumerate(SETS):
        negatives = [int(n) for n in drawn if int(n) not in many]
        against = torch.log(1 - torch.sigmoid(s[i, negatives])).sum()
        each = [-(beta * torch.log(torch.sigmoid(s[i, p])) + against) / 5 for p in many]
        terms.append(torch.stack(each).mean())
    assert torch.allclose(got, torch.stack(terms).mean())


DRAWN = tensor([2, 7, 8, 1, 2, 3])
SHOWN = tensor([4, 5, 0, 1, 2, 3, 5])
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "full": full_cross_entropy,
    "sessions": session_cross_entropy,
    "sampled": lambda h, w, b, *given, **added: sampled_softmax(
        h, Classes.whole(w, b), *given, DRAWN, torch.full((6,), 1 / 11, device=DEVICE), **added
    ),
    "gbce": lambda h, w, b, *given, **added: gbce(
        h, Classes.whole(w, b), *given, DRAWN, 9, 0.75, **added
    ),
    "rank": lambda h, w, b, *given, **added: rank_loss(
        h, Classes.whole(w, b), *given, tensor([0, 2, 2, 3, 3, 6, 7, 7]), SHOWN, **added
    ),
}


@pytest.mark.parametrize("chunk", [4_000_000, 30])
@pytest.mark.parametrize("name", list(LOSSES))
def test_what_is_added_to_single_logits_is_as_if_the_model_had_said_it(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loss of a wider model whose further columns are the additions, and its gradients."""
    monkeypatch.setattr(
        "models.networks.losses.CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), chunk)
    )
    h, w, b = given()
    row, cls = torch.nonzero(torch.rand(7, 11, device=DEVICE) < 0.4, as_tuple=True)
    kept = row != 3  # a row without additions
    row, cls = row[kept], cls[kept]
    value = torch.randn(len(row), dtype=h.dtype, device=DEVICE, requires_grad=True)
    got = LOSSES[name](h, w, b, START, CLASSES, added=Added(row, cls, value, row.cpu().numpy()))
    cells = torch.zeros(11, 7, dtype=h.dtype, device=DEVICE).index_put((cls, row), value)
    wide = torch.cat([h, torch.eye(7, dtype=h.dtype, device=DEVICE)], 1), torch.cat([w, cells], 1)
    want = LOSSES[name](*wide, b, START, CLASSES)
    assert torch.allclose(got, want)
    assert not torch.allclose(got, LOSSES[name](h, w, b, START, CLASSES), rtol=1e-3)
    mine = torch.autograd.grad(3 * got, (h, w, b, value))
    theirs = torch.autograd.grad(3 * want, (h, w, b, value))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other)
    nothing = Added(row[:0], cls[:0], value[:0], row[:0].cpu().numpy())
    assert torch.allclose(
        LOSSES[name](h, w, b, START, CLASSES, added=nothing),
        LOSSES[name](h, w, b, START, CLASSES),
    )
