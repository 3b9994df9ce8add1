"""`jobs guess`: first source files of small logs in the forms that people have."""

from __future__ import annotations

import gzip
import json
import random
import re
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from jobs.cli import main
from jobs.core.errors import SettingsError
from jobs.core.source_file import Source
from jobs.reading.guess import guess

T = 1_717_236_000
DICE = random.Random(3)
ROWS = [(f"u{DICE.randrange(20)}", f"p{DICE.randrange(40)}", T + 37 * n) for n in range(300)]


def text(row: str, head: str = "", **more: Any) -> str:
    lines = [head + "\n"] if head else []
    for user, item, ts in ROWS:
        moment = datetime.fromtimestamp(ts, UTC)
        lines.append(row.format(u=user, i=item, ts=ts, at=moment, n=user[1:], **more) + "\n")
    return "".join(lines)


COMBINED = '10.0.0.{n} - - [{at:%d/%b/%Y:%H:%M:%S} +0000] "GET /p/{i} HTTP/1.1" 200 5 "-" "x"'
LOGS: dict[str, tuple[str, dict[str, Any], tuple[Any, Any, Any], Any]] = {
    "a csv": (
        text("{u},{i},view,{ts}000", "visitor,article,type,ts"), {"format": "csv"},
        ("visitor", "article", "ts"), "ms",
    ),
    "RetailRocket": (
        text("{ts}123,{n},view,{i},", "timestamp,visitorid,event,itemid,transactionid"),
        {"format": "csv"}, ("visitorid", "itemid", "timestamp"), "ms",
    ),
    "MovieLens 1M": (
        text("{n}::{ts}::5::{i}").replace("::p", "::"),
        {"format": "csv", "delimiter": "::", "header": False}, ("_0", "_3", "_1"), "s",
    ),
    "REES46": (
        text("{at:%Y-%m-%d %H:%M:%S} UTC,cart,{i},{n}", "event_time,event_type,product_id,user_id"),
        {"format": "csv"}, ("user_id", "product_id", "event_time"), "yyyy-MM-dd HH:mm:ss z",
    ),
    "titles with lone quotes": (
        text('{u}\t{at:%Y-%m-%dT%H:%M:%SZ}\t"{i} of\t{i}', ""),
        {"format": "csv", "delimiter": "\t", "quote": "", "header": False}, ("_0", "_2", "_1"), "iso8601",
    ),
    "JSON lines": (
        text('{{"who": {{"user_id": "{u}"}}, "item": {{"id": "{i}"}}, "ts": {ts}.5, "tags": [1]}}'),
        {"format": "jsonl"}, ("who.user_id", "item.id", "ts"), "s",
    ),
    "a JSON array": (
        json.dumps([{"user": u, "item": i, "time": t} for u, i, t in ROWS], indent=1),
        {"format": "json"}, ("user", "item", "time"), "s",
    ),
    "a web log": (text(COMBINED), {"format": "combined_log"}, ("host", "path", "time"), None),
    "a web log of several servers": (
        text("shop.example:443 " + COMBINED), {"format": "vhost_combined"}, ("host", "path", "time"), None,
    ),
    "IIS": (
        text("{at:%Y-%m-%d %H:%M:%S} /p/{i} 10.0.0.{n} 200", "#Fields: date time cs-uri-stem c-ip sc-status"),
        {"format": "w3c"}, ("c-ip", "cs-uri-stem", ["date", "time"]), "iso8601",
    ),
    "a German export": (
        text("{u};{i};{at:%d.%m.%Y %H:%M:%S};1,5", "Kunde;artikel_item;Zeit_date;price"),
        {"format": "csv", "delimiter": ";"}, ("Kunde", "artikel_item", "Zeit_date"), "dd.MM.yyyy HH:mm:ss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LOGS)
def test_a_first_source_file(tmp_path: Path, name: str, packed: bool) -> None:
    log, source, (user, item, when), unit = LOGS[name]
    path = tmp_path / "my log.txt"
    path.write_bytes(gzip.compress(log.encode()) if packed else log.encode())
    found = guess(str(path))
    made = tomllib.loads(found.text)
    assert Source.model_validate(made).name == "my_log"
    said = {key: value for key, value in made["source"].items() if key not in ("name", "landing")}
    assert said == source
    columns = made["columns"]
    assert (columns["user_id"], columns["item_id"], columns["event_ts"]) == (user, item, when)
    assert made.get("time", {}).get("unit") == unit
    assert found.share > 0.95 and f"{found.usable:,} of them would be usable" in found.text
    for name in (user, item):  # a person who corrects it sees every column
        assert re.search(rf"^#   {re.escape(json.dumps(name))}: \d+% filled, \d", found.text, re.M)


def test_reasons_and_the_share_of_usable_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        text("{u},{i},view,{ts}", "user,item,type,ts") + ",p1,view,\n" * 100 + "x\n" * 50
    )
    found = guess(str(path), "shop")
    assert (found.usable, found.looked_at) == (300, 450)
    for words in (
        'name = "shop"', "20 values in 300 lines, 75% filled", "100% of its values are times in 's'",
        '# event_type = "type"  # 1 value, most often view', "300 of them would be usable",
    ):  # fmt: skip
        assert words in found.text


def test_lists_in_one_text_are_no_items(tmp_path: Path) -> None:
    """The behaviors of MIND: number, user, time, what was read before, what was shown."""
    path = tmp_path / "behaviors.tsv"
    path.write_text(
        "".join(
            f"{n}\tU{n % 20}\t11/{1 + n % 28}/2019 9:05:58 AM\tN{n % 7} N{n % 9}\tN{n}-1 N{n % 5}-0\n"
            for n in range(200)
        )
    )
    found = guess(str(path))
    columns = tomllib.loads(found.text)["columns"]
    assert columns == {"user_id": "_1", "item_id": "?", "event_ts": "_2"}
    assert "may be events (source.explode, explode_separator): _3, _4" in found.text


def test_typed_files_and_tables(tmp_path: Path) -> None:
    users, items, ts = (list(one) for one in zip(*ROWS))
    table = pa.table({
        "person": pa.array([{"user": one} for one in users]), "sku": items,
        "at": pa.array([t * 1_000_000 for t in ts], pa.timestamp("us", "UTC")), "shown": [["a"]] * len(ts),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "log.parquet")
    write_deltalake(str(tmp_path / "table"), table)
    for place, form in (("log.parquet", "parquet"), ("table", "delta")):
        found = guess(str(tmp_path / place))
        made = tomllib.loads(found.text)
        assert made["source"]["format"] == form
        assert made["columns"] == {"user_id": "person.user", "item_id": "sku", "event_ts": "at"}
        assert (
            found.share == 1
            and "Lists, whose elements may be events (source.explode): shown[]" in found.text
        )


def test_what_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("name,thing\na,b\nc,d\n")
    found = guess(str(path))
    assert found.usable == 0 and 'event_ts = "?"' in found.text
    for place, data in (("none.csv", None), ("empty.csv", b""), ("x.7z", b"7z\xbc\xaf\x27\x1c\0")):
        if data is not None:
            (tmp_path / place).write_bytes(data)
        with pytest.raises(SettingsError):
            guess(str(tmp_path / place))
    path.write_text(text("{u},{i},{ts}", "user,item,ts"))
    assert main(["guess", str(path), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# A first source file for log.csv") and '"usable": 300' in out
    assert "save it as infra/sources/log.toml, then: python -m jobs run --source log\n" in out
    assert f'If more will follow, a pattern: "{tmp_path}/*.csv")' in out
    assert "If more will follow" not in guess(f"{tmp_path}/*.csv").text
    assert main(["guess", str(tmp_path / "none.csv")]) == 1
    assert "there is no such file" in capsys.readouterr().err
