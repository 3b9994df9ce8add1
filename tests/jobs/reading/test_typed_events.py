"""Text to typed events: one Spark frame holds all the cases."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from pyspark.sql import functions as F

from expectations import feedback_rule
from expectations.feedback_rule import FEEDBACK
from jobs.core.source_events import FeedbackPart, TimePart
from jobs.reading.typed_events import event_time, feedback_of, row_hash
from models.core import rows as models_rows
from models.serving import answer

DAY = datetime(2024, 3, 1, tzinfo=UTC)


def us(*parts: int) -> int:
    moment = datetime(*parts, tzinfo=UTC)  # type: ignore[misc, arg-type]
    return round((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1_000_000)


# unit, zone, text, expected microseconds
TIMES: list[tuple[str, str, str, int | None]] = [
    ("s", "UTC", "0", 0),
    ("s", "UTC", "1506826988", us(2017, 10, 1, 3, 3, 8)),
    ("s", "UTC", "1506826988.25", us(2017, 10, 1, 3, 3, 8) + 250_000),
    ("s", "UTC", "-1", -1_000_000),
    ("s", "UTC", "2147483648", us(2038, 1, 19, 3, 14, 8)),
    ("s", "UTC", "9999999999999999999", None),
    ("s", "UTC", "yesterday", None),
    ("s", "UTC", "NaN", None),
    ("ms", "UTC", "1506826988744", us(2017, 10, 1, 3, 3, 8) + 744_000),
    ("us", "UTC", "1506826988744001", us(2017, 10, 1, 3, 3, 8) + 744_001),
    ("us", "UTC", "253402300799999999", 253_402_300_799_999_999),
    ("us", "UTC", "253402300800000000", None),
    ("iso8601", "UTC", "2024-03-01", us(2024, 3, 1)),
    ("iso8601", "UTC", "2024-03-01T10:11:12.123456Z", us(2024, 3, 1, 10, 11, 12) + 123_456),
    ("iso8601", "UTC", "2024-03-01 10:11:12,5", us(2024, 3, 1, 10, 11, 12) + 500_000),
    ("iso8601", "UTC", "2024-03-01T10:11+0130", us(2024, 3, 1, 8, 41)),
    ("iso8601", "Europe/Paris", "2024-03-01T10:11:12+02:00", us(2024, 3, 1, 8, 11, 12)),
    ("iso8601", "Europe/Paris", "2024-03-01T10:11:12-05", us(2024, 3, 1, 15, 11, 12)),
    ("iso8601", "Europe/Paris", "2024-03-01 10:11:12", us(2024, 3, 1, 9, 11, 12)),
    # the hour that summer time skips moves forward, the doubled one takes the earlier offset
    ("iso8601", "Europe/Paris", "2024-03-31 02:30:00", us(2024, 3, 31, 1, 30)),
    ("iso8601", "Europe/Paris", "2024-10-27 02:30:00", us(2024, 10, 27, 0, 30)),
    ("iso8601", "UTC", "10:11:12", None),
    ("iso8601", "UTC", "2024", None),
    ("iso8601", "UTC", "2024-02-30", None),
    ("iso8601", "UTC", "2024-03-01T25:00:00", None),
    ("dd/MMM/yyyy:HH:mm:ss Z", "UTC", "17/May/2015:10:05:03 +0200", us(2015, 5, 17, 8, 5, 3)),
    ("dd.MM.yyyy HH:mm", "America/Sao_Paulo", "01.10.2017 00:00", us(2017, 10, 1, 3)),
    ("yyyyMMdd", "UTC", "20171001", us(2017, 10, 1)),
    ("yyyyMMdd", "UTC", "2017-10-01", None),
    # years 1 to 9999, in UTC
    ("s", "UTC", "-62135596800", -62_135_596_800_000_000),
    ("s", "UTC", "-62135596801", None),
    ("s", "UTC", " +1506826988 ", us(2017, 10, 1, 3, 3, 8)),
    ("yyyy-MM-dd HH:mm:ss", "UTC", "0000-01-01 00:00:00", None),
    ("yyyy-MM-dd HH:mm:ss", "Europe/Berlin", "0001-01-01 00:00:00", None),
    ("iso8601", "UTC", "0001-01-01T00:00:00+05:00", None),
    ("iso8601", "UTC", "9999-12-31T23:59:59-05:00", None),
    ("iso8601", "UTC", "9999-12-31T23:59:59.999999Z", 253_402_300_799_999_999),
]


def test_times(spark: Any) -> None:
    rules = sorted({(unit, zone) for unit, zone, _, _ in TIMES})
    cases = spark.createDataFrame(
        [(n, rules.index(case[:2]), case[2]) for n, case in enumerate(TIMES)],
        "n int, r int, t string",
    )
    chosen = F.coalesce(
        *(
            F.when(F.col("r") == at, F.unix_micros(
                event_time(F.col("t"), F.lit(None), TimePart(unit=unit, zone=zone))
            ))
            for at, (unit, zone) in enumerate(rules)
        )
    )  # fmt: skip
    got = {row.n: row.us for row in cases.select("n", chosen.alias("us")).collect()}
    wrong = [(*case, got[n]) for n, case in enumerate(TIMES) if got[n] != case[3]]
    assert wrong == []


def test_typed_times_stand_on_a_clock(spark: Any) -> None:
    at = us(2024, 7, 1, 12)
    rows = spark.createDataFrame(
        [(str(at), "utc"), (str(at), "local"), ("300000000000000000", "utc"), ("x", "utc"),
         ("2024-07-01 12:00", None)], "t string, c string",
    )  # fmt: skip
    time = TimePart(unit="iso8601", zone="Europe/Paris")
    got = rows.select(F.unix_micros(event_time(F.col("t"), F.col("c"), time)).alias("us")).collect()
    two_hours = 7_200_000_000
    assert [row.us for row in got] == [at, at - two_hours, None, None, at - two_hours]


@pytest.fixture(scope="module")
def events(spark: Any) -> Any:
    ddl = (
        "event_type string, value double, user_id string, item_id string, event_ts timestamp, "
        "source_session_id string, tie_break bigint, exposed_with array<string>"
    )
    return spark.createDataFrame(
        [
            ("read", 5.0, "u", "i", DAY, None, None, None),
            ("skip", 1.0, "u", "i", DAY, "", None, None),
            ("show", None, "u", "i", DAY, None, 0, []),
            (None, -0.0, "u", "i", DAY, None, None, ["a", "b"]),
            (None, 0.0, "u", "i", DAY, None, None, ["a", "b"]),
            ("ab", None, "u", "i", DAY, "c", None, None),
            ("a", None, "u", "i", DAY, "bc", None, None),
        ],
        ddl,
    )


@pytest.mark.parametrize(
    ("feedback", "expected"),
    [
        (FeedbackPart(), ["positive"] * 7),
        (
            FeedbackPart(negative=["value < 3"], exposed=["show"]),
            ["positive", "negative", "exposed", "negative", "negative", "positive", "positive"],
        ),
        (
            FeedbackPart(positive=["read", "value == 0"], negative=["skip"], exposed=["show"]),
            ["positive", "negative", "exposed", "positive", "positive", "neutral", "neutral"],
        ),
    ],
)
def test_feedback_is_tried_negative_positive_exposed(
    events: Any, feedback: FeedbackPart, expected: list[str]
) -> None:
    assert [row.f for row in events.select(feedback_of(feedback).alias("f")).collect()] == expected


NUMBERS = ["0", "-0", "0.0", "-0.0", "1", "-1", "3", "2.5", "1e3", "-1E-3", "0.1"]
TEXTS = [None, "", " ", "buy", "Buy", "buy ", "skip", "view", "value", "value of 3", "3", "é"]
VALUES = [None, 0.0, -0.0, 1.0, -1.0, 3.0, 2.5, 1000.0, -0.001, 0.1, 0.30000000000000004, 5e-324,
          1.7976931348623157e308]  # fmt: skip
conditions = st.builds(
    "{}value{}{}{}{}".format, st.sampled_from(["", " "]), st.sampled_from(["", " "]),
    st.sampled_from([">=", "<=", ">", "<", "==", "!="]), st.sampled_from(["", "  "]),
    st.sampled_from(NUMBERS),
)  # fmt: skip
entries = st.lists(st.one_of(conditions, st.sampled_from(TEXTS[1:])), max_size=3)
rules = st.builds(
    FeedbackPart, positive=st.one_of(st.none(), entries), negative=entries, exposed=entries
)


def test_serving_judges_an_event_as_ingestion_does(spark: Any) -> None:
    """Generated rules, each tried on every text with every value."""
    assert models_rows.FEEDBACK == FEEDBACK
    made: list[FeedbackPart] = []

    @seeded(20261128)
    @settings(max_examples=150, phases=[Phase.generate], database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(rules)
    def collect(rule: FeedbackPart) -> None:
        made.append(rule)

    collect()
    rows = [(n, text, value) for n, (text, value) in
            enumerate((text, value) for text in TEXTS for value in VALUES)]  # fmt: skip
    events = spark.createDataFrame(rows, "n int, event_type string, value double")
    chosen = [feedback_of(rule).alias(f"r{at}") for at, rule in enumerate(made)]
    ingested = events.orderBy("n").select(*chosen).toPandas()
    frame = pd.DataFrame({"event_type": [r[1] for r in rows], "value": [r[2] for r in rows]})
    types = np.array([r[1] for r in rows], dtype=object)
    values = np.array([r[2] for r in rows], dtype=np.float64)
    for at, rule in enumerate(made):
        by_numpy = feedback_rule.codes(rule.model_dump(), types, values, len(rows))
        assert [FEEDBACK[code] for code in by_numpy] == ingested[f"r{at}"].tolist(), rule
    unlike = [
        (rule, [(*row[1:], one, other) for row, one, other in zip(rows, theirs, ours, strict=True)
                if one != other])
        for at, rule in enumerate(made)
        if (theirs := ingested[f"r{at}"].tolist())
        != (ours := [FEEDBACK[code] for code in answer._feedback(rule.model_dump(), frame)])
    ]  # fmt: skip
    assert unlike == []
    assert {one for at in range(len(made)) for one in ingested[f"r{at}"]} == set(FEEDBACK)


def test_a_hash_tells_null_from_empty_and_where_a_text_ends(events: Any) -> None:
    def digests(**columns: Any) -> list[str]:
        return [
            row.h for row in events.withColumns(columns).select(row_hash().alias("h")).collect()
        ]

    nobody = F.lit(None).cast("string")
    plain = digests(anonymous_id=nobody)
    assert plain[3] == plain[4]  # there is no negative zero
    assert len(set(plain)) == len(plain) - 1
    # The anonymous id counts where there is no user.
    assert digests(anonymous_id=F.lit("c")) == plain
    one, other, none = (
        digests(anonymous_id=name, user_id=nobody) for name in (F.lit("c"), F.lit("d"), nobody)
    )
    assert len({one[0], other[0], none[0], plain[0]}) == 4
