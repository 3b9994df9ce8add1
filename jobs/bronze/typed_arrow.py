"""The everyday lines of a log, typed by DuckDB where they were read, without a way to the JVM.

`typed_events` is the rule for every line. This is a second rendering of it for lines in which
nothing is unusual: ids that are there, a time in its commonest form, numbers of a few digits, no
list. Such a line is no reject, and its hash is that of `typed_events`. All other lines are left
to `typed_events`. `tests/jobs/bronze/test_typed_arrow.py` compares the one with the other on
generated lines. What it saves is in benchmarks/README.md (Sessions, by
size).

Decision 8 in docs/design/decisions.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from expectations import feedback_rule
from jobs.bronze.typed_events import HASHED
from jobs.core.arrays import rows_at
from jobs.core.arrow_types import arrow_schema
from jobs.core.source_events import NUMERIC_UNITS
from jobs.core.source_file import Source
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.core.tables import EVENTS
from jobs.lake import filesystem

WRITTEN = {
    name: EVENTS.columns[name]
    for name in (
        "event_id", "user_id", "item_id", "event_ts", "event_date", "event_type",
        "source_session_id", "value", "tie_break", "exposed_with", "feedback",
        "anonymous_id", BOUNDARY_VALUES,
    )
} | {"row_hash": "string", "reason": "string", "file": "string", "line": "bigint"}  # fmt: skip
"""The columns of a typed line, with their types; `row_hash` where the log has ids of its own."""

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

    @classmethod
    def of(cls, source: Source, oldest: date | None) -> Typing | None:
        """None: every line of this source is left to `typed_events`."""
        mapped, units = frozenset(source.mapped()), source.time.units
        mapped |= {BOUNDARY_VALUES} if source.boundary_reads_log else set()
        several = len(units) > 1 or "event_ts_2" in mapped or source.source.decimal != "."
        if source.exposures is not None or several:
            return None
        feedback = source.feedback.model_dump()
        made = cls(mapped, units[0], source.time.zone, feedback, oldest)
        return None if made.time is None else made

    @cached_property
    def schema(self) -> pa.Schema:
        """Of typed lines."""
        return arrow_schema(WRITTEN)

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        return {one.name: one.type for one in self.schema}

    @cached_property
    def read(self) -> frozenset[str]:
        """The columns of a record that a typed line takes as they are."""
        texts = self.mapped - {"event_ts", "value", "tie_break", "exposed_with"}
        return frozenset((*texts, "file", "line"))

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
            f"coalesce({' AND '.join(self._must())}, false) AS everyday_ "
            f"FROM (SELECT *, {inner} FROM records)"
        )

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
        if self.oldest is not None:
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
        times = rows["event_ts"].cast(pa.int64()).to_numpy()
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


def _of_type(array: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return array if array.type == kind else array.cast(kind)
