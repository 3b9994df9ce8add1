"""What a session rule is worth: the same events and targets, other sessions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.core.errors import UserError
from models.data.load import load_data, prepared
from models.data.paper_a import gap_us, same_events
from models.data.splits import Events, Filters
from models.networks.methods import config, reads_sessions, recommender
from tests.support.gold_world import ring, rows_of, write_gold
from tests.support.recorded import World

MINUTE = 60_000_000


@pytest.mark.parametrize(
    ("preprocess", "microseconds"),
    [("gold", None), ("gap:1800", 1_800_000_000), ("gap:0.5", 500_000), ("paper_a", 86_400_000_000)],
)  # fmt: skip
def test_what_ends_a_session(preprocess: str, microseconds: int | None) -> None:
    assert gap_us(preprocess) == microseconds
    assert same_events(preprocess) == ("paper_a" if preprocess == "paper_a" else "gold")


@pytest.mark.parametrize("wrong", ["gap:", "gap:-1", "gap:0", "gap:soon", "gap:nan", "gap:inf"])
def test_a_gap_is_a_number_of_seconds(wrong: str) -> None:
    with pytest.raises(UserError, match="write a number of seconds above 0 after gap:"):
        gap_us(wrong)


def test_the_same_events_are_in_other_sessions(tmp_path: Path) -> None:
    write_gold(tmp_path, "toy", ring())
    told = {
        "lake": str(tmp_path),
        "source": "toy",
        "filters": Filters(min_item_events=1, min_session_events=1, min_user_sessions=2),
        "split": "temporal",
    }
    gold = load_data(**told)
    for minutes in (1, 45, 10_000):
        other = load_data(**told, preprocess=f"gap:{60 * minutes}")
        events, ts = other.events, other.events.ts
        same_user = events.user[1:] == events.user[:-1]
        apart = np.diff(ts) > minutes * MINUTE
        assert (events.opens[1:] == (apart | ~same_user)).all()
        assert (events.index == gold.events.index).all() and (other.period == gold.period).all()
        assert other.item_ids == gold.item_ids
        assert (other.training.rows.item == gold.training.rows.item).all()
        assert (other.training.user == gold.training.user).all()
        assert other.training.counts == gold.training.counts, "filters count the table's sessions"
        new = np.diff(other.training.rows.ordinal) != 0
        inside = np.ones(len(new), bool)
        inside[other.training.rows.start[1:-1] - 1] = False
        assert (new[inside] == (np.diff(other.training.rows.ts) > minutes * MINUTE)[inside]).all()
    plain = Events.of(gold.sequences)
    assert prepared(plain, "gold") is plain
    with pytest.raises(UserError, match="unknown preprocessing 'minutes:3'"):
        prepared(plain, "minutes:3")


@pytest.mark.slow
@pytest.mark.training
def test_rules_are_compared_on_the_same_targets(world: World) -> None:
    results = world.root / "rules.json"
    status, outcome, said, err = world.run(
        "compare-rules", "--source", str(world.source), "--comparison", "rules", "--results",
        str(results), "--methods",
        "gru4rec+st", "--gaps", "0.5,86400", "--seeds", "1,2", "--json", "--", "--epochs", "2",
    )  # fmt: skip
    assert status == 0 and outcome is not None, said + err
    rows = {row["method"]: row for row in outcome["methods"]}
    assert set(rows) == {"gru4rec+st", "gru4rec+st (gap 0.5 s)", "gru4rec+st (gap 86400 s)"}
    for name, row in rows.items():
        if "gap" in name:
            assert row["vs_vanilla"]["method"] == "gru4rec+st"
            assert row["vs_vanilla_seeds"]["seeds"] == [2, 2]
    # (Kinds are told apart where there are both: here each event opens a session, or none does.)
    assert set(rows["gru4rec+st"]["by_target"]) == {"first", "inside"}
    assert rows["gru4rec+st (gap 0.5 s)"]["by_target"] == {}
    counts = {cell["method"]: cell["counts"] for cell in json.loads(results.read_text())["cells"]}
    assert {one["targets"] for one in counts.values()} == {241}, "the same targets"
    first = {name: one["first_of_a_session"] for name, one in counts.items()}
    assert first["gru4rec+st (gap 0.5 s)"] == 241 and first["gru4rec+st (gap 86400 s)"] == 0

    status, _, _, err = world.run(
        "compare-rules", "--source", str(world.source), "--comparison", "r2", "--methods", "gru4rec+st",
        "--", "--target", "next_session",
    )  # fmt: skip
    assert status == 1 and "add -- --target next_item" in err

    status, _, _, err = world.run(
        "compare-rules", "--source", str(world.source), "--comparison", "r3", "--methods",
        "gru4rec,gru4rec+tsa,gru4rec+sse",
    )  # fmt: skip
    assert status == 1 and "gru4rec, gru4rec+tsa: nothing in it reads sessions" in err


@pytest.mark.parametrize(
    "method", ["gru4rec+st", "sasrec", "sasrec+tsa", "sasrec+sse", "gru4rec+habit", "narm"]
)
def test_who_sees_where_sessions_end(method: str) -> None:
    """The scores of the same events in other sessions are others, or the same to the last bit."""
    torch.manual_seed(1)
    model = recommender(4, config(method, "tiny")).eval()
    for one in model.parameters():
        torch.nn.init.normal_(one, std=0.3)
    items = [1, 2, 3, 1, 2]
    scores = [
        model.score(rows, rows.start[:-1], rows.start[1:])
        for ends in ([1, 1, 1, 1, 1], [1, 1, 2, 2, 3])
        for rows in [
            rows_of(
                [(item, 60 * n, s) for n, (item, s) in enumerate(zip(items, ends, strict=True))]
            )
        ]
    ]
    assert torch.equal(*scores) != reads_sessions(method)
