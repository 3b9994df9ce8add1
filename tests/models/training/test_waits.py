"""No step waits for its device, and what is done ahead of it or after it changes nothing.

A GPU works through what it was given while Python prepares the next kernels. Whatever asks for a
value on the host, or has a size that only the data know, makes Python wait until it is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.core.config import Config
from models.core.errors import UserError
from models.core.on_device import OnDevice
from models.core.process_group import ALONE
from models.core.rows import Rows
from models.networks import hstu
from models.networks.methods import (
    BACKBONES,
    ENCODINGS,
    SESSION_ENCODERS,
    config,
    recommender,
)
from models.networks.pooling import POOLINGS
from models.networks.recommender import Recommender
from models.training import epoch as epochs
from models.training.epoch import Epoch, Parts
from models.training.fit import Run
from tests.models.networks.test_sessionrec import random_rows

V = 12
aten = torch.ops.aten
# On a GPU these copy to the host, or wait to know how large their result is.
WAITING: set[Any] = {
    aten._local_scalar_dense, aten.nonzero, aten.bincount, aten.masked_select, aten._unique,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.equal, aten.histc,
    aten.is_nonzero, aten.multinomial,
}  # fmt: skip
TO_HOST = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}


class Waits(Exception):
    pass


class NoWait(TorchDispatchMode):
    """Operations that would make Python wait for a GPU raise, forwards and backwards."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = kwargs or {}
        if func.overloadpacket in WAITING:
            raise Waits(str(func))
        if func is aten.repeat_interleave.Tensor and told.get("output_size") is None:
            raise Waits("repeat_interleave without output_size")
        places = args[1] if func.overloadpacket in INDEXING else ()
        if any(one is not None and one.dtype == torch.bool for one in places):
            raise Waits(f"{func} by a mask")
        return func(*args, **told)


INDEXING: set[Any] = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class NoHost(TorchFunctionMode):
    """Values asked for on the host raise, also where a CPU needs no copy for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in TO_HOST:
            raise Waits(func.__name__)
        return func(*args, **(kwargs or {}))


def chosen_of(method: str, **how: Any) -> Config:
    sessions = method.startswith("sessionrec")
    usual = {"layers": 2, "negatives": 5, "habit_epochs": 0, "batch_size": 16, "dropout": 0.1}
    if sessions:
        usual |= {"target": "next_session", "alpha": 0.3}
    chosen = config(method, "tiny", **usual | how)
    if "side" in method or (sessions and chosen.model.side):
        model = replace(chosen.model, categories=(3,), numbers=1)
        chosen = replace(chosen, model=model)
    return chosen


def rows_of() -> Rows:
    rows = random_rows(3, users=24)
    return replace(rows, item=np.minimum(rows.item, V - 1))  # the last item was never seen


def every_method() -> Iterator[tuple[str, dict[str, Any]]]:
    for base in BACKBONES:
        yield from ((f"{base}+{name}", {}) for name in ENCODINGS)
        for names, loss in itertools.product(("", "+" + "+".join(ENCODINGS)), LOSSES):
            yield base + names, {"loss": loss}
    yield "sasrec", {"positions": "from_oldest"}
    yield "bert4rec+st", {"target": "next_session", "request_time": "known"}
    for base, pooling in itertools.product(SESSION_ENCODERS, POOLINGS):
        yield f"{base}+sse+tsa+habit", {"pooling": pooling}
    for base, loss in itertools.product(SESSION_ENCODERS, LOSSES[1:]):
        yield f"{base}+habit", {"loss": loss}


LOSSES = ("full", "sampled", "gbce")
EVERY = list(every_method())


def started(chosen: Config, device: str = "cpu") -> Run:
    rows = rows_of()
    torch.manual_seed(0)
    model = recommender(V, chosen)
    model.fit(rows)
    model.train()
    return Run(model, chosen, rows, device, ALONE)


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """The ways that are taken on GPUs, on the CPU."""
    for module in ("layers", "transformer", "hstu"):
        patch.setattr(f"models.networks.{module}.on_gpu", lambda _: True)


@pytest.mark.parametrize(("method", "how"), EVERY, ids=str)
def test_no_step_waits(method: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr("models.networks.recommender.SPARSE_FROM", 1)  # (with sampled losses)
    chosen = chosen_of(method, **how)
    run = started(chosen)
    epoch = Epoch(run.model, run.rows, chosen, 1)
    assert len(epoch[0].parts)
    run.step(epoch[0], 0.5)  # (the optimiser makes its state)
    parts = epoch[1]
    with NoWait(), NoHost():
        run.step(parts, 0.5)
    run.read()
    assert run.at.step == run.at.count == 2 and 0 < run.at.total < np.inf


def test_what_waits_is_found() -> None:
    x, at = torch.arange(4), torch.tensor([True, False, True, True])
    with NoWait():
        for wait in (
            lambda: x.sum().item(), lambda: bool(at.any()), lambda: int(x.max()),
            lambda: x[at], lambda: x.clone().index_put_((at,), x[0]), lambda: torch.nonzero(at),
            lambda: torch.bincount(x), lambda: torch.unique(x), lambda: x.masked_select(at),
            lambda: torch.repeat_interleave(x, x), lambda: torch.equal(x, x),
        ):  # fmt: skip
            with pytest.raises(Waits):
                wait()
        torch.repeat_interleave(x, x, output_size=6)
    with NoHost():
        for told in (x.cpu, x.tolist, x.numpy, x[0].item, lambda: bool(x[0]), lambda: int(x[0])):
            with pytest.raises(Waits):
                told()


class Stub(torch.nn.Module):
    """In a GRU's place: that one asks the driver."""

    def __init__(self, wide: int, dim: int, batch_first: bool) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(wide, dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.layer(x), None


@pytest.mark.parametrize(("method", "how"), EVERY, ids=str)
def test_forwards_on_a_gpu_all_lies_there(
    method: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of a GPU that is not there, without values: shapes and devices are checked, and what
    needs a value raises. The ways that are taken on GPUs alone are among them."""
    monkeypatch.setattr(torch.nn, "GRU", Stub)
    chosen = chosen_of(method, **how)
    model = started(chosen).model
    rows = rows_of()
    ask = rows.start[:-1], rows.start[1:]
    parts, asked = Epoch(model, rows, chosen, 1, device="cuda")[0], model.request(rows, *ask)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def made(one: Any) -> Any:
            return one._each(made) if isinstance(one, OnDevice) else mode.from_tensor(one)

        with torch.device("cuda"):
            there = recommender(V, chosen)
        there.some_unseen = model.some_unseen
        for part in parts:
            loss_there = there.train().loss(made(part).to("cuda"), chosen.train)
            assert loss_there.device.type == "cuda" and loss_there.shape == ()
        request = made(asked).to("cuda")
        monkeypatch.setattr(type(there), "request", lambda *_: request)
        score = there.eval().score(rows, *ask)
    assert score.shape == (len(rows.start) - 1, V) and score.device.type == "cpu"


@pytest.mark.parametrize("loss", ["sampled", "gbce"])
@pytest.mark.parametrize(
    "method",
    ["sasrec+st", "hstu+fb+habit", "gru4rec+side", "bert4rec", "sessionrec-hstu+habit", "paper"],
)
def test_gradients_of_some_rows_are_those_of_the_whole_table(
    method: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large table's gradient has the rows that a step read, also where weights are untied."""
    how: dict[str, Any] = {"loss": loss, "dropout": 0.0}
    if method == "paper":
        chosen = config("bert4rec+st", "paper_a_steam", dim=8, layers=1, **how)
    else:
        chosen = chosen_of(method, **how)
    found = []
    for size in (10**9, 1):
        monkeypatch.setattr("models.networks.recommender.SPARSE_FROM", size)
        run = started(chosen)
        assert run.model.sparse == (size == 1)
        run.model.eval()
        batches = [part for n in (0, 1) for part in Epoch(run.model, run.rows, chosen, 1)[n]][:3]
        for part in batches:
            run.model.loss(part, chosen.train).backward()  # type: ignore[no-untyped-call]
        grad = run.model.item.weight.grad
        assert grad is not None and grad.is_sparse == (size == 1)
        run.model.dense_gradients()
        found.append({name: p.grad for name, p in run.model.named_parameters()})
        torch.manual_seed(0)
    assert (found[1]["item.weight"][0] == 0).all()
    for name, one in found[0].items():
        assert (one is None) == (found[1][name] is None)
        if one is not None:
            assert torch.allclose(one, found[1][name], rtol=1e-4, atol=1e-6), name


def weights(model: Recommender) -> list[torch.Tensor]:
    return [one.detach().clone() for one in model.parameters()]


def test_batches_made_ahead_are_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = chosen_of("bert4rec+st+fb+habit", batch_size=2)
    outcomes = []
    for threads in (0, 1, 3):
        monkeypatch.setitem(epochs.AHEAD, "cpu", threads)
        run = started(chosen)
        epoch = Epoch(run.model, run.rows, chosen, 1)
        assert len(epoch) > 8
        for done in (0, 5, len(epoch)):  # from the beginning, and from a checkpoint
            seen = []
            for number, parts in epoch.after(done):
                seen.append(number)
                run.step(parts, 0.5)
            assert seen == list(range(done, len(epoch)))
        run.read()
        outcomes.append((run.at.total, run.at.seen, weights(run.model)))
    for total, seen_tokens, learnt in outcomes[1:]:
        assert (total, seen_tokens) == outcomes[0][:2]
        assert all(map(torch.equal, learnt, outcomes[0][2]))


def test_a_batch_that_cannot_be_made_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(epochs.AHEAD, "cpu", 2)
    run = started(chosen_of("sasrec", batch_size=2))
    epoch = Epoch(run.model, run.rows, run.config, 1)

    def broken(self: Epoch, number: int) -> Parts:
        if number == 4:
            raise ValueError("batch 4")
        return Parts([], 0)

    monkeypatch.setattr(Epoch, "__getitem__", broken)
    seen = []
    with pytest.raises(ValueError, match="batch 4"):
        for number, _ in epoch.after(0):
            seen.append(number)
    assert seen == [0, 1, 2, 3]


def test_losses_are_the_same_whenever_they_are_read() -> None:
    chosen = chosen_of("sasrec+st", batch_size=4)
    totals = []
    for every in (1, 3, 100):
        run = started(chosen)
        epoch = Epoch(run.model, run.rows, chosen, 1)
        for number, parts in epoch.after(0):
            run.step(parts, 0.5)
            run.at.batch = number + 1
            if run.at.batch % every == 0:
                run.read()
        run.read()
        run.read()
        totals.append((run.at.total, run.at.count, run.at.seen))
    assert totals[0] == totals[1] == totals[2] and totals[0][1] == len(epoch)


def test_a_loss_that_is_no_number_is_named_by_its_batch_though_read_later() -> None:
    run = started(chosen_of("sasrec", batch_size=4))
    epoch = Epoch(run.model, run.rows, run.config, 1)
    for number, parts in epoch.after(0):
        if number == 2:
            with torch.no_grad():
                run.model.item.weight[1:] = torch.nan
        run.step(parts, 0.5)
        run.at.batch = number + 1
    with pytest.raises(UserError, match="the loss of batch 3 is nan"):
        run.read()


@pytest.mark.parametrize("how", [{}, {"positions": "from_oldest"}, {"attention_dropout": 0.0}])
@pytest.mark.parametrize("method", ["sasrec", "sasrec+st+tsa", "sessionrec-sasrec", "bert4rec+tsa"])
def test_a_fused_kernel_without_a_mask_is_the_same_attention(
    method: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs: padding moved behind the tokens, "causal" instead of a mask, widths of eights."""
    found = []
    for yes in (False, True):
        if yes:
            as_on_a_gpu(monkeypatch)
        # Heads of 6 + 5 = 11 wide: filled up to 16.
        chosen = chosen_of(method, dropout=0.0, dim=12, time_features=5, max_len=10, **how)
        run = started(chosen)
        rows = run.rows
        parts = Epoch(run.model, rows, chosen, 1)[0].parts
        assert any(bool(part.padding.any()) for part in parts)
        loss = sum(run.model.loss(part, chosen.train) for part in parts)
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        some = parts[0].label_at[::3]
        run.model.eval()
        with torch.no_grad():
            whole = run.model(parts[0])[~parts[0].padding]
            few = run.model.states(parts[0], some)
            score = run.model.score(rows, rows.start[:-1], rows.start[1:])
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        found.append([loss, whole, few, score, *gradients])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_gpus_way_to_sum_gradients_of_a_table_is_the_cpus() -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 9, (3, 4, 5))
    grad = torch.randn(3, 4, 5)
    want = torch.bincount(index.flatten(), grad.flatten(), minlength=11)
    assert torch.allclose(hstu.sums_by_row(index, grad, 11), want, atol=1e-6)


def test_deterministic_algorithms_change_nothing_on_a_cpu() -> None:
    from models.core.environment import use_deterministic

    outcomes = []
    for yes in (False, True):
        use_deterministic(yes)
        try:
            assert torch.are_deterministic_algorithms_enabled() == yes
            run = started(chosen_of("hstu+st+fb+habit", loss="sampled"))
            run.step(Epoch(run.model, run.rows, run.config, 1)[0], 0.5)
            outcomes.append(weights(run.model))
        finally:
            use_deterministic(False)
    assert all(map(torch.equal, *outcomes))


def test_trainings_of_one_machine_take_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from models.core import environment

    current: list[int] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes: list[dict[int, Any]] = [{}, {}, {}]  # what each of three keeps
    for mine, device in zip(processes, ("cuda:0", "cuda:1", "cuda:0"), strict=True):
        monkeypatch.setattr(environment, "_cards", mine)
        assert [environment.pick_device(name) for name in ("auto", "cuda")] == [device] * 2
    assert current == [0, 0, 1, 1, 0, 0]
    processes[1].pop(1).close()  # it ends
    monkeypatch.setattr(environment, "_cards", {})
    assert environment.pick_device("auto") == "cuda:1" and environment.pick_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun
    assert environment.pick_device("auto") == "cuda"
    for kept in (*processes, environment._cards):
        for file in kept.values():
            file.close()


@pytest.mark.parametrize(
    ("cards", "local", "device", "exchange", "backend"),
    [
        (2, 1, "cuda:1", "cuda:1", "nccl"),
        (1, 1, "cuda:0", "cpu", "gloo"),
        (0, 1, "cpu", "cpu", "gloo"),
    ],
)
def test_processes_exchange_by_nccl_where_each_has_a_gpu(
    cards: int,
    local: int,
    device: str,
    exchange: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from models.core import process_group

    for name, value in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, str(value))
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: None)
    monkeypatch.setattr(process_group.distributed, "init_process_group", asked.append)
    monkeypatch.setattr(process_group.distributed, "get_rank", lambda: local)
    monkeypatch.setattr(process_group.distributed, "get_world_size", lambda: 2)
    team, where = process_group.start("cuda" if cards else "cpu")
    assert (where, team.device, asked) == (device, exchange, [backend])
    assert (team.rank, team.size) == (1, 2)


def test_a_training_is_known_again_whether_it_was_deterministic_or_not() -> None:
    from models.training.options import asked_for, train_parser

    words = ["--source", "clicks", "--method", "hstu", "--epochs", "3"]
    plain, told = (train_parser().parse_args([*words, *more]) for more in ([], ["--deterministic"]))
    assert (plain.deterministic, told.deterministic) == (False, True)
    assert asked_for(plain) == asked_for(told) == '{"epochs": 3}'
