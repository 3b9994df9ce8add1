"""Methods judged night by night: what is scored, what goes on after an end, what is compared, served
and let through the gate."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.core.source_file import load_source
from models import cli
from models.core.config import EACH_NIGHT
from models.data.nights import night_cut, nights_asked
from models.data.splits import Filters
from models.networks.methods import config
from models.registry import tracking
from models.training import nightly
from models.training.fit import Fitted, fit_for
from models.training.run import Outcome, Prepared, Request, Work
from tests.support.gold_world import DAY, Event, data_of, ring, write_gold
from tests.support.nights_world import ASKED, born_along_the_way, nights_at, say
from tests.support.recorded import World, opened, trained_here


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with nights_at(tmp_path_factory.mktemp("nights")) as there:
        yield there


def request_of(world: World, method: str, **more: Any) -> Request:
    settings = {name: more.pop(name) for name in ("epochs", "seed", "target") if name in more}
    chosen = config(method, "tiny", **{"epochs": 3, **settings})
    source = load_source(str(world.source))
    return Request(
        source=source, lake=str(world.lake), config=chosen, nights=more.pop("nights", 3), **more
    )


def silent(_: str) -> None:
    pass


# -- what is scored -------------------------------------------------------------------------------


def popular_by_hand(story: dict[str, list[Event]], last: int) -> tuple[dict[str, list[float]], Any]:
    """User -> NDCG@10 of each target of the last nights for counts before its night, and by age."""
    every = [(user, e) for user, events in story.items() for e in events]
    days = sorted({e[1] // DAY for _, e in every})[-last:]
    values: dict[str, list[float]] = {}
    by_age: dict[str, list[float]] = {"born_that_night": [], "born_in_7_days": [], "older": []}
    for day in days:
        before = [e[0] for _, e in every if e[1] < day * DAY]
        count = {item: before.count(item) for item in set(before)}
        for user, e in every:
            if e[1] // DAY != day or not any(o[1] < day * DAY for o in story[user]):
                continue
            place = sum(c >= count[e[0]] for c in count.values()) if e[0] in count else 99
            value = 1 / np.log2(place + 1) if place <= 10 else 0.0
            born = min(o[1] for _, o in every if o[0] == e[0])
            age = "born_that_night" if born >= day * DAY else (
                "born_in_7_days" if born >= (day - 7) * DAY else "older")  # fmt: skip
            values.setdefault(user, []).append(value)
            by_age[age].append(value)
    return values, by_age


def test_a_backtest_of_counts_is_that_of_a_slow_one(nights: World) -> None:
    done = nights.train("pop", *ASKED)
    values, by_age = popular_by_hand(born_along_the_way(), 3)
    client, _ = tracking.connect("toy")
    with tracking.downloaded(client, done["mlflow_run_id"], "evaluation") as folder:
        with np.load(folder / "per_user.npz") as arrays:
            users, scores = arrays["user_id"].tolist(), arrays["ndcg_at_10"].tolist()
        with np.load(folder / "per_user_last_night.npz") as arrays:
            last_users = arrays["user_id"].tolist()
    expected = {user: float(np.mean(some)) for user, some in values.items()}
    assert dict(zip(users, scores, strict=True)) == pytest.approx(expected)
    assert done["metrics"]["ndcg@10"]["value"] == pytest.approx(np.mean(list(expected.values())))
    for age, some in by_age.items():
        assert done["by_age"][age]["counts"]["targets"] == len(some) > 0, age
    assert done["by_age"]["born_that_night"]["metrics"]["hr@50"]["value"] == 0.0
    assert [one["night"] for one in done["by_night"]] == ["1970-01-08", "1970-01-09", "1970-01-10"]
    assert sum(one["targets"] for one in done["by_night"]) == done["counts"]["targets"]
    items = [one["items"] for one in done["by_night"]]
    assert items == [15 + 7, 15 + 8, 15 + 9] and done["items"] == items[-1]
    assert done["last_night"]["users"] == len(last_users)
    assert done["cut"] == {
        "split": "nightly", "valid_from": "1970-01-07T00:00:00.000000Z", "nights": 3,
        "test_from": "1970-01-08T00:00:00.000000Z", "test_until": "1970-01-11T00:00:00.000000Z",
    }  # fmt: skip


def told_by(world: World, request: Request) -> tuple[Prepared, Outcome]:
    return nightly.unrecorded(request, silent)


def equal(one: Outcome, other: Outcome) -> None:
    """The same scores and the same last model, to the last bit."""
    assert np.array_equal(one.result.users, other.result.users)
    for name, value in one.result.values.items():
        assert np.array_equal(value, other.result.values[name]), name
    assert one.result.counts == other.result.counts
    assert one.result.catalogue == other.result.catalogue
    mine, theirs = one.fitted.model.state_dict(), other.fitted.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.training
def test_every_night_is_trained_from_scratch_for_the_epochs_of_the_nights_before(
    nights: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[nightly.Before | None, Prepared, int, Fitted]] = []

    def watched(before: nightly.Before | None, night: Prepared, epochs: int, how: Work) -> Fitted:
        fitted = nightly.from_scratch(before, night, epochs, how)
        seen.append((before, night, epochs, fitted))
        return fitted

    monkeypatch.setitem(nightly.LEARNERS, "scratch", watched)
    prepared, outcome = told_by(nights, request_of(nights, "gru4rec+st"))
    data = data_of(
        nights.lake, split="nightly", nights=3,
        filters=Filters(min_item_events=1, min_session_events=1, min_user_sessions=1),
    )  # fmt: skip
    starts = nights_asked(data.sequences, data.cut)
    assert len(seen) == len(starts) == 3 and data.at is not None
    for number, (before, night, epochs, fitted) in enumerate(seen):
        own = data.at(night_cut(starts[number]))
        assert night.data.item_ids == own.item_ids and epochs == outcome.fitted.best_epoch
        alone = fit_for(night.config, own, epochs, silent).model
        weights = alone.state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in fitted.model.state_dict().items())
        # What the learner is given of the night before is that night's model and vocabulary.
        assert (before is None) == (number == 0)
        if before is not None:
            assert before.stored.item_ids == seen[number - 1][1].data.item_ids
            assert len(before.stored.item_ids) < len(own.item_ids)
            assert before.stored.model is seen[number - 1][3].model
            assert before.until == seen[number - 1][1].data.training.rows.ts.max()
    assert outcome.fitted.model is seen[-1][3].model
    assert prepared.data.item_ids == seen[-1][1].data.item_ids


def test_once_keeps_the_model_of_the_first_night_and_counts_are_made_anew(nights: World) -> None:
    once = told_by(nights, request_of(nights, "gru4rec", each_night="once"))
    scratch = told_by(nights, request_of(nights, "gru4rec"))
    assert len(once[0].data.item_ids) == 15 + 7 and len(scratch[0].data.item_ids) == 15 + 9
    rows = [one["train_s"] for one in once[1].by_night]
    assert rows[0] > 0 and rows[1:] == [0, 0]
    one, other = (told[1].result for told in (once, scratch))
    assert (
        np.array_equal(one.users, other.users) and one.counts["targets"] == other.counts["targets"]
    )
    first = [told[1].by_night[0] for told in (once, scratch)]
    assert first[0]["ndcg@10"] == first[1]["ndcg@10"]
    counted = [
        told_by(nights, request_of(nights, "personal_top", each_night=each))
        for each in ("once", "scratch")
    ]
    equal(counted[0][1], counted[1][1])


def test_a_warm_night_goes_on_from_the_night_before(nights: World) -> None:
    scratch = told_by(nights, request_of(nights, "gru4rec"))
    warm = told_by(nights, request_of(nights, "gru4rec", each_night="warm"))
    first, *others = (told[1].by_night for told in (scratch, warm))
    assert others[0][0]["ndcg@10"] == first[0]["ndcg@10"], "the first night begins from scratch"
    best = warm[1].fitted.best_epoch
    assert [one["epochs"] for one in warm[1].by_night] == [best, *2 * [max(1, round(0.4 * best))]]
    assert [one["items"] for one in warm[1].by_night] == [one["items"] for one in first]
    assert warm[0].data.item_ids == scratch[0].data.item_ids
    equal(warm[1], told_by(nights, request_of(nights, "gru4rec", each_night="warm"))[1])


def test_who_has_only_what_a_model_that_stays_does_not_know_is_asked_by_popularity(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as there:
        story = ring(users=20)
        story["zoe"] = [("fresh", 8 * DAY, 1), ("fresh", 8 * DAY + 1, 1), ("i01", 9 * DAY, 2)]
        write_gold(there.lake, "toy", story)
        scratch, once = (
            told_by(there, request_of(there, "gru4rec", each_night=each))
            for each in ("scratch", "once")
        )
        for prepared, outcome in (scratch, once):
            names = [prepared.data.sequences.user_id[u] for u in outcome.result.users]
            assert "zoe" in names and outcome.last is not None
            place = names.index("zoe")
            assert outcome.result.asked[place] == 1  # i01: her first night has nothing before it
        popularity = once[0].popularity
        at = once[0].data.item_ids.index("i01")
        expected = 1 / np.log2(1 + (popularity >= popularity[at]).sum())
        result = once[1].result
        zoe = names.index("zoe")
        rank = int((popularity >= popularity[at]).sum())
        assert result.values["ndcg@10"][zoe] == pytest.approx(expected if rank <= 10 else 0.0)
        last = once[1].last
        assert last is not None and len(last.users) == len(scratch[1].last.users) - 1  # type: ignore[union-attr]


# -- what was stopped -----------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stopping(monkeypatch: pytest.MonkeyPatch, name: str, at: int | None) -> list[int]:
    """The learner ends before night number `at` is learnt; how many epochs each other was given."""
    learner, given = nightly.LEARNERS[name], []

    def one(before: nightly.Before | None, night: Prepared, epochs: int, how: Work) -> Fitted:
        if len(given) == at:
            raise Stopped
        given.append(epochs)
        return learner(before, night, epochs, how)

    monkeypatch.setitem(nightly.LEARNERS, name, one)
    return given


@pytest.mark.training
@pytest.mark.parametrize(("method", "each"), [("gru4rec", "scratch"), ("sasrec", "once"), ("pop", "scratch")])  # fmt: skip
def test_nights_that_ended_are_not_done_again(
    nights: World, monkeypatch: pytest.MonkeyPatch, method: str, each: str
) -> None:
    request = request_of(nights, method, each_night=each, seed=7)
    _, whole = told_by(nights, request)
    chosen: list[int] = []
    fit = nightly.fit

    def counted(*told: Any) -> Fitted:
        chosen.append(1)
        return fit(*told)

    monkeypatch.setattr(nightly, "fit", counted)
    with monkeypatch.context() as patch:
        given = stopping(patch, each, at=2)
        with pytest.raises(Stopped):
            told_by(nights, request)
        assert len(given) == 2
    with monkeypatch.context() as patch:  # and killed between the nights and the end
        patch.setattr(nightly.pool, "pooled", lambda _: (_ for _ in ()).throw(Stopped))
        given = stopping(patch, each, at=None)
        with pytest.raises(Stopped):
            told_by(nights, request)
        assert len(given) == 1
    given = stopping(monkeypatch, each, at=0)
    _, resumed = told_by(nights, request)
    assert len(chosen) == 1 and given == []
    equal(resumed, whole)
    assert [{**n, "train_s": 0, "eval_s": 0} for n in resumed.by_night] == [
        {**n, "train_s": 0, "eval_s": 0} for n in whole.by_night
    ]
    assert resumed.fitted.best_epoch == whole.fitted.best_epoch
    left = list((nights.lake / "toy" / "_cache" / "training").glob("*/night-*"))
    assert left == [], "what was kept goes when the whole has ended"


def test_only_the_newest_nights_model_is_kept(
    nights: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopping(patch, "scratch", at=2)
        with pytest.raises(Stopped):
            told_by(nights, request_of(nights, "gru4rec", seed=9))
    [folder] = {f.parent for f in (nights.lake / "toy/_cache/training").glob("*/night-*")}
    assert sorted(f.name for f in folder.glob("night-*")) == [
        "night-1970-01-08",
        "night-1970-01-09",
    ]
    assert [f.parent.name for f in folder.glob("night-*/trained")] == ["night-1970-01-09"]
    assert not list(folder.glob(".night-*"))


def test_nights_that_cannot_be_read_are_done_again(
    nights: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(nights, "gru4rec", seed=11)
    _, whole = told_by(nights, request)
    with monkeypatch.context() as patch:
        stopping(patch, "scratch", at=2)
        with pytest.raises(Stopped):
            told_by(nights, request)
    places = (nights.lake / "toy/_cache/training").glob("*/night-1970-01-09/trained")
    [file] = [place / "model.safetensors" for place in places if _seed_of(place) == 11]
    file.write_bytes(file.read_bytes()[:100])
    said: list[str] = []
    _, resumed = nightly.unrecorded(request, said.append)
    assert any("the saved results of 2 nights are damaged" in line for line in said)
    equal(resumed, whole)


def _seed_of(place: Path) -> int:
    return int(tracking.read_json(place / "model.json")["config"]["train"]["seed"])


# -- comparing -------------------- ----------------------------------------------------------------


def test_runs_of_other_splits_or_other_nights_are_not_compared(nights: World) -> None:
    nights.train("pop", "--comparison", "mixed", *ASKED)
    nights.train("personal_top", "--comparison", "mixed", "--split", "temporal")
    status, _, _, err = say(nights, "compare", "--comparison", "mixed")
    assert status == 1 and "cannot compare: cut of" in err and "--split" in err
    nights.train("pop", "--comparison", "fewer", *ASKED)
    nights.train("personal_top", "--comparison", "fewer", "--split", "nightly", "--nights", "2")
    status, _, _, err = say(nights, "compare", "--comparison", "fewer")
    assert status == 1 and "cannot compare: cut of" in err and "--nights" in err
    nights.train("pop", "--comparison", "each", *ASKED)
    nights.train("personal_top", "--comparison", "each", *ASKED, "--each-night", "once")
    status, _, _, err = say(nights, "compare", "--comparison", "each")
    assert status == 1 and "each_night of" in err and "--each-night" in err


def test_options_of_nights_decide_the_split_and_go_with_no_other(nights: World) -> None:
    assert nights.train("pop", "--nights", "2")["cut"]["split"] == "nightly"
    assert nights.train("pop", "--each-night", "once")["cut"]["split"] == "nightly"
    assert nights.train("pop")["cut"]["split"] == "nightly", "of ten nights"
    pinned = ("--valid-from", "1970-01-06", "--test-from", "1970-01-08")
    told = load_source(str(nights.source)).training
    assert told.split is None
    nights.source.write_text(nights.source.read_text() + 'split = "temporal"\n')
    try:
        assert nights.train("pop")["cut"]["split"] == "temporal"
        assert nights.train("pop", "--nights", "2")["cut"]["split"] == "nightly"
        assert nights.train("pop", "--split", "last_item")["cut"]["split"] == "last_item"
        assert nights.train("pop", *pinned)["cut"]["split"] == "temporal"
    finally:
        nights.source.write_text(nights.source.read_text().replace('split = "temporal"\n', ""))
    for words, said in (
        (("--split", "temporal", "--nights", "2"), "--nights 2 is for --split nightly"),
        (("--split", "temporal", "--each-night", "once"), "--each-night once is for --split"),
        (("--split", "nightly", *pinned), "are for --split temporal, and the split is nightly"),
    ):
        status, _, _, err = say(nights, "train", "--method", "pop", *words)
        assert status == 1 and said in err


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    return trained_here(monkeypatch)


def test_backtest_judges_methods_compares_them_and_goes_on(
    nights: World, in_process: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = nights.root / "results" / "nights.json"
    command = (
        "backtest", "--methods", "pop,gru4rec", "--nights", "3", "--seeds", "1,2", "--results",
        str(file), "--", "--epochs", "2",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        stopping(patch, "scratch", at=4)  # pop has ended, gru4rec has ended one night
        with pytest.raises(Stopped):
            say(nights, *command)
    given = stopping(monkeypatch, "scratch", at=None)
    status, outcome, said, err = say(nights, *command)
    assert status == 0 and outcome is not None, said + err
    assert len(given) == 2 + 3, "two nights of seed 1, three of seed 2"
    assert "there already" in said and "resuming: 1 of 3 nights are done" in said
    version = outcome["table_version"]
    assert outcome["comparison"] == f"backtest-v{version}-3-nights-scratch"
    assert outcome["each_night"] == "scratch" and outcome["cut"]["nights"] == 3
    rows = {row["method"]: row for row in outcome["methods"]}
    assert (rows["gru4rec"]["seeds"], rows["pop"]["seeds"]) == (2, 1)
    assert all(w[w.index("--table-version") + 1] == str(version) for w in in_process)
    written = tracking.read_json(file)
    assert {len(cell["by_night"]) for cell in written["cells"]} == {3}
    words = shlex.split(written["command"])[3:]
    parsed = cli.parser().parse_args(words)
    assert (parsed.nights, parsed.each_night, parsed.options) == (3, "scratch", ["--epochs", "2"])
    status, _, said, _ = say(nights, *command)
    assert status == 0 and said.count("there already") == 3 and len(given) == 5
    status, _, _, err = say(nights, "backtest", "--methods", "pop", "--", "--split", "temporal")
    assert status == 1 and "--split after --" in err


def test_recipes_are_of_a_split(nights: World) -> None:
    words = ("tune", "--method", "gru4rec", "--trials", "1", "--epochs", "1")
    status, done, _, err = say(nights, *words, *ASKED)
    assert status == 0 and done is not None and done["split"] == "nightly", err
    told = nights.train("gru4rec", "--tuned", *ASKED)
    assert told["tuning"]["run_id"] == done["mlflow_run_id"]
    status, _, _, err = say(
        nights, "train", "--method", "gru4rec", "--tuned", "--split", "temporal"
    )
    assert status == 1 and "--split temporal" in err
    status, _, _, err = say(
        nights, "train", "--method", "gru4rec", "--tuned", "--split", "nightly", "--nights", "5"
    )
    assert status == 1 and "would be scored on what it was chosen by" in err


def test_learners_are_those_that_can_be_asked_for() -> None:
    assert tuple(nightly.LEARNERS) == EACH_NIGHT and set(nightly.STAYS) <= set(EACH_NIGHT)
