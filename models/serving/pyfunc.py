"""A registered model as MLflow asks it ("model from code"): nothing is pickled.

Only `models.registry.register` names it; what it imports is shipped with every version, under another name
(`models/registry/packaging.py`). It needs torch, pandas and safetensors; no Spark, no Airflow, no table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext  # type: ignore[attr-defined, unused-ignore]

from models.networks.saved_model import load
from models.serving.answer import recommend
from models.serving.rules import Rules, of_text


class SessionRecommender(PythonModel):  # type: ignore[misc, unused-ignore]
    def load_context(self, context: PythonModelContext) -> None:
        self.stored = load(Path(context.artifacts["model"]))
        self.read: tuple[str, Rules] | None = None  # the last rules, which requests repeat

    def rules(self, text: str) -> Rules | None:
        if not text:
            return None
        read = self.read
        if read is None or read[0] != text:
            read = self.read = (text, of_text(text, self.stored.lookup))
        return read[1]

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        # A null in a request is a parameter left out.
        given = {name: value for name, value in (params or {}).items() if value is not None}
        session = given.get("request_session_id")
        return recommend(
            self.stored,
            model_input,
            int(given.get("k", 10)),
            str(given.get("request_ts", "")),
            None if session is None else str(session),
            self.rules(str(given.get("rules", ""))),
        )
