"""Models as MLflow serves them, without a training and without a registry."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import torch
from mlflow.pyfunc import PythonModelContext, scoring_server

from models.networks.methods import build, config
from models.networks.saved_model import Stored, save
from models.registry.register import served

torch.set_num_threads(1)  # the models here are tiny: threads would only wait for each other

HOUR = 3600
START = pd.Timestamp("2024-01-01T10:00Z")


def untrained(method: str, item_ids: list[str], **settings: Any) -> Stored:
    """A model of random weights, the same for a method; sessions are cut after half an hour."""
    torch.manual_seed(1)
    chosen = config(method, settings.pop("preset", "tiny"), **settings)
    model = build(len(item_ids), chosen)
    for name, parameter in model.named_parameters():
        if ".habit." in name:  # starts at 0
            torch.nn.init.normal_(parameter)
    model.eval()
    popularity = torch.arange(len(item_ids), 0, -1, dtype=torch.float64)
    return Stored(model, chosen, item_ids, popularity, {"gap_us": 1_800_000_000})


def packed(stored: Stored, folder: Path) -> Path:
    """The model as MLflow keeps it."""
    save(stored, folder / "trained")
    with served(folder / "trained") as parts:
        mlflow.pyfunc.save_model(str(folder / "packed"), **parts)
    return folder / "packed"


def put_in(model: Any, stored: Stored, folder: Path) -> Any:
    """The loaded model `model` with other weights, loaded by the code that it ships; what it has
    loaded."""
    save(stored, folder)
    inner = model.unwrap_python_model()
    inner.load_context(PythonModelContext({"model": str(folder)}, None))
    return inner.stored


def events(user: str, items: list[str], apart_s: int = 1) -> pd.DataFrame:
    when = [START + pd.Timedelta(seconds=apart_s * number) for number in range(len(items))]
    return pd.DataFrame({"user_id": user, "item_id": items, "event_ts": when})


def scores(answer: pd.DataFrame, user: str) -> dict[str, float]:
    (items,) = answer[answer.user_id == user]["items"]
    return {item["item_id"]: item["score"] for item in items}


class Listens:
    """In place of a model's network: keeps the rows that it is asked about."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.heard: list[Any] = []

    def score(self, rows: Any, begin: Any, end: Any, *_: Any) -> torch.Tensor:
        self.heard.append(rows)
        return torch.zeros(len(begin), self.num_items)


def listening(model: Any) -> Listens:
    inner = model.unwrap_python_model()
    ear = Listens(len(inner.stored.item_ids))
    inner.stored = replace(inner.stored, model=ear)
    return ear


def _parquet(frame: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    frame.to_parquet(file)
    return file.getvalue()


def _lists(frame: pd.DataFrame) -> dict[str, Any]:
    texts = frame.assign(event_ts=[None if pd.isna(t) else t.isoformat() for t in frame.event_ts])
    found: dict[str, Any] = texts.astype(object).where(texts.notna(), None).to_dict("split")
    return {"columns": found["columns"], "data": found["data"]}


def _json(form: str, records: bool, frame: pd.DataFrame) -> bytes:
    lists = _lists(frame)
    rows = [dict(zip(lists["columns"], row, strict=True)) for row in lists["data"]]
    return json.dumps({form: rows if records else lists}).encode()


JSON, PARQUET, CSV = "application/json", "application/vnd.apache.parquet", "text/csv"
WIRE: dict[str, tuple[str, Callable[[pd.DataFrame], bytes]]] = {
    "dataframe_records": (JSON, lambda frame: _json("dataframe_records", True, frame)),
    "dataframe_split": (JSON, lambda frame: _json("dataframe_split", False, frame)),
    "instances": (JSON, lambda frame: _json("instances", True, frame)),
    "inputs": (JSON, lambda frame: _json("inputs", True, frame)),
    "parquet": (PARQUET, _parquet),
}


def over(wire: str, model: Any, frame: pd.DataFrame) -> pd.DataFrame:
    """The answer, by the code with which MLflow's server reads a request."""
    kind, write = WIRE[wire]
    schema = model.metadata.get_input_schema()
    answer = scoring_server.invocations(write(frame), kind, model, schema)
    assert answer.status == 200
    return pd.DataFrame(json.loads(answer.response)["predictions"])
