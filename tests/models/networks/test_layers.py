"""What makes training cheap changes nothing: dropout by bytes, batches in parts, chosen positions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.core.rows import Rows
from models.networks.layers import attention, dropout
from models.networks.losses import full_cross_entropy
from models.networks.methods import BACKBONES, config, recommender
from models.networks.narm import NARM
from models.training import epoch
from tests.models.networks.test_batch import HISTORY, USER, V, rows_of
from tests.support.device import DEVICE


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 500, requires_grad=True)
    y = dropout(x, 0.2, training=True)
    gone = (y == 0).float().mean().item()
    assert gone == pytest.approx(51 / 256, abs=0.005)
    assert y.mean().item() == pytest.approx(1, abs=0.005)
    kept = y[y > 0]
    assert torch.allclose(kept, torch.full_like(kept, 256 / 205))
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    assert dropout(x, 0.2, training=False) is x and dropout(x, 0.0, training=True) is x
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.2, training=True), y)
    # No element is alike its neighbour, in whichever byte of a word it stands.
    share = (y.detach().view(-1, 8) == 0).float().mean(0)
    assert share.min() > 0.18 and share.max() < 0.22


def test_attention_takes_values_narrower_than_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = ((2, 3, 4, 7), (2, 3, 5, 7), (2, 3, 5, 6))
    q, k, v = (torch.randn(*shape, device=DEVICE) for shape in shapes)
    mask = torch.rand(2, 1, 4, 5, device=DEVICE) < 0.7
    mask[..., 0] = True
    hidden = torch.zeros((), device=DEVICE).masked_fill(~mask, -torch.inf)
    want = torch.softmax(q @ k.transpose(-1, -2) / 7**0.5 + hidden, -1) @ v
    assert torch.allclose(attention(q, k, v, hidden, 0.0), want, atol=1e-6)
    monkeypatch.setattr("models.networks.layers.SHORT", 1)  # PyTorch's own kernel
    assert torch.allclose(attention(q, k, v, hidden, 0.0), want, atol=1e-6)
    # Dropout leaves the mean as it is.
    many = torch.stack([attention(q, k, v, hidden, 0.3) for _ in range(4000)]).mean(0)
    assert torch.allclose(many, want, atol=0.1)


@pytest.mark.parametrize("sums", [1, 3_000_000])
def test_narm_attends_as_its_formula_says(sums: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of four positions (ten: the last is of two) and in one, gradients included."""
    monkeypatch.setattr("models.networks.narm.CHUNK_SUMS", dict.fromkeys(("cpu", "cuda"), sums))
    torch.manual_seed(0)
    model = NARM(config("narm", "tiny", dim=6, layers=1, max_len=10, dropout=0.0).model)
    model.to(DEVICE)
    x = torch.randn(2, 10, 6, device=DEVICE)
    padding = torch.zeros(2, 10, dtype=torch.bool, device=DEVICE)
    padding[1, :3] = True
    batch = SimpleNamespace(padding=padding)
    got = model(x, batch)  # type: ignore[arg-type]

    h = model.gru(x, batch)  # type: ignore[arg-type]
    rows = []
    for b in range(2):
        for t in range(10):
            c = torch.zeros(6, device=DEVICE)
            for j in range(t + 1):
                if not padding[b, j]:
                    both = model.query.weight @ h[b, t] + model.key.weight @ h[b, j]
                    c = c + model.energy @ torch.sigmoid(both) * h[b, j]
            rows.append(model.out.weight @ torch.cat([h[b, t], c]))
    want = torch.stack(rows).view(2, 10, 6)
    assert torch.allclose(got, want, atol=1e-6)
    weights = list(model.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), weights) for y in (got, want))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encodings", ["", "+st+sse+tsa"])
@pytest.mark.parametrize("base", list(BACKBONES))
def test_chosen_positions_are_those_of_the_whole(base: str, encodings: str) -> None:
    torch.manual_seed(0)
    model = recommender(V, config(base + encodings, "tiny", dim=8, layers=2, max_len=12)).eval()
    model.to(DEVICE)
    rows = rows_of(HISTORY, [*USER, (5, 900, 3), (1, 901, 3)], USER[:1])
    batch = model.request(rows, rows.start[:-1], rows.start[1:]).to(DEVICE)
    many, length = batch.token.shape
    with torch.no_grad():
        whole = model(batch).flatten(0, 1)
        last = torch.arange(1, many + 1, device=DEVICE) * length - 1
        some = torch.tensor([length - 1, length - 2, 2 * length - 1], device=DEVICE)
        for at in (last, last[[2, 0]], some):
            assert torch.allclose(model.states(batch, at), whole[at], atol=1e-5)


def long_rows(users: int = 40) -> Rows:
    rng = np.random.default_rng(1)
    made = []
    for size in rng.integers(2, 60, users):
        ordinal = np.cumsum(rng.random(size) < 0.3) + 1
        items = rng.integers(1, V + 1, size)
        made.append(
            [(int(i), 10 * t, int(o)) for t, (i, o) in enumerate(zip(items, ordinal, strict=True))]
        )
    return rows_of(*made)


@pytest.mark.parametrize("method", ["sasrec+st", "bert4rec+tsa", "gru4rec", "hstu+sse"])
def test_parts_of_a_batch_are_the_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row once, padding bounded, and the gradients of the parts sum to the batch's."""
    rows = long_rows()
    chosen = config(method, "tiny", batch_size=64, dropout=0.0, max_len=48, all_windows=False)
    torch.manual_seed(0)
    model = recommender(V, chosen).to(DEVICE)
    gradients = []
    for budget, part in ((10**9, 10**9), (300, 100)):
        monkeypatch.setattr("models.networks.batch.PART", part)
        monkeypatch.setitem(epoch.PART_TOKENS, "cpu", budget)
        parts = epoch.Epoch(model, rows, chosen, 1)[0]
        assert (len(parts) > 5) == (budget == 300)
        labels = sum(len(one.label_at) for one in parts)
        for one in parts:
            assert one.token.numel() <= budget
            mean = model.loss(one.to(DEVICE), chosen.train) * (len(one.label_at) / labels)
            mean.backward()  # type: ignore[no-untyped-call]
        gradients.append([labels, *[p.grad for p in model.parameters()]])
        model.zero_grad(set_to_none=True)
    assert gradients[0][0] == gradients[1][0]
    for whole, summed in zip(*(g[1:] for g in gradients), strict=True):
        if whole is None or summed is None:
            assert whole is summed
        else:
            assert torch.allclose(whole, summed, atol=1e-6)


def test_the_loss_in_bfloat16_is_nearly_the_loss() -> None:
    torch.manual_seed(0)
    h, w, b = (torch.randn(*shape, device=DEVICE) for shape in ((300, 32), (500, 32), (500,)))
    w *= 0.2
    label = torch.randint(500, (300,), device=DEVICE)
    start = torch.arange(301, device=DEVICE)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = [
            h.to(dtype).requires_grad_(),
            w.clone().requires_grad_(),
            b.clone().requires_grad_(),
        ]
        loss = full_cross_entropy(*given, start, label)
        found.append((loss.item(), *torch.autograd.grad(loss, given)))
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-3)
    for exact, near in zip(found[0][1:], found[1][1:], strict=True):
        assert (exact - near.float()).norm() < 0.01 * exact.norm()
    assert found[1][2].dtype == torch.float32  # what is summed over positions
