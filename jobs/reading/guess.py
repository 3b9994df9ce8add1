"""`jobs guess FILE`: a first source file from a log, with the reasons for what it says.

What is looked at is the beginning of the file. A person corrects the result: a column's name and
values make it a candidate and prove nothing.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
from deltalake import DeltaTable

from jobs.core.errors import SettingsError, counted
from jobs.core.settings import settings
from jobs.core.source_log import COMBINED_LOG_TIME, LOG_COLUMNS
from jobs.lake import filesystem
from jobs.lake.landed import absolute, landed
from jobs.reading import json_texts, w3c_logs, web_logs
from jobs.records.compression import decompressed
from jobs.records.csv_dialect import Dialect
from jobs.records.records import DIGITS, Unusable

HEAD_BYTES = 1 << 20
RECORDS = 5_000
"""So many are looked at."""
DELIMITERS = (",", "\t", ";", "|", "::", "\x01", " ")
SHOWN = 3
"""So many candidates of a column are named."""
MOST_COLUMNS = 60
"""So many columns are described."""
PATTERNS = {
    "yyyy-MM-dd HH:mm:ss z": ("%Y-%m-%d %H:%M:%S %Z", r".* [A-Z]{3,4}"),
    COMBINED_LOG_TIME: ("%d/%b/%Y:%H:%M:%S %z", None),
    "dd.MM.yyyy HH:mm:ss": ("%d.%m.%Y %H:%M:%S", None),
    "dd.MM.yyyy HH:mm": ("%d.%m.%Y %H:%M", None),
    "dd.MM.yyyy": ("%d.%m.%Y", None),
    "dd/MM/yyyy HH:mm:ss": ("%d/%m/%Y %H:%M:%S", None),
    "MM/dd/yyyy HH:mm:ss": ("%m/%d/%Y %H:%M:%S", None),
    "M/d/yyyy h:mm:ss a": ("%m/%d/%Y %I:%M:%S %p", None),
    "M/d/yyyy H:mm": ("%m/%d/%Y %H:%M", None),
    "yyyy/MM/dd HH:mm:ss": ("%Y/%m/%d %H:%M:%S", None),
    "yyyyMMddHHmmss": ("%Y%m%d%H%M%S", r"(19|20)\d{12}"),
    "yyyyMMdd": ("%Y%m%d", r"(19|20)\d{6}"),
    "EEE MMM dd HH:mm:ss Z yyyy": ("%a %b %d %H:%M:%S %z %Y", None),
}
"""A pattern of ours, Python's, and how its texts must look."""
ISO = re.compile(
    r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d{1,9})?)?( ?(Z|z|[+-]\d\d(:?\d\d)?))?)?"
)
ID_LIST = re.compile(r"[A-Za-z]*\d[\w.-]*( [A-Za-z]*\d[\w.-]*)+")
"""Ids with a digit each, with blanks between them."""
CLOCK = re.compile(r"\d\d:\d\d(:\d\d([.,]\d+)?)?")
NAMES = {
    "user_id": r"user|visitor|customer|client|member|buyer|household|reviewer|cookie|anonymous|profile|"
    r"device|uid\b|^c-ip$|^host$|remote_addr|ip$|session",
    "item_id": r"item|product|sku|article|asin|track|song|movie|book|video|content|poi|location|page|"
    r"path|uri|url|listing|business|game|news|aid\b",
    "event_ts": r"time|ts$|_at$|date|when|^at$|epoch",
    "event_type": r"event|type|action|behaviou?r|method|activity|^kind$|^verb$",
    "source_session_id": r"session|visit_?id",
    "value": r"rating|score|price|quantity|amount|stars|weight|value",
}
"""What columns are called, in English."""
LESS = {
    "user_id": r"session|agent|name|ip$|host",
    "item_id": r"name|title|categor|page|url|type|count",
}
"""Names that are weaker evidence."""


@dataclass
class Sample:
    """The beginning of a log."""

    format: str
    keys: dict[str, Any] = field(default_factory=dict)
    """What else `[source]` must say."""
    records: list[dict[str, str | None]] = field(default_factory=list)
    unread: int = 0
    """Lines that are no records."""
    remarks: list[str] = field(default_factory=list)

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for one in self.records for name in one))

    def texts(self, name: str) -> list[str]:
        values = (one.get(name) for one in self.records)
        return [text for text in values if text not in (None, "")]  # type: ignore[misc]


# -- the format -----------------------------------------------------------------------------------


def sample_of(path: str) -> Sample:
    """Raises: SettingsError: there is nothing to look at."""
    place = absolute(path)
    if filesystem.exists(f"{place}/_delta_log"):
        return _delta(place)
    files = landed(place)
    files = [one for one in files if one[1]] or files  # (an empty file among others says nothing)
    if not files:
        raise SettingsError(
            f"{path}: there is no such file: name a file, folder or pattern of the log"
        )
    name = files[0][0]
    with filesystem.open_binary(name) as raw:
        head = raw.read(4)
    if head == b"PAR1":
        with filesystem.open_seekable(name) as seekable:
            return _typed("parquet", pq.ParquetFile(seekable).iter_batches(RECORDS))
    if head[:3] == b"ORC":
        with filesystem.open_seekable(name) as seekable:
            return _typed("orc", [orc.ORCFile(seekable).read_stripe(0)])
    if head == b"Obj\x01":
        with filesystem.open_binary(name) as raw:
            rows = [one for one, _ in zip(fastavro.reader(raw), range(RECORDS))]
        return Sample("avro", records=[flat(one) for one in rows])
    try:
        with filesystem.open_binary(name) as raw:
            stream, _ = decompressed(name, io.BufferedReader(raw))  # type: ignore[type-var,arg-type]
            data = stream.read(HEAD_BYTES)
    except (Unusable, OSError, EOFError) as error:
        raise SettingsError(str(error)) from None
    return _text(name, data)


def _delta(place: str) -> Sample:
    told = pa.table(DeltaTable(filesystem.rust_uri(place)).get_add_actions())["path"]
    if not len(told):
        raise SettingsError(
            f"{place} is a Delta table without rows: add some, or name another table"
        )
    path = filesystem.data_path(place.rstrip("/"), told[0].as_py())
    with filesystem.open_seekable(path) as seekable:
        return _typed("delta", pq.ParquetFile(seekable).iter_batches(RECORDS))


def _typed(form: str, batches: Iterable[Any]) -> Sample:
    batch = next(iter(batches), None)
    rows = [] if batch is None else batch.slice(0, RECORDS).to_pylist()
    return Sample(form, records=[flat(one) for one in rows])


def flat(value: Any, path: str = "") -> dict[str, str | None]:
    """A record's values by their paths; `a[]` is a list, of which no column can be mapped."""
    if isinstance(value, dict):
        found: dict[str, str | None] = {}
        for name, inner in value.items():
            found |= flat(inner, f"{path}.{name}" if path else str(name))
        return found
    if isinstance(value, list):
        return {f"{path}[]": json.dumps(value, default=str)[:200]}
    if value is None or isinstance(value, str):
        return {path: value}
    return {path: value.isoformat() if isinstance(value, datetime) else str(value)}


def _text(name: str, data: bytes) -> Sample:
    encoding = "utf-8"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif len(data) == HEAD_BYTES:
        data = data[: data.rfind(b"\n") + 1] or data
    try:
        text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError:
        encoding = "cp1252"
        text = data.decode(encoding, "replace")
    lines = [one for one in text.splitlines() if one.strip()][:RECORDS]
    if not lines:
        raise SettingsError(f"{name}: the file is empty: name one that has lines")
    for reading in (_w3c, _json, _web, _csv):
        sample = reading(text, lines)
        if sample is not None:
            if encoding != "utf-8":
                sample.keys["encoding"] = encoding
            return sample
    raise SettingsError(
        f"{name}: the format is unknown: the first line is {lines[0][:120]!r}. Write the source file by "
        "hand: docs/guides/source-file.md"
    )


def _w3c(_: str, lines: list[str]) -> Sample | None:
    if not any(line.lower().startswith(w3c_logs.FIELDS) for line in lines[:20]):
        return None
    names: list[str] = []
    sample = Sample("w3c")
    for line in lines:
        if line.lower().startswith(w3c_logs.FIELDS):
            names = line[len(w3c_logs.FIELDS) :].split()
        elif not line.startswith("#"):
            parts = w3c_logs.parts_of(line)
            if len(parts) == len(names):
                row = dict(zip(names, (None if one == "-" else one for one in parts)))
                sample.records.append(row)
            else:
                sample.unread += 1
    return sample


def _json(text: str, lines: list[str]) -> Sample | None:
    if lines[0].lstrip()[0] not in "{[":
        return None
    try:
        single = [json.loads(line, parse_int=str, parse_float=str) for line in lines[:50]]
    except ValueError:
        single = []
    good = single and all(isinstance(one, dict) for one in single)
    sample = Sample("jsonl" if good else "json")
    for _, _, value in json_texts.Objects(io.StringIO(text), HEAD_BYTES):
        if isinstance(value, dict):
            sample.records.append(flat(value))
        else:
            sample.unread += 1
        if len(sample.records) == RECORDS:
            break
    return sample if sample.records else None


def _web(_: str, lines: list[str]) -> Sample | None:
    for form in ("vhost_combined", "combined_log"):
        found = [
            None
            if form == "combined_log" and web_logs.looks_like_vhost(line)
            else web_logs.LINES[form].match(line)
            for line in lines
        ]
        if sum(map(bool, found)) >= 0.8 * len(lines):
            rows = [
                {
                    name: None if one == "-" else one
                    for name, one in zip(LOG_COLUMNS[form], hit.groups())
                }
                for hit in found
                if hit
            ]
            return Sample(form, records=rows, unread=len(lines) - len(rows))
    return None


# -- CSV ------------------------------------------------------------------------------------------


def _rows(dialect: Dialect, lines: list[str]) -> list[list[str]]:
    """The fields of lines, each taken for a record; those that are none are left out."""
    rows = []
    for line in lines:
        try:
            rows += [dialect.restored(row) for row in dialect.rows([line])]
        except csv.Error:
            continue
    return rows


def _csv(_: str, lines: list[str]) -> Sample | None:
    comment = "#" if lines[0].startswith("#") and not lines[-1].startswith("#") else ""
    lines = [line for line in lines if not (comment and line.startswith(comment))]
    best: tuple[int, int, Dialect, list[list[str]]] | None = None
    for delimiter in DELIMITERS:
        for quote in ('"', ""):
            dialect = Dialect(delimiter, quote, "", comment)
            rows = _rows(dialect, lines)
            width, count = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
            if width > 1 and (best is None or (count, width) > best[:2]):
                best = (count, width, dialect, [row for row in rows if len(row) == width])
    if best is None or best[0] < 0.5 * len(lines):
        return None
    count, width, dialect, rows = best
    sample = Sample("csv", unread=len(lines) - count)
    header = _has_header(rows)
    names = rows[0] if header else [f"_{place}" for place in range(width)]
    given = {"delimiter": dialect.delimiter, "quote": dialect.quote, "comment": comment}
    usual = {"delimiter": ",", "quote": '"', "comment": ""}
    sample.keys = {name: value for name, value in given.items() if value != usual[name]}
    if not header:
        sample.keys["header"] = False
    if dialect.quote == "":
        sample.remarks.append("fields begin with lone double quotes, so nothing is quoted")
    sample.records = [dict(zip(names, row)) for row in rows[int(header) :]]
    return sample


def _has_header(rows: list[list[str]]) -> bool:
    first, others = rows[0], rows[1:200]
    if len(set(first)) < len(first) or not all(one.strip() for one in first):
        return False
    if any(_is_data(one) for one in first):
        return False
    return not others or any(_is_data(one) for row in others for one in row)


def _is_data(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?\d+([.,]\d+)?\s*", text) or ISO.fullmatch(text))


# -- columns --------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A column, or two, in the role of one of ours."""

    names: tuple[str, ...]
    score: float
    why: str
    unit: str | None = None
    reads: Callable[[dict[str, str | None]], bool] = lambda _: True


def unit_of(texts: list[str]) -> tuple[str, float] | None:
    """The unit or pattern that most of the texts fit, and the share that does."""
    shares: dict[str, float] = {}
    for unit, digits in DIGITS.items():
        if unit != "ns":
            form = re.compile(rf"\d{{{digits[0]},{digits[1]}}}(\.\d*)?")
            shares[unit] = sum(bool(form.fullmatch(one.strip())) for one in texts) / len(texts)
    shares["iso8601"] = sum(bool(ISO.fullmatch(one)) for one in texts) / len(texts)
    for pattern, (written, looks) in PATTERNS.items():
        shares[pattern] = sum(_parses(one, written, looks) for one in texts) / len(texts)
    unit = max(shares, key=lambda one: shares[one])
    return (unit, shares[unit]) if shares[unit] >= 0.5 else None


def _parses(text: str, form: str, looks: str | None) -> bool:
    if looks is not None and not re.fullmatch(looks, text):
        return False
    try:
        datetime.strptime(text, form)
    except ValueError:
        return False
    return True


def _named(name: str, ours: str) -> float:
    last = name.lower()
    if not re.search(NAMES[ours], last):
        return 0.0
    return 0.5 if re.search(LESS.get(ours, r"$^"), last) else 1.0


def swapped(user: str, item: str) -> bool:
    """Whether the column of the user is named as one of items, and that of the item as one of users."""
    here = _named(user, "user_id") + _named(item, "item_id")
    return not here and bool(_named(user, "item_id") and _named(item, "user_id"))


def times(sample: Sample) -> list[Candidate]:
    found = []
    for name in sample.columns():
        texts = sample.texts(name)[:500]
        got = unit_of(texts) if texts else None
        if got is None:
            continue
        unit, share = got
        few = len(set(texts)) / len(texts)
        score = share + _named(name, "event_ts") + 0.5 * few
        why = f"{share:.0%} of its values are times in {unit!r}, such as {texts[0]!r}"
        found.append(Candidate((name,), score, why, unit))
    clocks = [
        n for n in sample.columns() if (t := sample.texts(n)[:500]) and all(map(CLOCK.fullmatch, t))
    ]
    for one in found[:]:
        day = all(len(text) == 10 for text in sample.texts(one.names[0])[:500])
        if one.unit == "iso8601" and day and clocks:
            why = f"{one.names[0]!r} is a date and {clocks[0]!r} a time of the day"
            found.append(Candidate((one.names[0], clocks[0]), one.score + 2, why, "iso8601"))
    return sorted(found, key=lambda one: -one.score)


def _is_list(texts: list[str]) -> bool:
    """Whether most texts are ids with blanks between them, as the impressions `N1-1 N2-0` of MIND."""
    several = [one for one in texts[:500] if " " in one]
    return len(several) > len(texts[:500]) / 2 and all(map(ID_LIST.fullmatch, several))


def ids(sample: Sample, ours: str, taken: set[str]) -> list[Candidate]:
    found = []
    for name in sample.columns():
        texts = sample.texts(name)
        if name in taken or name.endswith("[]") or not texts or _is_list(texts):
            continue
        different, named = len(set(texts)), _named(name, ours)
        filled = len(texts) / len(sample.records)
        repeats = len(texts) / different
        # One value for all is no id, and a number of the line is nobody's.
        if (len(texts) > 1 and different == 1) or (len(texts) > 50 and repeats == 1 and not named):
            continue
        score = 3 * named + filled + (0.5 if repeats > 1 else 0)
        # Most logs have more lines of a user, or of an item, than one; a label has few values.
        score -= 1.5 if different < 5 and len(texts) > 50 else 0
        why = f"{different:,} values in {len(texts):,} lines, {filled:.0%} filled, such as {texts[0][:40]!r}"
        if named:
            why += "; the name fits"
        found.append(Candidate((name,), score, why))
    return sorted(found, key=lambda one: -one.score)


def others(sample: Sample, taken: set[str]) -> dict[str, Candidate]:
    """Candidates for columns that a log need not have."""
    found: dict[str, Candidate] = {}
    for ours in ("source_session_id", "event_type", "value"):
        for name in sample.columns():
            texts = sample.texts(name)
            if name in taken or not texts or not _named(name, ours) or name.endswith("[]"):
                continue
            values = Counter(texts)
            if ours == "event_type" and len(values) > 50:
                continue
            if ours == "value" and not all(
                re.fullmatch(r"[+-]?\d+([.,]\d+)?", one) for one in values
            ):
                continue
            top = ", ".join(one[:20] for one, _ in values.most_common(4))
            found[ours] = Candidate(
                (name,), 1.0, f"{counted(len(values), 'value')}, most often {top}"
            )
            taken = taken | {name}
            break
    return found


# -- the file -------------------------------------------------------------------------------------


@dataclass
class Guess:
    """A first source file."""

    text: str
    usable: int
    looked_at: int

    @property
    def share(self) -> float:
        return self.usable / self.looked_at if self.looked_at else 0.0


def guess(path: str, name: str | None = None) -> Guess:
    """Raises: SettingsError: there is no such file, or nothing of it can be read."""
    sample = sample_of(path)
    if not sample.records:
        raise SettingsError(
            f"{path}: no record was found in it ({sample.format}): name a file that has some"
        )
    when = times(sample)
    taken = set(when[0].names) if when else set()
    users = ids(sample, "user_id", taken)
    taken |= set(users[0].names) if users else set()
    items = ids(sample, "item_id", taken)
    taken |= set(items[0].names) if items else set()
    more = others(sample, taken | {one for a in when for one in a.names})
    chosen = {"user_id": users, "item_id": items, "event_ts": when}
    usable = _usable(sample, chosen)
    named = name or _name_of(path)
    total = len(sample.records) + sample.unread
    lines = [
        f"# A first source file for {PurePosixPath(path).name}, from its first {total:,} lines: "
        f"{usable:,} of them would be usable.",
        f"# Correct what is wrong, save it as {settings().sources}/{named}.toml, then: "
        f"python -m jobs run --source {named}",
        *(f"# {one}" for one in sample.remarks),
        "[source]",
        f"name = {_toml(named)}",
        *_landing(path),
        f"format = {_toml(sample.format)}",
        *(f"{key} = {_toml(value)}" for key, value in sample.keys.items()),
        "",
        "[columns]",
    ]
    for ours, candidates in chosen.items():
        lines += _column(ours, candidates)
    for ours, one in more.items():
        lines += [f"# {ours} = {_toml(one.names[0])}  # {one.why}"]
    timed = {one for each in when for one in each.names}
    if texts := [n for n in sample.columns() if n not in timed and _is_list(sample.texts(n))]:
        lines += [
            "# Lists in one text, whose elements may be events (source.explode, explode_separator): "
            + ", ".join(texts)
        ]
    if lists := sorted({one for one in sample.columns() if one.endswith("[]")}):
        lines += [f"# Lists, whose elements may be events (source.explode): {', '.join(lists[:5])}"]
    lines += _every_column(sample)
    unit = when[0].unit if when else None
    if unit and not (unit == COMBINED_LOG_TIME and sample.format in LOG_COLUMNS):
        lines += ["", "[time]", f"unit = {_toml(unit)}"]
    return Guess("\n".join(lines) + "\n", usable, total)


def _toml(value: Any) -> str:
    """A text, a number, a boolean or a list of them, as TOML has it: characters as they are, since
    JSON's escapes for those beyond 16 bits are no TOML."""
    return json.dumps(value, ensure_ascii=False)


def _landing(path: str) -> list[str]:
    """The landing, with a remark where it is one file and more may follow."""
    lines = [f"landing = {_toml(path)}"]
    folder, _, file = path.rpartition("/")
    if folder and "." in file and [one for one, *_ in landed(absolute(path))] == [absolute(path)]:
        pattern = f"{folder}/*{file[file.index('.') :]}"
        lines.append(f"# (This is one file. If more will follow, a pattern: {_toml(pattern)})")
    return lines


def _column(ours: str, candidates: list[Candidate]) -> list[str]:
    if not candidates:
        return [f"# {ours}: no column looks like it; name one", f'{ours} = "?"']
    best, *rest = candidates
    names = best.names[0] if len(best.names) == 1 else list(best.names)
    lines = [f"# {best.why}", f"{ours} = {_toml(names)}"]
    also = [repr(one.names[0]) for one in rest if one.score >= best.score - 1.5][: SHOWN - 1]
    return [*lines, f"# or: {', '.join(also)}"] if also else lines


def _every_column(sample: Sample) -> list[str]:
    """What a person who corrects the file chooses from."""
    lines, names = ["", "# All columns, with what they hold:"], sample.columns()
    for name in names[:MOST_COLUMNS]:
        texts = sample.texts(name)
        filled = len(texts) / len(sample.records)
        example = f", such as {texts[0][:40]!r}" if texts else ""
        lines.append(
            f"#   {_toml(name)}: {filled:.0%} filled, {counted(len(set(texts)), 'value')}{example}"
        )
    if more := len(names) - MOST_COLUMNS:
        lines += [f"#   and {counted(more, 'more column')}"] if more > 0 else []
    return lines


def _usable(sample: Sample, chosen: dict[str, list[Candidate]]) -> int:
    if not all(chosen.values()):
        return 0
    unit = chosen["event_ts"][0].unit
    names = [one for found in chosen.values() for one in found[0].names]
    good = [one for one in sample.records if all(one.get(name) not in (None, "") for name in names)]
    two = len(chosen["event_ts"][0].names) > 1
    moments = Counter(one[chosen["event_ts"][0].names[0]] for one in good)
    return sum(n for text, n in moments.items() if two or _fits(text or "", unit or ""))


def _fits(text: str, unit: str) -> bool:
    got = unit_of([text])
    return got is not None and (
        got[0] == unit or (unit in PATTERNS and _parses(text, *PATTERNS[unit]))
    )


def _name_of(path: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(path).name.split(".")[0]).strip("_-")
    return stem if re.match(r"[A-Za-z]", stem) else f"log_{stem}".rstrip("_")
