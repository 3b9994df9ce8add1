"""A registered model's answers from raw events. Imports nothing of `jobs`, and no table."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Versions that 0.1.0 registered call `models.serving.recommend` where this package is imported
    already."""
    if name == "recommend":
        from models.serving.answer import recommend

        return recommend
    raise AttributeError(name)
