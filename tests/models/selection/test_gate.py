"""The gate: closed by default, open for what is really better, and never by luck."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from jobs.core.tables import RUNS
from jobs.lake.delta import Lake
from models.registry import tracking
from models.selection import gate
from models.selection.gate import judge
from tests.support.recorded import World, file_of_version

USERS, DRAWS = 300, 4000


def scores(dice: np.random.Generator, mean: float) -> np.ndarray:
    """NDCG of users: most have none, some a little, as on real logs."""
    return np.where(dice.random(USERS) < 2 * mean, dice.random(USERS), 0.0)


@pytest.mark.long
def test_wrong_promotions_are_rare() -> None:
    """200 gates each, the challenger the best of ten trainings on the very users that decide."""
    dice = np.random.default_rng(20261125)
    opened = {"equal": 0, "worse": 0, "better": 0, "equal, luck not counted": 0}
    for _ in range(200):
        champion = scores(dice, 0.1)
        for kind, mean in (("equal", 0.1), ("worse", 0.07), ("better", 0.2)):
            tried = [scores(dice, mean) for _ in range(10)]
            best = max(tried, key=lambda one: float(one.mean()))
            opened[kind] += judge(best, champion, 10, 0.0, DRAWS)["better"]
            if kind == "equal":
                alone = judge(best, champion, 1, 0.0, DRAWS)["better"]
                opened["equal, luck not counted"] += alone
    assert opened["equal"] <= 10 and opened["worse"] == 0, opened
    assert opened["better"] >= 190, opened
    assert opened["equal, luck not counted"] > 10, "the correction is what keeps it rare"


def test_a_margin_must_be_excluded() -> None:
    ours, theirs = np.full(USERS, 0.5), np.full(USERS, 0.4)
    assert judge(ours, theirs, 1, 0.05)["better"] and not judge(ours, theirs, 1, 0.2)["better"]
    assert not judge(ours, ours, 1, 0.0)["better"], "an equal one is not better"


def test_a_busy_machine_is_given_three_rounds_and_a_slow_model_stays_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(*rounds: float) -> dict[str, Any]:
        left = iter(rounds)
        monkeypatch.setattr(gate, "_asked", lambda _: [next(left)] * 200)
        answer: dict[str, Any] = gate.latency(None, 50.0)  # type: ignore[arg-type]
        return answer

    assert measured(20.0) == {
        "holds": True, "p50_ms": 20.0, "p99_ms": 20.0, "at_most_ms": 50.0, "rounds": 1
    }  # fmt: skip
    assert measured(80.0, 30.0)["holds"] and measured(80.0, 30.0)["p99_ms"] == 30.0
    slow = measured(80.0, 60.0, 70.0)
    assert not slow["holds"] and (slow["p99_ms"], slow["rounds"]) == (60.0, 3)


def command(world: World, *words: str) -> tuple[int, dict[str, Any] | None, str, str]:
    return world.run(words[0], "--source", str(world.source), "--json", *words[1:])


def a_run_published(world: World, version: int) -> None:
    """As a night leaves it: a run that ended well, audit and all."""
    lake = Lake(lambda: pytest.fail("no JVM is needed"), str(world.lake), "toy")
    lake.create(RUNS)
    row = ("r1", "b1", "run", "all", "toy", None, datetime(2024, 1, 1, tzinfo=UTC), 1.0, "ok", None,
           [], [], [], [("gold.sequences", version)], [], None)  # fmt: skip
    lake.put_small(RUNS, [row])


@pytest.mark.slow
def test_the_gate(world: World) -> None:
    world.source.write_text(
        world.source.read_text() + "[gate]\nmin_users = 20\nmax_latency_ms = 2000\n"
    )
    for words in (("promote",), ("rollback", "--reason", "none yet")):
        status, _, _, err = command(world, *words)
        assert status == 1 and (
            "no model 'toy' is registered" in err or "nothing to go back" in err
        )
    for method, seed in (("personal_top", 1), ("gru4rec", 1), ("gru4rec", 2)):
        world.train(method, "--comparison", "gate", "--seed", str(seed), "--epochs", "12")
    assert command(world, "compare", "--comparison", "gate")[0] == 0
    status, done, _, err = command(world, "register", "--comparison", "gate")
    assert status == 0 and done is not None, err
    version = {one["method"]: str(one["version"]) for one in done["versions"]}
    assert done["challenger"]["method"] == "gru4rec"
    client, experiment = tracking.connect("toy")

    def champion() -> str | None:
        aliases = dict(client.get_registered_model("toy").aliases)
        return str(aliases["champion"]) if "champion" in aliases else None

    status, done, said, _ = command(world, "promote")
    assert status == 0 and done is not None and done["action"] == "refused" and champion() is None
    assert "DOES NOT HOLD: no run of ops.runs that ended well published gold.sequences" in said
    assert done["checks"]["better"]["trainings"] == 3

    a_run_published(world, 0)
    status, done, said, err = command(world, "promote")
    assert status == 0 and done is not None and done["action"] == "promoted", said + err
    assert champion() == version["gru4rec"] and done["against"].startswith("personal_top, as there")
    better = done["checks"]["better"]
    assert better["low"] > 0 and better["level"] == pytest.approx(1 - 0.05 / 3)
    served = done["checks"]["served"]
    assert served["holds"] and served["users"] == 60 and served["lists_differ"] == 0
    assert "holds: the registered model was asked" in said
    tags = client.get_model_version("toy", version["gru4rec"]).tags
    assert tags["gate"] == "promoted" and "against personal_top" in tags["gate_says"]
    with tracking.downloaded(client, tags["gate_run"], "gate.json") as file:
        assert tracking.read_json(file)["checks"]["better"] == better

    status, done, said, _ = command(world, "promote")
    assert status == 0 and done is not None and done["action"] == "champion already"
    assert "is the champion already" in said

    # A version that serves something else than what was scored is refused for it.
    file = file_of_version(version["personal_top"], "items.json")
    whole = file.read_text()
    file.write_text(whole.replace('"i03"', '"i_3"'))
    worse = ("promote", "--model-version", version["personal_top"])
    _, done, said, _ = command(world, *worse)
    assert done is not None and not done["checks"]["served"]["holds"]
    assert "DOES NOT HOLD: the registered model was asked" in said
    file.write_text(whole)
    status, done, said, _ = command(world, *worse)
    assert status == 0 and done is not None and done["action"] == "refused"
    assert champion() == version["gru4rec"] and done["checks"]["better"]["high"] < 0
    assert client.get_model_version("toy", version["personal_top"]).tags["gate"] == "refused"

    status, _, _, err = command(world, *worse, "--force")
    assert status == 1 and "--force needs --reason" in err
    status, done, said, _ = command(world, *worse, "--force", "--reason", "a test, 'quoted'")
    assert status == 0 and champion() == version["personal_top"] and "because: a test" in said

    status, _, _, err = command(world, "rollback")
    assert status == 1 and "rollback needs --reason" in err
    status, done, _, _ = command(world, "rollback", "--reason", "it was a test")
    assert status == 0 and done is not None and done["action"] == "rolled back"
    assert champion() == version["gru4rec"]
    status, _, _, err = command(world, "rollback", "--reason", "again")
    assert status == 1 and "has had no champion before this one" in err
    # Versions that somebody has deleted in MLflow meanwhile.
    client.set_registered_model_tag("toy", gate.BEFORE, '["99"]')
    status, _, _, err = command(world, "rollback", "--reason", "again")
    assert status == 1 and "version 99, have been deleted: promote another" in err
    before = json.dumps([version["personal_top"], "99"])
    client.set_registered_model_tag("toy", gate.BEFORE, before)
    assert command(world, "rollback", "--reason", "again")[0] == 0
    assert champion() == version["personal_top"]
    told = [run.data.tags["action"] for run in tracking.runs(client, experiment, kind="gate")]
    assert told[::-1] == [
        "refused",
        "promoted",
        "refused",
        "refused",
        "forced",
        "rolled back",
        "rolled back",
    ]
