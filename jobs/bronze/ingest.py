"""Landing files -> `bronze.events`, `bronze.rejects` and the ledger of files.

compute   choose the files that are new or changed, read them once into the candidate, tell new
          events from duplicates, late lines and rejects
audit     the suite of `expectations/events.py` on the candidate (rejects are published even when
          it fails)
publish   rejects, events, then the ledger; each commit alone leaves a state that the next run
          completes
"""

from __future__ import annotations

import os
from dataclasses import asdict

from pyspark.sql import functions as F

from jobs.audit import arrow_columns, suite
from jobs.bronze import (
    checks,
    exposures,
    file_checks,
    filters,
    landing,
    new_events,
    night,
    quality,
    redelivery,
)
from jobs.bronze.manifest import Counts, IngestManifest, version_of
from jobs.bronze.rejects import (
    LEFT_OUT,
    REJECTED,
    clear_aside,
    columns_of_files,
    count_lines,
    fill_aside,
    filtered,
    publish_aside,
    unusable,
)
from jobs.bronze.stored_events import first_days, learn_changed
from jobs.core import crash_points
from jobs.core.errors import (
    AuditFailed,
    Conflict,
    RejectShareError,
    SettingsError,
    SourceError,
)
from jobs.core.plan import IngestFacts, idle, ingest_plan
from jobs.core.tables import (
    CHANGED_EVENTS,
    DELIVERIES,
    EVENTS,
    FILES,
    FILTERED,
    ITEMS,
    PERSON_EVENTS,
    REJECTS,
    SESSIONS,
    Table,
)
from jobs.lake import foreign
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.tasks import run
from jobs.records.file_format import file_format
from jobs.records.records import FileFacts

# -- compute --------------------------------------------------------------------------------------


OPTIONS = ("reload", "rebuild")
READERS = (PERSON_EVENTS, SESSIONS, ITEMS)
"""What is made from `bronze.events`."""


def compute(context: Context, reload: bool = False, rebuild: bool = False) -> Candidate:
    """Steps of this job's compute, restartable at the parsed lines after a conflict.

    Args:
        reload: read all files of the landing, whatever the ledger says: others put older or other
            rows in place of the tables.
        rebuild: with `reload`, have all tables behind made anew.

    Raises:
        TableLost: they did, and the run is not a reload.
    """
    lake = context.lake
    file_format(context.source)  # (mistakes in expressions are said before all else)
    foreign.make_ready(context, EVENTS, REJECTS, FILTERED, DELIVERIES)
    landing.null_ids(context)
    for table in (EVENTS, REJECTS, FILES):
        lake.create(table, upgrade=False)
    candidate = context.candidate(EVENTS)
    skipped: list[str] = []
    notes = landing.fetch(context)
    landed = landing.landing_files(context, skipped)
    chosen, more = chosen_files(context, landed, reload, rebuild)
    notes += more
    if chosen or not landed:
        notes += landing.skipped_files(skipped)
    if not landed:
        notes += nothing_landed(context, landing.skipped_files(skipped))
    facts = lines_of(context, candidate, chosen, reload)
    manifest = IngestManifest(
        plan=idle("ingest"),
        base={
            table.full_name: version_of(context, table)
            for table in (EVENTS, REJECTS, FILES, FILTERED, DELIVERIES)
            if lake.version(table) is not None
        },
        empty=not facts,
        counts=Counts(
            read=sum(one.lines for one in facts), waiting=sum(one.waiting for one in facts)
        ),
        files=[one.file for one in facts],
        notes=notes,
        reload=reload,
    )
    if facts:
        fill(context, candidate, manifest, facts)
    context.decide(manifest.plan)
    candidate.save(manifest)
    crash_points.point("ingest.computed")
    return candidate


def lines_of(
    context: Context, candidate: Candidate, chosen: list[tuple[str, int, int]], reload: bool
) -> list[FileFacts]:
    """Read the chosen files into the candidate, if it has not their lines yet: what they were."""
    if not chosen:
        return []
    lake = context.lake
    file_checks.check_beginning(context, chosen)
    for table in (EVENTS, REJECTS, FILES):
        lake.create(table)
    filters.make_ready(context)
    redelivery.make_ready(context)
    if not landing.is_parsed(context, candidate, chosen):
        candidate.remove()
        if reload or not night.parse(context, candidate, chosen):
            lines = sum(size for _, size, _ in chosen) // landing.LINE_BYTES
            engine = context.thresholds.spark(lines, lake.rows(EVENTS))
            landing.parse(context, candidate, chosen, engine, reload)
    return landing.facts_read(candidate)


def told_of_lines(context: Context, candidate: Candidate, facts: list[FileFacts]) -> list[str]:
    """What to say of the lines that were read."""
    notes = file_checks.strange_times(context, candidate)
    notes += file_checks.swapped_columns(context.source)
    return notes + file_checks.told(context, facts) + exposures.told(context, candidate)


def nothing_landed(context: Context, notes: list[str]) -> list[str]:
    """What to say where no file is in the landing.

    Raises:
        SourceError: there never was one.
    """
    nothing = f"source.landing = {context.source.source.landing!r} matches no file"
    if context.lake.rows(FILES) == 0:
        if (jdbc := context.source.jdbc) is not None:
            raise SourceError(
                f"{jdbc.named} has no rows with a value in {jdbc.incremental_column!r}: there is "
                "nothing to read yet"
            )
        more = "".join(f"; {note}" for note in notes)
        raise SourceError(f"{nothing} (from {os.getcwd()}): correct it, or put the log there{more}")
    return [f"{nothing} this time: nothing was read"]


def chosen_files(
    context: Context, landed: list[tuple[str, int, int]], reload: bool, rebuild: bool = False
) -> tuple[list[tuple[str, int, int]], list[str]]:
    """The files to read, and what to say of what other writers did to the tables.

    Raises:
        TableLost: they restored or overwrote one, and the run is not a reload.
    """
    if reload:
        chosen, notes = again(context, landed)
        older = any(foreign.is_older_copy(context, one, EVENTS) for one in READERS)
        if rebuild or older:
            context.lake.set_property(EVENTS, foreign.REPLACED, foreign.READING + context.run_id)
        notes += foreign.begin_reading_again(context, *tables_of_lines(context))
    else:
        foreign.refuse_loss(context, EVENTS, REJECTS, *redelivery.tables(context))
        for target in READERS:
            foreign.refuse_older_copy(context, target, EVENTS)
        chosen, notes = landing.unread(context, landed), []
    return chosen, notes + learn_changed(context)


def tables_of_lines(context: Context) -> list[Table]:
    """Tables that lines of the log become rows of, as far as they are there."""
    tables = (EVENTS, REJECTS, FILTERED, *redelivery.tables(context))
    return [table for table in tables if context.lake.version(table) is not None]


def again(
    context: Context, landed: list[tuple[str, int, int]]
) -> tuple[list[tuple[str, int, int]], list[str]]:
    """The files of a reload: all that are there; and what to say of those that are not.

    Raises:
        SettingsError: there are none, or the run is for one day.
    """
    if context.day is not None:
        raise SettingsError("--reload reads all landing files: leave --day out")
    if not landed:
        raise SettingsError(
            f"--reload: source.landing = {context.source.source.landing!r} matches no file"
        )
    there = {path for path, *_ in landed}
    files = context.lake.small(FILES)["file"].to_pylist()
    gone = sorted(file for file in files if file not in there)
    if not gone:
        return landed, []
    return landed, [
        f"{len(gone)} files that were read before are no longer in the landing and cannot be read "
        f"again; the first is {gone[0]}"
    ]


def facts_of(
    context: Context, manifest: IngestManifest, late: bool, here: bool = False
) -> IngestFacts:
    """Args: late, here: as of `IngestFacts`; late but for what the tables say."""
    return IngestFacts(
        lines=manifest.counts.read,
        stored=context.lake.rows(EVENTS),
        native_ids=context.source.columns.event_id is not None,
        late=late
        or manifest.reload
        or context.lake.rows(CHANGED_EVENTS) > 0
        or context.lake.rows(DELIVERIES) > 0,
        here=here,
    )


def fill(
    context: Context, candidate: Candidate, manifest: IngestManifest, facts: list[FileFacts]
) -> None:
    """Write the candidate's events and rejects, and count; what to say of them."""
    # (Tables may have changed since this candidate's lines were read.)
    here = night.is_here(candidate) and night.possible(context, manifest.files)
    choice = facts_of(context, manifest, context.day is not None, here)
    manifest.plan = ingest_plan(choice, context.thresholds)
    context.decide(manifest.plan)
    if not choice.here:
        context.enter(manifest.plan.engine)
    notes = manifest.notes
    notes += told_of_lines(context, candidate, facts) + filters.added(context, manifest.reload)
    if choice.here:
        night.fill(context, candidate, manifest)
    else:
        fill_in_spark(context, candidate, manifest, choice)
    kept = manifest.counts.read - sum(manifest.filtered.values())
    notes += filters.told(context, candidate, manifest)
    notes += quality.bad_files(candidate, kept, manifest.rejects)
    notes += quality.same_ids(context, candidate)


def fill_in_spark(
    context: Context, candidate: Candidate, manifest: IngestManifest, choice: IngestFacts
) -> None:
    """Write the candidate's events and rejects, and count."""
    oldest = None if context.day is None else landing.oldest_date(context)
    new_events.fill_events(context, candidate, manifest, choice, oldest)
    rows = {REJECTED: unusable(candidate)}
    if filters.any_of(context):
        rows[LEFT_OUT] = filtered(candidate)
    days = first_days(context) if manifest.reload else None
    stamps = {
        # (Of a reload, the night's that read the file first: it judged what is late.)
        "run_day": F.lit(context.day).cast("date") if days is None else F.col("first_day"),
        "first_seen_ts": F.lit(context.started),
        "file_columns": columns_of_files(landing.facts_read(candidate)),
    }
    for aside, found in rows.items():
        if days is not None:
            found = found.join(F.broadcast(days), "file", "left")
        found = found.withColumns(stamps).select(*REJECTS.columns)
        candidate.write(aside.part, found.coalesce(1))
        count_lines(candidate, manifest, aside)
        if aside.table.full_name in manifest.base:
            fill_aside(context, candidate, manifest, aside)
    filters.fill_flags(context, candidate, manifest)
    if manifest.reload:
        manifest.notes += filters.without_file(context, manifest)


# -- audit ----------------------------------------------------------------------------------------


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored, RejectShareError (by policy). Rejects are published; the
    ledger is not, so the files of a failed run are read again."""
    manifest = candidate.manifest(IngestManifest)
    context.decide(manifest.plan)
    if manifest.empty:
        return
    kept = manifest.counts.read - sum(manifest.filtered.values())
    complaint = quality.complaint(context, candidate, kept, manifest.rejects)
    try:
        audit_events(context, candidate, manifest, complaint)
    except AuditFailed as error:
        publish_aside(context, candidate, manifest)
        if complaint and context.source.quality.on_exceed == "fail":
            raise RejectShareError(complaint) from error
        raise
    crash_points.point("ingest.audited")


def audit_events(
    context: Context, candidate: Candidate, manifest: IngestManifest, too_many: str = ""
) -> None:
    """Args: too_many: what to say of the lines that cannot be used; empty: they are few enough.

    Raises: AuditFailed, AuditErrored.
    """
    lake, counts, limits = context.lake, manifest.counts, context.thresholds
    aside = sum(manifest.rejects.values()) + sum(manifest.filtered.values())
    facts = {
        "lines_balance": counts.read == counts.events_new + counts.duplicates + aside,
        "reject_share_within_bound": not too_many,
    }
    staged = manifest.staged
    severity = {"reject_share_within_bound": context.source.quality.on_exceed}
    words = {"reject_share_within_bound": too_many}
    if staged is not None and context.source.columns.event_id is None:
        paths = [f"{lake.path(EVENTS)}/{one['path']}" for one in staged]
        spark = context.tasks(limits.tasks(counts.read))
        held = run(spark, checks.events_hold, paths, checks.EVENTS_DDL, "string")
        if all(one["holds"] for one in held) and arrow_columns.apart(held):
            number = counts.events_new
            suite.audit_certified(context, EVENTS, number, facts, severity, words)
            return
    engine = limits.spark(counts.read, lake.rows(EVENTS))
    if staged is not None:
        events = lake.staged(EVENTS, staged)
    else:
        events = candidate.part("events")
        events = events.where("NOT gone") if "gone" in events.columns else events
    suite.audit_candidate(context, EVENTS, events, facts, engine, severity, words)


# -- publish --------------------------------------------------------------------------------------


def publish(context: Context, candidate: Candidate) -> Result:
    """Rejects, events, rejects that came good, ledger: in this order.

    Raises:
        Conflict: another run changed `bronze.events` since the candidate was computed.
    """
    lake, manifest = context.lake, candidate.manifest(IngestManifest)
    context.decide(manifest.plan)
    result = Result(
        **asdict(manifest.counts),
        rejects=manifest.rejects,
        filtered=manifest.filtered,
        files=manifest.files,
        notes=manifest.notes,
    )
    if manifest.empty and context.day is None and (waiting := lake.rows(REJECTS)):
        result.notes.append(
            f"bronze.rejects has {waiting} lines of earlier runs. Files that were read are not read "
            "again: after a correction of the source file, python -m jobs replay-rejects --source "
            f"{context.source.name} reads those lines again"
        )
    if not manifest.empty:
        base = manifest.base[EVENTS.full_name]
        if lake.changed_rows(EVENTS, base):
            raise Conflict(f"bronze.events was changed by another run since version {base}")
        for aside in (REJECTED, LEFT_OUT):
            publish_aside(context, candidate, manifest, aside)
        crash_points.point("ingest.rejects-published")
        publish_all_events(context, candidate, manifest)
        for aside in (REJECTED, LEFT_OUT):
            clear_aside(context, candidate, manifest, aside)
        filters.remember(context)
        crash_points.point("ingest.rejects-cleaned")
        publish_ledger(context, candidate)
        crash_points.point("ingest.ledger-published")
    if manifest.reload:
        # From here on what others did before is answered, also where nothing had to come back.
        for table in tables_of_lines(context):
            base = version_of(context, table)
            lake.commit(table, [], base, lake.guard(table), base + 1, context.run_id)
        foreign.end_reading_again(context, *tables_of_lines(context))
        redelivery.all_read_again(context)
    for table in (EVENTS, REJECTS):
        result.tables[table.full_name] = lake.told(table)
    return result


def publish_all_events(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Events, and what the tables beside them say of them.

    Raises:
        Conflict: another run changed one of the tables since the candidate was computed.
    """
    redelivery.publish(context, candidate, manifest)
    if manifest.settled:  # (flags of events that go are found by these events)
        filters.publish_flags(context, candidate, manifest)
    publish_events(context, candidate, manifest)
    crash_points.point("ingest.events-published")
    if not manifest.settled:
        filters.publish_flags(context, candidate, manifest)


def publish_events(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """Raises: Conflict: another run changed `bronze.events` since the candidate was computed."""
    counts = manifest.counts
    if not counts.events_new + counts.events_replaced + counts.events_removed:
        return
    lake, base = context.lake, manifest.base[EVENTS.full_name]
    guard, version = lake.guard(EVENTS), base + 1
    if manifest.staged is not None:
        lake.commit(EVENTS, manifest.staged, base, guard, version, context.run_id)
        return
    context.upsert(EVENTS, candidate, "events", base, guard, version, stored="stored_ts")


def publish_ledger(context: Context, candidate: Candidate) -> None:
    lake = context.lake
    rows = [
        (one.file, one.bytes, one.modified_ms, one.sha256, one.lines, list(one.columns.items()),
         context.started, context.batch, one.waiting or None)
        for one in landing.facts_read(candidate)
    ]  # fmt: skip
    lake.put_small(FILES, rows)
