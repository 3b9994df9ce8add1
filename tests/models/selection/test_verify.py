"""`models verify`: a registered model, asked by raw events, gives what its training recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from deltalake import DeltaTable, write_deltalake

from jobs.core.source_file import load_source
from jobs.core.tables import SESSIONS
from models.core.errors import UserError
from models.data import raw_events
from models.networks.methods import BACKBONES, BASELINES, SESSION_ENCODERS
from models.registry import tracking
from models.selection import questions, verify_worker
from models.selection.questions import loaded_here
from models.selection.verify import in_words, lists_apart, verify
from tests.support.raw_world import raw_world
from tests.support.recorded import World, file_of_version

GAP, NATIVE = "gap", "source_session_id"
KNOWN = ("--request-time", "known")
SETS = ("--target", "next_session")
EXCLUDED = ("--repeat-policy", "exclude_seen")
CUT = ("--valid-from", "2024-03-04T04:00Z", "--test-from", "2024-03-04T14:00Z")
PAPER = ("--preprocess", "paper_a")
# rule -> (options of a comparison, its methods): as few as have everything among them
SOME: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    (GAP, (), ("personal_top", "gru4rec+st+fb+habit", "hstu+sse+tsa")),
    (GAP, (*KNOWN, *SETS), ("bert4rec+st+tsa+fb", "sessionrec-sasrec+habit", "tifu_knn")),
    (NATIVE, KNOWN, ("gru4rec+st+sse+tsa", "vsknn", "up_cf")),
    (NATIVE, (*SETS, *EXCLUDED), ("sasrec+tsa", "item_knn", "gp_topfreq")),
    (GAP, PAPER, ("narm",)),
]
ENDS = ("", "+st", "+sse", "+tsa", "+st+sse+tsa", "+fb", "+habit", "+st+sse+tsa+fb+habit")
EVERY = (
    *BASELINES,
    *(backbone + end for backbone in BACKBONES for end in ENDS),
    *(
        encoder + end
        for encoder in SESSION_ENCODERS
        for end in ("", "+sse", "+tsa", "+habit", "+sse+tsa")
    ),
)


@pytest.fixture(scope="module", params=[GAP, pytest.param(NATIVE, marks=pytest.mark.slow)])
def raw(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with raw_world(tmp_path_factory.mktemp("raw"), request.param) as there:
        there.rule = request.param  # type: ignore[attr-defined]
        yield there


@pytest.fixture(scope="module")
def gap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with raw_world(tmp_path_factory.mktemp("gap"), GAP, runaways=False) as there:
        made(there, "gap", ("gru4rec+st+fb",), ())
        yield there


def made(
    world: World, comparison: str, methods: tuple[str, ...], options: tuple[str, ...]
) -> dict[str, int]:
    """Method -> version, trained, compared and registered."""
    cut = () if PAPER[0] in options else CUT
    for method in methods:
        world.train(method, "--comparison", comparison, "--epochs", "2", *cut, *options)
    for command in ("compare", "register"):
        asked = ("--source", str(world.source), "--comparison", comparison, "--json")
        status, done, _, err = world.run(command, *asked)
        assert status == 0 and done is not None, err
    return {one["method"]: one["version"] for one in done["versions"]}


def asked(world: World, version: int | None = None, **options: Any) -> dict[str, Any]:
    options = {"opened": loaded_here} | options
    number = {"alias": "challenger"} if version is None else {"number": version}
    return verify(load_source(str(world.source)), str(world.lake), **number, **options)


def holds(told: dict[str, Any]) -> None:
    assert told["holds"] and told["exact"], in_words(told)
    assert told["questions"] > 9 and told["users"] > 9
    assert told["metrics"]["ndcg@10"]["stored"] > 0
    assert (told["lists_differ"], told["refused"], told["not_recomputed"]) == (0, 0, [])
    assert told["silver_exact"] and told["left_out"]["events_differ"] == 0


def test_what_is_served_is_what_was_scored(raw: World) -> None:
    for number, (rule, options, methods) in enumerate(SOME):
        if rule == raw.rule:  # type: ignore[attr-defined]
            for version in made(raw, f"some{number}", methods, options).values():
                told = asked(raw, version)
                holds(told)
                if PAPER[0] not in options:  # (of which such a user has no question)
                    assert told["left_out"]["runaway"] > 0
                    assert told["questions"] < told["questions_of_the_test"]


@pytest.mark.long
@pytest.mark.parametrize("repeats", [(), EXCLUDED])
@pytest.mark.parametrize("target", [(), SETS])
@pytest.mark.parametrize("request_time", [(), KNOWN])
def test_every_method(
    raw: World, request_time: tuple[str, ...], target: tuple[str, ...], repeats: tuple[str, ...]
) -> None:
    options = (*request_time, *target, *repeats)
    methods = EVERY if not repeats else (*BASELINES, "sasrec+st+fb", "sessionrec-hstu")
    if not target:
        methods = tuple(m for m in methods if not m.startswith("sessionrec"))
    for method, version in made(raw, " ".join(["all", *options]), methods, options).items():
        told = asked(raw, version)
        assert told["holds"] and told["exact"], f"{method} {options}: {in_words(told)}"


# -- what it must find ----------------------------------------------------------------------------


def changed(change: Callable[[pa.Table], pa.Table]) -> Callable[[str], Any]:
    """The registered model, which hears another request than the one that was made."""

    @contextmanager
    def opened(uri: str) -> Iterator[Any]:
        with loaded_here(uri) as ask:
            yield lambda question: ask(
                change(question).replace_schema_metadata(question.schema.metadata)
            )

    return opened


def by_item(question: pa.Table) -> pa.Table:
    """Ties ordered by item."""
    keys = [("event_ts", "ascending"), ("item_id", "ascending")]
    return question.sort_by(keys).drop_columns(["tie_break", "event_id"])


def by_row(question: pa.Table) -> pa.Table:
    """Ties left as the rows lie, and they lie the other way round."""
    return question.take(pa.array(range(question.num_rows)[::-1])).drop_columns(
        ["tie_break", "event_id"]
    )


def silent_is_positive(question: pa.Table) -> pa.Table:
    """A row that says nothing about feedback is taken for a positive one."""
    at = question.column_names.index("event_type")
    silent = pc.and_(pc.is_null(question["event_type"]), pc.is_null(question["value"]))
    said = pc.if_else(silent, "buy", question["event_type"])
    return question.set_column(at, "event_type", said)


def without_exposures(question: pa.Table) -> pa.Table:
    return question.drop_columns(["exposed_with"])


def known_items_only(question: pa.Table) -> pa.Table:
    return question.filter(pc.invert(pc.starts_with(question["item_id"], "rare")))


@pytest.mark.parametrize(
    "change", [by_item, by_row, silent_is_positive, without_exposures, known_items_only]
)
def test_a_request_that_is_read_otherwise_is_found(
    gap: World, change: Callable[[pa.Table], pa.Table]
) -> None:
    told = asked(gap, opened=changed(change))
    assert not told["holds"] and told["lists_wrong"] > 0, in_words(told)
    assert "THIS DOES NOT HOLD" in in_words(told)


def test_rows_in_any_order_are_the_same_request(gap: World) -> None:
    def shuffled(question: pa.Table) -> pa.Table:
        # (Users answer in order of first appearance: a user's rows stay together.)
        keys = [("user", "ascending"), ("event_id", "descending")]
        place = pc.dictionary_encode(question["user_id"]).combine_chunks().indices
        return question.append_column("user", place).sort_by(keys).drop_columns(["user"])

    holds(asked(gap, opened=changed(shuffled)))


@contextmanager
def by_the_native_rule(uri: str) -> Iterator[Any]:
    """The stored facts are another session rule's."""
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(uri)
    model.unwrap_python_model().stored.facts["session_rule"] = NATIVE
    yield lambda question: verify_worker.answer(model, question)


def test_the_native_rule_for_a_source_under_the_gap_rule_is_found(gap: World) -> None:
    told = asked(gap, opened=by_the_native_rule)
    assert not told["holds"] and told["metrics"]["ndcg@10"]["users_wrong"] > 0


def moved(by: float, answer: Callable[[pa.Array], pa.Array] | None = None) -> Callable[[str], Any]:
    """Scores that are `by` higher for every second item."""

    @contextmanager
    def opened(uri: str) -> Iterator[Any]:
        def heard(told: pa.Table) -> pa.Table:
            lists = told["items"].combine_chunks()
            pair = lists.flatten()
            score = pair.field("score").to_numpy(zero_copy_only=False).copy()
            score[::2] += by
            fields = [pair.field("item_id"), pa.array(score)]
            pairs = pa.StructArray.from_arrays(fields, ["item_id", "score"])
            items = pa.ListArray.from_arrays(lists.offsets, pairs)
            return told.set_column(1, "items", items)

        with loaded_here(uri) as ask:
            yield lambda question: heard(ask(question))

    return opened


def test_rounding_is_told_from_a_fault(gap: World) -> None:
    told = asked(gap, opened=moved(1e-9))
    assert told["holds"] and told["lists_wrong"] == 0
    told = asked(gap, opened=moved(0.01))
    assert not told["holds"] and told["lists_wrong"] == told["questions"]


def test_lists_of_k_items_are_compared_with_the_best_k() -> None:
    none = -torch.inf
    own = torch.tensor([[0.9, 0.5, 0.5 + 1e-9, 0.1, none]]).double()

    def apart(*served: float, k: int = 2) -> bool:
        return bool(lists_apart(own, torch.tensor([served]).double(), k, 1e-6)[0])

    assert not apart(0.9, none, 0.5, none, none)  # the best two
    assert not apart(0.9, 0.5, none, none, none)  # the other of two that are all but equal
    assert apart(0.9, none, none, 0.1, none)  # a better item is left out
    assert apart(0.9, none, 0.51, none, none)  # another score
    assert apart(0.9, none, none, none, none)  # one item is missing
    assert apart(0.9, none, 0.5, none, 0.5)  # one that must not be listed
    assert not apart(0.9, 0.5, 0.5, 0.1, none, k=9)  # all there are
    assert apart(0.9, 0.5, 0.5, none, none, k=9)


def test_a_version_that_refuses_is_counted(gap: World) -> None:
    told = asked(gap, opened=changed(lambda question: question.drop_columns(["event_ts"])))
    assert not told["holds"] and told["refused"] == told["questions"]
    assert "event_ts" in told["refusal"] and "questions were refused" in in_words(told)


# -- which events, whose -----------------------------------------------------------------------------


def test_whole_users_are_drawn(gap: World) -> None:
    everyone = asked(gap)
    some = asked(gap, most=15)
    assert some["holds"] and 0 < some["questions"] <= 15 and some["users"] < everyone["users"]
    # What is of all lists together can be compared where all questions were asked.
    for name in ("coverage@10", "popularity@20", "test_loss"):
        assert everyone["metrics"][name]["holds"] and name not in some["metrics"]
        assert abs(everyone["metrics"][name]["difference"]) < 1e-6
    assert asked(gap, most=1)["users"] <= 1 and asked(gap, most_users=3)["users"] <= 3
    with pytest.raises(UserError, match="--most 0: use 1 or more"):
        asked(gap, most=0)


def test_a_large_log_is_read_and_asked_in_parts(
    gap: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = asked(gap)
    monkeypatch.setattr(raw_events, "PART_EVENTS", 70)
    monkeypatch.setattr(raw_events, "BATCH", 16)
    monkeypatch.setattr(questions, "MOST_SCORES", 100)
    told = asked(gap)
    assert told["holds"] and told["left_out"] == {"runaway": 0, "events_differ": 0}
    assert (told["questions"], told["users"]) == (whole["questions"], whole["users"])
    assert told["metrics"]["ndcg@10"]["recomputed"] == pytest.approx(
        whole["metrics"]["ndcg@10"]["recomputed"], abs=1e-6
    )


def test_sessions_that_changed_since_are_left_out(gap: World, tmp_path: Path) -> None:
    """The version that the sequences were made from is read; where it is gone, the newest is."""
    path = SESSIONS.path(str(gap.lake), "toy")
    table = DeltaTable(path)
    old, rows = table.file_uris(), table.to_pyarrow_table().to_pylist()
    before = asked(gap)
    user = next(row["user_id"] for row in rows if "ü" in row["user_id"])
    for row in rows:
        if row["user_id"] == user:
            row["events"][0]["item_id"] = "another"
    schema = pa.schema(table.schema().to_arrow())
    write_deltalake(path, pa.Table.from_pylist(rows, schema), mode="overwrite")
    assert asked(gap) | {"largest_difference": 0} == before | {"largest_difference": 0}
    kept = {Path(file): tmp_path / Path(file).name for file in old}
    for file, aside in kept.items():
        file.rename(aside)
    try:
        told = asked(gap)
        assert told["holds"] and not told["silver_exact"], in_words(told)
        assert told["silver_version"] == 1 and told["left_out"]["events_differ"] == 1
        assert "1 users whose events in silver.sessions version 1 are not those" in in_words(told)
    finally:
        for file, aside in kept.items():
            aside.rename(file)


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_asks_the_code_that_was_registered(gap: World) -> None:
    """In a process of its own; and its status says whether it holds."""
    words = ("verify", "--source", str(gap.source), "--alias", "challenger", "--json")
    status, told, said, err = gap.run(*words)
    assert status == 0 and told is not None and told["holds"], said + err
    assert "What is served is what was scored" in said
    client, _ = tracking.connect("toy")
    version = str(client.get_model_version_by_alias("toy", "challenger").version)
    file = file_of_version(version, "model.json")
    whole = file.read_text()
    values = json.loads(whole)
    values["facts"]["gap_us"] = 5_000_000
    file.write_text(json.dumps(values))
    try:
        status, told, said, err = gap.run(*words[:-3], "--model-version", version, "--json")
        assert status == 1 and told is not None and not told["holds"]
        assert "THIS DOES NOT HOLD" in said
        file.write_text("{")
        status, _, _, err = gap.run(*words[:-3], "--model-version", version)
        assert status == 1 and "does not load, or ended while it was asked" in err
    finally:
        file.write_text(whole)
    status, _, _, err = gap.run("verify", "--source", str(gap.source))
    assert status == 1 and "has no alias 'champion'" in err
