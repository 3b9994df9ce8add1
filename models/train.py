"""Train one method on the training rows, and stop when validation stops improving.

AdamW. Deterministic on CPU: weights, masks, windows and order follow from the seed. A model is
chosen by NDCG@10 (full ranking) on the validation period and is **not** trained again on it: one
training run a method, and every method's vocabulary and weights end at the same validation cut.
The histories it is asked about at test time do contain the validation period.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from models.baselines import Popularity
from models.batch import Batch, Rows, Target, label_cloze, label_next, pad, take, windows
from models.dataset import Sequences, cache_folder, open_sequences, read_items
from models.errors import UserError
from models.evaluate import evaluate
from models.losses import FULL_ITEMS, full_cross_entropy, gbce, sampled_softmax
from models.methods import Recommender, build
from models.presets import Config, TrainConfig
from models.splits import (
    SPLITS,
    VALIDATION,
    Cut,
    Events,
    Filters,
    Targets,
    Training,
    periods,
    targets,
    temporal_cut,
    training_rows,
)

Say = Callable[[str], None]
SELECT_BY = "ndcg@10"


@dataclass(frozen=True)
class Data:
    """One source at one table version, cut: what every method of a comparison shares."""

    sequences: Sequences
    events: Events
    cut: Cut
    period: np.ndarray
    training: Training
    item_ids: list[str]  # of vocabulary 1..V


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


def peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


def load_data(
    *,
    lake: str,
    source: str,
    filters: Filters,
    version: int | None = None,
    split: str = "temporal",
    valid_from: int | None = None,
    test_from: int | None = None,
) -> Data:
    """Read gold.sequences at a version (None: the newest), cut, filter, make the vocabulary."""
    from jobs.tables import ITEMS, SEQUENCES

    make = f"python -m jobs run --source {source}"
    path = SEQUENCES.path(lake, source)
    sequences = open_sequences(path, version, cache_folder(lake, source), make)
    events = Events.of(sequences)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if split == "temporal":
        cut = temporal_cut(events.ts, valid_from, test_from)
    elif valid_from is not None or test_from is not None:
        raise UserError(f"--valid-from and --test-from pin the temporal split, not {split}")
    else:
        cut = Cut(split=split)
    period = periods(events, cut)
    training = training_rows(events, period, filters)
    index, names = read_items(ITEMS.path(lake, source), make)
    by_index = dict(zip(index.tolist(), names, strict=True))
    missing = [i for i in training.vocabulary.tolist() if i not in by_index]
    if missing:
        raise UserError(
            f"{len(missing)} items of gold.sequences version {sequences.version} are not in "
            f"gold.items (item_index {missing[0]} is the first): run `{make}` again"
        )
    item_ids = [by_index[i] for i in training.vocabulary.tolist()]
    return Data(sequences, events, cut, period, training, item_ids)


def batches(model: Recommender, rows: Rows, config: Config, epoch: int) -> Iterator[Batch]:
    """One epoch. Windows of similar length go together; order and masks follow from the seed."""
    train, size = config.train, config.model.max_len
    rng = np.random.default_rng([train.seed, epoch])
    shift = rng.integers(0, size, len(rows.start) - 1) if train.all_windows else None
    cost = 1 + model.extra_tokens(rows.opens)
    begin, end = windows(rows, size, cost, shift)
    order = rng.permutation(len(begin))
    group = train.batch_size * 8
    for low in range(0, len(order), group):
        part = order[low : low + group]
        order[low : low + group] = part[np.argsort((end - begin)[part], kind="stable")]
    firsts = rng.permutation(np.arange(0, len(order), train.batch_size))
    target = cast(Target, train.target)
    for first in firsts:
        at = order[first : first + train.batch_size]
        tokens = take(rows, begin[at], end[at], model.num_items, target)
        if model.cloze:
            newest = config.model.request_time == "last_event"
            tokens = label_cloze(tokens, target, rng, train.mask_share, newest)
        else:
            tokens = label_next(tokens, rows, target)
            if train.item_noise:
                noisy = rng.random(len(tokens.token)) < train.item_noise
                other = rng.integers(1, model.num_items + 1, len(tokens.token))
                tokens = replace(tokens, token=np.where(noisy, other, tokens.token))
        for encoding in model.all_encodings():
            tokens = encoding.layout(tokens, causal=not model.cloze)
        batch = pad(tokens, size, rows, target)
        if len(batch.label_at):
            yield batch


def batch_loss(model: Recommender, batch: Batch, train: TrainConfig) -> torch.Tensor:
    h = model(batch)
    h_ND = h.reshape(-1, h.shape[-1]).index_select(0, batch.label_at)
    label = batch.label_item - model.first_class
    given = (h_ND, *model.classes(), batch.label_start, label)
    kind = train.loss
    if kind == "auto":
        kind = "full" if model.num_items <= FULL_ITEMS else "sampled"
    if kind == "full":
        return full_cross_entropy(*given)
    if kind == "sampled":
        item = torch.multinomial(model.share, train.negatives, replacement=True)
        return sampled_softmax(*given, item + 1 - model.first_class, model.share[item])
    item = torch.randint(model.num_items, (train.negatives,), device=h.device)
    return gbce(*given, item + 1 - model.first_class, train.gbce_t)


def _sample(asked: Targets, most: int) -> Targets:
    if len(asked.user) <= most:
        return asked
    drawn = np.random.default_rng(0).choice(len(asked.user), most, replace=False)
    return asked.select(np.sort(drawn))


def fit(config: Config, data: Data, say: Say = print, device: str = "cpu") -> Fitted:
    """Train a method. Baselines are counted, not trained."""
    train = config.train
    torch.manual_seed(train.seed)
    num_items = len(data.training.vocabulary)
    asked = targets(
        data.events, data.period, VALIDATION, data.training.vocabulary, cast(Target, train.target)
    )
    validation = _sample(asked, train.validation_targets)
    model = build(num_items, config)
    model.fit(data.training.rows)
    policy = config.model.repeat_policy
    if isinstance(model, Popularity):
        value = evaluate(model, validation, (10,), policy).mean(SELECT_BY)
        return Fitted(model, validation=value)
    return _fit(model.to(device), config, data.training.rows, validation, say, device)


def _fit(
    model: Recommender, config: Config, rows: Rows, validation: Targets, say: Say, device: str
) -> Fitted:
    train = config.train
    began, trained_s, seen = time.perf_counter(), 0.0, 0
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay, fused=True
    )
    done = Fitted(model, curves={"loss": [], f"validation_{SELECT_BY}": [], "epoch_s": []})
    best, state = -math.inf, model.state_dict()
    step, steps = 0, 0
    for epoch in range(1, train.epochs + 1):
        start, said, total, count = time.perf_counter(), time.perf_counter(), 0.0, 0
        model.train()
        here = list(batches(model, rows, config, epoch))
        if not here:
            raise UserError(
                f"nothing to learn from: no training row of {len(rows.item)} events has a label "
                f"for target {train.target}; a next session needs users with two sessions"
            )
        steps = max(steps, len(here) * train.epochs)
        for number, batch in enumerate(here, 1):
            step += 1
            rate = _rate(train.schedule, step, steps) * train.learning_rate
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = batch.to(device)
            loss = batch_loss(model, batch, train)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if train.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
            optimiser.step()
            total, count = total + float(loss.detach()), count + 1
            seen += int((batch.token > 0).sum())
            if time.perf_counter() - said > 5:
                said = time.perf_counter()
                say(f"epoch {epoch}: batch {number}/{len(here)}, loss {total / count:.3f}")
        epoch_s = time.perf_counter() - start
        trained_s += epoch_s
        value = evaluate(model, validation, (10,), config.model.repeat_policy).mean(SELECT_BY)
        done.curves["loss"].append(total / count)
        done.curves[f"validation_{SELECT_BY}"].append(value)
        done.curves["epoch_s"].append(epoch_s)
        done.epochs = epoch
        left = (time.perf_counter() - began) / epoch * (train.epochs - epoch)
        say(
            f"epoch {epoch}/{train.epochs}: loss {total / count:.4f}, validation {SELECT_BY} "
            f"{value:.4f}, {seen / trained_s:,.0f} events/s, at most {left:.0f} s left"
        )
        if value > best or math.isnan(value):
            best, done.best_epoch = value, epoch
            state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        elif epoch - done.best_epoch >= train.patience:
            say(f"no better validation {SELECT_BY} for {train.patience} epochs: stopping")
            break
    model.load_state_dict(state)
    model.to("cpu").eval()
    done.validation = best
    done.seconds = time.perf_counter() - began
    done.events_per_second = seen / trained_s
    return done


def _rate(schedule: str, step: int, steps: int) -> float:
    """Share of the learning rate at a step: 5 % warm-up, then a cosine to a twentieth."""
    if schedule == "constant":
        return 1.0
    warm = max(1, steps // 20)
    if step < warm:
        return step / warm
    done = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def code_version() -> str | None:
    """The git commit of this code, with `+changes` if files differ from it; None outside git."""
    import subprocess

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *args],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
