"""Backtests in the registry: what is served of them, and what the gate compares."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from jobs.core.source_file import load_source
from models.experiments.results import age_table
from models.registry import tracking
from models.registry.forget import forget
from models.registry.register import find
from models.selection import pairs
from models.selection.gate import _loaded, in_words
from models.selection.questions import loaded_here
from models.selection.verify import verify
from tests.support.nights_world import ASKED, nights_at, say
from tests.support.recorded import World


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with nights_at(tmp_path_factory.mktemp("nights")) as there:
        yield there


def test_the_last_nights_model_is_registered_and_serves_what_was_scored(nights: World) -> None:
    for method in ("personal_top", "gru4rec"):
        nights.train(method, "--comparison", "served", *ASKED)
    status, outcome, said, err = say(nights, "compare", "--comparison", "served")
    assert status == 0 and outcome is not None, err
    assert (
        "cut nightly, 3 nights" in said
        and "by age of the item: first seen that night 0.0000" in said
    )
    rows = {row["method"]: row for row in outcome["methods"]}
    assert set(rows["gru4rec"]["by_age"]) == {"born_that_night", "born_in_7_days", "older"}
    assert len(rows["gru4rec"]["by_night"]) == 3
    assert say(nights, "register", "--comparison", "served")[0] == 0
    source = load_source(str(nights.source))
    for version in (1, 2):
        told = verify(source, str(nights.lake), number=version, opened=loaded_here)
        assert told["holds"] and told["questions"] == told["questions_of_the_test"] > 0
        [night] = [r["by_night"][-1] for r in rows.values() if r["method"] == told["method"]]
        assert (told["questions"], told["users"]) == (night["targets"], night["users"])
        assert told["metrics"]["ndcg@10"]["stored"] == pytest.approx(night["ndcg@10"])
        assert told["metrics"]["coverage@10"]["holds"]
    run_id = rows["gru4rec"]["mlflow_run_id"]
    status, again, _, err = say(nights, "evaluate", "--run-id", run_id)
    assert status == 0 and again is not None, err
    last = rows["gru4rec"]["by_night"][-1]
    assert again["cut"]["nights"] == 1 and again["cut"]["test_from"].startswith(last["night"])
    assert again["metrics"]["ndcg@10"]["value"] == pytest.approx(last["ndcg@10"])


def held(nights: World, challenger: int, champion: int | None) -> pairs.Pair:
    client, _ = tracking.connect("toy")
    both = [
        None
        if number is None
        else (model := find(client, "toy", "", number), _loaded(client, model))
        for number in (challenger, champion)
    ]
    assert both[0] is not None
    source = load_source(str(nights.source))
    return pairs.pair(client, source, str(nights.lake), both[0], both[1])


@pytest.mark.slow
def test_the_gate_compares_recipes_over_all_nights(
    nights: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was judged on the same nights counts as it was recorded, any other is judged anew."""
    numbers = {}
    for name, split in (("same", ASKED), ("older", ("--split", "temporal"))):
        for method in ("recent_pop", "gru4rec"):
            nights.train(method, "--comparison", f"gate {name}", *split)
        assert say(nights, "compare", "--comparison", f"gate {name}")[0] == 0
        _, done, _, _ = say(nights, "register", "--comparison", f"gate {name}")
        assert done is not None
        numbers |= {(name, one["method"]): one["version"] for one in done["versions"]}
    ours = numbers["same", "gru4rec"]
    recorded = held(nights, ours, numbers["same", "recent_pop"])
    assert recorded.judged_anew_s is None and recorded.alone == 0
    assert recorded.cut["split"] == "nightly" and recorded.cut["nights"] == 3
    anew = held(nights, ours, numbers["older", "recent_pop"])
    assert anew.judged_anew_s is not None and anew.judged_anew_s > 0
    assert np.array_equal(anew.theirs_U, recorded.theirs_U)
    assert np.array_equal(anew.ours_U, recorded.ours_U)
    trained = held(nights, ours, numbers["older", "gru4rec"])
    assert np.array_equal(trained.theirs_U, trained.ours_U), "the same recipe on the same nights"
    alone = held(nights, ours, None)
    assert alone.against.startswith("personal_top") and alone.judged_anew_s is not None
    status, decision, said, err = say(nights, "promote", "--model-version", str(ours))
    assert status == 0 and decision is not None, err
    assert decision["action"] == "refused" and decision["checks"]["better"]["users"] == 30
    assert decision["cut"] == {**recorded.cut} and decision["judged_anew_s"] > 0
    assert decision["checks"]["served"]["holds"] and decision["checks"]["served"]["exact"]
    assert decision["ndcg@10"]["against"] == pytest.approx(float(alone.theirs_U.mean()))
    said = in_words({
        "source": "toy", "challenger": "1", "champion": "2", "action": "refused", "reason": None,
        "against": "x", "judged_anew_s": 3.2,
        "checks": {
            "better": {"holds": False, "difference": 0, "low": 0, "high": 0, "level": 0.9,
                       "trainings": 1, "users": 9, "margin": 0},
            "audit": {"holds": True, "gold.sequences": 0}, "latency": {"holds": True, "p99_ms": 1,
            "at_most_ms": 2}, "coverage": {"holds": True, "coverage@10": 1, "at_least": 0},
        },
    })  # fmt: skip
    assert "against x (re-evaluated on the same nights in 3 s)" in said


def test_the_page_and_the_tables_have_ages_and_a_person_leaves_the_scores(nights: World) -> None:
    done = nights.train("pop", "--comparison", "shown", *ASKED)
    assert say(nights, "compare", "--comparison", "shown")[0] == 0
    page = nights.root / "page.html"
    status, _, said, err = say(nights, "report", "--comparison", "shown", "--out", str(page))
    assert status == 0, said + err
    text = page.read_text()
    row = re.search(r'id="ages".*?<tr><td>pop</td>(.*?)</tr>', text, re.DOTALL)
    assert row is not None and "nightly, 3 nights" in text
    cells = re.findall(r"<td>(.*?)</td>", row[1])
    ages = done["by_age"].values()
    assert cells[1::2] == [f"{part['counts']['targets']:,}" for part in ages]
    assert cells[0] == "0.0000"

    client, experiment = tracking.connect("toy")
    outcome = tracking.runs(client, experiment, kind="compare", comparison="shown")[0]
    with tracking.downloaded(client, outcome.info.run_id, "compare.json") as file:
        table = age_table({"comparison": tracking.read_json(file)})
    assert table.splitlines()[0].endswith(
        "| first seen that night | first seen in the week before | older |"
    )
    assert f"{done['by_age']['older']['metrics']['ndcg@10']['value']:.4f} (" in table

    assert forget("toy", lambda _: False, "u003", "somebody") > 0
    with tracking.downloaded(client, done["mlflow_run_id"], "evaluation") as folder:
        for name in ("per_user.npz", "per_user_last_night.npz"):
            with np.load(folder / name) as arrays:
                asked = {n: set(arrays[n]) for n in arrays.files if n.endswith("user_id")}
            assert "somebody" in asked["user_id"] and not any("u003" in s for s in asked.values())
