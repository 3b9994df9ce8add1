"""What the steps of a job tell each other: the `manifest.json` of a candidate, as a typed value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from jobs.core.errors import SettingsError
from jobs.core.plan import Plan

Staged = list[dict[str, Any]]
"""Data files that no version names yet, as `Lake.stage` tells them."""


@dataclass
class Manifest:
    """What every job tells.

    A deployment may change the version between the steps of a night. A manifest of an earlier
    version has no `plan`; its other keys have the same names, or are ones that `plan_of_old` reads.
    """

    plan: Plan

    @staticmethod
    def plan_of_old(old: dict[str, Any]) -> Plan:
        """The plan that a manifest without one was made by."""
        raise NotImplementedError

    @classmethod
    def of_json(cls, text: str, where: str) -> Self:
        """Args: where: names the candidate in the error.

        Raises:
            SettingsError: it is none of this job.
        """
        told = json.loads(text)
        try:
            if "plan" not in told:
                told["plan"] = cls.plan_of_old(told)
            made: Self = TypeAdapter(cls).validate_python(told)
        except KeyError as error:
            raise _unreadable(where, f"{error} is missing") from error
        except ValidationError as error:
            why = "; ".join(
                f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
            )
            raise _unreadable(where, why) from error
        return made

    def to_json(self) -> str:
        return TypeAdapter(type(self)).dump_json(self).decode()


def _unreadable(where: str, why: str) -> SettingsError:
    return SettingsError(
        f"{where}/manifest.json cannot be read ({why}): run the compute step of this --batch again"
    )
