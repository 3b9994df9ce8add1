"""`python -m models tune`: trials, recipes, and who uses them. In one process, on a tiny log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.core.config import PRESETS, ModelConfig, TrainConfig
from models.core.errors import UserError
from models.core.knobs import knobs
from models.data import splits
from models.experiments import search, tune
from models.experiments.search import space_of
from models.networks.methods import (
    BACKBONES,
    BASELINES,
    ENCODINGS,
    SESSION_ENCODERS,
    changed,
    config,
    tunable,
)
from models.registry import tracking
from models.registry.recipes import Recipe
from models.registry.register import _tags
from models.training import fit as fitting
from models.training.checkpoints import Checkpoints
from tests.support.recorded import World, trained_here

METHODS = [
    *BASELINES, *(f"{name}+st+sse+tsa+fb+habit" for name in BACKBONES),
    *(f"{name}+sse+tsa+habit" for name in SESSION_ENCODERS),
]  # fmt: skip
FOUND = ("trial", "state", "settings", "validation_ndcg@10", "epochs", "num_params", "reason")


def tuned(world: World, method: str, *args: str) -> dict[str, Any]:
    status, done, said, err = world.run(
        "tune", "--source", str(world.source), "--method", method, "--json", *args
    )
    assert status == 0, said + err
    assert done is not None
    return done


def outcome(done: dict[str, Any]) -> list[dict[str, Any]]:
    """What trials found, without what they cost and where they are recorded."""
    return [{name: one[name] for name in FOUND} for one in done["trials"]]


def recorded_runs(**tags: str) -> list[Any]:
    client, experiment = tracking.connect("toy")
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return list(client.search_runs([experiment], wanted, order_by=["attributes.start_time ASC"]))


@pytest.fixture
def apart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies of this test's own, in the world's MLflow."""
    number = len(list((world.root).glob("studies-*")))
    folder = world.root / f"studies-{number}"
    folder.mkdir()
    monkeypatch.setattr(tune, "cache_folder", lambda *_: folder)


# -- the space ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_the_presets_own_settings_are_in_the_space(method: str, preset: str) -> None:
    chosen = config(method, preset)
    space = space_of(chosen, {})
    assert set(space) == set(tunable(method))
    for name, one in space.items():
        value = search.setting(chosen, name)
        assert one._contains(one.to_internal_repr(value)), (name, value)
    ends = [{n: getattr(one, end) for n, one in space.items()} for end in ("low", "high")]
    for settings in ends:
        assert changed(chosen, settings).method == method


def test_a_method_is_tuned_in_what_it_reads_and_in_nothing_that_a_comparison_holds_equal() -> None:
    trained = {"learning_rate", "weight_decay", "dropout", "batch_size", "max_len"}
    assert set(tunable("gru4rec")) == trained
    assert set(tunable("bert4rec+habit")) == {*trained, "mask_share", "habit_events"}
    assert set(tunable("sasrec+sse+fb")) == {*trained, "segments", "exposures"}
    assert set(tunable("sessionrec-hstu")) == {*trained, "alpha", "exposures"}
    assert not tunable("pop") and not tunable("personal_top") and not tunable("gp_topfreq")
    assert set(tunable("item_knn")) == set(tunable("vsknn")) == {"neighbours"}
    assert all(name.startswith("tifu_") for name in tunable("tifu_knn"))
    assert all(name.startswith("up_cf_") for name in tunable("up_cf"))
    words = {word for kind in (ModelConfig, TrainConfig) for _, knob in knobs(kind)
             if knob.tune for word in knob.tune.of}  # fmt: skip
    known = {"trained", "sessionrec", *BASELINES, *BACKBONES, *(f"+{e}" for e in ENCODINGS)}
    assert words <= known


def test_what_is_given_is_not_searched() -> None:
    assert "dropout" not in space_of(config("sasrec", dropout=0.2), {"dropout": 0.2})


# -- trials ------------------------------------------------------------------------------------

QUICK = ("--epochs", "3", "--threads", "1")


def test_the_best_of_a_baselines_trials_is_a_recipe_that_a_training_takes(
    world: World, apart: None
) -> None:
    done = tuned(world, "up_cf", "--trials", "13")
    assert [one["trial"] for one in done["trials"]] == list(range(13))
    assert len({one["settings"]["up_cf_asymmetry"] for one in done["trials"]}) == 13
    assert done["trials"][0]["settings"] == {
        "up_cf_recent": 10, "up_cf_locality": 10.0, "up_cf_asymmetry": 0.75,
        "up_cf_neighbours": 100,
    }  # fmt: skip
    assert done["validation_ndcg@10"] == max(one["validation_ndcg@10"] for one in done["trials"])
    assert done["preset_validation_ndcg@10"] == done["trials"][0]["validation_ndcg@10"]
    assert done["budget"] | {"seconds": 0} == {
        "trials": 13, "minutes": None, "tried": 13, "finished": 13, "pruned": 0, "failed": 0,
        "seconds": 0,
    }  # fmt: skip
    trained = world.train("up_cf", "--tuned", "--comparison", "up")
    assert trained["validation_ndcg@10"] == done["validation_ndcg@10"]
    assert trained["tuning"] == {"run_id": done["mlflow_run_id"], **done["budget"]}
    client, _ = tracking.connect("toy")
    run = client.get_run(trained["mlflow_run_id"])
    assert run.data.tags["tuning"] == done["mlflow_run_id"]
    assert run.data.params["tuning.trials"] == "13"
    for name, value in done["settings"].items():
        assert run.data.params[f"model.{name}"] == str(value)
    again = tuned(world, "up_cf", "--trials", "13")
    assert again["mlflow_run_id"] == done["mlflow_run_id"], "the same recipe is recorded once"
    fewer = tuned(world, "up_cf", "--trials", "5")
    assert outcome(fewer) == outcome(done)[:5] and fewer["budget"]["tried"] == 5


class Killed(BaseException):
    """No command catches it."""


@pytest.mark.parametrize("method", ["gru4rec", "up_cf"])
@pytest.mark.slow
def test_a_tuning_that_is_killed_ends_as_if_it_had_not_been(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Killed at the end of an epoch, at a trial's beginning, and where it is stored or not."""
    number = 12 if method == "up_cf" else 5
    words = (method, *QUICK, "--trials", str(number), "--seed", "7", "--checkpoint-s", "0")
    folders = [world.root / f"{method}-{name}" for name in ("whole", "killed")]
    monkeypatch.setattr(search, "PRUNE_AFTER", 2)
    monkeypatch.setattr(tune, "cache_folder", lambda *_: folders[0])
    whole = tuned(world, *words)
    assert len(whole["trials"]) == number
    assert method == "up_cf" or whole["budget"]["pruned"]
    monkeypatch.setattr(tune, "cache_folder", lambda *_: folders[1])
    before = len(recorded_runs(kind="tune"))

    def kill(where: Any, name: str, at: int) -> None:
        real, calls = getattr(where, name), [0]

        def dies(*args: Any, **how: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise Killed
            return real(*args, **how)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, dies)
            with pytest.raises(Killed):
                tuned(world, *words)

    kill(tune, "fit", 2)  # as trial 1 begins
    if method == "gru4rec":
        kill(search.Trial, "report", 2)  # within it, after an epoch
        kill(search.Trial, "report", 4)
    kill(search.Trial, "end", 1)  # its training is over, and it is not stored
    kill(tune, "_say_state", 1)  # it is stored, and MLflow was not told
    done = tuned(world, *words)
    assert outcome(done) == outcome(whole)
    assert done["settings"] == whole["settings"] and done["trial"] == whole["trial"]
    runs = recorded_runs(kind="tune")[before:]
    assert [int(run.data.tags["trial"]) for run in runs] == list(range(number)), "one run a trial"
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run, one in zip(runs, done["trials"], strict=True):
        assert run.data.tags["state"] == one["state"]
        assert run.info.run_id == one["mlflow_run_id"]


def test_a_trial_that_does_badly_is_pruned_and_one_that_diverges_fails(
    world: World, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 3 learns next to nothing; trial 4's loss is no number."""
    monkeypatch.setattr(search, "PRUNE_AFTER", 2)
    real = fitting.Run.step

    def step(self: Any, parts: Any, share: float) -> None:
        if search_now["trial"] == 4:
            raise self._diverged("the loss of batch 1 is nan")
        real(self, parts, share)

    search_now = {"trial": -1}
    following = search.Study.next

    def next_one(self: Any) -> Any:
        trial = following(self)
        search_now["trial"] = trial.number
        if trial.number == 3:
            trial.settings["learning_rate"] = 1e-6
        return trial

    monkeypatch.setattr(search.Study, "next", next_one)
    monkeypatch.setattr(fitting.Run, "step", step)
    done = tuned(world, "gru4rec", "--epochs", "8", "--trials", "6")
    states = [one["state"] for one in done["trials"]]
    assert states[0] == "finished" and states[3] == "pruned" and states[4] == "failed"
    assert states[5] in ("finished", "pruned"), "the study went on"
    bad, worse = done["trials"][3], done["trials"][4]
    assert bad["epochs"] < 8 and "below the median of the finished trials" in bad["reason"]
    assert (
        "gru4rec cannot be trained with these settings: epoch 1, the loss of batch 1 is nan"
        in worse["reason"]
    )
    assert done["trial"] not in (3, 4)
    assert done["budget"]["failed"] == 1 and done["budget"]["pruned"] >= 1
    client, _ = tracking.connect("toy")
    runs = [client.get_run(one["mlflow_run_id"]) for one in (bad, worse)]
    assert [run.data.tags["state"] for run in runs] == ["pruned", "failed"]
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED"]
    assert runs[0].data.tags["reason"] == bad["reason"]
    assert runs[1].data.tags["reason"] == worse["reason"]
    curve = client.get_metric_history(bad["mlflow_run_id"], "validation_ndcg_at_10")
    assert len(curve) == bad["epochs"]


def test_where_every_trial_fails_the_error_says_why(
    world: World, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise UserError("the loss of batch 1 is inf")

    monkeypatch.setattr(tune, "fit", fails)
    status, _, _, err = world.run(
        "tune", "--source", str(world.source), "--method", "gru4rec", "--trials", "2"
    )
    assert status == 1
    assert "no trial of gru4rec finished, of 2 that ended: the loss of batch 1 is inf" in err


def test_minutes_bound_a_tuning_and_what_was_spent_counts(world: World, apart: None) -> None:
    little = ("--minutes", "0.00001")
    done = tuned(world, "up_cf", "--trials", "3", *little)
    assert [done["budget"][name] for name in ("trials", "tried", "minutes")] == [3, 1, 0.00001]
    again = tuned(world, "up_cf", "--trials", "3", *little)
    assert again["mlflow_run_id"] == done["mlflow_run_id"], "they were over"
    more = tuned(world, "up_cf", "--trials", "3", "--minutes", "60")
    assert more["budget"]["tried"] == 3 and outcome(more)[:1] == outcome(done)

    status, _, said, err = world.run(
        "tune", "--source", str(world.source), "--method", "gru4rec", *QUICK, *little
    )
    assert status == 1 and "the trial that ran does not count" in said
    assert "no trial of gru4rec finished" in err and "Give more --minutes" in err
    [run] = recorded_runs(kind="tune", state="stopped: out of time")
    status, _, said, _ = world.run(
        "tune", "--source", str(world.source), "--method", "gru4rec", *QUICK, *little
    )
    assert status == 1 and "the trial that ran" not in said, "none began: its time is spent"
    done = tuned(world, "gru4rec", *QUICK, "--trials", "1", "--minutes", "60")
    assert done["trials"][0]["mlflow_run_id"] == run.info.run_id, "it went on in its run"
    assert done["trials"][0]["state"] == "finished"


# -- never the test period ---------------------------------------------------------------------


def test_a_tuning_never_looks_at_the_test_period(
    world: World, apart: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """No target of it is made; and with other events there, all trials are the same."""
    from models.training import run as training

    asked: list[int] = []

    def spied(events: Any, period: Any, which: int, *rest: Any) -> Any:
        asked.append(which)
        return splits.targets(events, period, which, *rest)

    for place in (fitting, training, tune):
        monkeypatch.setattr(place, "targets", spied)
    words = ("gru4rec+habit", *QUICK, "--trials", "3", "--seed", "3")
    done = tuned(world, *words)
    assert asked and set(asked) == {splits.VALIDATION}

    real = training.load_data

    def poisoned(**how: Any) -> Any:
        data = real(**how)
        late = data.events.index[data.period == splits.TEST]
        item = np.array(data.sequences.item)
        item[late] = item[late][::-1]
        assert (item != data.sequences.item).any()
        gold = replace(data.sequences, item=item)
        return replace(data, sequences=gold, events=replace(data.events, sequences=gold))

    monkeypatch.setattr(training, "load_data", poisoned)
    monkeypatch.setattr(tune, "cache_folder", lambda *_: tmp_path)
    assert outcome(tuned(world, *words)) == outcome(done)
    assert set(asked) == {splits.VALIDATION}


def test_a_recipe_chosen_on_what_is_tested_now_is_refused(world: World, apart: None) -> None:
    tuned(world, "item_knn", "--trials", "2", "--target", "next_session")
    status, _, _, err = world.run(
        "train", "--source", str(world.source), "--method", "item_knn", "--tuned", "--target",
        "next_session", "--valid-from", "1970-01-05", "--test-from", "1970-01-07",
    )  # fmt: skip
    assert status == 1 and "it would be scored on what it was chosen by" in err
    recipe = Recipe("r", {"method": "pop", "table_version": 2, "cut": {"split": "last_session"}})
    recipe.check_cut({"split": "last_session"}, 2)
    with pytest.raises(UserError, match="on version 2 of gold"):
        recipe.check_cut({"split": "last_session"}, 1)


def test_the_same_tuning_runs_once_at_a_time(world: World, apart: None) -> None:
    words = ("--source", str(world.source), "--method", "vsknn", "--trials", "1", "--json")
    status, done, _, err = world.run("tune", *words)
    assert status == 0 and done is not None, err
    folder = tune.cache_folder("", "toy") / "tuning" / done["study"]
    with Checkpoints(folder).alone() as mine:
        assert mine
        status, _, _, err = world.run("tune", *words)
    assert status == 1 and "the same tuning is running" in err


# -- who uses a recipe -------------------------------------------------------------------------


def test_trials_end_where_validation_begins_whatever_a_training_does_after(
    world: World, apart: None
) -> None:
    done = tuned(world, "vsknn", "--trials", "3")
    longer = world.root / "longer.toml"
    longer.write_text(world.source.read_text() + 'train_until = "test"\n')
    again = tuned(world, "vsknn", "--trials", "3", "--source", str(longer))
    assert again["study"] == done["study"] and again["mlflow_run_id"] == done["mlflow_run_id"]
    trained = world.train("vsknn", "--tuned", "--train-until", "test")
    assert trained["validation_ndcg@10"] == done["validation_ndcg@10"]
    assert trained["tuning"]["run_id"] == done["mlflow_run_id"]


def test_options_that_are_given_win_over_the_recipe(world: World, apart: None) -> None:
    done = tuned(world, "gru4rec", *QUICK, "--trials", "2", "--dim", "16", "--data-share", "0.9")
    assert done["given"] == {"dim": 16, "epochs": 3}, "a recipe is for all users"
    client, _ = tracking.connect("toy")

    def trained(*args: str) -> dict[str, str]:
        run_id = world.train("gru4rec", *args)["mlflow_run_id"]
        return dict(client.get_run(run_id).data.params)

    params = trained("--tuned")
    assert params["model.dim"] == "16" and params["train.data_share"] == "1.0"
    assert params["train.learning_rate"] == str(done["settings"]["learning_rate"])
    params = trained("--tuned", done["mlflow_run_id"], "--dim", "24", "--learning-rate", "0.02")
    assert params["model.dim"] == "24" and params["train.learning_rate"] == "0.02"
    assert params["model.dropout"] == str(done["settings"]["dropout"])
    assert params["tuning.run_id"] == done["mlflow_run_id"]


def test_a_recipe_that_is_not_there_is_named_with_its_command(world: World) -> None:
    source = str(world.source)
    status, _, _, err = world.run("train", "--source", source, "--method", "hstu", "--tuned")
    assert status == 1 and (
        "no recipe of hstu for 'toy' (target next_item, preset tiny, split temporal)" in err
    )
    assert (
        "python -m models tune --source toy --method hstu --target next_item --preset tiny "
        "--split temporal" in err
    )
    status, _, _, err = world.run(
        "recipes", "--source", source, "--methods", "pop,hstu,narm", "--json"
    )
    assert status == 1 and "no recipe of hstu, narm for 'toy'" in err
    status, _, _, err = world.run("tune", "--source", source, "--method", "pop")
    assert status == 1 and "--method pop: it has no setting that is tuned" in err
    status, _, _, err = world.run("tune", "--source", source, "--method", "vsknn", "--trials", "0")
    assert status == 1 and "--trials 0: use 1 or more" in err


def test_a_grid_takes_recipes_and_the_table_says_the_budgets(
    world: World, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells are trained in this process; `pop` has nothing to tune."""
    trainings = trained_here(monkeypatch)
    budget = ("--trials", "3", "--minutes", "30")
    same = [tuned(world, name, *budget) for name in ("tifu_knn", "vsknn")]
    words = (
        "grid", "--source", str(world.source), "--seeds", "1", "--methods", "pop,tifu_knn,vsknn",
        "--json", "--tuned", "--comparison",
    )  # fmt: skip
    status, done, said, err = world.run(*words, "fair")
    assert status == 0 and done is not None, err
    rows = {row["method"]: row for row in done["methods"]}
    for one in same:
        told = rows[one["method"]]["tuning"]
        assert told["run_id"] == one["mlflow_run_id"]
        assert (told["trials"], told["minutes"], told["tried"]) == (3, 30.0, 3)
    assert rows["pop"]["tuning"] is None
    assert "3 trials, 30 min" in said
    assert "budgets of tuning differ" not in said and "unlike the others" not in said
    count = len(trainings)
    assert world.run(*words, "fair")[0] == 0 and len(trainings) == count, "all are there"

    tuned(world, "vsknn", "--trials", "2")
    status, _, _, err = world.run(*words, "fair")
    assert status == 1 and "name another --comparison" in err, "another recipe is another training"
    status, done, said, err = world.run(*words, "unfair")
    assert status == 0 and done is not None, err
    assert (
        "budgets of tuning differ (" in said and "tifu_knn: 3 trials, 30 min" in said
        and "vsknn: 2 trials" in said
    )  # fmt: skip
    tags = _tags(done, next(row for row in done["methods"] if row["method"] == "tifu_knn"))
    assert json.loads(tags["tuning"]) == same[0]["budget"] | {"run_id": same[0]["mlflow_run_id"]}
    world.train("item_knn", "--comparison", "unfair")
    status, done, said, _ = world.run(
        "compare", "--source", str(world.source), "--comparison", "unfair", "--json"
    )
    assert status == 0
    assert "item_knn: not tuned, unlike the others" in said
    status, made, _, err = world.run(
        "report", "--source", str(world.source), "--comparison", "unfair", "--json"
    )
    assert status == 0 and made is not None, err
    page = Path(made["page"]).read_text()
    assert "tifu_knn (3 trials, 30 min)" in page and "vsknn (2 trials)" in page
    assert "item_knn: not tuned, unlike the others" in page

    count = len(trainings)
    status, _, _, err = world.run(*words[:6], "tifu_knn,hstu,narm", *words[7:], "missing")
    assert status == 1 and "no recipe of hstu, narm" in err and len(trainings) == count


def test_trials_are_no_trainings_of_a_comparison(world: World, apart: None) -> None:
    trainings = len(recorded_runs(kind="train"))
    tuned(world, "vsknn", "--trials", "2")
    assert len(recorded_runs(kind="train")) == trainings
    tried = recorded_runs(kind="tune", method="vsknn")
    assert tried and all("comparison" not in run.data.tags for run in tried)
    status, done, _, err = world.run(
        "recipes", "--source", str(world.source), "--methods", "vsknn,pop", "--json"
    )
    assert status == 0 and done is not None, err
    assert done["recipes"]["pop"] is None and done["recipes"]["vsknn"]["budget"]["trials"] == 2
