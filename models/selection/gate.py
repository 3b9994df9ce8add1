"""Which model is served: `champion` changes only where a better one has shown itself.

The gate is closed by default. It opens if, on one fresh cut (the challenger's, of the newest
`gold.sequences`; of a backtest, over all of its nights), the challenger's NDCG@10 is above the
champion's by more than the margin at the lower end of a paired bootstrap interval over the users
that both can be evaluated on, the version of the table was published after a green audit, the
registered model serves what was scored, and coverage and latency are inside their bounds.
Without a champion it must beat `personal_top` the same way.

The challenger was chosen as the best of many trainings, on these users among others: the best of
ten equal ones looks better than the champion by luck. So the interval's level is corrected by the
number of trainings of its comparison (Bonferroni): 1 - .05/n.

Every decision is a run of its own in MLflow, with its numbers as `gate.json`, and a tag of the
model version; refused ones too.

Decision 11 in docs/design/decisions.md.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.core.errors import UserError
from models.core.rows import Floats
from models.data.lineage import moved, publishers, runs_of
from models.evaluation.metrics import bootstrap
from models.networks.saved_model import Stored, load
from models.registry import tracking
from models.registry.register import (
    CHALLENGER,
    CHAMPION,
    REFIT_OF,
    Registered,
    aliases_of,
    find,
    serve,
    versions_of,
)
from models.selection.compare import BY
from models.selection.pairs import Contender, pair
from models.serving.answer import recommend

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from jobs.core.source_file import Source

RISK = 0.05  # of both sides: half of it is the share of wrong promotions
DRAWS = 20_000
TIMED = 200  # users whose answers are timed
SERVED = 500  # users whose questions the registered model is asked again, at most
ASKED = 2000  # questions of these, at most (one user's at least): a minute
ROUNDS = 3
BEFORE = "champions_before"  # tag of the registered model: versions, the latest last


def judge(
    ours_U: Floats, theirs_U: Floats, trainings: int, margin: float, draws: int = DRAWS
) -> dict[str, Any]:
    """The paired difference of two models over users, and whether it excludes `margin`.

    Args:
        trainings: of how many the first one is the best.
    """
    difference = ours_U - theirs_U
    level = 1 - RISK / max(1, trainings)
    low, high = bootstrap(difference[:, None], draws, level=level)[:, 0]
    return {
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "level": level,
        "trainings": trainings,
        "margin": margin,
        "users": len(difference),
        "better": bool(low > margin),
    }


def promote(
    source: Source, lake: str, number: int | None = None, force: bool = False, reason: str = ""
) -> dict[str, Any]:
    """Decide about version `number` (default: the challenger), and act.

    Raises:
        UserError: there is nothing to decide about; or it is forced without a reason.
    """
    if force and not reason.strip():
        raise UserError("--force needs --reason: it is recorded with the decision")
    client, experiment = tracking.connect(source.name)
    challenger = find(client, source.name, CHALLENGER, number)
    _refuse_refit(client, challenger)
    champion = _champion(client, source.name)
    if champion is not None and champion.version == challenger.version:
        # (As when a task that has decided is run again: it is no second decision.)
        serve(client, source.name, champion.version)
        return {
            "action": "champion already",
            "source": source.name,
            "checks": {},
            "reason": None,
            "challenger": challenger.version,
            "champion": None,
        }
    decision: dict[str, Any] = {
        "action": "forced" if force else "promoted",
        "source": source.name,
        "challenger": challenger.version,
        "champion": champion and champion.version,
        "reason": reason.strip() or None,
        "checks": {},
    }
    if not force:
        decision |= _weighed(client, experiment, source, lake, challenger, champion)
    if decision["action"] != "refused":
        _crown(client, source.name, challenger.version, champion)
    return _recorded(client, experiment, challenger, decision)


def _refuse_refit(client: MlflowClient, model: Registered) -> None:
    of = client.get_model_version(model.name, model.version).tags.get(REFIT_OF)
    if of is not None:
        raise UserError(
            f"version {model.version} of {model.name} is a refit of version {of}, trained on everything: "
            f"nothing is held out from it. The gate decides about recipes: --model-version {of}"
        )


def rollback(source: Source, reason: str) -> dict[str, Any]:
    """Give the alias back to the champion before this one.

    Raises:
        UserError: no reason, or there was none before.
    """
    if not reason.strip():
        raise UserError("rollback needs --reason: it is recorded")
    client, experiment = tracking.connect(source.name)
    champion = _champion(client, source.name)
    before = _before(client, source.name)
    if champion is None or not before:
        raise UserError(
            f"the registered model {source.name!r} has had no champion before "
            f"{'this one' if champion else 'and has none now'}: there is nothing to go back to"
        )
    there = {str(number) for number in versions_of(client, source.name)}
    gone = [version for version in before if str(version) not in there]
    before = [version for version in before if str(version) in there]
    if not before:
        raise UserError(
            f"the champions of {source.name!r} before this one, version {', '.join(map(str, gone))}, "
            "have been deleted: promote another with --force"
        )
    earlier = find(client, source.name, CHAMPION, int(before[-1]))
    # The alias first: killed in between, another rollback changes nothing and reports it.
    client.set_registered_model_alias(source.name, CHAMPION, earlier.version)
    serve(client, source.name, earlier.version)
    client.set_registered_model_tag(source.name, BEFORE, json.dumps(before[:-1]))
    decision = {
        "action": "rolled back",
        "source": source.name,
        "challenger": earlier.version,
        "champion": champion.version,
        "reason": reason.strip(),
        "checks": {},
    }
    return _recorded(client, experiment, earlier, decision)


# -- the decision ---------------------------------------------------------------------------------


def _weighed(
    client: MlflowClient,
    experiment: str,
    source: Source,
    lake: str,
    challenger: Registered,
    champion: Registered | None,
) -> dict[str, Any]:
    """Both models by user (`models/selection/pairs.py`), and every check."""
    one = _loaded(client, challenger)
    other = None if champion is None else (champion, _loaded(client, champion))
    held = pair(client, source, lake, (challenger, one), other)
    users, gate = len(held.ours_U), source.gate
    checks: dict[str, Any] = {}
    if users >= gate.min_users:
        trainings = _trainings(client, experiment, challenger)
        verdict = judge(held.ours_U, held.theirs_U, trainings, gate.margin)
        checks["better"] = {"holds": verdict["better"], **verdict}
    else:
        checks["better"] = {"holds": False, "users": users, "min_users": gate.min_users}
    checks["audit"] = _audited(lake, source.name, held.table_version)
    checks["coverage"] = {
        "holds": held.coverage >= gate.min_coverage,
        "coverage@10": held.coverage,
        "at_least": gate.min_coverage,
    }
    checks["latency"] = latency(one.stored, gate.max_latency_ms)
    checks["served"] = served(source, lake, challenger)
    decision = {
        "action": "promoted" if all(c["holds"] for c in checks.values()) else "refused",
        "checks": checks,
        "challenger_method": one.called,
        "against": held.against,
        "target": one.stored.facts["target"],
        "table_version": held.table_version,
        "cut": held.cut,
        "asked_of_one_only": held.alone,
        BY: {
            "challenger": float(held.ours_U.mean()) if users else None,
            "against": float(held.theirs_U.mean()) if users else None,
        },
    }
    if held.judged_anew_s is not None:
        decision["judged_anew_s"] = held.judged_anew_s
    return decision


def _loaded(client: MlflowClient, model: Registered) -> Contender:
    with tracking.downloaded(client, model.run_id, "trained") as folder:
        stored = load(folder)
    return Contender(f"{stored.facts['method']} ({model.uri})", stored)


def _trainings(client: MlflowClient, experiment: str, model: Registered) -> int:
    """Of how many trainings the challenger is the best: all of its comparison."""
    comparison = client.get_run(model.run_id).data.tags.get(tracking.COMPARISON)
    if comparison is None:
        return 1
    return len(tracking.runs(client, experiment, kind="train", comparison=comparison))


def served(source: Source, lake: str, model: Registered) -> dict[str, Any]:
    """Whether the registered model, asked through its pyfunc, gives what its training recorded of
    some whole users; `models verify` asks about all."""
    from models.selection.verify import verify

    try:
        told = verify(source, lake, number=int(model.version), most=ASKED, most_users=SERVED)
    except UserError as error:
        return {"holds": False, "why": str(error)}
    names = (
        "holds", "exact", "questions", "users", "left_out", "lists_differ", "lists_wrong",
        "refused", "refusal", "largest_difference", "same_machine", "table_version",
        "silver_version",
    )  # fmt: skip
    return {name: told[name] for name in names} | {BY: told["metrics"].get(BY)}


def _audited(lake: str, source: str, version: int) -> dict[str, Any]:
    """Whether `ops.runs` has a run that ended well and published this version, or the newest one
    before it that has rows moved (packing files makes versions, too)."""
    wanted = moved(lake, source, version)
    made = [run["run_id"] for run in publishers(runs_of(lake, source), wanted)]
    return {"holds": bool(made), "gold.sequences": wanted, "published_by": made}


def latency(stored: Stored, most_ms: float) -> dict[str, Any]:
    """One user at a time, in process: half a hundred known items as raw events.

    What else the machine does meanwhile can only add to it, so where a round is too slow there are
    two more, and the best one counts: a slow model is slow in all of them.
    """
    rounds: list[tuple[float, float]] = []
    while len(rounds) < ROUNDS and not any(p99 <= most_ms for p99, _ in rounds):
        spent = _asked(stored)
        rounds.append((float(np.percentile(spent, 99)), float(np.median(spent))))
    p99, p50 = min(rounds)
    return {
        "holds": p99 <= most_ms,
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "at_most_ms": most_ms,
        "rounds": len(rounds),
    }


def _asked(stored: Stored) -> list[float]:
    """Milliseconds of each answer, once warm."""
    import pandas as pd

    dice = np.random.default_rng(11)
    ids = np.array(stored.item_ids, dtype=object)
    spent = []
    for number in range(TIMED + 10):
        items = ids[dice.integers(len(ids), size=50)]
        when = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.arange(50) * 300, "s")
        frame = pd.DataFrame({"user_id": f"u{number}", "item_id": items, "event_ts": when})
        began = time.perf_counter()
        recommend(stored, frame, 10)
        spent.append(1000 * (time.perf_counter() - began))
    return spent[10:]


# -- the registry ---------------------------------------------------------------------------------


def _champion(client: MlflowClient, name: str) -> Registered | None:
    return find(client, name, CHAMPION) if CHAMPION in (aliases_of(client, name) or {}) else None


def _before(client: MlflowClient, name: str) -> list[str]:
    if aliases_of(client, name) is None:
        return []  # no such model
    found: list[str] = json.loads(client.get_registered_model(name).tags.get(BEFORE, "[]"))
    return found


def _crown(client: MlflowClient, name: str, version: str, champion: Registered | None) -> None:
    """Remember the champion, then move the alias: killed in between, nobody serves another model,
    and the same command continues."""
    before = _before(client, name)
    if champion is not None and before[-1:] != [champion.version]:
        client.set_registered_model_tag(name, BEFORE, json.dumps([*before, champion.version]))
    client.set_registered_model_alias(name, CHAMPION, version)
    serve(client, name, version)


def _recorded(
    client: MlflowClient, experiment: str, model: Registered, decision: dict[str, Any]
) -> dict[str, Any]:
    """The decision as a run with its artefact, and a tag of the version."""
    tags = {tracking.KIND: "gate", "action": decision["action"], "version": model.version}
    title = f"gate: version {model.version} {decision['action']}"
    run_id = client.create_run(experiment, run_name=title, tags=tags).info.run_id
    decision |= {"mlflow_run_id": run_id, "model": model.name}
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        file = Path(folder) / "gate.json"
        file.write_text(json.dumps(decision, indent=1))
        client.log_artifact(run_id, str(file))
    client.set_terminated(run_id, "FINISHED")
    words = in_words(decision)
    client.set_model_version_tag(model.name, model.version, "gate", decision["action"])
    client.set_model_version_tag(model.name, model.version, "gate_says", words[:5000])
    client.set_model_version_tag(model.name, model.version, "gate_run", run_id)
    return decision


def in_words(decision: dict[str, Any]) -> str:
    """A decision as a person reads it."""
    model = f"models:/{decision['source']}/{decision['challenger']}"
    of = f", champion was version {decision['champion']}" if decision["champion"] else ""
    verb = "is the" if decision["action"] == "champion already" else "was"
    said = f"{model} {verb} {decision['action']}{of}"
    if decision["reason"]:
        said += f", because: {decision['reason']}"
    checks = decision["checks"]
    if not checks:
        return f"{said}."
    anew = decision.get("judged_anew_s")
    anew = "" if anew is None else f" (re-evaluated on the same nights in {anew:.0f} s)"
    better = checks["better"]
    parts = [
        f"NDCG@10 {better['difference']:+.4f} [{better['low']:+.4f}, {better['high']:+.4f}] at level "
        f"{better['level']:.4f} (best of {better['trainings']} trainings) over {better['users']:,} "
        f"users against {decision['against']}{anew}, must exclude {better['margin']:g}"
        if "low" in better
        else f"only {better['users']} users to compare on, gate.min_users = {better['min_users']}",
        "the audit of gold.sequences version {} was green".format(checks["audit"]["gold.sequences"])
        if checks["audit"]["holds"]
        else f"no run of ops.runs that ended well published gold.sequences version "
        f"{checks['audit']['gold.sequences']}: python -m jobs run publishes one",
        f"coverage@10 {checks['coverage']['coverage@10']:.3f}, at least "
        f"{checks['coverage']['at_least']:g}",
        f"latency p99 {checks['latency']['p99_ms']:.1f} ms, at most "
        f"{checks['latency']['at_most_ms']:g}",
    ]
    names = ["better", "audit", "coverage", "latency"]
    if "served" in checks:  # (decisions before it was a check have none)
        names.append("served")
        parts.append(_served_in_words(checks["served"]))
    marks = ["holds" if checks[name]["holds"] else "DOES NOT HOLD" for name in names]
    lines = [f"  {mark}: {part}" for mark, part in zip(marks, parts, strict=True)]
    return "\n".join([f"{said}.", *lines])


def _served_in_words(check: dict[str, Any]) -> str:
    if "why" in check:
        return f"what is served could not be compared with what was scored: {check['why']}"
    if check["refused"]:
        return (
            f"the registered model refused {check['refused']:,} of {check['questions']:,} "
            f"questions: {check['refusal']}"
        )
    return (
        f"the registered model was asked {check['questions']:,} questions of {check['users']:,} "
        f"users: metrics differ by {check['largest_difference']:.1e} at most, "
        f"{check['lists_differ']:,} lists differ, {check['lists_wrong']:,} by more than rounding"
    )
