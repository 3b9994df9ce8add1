"""A recipe taught everything: a version of its own that is served, and that nothing scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from models.core.errors import UserError
from models.data.splits import stamp
from models.networks.saved_model import Stored, load
from models.registry import tracking
from models.registry.register import SAW_FORGOTTEN, aliases_of, served_alias
from models.training import refit as refits
from tests.support.gold_world import SECOND, Event, ring, write_gold, write_silver
from tests.support.recorded import World

pytestmark = pytest.mark.slow

METHODS = ("personal_top", "sasrec+habit", "gru4rec")


def command(world: World, *words: str) -> dict[str, Any]:
    status, done, said, err = world.run(
        words[0], "--source", str(world.source), "--json", *words[1:]
    )
    assert status == 0 and done is not None, said + err
    return done


def refused(world: World, *words: str) -> str:
    status, _, _, err = world.run(words[0], "--source", str(world.source), *words[1:])
    assert status == 1
    return err


def stored(version: int | str) -> Stored:
    client, _ = tracking.connect("toy")
    run = client.get_model_version("toy", str(version)).run_id
    with tracking.downloaded(client, str(run), "trained") as folder:
        return load(folder)


def aliases() -> dict[str, str]:
    client, _ = tracking.connect("toy")
    return aliases_of(client, "toy") or {}


def later() -> dict[str, Sequence[Event]]:
    """The ring a night later: two more sessions of each user, and items that were born in it."""
    story: dict[str, Sequence[Event]] = {}
    for number, (user, events) in enumerate(ring(events=48).items()):
        item = f"new{number % 3}"
        end = events[-1]
        story[user] = [*events, (item, end[1] + SECOND, end[2])]
    return story


def put(world: World, story: dict[str, Sequence[Event]]) -> None:
    write_gold(world.lake, "toy", story, [f"i{n:02d}" for n in range(15)])  # type: ignore[arg-type]
    write_silver(world.lake, "toy", story)


@pytest.fixture(scope="module")
def versions(world: World) -> dict[str, int]:
    put(world, ring())
    for method in METHODS:
        world.train(method, "--comparison", "c", "--seed", "1")
    command(world, "compare", "--comparison", "c")
    done = command(world, "register", "--comparison", "c")
    return {one["method"]: one["version"] for one in done["versions"]}


def crown(world: World, version: int) -> None:
    command(
        world, "promote", "--model-version", str(version), "--force", "--reason", "for the test"
    )


def test_a_recipe_is_taught_everything_and_served(world: World, versions: dict[str, int]) -> None:
    recipe = versions["gru4rec"]
    crown(world, recipe)
    assert aliases()["serving"] == str(recipe), "no refit has been made: the champion itself"
    scratch = command(world, "refit", "--from-scratch")
    assert scratch["new"] and scratch["how"] == "from scratch" and scratch["refit_of"] == recipe
    assert aliases()["serving"] == str(scratch["version"])
    newest = max(event[1] for events in ring().values() for event in events)
    assert scratch["trained_until"] == stamp(newest)
    whole = stored(scratch["version"])
    assert float(whole.popularity.sum()) == 60 * 40, "every event was counted"
    held = stored(recipe)
    assert float(held.popularity.sum()) < 60 * 40
    client, _ = tracking.connect("toy")
    tags = client.get_model_version("toy", str(scratch["version"])).tags
    assert tags["refit_of"] == str(recipe) and tags["trained_until"] == stamp(newest)
    told = client.get_model_version("toy", str(recipe)).tags
    assert tags["recipe_ndcg_at_10"] == told["ndcg_at_10"] and "ndcg_at_10" not in tags
    metrics = client.get_run(scratch["mlflow_run_id"]).data.metrics
    assert metrics["recipe_ndcg_at_10"] == pytest.approx(float(told["ndcg_at_10"]))
    assert not [name for name in metrics if name.startswith(("ndcg", "hr", "validation"))]

    # Twice is once; and once from scratch is enough for who asks without.
    for words in ((), ("--from-scratch",), ("--alias", "serving")):
        again = command(world, "refit", *words)
        assert not again["new"] and again["version"] == scratch["version"]


def test_nothing_scores_a_refit(world: World, versions: dict[str, int]) -> None:
    version = aliases()["serving"]
    client, _ = tracking.connect("toy")
    run = str(client.get_model_version("toy", version).run_id)
    assert "nothing before that is held out from it" in refused(world, "evaluate", "--run-id", run)
    assert "The gate decides about recipes" in refused(world, "promote", "--model-version", version)
    before = command(world, "compare", "--comparison", "c")
    assert {row["mlflow_run_id"] for row in before["methods"]}.isdisjoint({run})
    told = command(world, "verify", "--alias", "serving")
    assert told["holds"] and told["users"] == 60 and told["lists_wrong"] == 0
    assert told["metrics"] == {} and told["refit_of"] == versions["gru4rec"]


def test_a_night_later_it_goes_on_from_its_weights(world: World, versions: dict[str, int]) -> None:
    before = aliases()["serving"]
    put(world, later())
    warm = command(world, "refit")
    assert warm["new"] and warm["how"] == f"from version {before}"
    assert aliases()["serving"] == str(warm["version"])
    new = stored(warm["version"])
    assert set(new.item_ids) == {f"i{n:02d}" for n in range(15)} | {"new0", "new1", "new2"}
    assert float(new.popularity.sum()) == 60 * 49
    assert command(world, "verify", "--alias", "serving")["holds"]
    # From scratch it is another model.
    scratch = command(world, "refit", "--from-scratch")
    assert scratch["new"] and scratch["version"] > warm["version"]


def test_another_champion_is_served_at_once_and_goes_back(
    world: World, versions: dict[str, int]
) -> None:
    served = aliases()["serving"]
    crown(world, versions["sasrec+habit"])
    assert aliases()["serving"] == str(versions["sasrec+habit"])
    other = command(world, "refit")
    assert other["how"] == f"from version {versions['sasrec+habit']}"
    assert aliases()["serving"] == str(other["version"])
    # A refit of a version that is not the champion is made, and not served.
    put(world, ring(events=44))
    aside = command(world, "refit", "--model-version", str(versions["gru4rec"]))
    assert aside["new"] and aside["serving"] is None
    assert aliases()["serving"] == str(other["version"])
    command(world, "rollback", "--reason", "for the test")
    assert aliases()["champion"] == str(versions["gru4rec"])
    assert aliases()["serving"] == str(aside["version"]) != served


def test_what_is_counted_is_counted_anew(world: World, versions: dict[str, int]) -> None:
    crown(world, versions["personal_top"])
    done = command(world, "refit")
    assert done["how"] == "counted" and done["epochs"] == 0
    found = stored(done["version"])
    assert float(found.model.count.sum()) == 60 * 44


def test_killed_anywhere_it_ends_the_same(
    world: World, versions: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As SIGKILL: nothing after it is done."""

    crown(world, versions["gru4rec"])
    put(world, ring(events=46))
    client, _ = tracking.connect("toy")

    def count() -> int:
        return len(client.search_model_versions("name = 'toy'"))

    began = count()
    # (recorded() marks what ends by an error as failed; a killed run stays RUNNING: both go on.)
    for name, after in (("fit_warm", False), ("make_version", False), ("make_version", True),
                        ("serve", False)):  # fmt: skip
        real = getattr(refits, name)

        def ends(*given: Any, real: Any = real, after: bool = after, **named: Any) -> Any:
            if after:
                real(*given, **named)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(refits, name, ends)
            with pytest.raises(Killed):
                command(world, "refit")
    done = command(world, "refit")
    assert count() == began + 1, "one version, whenever it was killed"
    assert not done["new"] and aliases()["serving"] == str(done["version"])
    assert stored(done["version"]).facts["trained_until"] == done["trained_until"]


def test_an_alias_that_lags_is_not_served(world: World, versions: dict[str, int]) -> None:
    client, _ = tracking.connect("toy")
    crown(world, versions["gru4rec"])
    assert served_alias(client, "toy") == "serving"
    client.set_registered_model_alias("toy", "champion", str(versions["personal_top"]))
    assert served_alias(client, "toy") == "champion", "killed between the two aliases"
    client.delete_registered_model_alias("toy", "serving")
    assert served_alias(client, "toy") == "champion", "a registry that knows no refits"


def test_a_table_without_new_events_teaches_nothing_and_is_served(
    world: World, versions: dict[str, int]
) -> None:
    crown(world, versions["gru4rec"])
    story = later()
    put(world, story)
    command(world, "refit")
    # (As after `jobs forget`: somebody is gone, and everything else is as it was.)
    newest = max(story, key=lambda user: story[user][-1][1])
    put(world, {user: story[user] for user in story if user != "u001" or user == newest})
    done = command(world, "refit")
    assert done["new"] and done["epochs"] == 0 and done["how"].startswith("from version")
    assert aliases()["serving"] == str(done["version"])
    assert command(world, "verify", "--served")["holds"]


def test_what_saw_a_forgotten_user_is_not_carried_on(
    world: World, versions: dict[str, int]
) -> None:
    client, _ = tracking.connect("toy")
    crown(world, versions["gru4rec"])
    story = later()
    put(world, story)
    done, left = command(world, "refit"), sorted(story)
    recipe = versions["gru4rec"]
    for saw, how in (([], f"from version {recipe}"), ([recipe], "from scratch")):
        for marked in (done["version"], *saw):
            client.set_model_version_tag("toy", str(marked), SAW_FORGOTTEN, "true")
        left.pop()
        put(world, {user: story[user] for user in left})
        done = command(world, "refit")
        assert done["new"] and done["how"] == how, "older refits have seen the person, too"
        again = command(world, "refit")
        assert not again["new"] and again["version"] == done["version"]
    client.delete_model_version_tag("toy", str(recipe), SAW_FORGOTTEN)


def test_old_refits_go_and_take_their_files_along(world: World, versions: dict[str, int]) -> None:
    from models.registry.old_refits import remove_old_refits
    from models.registry.register import refits_of, trained_on
    from tests.support.recorded import file_of_version

    client, _ = tracking.connect("toy")
    crown(world, versions["gru4rec"])
    refits = [int(one.version) for one in refits_of(client, "toy", str(versions["gru4rec"]))]
    serving, listed = int(aliases()["serving"]), refits[0]
    assert serving in refits and len(refits) > 2 and serving != listed
    files = {version: file_of_version(version, "items.json") for version in refits}
    runs = {v: str(client.get_model_version("toy", str(v)).run_id) for v in refits}
    pinned = {name for names in trained_on("toy")[0].values() for name in names}
    assert {f"toy/{v}" for v in refits} & pinned == {f"toy/{serving}"}
    assert f"toy/{versions['gru4rec']}" in pinned

    assert remove_old_refits("toy", 0, set()) == [], "none is that old"
    gone = remove_old_refits("toy", 2**60, {str(listed)})
    assert set(refits) - set(gone) == {serving, listed}
    for version in refits:
        there = version in (serving, listed)
        assert files[version].is_file() == there
        stage = client.get_run(runs[version]).info.lifecycle_stage
        assert (stage == "active") == there
    assert {str(v) for v in versions.values()} <= {
        str(one.version) for one in client.search_model_versions("name = 'toy'")
    }
    assert remove_old_refits("toy", 2**60, {str(listed)}) == []
    assert command(world, "verify", "--served")["holds"]


def test_mistakes_are_answered(world: World, versions: dict[str, int]) -> None:
    assert "has no version 77" in refused(world, "refit", "--model-version", "77")
    assert "has no version 99" in refused(world, "refit", "--table-version", "99")
    with pytest.raises(UserError, match="running in another process"):
        request = refits.Request(source=_source(world), lake=str(world.lake), from_scratch=True)
        put(world, ring(events=45))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refits.Checkpoints, "alone", _taken)
            refits.refit(request)


def _source(world: World) -> Any:
    from jobs.core.source_file import load_source

    return load_source(str(world.source))


def _taken(_: object) -> Any:
    import contextlib

    return contextlib.nullcontext(False)


def test_lists_are_of_what_is_served_and_say_where_they_come_from(
    world: World, versions: dict[str, int]
) -> None:
    crown(world, versions["gru4rec"])
    put(world, later())
    served = command(world, "refit")
    assert refused(world, "explain", "--user", "u001").startswith("error: there is no table at")
    command(world, "score", "--k", "5")
    assert f"has no list of user 'nobody' by version {served['version']}" in refused(
        world, "explain", "--user", "nobody"
    )
    found = command(world, "explain", "--user", "u001")
    assert found["list"]["model_version"] == served["version"] and found["list"]["size"] == 5
    assert found["served"]["refit_of"] == versions["gru4rec"]
    assert found["served"]["trained_until"] == served["trained_until"]
    assert found["served"]["how"] == served["how"]
    recipe = found["recipe"]
    assert recipe["version"] == versions["gru4rec"] and recipe["comparison"] == "c"
    assert recipe["ndcg@10"] == pytest.approx(served["recipe_ndcg@10"])
    assert recipe["gate"] == "forced"
    tables = found["tables"]
    assert tables["gold.sequences"] == served["table_version"] and tables["published_by"] == []

    from tests.models.selection.test_gate import a_run_published

    a_run_published(world, tables["rows_of"])
    tables = command(world, "explain", "--user", "u001")["tables"]
    assert [run["run_id"] for run in tables["published_by"]] == ["r1"]
    # Without a refit, the list is the recipe's own.
    crown(world, versions["personal_top"])
    client, _ = tracking.connect("toy")
    client.set_registered_model_alias("toy", "serving", str(versions["personal_top"]))
    command(world, "score", "--k", "5")
    alone = command(world, "explain", "--user", "u001")
    assert alone["served"]["refit_of"] is None and alone["recipe"]["method"] == "personal_top"
