"""Tensors that go to a device together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch


@dataclass(frozen=True)
class OnDevice:
    """Fields that are tensors, others of this kind, or tuples of these move; other fields stay on
    the host."""

    def to(self, device: torch.device | str) -> Self:
        """On a device. Copies out of pinned memory are not waited for."""
        return self._each(
            lambda one: (
                one.to(device) if isinstance(one, OnDevice) else one.to(device, non_blocking=True)
            )
        )

    def pin_memory(self) -> Self:
        """In memory that a GPU copies from by itself."""
        return self._each(lambda one: one.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor | OnDevice):
                moved[field.name] = change(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], OnDevice):
                moved[field.name] = tuple(change(one) for one in value)
        return replace(self, **moved)
