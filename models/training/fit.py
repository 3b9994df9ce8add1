"""Train one method on the training rows, and stop when validation stops improving.

AdamW. Deterministic on one kind of CPU: weights, masks, windows and order follow from the seed,
also where a killed training continues from a checkpoint. A model's epoch is chosen by NDCG@10 (full
ranking) on the validation period. Every method's vocabulary and weights end at the same cut: where
the validation period begins, or, with `train_until = "test"`, where the test period begins. Then a
method is trained a second time, from scratch, with the validation period among its training rows,
for as many epochs as were best the first time and by the same schedule.
The histories that a model is evaluated on at test time contain the validation period either way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from models.core.config import Config
from models.core.environment import Say
from models.core.errors import UserError
from models.core.process_group import ALONE, Team
from models.core.rows import Rows, Target
from models.data.load import Data
from models.data.splits import (
    VALIDATION,
    Targets,
    targets,
)
from models.evaluation.evaluate import evaluate
from models.networks.baselines import Popularity
from models.networks.methods import build
from models.networks.recommender import Recommender
from models.training.checkpoints import Checkpoints, Tensors
from models.training.epoch import Epoch, Parts
from models.training.sides import sizes_of

SELECT_BY = "ndcg@10"
WARM_UP = 0.05  # ours: of the epochs
READ_EVERY = (
    50  # ours: steps on a GPU after which their losses are read, and a checkpoint may be due
)
BF16_DIM = 128  # ours: narrower models gain nothing by bfloat16


@dataclass
class Fitted:
    """A trained model, its curves (name -> one value an epoch) and what it cost."""

    model: Recommender | Popularity
    epochs: int = 0
    best_epoch: int = 0
    validation: float = math.nan
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    events_per_second: float = 0.0
    precision: str | None = None  # what layers computed in; None: nothing was trained


def precision(config: Config, device: str) -> str:
    """`auto`: bfloat16 where the processor multiplies it faster and the backbone gains by it."""
    if config.train.precision != "auto":
        return config.train.precision
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities()
        fast = bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return "bfloat16" if fast and config.model.dim >= BF16_DIM else "float32"


def _sample(asked: Targets, most: int) -> Targets:
    if len(asked.user) <= most:
        return asked
    drawn = np.random.default_rng(0).choice(len(asked.user), most, replace=False)
    return asked.select(np.sort(drawn))


def fit(
    config: Config,
    data: Data,
    say: Say = print,
    device: str = "cpu",
    keep: Checkpoints | None = None,
    team: Team = ALONE,
    each_epoch: Callable[[int, dict[str, list[float]]], None] | None = None,
) -> Fitted:
    """Train a method. Baselines are counted, not trained.

    With `keep`, continue from its newest checkpoint, and write more. `each_epoch` gets the number
    of the epoch that ended, and all curves so far.
    """
    train = config.train
    torch.manual_seed(train.seed)
    first = data if data.selection is None else data.selection
    asked = targets(
        first.events,
        first.period,
        VALIDATION,
        first.training.vocabulary,
        cast(Target, train.target),
    )
    validation = _sample(asked, train.validation_targets)
    if train.validation_targets and not len(validation.user):
        say(
            "the validation period has no target of a user with a history: nothing says which epoch "
            "is best, and the last is taken. Under --split temporal, move the cut with --valid-from and --test-from"
        )
    started = _started(config, first, say, device, keep, team)
    if isinstance(started, Popularity):
        policy = config.model.repeat_policy
        value = evaluate(started, validation, (10,), policy, team).mean(SELECT_BY)
        last = started if first is data else _built(config, data)
        return Fitted(last, validation=value)
    chosen = _fit(started, train.epochs, validation, say, keep, each_epoch)
    if first is data:
        return chosen
    started.keep_if_due(keep, now=True)  # what ends after this goes on with the second training
    return _again(chosen, config, data, say, device, keep, team)


def fit_for(
    config: Config,
    data: Data,
    epochs: int,
    say: Say = print,
    device: str = "cpu",
    keep: Checkpoints | None = None,
    team: Team = ALONE,
    begin: Callable[[Recommender], None] | None = None,
) -> Fitted:
    """So many epochs on all training rows, by the schedule of `config.train.epochs`; nothing is
    validated. Baselines are counted. `begin` is given the model before its first step."""
    started = _started(config, data, say, device, keep, team, begin)
    if isinstance(started, Popularity):
        return Fitted(started)
    return _fit(started, epochs, None, say, keep, None)


def _started(
    config: Config,
    data: Data,
    say: Say,
    device: str,
    keep: Checkpoints | None,
    team: Team,
    begin: Callable[[Recommender], None] | None = None,
) -> Run | Popularity:
    """A training where it begins, or where its newest checkpoint left it; or a counted baseline."""
    model = _built(config, data)
    if isinstance(model, Popularity):
        return model
    if begin is not None:
        begin(model)
    run = Run(model.to(device), config, data.training.rows, device, team)
    if keep is not None and (found := keep.newest(say)):
        run.restore(*found)
        say(f"going on from a checkpoint: epoch {run.at.epoch}, batch {run.at.batch}")
    return run


def _built(config: Config, data: Data) -> Recommender | Popularity:
    """A model before its training, with what is counted; a baseline is ready."""
    side = data.side
    model_config = replace(config.model, **sizes_of(side))
    torch.manual_seed(config.train.seed)
    model = build(len(data.training.vocabulary), replace(config, model=model_config))
    model.fit(data.training.rows)
    if isinstance(model, Recommender) and model.side is not None and side is not None:
        model.side.fill(side)
    return model


def _again(
    chosen: Fitted,
    config: Config,
    data: Data,
    say: Say,
    device: str,
    keep: Checkpoints | None,
    team: Team,
) -> Fitted:
    """The epochs that were best, on training rows that have the validation period."""
    say(
        f"training again for {chosen.best_epoch} epochs, with the validation period: "
        f"{len(data.training.rows.item):,} events, {len(data.item_ids):,} items"
    )
    if keep is not None:
        keep = Checkpoints(keep.folder / "again", keep.every_s)
    last = fit_for(config, data, chosen.best_epoch, say, device, keep, team)
    seconds = chosen.seconds + last.seconds
    seen = chosen.events_per_second * chosen.seconds + last.events_per_second * last.seconds
    return replace(
        chosen,
        model=last.model,
        curves=chosen.curves | {f"again_{name}": last.curves[name] for name in ("loss", "epoch_s")},
        seconds=seconds,
        events_per_second=seen / seconds,
    )


def _but(parameters: Iterable[torch.nn.Parameter], others: list[Any]) -> list[torch.nn.Parameter]:
    return [one for one in parameters if not any(one is other for other in others)]


@dataclass
class Place:
    """Where a training is, and what it has seen."""

    epoch: int = 1
    batch: int = 0  # of the epoch, done
    step: int = 0
    total: float = 0.0  # loss of the epoch's batches
    count: int = 0
    seen: int = 0  # tokens
    epoch_s: float = 0.0
    trained_s: float = 0.0
    elapsed_s: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    curves: dict[str, list[float]] = field(
        default_factory=lambda: {"loss": [], f"validation_{SELECT_BY}": [], "epoch_s": []}
    )


class Run:
    """All that changes while a model is trained; `tensors` and `at` are a checkpoint of it."""

    def __init__(
        self, model: Recommender, config: Config, rows: Rows, device: str, team: Team
    ) -> None:
        self.model, self.config, self.rows = model, config, rows
        self.device, self.team, self.at = device, team, Place()
        # Of the steps since `read`: batch and loss, which is on the device; tokens.
        self.unread: list[tuple[int, torch.Tensor]] = []
        self.unread_tokens = 0
        model.precision = precision(config, device)
        train = config.train
        first = model.learns_first()
        self.alone = min(train.habit_epochs, train.epochs - 1) if first else 0
        self.optimiser = torch.optim.AdamW(
            [
                {"params": _but(model.parameters(), first), "peak": train.learning_rate},
                {"params": first, "peak": train.habit_rate},
            ],
            weight_decay=train.weight_decay,
            fused=True,
        )
        apart = [one for e in model.all_encodings() for one in e.of_another_scale()]
        self.scales = [_but(model.parameters(), [*apart, *first]), *([one] for one in apart), first]
        self.best = self._weights()
        # Equal weights everywhere, unequal dropout; the first process is as if alone.
        torch.manual_seed(train.seed + team.rank)

    def _weights(self) -> Tensors:
        return {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def step(self, parts: Parts, share: float) -> None:
        """One step over the parts of a batch; `share` of all training is done after it.

        Nothing in it waits for the device: its loss stays there until `read`.
        """
        train = self.config.train
        for group in self.optimiser.param_groups:
            group["lr"] = _rate(train.schedule, share) * group["peak"]
        if not parts.labels:
            return
        self.optimiser.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in parts:
            mean = self.model.loss(part.to(self.device), train)
            its = mean * (len(part.label_at) / parts.labels)
            if its.requires_grad:  # (before the backbone joins in: where somebody has own items)
                its.backward()  # type: ignore[no-untyped-call]
            loss += its.detach()
        self.model.dense_gradients()
        self.team.total_gradients(self.model.parameters())
        if train.clip_norm:
            for scale in self.scales:
                torch.nn.utils.clip_grad_norm_(scale, train.clip_norm)
        self.optimiser.step()
        self.unread.append((self.at.batch + 1, loss))
        self.unread_tokens += sum(part.tokens for part in parts)
        self.at.step += 1

    def read(self) -> None:
        """The losses of the steps since the last time into `at`. All processes must ask together.

        Raises:
            UserError: one of them is not a number.
        """
        if not self.unread:
            return
        at, numbers = self.at, [number for number, _ in self.unread]
        there = torch.stack([loss for _, loss in self.unread]).cpu()
        tokens = torch.tensor([self.unread_tokens], dtype=torch.float64)
        *losses, seen = self.team.total(torch.cat([there, tokens])).tolist()
        self.unread, self.unread_tokens = [], 0
        for number, loss in zip(numbers, losses, strict=True):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss of batch {number} is {loss}")
            at.total += loss
        at.count, at.seen = at.count + len(losses), at.seen + int(seen)

    def _diverged(self, how: str) -> UserError:
        train = self.config.train
        return UserError(
            f"{self.config.method} cannot be trained with these settings: epoch {self.at.epoch}, {how}. Take a lower "
            f"--learning-rate than {train.learning_rate:g}, or --precision float32"
        )

    def validate(self, validation: Targets | None) -> float:
        """Score the validation period; remember the weights if they are the best so far. None: there
        is none, the newest weights are taken, and the score is NaN.

        Raises:
            UserError: some weight is not a number any more.
        """
        for name, weight in self.model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise self._diverged(f"{name} has values that are not numbers")
        policy = self.config.model.repeat_policy
        value = math.nan
        if validation is not None:
            value = evaluate(self.model, validation, (10,), policy, self.team).mean(SELECT_BY)
        if self.model.backbone_joins and (value > self.at.best or math.isnan(value)):
            self.at.best, self.at.best_epoch, self.best = value, self.at.epoch, self._weights()
        return value

    @property
    def tensors(self) -> Tensors:
        """Everything of a checkpoint but `at`. All processes must ask for it together."""
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"best.{k}": v for k, v in self.best.items()}
        for number, values in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser.{number}.{name}": v for name, v in values.items()}
        found["rng.cpu"] = self.team.each(torch.get_rng_state())
        if self.device.startswith("cuda"):
            found["rng.cuda"] = self.team.each(torch.cuda.get_rng_state(self.device))
        return found

    def restore(self, tensors: Tensors, values: dict[str, Any]) -> None:
        parts: dict[str, Tensors] = {"model": {}, "best": {}, "optimiser": {}, "rng": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        self.best = {k: v.to(self.device) for k, v in parts["best"].items()}
        state: dict[int, Tensors] = {}
        for name, value in parts["optimiser"].items():
            number, _, rest = name.partition(".")
            state.setdefault(int(number), {})[rest] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(parts["rng"]["cpu"][self.team.rank])
        if "cuda" in parts["rng"] and self.device.startswith("cuda"):
            torch.cuda.set_rng_state(parts["rng"]["cuda"][self.team.rank], self.device)
        self.at = Place(**values["at"])

    def keep_if_due(self, keep: Checkpoints | None, now: bool = False) -> None:
        """A checkpoint when one is due: the first process decides, all take part. Losses are read
        before it (`read`)."""
        due = torch.tensor([int(keep is not None and (now or keep.due))])
        if not int(self.team.each(due)[0]):
            return
        tensors = self.tensors
        if keep is not None and self.team.is_main_process:
            keep.write(self.at.step, tensors, {"at": asdict(self.at)})
        elif keep is not None:
            keep.written = time.monotonic()


def _fit(
    run: Run,
    epochs: int,
    validation: Targets | None,
    say: Say,
    keep: Checkpoints | None,
    each_epoch: Callable[[int, dict[str, list[float]]], None] | None,
) -> Fitted:
    train, at, model = run.config.train, run.at, run.model
    began = time.perf_counter() - at.elapsed_s
    while at.epoch <= epochs:
        # While the learning rate still rises, no better score says little: that is not waiting.
        since = max(at.best_epoch, warming(train.schedule, train.epochs), run.alone)
        waits = validation is not None and at.epoch > 1
        if waits and at.epoch - 1 - since >= train.patience:
            say(f"no better validation {SELECT_BY} for {train.patience} epochs: stopping")
            break
        model.join(at.epoch > run.alone)
        _learn(run, began, say, keep)
        value = run.validate(validation)
        at.trained_s += at.epoch_s
        at.elapsed_s = time.perf_counter() - began
        for name, one in zip(at.curves, (at.total / at.count, value, at.epoch_s), strict=True):
            at.curves[name].append(one)
        left = at.elapsed_s / at.epoch * (epochs - at.epoch)
        scored = "" if validation is None else f" validation {SELECT_BY} {value:.4f},"
        say(
            f"epoch {at.epoch}/{epochs}: loss {at.total / at.count:.4f},{scored} "
            f"{at.seen / at.trained_s:,.0f} events/s, at most {left:.0f} s left"
        )
        done = at.epoch
        at.epoch, at.batch, at.total, at.count, at.epoch_s = done + 1, 0, 0.0, 0, 0.0
        run.keep_if_due(keep)
        if each_epoch:
            each_epoch(done, at.curves)
    model.load_state_dict(run.best)
    model.to("cpu").eval()
    return Fitted(
        model,
        epochs=at.epoch - 1,
        best_epoch=at.best_epoch,
        validation=at.best,
        curves=at.curves,
        seconds=at.elapsed_s,
        events_per_second=at.seen / at.trained_s if at.trained_s else 0.0,
        precision=model.precision,
    )


def _learn(run: Run, began: float, say: Say, keep: Checkpoints | None) -> None:
    """The steps that are left of the epoch; `began`, of all training, counts earlier runs' time.

    Raises:
        UserError: no row of the epoch has a label.
    """
    train, at = run.config.train, run.at
    epoch = Epoch(run.model, run.rows, run.config, at.epoch, run.team, run.device)
    run.model.train()
    every = 1 if epoch.kind == "cpu" or (keep is not None and not keep.every_s) else READ_EVERY
    start, said, earlier_s = time.perf_counter(), time.perf_counter(), at.epoch_s
    for number, parts in epoch.after(at.batch):
        run.step(parts, (at.epoch - 1 + (number + 1) / len(epoch)) / train.epochs)
        at.batch = number + 1
        if at.batch % every and at.batch < len(epoch):
            continue
        run.read()
        now = time.perf_counter()
        at.epoch_s, at.elapsed_s = earlier_s + now - start, now - began
        if now - said > 5 and at.count:
            said = now
            say(f"epoch {at.epoch}: batch {at.batch}/{len(epoch)}, loss {at.total / at.count:.3f}")
        run.keep_if_due(keep)
    if not at.count:
        raise UserError(
            f"nothing to learn from: no training row of {len(run.rows.item)} events has a "
            f"label for target {train.target}. {_why(run.rows, train.target)}"
        )


def _why(rows: Rows, target: str) -> str:
    """What is missing where no event has a label."""
    if not rows.positive.any():
        return "None of them is positive: look at [feedback] in the source file"
    if target == "next_session":
        return (
            "A next session needs a user whose second session, or a later one, has a positive event"
        )
    return "A next item needs a user whose second event, or a later one, is positive"


def _rate(schedule: str, share: float) -> float:
    """Share of the learning rate when `share` of the epochs are done: 5 % warm-up, then a cosine
    to a twentieth."""
    if schedule == "constant":
        return 1.0
    if share < WARM_UP:
        return share / WARM_UP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def warming(schedule: str, epochs: int) -> int:
    """The whole epochs during which the learning rate rises."""
    return 0 if schedule == "constant" else int(WARM_UP * epochs)
