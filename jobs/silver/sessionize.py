"""`bronze.events` -> `silver.sessions`: only the sessions around what changed are cut again.

Where the source has `[identity]`, events get their person first (`jobs/silver/identify.py`), and sessions
are cut from `silver.events`.

Sessions are a pure function of the set of accepted events: ids come from the user and the
session's first event, one total order everywhere, nothing depends on arrival, files, partitions
or other users. A silence of more than `gap_s` ends a session; exactly `gap_s` does not.
"""

from __future__ import annotations

from dataclasses import replace

from jobs.audit import balance
from jobs.core import crash_points
from jobs.core.errors import RuleChanged, SettingsError
from jobs.core.plan import Algorithm, Publish, SessionizeFacts, idle
from jobs.core.source_rules import rules_apart
from jobs.core.tables import EVENTS, IDENTITIES, PERSON_EVENTS, SESSIONS
from jobs.lake import foreign, foreign_columns
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.delta_errors import FeedGone
from jobs.records.boundary import boundary_of
from jobs.silver.audit import audit
from jobs.silver.cut_all import cut_all
from jobs.silver.cut_changes import cut_changes
from jobs.silver.identify import identify
from jobs.silver.manifest import SessionizeManifest

__all__ = ["OPTIONS", "audit", "compute", "publish"]

OPTIONS = ("rebuild",)
RULE_PROPERTY = "sessionmill.rule"
SHORT_GAP_S = 300
"""Ours: with a shorter gap, sessions of hardly more than one event are reported."""
FEW_EVENTS = 1.5
"""In the mean of all sessions."""
MANY_RUNAWAYS = 0.2
"""Of all sessions."""


def check_rule(context: Context) -> None:
    """Raises: RuleChanged: the table was made by another rule than the source file's."""
    stored = context.lake.property(SESSIONS, RULE_PROPERTY)
    wanted = context.source.session_rule_text()
    if stored is not None and stored != wanted:
        way = f"python -m jobs sessionize --source {context.source.name} --rebuild"
        if context.source.boundary_reads_log:
            way = (
                f"python -m jobs run --source {context.source.name} --reload --rebuild, which reads the "
                "landing files again, because events that were stored before lack the columns of the log "
                "that sessions.boundary names"
            )
        raise RuleChanged(
            f"silver.sessions was made by another rule than the source file has: {rules_apart(stored, wanted)}. "
            f"Set the old rule again, or make all sessions by the new one: {way}"
        )


def compute(context: Context, rebuild: bool = False) -> Candidate:
    """Find what changed since the version consumed last and cut around it.

    Args:
        rebuild: make all sessions anew, whatever there is.

    Raises:
        AuditFailed: the stored sessions do not have the events that they were made from.
    """
    lake, rule = context.lake, context.source.sessions.session_rule
    boundary_of(context.source)  # (mistakes are said before all else)
    if lake.version(EVENTS) is None:
        raise SettingsError(
            f"there is no table at {lake.path(EVENTS)}: run python -m jobs ingest --source "
            f"{context.source.name} first"
        )
    foreign.make_ready(context, EVENTS, SESSIONS)
    foreign.refuse_loss(context, EVENTS)
    lake.create(SESSIONS, {RULE_PROPERTY: context.source.session_rule_text()}, upgrade=False)
    if context.source.boundary_reads_log:
        lake.create(EVENTS)  # (those of earlier versions lack a column)
    if not rebuild:
        check_rule(context)
    candidate = context.candidate(SESSIONS)
    people = identify(context, rebuild)
    of = people.table
    upto, base = lake.version(of), lake.version(SESSIONS)
    assert upto is not None and base is not None
    manifest = SessionizeManifest(idle("sessionize"), base, upto, notes=people.notes)
    rebuild = rebuild or people.anew
    if not rebuild:
        rebuild, why = foreign.to_make_anew(context, SESSIONS, of, upto)
        manifest.notes += why
    if not rebuild:  # (what is cut continues the sessions that are there)
        manifest.notes += balance.hold(context, SESSIONS)
    after = None if rebuild else lake.consumed(SESSIONS, of)
    if after is None or lake.changed_rows(of, after):
        manifest.base = with_columns(context, base)
    facts = SessionizeFacts(
        gap_rule=rule.by_silence, events=lake.rows(of), grown=lake.grown(of, after),
        whole=after is None, replaces=rebuild or after is not None or lake.rows(SESSIONS) > 0,
    )  # fmt: skip
    if after is not None and after < upto:
        try:
            cut_changes(context, candidate, manifest, facts, after)
        except FeedGone as gone:
            manifest.notes.append(f"the change feed is gone, sessions are made anew ({gone})")
            facts = replace(facts, whole=True)
    elif after is not None:
        manifest.empty = True
    if facts.whole:
        cut_all(context, manifest, facts, rebuild)
    context.decide(manifest.plan)
    candidate.save(manifest)
    crash_points.point("sessionize.computed")
    return candidate


def with_columns(context: Context, base: int) -> int:
    """Give `silver.sessions` of an earlier version the columns that it lacks; its version then."""
    context.lake.create(SESSIONS)
    return context.lake.version(SESSIONS) or base


def change(context: Context, candidate: Candidate, manifest: SessionizeManifest) -> None:
    """New, changed and retired sessions in one commit.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
    """
    lake = context.lake
    context.upsert(
        SESSIONS, candidate, "sessions", manifest.base,
        lake.app_id(SESSIONS, lake.session_events()), manifest.upto, stored="_start_ts",
    )  # fmt: skip


def replace_all(context: Context, manifest: SessionizeManifest) -> None:
    """All sessions anew, and the rule that made them, in one commit.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
    """
    lake, base, staged = context.lake, manifest.base, manifest.staged or []
    consumed = lake.app_id(SESSIONS, lake.session_events())
    rule = context.source.session_rule_text()
    if lake.property(SESSIONS, RULE_PROPERTY) == rule:
        foreign_columns.replace_rows(context, SESSIONS, staged, base, consumed, manifest.upto)
        return
    lake.unchanged(SESSIONS, base)
    context.enter(manifest.plan.engine)
    rows = foreign_columns.kept(context, SESSIONS, lake.staged(SESSIONS, staged), base)
    with lake.transaction(SESSIONS, consumed, manifest.upto, context.run_id):
        lake.replace(SESSIONS, rows, {RULE_PROPERTY: rule})
    if foreign.standing(lake, SESSIONS):  # (they are answered now)
        lake.mark(SESSIONS, base, context.run_id)


def unusual(context: Context, total: int, runaways: int) -> list[str]:
    """What to say of sessions that were all cut, if the rule does not seem to fit the log.

    Args:
        total: how many sessions there are; runaways: how many of them are left out of gold.
    """
    said = context.source.sessions
    again = (
        f"correct it, and make the sessions anew: python -m jobs run --source {context.source.name} "
        "--rebuild"
    )
    notes = []
    events = context.lake.rows(context.lake.session_events())
    if said.gap_s < SHORT_GAP_S and 0 < events < FEW_EVENTS * total:
        notes.append(
            f"a session has {events / total:.2f} events in the mean. sessions.gap_s = {said.gap_s:,.15g} is in "
            f"seconds (half an hour is 1800). If it is too short: {again}"
        )
    if runaways > MANY_RUNAWAYS * total:
        notes.append(
            f"{runaways:,} of {total:,} sessions are runaway and left out of gold: they are longer than "
            f"sessions.max_session_hours = {said.max_session_hours:g} or have more events than "
            f"sessions.max_session_events = {said.max_session_events:,}. If sessions.gap_s = "
            f"{said.gap_s:,.15g} (in seconds; half an hour is 1800) is too long, or columns.user_id is not one "
            f"user: {again}"
        )
    return notes


def publish(context: Context, candidate: Candidate) -> Result:
    """One commit replaces whatever the changes touched, and says up to where it read.

    Raises:
        Conflict: another run changed `silver.sessions` since the candidate was computed.
        AuditFailed: what is published does not have the events of `bronze.events`.
    """
    lake, manifest = context.lake, candidate.manifest(SessionizeManifest)
    context.decide(manifest.plan)
    of = lake.session_events()
    result = Result(notes=manifest.notes, tables_in={of.full_name: manifest.upto})
    if not manifest.empty:
        counts, consumed = manifest.counts, lake.app_id(SESSIONS, of)
        if manifest.plan.publish is Publish.REPLACE:
            replace_all(context, manifest)
        elif manifest.plan.publish is Publish.APPEND:
            staged, base = manifest.staged or [], manifest.base
            lake.commit(SESSIONS, staged, base, consumed, manifest.upto, context.run_id)
        else:
            change(context, candidate, manifest)
        crash_points.point("sessionize.published")
        result.sessions_new, result.sessions_changed = counts.new, counts.changed
        result.sessions_retired, result.sessions_merged = counts.retired, counts.merged
        result.sessions_relinked, result.runaways = counts.relinked, counts.runaways
        if manifest.plan.path in (Algorithm.CUT_SLICES, Algorithm.CUT_USERS):
            result.notes += unusual(context, lake.rows(SESSIONS), counts.runaways)
    foreign.answer(context, SESSIONS, of)
    if not manifest.empty:
        result.notes += balance.hold(context, SESSIONS)
    for table in (IDENTITIES, PERSON_EVENTS) if of is PERSON_EVENTS else ():
        result.tables[table.full_name] = lake.told(table)
    result.tables[SESSIONS.full_name] = lake.told(SESSIONS)
    return result
