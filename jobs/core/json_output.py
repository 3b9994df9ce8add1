"""What a command says for machines: one line of JSON, the last one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jobs.core.settings import settings


def finite(value: Any) -> Any:
    """The same with None for numbers that are none (NaN, infinite): JSON has no word for them."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def answer(said: dict[str, Any]) -> None:
    """Print it, and write it where `SESSIONMILL_ANSWER_FILE` says."""
    line = json.dumps(finite(said), default=str, allow_nan=False)
    if settings().answer_file:
        Path(str(settings().answer_file)).write_text(line)
    print(line, flush=True)
