"""Text to typed events, as Spark SQL expressions: times, numbers, feedback, hashes, reasons.

Pure: frame in, frame out. The meaning of every rule is in ARCHITECTURE.md ("What things mean").

Decision 2 in docs/design/decisions.md.
"""

from __future__ import annotations

from collections.abc import Collection

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from expectations import feedback_rule
from expectations.events import FIRST_US, LAST_US
from jobs.core.lateness import is_late
from jobs.core.source_events import LINKS, NUMERIC_UNITS, FeedbackPart, TimePart
from jobs.core.source_file import Source
from jobs.core.source_log import TYPED
from jobs.records.records import CUT, LONGEST_TEXT

ISO = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}([.,]\d{1,9})?)?( ?(Z|z|[+-]\d{2}(:?\d{2})?))?)?$"
COMMON_ISO = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}(\.\d{1,6})?(Z|[+-]\d{2}:\d{2})$"
ISO_ZONE = r"^(\d{4}-\d{2}-\d{2}[T ][\d:.]+) ?(Z|z|[+-]\d{2}(:?\d{2})?)$"
HASHED = (
    "user_id", "item_id", "event_ts", "event_type", "source_session_id", "value", "tie_break",
    "exposed_with", "anonymous_id",
)  # fmt: skip


def hashed(source: Source) -> tuple[str, ...]:
    """The columns of stored events that their ids are made of."""
    return tuple(one for one in HASHED if one != "tie_break" or not source.columns.file_order)


YEARS_OF_LOGS = (1985, 2100)
"""Ours: of several numeric units, a number is of the one in which it lies in these years."""


def local_to_utc(local: Column, zone: str) -> Column:
    """A time without a zone, read in `zone`, as a UTC timestamp.

    A doubled hour takes the earlier offset, a missing hour moves forward (java.time's rule).
    """
    return F.convert_timezone(F.lit(zone), F.lit("UTC"), local).cast("timestamp")


def iso_time(text: Column, zone: str) -> Column:
    """ISO 8601, with or without a zone; null where it is neither."""
    dotted = F.regexp_replace(text, ",", ".")
    offset = F.regexp_replace(
        F.regexp_replace(F.upper(F.regexp_extract(dotted, ISO_ZONE, 2)), r"^([+-]\d\d)$", "$1:00"),
        r"^([+-]\d\d)(\d\d)$",
        "$1:$2",
    )
    moment = F.regexp_replace(
        F.regexp_extract(dotted, ISO_ZONE, 1), r"^(.{10}[T ]\d\d:\d\d)$", "$1:00"
    )
    zoned = F.concat(moment, offset).try_cast("timestamp")
    local = local_to_utc(dotted.try_cast("timestamp_ntz"), zone)
    any_form = F.when(text.rlike(ISO), F.when(dotted.rlike(ISO_ZONE), zoned).otherwise(local))
    # The commonest form by one expression instead of six.
    return F.coalesce(F.when(text.rlike(COMMON_ISO), text.try_cast("timestamp")), any_form)


def number_time(text: Column, unit: str) -> Column:
    """A number of seconds, milliseconds or microseconds since 1970, fractions cut at the us."""
    us_each = NUMERIC_UNITS[unit]
    number = F.trim(text).try_cast("decimal(28,9)")
    us = F.floor(number * F.lit(us_each).cast("decimal(8,0)")).try_cast("bigint")
    any_number = F.when(us.between(FIRST_US, LAST_US), F.timestamp_micros(us))
    # Most logs have whole numbers; decimals of this width cost several times as much.
    whole = F.trim(text).try_cast("bigint")
    first, last = -(-FIRST_US // us_each), LAST_US // us_each
    quick = F.when(whole.between(first, last), F.timestamp_micros(whole * F.lit(us_each)))
    return F.coalesce(quick, any_number)


def event_time(text: Column, clock: Column, time: TimePart) -> Column:
    """The event's UTC timestamp, or null where the text is not a time the source file describes, or
    one that is not in the years 1 to 9999 in UTC.

    Args:
        clock: as in `records.RECORD_DDL`.
    """
    typed = F.timestamp_micros(text.try_cast("bigint"))
    parsed = (
        F.when(clock.isNull(), _any_time(text, time))
        .when(clock == "utc", typed)
        .otherwise(local_to_utc(typed.cast("timestamp_ntz"), time.zone))
    )
    return F.when(F.unix_micros(parsed).between(FIRST_US, LAST_US), parsed)


def _any_time(text: Column, time: TimePart) -> Column:
    """The first of the units that the text fits."""
    several = sum(unit in NUMERIC_UNITS for unit in time.units) > 1
    return F.coalesce(*(_time_of_unit(text, unit, time.zone, several) for unit in time.units))


def _time_of_unit(text: Column, unit: str, zone: str, several: bool) -> Column:
    """Args: several: whether other units are numbers, too, so that a number's size tells them
    apart."""
    if unit == "iso8601":
        return iso_time(text, zone)
    if unit in NUMERIC_UNITS:
        parsed = number_time(text, unit)
        return F.when(F.year(parsed).between(*YEARS_OF_LOGS), parsed) if several else parsed
    parsed = F.try_to_timestamp(text, F.lit(unit))
    if TimePart.pattern_has_zone(unit):
        return parsed
    return local_to_utc(parsed.cast("timestamp_ntz"), zone)


def with_offset(moment: Column, text: Column, unit: str) -> Column:
    """A time and a number of `unit` after it; null where that is not a time."""
    us = F.unix_micros(moment) + F.unix_micros(number_time(text, unit))
    return F.when(us.between(FIRST_US, LAST_US), F.timestamp_micros(us))


def with_point(text: Column, decimal: str) -> Column:
    """A number with a decimal comma as one with a point, its thousands run together; null where it
    is not written so."""
    if decimal == ".":
        return text
    number = F.trim(text).rlike(r"^[+-]?(\d{1,3}(\.\d{3})+|\d+)?(,\d*)?([eE][+-]?\d+)?$")
    return F.when(number, F.translate(F.trim(text), ",.", "."))


def line_time(source: Source, clock: Column) -> Column:
    """The time of a line, of one column or of two."""
    time, decimal = source.time, source.source.decimal
    text, more = F.col("_event_ts"), F.col("event_ts_2")
    if decimal != "." and set(time.units) & set(NUMERIC_UNITS):
        text = F.coalesce(with_point(text, decimal), text)
    if "event_ts_2" not in source.mapped():
        return event_time(text, clock, time)
    if time.offset is None:
        return event_time(F.concat(text, F.lit(" "), more), clock, time)
    return with_offset(event_time(text, clock, time), with_point(more, decimal), time.offset)


def feedback_of(feedback: FeedbackPart) -> Column:
    """`positive`, `negative`, `exposed` or `neutral`, by `event_type` and `value`."""
    return feedback_rule.column(feedback.model_dump())


def row_hash(columns: Collection[str] = HASHED) -> Column:
    """Hash of the typed values of all mapped columns but the event's id; null is not empty.

    Columns that are null in every row (those that the source file does not map) may be left out.
    The anonymous id counts where there is no user.
    128 of SHA-256's bits: at ten billion events a clash has probability 1.5e-19.
    """
    texts = {
        "event_ts": F.unix_micros("event_ts").cast("string"),
        "value": (F.col("value") + F.lit(0.0)).cast("string"),  # no negative zero
        "tie_break": F.col("tie_break").cast("string"),
        "exposed_with": F.to_json(F.col("exposed_with")),
        "anonymous_id": F.when(F.col("user_id").isNull(), F.col("anonymous_id")),
    }
    parts = []
    for name in (one for one in HASHED if one in columns):
        text = texts.get(name, F.col(name))
        known = F.concat(F.lit(f"{name}="), F.length(text).cast("string"), F.lit(":"), text)
        parts.append(F.coalesce(known, F.lit("")))
    return F.left(F.sha2(F.concat(*parts), 256), F.lit(32))


def typed_events(
    records: DataFrame, source: Source, oldest: Column | None = None, hashed: bool = True
) -> DataFrame:
    """Records as text -> typed lines with `reason` (null: usable), `raw` and `raw_hash`; where the
    log has event ids of its own, also `row_hash`, which is the id where it has none.

    The reason is the first that holds, in the order of `tables.REJECT_REASONS`; `late` is judged
    where the stored events are known.

    Args:
        oldest: the oldest date that is not late; null: nothing is. `raw` is kept of lines that may
            be rejects.
        hashed: whether all lines have `raw_hash`, or only those that may be rejects.
    """
    mapped = source.mapped()
    text = {name: f"_{name}" for name in ("event_ts", "value", "tie_break")}
    lines = records.withColumnsRenamed(text)
    has_clock = source.source.format in TYPED or source.computes
    clock = F.col("clock") if has_clock else F.lit(None)
    number = with_point(F.col("_value"), source.source.decimal).try_cast("double")
    finite = ~F.isnan(number) & (F.abs(number) != F.lit(float("inf")))
    whole = F.when(F.col("_tie_break").rlike(r"^[+-]?\d{1,19}$"), F.col("_tie_break"))
    lines = lines.withColumns(
        {
            "event_ts": line_time(source, clock),
            "value": F.when(finite, number + F.lit(0.0)),
            "tie_break": F.col("line") if source.columns.file_order else whole.try_cast("bigint"),
        }
    )
    raw = raw_line(source)
    lines = lines.withColumns({"reason": reason_of(mapped), "event_date": F.to_date("event_ts")})
    may_be_reject = F.col("reason").isNotNull() | is_late(F.col("event_date"), oldest)
    if not source.source.keep_filtered:
        may_be_reject = may_be_reject & F.col("filtered").isNull()
    lines = lines.withColumns(
        {
            "raw": F.when(may_be_reject, raw),
            "raw_hash": F.when(may_be_reject | F.lit(hashed), F.hex(F.xxhash64(raw, "element"))),
            "row_hash" if "event_id" in mapped else "event_id": row_hash(mapped),
            "feedback": feedback_of(source.feedback),
        }
    ).drop("_event_ts", "event_ts_2", "_value", "_tie_break", "clock", "kind", "filtered")
    if source.exposures is not None:
        lines = lines.withColumn("link", link_of([F.col(n) for n in source.exposures.mapped()]))
    return lines.drop(*LINKS)


def reason_of(mapped: Collection[str]) -> Column:
    """Why a line is no event; null: it is one."""
    kind = F.col("kind")
    native = F.col("event_id").isNull() if "event_id" in mapped else F.lit(False)
    nobody = F.col("user_id").isNull() & F.col("anonymous_id").isNull()
    return (
        F.when(kind == "unparsable", "unparsable")
        .when(F.col("filtered").isNotNull(), F.col("filtered"))
        .when(nobody, "missing_user_id")
        .when(F.col("item_id").isNull(), "missing_item_id")
        .when(F.col("event_ts").isNull(), "bad_event_ts")
        .when(F.col("_value").isNotNull() & F.col("value").isNull(), "bad_value")
        .when(kind == "bad_value", "bad_value")
        .when(F.col("_tie_break").isNotNull() & F.col("tie_break").isNull(), "bad_tie_break")
        .when(kind == "bad_tie_break", "bad_tie_break")
        .when(native, "missing_event_id")
        .when(kind == "bad_expression", "bad_expression")
    )


def raw_line(source: Source) -> Column:
    """A line's text as it is stored if it makes no event."""
    if source.computes:
        raw = F.col("raw")  # (readers make it of the log's columns, which are not all ours)
        if not source.privacy.hash_user_id:
            return raw
        known = F.when(F.col("kind") != "unparsable", raw)
        return cut_text(F.to_json(F.struct("user_id", known.alias("line"))))
    if source.source.format in TYPED or source.privacy.hash_user_id:
        names = {theirs: _original(ours) for ours, theirs in source.mapped().items()}
        row = F.struct(*(column.alias(theirs) for theirs, column in names.items()))
        return cut_text(F.to_json(row))
    return F.col("raw")


def cut_text(text: Column) -> Column:
    """`records.cut_text`, of a text that is made here."""
    mark = F.concat(F.lit(CUT), F.length(text).cast("string"), F.lit(" characters]"))
    beginning = F.substring(text, 1, LONGEST_TEXT)
    return F.when(F.length(text) > LONGEST_TEXT, F.concat(beginning, mark)).otherwise(text)


def link_of(columns: list[Column]) -> Column:
    """What a line and an exposure are matched by, as one text; null where a column is."""
    known = F.forall(F.array(*columns), lambda one: one.isNotNull())
    return F.when(known, F.to_json(F.array(*columns)))


def _original(ours: str) -> Column:
    """A column as the log has it; typed times as ISO 8601."""
    if ours != "event_ts":
        return F.col(f"_{ours}" if ours in ("value", "tie_break") else ours)
    typed = F.timestamp_micros(F.col("_event_ts").try_cast("bigint"))
    iso = F.date_format(typed, "yyyy-MM-dd'T'HH:mm:ss.SSSSSS")
    zone = F.when(F.col("clock") == "utc", "Z").otherwise("")
    return F.when(F.col("clock").isNull(), F.col("_event_ts")).otherwise(F.concat(iso, zone))
