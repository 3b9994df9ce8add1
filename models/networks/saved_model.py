"""A trained model as a folder: weights in safetensors, everything else in JSON. No pickle.

* model.safetensors: parameters and counts
* model.json: config, cut, session rule, data; items.json: item ids of vocabulary 1..V
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from models.core.config import Config
from models.networks.baselines import Popularity
from models.networks.methods import build
from models.networks.recommender import Recommender


@dataclass(frozen=True)
class Stored:
    """A model with what it needs to be asked by raw ids.

    facts: `method`, `gap_us` (the silence that cuts sessions), `source`, `cut`, `table` and more.
    popularity: positive training events of each vocabulary item, for users without history.
    """

    model: Recommender | Popularity
    config: Config
    item_ids: list[str]
    popularity: torch.Tensor
    facts: dict[str, Any]

    @cached_property
    def lookup(self) -> pd.Index:
        """item_id -> vocabulary index - 1."""
        return pd.Index(self.item_ids, dtype=object)


def save(stored: Stored, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v.detach().cpu() for k, v in stored.model.state_dict().items()}
    tensors["popularity"] = stored.popularity
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    values = {"config": stored.config.as_dict(), "facts": stored.facts}
    (folder / "model.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    (folder / "items.json").write_text(json.dumps(stored.item_ids), encoding="utf-8")


def load(folder: Path) -> Stored:
    values = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    item_ids = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    config = Config.from_dict(values["config"])
    model = build(len(item_ids), config)
    prefix = "model."
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    model.eval()
    return Stored(model, config, item_ids, tensors["popularity"], values["facts"])
