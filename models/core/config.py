"""How methods are sized and trained: the settings, and the presets that fill them in.

Decision 14 in docs/design/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from models.core.knobs import MOST, Tune, knob


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is. Stored beside its weights; enough to build it again."""

    dim: int = knob(64, "width D of embeddings and layers", low=1, high=MOST)
    heads: int = knob(2, "attention heads; they divide D", low=1)
    layers: int = knob(2, "blocks of a transformer, layers of a GRU", low=1, high=MOST)
    max_len: int = knob(
        128,
        "tokens of the history that the model reads; sessionrec: sessions",
        low=1,
        high=MOST,
        option="--length",
        tune=Tune(low=0.5, high=2, log=True, around=True),
    )
    dropout: float = knob(
        0.1,
        "dropout of embeddings and layers",
        low=0,
        high=1,
        open_high=True,
        tune=Tune(low=0, high=0.5),
    )
    attention_dropout: float = knob(
        0.0, "dropout of attention weights", low=0, high=1, open_high=True, hidden=True
    )
    positions: str = knob(
        "from_newest",
        "transformers: which end positions are counted from; under from_oldest later tokens do not "
        "change earlier positions",
        choices=("from_newest", "from_oldest"),
    )
    tied: bool = knob(
        True, "scores by the item embeddings; otherwise by an output layer", hidden=True
    )
    reference: bool = knob(
        False, "the reference's network to the last parameter (presets paper_a_*)", hidden=True
    )
    segments: int = knob(
        5,
        "+sse: S_max, the number of session segments",
        low=1,
        high=MOST,
        tune=Tune(low=2, high=16, log=True, of=("+sse",)),
    )
    sse_index: str = knob(
        "from_oldest",
        "+sse: which end sessions are counted from; bert4rec: from_newest unless given",
        choices=("from_oldest", "from_newest"),
    )
    time_features: int = knob(
        16,
        "+tsa: T, the number of time features",
        low=1,
        high=MOST,
        tune=Tune(low=4, high=64, log=True, of=("+tsa",)),
    )
    tsa_time: str = knob(
        "float64",
        "+tsa: precision of times; raw_float32 reproduces the reference",
        choices=("float64", "raw_float32"),
    )
    time_origin_us: int = knob(
        0,
        "+tsa: start of the phase, microseconds since 1970: the first training event",
        hidden=True,
    )
    request_time: str = knob(
        "last_event",
        "known: the model knows the time of the request, and whether it opens a session",
        choices=("last_event", "known"),
    )
    repeat_policy: str = knob(
        "allow",
        "exclude_seen: items of the user's history are never listed",
        choices=("allow", "exclude_seen"),
    )
    recent_days: float = knob(
        7.0,
        "days that recent_pop counts",
        low=0,
        open_low=True,
        hidden=True,
        tune=Tune(low=0.5, high=60, log=True, of=("recent_pop",)),
    )
    neighbours: int = knob(
        100,
        "similar items that item_knn keeps, sessions that vsknn keeps",
        low=1,
        hidden=True,
        tune=Tune(low=10, high=1000, log=True, of=("item_knn", "vsknn")),
    )
    tifu_neighbours: int = knob(
        300,
        "tifu_knn: similar users that are averaged",
        low=1,
        tune=Tune(low=30, high=1000, log=True, of=("tifu_knn",)),
    )
    tifu_groups: int = knob(
        7,
        "tifu_knn: m, groups that a user's baskets are put into",
        low=1,
        tune=Tune(low=1, high=30, log=True, of=("tifu_knn",)),
    )
    tifu_within_decay: float = knob(
        0.9,
        "tifu_knn: r_b, what a basket counts against the next one",
        low=0,
        high=1,
        open_low=True,
        tune=Tune(low=0.5, high=1, of=("tifu_knn",)),
    )
    tifu_group_decay: float = knob(
        0.7,
        "tifu_knn: r_g, what a group counts against the next one",
        low=0,
        high=1,
        open_low=True,
        tune=Tune(low=0.3, high=1, of=("tifu_knn",)),
    )
    tifu_alpha: float = knob(
        0.7,
        "tifu_knn: weight of the user's own baskets; the rest is the neighbours'",
        low=0,
        high=1,
        tune=Tune(low=0, high=1, of=("tifu_knn",)),
    )
    up_cf_recent: int = knob(
        10,
        "up_cf: r, the newest baskets of a user that are counted; 0: all",
        low=0,
        tune=Tune(low=1, high=100, log=True, of=("up_cf",)),
    )
    up_cf_locality: float = knob(
        10.0,
        "up_cf: q, the power of users' similarity",
        low=0,
        open_low=True,
        tune=Tune(low=1, high=100, log=True, of=("up_cf",)),
    )
    up_cf_asymmetry: float = knob(
        0.75,
        "up_cf: alpha, the share of the asking user's size in the similarity",
        low=0,
        high=1,
        tune=Tune(low=0, high=1, of=("up_cf",)),
    )
    up_cf_neighbours: int = knob(
        100,
        "up_cf: similar users that are summed",
        low=1,
        tune=Tune(low=10, high=1000, log=True, of=("up_cf",)),
    )
    pooling: str = knob(
        "mean",
        "sessionrec: how a session's items become one vector",
        choices=("mean", "attention", "transformer"),
    )
    feedback: bool = knob(True, "sessionrec: whether feedback on past items is read")
    exposures: int = knob(
        20,
        "sessionrec and +fb: items shown but not chosen that are read, per session, at most; "
        "exposures that are events of the log are bounded in sessionrec only",
        low=0,
        tune=Tune(low=0.25, high=4, log=True, around=True, of=("sessionrec", "+fb")),
    )
    habit_events: int = knob(
        48,
        "+habit: newest events of the history whose items it adds to, at most; next_session and "
        "sessionrec: 1024 unless given",
        low=1,
        high=MOST,
        tune=Tune(low=0.25, high=4, log=True, around=True, of=("+habit",)),
    )
    side: bool = knob(True, "sessionrec: whether the catalogue's attributes are read")
    side_dim: int = knob(
        16, "sessionrec: width of a category's embedding", low=1, high=MOST, hidden=True
    )
    categories: tuple[int, ...] = ()  # how many values each has, 0 (unknown) counted; from the data
    numbers: int = 0  # how many numbers an item has; from the data
    texts: int = 0  # how many texts; from the data

    @property
    def table_std(self) -> float:
        """How far embeddings start from 0: the reference leaves PyTorch's 1 as it is [code]."""
        return 1.0 if self.reference else 0.02


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. AdamW; betas .9, .999."""

    target: str = knob(
        "next_item",
        "what is predicted; default: the source file's",
        choices=("next_item", "next_session"),
    )
    loss: str = knob(
        "auto",
        "full: cross-entropy over all items; sampled: softmax over drawn items; gbce: binary "
        "cross-entropy over drawn items; auto: full up to 50,000 items, then sampled",
        choices=("auto", "full", "sampled", "gbce"),
    )
    negatives: int = knob(256, "sampled, gbce: items drawn per step", low=1, high=MOST)
    alpha: float = knob(
        0.0,
        "sessionrec: weight of the rank loss",
        low=0,
        tune=Tune(low=0, high=0.2, of=("sessionrec",)),
    )
    gbce_t: float = knob(
        0.75, "gbce: calibration, from 0 (none) to 1 (full)", low=0, high=1, hidden=True
    )
    epochs: int = knob(20, "epochs, at most", low=1)
    patience: int = knob(
        3, "epochs without a better validation NDCG@10 before stopping, after the warm-up", low=1
    )
    batch_size: int = knob(
        64, "rows per step", low=1, tune=Tune(low=0.5, high=2, log=True, around=True)
    )
    learning_rate: float = knob(
        2e-3,
        "peak learning rate of AdamW",
        low=0,
        open_low=True,
        tune=Tune(low=3e-4, high=3e-2, log=True),
    )
    weight_decay: float = knob(
        0.01, "weight decay of AdamW", low=0, hidden=True, tune=Tune(low=1e-4, high=0.3, log=True)
    )
    habit_epochs: int = knob(
        2,
        "+habit: epochs in which its head and the items' biases learn alone, before the backbone "
        "joins in, to which one epoch at least is left",
        low=0,
    )
    habit_rate: float = knob(
        0.06,
        "+habit: peak learning rate of its head and of the items' biases",
        low=0,
        open_low=True,
    )
    schedule: str = knob(
        "cosine",
        "learning rate: cosine (5 % warm-up, then falling to a twentieth) or constant",
        choices=("cosine", "constant"),
        hidden=True,
    )
    clip_norm: float = knob(
        1.0, "gradients are scaled down to this norm; 0: never", low=0, hidden=True
    )
    mask_share: float = knob(
        0.2,
        "bert4rec: share of tokens that are masked",
        low=0,
        high=1,
        open_low=True,
        hidden=True,
        tune=Tune(low=0.1, high=0.7, of=("bert4rec",)),
    )
    item_noise: float = knob(
        0.0,
        "causal models: share of input items replaced by random ones",
        low=0,
        high=1,
        open_high=True,
        hidden=True,
    )
    all_windows: bool = knob(
        True, "learn from a user's whole history, not only the newest L tokens", hidden=True
    )
    precision: str = knob(
        "auto",
        "number format of layers; auto: bfloat16 where this machine gains by it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    data_share: float = knob(
        1.0,
        "share of the training users, chosen by a hash of their id; the vocabulary stays whole",
        low=0,
        high=1,
        open_low=True,
    )
    validation_targets: int = knob(
        4000,
        "validation targets that decide about stopping, at most; 0: keep the last epoch's weights",
        low=0,
        hidden=True,
    )
    seed: int = knob(
        0, "seed of weights, order, masks and noise; default: the source file's first", low=0
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    method: str
    preset: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def as_dict(self) -> dict[str, Any]:
        """What tells one training from another: settings of +habit are left out where it is not
        in the method, so that trainings of earlier versions are known again."""
        values = asdict(self)
        if "habit" not in self.method.split("+"):
            del values["model"]["habit_events"]
            del values["train"]["habit_epochs"], values["train"]["habit_rate"]
        return values

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
        dim=256,
        heads=heads,
        layers=4,
        max_len=max_len,
        dropout=0.2,
        attention_dropout=0.2,
        tied=False,
        reference=True,
        segments=segments,
        sse_index="from_newest",
        time_features=times,
        request_time="known",
    )
    train = TrainConfig(
        epochs=epochs,
        patience=epochs // 2,
        batch_size=batch,
        learning_rate=1e-3,
        weight_decay=0.05,
        schedule="constant",
        clip_norm=0.0,
        mask_share=mask,
        item_noise=0.02,
        all_windows=False,
    )
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
TRAIN_UNTIL = ("validation", "test")
EACH_NIGHT = ("scratch", "warm", "once")
"""`scratch`: each test night's model is trained from scratch; `once`: that of the first night stays."""
ALPHA_SPENDING = ("obrien-fleming", "pocock")
"""How `seeds` spends alpha over its looks: models/evaluation/sequential.py."""
PRESET_ITEMS = {"paper_a_ml1m": 3328, "paper_a_steam": 4332}
