"""Which methods there are: backbones and encodings, named, sized and combined here and only here.

A method is `backbone[+st][+sse][+tsa]` or a baseline. A backbone does not know how many encodings
exist, an encoding does not know which backbone it is in: a new one is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from models.baselines import PersonalTop, Popularity
from models.batch import Batch, Ints, Rows, append_request, pad, take
from models.encodings import Encoding, SessionSegment, SessionToken, TimeFeatures
from models.errors import UserError
from models.gru4rec import GRU4Rec
from models.transformer import BERT4Rec, SASRec

BACKBONES: dict[str, Any] = {  # name -> class(config, feature_dim) with a flag `cloze`
    "gru4rec": GRU4Rec,
    "sasrec": SASRec,
    "bert4rec": BERT4Rec,
}
ENCODINGS: dict[str, type[Encoding]] = {
    "st": SessionToken,
    "sse": SessionSegment,
    "tsa": TimeFeatures,
}
BASELINES: dict[str, type[Popularity]] = {"pop": Popularity, "personal_top": PersonalTop}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is. Stored beside its weights; enough to build it again."""

    dim: int = 64  # D
    heads: int = 2
    layers: int = 2
    max_len: int = 128  # L, in tokens
    dropout: float = 0.1
    attention_dropout: float = 0.0
    tied: bool = True  # score by the item table itself, else an output layer D -> V+1
    reference: bool = False  # the reference's net to the last parameter (presets paper_a_*)
    segments: int = 5  # S_max of +sse
    sse_index: str = "from_oldest"  # or from_newest
    time_features: int = 16  # T of +tsa
    tsa_time: str = "float64"  # or raw_float32
    time_origin_us: int = 0  # epoch of the phase of +tsa: the first training event
    request_time: str = "last_event"  # or known: may the model know when it is asked?
    repeat_policy: str = "allow"  # or exclude_seen


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. AdamW; betas .9, .999."""

    target: str = "next_item"  # or next_session
    epochs: int = 20
    patience: int = 3  # epochs without a better validation NDCG@10 before stopping
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: str = "cosine"  # or constant
    clip_norm: float = 1.0  # 0: no clipping
    mask_share: float = 0.2  # cloze
    item_noise: float = 0.0  # causal: share of input items replaced at random
    all_windows: bool = True  # learn from a user's whole history, not only the newest L tokens
    validation_targets: int = 4000  # at most so many, drawn once, decide about stopping
    seed: int = 0


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
        return Config(
            method=values["method"],
            preset=values["preset"],
            model=ModelConfig(**values["model"]),
            train=TrainConfig(**values["train"]),
        )


def parse(method: str) -> tuple[str, tuple[str, ...]]:
    """`bert4rec+st+tsa` -> ("bert4rec", ("st", "tsa"))."""
    base, *encodings = method.split("+")
    known = base in BACKBONES or (base in BASELINES and not encodings)
    if not known or len(set(encodings)) < len(encodings) or not set(encodings) <= set(ENCODINGS):
        raise UserError(
            f"unknown method {method!r}: a baseline ({', '.join(BASELINES)}), or a backbone "
            f"({', '.join(BACKBONES)}) with any of +{', +'.join(ENCODINGS)}, each once"
        )
    return base, tuple(encodings)


def small(base: str) -> tuple[ModelConfig, TrainConfig]:
    """One core, well under a minute of training on a fifth of a million events [ours].

    Short windows and small batches: many steps count more than long histories at this size.
    """
    model = ModelConfig(dim=64, layers=1, max_len=64, dropout=0.1)
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


def config(method: str, preset: str = "small", **overrides: Any) -> Config:
    """The configuration of a method under a preset; `overrides` by field name, None = keep."""
    base, _ = parse(method)
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: one of {', '.join(PRESETS)}")
    model, train = PRESETS[preset](base)
    given = {name: value for name, value in overrides.items() if value is not None}
    if base in BACKBONES and BACKBONES[base].cloze and "sse_index" not in given:
        # Counting from the newest session is no leak where all of the row is seen anyway.
        model = replace(model, sse_index="from_newest")
    names = {f.name for f in fields(ModelConfig)}, {f.name for f in fields(TrainConfig)}
    unknown = set(given) - names[0] - names[1]
    if unknown:
        raise UserError(f"unknown setting {sorted(unknown)}: {sorted(names[0] | names[1])}")
    model = replace(model, **{k: v for k, v in given.items() if k in names[0]})
    train = replace(train, **{k: v for k, v in given.items() if k in names[1]})
    choices = {
        "request_time": ("last_event", "known"), "repeat_policy": ("allow", "exclude_seen"),
        "sse_index": ("from_oldest", "from_newest"), "tsa_time": ("float64", "raw_float32"),
        "target": ("next_item", "next_session"), "schedule": ("cosine", "constant"),
    }  # fmt: skip
    for name, allowed in choices.items():
        value = getattr(model if name in names[0] else train, name)
        if value not in allowed:
            raise UserError(f"{name} = {value!r}: one of {', '.join(allowed)}")
    return Config(method=method, preset=preset, model=model, train=train)


class Recommender(nn.Module):
    """Items embedded, encodings applied, the backbone run, all V items scored.

    The item table has rows 0 (padding), 1..V and, for cloze models, [MASK]. Tied models score by
    that table plus a bias an item; others by a layer D -> V+1, whose class 0 is never returned.
    """

    def __init__(self, num_items: int, config: Config) -> None:
        super().__init__()
        base, names = parse(config.method)
        self.config = config.model
        self.num_items = num_items
        self.encodings = nn.ModuleDict({name: ENCODINGS[name](config.model) for name in names})
        widths = sum(encoding.feature_dim for encoding in self.all_encodings())
        self.backbone = BACKBONES[base](config.model, widths)
        self.cloze = bool(self.backbone.cloze)
        dim, masks = config.model.dim, int(self.cloze or config.model.reference)
        self.item = nn.Embedding(num_items + 1 + masks, dim, padding_idx=0)
        self.first_class = int(config.model.tied)
        self.output = None if config.model.tied else nn.Linear(dim, num_items + 1)
        self.bias = nn.Parameter(torch.zeros(num_items)) if config.model.tied else None
        nn.init.normal_(self.item.weight, std=0.02 if config.model.reference else dim**-0.5)
        with torch.no_grad():
            self.item.weight[0].zero_()

    def all_encodings(self) -> list[Encoding]:
        return [cast(Encoding, encoding) for encoding in self.encodings.values()]

    def fit(self, rows: Rows) -> None:
        """Start the item biases of tied models at log popularity, and nothing else [ours]."""
        if self.bias is not None:
            count = np.bincount(rows.item[rows.positive], minlength=self.num_items + 1)[1:]
            share = (count + 1) / (count.sum() + self.num_items)
            with torch.no_grad():
                self.bias.copy_(torch.from_numpy(np.log(share) - np.log(share).mean()))

    def forward(self, batch: Batch) -> torch.Tensor:
        """float[B, L, D]"""
        known = batch.token.masked_fill(batch.token >= self.item.num_embeddings, 0)
        x_BLD = self.item(known)
        extra = []
        for encoding in self.all_encodings():
            x_BLD = encoding.embed(x_BLD, batch)
            extra.append(encoding.features(batch))
        parts = [part for part in extra if part is not None]
        features = torch.cat(parts, dim=-1) if parts else None
        result: torch.Tensor = self.backbone(x_BLD, batch, features)
        return result

    def classes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [C, D] and bias [C] of the output; item i is class i - first_class."""
        if self.output is not None:
            return self.output.weight, self.output.bias
        assert self.bias is not None
        return self.item.weight[1 : self.num_items + 1], self.bias

    def extra_tokens(self, opens: np.ndarray) -> Ints:
        """int64[E]: how many tokens the encodings put before each event."""
        count = np.zeros(len(opens), dtype=np.int64)
        for encoding in self.all_encodings():
            count += encoding.extra_tokens(opens)
        return count

    def request(
        self,
        rows: Rows,
        begin: Ints,
        end: Ints,
        request_ts: Ints | None = None,
        new_session: np.ndarray | None = None,
    ) -> Batch:
        """The batch that asks what follows the histories rows[begin[r]:end[r]] (none empty).

        `request_ts` and `new_session` are read under the policy `known` only.
        """
        known = self.config.request_time == "known" and request_ts is not None
        begin = np.maximum(begin, end - self.config.max_len)
        tokens = take(rows, begin, end, self.num_items, None)
        if self.cloze or known:
            tokens = append_request(
                tokens,
                cloze=self.cloze,
                request_ts=request_ts if known else None,
                new_session=new_session if known else None,
            )
        for encoding in self.all_encodings():
            tokens = encoding.layout(tokens, causal=not self.cloze)
        return pad(tokens, self.config.max_len)

    @torch.inference_mode()
    def score(
        self,
        rows: Rows,
        begin: Ints,
        end: Ints,
        request_ts: Ints | None = None,
        new_session: np.ndarray | None = None,
    ) -> torch.Tensor:
        """float[R, V]: how well each item follows each history. No [MASK], no [ST], no padding."""
        batch = self.request(rows, begin, end, request_ts, new_session)
        weight, bias = self.classes()
        h_RD = self(batch.to(weight.device))[:, -1]
        return torch.addmm(bias, h_RD, weight.T)[:, 1 - self.first_class :].cpu()


def build(num_items: int, config: Config) -> Recommender | Popularity:
    base, _ = parse(config.method)
    if base in BASELINES:
        return BASELINES[base](num_items)
    return Recommender(num_items, config)


def count_parameters(num_items: int, config: Config) -> dict[str, Any]:
    """num_params, num_params_added and its share against the backbone alone, by_module."""

    def count(name: str) -> dict[str, int]:
        with torch.device("meta"):
            model = build(num_items, replace(config, method=name))
        parts: dict[str, int] = {}
        for key, parameter in model.named_parameters():
            path = key.split(".")
            module = ".".join(path[: 2 if path[0] in ("encodings", "backbone") else 1])
            parts[module] = parts.get(module, 0) + parameter.numel()
        return parts

    mine = count(config.method)
    alone = sum(count(parse(config.method)[0]).values())
    total = sum(mine.values())
    return {
        "num_params": total,
        "num_params_added": total - alone,
        "params_added_pct": round(100 * (total - alone) / alone, 4) if alone else 0.0,
        "by_module": mine,
    }
