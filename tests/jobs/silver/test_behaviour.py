"""`[bots] events_per_minute`, `events_without_pause`: sessions of programs, from a log to gold."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from pyspark.sql import functions as F

from expectations.behaviour_rule import MINUTE_US
from jobs.core.errors import AuditFailed, RuleChanged
from jobs.core.plan import Thresholds
from jobs.core.tables import SEQUENCES, SESSIONS
from jobs.silver import checks, sessionize
from tests.expectations.test_behaviour_rule import RULES, flat
from tests.jobs.audit.test_batch_checks import spoiled
from tests.support.oracle import behaviour_of
from tests.support.spark_tools import CLICKS, Workshop

T = 1_700_000_000
BOTS = "[bots]\nevents_per_minute = 4\nevents_without_pause = 6\npause_s = 60\n"
PACES = {"person": (5, 300), "fast": (5, 10), "steady": (7, 60), "slow": (7, 61), "both": (9, 3)}
"""By user: how many events, and how many seconds from one to the next."""
FLAGS = {"person": None, "fast": "rate", "steady": "no_pause", "slow": None, "both": "rate"}


def log(paces: dict[str, tuple[int, int]], start: int = T) -> str:
    rows = [
        f"{user},i{n},{start + n * step}"
        for user, (count, step) in paces.items()
        for n in range(count)
    ]
    return "\n".join(["user,item,ts", *rows]) + "\n"


def flags(shop: Workshop) -> dict[str, str | None]:
    return {row["user_id"]: row["runaway"] for row in shop.rows(SESSIONS)}


def users(shop: Workshop) -> set[str]:
    return {row["user_id"] for row in shop.rows(SEQUENCES)}


@pytest.mark.slow
def test_sessions_of_programs_are_flagged_and_left_out_of_gold(spark: Any, tmp_path: Path) -> None:
    shop = Workshop(spark, tmp_path, CLICKS + BOTS)
    shop.land("a.csv", log(PACES))
    assert shop.run().runaways == 3 and flags(shop) == FLAGS
    assert users(shop) == {"person", "slow"}

    # Late events make a person's session a program's. What the night made is audited in Arrow, and
    # by the suite in Spark, which refuses any other flag.
    shop.land("b.csv", log({"slow": (6, 61)}, T + 30))
    shop.run("ingest")
    candidate = sessionize.compute(shop.context(batch="night"))
    sessionize.audit(shop.context(batch="night"), candidate)
    hold = checks.SessionsHold(shop.source.sessions.session_rule, str(tmp_path / "bounds"))
    shop.thresholds = Thresholds(compared_sessions=-1)
    context = shop.context(batch="night")
    sessionize.audit(context, candidate)
    [path] = candidate.files("sessions")
    for wrong in (None, "rate", "hours"):
        with spoiled([path], lambda rows, flag=wrong: rows[0].update(runaway=flag)):
            assert not hold(path)[0]["holds"]
            with pytest.raises(AuditFailed, match="runaways_are_flagged"):
                sessionize.audit(context, candidate)
    assert hold(path)[0]["holds"]
    shop.run()
    assert flags(shop) == FLAGS | {"slow": "no_pause"} and users(shop) == {"person"}
    # Another rule, other sessions: nothing is touched before a person says so.
    shop.describe(CLICKS + BOTS.replace("= 6", "= 13"))
    with pytest.raises(RuleChanged, match=r"events_without_pause.*--rebuild"):
        shop.run()
    result = shop.run(options={"rebuild": True})
    assert result.sessions_changed == 2 and flags(shop) == FLAGS | {"steady": None}
    assert users(shop) == {"person", "slow", "steady"}


def test_the_rule_as_sql_flags_what_another_engine_does(spark: Any) -> None:
    draw = random.Random(7)
    steps = (0, 1, 20_000_000, 20_000_001, 30_000_000, MINUTE_US - 1, MINUTE_US)
    sessions = [draw.choices(steps, k=draw.randrange(12)) for _ in range(400)]
    times, count = flat(sessions)
    parts = np.split(times, np.cumsum(count)[:-1])
    rows = [(at, [int(one) for one in part]) for at, part in enumerate(parts)]
    frame = spark.createDataFrame(rows, "n int, us array<bigint>").withColumn(
        "events", F.expr("transform(us, t -> named_struct('event_ts', timestamp_micros(t)))")
    )
    named = {name: F.expr(rule.sql("events")).alias(name) for name, rule in RULES.items()}
    found = frame.orderBy("n").select(*named.values()).toArrow()
    with duckdb.connect() as db:
        for name, rule in RULES.items():
            wanted = behaviour_of(db, times, count, vars(rule))
            assert found[name].to_pylist() == wanted
            assert len(set(wanted)) > 1
