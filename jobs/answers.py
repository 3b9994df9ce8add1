"""What a command says for machines: one line of JSON, the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.settings import settings


def answer(said: dict[str, Any]) -> None:
    """Print it, and write it where `SESSIONMILL_ANSWER_FILE` says."""
    line = json.dumps(said, default=str)
    if settings().answer_file:
        Path(str(settings().answer_file)).write_text(line)
    print(line, flush=True)
