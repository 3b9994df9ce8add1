"""Every mistake in a source file is told with its field, its value and the way out."""

from pathlib import Path

import pytest

from jobs.core.errors import SettingsError, SourceError
from jobs.core.settings import settings
from jobs.core.source_file import load_source
from jobs.core.source_rules import SessionsPart, rules_apart

GOOD = """
[source]
name = "clicks"
landing = "landing/*.csv"
format = "csv"
[columns]
user_id = "u"
item_id = "i"
event_ts = "t"
[time]
unit = "s"
[feedback]
[sessions]
[quality]
[filters]
"""


def message(tmp_path: Path, old: str, new: str) -> str:
    assert old in GOOD
    file = tmp_path / "clicks.toml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(SourceError) as raised:
        load_source(str(file))
    text = str(raised.value)
    assert str(file) in text
    return text


def test_a_good_source_file_has_the_documented_defaults(tmp_path: Path) -> None:
    file = tmp_path / "clicks.toml"
    file.write_text(GOOD)
    source = load_source(str(file))
    assert (source.sessions.rule, source.sessions.gap_s) == ("gap", 1800)
    assert (source.sessions.lateness_days, source.sessions.max_session_hours) == (30, 24)
    assert source.sessions.max_session_events == 5000
    assert (source.quality.max_reject_share, source.quality.on_exceed) == (0.5, "fail")
    assert source.source.null_values is None and source.source.header


def test_a_session_rule_without_programs_is_stored_as_before(tmp_path: Path) -> None:
    file = tmp_path / "clicks.toml"
    file.write_text(GOOD)
    before = load_source(str(file)).sessions
    assert before.rule_text() == (
        '{"gap_us": 1800000000, "max_session_events": 5000, "max_session_us": 86400000000, '
        '"rule": "gap"}'
    )
    file.write_text(GOOD.replace("[sessions]", "") + "[bots]\nevents_without_pause = 9\n")
    source = load_source(str(file))
    assert source.agents is None and not source.computes and not source.leaves_out
    behaviour = source.sessions.session_rule.behaviour
    assert behaviour is not None
    assert (behaviour.events_without_pause, behaviour.pause_us) == (9, 30_000_000)
    assert '"events_without_pause": 9' in source.sessions.rule_text()
    file.write_text(GOOD.replace("[sessions]", ""))
    assert load_source(str(file)).sessions.rule_text() == before.rule_text()


def test_rules_that_differ_are_said_by_the_keys_of_the_file() -> None:
    half, hour = SessionsPart(), SessionsPart(gap_s=3600, midnight="UTC", max_session_hours=1.5)
    assert rules_apart(half.rule_text(), hour.rule_text()) == (
        "sessions.gap_s was 1800 and is 3600, sessions.max_session_hours was 24 and is 1.5, "
        'sessions.midnight was not set and is "UTC"'
    )
    assert rules_apart(half.rule_text(), half.rule_text()) == ""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "clicks"', 'name = "my clicks"', ["source.name", "'my clicks'", "letters"]),
        ('format = "csv"', 'format = "cvs"', ["source.format", "'cvs'", "'csv'"]),
        ('format = "csv"', 'format = "csv"\ndelimeter = ";"', ["delimeter", "'delimiter'"]),
        ('format = "csv"', "", ["source.format", "missing", "[source]"]),
        ('landing = "landing/*.csv"', "", ["source.landing", "missing"]),
        ('user_id = "u"', "", ["columns.user_id", "missing"]),
        ("[sessions]", "[bots]\n[sessions]", ["[bots]", "user_agent", "events_per_minute"]),
        (
            "[sessions]",
            "[bots]\nevents_per_minute = 0\n[sessions]",
            ["bots.events_per_minute", "0"],
        ),
        (
            "[sessions]",
            '[bots]\nevents_per_minute = 9\npolicy = "flag"\n[sessions]',
            ["bots.policy", "'flag'", "user agents"],
        ),
        (
            "[sessions]",
            "[bots]\nevents_per_minute = 9\npause_s = 5\n[sessions]",
            ["bots.pause_s = 5", "bots.events_without_pause"],
        ),
        ('format = "csv"', 'format = "csv"\nredelivery = "replaces"', ["redelivery", "'replace'"]),
        ('user_id = "u"', "user_id = 3", ["columns.user_id", "3", "string"]),
        ('user_id = "u"', 'user_id = ""', ["columns.user_id", "''"]),
        ('format = "csv"', 'format = "csv"\nheader = "no"', ["source.header", "'no'"]),
        ('unit = "s"', 'unit = "yyyy-MM-DD"', ["time.unit", "write d for"]),
        ('unit = "s"', 'unit = "yyyy-MM-dd hh:mm"', ["time.unit", "write H"]),
        ("[filters]", '[schedule]\ncron = "sometimes"', ["schedule.cron", "'sometimes'", "five"]),
        ('unit = "s"', 'unit = "seconds"', ["time.unit", "'seconds'", "iso8601"]),
        ('unit = "s"', 'unit = "yyyy-MM-dd jj"', ["time.unit", "'j'"]),
        ('unit = "s"', 'unit = "yyyy-mm-dd HH:mm"', ["time.unit", "write M for the month"]),
        ('unit = "s"', 'unit = "s"\nzone = "CEST"', ["time.zone = 'CEST'", "as 'Europe/Paris'"]),
        ('unit = "s"', 'unit = "s"\nzone = "berlin"', ["did you mean 'Europe/Berlin'?"]),
        ('unit = "s"', 'unit = "s"\nany_year = "yes"', ["time.any_year", "'yes'"]),
        ('unit = "s"', 'unit = "s"\nzone = "Mars/Base"', ["time.zone", "'Mars/Base'"]),
        ('unit = "s"', 'unit = "s"\nzone = "Europe/Pariss"', ["'Europe/Paris'"]),
        ("[sessions]", "[sessions]\ngap_s = 0", ["sessions.gap_s", "0", "greater than 0"]),
        ("[sessions]", '[sessions]\ngap_s = "30 min"', ["sessions.gap_s", "'30 min'"]),
        ("[sessions]", "[sessions]\ngap_s = true", ["sessions.gap_s = True", "write a number"]),
        ("[filters]", "[filters]\nmin_item_events = true", ["min_item_events = True", "a number"]),
        ("[sessions]", '[sessions]\nrule = "day"', ["sessions.rule", "'day'"]),
        ("[sessions]", '[sessions]\non_max_hours = "cut"', ["sessions.on_max_hours", "'cut'"]),
        ("[sessions]", "[sessions]\nnative_gap = true", ["sessions.native_gap", "leave it out"]),
        (
            "[sessions]",
            '[sessions]\nmidnight = "Europe/Amsterdm"',
            ["sessions.midnight", "did you mean 'Europe/Amsterdam'?"],
        ),
        ("[sessions]", '[sessions]\nmidnite = "UTC"', ["did you mean 'midnight'?"]),
        ("[sessions]", '[sessions]\nboundary = ""', ["sessions.boundary"]),
        (
            "[sessions]",
            '[sessions]\nrule = "source_session_id"',
            ["columns.source_session_id", "rule = 'gap'"],
        ),
        ("[sessions]", "[sessions]\nlateness_days = -1", ["lateness_days", "-1"]),
        ("[quality]", "[quality]\nmax_reject_share = 5", ["max_reject_share", "5"]),
        ("[quality]", '[quality]\non_exceed = "explode"', ["on_exceed", "'explode'"]),
        ("[filters]", "[filters]\nmin_item_events = 0", ["min_item_events = 0: it must be"]),
        ("[feedback]", '[feedback]\npositive = ["value >= 4"]', ["columns.value", "mapped"]),
        ("[feedback]", '[feedback]\npositive = ["value => 4"]', ["'value => 4'", ">="]),
        ("[feedback]", '[feedback]\npositive = ["read"]', ["'read'", "columns.event_type"]),
        ("[filters]", "[filter]", ["filter is not a field", "'filters'"]),
        ("[filters]", "[filters", ["not valid TOML", "at line", ": [filters. Texts are in"]),
        ('format = "csv"', 'format = "tsv"', ["source.format = 'tsv': ", 'delimiter = "\\t"']),
    ],
)
def test_a_mistake_is_told(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    text = message(tmp_path, old, new)
    for word in words:
        assert word in text


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "clicks.toml"
    file.write_text(GOOD.replace('"csv"', '"cvs"').replace('unit = "s"', 'unit = "x"'))
    with pytest.raises(SourceError) as raised:
        load_source(str(file))
    assert "source.format" in str(raised.value) and "time.unit" in str(raised.value)


def test_a_section_is_no_value(tmp_path: Path) -> None:
    file = tmp_path / "clicks.toml"
    file.write_text("time = 3\n" + GOOD.replace('[time]\nunit = "s"\n', ""))
    with pytest.raises(SourceError, match=r"time = 3: time is a section: write \[time\]"):
        load_source(str(file))
    file.write_text("[columns]\n")
    with pytest.raises(SourceError, match=r"\[source\] is missing: add the section"):
        load_source(str(file))


def test_columns_of_a_log_without_header_are_numbered(tmp_path: Path) -> None:
    text = message(tmp_path, 'format = "csv"', 'format = "csv"\nheader = false')
    assert "columns.user_id = 'u'" in text and "_0, _1" in text


def test_columns_of_a_web_log_are_known(tmp_path: Path) -> None:
    text = message(tmp_path, 'format = "csv"', 'format = "combined_log"')
    assert "columns.user_id = 'u'" in text and "user_agent" in text


def test_a_source_that_is_not_there_names_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clicks.toml").write_text(GOOD)
    monkeypatch.setenv("SESSIONMILL_SOURCES", str(tmp_path))
    settings.cache_clear()
    try:
        assert load_source("clicks").name == "clicks"
        with pytest.raises(
            SourceError, match=r"views.toml does not exist. Source files there: clicks"
        ):
            load_source("views")
        with pytest.raises(
            SourceError, match=r"clikcs.toml does not exist. Did you mean 'clicks'\?"
        ):
            load_source("clikcs")
    finally:
        settings.cache_clear()


def test_a_misspelt_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSIONMILL_LAKKE", "somewhere")
    settings.cache_clear()
    try:
        with pytest.raises(
            SettingsError, match=r"SESSIONMILL_LAKKE .* did you mean SESSIONMILL_LAKE"
        ):
            settings()
    finally:
        settings.cache_clear()


IDENTITY = GOOD + '[identity]\nanonymous_id = "c"\n'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('anonymous_id = "c"', "", ["identity.anonymous_id is missing"]),
        ('anonymous_id = "c"', 'anonymous_id = "c"\nlink = "newest"', ["identity.link", "'newest'", "'last'"]),
        ('anonymous_id = "c"', 'anonymous_id = "c"\nmax_days = 0', ["identity.max_days = 0", "greater"]),
        ('anonymous_id = "c"', 'anonymous_id = "u"', ["identity.anonymous_id = 'u'", "the user, too"]),
        (
            'anonymous_id = "c"', 'anonymous_id = "c"\nuser_id = "login"',
            ["columns.user_id = 'u' and identity.user_id = 'login'", "leave one of them out"],
        ),
        ('anonymous_id = "c"', 'anonymous_id = "c"\nlink = { landing = "x" }', ["identity.link", "missing"]),
        ('user_id = "u"', "", ["columns.user_id is missing: add it under [columns]"]),
    ],
)  # fmt: skip
def test_a_mistake_in_identity_is_told(
    tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    file = tmp_path / "clicks.toml"
    assert old in IDENTITY
    file.write_text(IDENTITY.replace(old, new, 1))
    with pytest.raises(SourceError) as raised:
        load_source(str(file))
    for word in words:
        assert word in str(raised.value)


def test_the_user_is_named_in_columns_or_in_identity(tmp_path: Path) -> None:
    file = tmp_path / "clicks.toml"
    texts = [IDENTITY, IDENTITY.replace('user_id = "u"\n', "") + 'user_id = "u"\n']
    texts.append(IDENTITY + 'user_id = "u"\n')
    mapped = []
    for text in texts:
        file.write_text(text)
        mapped.append(load_source(str(file)).mapped())
    assert mapped[0] == mapped[1] == mapped[2]
    assert mapped[0] == {"user_id": "u", "item_id": "i", "event_ts": "t", "anonymous_id": "c"}


def test_the_stored_rule_names_new_keys_only_where_they_are_set() -> None:
    """Tables of earlier versions were made by the rule that they say, byte for byte."""
    stored = '{"gap_us": 1800000000, "max_session_events": 5000, "max_session_us": 86400000000, "rule": "gap"}'
    assert SessionsPart().rule_text() == stored
    assert (
        SessionsPart(midnight="UTC").rule_text()
        == stored[:-1].replace('"rule"', '"midnight": "UTC", "rule"') + "}"
    )
    every = SessionsPart(
        rule="source_session_id", native_gap=True, on_max_hours="split", boundary="prev.a"
    )
    assert every.more_rules() == {
        "native_gap": True, "on_max_hours": "split", "boundary": "prev.a",
    }  # fmt: skip


def test_a_copied_source_file_needs_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SESSIONMILL_SOURCES", str(tmp_path))
    settings.cache_clear()
    try:
        for name in ("clicks", "copy", "alone"):
            (tmp_path / f"{name}.toml").write_text(GOOD)
        (tmp_path / "alone.toml").write_text(GOOD.replace('"clicks"', '"other"'))
        (tmp_path / "broken.toml").write_text("[source")
        assert load_source("clicks").name == "clicks" and load_source("alone").name == "other"
        with pytest.raises(
            SourceError, match=r"copy\.toml: source\.name = 'clicks' is the name of .*clicks"
        ):
            load_source("copy")
        # A file that is named by its path may be anywhere, and is what is meant.
        assert load_source(str(tmp_path / "copy.toml")).name == "clicks"
    finally:
        settings.cache_clear()
