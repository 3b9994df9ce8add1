"""How methods are sized and trained: the settings, and the presets that fill them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from models.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is. Stored beside its weights; enough to build it again."""

    dim: int = 64  # D
    heads: int = 2
    layers: int = 2
    max_len: int = 128  # L, in tokens
    dropout: float = 0.1
    attention_dropout: float = 0.0
    positions: str = (
        "from_newest"  # of transformers; from_oldest: later tokens move none before them
    )
    tied: bool = True  # score by the item table itself, else an output layer D -> V+1
    reference: bool = False  # the reference's net to the last parameter (presets paper_a_*)
    segments: int = 5  # S_max of +sse
    sse_index: str = "from_oldest"  # or from_newest
    time_features: int = 16  # T of +tsa
    tsa_time: str = "float64"  # or raw_float32
    time_origin_us: int = 0  # epoch of the phase of +tsa: the first training event
    request_time: str = "last_event"  # or known: may the model know when it is asked?
    repeat_policy: str = "allow"  # or exclude_seen
    recent_days: float = 7.0  # of recent_pop
    neighbours: int = 100  # items of item_knn, sessions of vsknn
    pooling: str = "mean"  # of sessionrec: or attention, transformer
    feedback: bool = True  # of sessionrec: may history say what became of an item?
    exposures: int = 20  # of sessionrec, +fb: items shown in vain, a session, at most

    side: bool = True  # of sessionrec: may it see what a catalogue says of items?
    side_dim: int = 16  # of a category's embedding
    categories: tuple[int, ...] = ()  # how many values each has, 0 (unknown) counted; from the data
    numbers: int = 0  # how many numbers an item has; from the data

    @property
    def table_std(self) -> float:
        """How far embeddings start from 0: the reference leaves PyTorch's 1 as it is [code]."""
        return 1.0 if self.reference else 0.02


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. AdamW; betas .9, .999."""

    target: str = "next_item"  # or next_session
    loss: str = "auto"  # full, sampled or gbce; auto: full up to losses.FULL_ITEMS items
    negatives: int = 256  # drawn once a step for all positions: sampled, gbce
    alpha: float = 0.0  # of sessionrec: share of the rank loss
    gbce_t: float = 0.75  # calibration of gbce: 0 is plain, 1 fully corrected
    epochs: int = 20
    patience: int = 3  # epochs without a better validation NDCG@10, after the warm-up
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: str = "cosine"  # or constant
    clip_norm: float = 1.0  # 0: no clipping
    mask_share: float = 0.2  # cloze
    item_noise: float = 0.0  # causal: share of input items replaced at random
    all_windows: bool = True  # learn from a user's whole history, not only the newest L tokens
    precision: str = "auto"  # of training: float32, bfloat16; auto: train.precision
    data_share: float = 1.0  # of the training users, by a hash of their id; the vocabulary stays
    # At most so many, drawn once, decide about stopping; 0: the last epoch's weights are kept.
    validation_targets: int = 4000
    seed: int = 0


COUNTS = {  # at least
    "dim": 1, "heads": 1, "layers": 1, "max_len": 1, "segments": 1, "time_features": 1,
    "neighbours": 1, "side_dim": 1, "epochs": 1, "patience": 1, "batch_size": 1, "negatives": 1,
    "validation_targets": 0, "exposures": 0, "seed": 0,
}  # fmt: skip
RANGES = {  # from, to, and whether the two belong to it
    "dropout": (0, 1, True, False), "attention_dropout": (0, 1, True, False),
    "item_noise": (0, 1, True, False), "mask_share": (0, 1, False, True),
    "data_share": (0, 1, False, True), "gbce_t": (0, 1, True, True),
    "learning_rate": (0, math.inf, False, False), "recent_days": (0, math.inf, False, False),
    "weight_decay": (0, math.inf, True, False), "clip_norm": (0, math.inf, True, False),
    "alpha": (0, math.inf, True, False),
}  # fmt: skip
MOST = 1_000_000  # of what sizes a tensor: what is larger is a slip, and torch's error says little
SIZES = ("dim", "heads", "layers", "max_len", "segments", "time_features", "side_dim", "negatives")
OPTION_OF = {"max_len": "--length"}


def check_sizes(config: ModelConfig | TrainConfig) -> None:
    """Raises:
    UserError: a number is out of its range; named as the option that sets it.
    """
    for name, value in vars(config).items():
        option = OPTION_OF.get(name, "--" + name.replace("_", "-"))
        if name in COUNTS:
            least, most = COUNTS[name], MOST if name in SIZES else 2**63 - 1
            if not least <= value <= most:
                raise UserError(f"{option} {value}: a whole number, {least} to {most:,}")
        if name in RANGES:
            low, high, from_low, to_high = RANGES[name]
            if not (
                low < value < high or (from_low and value == low) or (to_high and value == high)
            ):
                ends = f"{'from' if from_low else 'above'} {low}"
                ends += (
                    f" {'to' if to_high else 'to below'} {high}" if high < math.inf else ", finite"
                )
                raise UserError(f"{option} {value}: a number {ends}")


@dataclass(frozen=True, kw_only=True)
class Config:
    method: str
    preset: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        model = dict(values["model"])
        model["categories"] = tuple(model.get("categories", ()))  # JSON has lists only
        return Config(
            method=values["method"],
            preset=values["preset"],
            model=ModelConfig(**model),
            train=TrainConfig(**values["train"]),
        )


def small(base: str) -> tuple[ModelConfig, TrainConfig]:
    """One core, well under a minute of training on a fifth of a million events [ours].

    Short windows and small batches: many steps count more than long histories at this size.
    """
    model = ModelConfig(dim=64, layers=1, max_len=64, dropout=0.1)
    if base.startswith("sessionrec-"):
        # A position is a session: as many steps ask for shorter rows and more, cheaper epochs.
        rate = 4e-3 if base.endswith("gru4rec") else 2e-3
        return replace(model, max_len=16), TrainConfig(
            epochs=12, patience=2, batch_size=32, learning_rate=rate
        )
    rate = 8e-3 if base == "gru4rec" else 4e-3  # twice that spoils the transformers
    return model, TrainConfig(
        epochs=6, patience=2, batch_size=32, learning_rate=rate, mask_share=0.4
    )


def tiny(base: str) -> tuple[ModelConfig, TrainConfig]:
    """For tests: seconds on a few hundred users."""
    model = ModelConfig(dim=32, layers=1, max_len=24, dropout=0.0, segments=3, time_features=8)
    return model, TrainConfig(epochs=25, patience=25, learning_rate=1e-2, batch_size=32)


def _paper_a(
    *, max_len: int, heads: int, mask: float, batch: int, epochs: int, segments: int, times: int
) -> tuple[ModelConfig, TrainConfig]:
    model = ModelConfig(
        dim=256, heads=heads, layers=4, max_len=max_len, dropout=0.2, attention_dropout=0.2,
        tied=False, reference=True, segments=segments, sse_index="from_newest",
        time_features=times, request_time="known",
    )  # fmt: skip
    train = TrainConfig(
        epochs=epochs, patience=epochs // 2, batch_size=batch, learning_rate=1e-3,
        weight_decay=0.05, schedule="constant", clip_norm=0.0, mask_share=mask, item_noise=0.02,
        all_windows=False,
    )  # fmt: skip
    return model, train


def paper_a_ml1m(base: str) -> tuple[ModelConfig, TrainConfig]:
    """Paper A's settings for ML-1M [code]."""
    return _paper_a(max_len=200, heads=2, mask=0.2, batch=128, epochs=800, segments=3, times=16)


def paper_a_ml20m(base: str) -> tuple[ModelConfig, TrainConfig]:
    """Paper A's settings for ML-20M [code]."""
    return _paper_a(max_len=100, heads=4, mask=0.2, batch=256, epochs=400, segments=5, times=64)


def paper_a_steam(base: str) -> tuple[ModelConfig, TrainConfig]:
    """Paper A's settings for Steam [code]."""
    return _paper_a(max_len=15, heads=2, mask=0.15, batch=2048, epochs=800, segments=5, times=32)


PRESETS: dict[str, Callable[[str], tuple[ModelConfig, TrainConfig]]] = {
    f.__name__: f for f in (small, tiny, paper_a_ml1m, paper_a_ml20m, paper_a_steam)
}
PRESET_ITEMS = {"paper_a_ml1m": 3328, "paper_a_steam": 4332}
