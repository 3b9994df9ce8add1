"""Which methods there are: backbones and encodings, named, sized and combined here and only here.

A method is `backbone[+st][+sse][+tsa][+fb][+habit][+side]` or a baseline. A backbone does not know how many encodings
exist, an encoding does not know which backbone it is in: a new one is a file and a line here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from models.core.config import PRESETS, Config, ModelConfig, TrainConfig
from models.core.errors import UserError
from models.core.knobs import Knob, check, knobs
from models.networks.baselines import GPTopFreq, PersonalTop, Popularity, RecentPopularity
from models.networks.encodings import (
    Encoding,
    Feedback,
    Habit,
    SessionSegment,
    SessionToken,
    SideEncoding,
    TimeFeatures,
)
from models.networks.gru4rec import GRU4Rec
from models.networks.hstu import HSTU
from models.networks.narm import NARM
from models.networks.neighbours import TIFUKNN, UPCF, VSKNN, ItemKNN
from models.networks.recommender import Recommender
from models.networks.sessionrec import SessionRec
from models.networks.transformer import BERT4Rec, SASRec

# name -> class(config, feature_dim); what `Recommender` asks of it is said there.
BACKBONES: dict[str, Any] = {
    "gru4rec": GRU4Rec,
    "narm": NARM,
    "sasrec": SASRec,
    "bert4rec": BERT4Rec,
    "hstu": HSTU,
}
SESSION_ENCODERS: dict[str, Any] = {
    "sessionrec-sasrec": SASRec,
    "sessionrec-hstu": HSTU,
    "sessionrec-gru4rec": GRU4Rec,
}
ENCODINGS: dict[str, type[Encoding]] = {
    "st": SessionToken,
    "sse": SessionSegment,
    "tsa": TimeFeatures,
    "fb": Feedback,
    "habit": Habit,
    "side": SideEncoding,
}
BASELINES: dict[str, type[Popularity]] = {
    "pop": Popularity,
    "recent_pop": RecentPopularity,
    "personal_top": PersonalTop,
    "item_knn": ItemKNN,
    "vsknn": VSKNN,
    "gp_topfreq": GPTopFreq,
    "tifu_knn": TIFUKNN,
    "up_cf": UPCF,
}


SESSION_HABIT_EVENTS = 1024  # `habit_events` for next sessions, unless given


def parse(method: str) -> tuple[str, tuple[str, ...]]:
    """`bert4rec+st+tsa` -> ("bert4rec", ("st", "tsa"))."""
    base, *encodings = method.split("+")
    known = base in BACKBONES or base in SESSION_ENCODERS or (base in BASELINES and not encodings)
    if not known or len(set(encodings)) < len(encodings) or not set(encodings) <= set(ENCODINGS):
        names = [*BASELINES, *BACKBONES, *SESSION_ENCODERS]
        near = [base] if base in names else difflib.get_close_matches(base.lower(), names, n=1)
        # (A baseline takes no encodings; of a backbone each that is near to a known one is that one.)
        parts = [] if near and near[0] in BASELINES else list(dict.fromkeys(encodings))
        meant = [
            difflib.get_close_matches(one.lower(), ENCODINGS, n=1, cutoff=0.5) for one in parts
        ]
        hint = ""
        if near and all(meant):
            hint = f" (did you mean {'+'.join([near[0], *(one[0] for one in meant)])!r}?)"
        if re.search(r"[\s;|]", method.strip()):
            hint = " (separate methods by commas)"
        raise UserError(
            f"unknown method {method!r}{hint}: use a baseline ({', '.join(BASELINES)}), or a backbone "
            f"({', '.join([*BACKBONES, *SESSION_ENCODERS])}) with any of "
            f"+{', +'.join(ENCODINGS)}, each once"
        )
    if base in SESSION_ENCODERS and "st" in encodings:
        raise UserError(
            f"method {method!r}: +st marks where sessions begin, and every position of {base} is a "
            "session. Leave it out"
        )
    if base in SESSION_ENCODERS and "fb" in encodings:
        raise UserError(f"method {method!r}: {base} always reads feedback. Leave +fb out")
    if base in SESSION_ENCODERS and "side" in encodings:
        raise UserError(
            f"method {method!r}: {base} reads the catalogue by itself (unless --no-side). Leave +side out"
        )
    return base, tuple(encodings)


def reads_side(method: str, config: ModelConfig) -> bool:
    """Whether a method looks at the catalogue."""
    base, encodings = parse(method)
    return "side" in encodings or (base in SESSION_ENCODERS and config.side)


def reads_sessions(method: str) -> bool:
    """Whether a trained method sees where sessions end; else all session rules give one model."""
    base, encodings = parse(method)
    return base in SESSION_ENCODERS or any(ENCODINGS[name].reads_sessions for name in encodings)


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
    by_session = train.target == "next_session" or base in SESSION_ENCODERS
    if by_session and "habit_events" not in given:
        # A session has one label, and so the cost of a look back once.
        model = replace(model, habit_events=SESSION_HABIT_EVENTS)
    check(model)
    check(train)
    return Config(method=method, preset=preset, model=model, train=train)


def tunable(method: str) -> dict[str, Knob]:
    """The settings that `tune` looks for: those with a range that the method reads, by name."""
    base, encodings = parse(method)
    kinds = {base, *(f"+{name}" for name in encodings)}
    if base not in BASELINES:
        kinds.add("trained")
    if base in SESSION_ENCODERS:
        kinds.add("sessionrec")
    return {
        one.name: told
        for kind in (ModelConfig, TrainConfig)
        for one, told in knobs(kind)
        if told.tune is not None and kinds & set(told.tune.of)
    }


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The same with other settings, checked; what the data decided stays."""
    names = {one.name for one in fields(ModelConfig)}
    model = replace(config.model, **{k: v for k, v in settings.items() if k in names})
    train = replace(config.train, **{k: v for k, v in settings.items() if k not in names})
    check(model)
    check(train)
    return replace(config, model=model, train=train)


def recommender(num_items: int, config: Config) -> Recommender:
    """An untrained model of a method that is no baseline."""
    base, names = parse(config.method)
    encodings = {name: ENCODINGS[name] for name in names}
    if base in SESSION_ENCODERS:
        return SessionRec(num_items, config, SESSION_ENCODERS[base], encodings)
    return Recommender(num_items, config, BACKBONES[base], encodings)


def build(num_items: int, config: Config) -> Recommender | Popularity:
    base, _ = parse(config.method)
    if base in BASELINES:
        return BASELINES[base](num_items, config.model)
    return recommender(num_items, config)


def count_parameters(num_items: int, config: Config) -> dict[str, Any]:
    """num_params, num_params_added and its share against the backbone alone (of sessionrec-x: x,
    the next-item model of the same sizes), by_module."""

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
    base = parse(config.method)[0].removeprefix("sessionrec-")
    alone = sum(count(base).values())
    total = sum(mine.values())
    return {
        "num_params": total,
        "num_params_added": total - alone,
        "params_added_pct": round(100 * (total - alone) / alone, 4) if alone else 0.0,
        "by_module": mine,
    }
