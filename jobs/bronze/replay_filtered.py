"""`bronze.filtered` -> `bronze.events`, after a change of `source.keep` or `[bots]`: as
`jobs/bronze/replay_rejects.py` does it with rejects."""

from __future__ import annotations

from jobs.bronze.rejects import LEFT_OUT
from jobs.bronze.replay_rejects import audit, computed, publish
from jobs.lake.context import Candidate, Context

__all__ = ["audit", "compute", "publish"]


def compute(context: Context) -> Candidate:
    return computed(context, LEFT_OUT)
