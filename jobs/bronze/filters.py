"""`source.keep` and `[bots]`: what a run says of the lines that they leave out, and what a reload does
with events that were stored before.

A filter holds for the lines that are read from then on. `jobs run --reload` applies it to everything:
stored events all of whose lines are left out now go, with those of files that are no longer there
kept and counted.
"""

from __future__ import annotations

import hashlib
import json

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.bronze import landing
from jobs.bronze.manifest import IngestManifest, version_of
from jobs.bronze.rejects import filtered
from jobs.core.tables import EVENTS, FILES, FILTERED, FLAGS
from jobs.lake.context import Candidate, Context
from jobs.lake.delta_errors import retried
from jobs.records.evaluate import bot_list

PROPERTY = "sessionmill.filters"
"""A property of `bronze.events`: a digest of the filters by which its newest lines were read."""


def any_of(context: Context) -> bool:
    """Whether lines may be left out, or were."""
    return context.source.leaves_out or context.lake.version(FILTERED) is not None


def make_ready(context: Context) -> None:
    """Make the table of lines that are left out, where it is wanted; note the list of bots."""
    if context.source.source.keep_filtered:
        context.lake.create(FILTERED)
    if context.source.agents is not None and context.source.agents.policy == "flag":
        context.lake.create(FLAGS)
    if context.source.agents is not None:
        own = len(context.source.agents.patterns)
        context.lists["bots"] = bot_list() + (f", {own} own patterns" if own else "")


def said(context: Context) -> str:
    """A digest of the filters of the source file; empty: there are none."""
    source = context.source
    if not source.leaves_out:
        return ""
    by_list = source.agents is not None and source.agents.policy == "filter"
    names = {"user_agent", "policy", "patterns"}
    bots = (
        source.agents.model_dump(include=names) if source.agents is not None and by_list else None
    )
    text = json.dumps({"keep": source.source.keep, "bots": bots}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fill_flags(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    """The events of this candidate's lines that are flagged, those that are stored already, too."""
    bots = context.source.agents
    if bots is None or bots.policy != "flag" or manifest.settled:
        return
    lines = candidate.part("lines").where("reason IS NULL")
    if candidate.has("judged"):
        lines = candidate.part("judged").where("NOT late")
    rows = lines.where("flag IS NOT NULL").select("event_id", "flag").distinct()
    rows = rows.withColumn("first_seen_ts", F.lit(context.started))
    base = context.lake.version(FLAGS)
    known = context.lake.read(FLAGS, base).select("event_id")
    rows = rows.join(known, "event_id", "left_anti").withColumn("gone", F.lit(False))
    candidate.write("flags", rows.coalesce(1))
    manifest.flagged = candidate.row_count("flags")


def publish_flags(context: Context, candidate: Candidate, manifest: IngestManifest) -> None:
    if not manifest.flagged + manifest.flags_changed:
        return

    def attempt(_: int) -> None:
        lake, base = context.lake, version_of(context, FLAGS)
        context.upsert(FLAGS, candidate, "flags", base, lake.guard(FLAGS), base + 1)

    retried(3, attempt)


def remember(context: Context) -> None:
    """Store the filters with `bronze.events`."""
    now = said(context)
    if now != (context.lake.property(EVENTS, PROPERTY) or ""):
        context.lake.set_property(EVENTS, PROPERTY, now)


def added(context: Context, reload: bool) -> list[str]:
    """What to say if the filters are others than those of the run before; once, because the run that
    says it stores them."""
    lake, now = context.lake, said(context)
    if reload or now == (lake.property(EVENTS, PROPERTY) or "") or not lake.rows(FILES):
        return []
    again = f"python -m jobs run --source {context.source.name} --reload"
    what = "source.keep and [bots] are new or changed" if now else "source.keep and [bots] are gone"
    return [
        f"{what}: this holds for lines that are read from now on. {again} reads all landing files "
        "again and applies it to everything; events whose file is no longer there are kept"
    ]


def told(context: Context, candidate: Candidate, manifest: IngestManifest) -> list[str]:
    """What to say of lines that are left out, and of those of which `keep` cannot be computed."""
    notes = []
    left = sum(manifest.filtered.values())
    if left and left == manifest.counts.read:
        notes.append(
            f"source.keep and [bots] left out all {left:,} lines: if some should have been kept, "
            "correct them in the source file, and read the files again: python -m jobs run --source "
            f"{context.source.name} --reload"
        )
    facts = [one for one in landing.facts_read(candidate) if one.unjudged]
    if manifest.flagged:
        notes.append(
            f"{manifest.flagged:,} more events are flagged as those of bots, in bronze.flags"
        )
    if facts:
        notes.append(
            f"source.keep could not be computed for {sum(one.unjudged for one in facts):,} lines, "
            f"which were kept; the first is line {facts[0].first_unjudged} of {facts[0].file}"
        )
    return notes


def unwanted(
    context: Context, candidate: Candidate, manifest: IngestManifest, usable: DataFrame
) -> DataFrame:
    """Stored events, of files that this run reads, all of whose lines are left out now."""
    ids = filtered(candidate).select("event_id").where("event_id IS NOT NULL").distinct()
    ids = ids.join(usable.select("event_id"), "event_id", "left_anti")
    events = context.lake.read(EVENTS, manifest.base[EVENTS.full_name])
    there = F.col("ingest_file").isin(manifest.files)
    return events.where(there).join(ids, "event_id", "left_semi")


def without_file(context: Context, manifest: IngestManifest) -> list[str]:
    """What a reload says of stored events that it cannot read again."""
    if not context.source.leaves_out or not context.lake.rows(EVENTS):
        return []
    events = context.lake.read(EVENTS, manifest.base[EVENTS.full_name])
    kept = events.where(~F.col("ingest_file").isin(manifest.files)).count()
    if not kept:
        return []
    return [
        f"{kept:,} events are of files that are no longer in the landing: source.keep and [bots] "
        "could not be applied to them, and they were kept"
    ]
