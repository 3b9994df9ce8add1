"""Runs jobs step by step: compute, audit, publish; again where another run was faster.

Decision 3 in docs/design/decisions.md.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from jobs.bronze import ingest, replay_filtered, replay_rejects
from jobs.core.errors import Conflict, InputChanged
from jobs.core.tables import EVENTS, ITEMS, RECOMMENDATIONS, RUNS, SEQUENCES, SESSIONS, Table
from jobs.gold import items, sequences
from jobs.lake import filesystem
from jobs.lake.context import Candidate, Context, Result
from jobs.ops import drift
from jobs.pipeline import published
from jobs.recommend import lists, score
from jobs.silver import sessionize

MODULES: dict[str, tuple[ModuleType, Table]] = {
    "ingest": (ingest, EVENTS),
    "sessionize": (sessionize, SESSIONS),
    "items": (items, ITEMS),
    "sequences": (sequences, SEQUENCES),
}
OTHERS: dict[str, tuple[ModuleType, Table]] = {
    "replay-rejects": (replay_rejects, EVENTS),
    "replay-filtered": (replay_filtered, EVENTS),
    "score": (score, RECOMMENDATIONS),
}
ATTEMPTS = 3


def run_job(context: Context, job: str, step: str, options: dict[str, Any]) -> Result:
    """Run one job, or all of them, and record it in `ops.runs`.

    Raises:
        SessionmillError: what went wrong; recorded too.
    """
    result = Result()
    with recorded(context, job, step, result):
        if job == "run":
            for name in MODULES:
                began = time.monotonic()
                print(f"  {name}: started", flush=True)
                part = made_in_turn(context, name, options)
                print(f"  {name}: {time.monotonic() - began:.1f} s", flush=True)
                result.add(part)
        elif job == "drift":
            result.add(drift.look(context))
        elif job == "lists":
            result.add(lists.judge(context))
        elif job == "validate":
            result.add(published.validate_tables(context, options.get("table")))
        else:
            result.add(one_job(context, job, step, options))
    return result


@contextlib.contextmanager
def recorded(context: Context, job: str, step: str, result: Result) -> Iterator[None]:
    """A row of `ops.runs` around what is done inside: put at the start, and again at the end."""
    began = time.monotonic()
    record(context, job, step, result, 0.0, "running")
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # what went wrong is worth more than its record
            said = (type(error).__name__, str(error)[:10_000])
            record(context, job, step, result, time.monotonic() - began, *said)
        raise
    record(context, job, step, result, time.monotonic() - began, "ok")


def made_in_turn(context: Context, name: str, options: dict[str, Any]) -> Result:
    """One job of a run; where others changed its input meanwhile, that is made anew first."""
    result = Result()
    for _ in MODULES:
        try:
            result.add(one_job(context, name, "all", options))
            return result
        except InputChanged as error:
            print(f"{name}: {error}", flush=True)
            result.add(one_job(context, error.job, "all", {}))
    raise Conflict(f"other writers keep changing the inputs of {name}: run it again")


def one_job(context: Context, job: str, step: str, options: dict[str, Any]) -> Result:
    module, table = (MODULES | OTHERS)[job]
    candidate = context.candidate(table)

    def compute() -> Candidate:
        given = {name: options[name] for name in getattr(module, "OPTIONS", ()) if name in options}
        made: Candidate = module.compute(context, **given)
        return made

    if step == "compute":
        compute()
        return Result()
    if step == "audit":
        audit(module, context, candidate)
        return Result()
    if step == "publish" and not candidate.finished:
        done = published_before(context, job)
        if done is not None:
            return done
    for attempt in range(1, ATTEMPTS + 1):
        if step == "all" or attempt > 1:
            candidate = compute()
            audit(module, context, candidate)
        try:
            result: Result = module.publish(context, candidate)
        except Conflict as conflict:
            if attempt == ATTEMPTS:
                raise Conflict(
                    f"{conflict}; computed {ATTEMPTS} times, and another run was first each time. Run it again when the "
                    "other run has ended"
                ) from conflict
            print(f"{conflict}: computing again ({attempt + 1} of {ATTEMPTS})", flush=True)
            continue
        if step == "all":
            candidate.remove()
        return result
    raise AssertionError("unreachable")


def published_before(context: Context, job: str) -> Result | None:
    """What this batch's publish said, if it ran to its end and only its caller never heard."""
    answer = context.lake.folder("_runs", context.batch) + f"/{job}.publish.json"
    if not filesystem.exists(answer):
        return None
    said = json.loads(filesystem.read_text(answer))
    print(f"{job}: this batch was published before", flush=True)
    return Result(
        **{name: said.get(name, 0) for name in Result.COUNTS},
        rejects=said["rejects"],
        filtered=said.get("filtered", {}),
        tables=said["tables"],
        notes=said["notes"],
    )


def audit(module: ModuleType, context: Context, candidate: Candidate) -> None:
    if hasattr(module, "audit"):
        module.audit(context, candidate)


def record(
    context: Context, job: str, step: str, result: Result, seconds: float, outcome: str,
    message: str | None = None,
) -> None:  # fmt: skip
    """One row of `ops.runs`, put at the start and again at the end: a run that stays `running`
    was killed (or runs still)."""
    lake = context.lake
    lake.create(RUNS)
    left_out = {f"filtered_{reason}": count for reason, count in result.filtered.items()}
    counts = result.counts() | {"filtered": sum(left_out.values())} | left_out
    row = (
        context.run_id, context.batch, job, step, context.source.name, context.day,
        context.started, seconds, outcome, message, list(counts.items()),
        list(result.rejects.items()), list(result.tables_in.items()),
        [(name, one["version"]) for name, one in result.tables.items()], result.files,
        [*((name, plan.in_words()) for name, plan in context.plans.items()),
         *context.lists.items()],
    )  # fmt: skip
    lake.put_small(RUNS, [row])
