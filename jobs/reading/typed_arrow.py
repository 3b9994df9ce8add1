"""The everyday lines of a log, typed by DuckDB where they were read, without a way to the JVM.

`typed_events` is the rule for every line. This is a second rendering of it for lines in which
nothing is unusual: ids that are there, a time in its commonest form, numbers of a few digits, no
list. Such a line is no reject, and its hash is that of `typed_events`. All other lines are left
to `typed_events`. `tests/jobs/reading/test_typed_arrow.py` compares the one with the other on
generated lines. What it saves is in benchmarks/README.md (Sessions, by
size).

Decision 8 in docs/design/decisions.md.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from expectations import feedback_rule
from jobs.core.arrays import rows_at
from jobs.core.arrow_types import arrow_schema
from jobs.core.source_events import NUMERIC_UNITS
from jobs.core.source_file import Source
from jobs.core.source_log import TYPED
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.core.tables import EVENTS
from jobs.lake import filesystem
from jobs.reading.typed_events import HASHED

WRITTEN = {
    name: EVENTS.columns[name]
    for name in (
        "event_id", "user_id", "item_id", "event_ts", "event_date", "event_type",
        "source_session_id", "value", "tie_break", "exposed_with", "feedback",
        "anonymous_id", BOUNDARY_VALUES,
    )
} | {"row_hash": "string", "reason": "string", "file": "string", "line": "bigint"}  # fmt: skip
"""The columns of a typed line, with their types; `row_hash` where the log has ids of its own."""

ASIDE = {"raw": "string", "raw_hash": "string", "element": "bigint"}
"""The columns of a line that may make no event."""

DATE = r"[12]\d{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d"
ISO_ZONED = rf"{DATE}[T ]{CLOCK}(?:\.\d{{1,6}})?(?:Z|[+-](?:0\d|1[0-3]):[0-5]\d)"
ISO_LOCAL = rf"{DATE}[T ]{CLOCK}(?:\.\d{{1,6}})?"
NUMBER = r"-?\d{1,7}(?:\.\d{1,6})?"
LAST_QUICK_US = 4_102_444_800_000_000
"""The year 2100: later times are unusual."""
RUN, RUN_BYTES = 1_000_000, 192 * 1024 * 1024
"""So many lines, or bytes, are sorted and written together."""
ORDERED_GROUP, SORTED_GROUP = 65_536, 16_384
"""Lines of a row group, where a run was in order and where it was sorted."""
LEAST, MOST = 1e-3, 1e7
"""Between these a number's text has no exponent: in DuckDB, in Java and in every log."""
WHOLE = r"\d{1,18}"
NO_NUMBER = "[GgHhJjKkLlMmOoQqRrSsUuVvWwZz]"
"""Java reads no text with such a letter as a number. (It reads `Infinity`, `NaN`, `0x1p3` and `1d`.)"""
NO_NUMBER_TIME, NO_ISO_TIME = "[A-DF-Za-df-z:/]", "[A-SU-Ya-su-y]"
"""A text with such a character is no decimal number, no time of ISO 8601."""
PATTERNS: dict[str, tuple[str, str]] = {
    "yyyy": (r"[12]\d{3}", "%Y"), "MM": (r"(?:0[1-9]|1[0-2])", "%m"),
    "MMM": (r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)", "%b"),
    "dd": (r"(?:0[1-9]|[12]\d|3[01])", "%d"), "HH": (r"(?:[01]\d|2[0-3])", "%H"),
    "mm": (r"[0-5]\d", "%M"), "ss": (r"[0-5]\d", "%S"), "SSS": (r"\d{3}", "%g"),
    "SSSSSS": (r"\d{6}", "%f"), "Z": (r"[+-](?:0\d|1[0-3])[0-5]\d", "%z"),
}  # fmt: skip
"""Of a pattern's letters that are understood here: a regular expression, and DuckDB's word."""


def pattern_of(unit: str) -> tuple[str, str] | None:
    """A pattern of `[time] unit` as a regular expression and as DuckDB's format; None: it has
    letters that are not understood here, or no whole date."""
    form, words, letters = "", "", set[str]()
    for run in re.finditer(r"'[^']*'|([A-Za-z])\1*|[^A-Za-z']", unit):
        text = run.group(0)
        if run.group(1):
            if text not in PATTERNS or text in letters:
                return None
            letters.add(text)
            form, words = form + PATTERNS[text][0], words + PATTERNS[text][1]
            continue
        text = text.strip("'")
        if not text or not text.isascii() or set(text) & set("[]%'"):
            return None
        form, words = form + re.escape(text), words + text
    whole = {"yyyy", "dd", "HH", "mm"} <= letters and letters & {"MM", "MMM"}
    return (form, words) if whole and len(letters & {"SSS", "SSSSSS"}) < 2 else None


def no_pattern_time(unit: str) -> str:
    """A character that no time of a pattern has, as a regular expression: neither a digit, a sign, a
    blank, nor one of the pattern's own or of a month's name."""
    own = "".join(inside + bare for inside, bare in re.findall(r"'([^']*)'|([^A-Za-z'])", unit))
    months = "".join(filter(str.isalpha, PATTERNS["MMM"][0])) if "MMM" in unit else ""
    known = sorted({*(own + months).lower(), *(own + months).upper()})  # (Spark reads both cases)
    return rf"[^\d\s+\-{''.join(map(re.escape, known))}]"


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@dataclass(frozen=True)
class Typing:
    """How a source's everyday lines are typed; plain values, sent to the workers."""

    mapped: frozenset[str]
    unit: str
    zone: str
    feedback: dict[str, list[str] | None] = field(hash=False)
    oldest: date | None
    """The oldest date that is not late; None: nothing is."""
    aside: bool = False
    """Whether lines are taken, too, that are late, or no events for a reason that is sure; they have
    their text."""

    @classmethod
    def of(cls, source: Source, oldest: date | None, aside: bool = False) -> Typing | None:
        """None: every line of this source is left to `typed_events`.

        Args:
            aside: as of a `Typing`. Only the text of a line that is stored as it was read is known here.
        """
        mapped, units = frozenset(source.mapped()), source.time.units
        mapped |= {BOUNDARY_VALUES} if source.boundary_reads_log else set()
        several = len(units) > 1 or "event_ts_2" in mapped or source.source.decimal != "."
        if source.exposures is not None or several:
            return None
        feedback = source.feedback.model_dump()
        as_read = not (source.computes or source.privacy.hash_user_id)
        as_read &= source.source.format not in TYPED
        made = cls(mapped, units[0], source.time.zone, feedback, oldest, aside and as_read)
        return None if made.time is None else made

    @cached_property
    def schema(self) -> pa.Schema:
        """Of typed lines."""
        return arrow_schema(WRITTEN | ASIDE if self.aside else WRITTEN)

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        return {one.name: one.type for one in self.schema}

    @cached_property
    def read(self) -> frozenset[str]:
        """The columns of a record that a typed line takes as they are."""
        texts = self.mapped - {"event_ts", "value", "tie_break", "exposed_with"}
        aside = ("raw", "element") if self.aside else ()
        return frozenset((*texts, "file", "line", *aside))

    @cached_property
    def time(self) -> str | None:
        """DuckDB's SQL: the UTC timestamp of the text `event_ts`, null where it is unusual; None:
        times of this source are."""
        clocks = "clock IN ('utc', 'local')" if self.zone == "UTC" else "clock = 'utc'"
        parquet = f"WHEN {clocks} THEN {_whole('event_ts', 1)}"
        text = self._text_time()
        if text is None:
            return None
        return f"CASE {parquet} WHEN clock IS NULL THEN {text} END"

    def _text_time(self) -> str | None:
        if self.unit in NUMERIC_UNITS:
            return _whole("event_ts", NUMERIC_UNITS[self.unit])
        local = self.zone == "UTC"
        if self.unit == "iso8601":
            zoned = f"WHEN regexp_full_match(event_ts, '{ISO_ZONED}') THEN {_instant('event_ts')}"
            plain = f"WHEN regexp_full_match(event_ts, '{ISO_LOCAL}') THEN TRY_CAST(event_ts AS TIMESTAMP)"
            return f"CASE {plain if local else ''} {zoned} END"
        found = pattern_of(self.unit)
        if found is None or not (local or "%z" in found[1]):
            return None
        form, words = map(quoted, found)
        parsed = f"try_strptime(event_ts, {words})"
        parsed = f"timezone('UTC', {parsed})" if "%z" in found[1] else parsed
        return f"CASE WHEN regexp_full_match(event_ts, {form}) THEN {parsed} END"

    @cached_property
    def query(self) -> str:
        """DuckDB's SQL: records -> typed columns, `everyday` among them."""
        assert self.time is not None
        typed = {"time_": self.time, "value_": "NULL::DOUBLE", "tie_": "NULL::BIGINT"}
        if "value" in self.mapped:
            number = "TRY_CAST(value AS DOUBLE) + 0.0"
            typed["value_"] = f"CASE WHEN regexp_full_match(value, '{NUMBER}') THEN {number} END"
        if "tie_break" in self.mapped:
            number = "TRY_CAST(tie_break AS BIGINT)"
            typed["tie_"] = (
                f"CASE WHEN regexp_full_match(tie_break, '[+-]?{WHOLE}') THEN {number} END"
            )
        inner = ", ".join(f"{sql} AS {name}" for name, sql in typed.items())
        return (
            f"SELECT time_, CAST(time_ AS DATE) AS day_, value_, tie_, "
            f"left(sha256(concat({', '.join(self._hashed())})), 32) AS digest_, "
            f"coalesce({' AND '.join(self._must())}, false) AS everyday_"
            f"{self._set_aside() if self.aside else ''} FROM (SELECT *, {inner} FROM records)"
        )

    def _set_aside(self) -> str:
        """Of lines that may make no event: the reason where it is sure, and whether they are late."""
        reasons = [
            ("filtered IS NOT NULL OR flag IS NOT NULL", "NULL"),
            ("kind = 'unparsable'", "'unparsable'"),
            ("kind <> 'record'", "NULL"),
            ("user_id IS NULL AND anonymous_id IS NULL", "'missing_user_id'"),
            ("item_id IS NULL", "'missing_item_id'"),
            (f"event_ts IS NULL OR (clock IS NULL AND {self._no_time()})", "'bad_event_ts'"),
            ("time_ IS NULL", "NULL"),
        ]
        if "value" in self.mapped:
            reasons.append((f"regexp_matches(value, '{NO_NUMBER}')", "'bad_value'"))
        cases = " ".join(f"WHEN {one} THEN {reason}" for one, reason in reasons)
        late = "false"
        if self.oldest is not None:
            late = f"coalesce(CAST(time_ AS DATE) < DATE '{self.oldest.isoformat()}', false)"
        return f", CASE {cases} END AS reason_, {late} AS late_"

    def _no_time(self) -> str:
        """DuckDB's SQL: whether a text is certainly no time."""
        if self.unit in NUMERIC_UNITS:
            return f"regexp_matches(event_ts, '{NO_NUMBER_TIME}')"
        if self.unit == "iso8601":
            return f"regexp_matches(event_ts, '{NO_ISO_TIME}')"
        return f"regexp_matches(event_ts, {quoted(no_pattern_time(self.unit))})"

    def _must(self) -> list[str]:
        """The conditions of a line that is everyday."""
        must = [
            "kind = 'record'",
            "filtered IS NULL",
            "flag IS NULL",
            "time_ IS NOT NULL",
            "exposed_with IS NULL",
        ]
        ids = {"item_id", "event_id"} & self.mapped
        must += [f"{name} IS NOT NULL" for name in sorted(ids)]
        somebody = "user_id IS NOT NULL"
        if "anonymous_id" in self.mapped:
            somebody = f"({somebody} OR anonymous_id IS NOT NULL)"
        must.append(somebody)
        if "value" in self.mapped:
            small = f"value_ = 0 OR abs(value_) BETWEEN {LEAST} AND {MOST} - 1"
            must.append(f"(value IS NULL OR {small})")
        if "tie_break" in self.mapped:
            must.append("(tie_break IS NULL OR tie_ IS NOT NULL)")
        if self.oldest is not None and not self.aside:
            must.append(f"CAST(time_ AS DATE) >= DATE '{self.oldest.isoformat()}'")
        return must

    def _hashed(self) -> list[str]:
        """What `typed_events.row_hash` hashes, as arguments of `concat`."""
        sure = {"item_id", "event_ts"}  # (null in no line that is everyday)
        if "anonymous_id" not in self.mapped:
            sure.add("user_id")
        texts = {
            "event_ts": "CAST(epoch_us(time_) AS VARCHAR)",
            "value": "CAST(value_ AS VARCHAR)",
            "tie_break": "CAST(tie_ AS VARCHAR)",
            "anonymous_id": "CASE WHEN user_id IS NULL THEN anonymous_id END",
        }
        arguments: list[str] = []
        for name in HASHED:
            if name not in self.mapped or name == "exposed_with":
                continue
            text = texts.get(name, name)
            pieces = [f"'{name}='", f"length({text})", "':'", text]
            arguments += pieces if name in sure else [f"coalesce({' || '.join(pieces)}, '')"]
        return arguments


def _whole(name: str, us_each: int) -> str:
    """A whole number in its usual form as a timestamp; `us_each`: microseconds of one."""
    digits = len(str(LAST_QUICK_US // us_each))
    number = f"TRY_CAST({name} AS BIGINT)"
    usual = f"length({name}) <= {digits} AND CAST({number} AS VARCHAR) = {name}"
    return f"CASE WHEN {usual} AND {number} >= 0 THEN make_timestamp({number} * {us_each}) END"


def _instant(name: str) -> str:
    return f"timezone('UTC', TRY_CAST({name} AS TIMESTAMPTZ))"


class Typer:
    """Types the everyday records of one task, and writes them as one file of lines.

    Runs of lines are sorted by time, so that a slice of time reads few row groups of a log
    whose files are not in order.
    """

    def __init__(self, typing: Typing, folder: str, name: str) -> None:
        self.typing = typing
        self.path = f"{folder}/{name}.parquet"
        self.held: list[pa.Table] = []
        self.rows = self.bytes = 0
        self.writer: pq.ParquetWriter | None = None
        self.db = duckdb.connect(config={"threads": 1})
        self.db.execute("SET TimeZone = 'UTC'")

    def take(self, records: pa.RecordBatch) -> pa.RecordBatch:
        """Keep the everyday records; returns the others."""
        if not records.num_rows:
            return records
        self.db.register("records", records)
        typed = self.db.sql(self.typing.query).to_arrow_table()
        self.db.unregister("records")
        everyday = typed["everyday_"].combine_chunks()
        if self.typing.aside:
            everyday = pc.or_(everyday, pc.is_valid(typed["reason_"].combine_chunks()))
        left = records.slice(0, 0)
        kept = records.select([n for n in records.schema.names if n in self.typing.read])
        if not pc.all(everyday).as_py():
            left = records.filter(pc.invert(everyday))
            kept, typed = kept.filter(everyday), typed.filter(everyday)
        if kept.num_rows:
            self.held.append(self.lines(kept, typed))
            self.rows += kept.num_rows
            self.bytes += self.held[-1].nbytes
            if self.rows >= RUN or self.bytes >= RUN_BYTES:
                self.flush()
        return left

    def lines(self, records: pa.RecordBatch, typed: pa.Table) -> pa.Table:
        """Typed lines, as `WRITTEN` has them."""
        count = records.num_rows
        native = "event_id" in self.typing.mapped
        made = {name: pa.nulls(count, kind) for name, kind in self.typing.types.items()}
        made |= {name: records[name] for name in records.schema.names}
        made |= {
            "event_ts": typed["time_"],
            "event_date": typed["day_"],
            "value": typed["value_"],
            "tie_break": typed["tie_"],
            "row_hash" if native else "event_id": typed["digest_"],
            "feedback": self.feedback(made["event_type"], typed["value_"]),
        }
        if self.typing.aside:
            made |= set_aside(records, typed)
        columns = [_of_type(made[one.name], one.type) for one in self.typing.schema]
        return pa.Table.from_arrays(columns, schema=self.typing.schema)

    def feedback(self, event_type: pa.Array, value: pa.ChunkedArray) -> pa.Array:
        rules, count = self.typing.feedback, len(event_type)
        kinds = event_type.dictionary_encode()
        known = np.array([*kinds.dictionary.to_pylist(), None], object)
        places = pc.fill_null(kinds.indices, len(known) - 1).to_numpy(zero_copy_only=False)
        numbers = value.to_numpy() if feedback_rule.uses_value(rules) else None
        codes = feedback_rule.codes(rules, known[places], numbers, count)
        names = pa.array(feedback_rule.FEEDBACK, pa.string())
        return names.take(pa.array(codes))

    def flush(self) -> None:
        """Write what is held as row groups."""
        if not self.held:
            return
        rows = pa.concat_tables(self.held)
        self.held, self.rows, self.bytes = [], 0, 0
        times = pc.fill_null(rows["event_ts"].cast(pa.int64()), 0).to_numpy()
        group = ORDERED_GROUP
        if (times[1:] < times[:-1]).any():
            rows = rows_at(rows, np.argsort(times, kind="stable"))
            group = SORTED_GROUP
        if self.writer is None:
            system, inner = filesystem.located(self.path)
            system.create_dir(inner.rpartition("/")[0], recursive=True)
            dictionaries = [
                n for n in WRITTEN if n not in ("event_id", "row_hash", "line", "event_ts")
            ]
            # (The file is read once, soon, and removed: compressing it costs more than it saves.)
            self.writer = pq.ParquetWriter(
                inner,
                self.typing.schema,
                filesystem=system,
                use_dictionary=dictionaries,
                compression="NONE",
            )
        self.writer.write_table(rows, row_group_size=group)

    def close(self) -> list[str]:
        """The files written."""
        self.flush()
        self.db.close()
        if self.writer is None:
            return []
        self.writer.close()
        return [self.path]


def set_aside(records: pa.RecordBatch, typed: pa.Table) -> dict[str, pa.Array]:
    """`reason`, and the text with its hash of lines that may make no event (`typed_events`)."""
    reason = typed["reason_"].combine_chunks()
    stored = pc.or_(pc.is_valid(reason), typed["late_"].combine_chunks())
    raw = pc.if_else(stored, records["raw"], None)
    hashes = (
        [
            None if not there else raw_hash(text, element)
            for there, text, element in zip(
                stored.to_pylist(), raw.to_pylist(), records["element"].to_pylist(), strict=True
            )
        ]
        if pc.any(stored).as_py()
        else pa.nulls(len(raw), pa.string())
    )
    return {"reason": reason, "raw": raw, "raw_hash": pa.array(hashes, pa.string())}


SPARKS_SEED = 42


def raw_hash(raw: str | None, element: int | None) -> str:
    """What Spark's `hex(xxhash64(raw, element))` is: each value is hashed with the hash before it as
    the seed, nulls are left out."""
    found = SPARKS_SEED
    if raw is not None:
        found = xxhash.xxh64_intdigest(raw.encode(), found)
    if element is not None:
        found = xxhash.xxh64_intdigest(struct.pack("<q", element), found)
    return f"{found:X}"


def _of_type(array: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return array if array.type == kind else array.cast(kind)
