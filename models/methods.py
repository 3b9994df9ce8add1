"""Which methods there are: backbones and encodings, named, sized and combined here and only here.

A method is `backbone[+st][+sse][+tsa]` or a baseline. A backbone does not know how many encodings
exist, an encoding does not know which backbone it is in: a new one is a file and a line here.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from models.baselines import PersonalTop, Popularity, RecentPopularity
from models.batch import Batch, Ints, Rows, append_request, pad, take
from models.encodings import Encoding, SessionSegment, SessionToken, TimeFeatures
from models.errors import UserError
from models.gru4rec import GRU4Rec
from models.hstu import HSTU
from models.narm import NARM
from models.neighbours import VSKNN, ItemKNN
from models.presets import PRESETS, Config, ModelConfig, TrainConfig
from models.transformer import BERT4Rec, SASRec

# name -> class(config, feature_dim), with the flags `cloze` and, where its `forward` can be told
# which positions are asked for, `chooses`.
BACKBONES: dict[str, Any] = {
    "gru4rec": GRU4Rec,
    "narm": NARM,
    "sasrec": SASRec,
    "bert4rec": BERT4Rec,
    "hstu": HSTU,
}
ENCODINGS: dict[str, type[Encoding]] = {
    "st": SessionToken,
    "sse": SessionSegment,
    "tsa": TimeFeatures,
}
BASELINES: dict[str, type[Popularity]] = {
    "pop": Popularity,
    "recent_pop": RecentPopularity,
    "personal_top": PersonalTop,
    "item_knn": ItemKNN,
    "vsknn": VSKNN,
}


SCORED_TOKENS = 8192  # ours


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
        "loss": ("auto", "full", "sampled", "gbce"), "precision": ("auto", "float32", "bfloat16"),
    }  # fmt: skip
    for name, allowed in choices.items():
        value = getattr(model if name in names[0] else train, name)
        if value not in allowed:
            raise UserError(f"{name} = {value!r}: one of {', '.join(allowed)}")
    if train.negatives < 1:
        raise UserError(f"negatives = {train.negatives}: sampled losses draw at least one item")
    return Config(method=method, preset=preset, model=model, train=train)


class Recommender(nn.Module):
    """Items embedded, encodings applied, the backbone run, all V items scored.

    The item table has rows 0 (padding), 1..V and, for cloze models, [MASK]. Tied models score by
    that table plus a bias an item; others by a layer D -> V+1, whose class 0 is never returned. A
    backbone with a `temperature` is always tied and scores by cosine / temperature, without bias.
    """

    def __init__(self, num_items: int, config: Config) -> None:
        super().__init__()
        base, names = parse(config.method)
        self.config = config.model
        self.num_items = num_items
        self.precision = config.train.precision  # what layers compute in; `auto`: float32
        self.encodings = nn.ModuleDict({name: ENCODINGS[name](config.model) for name in names})
        widths = sum(encoding.feature_dim for encoding in self.all_encodings())
        self.backbone = BACKBONES[base](config.model, widths)
        self.cloze = bool(self.backbone.cloze)
        dim, masks = config.model.dim, int(self.cloze or config.model.reference)
        self.item = nn.Embedding(num_items + 1 + masks, dim, padding_idx=0)
        self.temperature: float | None = getattr(self.backbone, "temperature", None)
        tied = config.model.tied or self.temperature is not None
        self.first_class = int(tied)
        self.output = None if tied else nn.Linear(dim, num_items + 1)
        biased = tied and self.temperature is None
        self.bias = nn.Parameter(torch.zeros(num_items)) if biased else None
        self.share: torch.Tensor  # float32[V], of positive training events; see `fit`
        self.register_buffer("share", torch.full((num_items,), 1 / num_items), persistent=False)
        nn.init.normal_(
            self.item.weight, std=config.model.table_std if config.model.reference else dim**-0.5
        )
        with torch.no_grad():
            self.item.weight[0].zero_()

    def all_encodings(self) -> list[Encoding]:
        return [cast(Encoding, encoding) for encoding in self.encodings.values()]

    def fit(self, rows: Rows) -> None:
        """Count popularity, from which sampled losses draw; start item biases at its log [ours]."""
        count = np.bincount(rows.item[rows.positive], minlength=self.num_items + 1)[1:]
        share = (count + 1) / (count.sum() + self.num_items)
        self.share = torch.from_numpy(share.astype(np.float32))
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(torch.from_numpy(np.log(share) - np.log(share).mean()))

    def forward(self, batch: Batch) -> torch.Tensor:
        """float[B, L, D]"""
        return self._run(batch)

    def states(self, batch: Batch, at_N: torch.Tensor) -> torch.Tensor:
        """[N, D]: of `forward`, the positions `at_N` (indices into B*L), in the model's precision."""
        low = self.precision == "bfloat16"
        with torch.autocast(at_N.device.type, torch.bfloat16, enabled=low):
            if getattr(self.backbone, "chooses", False):
                h_ND = self._run(batch, at_N)
            else:
                h_ND = self._run(batch).flatten(0, 1).index_select(0, at_N)
        return h_ND.to(torch.bfloat16) if low else h_ND

    def _run(self, batch: Batch, *at_N: torch.Tensor) -> torch.Tensor:
        known = batch.token.masked_fill(batch.token >= self.item.num_embeddings, 0)
        x_BLD = self.item(known)
        extra = []
        for encoding in self.all_encodings():
            x_BLD = encoding.embed(x_BLD, batch)
            extra.append(encoding.features(batch))
        parts = [part for part in extra if part is not None]
        features = torch.cat(parts, dim=-1) if parts else None
        result: torch.Tensor = self.backbone(x_BLD, batch, features, *at_N)
        return result if self.temperature is None else nn.functional.normalize(result, dim=-1)

    def classes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [C, D] and bias [C] of the output; item i is class i - first_class."""
        if self.output is not None:
            return self.output.weight, self.output.bias
        weight = self.item.weight[1 : self.num_items + 1]
        if self.temperature is not None:
            weight = nn.functional.normalize(weight, dim=-1) / self.temperature
        return weight, weight.new_zeros(len(weight)) if self.bias is None else self.bias

    @property
    def rows_at_once(self) -> int:
        """So many histories are best scored together: memory stays small, speed is the same."""
        on_cpu = self.item.weight.device.type == "cpu"
        return max(1, (SCORED_TOKENS if on_cpu else 16 * SCORED_TOKENS) // self.config.max_len)

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
        batch = batch.to(weight.device)
        many, length = batch.token.shape
        last = torch.arange(1, many + 1, device=weight.device) * length - 1
        h_RD = self.states(batch, last).to(weight.dtype)
        return torch.addmm(bias, h_RD, weight.T)[:, 1 - self.first_class :].cpu()


def build(num_items: int, config: Config) -> Recommender | Popularity:
    base, _ = parse(config.method)
    if base in BASELINES:
        return BASELINES[base](num_items, config.model)
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
