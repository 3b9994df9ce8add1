"""Lists beside what came next: some users' questions of the test period, asked of the winner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.data.splits import Targets, stamp
from models.evaluation.rescore import questions, stored_cut
from models.networks.saved_model import load
from models.networks.scoring import best, exclude
from models.registry import tracking

if TYPE_CHECKING:
    from jobs.core.source_file import Source

USERS = 4  # ours: whose lists are shown
LINES = 10


def lists_beside_what_came(
    client: Any, outcome: dict[str, Any], source: Source, lake: str
) -> dict[str, Any] | None:
    """The winner's lists at the first question of some users; None if nobody is asked anything.

    Args:
        outcome: a comparison, as `compare.json` has it.

    Returns:
        `method`, `target`, and of each of `users`: `user`, `when`, `list` (item ids and whether
        each came), `came` (ids of what came next) and `unknown` (how many of it the model has never
        seen).
    """
    row = next(one for one in outcome["methods"] if one["method"] == outcome["winner"])
    with tracking.downloaded(client, row["mlflow_run_id"], "trained") as folder:
        stored = load(folder)
    facts = stored.facts
    events, asked = questions(
        stored, source, lake, outcome["table_version"], stored_cut(stored), facts["target"]
    )
    if not len(asked.user):
        return None
    stored.model.eval()
    part = asked.select(_some(asked, events.sequences.user_id))
    with torch.no_grad():
        scores = stored.model.score(part.rows, part.begin, part.end, part.request_ts, part.opens)
    if facts["repeat_policy"] == "exclude_seen":
        scores = exclude(scores, part.rows, part.begin, part.end)
    place, value = best(scores, LINES)
    users = []
    for number, user in enumerate(part.user.tolist()):
        came = part.item[part.item_start[number] : part.item_start[number + 1]]
        known = set((came[came > 0] - 1).tolist())
        listed = place[number][torch.isfinite(value[number])].tolist()
        users.append(
            {
                "user": events.sequences.user_id[user],
                "when": stamp(int(part.request_ts[number]))[:16].replace("T", " "),
                "list": [(stored.item_ids[one], one in known) for one in listed],
                "came": [stored.item_ids[one] for one in sorted(known)],
                "unknown": int((came == 0).sum()),
            }
        )
    return {"method": outcome["winner"], "target": facts["target"], "users": users}


def _some(asked: Targets, names: list[str]) -> np.ndarray:
    """The first questions of some users, from all over those that are asked."""
    users, first = np.unique(asked.user, return_index=True)
    order = sorted(range(len(users)), key=lambda at: str(names[users[at]]))
    return first[order[:: max(1, len(order) // USERS)][:USERS]]
