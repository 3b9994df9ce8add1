"""The page: what is in it, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import UTC, date, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.core.arrow_types import arrow_schema
from jobs.core.source_file import load_source
from jobs.core.tables import LISTS, NIGHTS, RECOMMENDATIONS, RUNS, Table
from jobs.privacy.person import Person
from models.data.sequences import Sequences
from models.evaluation.evaluate import evaluate
from models.evaluation.rescore import questions, stored_cut
from models.networks.saved_model import load
from models.registry import forget, tracking
from models.report import examples
from models.report.report import answers, statistics
from tests.support.recorded import World

EVIL = "<script>document.title='broken'</script>"


def put(world: World, table: Table, rows: list[dict[str, Any]]) -> None:
    made = pa.Table.from_pylist(rows, schema=arrow_schema(table.columns))
    write_deltalake(table.path(str(world.lake), "toy"), made, mode="overwrite")


def a_run(batch: str, job: str, **others: Any) -> dict[str, Any]:
    now = datetime(2026, 3, 1, 2, int(batch[-1]), tzinfo=UTC)
    empty: dict[str, Any] = dict.fromkeys(RUNS.columns)
    return empty | {
        "run_id": f"{batch}-{job}", "batch": batch, "job": job, "step": "all", "source": "toy",
        "day": date(2026, 3, int(batch[-1])), "started_ts": now, "seconds": 12.0,
        "outcome": "ok", "counts": {}, "rejects": {}, "tables_in": {}, "tables_out": {},
        "files": [],
    } | others  # fmt: skip


@pytest.fixture(scope="module")
def page(world: World) -> Path:
    for method in ("pop", "gru4rec", "gru4rec+st"):
        world.train(method, "--comparison", "r1", "--seed", "1")
    asked = ("--source", str(world.source), "--comparison", "r1")
    assert world.run("compare", *asked)[0] == 0
    assert world.run("register", *asked)[0] == 0
    assert world.run("promote", "--source", str(world.source))[0] == 0
    put(world, RUNS, [
        a_run("night-1", "ingest", counts={"read": 1234, "events_new": 1200},
              rejects={"late": 34}, tables_out={"bronze.events": 3}, files=["a.csv", "b.csv"]),
        a_run("night-1", "sessionize", tables_in={"bronze.events": 3},
              tables_out={"silver.sessions": 2}),
        a_run("night-1", "sequences", tables_in={"silver.sessions": 2},
              tables_out={"gold.sequences": 0}),
        a_run("night-2", "ingest", outcome="SchemaError", message=f"no column {EVIL}"),
    ])  # fmt: skip
    days = [date(2026, 3, number) for number in range(1, 9)]
    counts = dict.fromkeys(("events", "users", "sessions", "items", "new_items"), 5)
    more = {"gaps": [5] * 24, "batch": "b", "made_ts": datetime(2026, 3, 9, tzinfo=UTC)}
    put(world, NIGHTS, [{"day": day, **counts, **more} for day in days])
    lists = [
        {"user_id": user, "model_name": "toy", "model_version": "1",
         "created_ts": datetime(2026, 3, 9, tzinfo=UTC),
         "items": [{"item_id": item, "score": 1.0} for item in (EVIL, "i03")]}
        for user in ("u000", "u001", "u002", "u003", "gone")
    ]  # fmt: skip
    put(world, RECOMMENDATIONS, lists)
    made = datetime(2026, 3, 9, tzinfo=UTC)
    worth = {name: 0.25 for name, kind in LISTS.columns.items() if kind == "double"}
    put(world, LISTS, [{"night": day, "created_ts": made, **worth} for day in days])
    status, done, _, err = world.run("report", "--source", str(world.source), "--json")
    assert status == 0 and done is not None, err
    assert done["comparison"] == "r1" and done["url"] is None  # no server
    assert Path(done["page"]) == world.lake / "toy" / "report.html"
    return Path(done["page"])


class Seen(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_the_page_has_every_part_and_nothing_from_elsewhere(page: Path, world: World) -> None:
    text = page.read_text()
    seen = Seen(text)
    assert sum(tag == "script" for tag, _ in seen.tags) == 1  # its own: EVIL is text
    assert EVIL in seen.text
    for tag, attributes in seen.tags:
        for name in ("src", "href", "xlink:href", "action"):
            place = attributes.get(name) or ""
            assert place.startswith(("#", "data:")) or not place, (tag, place)
        if tag == "svg":
            assert "viewbox" in attributes and "width" not in attributes
    assert not re.search(r"url\((?!#)|@import", text)
    pictures = [a for tag, a in seen.tags if a.get("role") == "img"]
    assert len(pictures) == 8 and all(len(a["aria-label"] or "") > 20 for a in pictures)
    ids = [a["id"] for _, a in seen.tags if a.get("id")]
    assert len(ids) == len(set(ids))

    words = re.sub(r"\s+", " ", seen.text)
    for said in (
        "gru4rec+st", "1,234", "34 late", "SchemaError", "no column <script>",
        "u000", "i03", "night-1-sequences", "bronze.events", "Half of the sessions",
        "Lists beside what came next", "What came:", "What the lists were worth", "The gate", "was refused", "Settings of gru4rec", "width D of embeddings and layers",
    ):  # fmt: skip
        assert said in words, said
    assert "gone" not in words  # a list whose user has no history is not shown
    from models.registry import tracking

    client, experiment = tracking.connect("toy")
    [compared] = tracking.runs(client, experiment, kind="compare", comparison="r1")
    assert "report.html" in {one.path for one in client.list_artifacts(compared.info.run_id)}


@pytest.mark.slow
def test_lists_beside_what_came_next_are_the_winners(
    page: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all users; a list has what came where evaluation says that it was hit."""
    source = load_source(str(world.source))
    client, experiment = tracking.connect("toy")
    [compared] = tracking.runs(client, experiment, kind="compare", comparison="r1")
    with tracking.downloaded(client, compared.info.run_id, "compare.json") as file:
        outcome = tracking.read_json(file)
    monkeypatch.setattr(examples, "USERS", 10**6)
    told = examples.lists_beside_what_came(client, outcome, source, str(world.lake))
    assert told is not None and told["method"] == outcome["winner"]

    run_id = next(r for r in outcome["methods"] if r["method"] == told["method"])["mlflow_run_id"]
    with tracking.downloaded(client, run_id, "trained") as folder:
        stored = load(folder)
    events, asked = questions(
        stored, source, str(world.lake), outcome["table_version"], stored_cut(stored), "next_item"
    )
    first = asked.select(np.unique(asked.user, return_index=True)[1])
    result = evaluate(stored.model, first, repeat_policy=stored.facts["repeat_policy"])
    names = [events.sequences.user_id[user] for user in result.users]
    hit = dict(zip(names, result.values["hr@10"] > 0, strict=True))
    assert {one["user"]: any(came for _, came in one["list"]) for one in told["users"]} == hit
    assert sum(hit.values()) > 0
    for one in told["users"]:
        assert len(one["list"]) == examples.LINES and len(one["came"]) + one["unknown"] == 1
        assert [item for item, came in one["list"] if came] in ([], one["came"])


BEST: dict[str, Any] = {
    "method": "sasrec+habit", "ndcg@10": 0.2, "seconds": 93.4, "num_params": 668_320,
    "num_params_added": 253, "params_added_pct": 0.04,
    "vs_baseline": {"method": "personal_top", "difference": 0.01, "low": 0.002, "high": 0.018,
                    "verdict": "better", "detectable_pct": 6.0},
}  # fmt: skip


def test_the_page_opens_with_what_is_asked_first() -> None:
    said = dict(answers({"methods": [BEST]}))
    assert list(said) == ["Is it better?", "By how much?", "Are we sure?", "What did it cost?"]
    assert said["Is it better?"].endswith("the best that only counts: 0.2000 and 0.1900 NDCG@10.")
    assert said["By how much?"] == "+0.0100 (+5.3 %), 95 % interval +0.0020 to +0.0180."
    assert said["Are we sure?"] == (
        "Yes: the interval excludes 0. A difference below 6.0 % would probably not have been seen."
    )
    assert said["What did it cost?"] == (
        "93 s to train and evaluate once, 668,320 parameters, 253 more than its backbone (0.04 %)."
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"verdict": "cannot tell", "low": -0.01}, "so the difference is not significant."),
        ({"verdict": "worse"}, "It is significantly worse."),
    ],
)
def test_what_is_not_sure_is_not_said_to_be(change: dict[str, Any], said: str) -> None:
    old = {name: value for name, value in BEST["vs_baseline"].items() if name != "detectable_pct"}
    told = dict(answers({"methods": [BEST | {"vs_baseline": old | change}]}))
    assert told["Are we sure?"].endswith(said)


def test_where_nothing_was_compared_with_counting_the_page_says_that() -> None:
    alone = dict(answers({"methods": [BEST | {"vs_baseline": None}]}))
    assert alone["Is training worth it?"].endswith("No baseline was compared with it.")
    counted = BEST | {"method": "personal_top", "vs_baseline": None, "num_params_added": 0}
    assert dict(answers({"methods": [counted]}))["Is training worth it?"].startswith("No. ")


def test_without_a_comparison_it_says_what_to_do(world: World, page: Path) -> None:
    status, _, _, err = world.run(
        "report", "--source", str(world.source), "--comparison", "never", "--json"
    )
    assert status == 1 and "no comparison 'never' of 'toy' is recorded (there are " in err
    assert "). To record it, run `python -m models compare --source toy --comparison never`" in err


def test_the_statistics_of_a_log_made_by_hand() -> None:
    """Two users; the second one's arrays lie first. Sessions of 3, 1 and 2 events."""
    minute = 60_000_000
    ts = np.array([0, 10, 0, 1, 3, 100], np.int64) * minute
    made = Sequences(
        path="", version=0, table_id="", user_id=["ann", "bob"],
        start=np.array([2, 0]), length=np.array([4, 2]),
        item=np.array([1, 2, 1, 1, 3, 1], np.int32), ts=ts,
        session=np.array([1, 1, 1, 1, 1, 2], np.int32), feedback=np.zeros(6, np.int8),
        exposed=np.zeros(0, np.int32), exposed_count=np.zeros(6, np.int32),
    )  # fmt: skip
    found = statistics(made)
    assert (found["events"], found["users"], found["sessions"], found["items"]) == (6, 2, 3, 3)
    assert found["length"]["half"] == 2 and found["per_user"]["half"] == 1.5
    assert found["pause_s"]["half"] == 120  # 60, 120 and 600 s
    assert found["first"] == found["last"] == "1970-01-01"


# -- in a browser ---------------------------------------------------------------------------------

PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const column = place => [...table.tBodies[0].rows].map(row => row.cells[place].textContent);
  const heads = [...table.tHead.rows[0].cells];
  const told = {errors, before: column(0), wide: document.documentElement.scrollWidth};
  heads[2].querySelector("button").click();
  told.up = column(2); told.sort = heads[2].getAttribute("aria-sort");
  heads[2].querySelector("button").click();
  told.down = column(2);
  heads[7].querySelector("button").click();
  told.parameters = column(7); told.sorts = heads.map(head => head.getAttribute("aria-sort"));
  heads[0].querySelector("button").focus();
  told.focus = document.activeElement.textContent;
  told.width = innerWidth; told.title = document.title;
  const pre = document.createElement("pre");
  pre.id = "told"; pre.textContent = JSON.stringify(told);
  document.body.append(pre);
});
</script>
"""


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium here (Debian: apt install chromium)")


def opened(page: Path, folder: Path, *options: str) -> tuple[str, str]:
    done = subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def test_a_browser_shows_and_sorts_it_without_an_error(page: Path, tmp_path: Path) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("<head>", "<head>" + PROBE))
    for width in (1200, 500):
        dom, log = opened(probed, tmp_path, "--dump-dom", f"--window-size={width},900")
        assert "CONSOLE" not in log, log
        told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', dom)[1])  # type: ignore[index]
        assert told["errors"] == [] and "which way of encoding sessions won" in told["title"]
        assert told["up"] == sorted(told["up"]) and told["sort"] == "ascending"
        assert told["down"] == told["up"][::-1]
        numbers = [int(text.replace(",", "")) for text in told["parameters"]]
        assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 3
        assert told["sorts"].count(None) == 10 and told["sorts"][7] == "descending"
        assert told["focus"] == "method"  # a keyboard reaches it
        assert told["wide"] <= told["width"]  # tables scroll, the page does not


def test_it_prints(page: Path, tmp_path: Path) -> None:
    opened(page, tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_who_is_forgotten_leaves_scores_and_pages(page: Path, world: World) -> None:
    """(The last test: the page in MLflow is gone afterwards.)"""
    client, experiment = tracking.connect("toy")
    runs = client.search_runs([experiment])
    folder = Path(".mlflow") / "artifacts"
    named = [file for file in folder.rglob("report.html") if "u000" in file.read_text()]
    assert len(named) == 1 and "u000" in page.read_text()
    before = world.run("compare", "--source", str(world.source), "--comparison", "r1", "--json")[1]
    whom = Person("u000", "u000").stands_in
    assert forget.forget("toy", whom, "u000", "u-5f") == 3 + 1
    assert forget.forget("toy", whom, "u000", "u-5f") == 0
    for run in runs:
        for file in folder.rglob(f"{run.info.run_id}/**/per_user.npz"):
            with np.load(file) as arrays:
                for name in [name for name in arrays if name.endswith("user_id")]:
                    assert "u000" not in arrays[name]
                assert "u-5f" in arrays["user_id"] and len(set(arrays["user_id"])) == 60
    told = named[0].read_text()
    assert "u000" not in told and "then python -m models report --source toy" in told
    # What was compared on these users stands.
    after = world.run("compare", "--source", str(world.source), "--comparison", "r1", "--json")[1]
    assert before and after and after["methods"] == before["methods"]
