"""Results of several nights: put together, and kept on disk.

A user's value is the mean over all of the user's targets, of whichever night. What is no mean over
users (coverage and popularity of the lists, the loss) is the mean over nights, weighted by their
targets. `users_without_history` counts a user once for each night.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.core.rows import Floats
from models.evaluation.evaluate import Result


def pooled(results: Sequence[Result]) -> Result:
    """One result of several that were asked different targets by the same metrics."""
    one = _pooled(results)
    kinds = [_kinds(each) for each in results]
    if one.counts.get("first_of_a_session") not in (None, 0, one.counts["targets"]):
        for kind in ("first", "inside"):
            one.parts[kind] = _pooled([each[kind] for each in kinds if kind in each])
    for age in dict.fromkeys(age for each in results for age in each.ages):
        one.ages[age] = _pooled([each.ages[age] for each in results if age in each.ages])
    weight = [each.counts["targets"] for each in results]
    for name in dict.fromkeys(name for each in results for name in each.catalogue):
        there = [(r.catalogue[name], w) for r, w in zip(results, weight, strict=True)
                 if w and name in r.catalogue]  # fmt: skip
        if there:
            one.catalogue[name] = sum(v * w for v, w in there) / sum(w for _, w in there)
    return one


def _kinds(result: Result) -> Mapping[str, Result]:
    """Its parts by kind of target, also where all targets are of one kind."""
    first = result.counts.get("first_of_a_session")
    if result.parts or first is None or not result.counts["targets"]:
        return result.parts
    return {"first" if first else "inside": result}


def _pooled(results: Sequence[Result]) -> Result:
    users, place = np.unique(np.concatenate([r.users for r in results]), return_inverse=True)
    asked = np.concatenate([r.asked for r in results])
    total = np.bincount(place, asked, len(users))
    values = {
        name: np.bincount(
            place, asked * np.concatenate([r.values[name] for r in results]), len(users)
        )
        / total
        for name in results[0].values
    }
    counts: dict[str, Any] = {
        name: sum(r.counts.get(name, 0) for r in results)
        for name in dict.fromkeys(name for r in results for name in r.counts)
    }
    counts["users"] = len(users)
    counts["unseen_share"] = round(counts["unseen_items"] / max(1, counts["target_items"]), 4)
    return Result(users, values, counts, asked=total.astype(np.int64))


def keep(result: Result, folder: Path) -> None:
    """Two files of a result in a folder that is there."""
    arrays, told = _flat(result)
    np.savez_compressed(folder / "result.npz", **arrays)
    (folder / "result.json").write_text(json.dumps(told), encoding="utf-8")


def kept(folder: Path) -> Result:
    """What `keep` wrote, to the last bit."""
    told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    with np.load(folder / "result.npz", allow_pickle=False) as arrays:
        return _unflat(dict(arrays), told)


def _flat(result: Result) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays: dict[str, Any] = {"users": result.users, "asked": result.asked}
    arrays |= {f"values/{name}": value for name, value in result.values.items()}
    told: dict[str, Any] = {"counts": result.counts, "catalogue": result.catalogue}
    for group, parts in (("parts", result.parts), ("ages", result.ages)):
        told[group] = {}
        for name, part in parts.items():
            own, told[group][name] = _flat(part)
            arrays |= {f"{group}/{name}/{key}": value for key, value in own.items()}
    return arrays, told


def _unflat(arrays: Mapping[str, Any], told: Mapping[str, Any]) -> Result:
    def below(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    parts, ages = (
        {name: _unflat(below(f"{group}/{name}/"), part) for name, part in told[group].items()}
        for group in ("parts", "ages")
    )
    values: dict[str, Floats] = below("values/")
    return Result(
        arrays["users"], values, dict(told["counts"]), parts, dict(told["catalogue"]),
        arrays["asked"], ages,
    )  # fmt: skip
