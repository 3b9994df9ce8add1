"""People who are forgotten, and ids that are hashed as they are read: nothing is left anywhere."""

from __future__ import annotations

import gzip
import html
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.core.errors import SettingsError
from jobs.core.settings import settings
from jobs.core.tables import (
    EVENTS,
    FORGOTTEN,
    ITEMS,
    RECOMMENDATIONS,
    REJECTS,
    RUNS,
    SEQUENCES,
    SESSIONS,
)
from jobs.forget.forget import forget, in_words
from jobs.ops.explain import explain
from jobs.ops.explain import in_words as explained
from jobs.privacy.person import Person
from jobs.privacy.pseudonyms import Privacy
from models.core.errors import UserError
from models.data.sequences import open_sequences
from tests.support.spark_tools import CLICKS, Workshop

KEY = "k" * 40
ANN = "ann.0-7"  # an id with characters that patterns know
PEOPLE = ["bob", ANN, f"{ANN}9", "carl"]
LOOSE = CLICKS.replace("*.csv", "*.csv*") + "\n[quality]\nmax_reject_share = 0.9\n"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SESSIONMILL_ID_KEY", KEY)
    settings.cache_clear()
    yield
    monkeypatch.delenv("SESSIONMILL_ID_KEY", raising=False)
    settings.cache_clear()


def texts(path: Path) -> str:
    """All that a file says, whatever it is packed in."""
    if path.suffix == ".parquet":
        return json.dumps(pq.read_table(path).to_pylist(), default=str)
    if path.suffix == ".arrow":
        return json.dumps(pa.ipc.open_file(path).read_all().to_pylist(), default=str)
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")


def where(name: str, *folders: Path) -> list[str]:
    """The files that have a name as a word of its own."""
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    return [
        str(file)
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file() and word.search(texts(file))
    ]


def lines(users: list[str], start: int, item: str = "i") -> list[str]:
    return [
        f"{user},{item}{(PEOPLE.index(user) + step) % 5},{start + 7 * PEOPLE.index(user) + 60 * step}"
        for user in users
        for step in range(4)
    ]


def deliver(shop: Workshop, people: list[str], bad: list[str]) -> None:
    """Three files: as text, packed, and with lines that cannot be used."""
    head = "user,item,ts"
    shop.land("one.csv", "\n".join([head, *lines(people, 1_714_521_600)]) + "\n")
    late = gzip.compress(("\n".join([head, *lines(people, 1_714_700_000)]) + "\n").encode())
    shop.land("two.csv.gz", late)
    odd = "\n".join([head, *lines(people, 1_714_900_000, "j"), *bad]) + "\n"
    shop.land("three.csv", odd)


def said(shop: Workshop) -> dict[str, Any]:
    """What the tables say of everybody, by items' ids."""
    name = {row["item_index"]: row["item_id"] for row in shop.rows(ITEMS)}
    return {
        "events": shop.rows(EVENTS, ("ingest_ts", "ingest_file")),
        "sessions": shop.rows(SESSIONS),
        "sequences": sorted(
            (row["user_id"], [name[at] for at in row["item_index"]], row["session_ordinal"])
            for row in shop.rows(SEQUENCES)
        ),
        "rejects": [row["raw"] for row in shop.rows(REJECTS)],
    }


BAD = ["bob,i1,soon", "nothing"]
OF_ANN = [f"{ANN},i1,soon", f"what of {ANN} is this", f"x{ANN},i1,soon"]


@pytest.mark.long
def test_a_person_is_gone_from_everything_and_stays_gone(
    spark: Any, tmp_path: Path, key: None
) -> None:
    (tmp_path / "calm").mkdir()
    calm, shop = (
        Workshop(spark, tmp_path / "calm", LOOSE),
        Workshop(spark, tmp_path / "full", LOOSE),
    )
    deliver(calm, ["bob", f"{ANN}9", "carl"], [*BAD, OF_ANN[2]])
    shop.land("zero.csv", "user,item,ts\n" + "\n".join(lines([ANN], 1_714_000_000)) + "\n")
    shop.run()  # a version of its own, in which there is nobody else
    deliver(shop, PEOPLE, [*BAD, *OF_ANN])
    shop.run()
    calm.run()
    # What nights leave behind: a candidate, a cache of the models, an answer, a run's last words.
    shop.land("four.csv", "\n".join(["user,item,ts", *lines(PEOPLE, 1_715_000_000)]) + "\n")
    shop.run("ingest", step="compute", batch="left-behind")
    (shop.landing / "four.csv").unlink()
    cache = shop.lake_root / "clicks" / "_cache"
    version = shop.version(SEQUENCES)
    path = SEQUENCES.path(str(shop.lake_root), "clicks")
    open_sequences(path, version, cache, "")
    run = dict(shop.rows(RUNS)[0]) | {"run_id": "told", "message": f"line 3: '{ANN},i1,soon'"}
    shop.lake.put_small(RUNS, [tuple(run[name] for name in RUNS.columns)])
    assert len(where(ANN, shop.lake_root, shop.landing)) > 12
    (tmp_path / "again").mkdir()
    shutil.copy(shop.landing / "one.csv", tmp_path / "again")

    done = forget(shop.context(), ANN)
    assert done["events"] == 16 and done["rejects"] == 2
    assert done["landing_lines"] == 18
    assert where(ANN, shop.lake_root, shop.landing) == []
    assert where(f"{ANN}9", shop.landing)  # who has a longer name is somebody else
    assert ANN not in in_words(done)

    # What is left is what had been without them; nothing is read again for it.
    assert said(shop) == said(calm)
    result = shop.run()
    assert result.read == 0 and said(shop) == said(calm)
    validated = shop.run("validate")
    assert len(validated.notes) == 4  # (with ops.fingerprints)

    # The same lines, delivered again under another name.
    shop.land("again.csv", (tmp_path / "again" / "one.csv").read_bytes())
    result = shop.run()
    assert result.read == result.duplicates == 12
    assert "Skipped 4 lines of erased users" in result.notes
    assert said(shop) == said(calm)
    assert where(ANN, shop.lake_root) == []
    again = forget(shop.context(), ANN)
    assert (again["events"], again["rejects"], again["landing_lines"]) == (0, 0, 4)
    assert again["erased_before"] and not done["erased_before"]
    assert where(ANN, shop.lake_root, shop.landing) == []
    [row] = [row for row in shop.rows(FORGOTTEN)]
    assert row["user_hash"] == done["user_hash"] and row["key_check"]


ODD = """anné O'Brien "&co\\ 😀"""  # what JSON, HTML, CSV and SQL each write otherwise
JSON = (
    LOOSE.replace("*.csv*", "*.jsonl*").replace('"csv"', '"jsonl"')
)  # fmt: skip


def written(name: str) -> list[str]:
    """A name as others write it."""
    return [
        name, json.dumps(name), json.dumps(name, ensure_ascii=False), json.dumps(json.dumps(name)),
        html.escape(name), name.replace('"', '""'), name.replace("'", "''"),
        json.dumps(name).replace("e9", "E9"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", [ODD, "ann lee", "U=9", "a,b;c", "!a&b", "x"])
def test_an_id_is_found_however_it_is_written(name: str) -> None:
    person = Person(name, name)
    secret = Privacy(KEY.encode(), "s", False, frozenset())
    obeyed = replace(secret, forgotten=frozenset([secret.pseudonym(name)]))
    for text in written(name):
        for told in (text, f"what of {text} is this", f"[{text}]", f"{text}."):
            assert person.stands_in(told), told
            assert name not in person.taken_out(told) and not person.stands_in(
                person.taken_out(told)
            )
            assert obeyed.names_forgotten(told) and not secret.names_forgotten(told), told
        assert not person.stands_in(f"y{name[1:]}") and not obeyed.names_forgotten(f"y{name[1:]}")


@pytest.mark.long
def test_an_id_that_every_format_escapes_is_gone_too(spark: Any, tmp_path: Path, key: None) -> None:
    shop = Workshop(spark, tmp_path, JSON)

    def records(user: str, start: int, **how: Any) -> list[str]:
        return [
            json.dumps({"user": user, "item": f"i{step}", "ts": str(start + 60 * step)}, **how)
            for step in range(3)
        ]

    spelt = json.dumps(ODD)[1:-1]
    lines = [
        *records(ODD, 1_714_521_600), *records("bob", 1_714_521_630),
        *records(ODD, 1_714_700_000, ensure_ascii=False),
        json.dumps({"user": ODD, "item": "i1", "ts": "soon"}),
        json.dumps({"user": "bob", "item": "i1", "ts": "soon"}),
        f'{{"user": "{spelt}", "item": "i1", "ts": trunc', f"lost {ODD} here", "lost bob here",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    shop.land("x{1}.jsonl", text)
    (tmp_path / "elsewhere.jsonl").write_text(text.replace("i1", "i7"))
    (shop.landing / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    shop.run()
    path, first = SEQUENCES.path(str(shop.lake_root), "clicks"), shop.version(SEQUENCES)
    cache = shop.lake_root / "clicks" / "_cache"
    open_sequences(path, first, cache, "")
    session = next(row for row in shop.rows(SESSIONS) if row["user_id"] == "bob")["session_id"]

    done = forget(shop.context(), ODD)
    assert done["rejects"] == 6 and done["landing_lines"] == 2 * 9
    person = Person(ODD, ODD)
    left = [
        str(file)
        for folder in (shop.lake_root, shop.landing, tmp_path / "elsewhere.jsonl")
        for file in ([folder] if folder.is_file() else sorted(folder.rglob("*")))
        if file.is_file() and person.stands_in(texts(file))
    ]
    assert left == [] and (shop.landing / "link.jsonl").is_symlink()
    assert {row["user_id"] for row in shop.rows(EVENTS)} == {"bob"}
    rejects = sorted(row["raw"] for row in shop.rows(REJECTS))
    assert rejects == sorted(2 * ["lost bob here"] + [
        lines[10], lines[10].replace("i1", "i7")
    ]), "others keep their own"  # fmt: skip

    # What older versions said of others is gone with them, and that is told, not traced.
    told = explain(str(shop.lake_root), shop.source, session)
    assert told["session"]["user_id"] == "bob" and told["changes_from_version"] > 0
    assert "files of earlier ones are gone" in explained(told)
    with pytest.raises(UserError, match=r"cannot be read any more .* Train and compare anew"):
        open_sequences(path, first, cache, "")

    shop.land("again.jsonl", text)
    result = shop.run()
    assert "Skipped 9 lines of erased users" in result.notes
    assert not [row for row in shop.rows(REJECTS) if person.stands_in(row["raw"])]
    assert {row["user_id"] for row in shop.rows(EVENTS)} == {"bob"}


@pytest.mark.long
def test_without_the_key_nobody_is_forgotten_and_nobody_comes_back(
    spark: Any, tmp_path: Path, key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(spark, tmp_path, CLICKS)
    shop.land("one.csv", "\n".join(["user,item,ts", *lines(["bob", ANN], 1_714_521_600)]) + "\n")
    with pytest.raises(SettingsError, match="there are no tables of clicks"):
        forget(shop.context(), ANN)
    shop.run()
    for wrong, says in (("", "SESSIONMILL_ID_KEY is not set"), ("short", "is too short")):
        monkeypatch.setenv("SESSIONMILL_ID_KEY", wrong)
        if not wrong:
            monkeypatch.delenv("SESSIONMILL_ID_KEY")
        settings.cache_clear()
        with pytest.raises(SettingsError, match=says):
            forget(shop.context(), ANN)
    assert len(shop.rows(EVENTS)) == 8 and where(ANN, shop.landing)
    monkeypatch.setenv("SESSIONMILL_ID_KEY", KEY)
    settings.cache_clear()
    with pytest.raises(SettingsError, match="--user is empty"):
        forget(shop.context(), "")
    forget(shop.context(), ANN)
    shop.land("two.csv", f"user,item,ts\n{ANN},i1,1714521999\n")
    for wrong in ("another" * 9, None):
        if wrong is None:
            monkeypatch.delenv("SESSIONMILL_ID_KEY")
        else:
            monkeypatch.setenv("SESSIONMILL_ID_KEY", wrong)
        settings.cache_clear()
        with pytest.raises(SettingsError, match="SESSIONMILL_ID_KEY is not"):
            shop.run()
    assert len(shop.rows(EVENTS)) == 4


@pytest.mark.parametrize("form", ["csv", pytest.param("parquet", marks=pytest.mark.long)])
@pytest.mark.slow
def test_ids_are_hashed_as_they_are_read(spark: Any, tmp_path: Path, key: None, form: str) -> None:
    toml = LOOSE.replace('"csv"', f'"{form}"').replace("*.csv*", f"*.{form}*")
    shop = Workshop(spark, tmp_path, toml + "\n[privacy]\nhash_user_id = true\n")
    if form == "csv":
        deliver(shop, ["bob", ANN], [*BAD, *OF_ANN])
    else:
        rows = [line.split(",") for line in [*lines(["bob", ANN], 1_714_521_600), OF_ANN[0]]]
        table = pa.table({
            name: [row[at] for row in rows] for at, name in enumerate(("user", "item", "ts"))
        })  # fmt: skip
        pq.write_table(table, shop.landing / "one.parquet")
    shop.run()
    secret = Privacy(KEY.encode(), "clicks", True, frozenset())
    assert {row["user_id"] for row in shop.rows(EVENTS)} == {
        secret.pseudonym("bob"), secret.pseudonym(ANN),
    }  # fmt: skip
    assert secret.pseudonym("bob") != Privacy(KEY.encode(), "x", True, frozenset()).pseudonym("bob")
    # Not even in lines that could not be used; those that had the mapped columns can be replayed.
    assert where(ANN, shop.lake_root) == where("bob", shop.lake_root) == []
    raw = [row["raw"] for row in shop.rows(REJECTS)]
    assert json.dumps({"user": secret.pseudonym(ANN), "item": "i1", "ts": "soon"},
                      separators=(",", ":")) in raw  # fmt: skip
    count = len(shop.rows(EVENTS))
    assert shop.run("replay-rejects").events_new == 0 and len(shop.rows(EVENTS)) == count

    done = forget(shop.context(), ANN)
    assert done["events"] > 0
    assert where(ANN, shop.lake_root, shop.landing) == []
    left = where(secret.pseudonym(ANN), shop.lake_root)
    assert all("/ops/forgotten/" in place for place in left) and left
    assert {row["user_id"] for row in shop.rows(SESSIONS)} == {secret.pseudonym("bob")}


@pytest.mark.long
def test_rejects_are_of_whom_their_files_columns_then_said(
    spark: Any, tmp_path: Path, key: None
) -> None:
    shop = Workshop(spark, tmp_path, LOOSE)
    shop.land("one.csv", "user,item,ts\n7,bob,soon\nbob,7,soon\nbob,8,1714521600\n")
    shop.run("ingest")
    shop.land("one.csv", "item,user,ts\n8,bob,1714521660\n")
    shop.run("ingest")
    done = forget(shop.context(), "bob")
    assert (done["events"], done["rejects"]) == (2, 1)
    assert [row["raw"] for row in shop.rows(REJECTS)] == ["7,bob,soon"]


@pytest.mark.slow
def test_lists_and_models_that_saw_them(spark: Any, tmp_path: Path, key: None) -> None:
    from mlflow import MlflowClient

    # An id that is a number stands in many lines; those of others stay.
    shop = Workshop(spark, tmp_path, LOOSE)
    seven = ["7,i1,1714521600", "7,i2,1714521660", "7,i1,soon"]
    others = [*lines(["bob"], 1_714_521_600), "bob,7,1714521900", "bob,7,soon"]
    shop.land("one.csv", "\n".join(["user,item,ts", *seven, *others]) + "\n")
    shop.run()
    first = shop.version(SEQUENCES)
    lake = shop.lake
    lake.create(RECOMMENDATIONS)
    lake.put_small(RECOMMENDATIONS, [
        (user, "clicks", "1", shop.context().started, [{"item_id": "i1", "score": 1.0}],
         None)
        for user in ("bob", "7")
    ])  # fmt: skip
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        client = MlflowClient(uri)
        client.create_registered_model("clicks")
        for version in (first, 0):
            client.create_model_version("clicks", "somewhere", tags={"table_version": str(version)})
        done = forget(shop.context(), "7")
        assert done["events"] == 2 and done["rejects"] == 1 and done["landing_lines"] == 3
        assert done["lists"] == 1 and done["models_that_saw"] == ["clicks/1"]
        assert done["models_not_rebuildable"] == ["clicks/1"]
        tags = [dict(client.get_model_version("clicks", number).tags) for number in ("1", "2")]
    assert tags[0]["saw_forgotten"] == "true" and tags[0]["rebuildable"] == "false"
    assert tags[1] == {"table_version": "0"}
    assert [row["user_id"] for row in shop.rows(RECOMMENDATIONS)] == ["bob"]
    assert [row["raw"] for row in shop.rows(REJECTS)] == ["bob,7,soon"]
    assert (shop.landing / "one.csv").read_text().splitlines() == ["user,item,ts", *others]
    assert {row["user_id"] for row in shop.rows(EVENTS)} == {"bob"}


@pytest.mark.parametrize("before", [False, True])
def test_a_user_of_whom_nothing_is_there_is_said(before: bool) -> None:
    none: dict[str, Any] = dict.fromkeys(
        ("events", "rejects", "lists", "landing_lines", "files_removed", "artifacts"), 0
    )
    done = none | {
        "source": "shop", "user_hash": "u-1", "erased_before": before, "registry": "none",
        "models_that_saw": [], "models_not_rebuildable": [],
    }  # fmt: skip
    said = in_words(done)
    assert ("erased before" in said) == before
    assert ("use the id as the log has it" in said) != before
    assert "Nothing" not in in_words(done | {"landing_lines": 1})
