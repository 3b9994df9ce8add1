"""From gold tables to a registered model, by the commands; then asked in a fresh process.

One MLflow (SQLite and a folder) for the whole file; methods are tiny.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from jobs.core.settings import settings
from models.core.errors import UserError
from models.networks.saved_model import load
from models.registry import tracking
from tests.support.airflow_tools import local
from tests.support.gold_world import DAY, SECOND, data_of
from tests.support.recorded import SOURCE, World

real_sleep = time.sleep
METHODS = ("pop", "personal_top", "gru4rec", "gru4rec+st", "bert4rec+st")


@pytest.fixture(scope="module")
def trained(world: World) -> dict[str, dict[str, Any]]:
    done = {method: world.train(method, "--comparison", "c1", "--seed", "1") for method in METHODS}
    done["gru4rec seed 2"] = world.train("gru4rec", "--comparison", "c1", "--seed", "2")
    return done


@pytest.fixture(scope="module")
def compared(world: World, trained: dict[str, dict[str, Any]]) -> dict[str, Any]:
    status, outcome, said, err = world.run(
        "compare", "--source", str(world.source), "--comparison", "c1",
        "--expect", "pop,sasrec", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert "gru4rec+st against gru4rec" in said
    assert outcome is not None
    return outcome


@pytest.fixture(scope="module")
def registered(world: World, compared: dict[str, Any]) -> dict[str, Any]:
    status, done, _, err = world.run(
        "register", "--source", str(world.source), "--comparison", "c1", "--json"
    )
    assert status == 0, err
    assert done is not None
    return done


def test_a_training_run_says_and_records_what_it_did(
    world: World, trained: dict[str, dict[str, Any]]
) -> None:
    from models.registry import tracking

    done = trained["gru4rec+st"]
    assert done["num_params_added"] == 32
    assert done["epochs"] == 3
    assert done["table_version"] == 0
    assert done["events_per_second"] > 0
    assert done["peak_rss_mb"] > 50
    for name in ("ndcg@10", "hr@10"):
        value = done["metrics"][name]
        assert value["low"] <= value["value"] <= value["high"]
    client, _ = tracking.connect("toy")
    run = client.get_run(done["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["num_params_added"] == 32
    assert run.data.metrics["ndcg_at_10"] == pytest.approx(done["metrics"]["ndcg@10"]["value"])
    assert run.data.metrics["ndcg_at_10_low"] == pytest.approx(done["metrics"]["ndcg@10"]["low"])
    assert run.data.params["train.epochs"] == "3"
    assert run.data.params["model.request_time"] == "last_event"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    dataset = run.inputs.dataset_inputs[0].dataset
    assert dataset.name == "gold.sequences"
    assert dataset.digest == "v0"
    assert json.loads(dataset.source)["path"].endswith("toy/gold/sequences")
    assert not (world.root / "mlruns").exists()


def test_a_recorded_model_scores_the_same_again(
    world: World, trained: dict[str, dict[str, Any]]
) -> None:
    done = trained["bert4rec+st"]
    status, again, _, err = world.run(
        "evaluate", "--source", str(world.source), "--run-id", done["mlflow_run_id"], "--json"
    )
    assert status == 0, err
    assert again is not None
    assert again["metrics"]["ndcg@10"]["value"] == pytest.approx(
        done["metrics"]["ndcg@10"]["value"]
    )


def test_the_comparison(compared: dict[str, Any], trained: dict[str, dict[str, Any]]) -> None:
    rows = {row["method"]: row for row in compared["methods"]}
    assert set(rows) == set(METHODS)
    assert compared["missing"] == ["sasrec"]
    scores = [row["ndcg@10"] for row in compared["methods"]]
    assert scores == sorted(scores, reverse=True)
    assert compared["winner"] == compared["methods"][0]["method"]
    assert rows["gru4rec+st"]["vs_vanilla"]["method"] == "gru4rec"
    assert rows["gru4rec"]["vs_vanilla"] is None
    assert rows[compared["winner"]]["vs_winner"] is None
    assert rows["pop"]["vs_winner"]["verdict"] == "worse"
    assert rows["pop"]["vs_winner"]["high"] < 0
    counted = max(("pop", "personal_top"), key=lambda name: rows[name]["ndcg@10"])
    for name, row in rows.items():
        if row["vs_baseline"] is None:
            assert name in ("pop", "personal_top") and row["recommended"] is None
        else:
            assert row["vs_baseline"]["method"] == counted
            assert row["recommended"] == (row["vs_baseline"]["low"] > 0)
    two = [trained["gru4rec"], trained["gru4rec seed 2"]]
    best = max(two, key=lambda done: done["validation_ndcg@10"])
    assert rows["gru4rec"]["mlflow_run_id"] == best["mlflow_run_id"]
    assert rows["gru4rec"]["seeds"] == 2


def test_what_was_asked_differently_is_not_compared(
    world: World, trained: dict[str, dict[str, Any]]
) -> None:
    one = world.train("pop", "--comparison", "mixed")
    other = world.train("personal_top", "--comparison", "mixed", "--test-from", "1970-01-09")
    status, _, _, err = world.run("compare", "--source", str(world.source), "--comparison", "mixed")
    assert status == 1
    assert "cut of" in err
    assert one["mlflow_run_id"] in err
    assert other["mlflow_run_id"] in err


def test_twice_is_once(world: World, compared: dict[str, Any], registered: dict[str, Any]) -> None:
    from models.registry import tracking

    args = ("--source", str(world.source), "--comparison", "c1", "--json")
    again = world.run("compare", *args)[1]
    assert again is not None
    assert again["mlflow_run_id"] == compared["mlflow_run_id"]
    second = world.run("register", *args)[1]
    assert second is not None
    assert [v["version"] for v in second["versions"]] == [
        v["version"] for v in registered["versions"]
    ]
    assert not any(v["new"] for v in second["versions"])
    client, _ = tracking.connect("toy")
    versions = client.search_model_versions("name = 'toy'")
    assert len(versions) == len(METHODS)
    tags = {v.tags["method"]: v.tags for v in versions}
    assert set(tags) == set(METHODS)
    assert tags["gru4rec+st"]["table_version"] == "0"
    assert json.loads(tags["pop"]["cut"])["split"] == "temporal"
    challenger = client.get_model_version_by_alias("toy", "challenger")
    assert challenger.tags["method"] == compared["winner"]


FRESH = """
import json, sys

class Absent:
    # A serving machine has none of these (MLflow itself imports pyspark where it can).
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jobs", "models", "pyspark", "delta", "airflow", "deltalake"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import pandas as pd
import mlflow, mlflow.pyfunc
mlflow.set_tracking_uri(sys.argv[1])
utc = lambda texts: pd.to_datetime(texts, format="ISO8601")
told = {}
for version in json.loads(sys.argv[2]):
    model = mlflow.pyfunc.load_model(f"models:/toy/{version}")
    ask = lambda frame, **params: model.predict(frame, params=params)
    def refused(frame):
        try:
            return ask(frame)["items"].tolist()
        except ValueError as error:
            return str(error)
    story = pd.DataFrame({
        "user_id": ["bob", "ann", "bob", "ann", "new", "odd"],
        "item_id": ["i03", "i08", "i04", "i07", None, "never seen"],
        "event_ts": utc(["2024-01-01T10:00", "2024-01-01T10:01", "2024-01-01T10:01",
                         "2024-01-01T10:00", None, "2024-01-01T10:00"]),
    })
    answer = ask(story, k=3)
    nobody = story[story.user_id == "new"]
    one = story[story.user_id == "ann"]
    thousand = pd.DataFrame({
        "user_id": "ann", "item_id": [f"i{i % 15:02d}" for i in range(1000)],
        "event_ts": pd.date_range("2024-01-01", periods=1000, freq="min"),
    })
    sessions = one.assign(source_session_id=["b", "a"], value=[1.0, None], event_type="x")
    told[version] = {
        "answer": answer.to_dict("records"),
        "all": ask(one, k=100).to_dict("records"),
        "sorted": ask(one.sort_values("event_ts"), k=3).to_dict("records"),
        "nobody": ask(nobody, k=3).to_dict("records"),
        "empty": [list(ask(story[:0]).columns), len(ask(story[:0]))],
        "thousand": ask(thousand, k=2).to_dict("records"),
        "native": ask(sessions, k=2).to_dict("records"),
        "zoned": ask(one.assign(event_ts=one.event_ts.dt.tz_localize("UTC")), k=3)
            .to_dict("records"),
        "elsewhere": ask(one.assign(
            event_ts=one.event_ts.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")), k=3)
            .to_dict("records"),
        "texts": ask(one.assign(event_ts=["2024-01-01T10:01:00", "2024-01-01T19:00+09:00"]), k=3)
            .to_dict("records"),
        "ties": ask(one.assign(tie_break=[2, None], value=[1, 2]), k=3).to_dict("records"),
        "far": ask(one.assign(event_ts=["9999-12-31T10:01", "0001-01-01T00:00Z"]), k=3)
            .to_dict("records"),
        "bare": len(ask(pd.DataFrame({"user_id": [], "item_id": [], "event_ts": []}))),
        "nothing": ask(pd.DataFrame(
            {"user_id": ["x"], "item_id": [float("nan")], "event_ts": [float("nan")]}
        ), k=3).to_dict("records"),
        "wrong": [refused(one.assign(**wrong)) for wrong in (
            {"item_id": [1.0, 2.0]}, {"user_id": 7}, {"tie_break": ["a", "b"]}, {"event_ts": 5},
            {"event_ts": "soon"},
        )],
        "late": ask(one, k=2, request_ts="2030-01-01T00:00:00Z").to_dict("records"),
        "default": [len(ask(one)["items"][0]), len(ask(one, k=None, request_ts=None)["items"][0])],
    }
print(json.dumps({"told": told}))
"""


@pytest.fixture(scope="module")
def asked(
    world: World, registered: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """All versions, loaded by a process that has neither this repository nor its jobs."""
    versions = {v["method"]: v["version"] for v in registered["versions"]}
    uri = f"sqlite:///{world.root}/.mlflow/mlflow.db"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    done = subprocess.run(
        [sys.executable, "-P", "-c", FRESH, uri, json.dumps(list(versions.values()))],
        cwd=tmp_path_factory.mktemp("elsewhere"), env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {method: said["told"][str(version)] for method, version in versions.items()}


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """The same items; scores within float error (batches of other sizes round differently)."""
    near = [
        a["score"] == pytest.approx(b["score"], abs=1e-4) for a, b in zip(one, other, strict=True)
    ]
    return [i["item_id"] for i in one] == [i["item_id"] for i in other] and all(near)


@pytest.mark.parametrize("method", METHODS)
def test_a_version_answers_raw_ids_in_a_fresh_process(method: str, asked: dict[str, Any]) -> None:
    told = asked[method]
    answer = told["answer"]
    assert [row["user_id"] for row in answer] == ["bob", "ann", "new", "odd"]
    for row in answer:
        assert len(row["items"]) == 3
        scores = [item["score"] for item in row["items"]]
        assert scores == sorted(scores, reverse=True)
        assert len({item["item_id"] for item in row["items"]}) == 3
    assert answer[2]["items"] == answer[3]["items"], "unknown items only is no history"
    assert told["nobody"][0]["items"] == answer[2]["items"]
    assert same(told["sorted"][0]["items"], answer[1]["items"]), "events come in any order"
    assert sorted(i["item_id"] for i in told["all"][0]["items"]) == [f"i{i:02d}" for i in range(15)]
    assert told["empty"] == [["user_id", "items"], 0]
    assert len(told["thousand"][0]["items"]) == 2
    assert len(told["native"][0]["items"]) == 2
    for zone in ("zoned", "elsewhere", "texts", "ties"):
        assert same(told[zone][0]["items"], answer[1]["items"]), zone
    late, usual = told["late"][0]["items"], told["all"][0]["items"][:2]
    assert same(late, usual), "last_event knows no request"
    assert len(told["far"][0]["items"]) == 3, "the tables' years, 1 to 9999"
    assert told["default"] == [10, 10] and told["bare"] == 0
    assert told["nothing"][0]["items"] == answer[2]["items"]
    for says, wrong in zip(
        ("item_id = 1.0: ids are texts", "user_id = 7: ids are texts", "tie_break: ",
         "event_ts = 5: a number says no unit", "event_ts: "), told["wrong"], strict=True,
    ):  # fmt: skip
        assert says in wrong


def test_a_version_scores_as_the_model_that_was_evaluated(
    world: World, asked: dict[str, Any], trained: dict[str, dict[str, Any]]
) -> None:
    from models.registry import tracking
    from tests.support.gold_world import rows_of

    client, _ = tracking.connect("toy")
    with tracking.downloaded(client, trained["bert4rec+st"]["mlflow_run_id"], "trained") as folder:
        stored = load(folder)
    begin = int(pd.Timestamp("2024-01-01T10:00Z").value // 1_000_000_000)
    first, second = (stored.item_ids.index(item) + 1 for item in ("i07", "i08"))
    rows = rows_of([(first, begin, 1), (second, begin + 60, 1)])
    scores = stored.model.score(rows, rows.start[:-1], rows.start[1:])[0].tolist()
    served = {i["item_id"]: i["score"] for i in asked["bert4rec+st"]["all"][0]["items"]}
    assert [served[item] for item in stored.item_ids] == pytest.approx(scores, abs=1e-5)


def test_no_pickle_among_the_files(world: World, registered: dict[str, Any]) -> None:
    files = [p for p in (world.root / ".mlflow" / "artifacts").rglob("*") if p.is_file()]
    assert any(p.suffix == ".safetensors" for p in files)
    assert [p.name for p in files if p.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin")] == []


def test_serving_cuts_sessions_by_the_gap_or_by_the_ids_given(world: World) -> None:
    from models.networks.baselines import Popularity
    from models.networks.methods import config
    from models.networks.saved_model import Stored
    from models.serving.answer import _told

    facts = {"gap_us": 1800 * SECOND, "session_rule": "source_session_id"}
    pop = Popularity(3, config("pop").model)
    stored = Stored(pop, config("pop"), ["a", "b", "c"], pop.count, facts)
    when = pd.to_datetime([0, 1800, 3601, 3602, 3603], unit="s", utc=True)
    frame = pd.DataFrame({"user_id": "u", "item_id": ["a", "b", "?", "c", "a"], "event_ts": when})
    user = np.zeros(5, dtype=np.int64)
    # Exactly the gap stays; the unknown item is skipped after it has opened a session.
    told = _told(stored, frame, user, 1)
    assert told.rows.ordinal.tolist() == [1, 1, 2, 2]
    assert told.newest.tolist() == [3603 * SECOND] and told.moved_on.tolist() == [False]
    native = frame.assign(source_session_id=["s", "s", None, None, "t"])
    assert _told(stored, native, user, 1).rows.ordinal.tolist() == [1, 1, 2, 3]
    shuffled = _told(stored, native.iloc[[4, 2, 0, 3, 1]].reset_index(drop=True), user, 1).rows
    assert shuffled.item.tolist() == [1, 2, 3, 1]


def test_serving_tells_the_time_of_a_request_and_whether_it_opens_a_session() -> None:
    """Under `known`, to the microsecond; silence is counted from the newest event, known or not."""
    import torch

    from models.networks.methods import config
    from models.networks.saved_model import Stored
    from models.serving.answer import recommend

    told: list[tuple[list[int], list[bool]]] = []

    class Listens:
        num_items = 2

        def score(self, rows, begin, end, request_ts=None, new_session=None):  # type: ignore[no-untyped-def]
            told.append((request_ts.tolist(), new_session.tolist()))
            return torch.zeros(len(begin), 2)

    chosen = config("gru4rec+st", "tiny", request_time="known")
    stored = Stored(Listens(), chosen, ["a", "b"], torch.ones(2), {"gap_us": 1800 * SECOND})  # type: ignore[arg-type]

    def ask(newest: tuple[str, int], request: str) -> tuple[int, bool]:
        frame = pd.DataFrame(
            {"user_id": "u", "item_id": ["a", newest[0]],
             "event_ts": pd.to_datetime([0, newest[1]], unit="s", utc=True)}
        )  # fmt: skip
        recommend(stored, frame, 1, request)
        (when,), (opens,) = told.pop()
        return when, opens

    assert ask(("b", 1200), "") == (1200 * SECOND, False)
    assert ask(("b", 1200), "1970-01-01T00:20:00") == (1200 * SECOND, False)
    assert ask(("b", 1200), "1970-01-01T09:50:00.000001+09:00") == (3000 * SECOND + 1, True)
    assert ask(("b", 1200), "1970-01-01T00:50:00Z") == (3000 * SECOND, False)
    assert ask(("?", 1200), "1970-01-01T00:40:00Z") == (2400 * SECOND, False)
    assert ask(("?", 4000), "1970-01-01T01:06:50Z") == (4010 * SECOND, True), "one is open already"
    assert ask(("?", 4000), "") == (0, False), "skipped"
    assert ask(("b", 0), "9999-12-31T00:00:00")[1] is True
    for wrong in ("soon", "NaT", "nan", "0001-01-01T00:00:00+09:00"):
        with pytest.raises(ValueError, match=r"request_ts = .*Give an ISO 8601 text, or none"):
            ask(("b", 1200), wrong)


def test_serving_knows_what_became_of_an_item(world: World) -> None:
    from models.serving.answer import _feedback

    frame = pd.DataFrame(
        {"event_type": ["buy", "skip", "view", None], "value": [5.0, 5.0, 1.0, None]}
    )
    everything = _feedback({"positive": None, "negative": ["skip"], "exposed": ["view"]}, frame)
    assert everything.tolist() == [0, 1, 2, 0]
    rated = _feedback({"positive": ["value >= 4"], "negative": [], "exposed": []}, frame)
    assert rated.tolist() == [0, 0, 3, 3], "a row that says nothing is neutral, as at ingestion"


def signatures(world: World, done: dict[str, Any]) -> list[Any]:
    import mlflow
    from mlflow.models import get_model_info

    mlflow.set_tracking_uri(f"sqlite:///{world.root}/.mlflow/mlflow.db")
    return [get_model_info(f"models:/toy/{v['version']}").signature for v in done["versions"]]


def test_every_version_has_a_signature_and_an_example(
    world: World, registered: dict[str, Any]
) -> None:
    """Baselines, backbones, and those of a comparison that is registered again."""
    import mlflow.pyfunc

    from models.registry.register import signature

    again = world.run("register", "--source", str(world.source), "--comparison", "c1", "--json")[1]
    assert again is not None
    for done in (registered, again):
        assert signatures(world, done) == [signature()] * len(METHODS)
    inputs = signature().inputs
    assert inputs is not None and {"user_id", "item_id", "event_ts"} == set(
        inputs.required_input_names()
    )
    for version in registered["versions"]:
        model = mlflow.pyfunc.load_model(f"models:/toy/{version['version']}")
        answer = model.predict(model.input_example)
        assert answer["user_id"].tolist() == ["ann", "bob"], version["method"]


def test_a_session_method_by_the_commands(world: World) -> None:
    from models.registry.register import signature

    options = ("--target", "next_session", "--split", "last_session", "--pooling", "attention")
    asked = ("--comparison", "sessions", "--alpha", "0.1")
    done = world.train("sessionrec-gru4rec+tsa", *options, *asked)
    assert done["target"] == "next_session" and done["num_params_added"] > 0
    found = done["metrics"]["ndcg@10"]
    assert 0.8 < found["low"] < found["value"] < found["high"] < 1  # by chance about 0.5
    of = ("--source", str(world.source), "--comparison", "sessions", "--json")
    assert world.run("compare", *of)[0] == 0
    made = world.run("register", *of)[1]
    assert made is not None and signatures(world, made) == [signature()]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "bert5rec"], "unknown method 'bert5rec' (did you mean 'bert4rec'?): use a"),
        (
            ["--method", "grurec+sta"],
            "unknown method 'grurec+sta' (did you mean 'gru4rec+st'?): use",
        ),
        (["--method", "pop+st"], "unknown method 'pop+st' (did you mean 'pop'?): use a baseline"),
        (
            ["--method", "pop;item_knn"],
            "unknown method 'pop;item_knn' (separate methods by commas)",
        ),
        (["--method", "pop", "--preset", "huge"], "unknown preset 'huge': one of small, tiny"),
        (["--method", "pop", "--table-version", "9"], "has no version 9"),
        (["--method", "pop", "--target", "sales"], "--target sales: use one of next_item"),
        (["--method", "pop", "--test-from", "soon"], "'soon' is not a time"),
        (["--method", "pop", "--test-from", "2099-01-01"], "has no target"),
        (["--method", "gru4rec", "--request-time", "never"], "one of last_event, known"),
        (["--method", "bert4rec", "--dim", "9"], "dim 9 must be a multiple of heads 2"),
        (["--method", "pop", "--threads", "0"], "--threads 0"),
        (["--method", "sasrec", "--loss", "bpr"], "one of auto, full, sampled, gbce"),
        (
            ["--method", "sasrec", "--negatives", "0"],
            "--negatives 0: use a whole number, 1 to 1,000,000",
        ),
        (["--method", "sessionrec-hstu+st"], "every position of sessionrec-hstu is a session"),
        (["--method", "sessionrec-hstu", "--pooling", "max"], "one of mean, attention, transf"),
        (["--method", "sessionrec-hstu", "--alpha", "-1"], "--alpha -1.0: use a number from 0"),
        (
            ["--method", "sessionrec-hstu", "--exposures", "-2"],
            "--exposures -2: use a whole number, 0 to",
        ),
        (["--method", "pop", "--sampled", "-1"], "--sampled -1: use the number of items"),
        (["--method", "pop", "--preprocess", "paper_b"], "one of gold, paper_a"),
        (["--method", "sasrec", "--epochs", "0"], "--epochs 0: use a whole number, 1 to 9,223,"),
        (["--method", "sasrec", "--seed", "-1"], "--seed -1: use a whole number, 0 to 9,223,"),
        (["--method", "sasrec", "--seed", str(2**63)], "a whole number, 0 to 9,223,"),
        (
            ["--method", "sasrec", "--dim", "10000000000"],
            "--dim 10000000000: use a whole number, 1 to",
        ),
        (["--method", "sasrec", "--length", "0"], "--length 0: use a whole number, 1 to"),
        (["--method", "sasrec", "--dropout", "1"], "--dropout 1.0: use a number from 0 to below 1"),
        (
            ["--method", "sasrec", "--learning-rate", "nan"],
            "--learning-rate nan: use a number above 0",
        ),
        (["--method", "sasrec", "--learning-rate", "inf"], "inf: use a number above 0, finite"),
        (["--method", "sasrec", "--alpha", "nan"], "--alpha nan: use a number from 0"),
        (
            ["--method", "sasrec", "--checkpoint-s", "-1"],
            "--checkpoint-s -1.0: use a number of sec",
        ),
        (["--method", "sasrec", "--comparison", "o'b"], "must not have a quote"),
        (["--method", "sasrec", "--comparison", ""], "'': the name of a comparison, method or var"),
        (
            ["--method", "sasrec", "--split", "last_item", "--target", "next_session"],
            "has no target (next session) of a user with a history",
        ),
        (
            ["--method", "sessionrec-gru4rec", "--pooling", "transformer", "--heads", "5"],
            "dim 32 must be a multiple of heads 5: choose another --dim or --heads",
        ),
        (
            ["--method", "sasrec", "--learning-rate", "1e30"],
            "Take a lower --learning-rate than 1e+30",
        ),
    ],
)
def test_mistakes_are_answered_not_traced(world: World, args: list[str], says: str) -> None:
    status, done, _, err = world.run("train", "--source", str(world.source), *args)
    assert status == 1
    assert done is None
    assert says in err


def test_a_comparison_of_what_differs_names_the_option(world: World) -> None:
    world.train("pop", "--comparison", "unlike")
    world.train("gru4rec", "--comparison", "unlike", "--request-time", "known")
    status, _, _, err = world.run(
        "compare", "--source", str(world.source), "--comparison", "unlike"
    )
    assert status == 1 and "cannot compare: request_time of" in err
    assert "Train both with the same --request-time, under a new --comparison" in err


def test_more_mistakes(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.toml"
    other.write_text(SOURCE.replace('"toy"', '"other"'))
    status, _, _, err = world.run("train", "--source", str(other), "--method", "pop")
    assert status == 1
    assert "make it with `python -m jobs run --source other`" in err
    status, _, _, err = world.run("compare", "--source", str(world.source), "--comparison", "none")
    assert status == 1
    assert "--source toy --method METHOD --comparison none`" in err
    status, _, _, err = world.run("register", "--source", str(world.source), "--comparison", "none")
    assert status == 1
    assert "compare --source toy --comparison none`" in err
    status, _, _, err = world.run("train", "--source", "nowhere", "--method", "pop")
    assert status == 1
    assert "does not exist" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    status, _, _, err = world.run("train", "--source", str(world.source), "--method", "pop")
    assert status == 1
    assert "does not answer" in err
    assert "make up" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "127.0.0.1:5000")
    status, _, _, err = world.run("train", "--source", str(world.source), "--method", "pop")
    assert status == 1
    assert (
        "MLFLOW_TRACKING_URI=127.0.0.1:5000 is neither an address nor a folder: write http://"
        in err
    )


def test_a_command_waits_for_an_mlflow_that_is_away_for_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = local().free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(tracking.time, "sleep", lambda _: real_sleep(0.2))
    with pytest.raises(UserError, match="MLflow does not answer"):
        tracking._answers(uri)
    monkeypatch.setenv("SESSIONMILL_MLFLOW_WAIT_S", "60")
    settings.cache_clear()
    handler = http.server.SimpleHTTPRequestHandler
    came: list[http.server.HTTPServer] = []

    def come() -> None:
        came.append(http.server.HTTPServer(("127.0.0.1", port), handler))
        came[0].handle_request()

    timer = threading.Timer(1.0, come)
    timer.start()
    tracking._answers(uri)  # (it has no such page, but it answers)
    timer.join()
    came[0].server_close()
    assert "waiting, at most" in capsys.readouterr().out
    monkeypatch.delenv("SESSIONMILL_MLFLOW_WAIT_S")
    settings.cache_clear()


def test_two_tasks_may_be_the_first_to_record(tmp_path: Path) -> None:
    code = "from models.registry.tracking import connect; print(connect('toy')[1])"
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert said[0][0].strip().splitlines()[-1] == said[1][0].strip().splitlines()[-1]


class Racing:
    """An MLflow client whose server tells `losses` times that another inserted the dataset."""

    def __init__(self, losses: int, says: str) -> None:
        self.losses, self.says, self.logged = losses, says, 0

    def log_inputs(self, run_id: str, datasets: list[Any]) -> None:
        from mlflow.exceptions import RestException

        assert datasets[0].dataset.digest == "v3"
        if self.losses:
            self.losses -= 1
            raise RestException({"error_code": "BAD_REQUEST", "message": self.says})
        self.logged += 1


def test_two_tasks_may_record_the_same_table_at_once() -> None:
    from mlflow.exceptions import MlflowException

    lost = "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id"
    client: Any = Racing(2, lost)
    tracking.log_table(client, "run", "/lake/gold/sequences", 3, "id")
    assert client.logged == 1
    for other in (Racing(9, lost), Racing(1, "no such run")):
        with pytest.raises(MlflowException):
            tracking.log_table(other, "run", "/lake/gold/sequences", 3, "id")  # type: ignore[arg-type]


def test_params_prints_exact_counts(world: World) -> None:
    status, done, said, _ = world.run(
        "params", "--preset", "paper_a_ml1m", "--method", "bert4rec+st", "--json"
    )
    assert status == 0
    assert done is not None
    assert (done["num_params"], done["num_params_added"]) == (4_918_785, 256)
    assert "4,918,785 parameters" in said
    status, done, _, _ = world.run(
        "params", "--preset", "paper_a_ml1m", "--method", "bert4rec", "--json", "--items", "4332",
        "--length", "15",
    )  # fmt: skip
    assert done is not None
    assert done["num_params"] == 5_386_221
    status, _, _, err = world.run("params", "--method", "bert4rec")
    assert status == 1
    assert "--items V is needed" in err
    for items in ("0", "99999999999999999999"):
        status, _, _, err = world.run("params", "--method", "sasrec", "--items", items)
        assert status == 1 and f"--items {items}: use a whole number, 1 to 2,147,483,647" in err


def test_the_same_seed_gives_the_same_model(
    world: World, trained: dict[str, dict[str, Any]]
) -> None:
    again = world.train("gru4rec+st", "--seed", "1")
    assert again["metrics"] == trained["gru4rec+st"]["metrics"]


def test_a_batch_of_users_is_quick(world: World, trained: dict[str, dict[str, Any]]) -> None:
    """A thousand users in one call; the data is what the ring tells."""
    from models.registry import tracking
    from models.serving.answer import recommend

    client, _ = tracking.connect("toy")
    with tracking.downloaded(client, trained["gru4rec"]["mlflow_run_id"], "trained") as folder:
        stored = load(folder)
    data = data_of(world.lake)
    frame = pd.DataFrame(
        {
            "user_id": [f"u{n // 20}" for n in range(20_000)],
            "item_id": [data.item_ids[n % 15] for n in range(20_000)],
            "event_ts": pd.to_datetime(
                [(n % 20) * DAY for n in range(20_000)], unit="us", utc=True
            ),
        }
    )
    began = time.process_time()
    answer = recommend(stored, frame, 5)
    assert len(answer) == 1000
    assert answer["items"].map(len).eq(5).all()
    assert time.process_time() - began < 20
