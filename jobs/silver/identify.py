"""`bronze.events` -> `silver.identities` and `silver.events`: whose each event is.

The first part of `sessionize`, of sources that have or had `[identity]`. Links follow from logins
(`jobs/silver/links.py`). Events get their person once, here; what comes after reads `silver.events` as
it would read the log. A run links anew the anonymous ids whose logins changed something, and moves those
of their events that are another person's now.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.audit import balance
from jobs.core import crash_points
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import Conflict
from jobs.core.source_rules import BOUNDARY_VALUES
from jobs.core.tables import EVENTS, IDENTITIES, PERSON_EVENTS, Table
from jobs.lake import filesystem, foreign, foreign_columns
from jobs.lake.change_feed import CHANGED, NEW, RETIRED, TYPE, VERSION
from jobs.lake.context import Candidate, Context
from jobs.lake.data_files import staging
from jobs.lake.delta_errors import FeedGone
from jobs.lake.manifest import Staged
from jobs.lake.tasks import run
from jobs.lake.time_slices import micros
from jobs.silver import identity_audit, links, person_files
from jobs.silver.cut_arrow import EVENT_FIELDS
from jobs.silver.cut_nightly import net
from jobs.silver.link_table import spans_of_table

RULE_PROPERTY = "sessionmill.identity"
NO_RULE = '{"link": "none", "max_days": null}'
"""The rule of a source that has no `[identity]` any more."""
ATTEMPTS = 3
OF_LOG = ("user_id", *EVENT_FIELDS, "anonymous_id", BOUNDARY_VALUES)
"""What is read of an event of the log."""
CANDIDATE_DDL = f"{PERSON_EVENTS.ddl}, change string, stored_ts timestamp"


@dataclass
class People:
    """Where sessions are cut from."""

    table: Table
    anew: bool = False
    """Whether all of its rows were made anew: so are all sessions."""
    notes: list[str] = field(default_factory=list)


@dataclass
class Work:
    """One run's."""

    context: Context
    candidate: Candidate
    upto: int
    """The version of `bronze.events` that is read up to."""
    base: int
    """The version of `silver.events` before."""
    notes: list[str]
    table: pa.Table | None = None
    """The rows of a table of links, once they were read."""

    @property
    def rule(self) -> str:
        who = self.context.source.identity
        return NO_RULE if who is None else who.rule_text()

    def put(self, name: str, rows: pa.Table) -> str:
        """A small file of the candidate, for tasks."""
        path = self.candidate.path(f"{name}.parquet")
        filesystem.write_parquet(path, rows)
        return path

    def tasks(self, task: Any, files: list[str], rows: int, ddl: str) -> list[dict[str, Any]]:
        limits = self.context.thresholds
        return run(self.context.tasks(limits.tasks(rows)), task, files, ddl, "string")


def identify(context: Context, rebuild: bool = False) -> People:
    """Bring `silver.identities` and `silver.events` up to date, where the source needs them.

    Args:
        rebuild: make all rows anew.

    Raises:
        AuditFailed: the rows do not hold, or the stored ones are not those of `bronze.events`.
        Conflict: other runs were faster, three times.
    """
    if not needed(context):
        return People(EVENTS)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return once(context, rebuild)
        except Conflict as conflict:
            if attempt == ATTEMPTS:
                raise
            print(f"{conflict}: computing again ({attempt + 1} of {ATTEMPTS})", flush=True)
    raise AssertionError("unreachable")


def needed(context: Context) -> bool:
    """Whether events have persons: by the source file, or because the tables have such events."""
    lake = context.lake
    if context.source.identity is not None or lake.version(PERSON_EVENTS) is not None:
        return True
    found = lake.open(EVENTS)
    assert found is not None
    told = pa.table(found.get_add_actions(flatten=True))
    known = "null_count.user_id" in told.column_names
    return known and bool(pc.sum(told["null_count.user_id"]).as_py())


def once(context: Context, rebuild: bool) -> People:
    """One attempt of `identify`."""
    lake = context.lake
    foreign.make_ready(context, IDENTITIES, PERSON_EVENTS)
    for table in (EVENTS, IDENTITIES, PERSON_EVENTS):  # (of earlier versions EVENTS lacks a column)
        lake.create(table)
    upto, base = lake.version(EVENTS), lake.version(PERSON_EVENTS)
    assert upto is not None and base is not None
    work = Work(context, context.candidate(PERSON_EVENTS), upto, base, [])
    work.candidate.remove()  # (of an attempt that was killed)
    anew, said = foreign.to_make_anew(context, PERSON_EVENTS, EVENTS, upto)
    work.notes += said
    anew = anew or rebuild or lake.consumed(PERSON_EVENTS, EVENTS) is None
    if not anew:
        work.notes += balance.hold(context, PERSON_EVENTS)
        try:
            anew = not change(work)
        except FeedGone as gone:
            work.notes.append(f"the change feed is gone, silver.events is made anew ({gone})")
            anew = True
    if anew:
        make(work)
    if lake.property(PERSON_EVENTS, RULE_PROPERTY) != work.rule:
        lake.set_property(PERSON_EVENTS, RULE_PROPERTY, work.rule)
    foreign.answer(context, PERSON_EVENTS, EVENTS)
    work.notes += balance.hold(context, PERSON_EVENTS)
    work.candidate.remove()
    return People(PERSON_EVENTS, anew, work.notes)


# -- all rows -------------------------------------------------------------------------------------


def make(work: Work) -> None:
    """All links and all rows anew."""
    context, lake = work.context, work.context.lake
    first = lake.consumed(PERSON_EVENTS, EVENTS) is None
    stored = lake.files_of(EVENTS, work.upto)
    files, rows = [one.path for one in stored], sum(one.rows for one in stored)
    logins = logins_of(work, files, rows, "user_id")
    given = given_by(context, logins)
    identity_audit.of_links(context, given, logins)
    folder = f"{lake.path(PERSON_EVENTS)}/{staging(context.run_id)}"
    path = work.put("links", given)
    made = work.tasks(person_files.Place(path, folder), files, rows, person_files.PATH_DDL)
    staged = lake.entries(PERSON_EVENTS, folder.rpartition("/")[2], [one["path"] for one in made])
    paths, count = [one["path"] for one in made], sum(one["rows"] for one in made)
    identity_audit.of_events(context, paths, path, count, (count, rows))
    crash_points.point("identify.audited")
    app_id = lake.app_id(PERSON_EVENTS, EVENTS)
    foreign_columns.replace_rows(context, PERSON_EVENTS, staged, work.base, app_id, work.upto)
    crash_points.point("identify.events-published")
    replace_links(work, given)
    crash_points.point("identify.published")
    who = context.source.identity
    if first and rows and not given.num_rows and who is not None and isinstance(who.link, str):
        work.notes.append(
            f"no event of bronze.events has a user and an anonymous id, so nothing is linked yet. Events "
            f"that were read before [identity] was there get theirs from the landing files: python -m "
            f"jobs run --source {context.source.name} --reload"
        )


def given_by(context: Context, logins: pa.Table) -> pa.Table:
    """The links by the source file's rule."""
    who = context.source.identity
    if who is None:
        return links.LINKS.empty_table()
    rule = who.link if isinstance(who.link, str) else "last"
    return links.links_of(logins, rule, who.max_days)


def logins_of(
    work: Work, files: list[str], rows: int, user: str, only: str | None = None,
    without: str | None = None,
) -> pa.Table:  # fmt: skip
    """The logins in files of events, as `links.SPANS`; or what stands for them: a table's rows.

    Args:
        user: the column of the log's user.
        only: a file of anonymous ids: those that are asked for; without: of ids of events that are
            gone.
    """
    who = work.context.source.identity
    if who is None:
        return links.SPANS.empty_table()
    if not isinstance(who.link, str):
        if work.table is None:
            work.table, said = spans_of_table(work.context, who.link)
            work.notes += said
        return work.table if only is None else _of(work.table, person_files.ids_of(only))

    def found(only: str | None, alone: bool) -> pa.Table:
        task = person_files.Logins(work.candidate.path("logins"), user, only, without, alone)
        done = work.tasks(task, files, rows, person_files.PATH_DDL)
        parts = [filesystem.read_parquet(one["path"]).cast(links.SPANS) for one in done]
        return pa.concat_tables([links.SPANS.empty_table(), *parts])

    spans = found(only, False)
    unclear = links.contested(spans) if who.link == "last" else pa.array([], pa.string())
    if len(unclear):
        path = work.put("unclear", pa.table({"anonymous_id": unclear}))
        spans = pa.concat_tables([_not_of(spans, unclear), found(path, True)])
    return spans


def _of(rows: pa.Table, ids: Any) -> pa.Table:
    return rows.filter(pc.is_in(rows["anonymous_id"], ids))


def _not_of(rows: pa.Table, ids: Any) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["anonymous_id"], ids)))


def replace_links(work: Work, given: pa.Table) -> None:
    """All links in place of those that are there."""
    context, lake = work.context, work.context.lake
    base, folder = lake.version(IDENTITIES), staging(context.run_id)
    assert base is not None
    staged: Staged = []
    if given.num_rows:
        filesystem.write_parquet(f"{lake.path(IDENTITIES)}/{folder}/part-0.parquet", given)
        staged = lake.entries(IDENTITIES, folder)
    app_id = lake.app_id(IDENTITIES, EVENTS)
    if lake.rows(IDENTITIES):
        foreign_columns.replace_rows(context, IDENTITIES, staged, base, app_id, work.upto)
    else:
        lake.commit(IDENTITIES, staged, base, app_id, work.upto, context.run_id)


# -- what changed ---------------------------------------------------------------------------------


def change(work: Work) -> bool:
    """Take what changed in `bronze.events`, in the rule or in a table of links. Returns whether it did:
    of very many changes it is cheaper to make all rows anew.

    Raises:
        FeedGone: the change feed does not reach back.
    """
    context, lake = work.context, work.context.lake
    after = lake.consumed(PERSON_EVENTS, EVENTS)
    assert after is not None
    most = context.thresholds.identified_events
    if abs(lake.grown(EVENTS, after)) > most:
        return False
    gone = came = arrow_schema({name: EVENTS.columns[name] for name in OF_LOG}).empty_table()
    if after < work.upto:
        feed = lake.changes_few(EVENTS, after, work.upto, [*OF_LOG, TYPE, VERSION])
        if feed.num_rows > most:
            return False
        gone, came = net(feed)
    known = lake.table_of(IDENTITIES, _version(work, IDENTITIES), list(IDENTITIES.columns))
    known = filesystem.usual(known).cast(links.LINKS).combine_chunks()
    every = every_link(work, after)
    ids = None if every else unclear_ids(work, known, gone, came)
    if after == work.upto and ids is not None and not len(ids):
        return True
    given, moved = known, person_files.SCHEMA.empty_table()
    if ids is None or len(ids):
        given, moved = linked_anew(work, known, ids, gone, came)
    publish_events(work, given, candidate_of(given, gone, came, moved))
    put_links(work, known, given, ids)
    crash_points.point("identify.published")
    return True


def _version(work: Work, table: Table) -> int:
    version = work.context.lake.version(table)
    assert version is not None
    return version


def every_link(work: Work, after: int) -> bool:
    """Whether all links must be made anew: by another rule, after a run that was killed between both
    tables, or because others changed them."""
    lake = work.context.lake
    changed = foreign.changed(lake, IDENTITIES)
    if changed is not None:
        work.notes.append(f"{changed.in_words()}. All links were made again")
    stored = lake.property(PERSON_EVENTS, RULE_PROPERTY)
    if stored is not None and stored != work.rule:
        work.notes.append(
            f"silver.identities was made by the rule {stored}, the source file says {work.rule}: all "
            "links were made again, and the events whose person is another one now were moved"
        )
    in_step = lake.consumed(IDENTITIES, EVENTS) == after
    return changed is not None or stored != work.rule or not in_step


def unclear_ids(work: Work, known: pa.Table, gone: pa.Table, came: pa.Table) -> pa.Array:
    """The anonymous ids that may have other links now: by a login that is gone, by one that is not its
    user's by the known links, or by a table's rows."""
    who = work.context.source.identity
    if who is None:
        return pa.array([], pa.string())
    if not isinstance(who.link, str):
        spans = logins_of(work, [], 0, "user_id")
        found = [part["anonymous_id"] for part in links.same(known, given_by(work.context, spans))]
    else:
        at = came.filter(_is_login(came))
        whose = links.linked(
            known, person_files.column_of(at, "anonymous_id"), micros(at["event_ts"])
        )
        # (Before the first login an event is linked too, but a login there is the first.)
        since = known.group_by("anonymous_id").aggregate([("since_ts", "min")])
        place = pc.index_in(at["anonymous_id"], since["anonymous_id"].combine_chunks())
        first = since["since_ts_min"].take(place)
        clear = pc.and_(pc.equal(whose, at["user_id"]), pc.less_equal(first, at["event_ts"]))
        if who.link == "first":  # what is not before the first login changes nothing
            clear = pc.less(first, at["event_ts"])
        unclear = at.filter(pc.invert(pc.fill_null(clear, False)))
        found = [unclear["anonymous_id"], gone.filter(_is_login(gone))["anonymous_id"]]
    every = pa.chunked_array([chunk for one in found for chunk in one.chunks], pa.string())
    return pc.unique(every)


def _is_login(events: pa.Table) -> Any:
    return pc.and_(pc.is_valid(events["user_id"]), pc.is_valid(events["anonymous_id"]))


def linked_anew(
    work: Work, known: pa.Table, ids: pa.Array | None, gone: pa.Table, came: pa.Table
) -> tuple[pa.Table, pa.Table]:
    """All links, those of some anonymous ids made anew; and the stored rows of `silver.events` whose
    person is another one now, with that one.

    Args:
        ids: the anonymous ids; None: all.
        gone, came: events of the log, as `net` has them.
    """
    context = work.context
    stored = context.lake.files_of(PERSON_EVENTS, work.base)
    files, rows = [one.path for one in stored], sum(one.rows for one in stored)
    only = None if ids is None else work.put("ids", pa.table({"anonymous_id": ids}))
    without = work.put("gone", gone.select(["event_id"])) if gone.num_rows else None
    logins = logins_of(work, files, rows, "log_user_id", only, without)
    who = context.source.identity
    if who is not None and isinstance(who.link, str):
        new = came if ids is None else _of(came, ids)
        times = pa.array(micros(new["event_ts"]))
        more = links.spans_of(new["anonymous_id"], new["user_id"], times, alone=True)
        logins = pa.concat_tables([logins, more])
        unclear = links.contested(logins) if who.link == "last" else pa.array([], pa.string())
        if len(unclear):
            path = work.put("unclear", pa.table({"anonymous_id": unclear}))
            task = person_files.Logins(
                work.candidate.path("logins"), "log_user_id", path, without, alone=True
            )
            done = work.tasks(task, files, rows, person_files.PATH_DDL)
            again = [filesystem.read_parquet(one["path"]).cast(links.SPANS) for one in done]
            logins = pa.concat_tables([_not_of(logins, unclear), *again, _of(more, unclear)])
    anew = given_by(context, logins)
    identity_audit.of_links(context, anew, logins)
    given = anew if ids is None else pa.concat_tables([_not_of(known, ids), anew])
    path = work.put("links", anew)
    task_moved = person_files.Moved(path, work.candidate.path("moved"), only)
    done = work.tasks(task_moved, files, rows, person_files.PATH_DDL)
    parts = [filesystem.read_parquet(one["path"]).cast(person_files.SCHEMA) for one in done]
    moved = pa.concat_tables([person_files.SCHEMA.empty_table(), *parts])
    touched = [one["event_id"].combine_chunks() for one in (gone, came)]
    moved = moved.filter(pc.invert(pc.is_in(moved["event_id"], pa.concat_arrays(touched))))
    return given, moved


def put_links(work: Work, known: pa.Table, given: pa.Table, ids: pa.Array | None) -> None:
    """Publish the links, after the events: a run that was killed in between makes all of them anew
    (`every_link`).

    Args:
        ids: the anonymous ids whose links may be others; None: all.
    """
    if ids is None:
        replace_links(work, given)
        return
    context, lake = work.context, work.context.lake
    left, come = links.same(_of(known, ids), _of(given, ids))
    keys = [
        {(row["anonymous_id"], row["since_ts"]) for row in rows.to_pylist()}
        for rows in (left, come)
    ]
    retired = [key not in keys[1] for key in zip(*(left[n].to_pylist() for n in IDENTITIES.key))]
    left = left.filter(pa.array(retired, pa.bool_()))
    base, app_id = _version(work, IDENTITIES), lake.app_id(IDENTITIES, EVENTS)
    if not left.num_rows + come.num_rows:
        lake.commit(IDENTITIES, [], base, app_id, work.upto, context.run_id)
        return
    parts = [
        rows.append_column("change", pa.repeat(pa.scalar(change), rows.num_rows))
        for rows, change in ((come, CHANGED), (left, RETIRED))
    ]
    filesystem.write_parquet(
        work.candidate.path("identities") + "/part-0.parquet", pa.concat_tables(parts)
    )
    work.candidate.adopt("identities", f"{IDENTITIES.ddl}, change string")
    context.upsert(IDENTITIES, work.candidate, "identities", base, app_id, work.upto)


def candidate_of(given: pa.Table, gone: pa.Table, came: pa.Table, moved: pa.Table) -> pa.Table:
    """The rows of `silver.events` that change, with `change`, and when the stored row was."""
    again = pc.index_in(came["event_id"], gone["event_id"].combine_chunks())
    was = gone["event_ts"].take(again)
    change = pc.if_else(pc.is_valid(was), CHANGED, NEW)
    left = gone.filter(pc.invert(pc.is_in(gone["event_id"], came["event_id"].combine_chunks())))
    nobody = links.LINKS.empty_table()
    parts = (
        (person_files.placed(came, given), change, was),
        (moved, pa.repeat(pa.scalar(CHANGED), moved.num_rows), moved["event_ts"]),
        (
            person_files.placed(left, nobody),
            pa.repeat(pa.scalar(RETIRED), left.num_rows),
            left["event_ts"],
        ),
    )
    rows = pa.concat_tables(
        part.append_column("change", kind).append_column("stored_ts", at)
        for part, kind, at in parts
    )
    return rows.sort_by("event_ts").combine_chunks()


def publish_events(work: Work, given: pa.Table, rows: pa.Table) -> None:
    """Audit the rows that change, and put them into `silver.events`."""
    context, lake = work.context, work.context.lake
    app_id = lake.app_id(PERSON_EVENTS, EVENTS)
    if not rows.num_rows:
        lake.commit(PERSON_EVENTS, [], work.base, app_id, work.upto, context.run_id)
        return
    place = work.candidate.path("events") + "/part-0.parquet"
    filesystem.write_parquet(place, rows)
    work.candidate.adopt("events", CANDIDATE_DDL)
    count = {one: int(pc.sum(pc.equal(rows["change"], one)).as_py() or 0) for one in (NEW, RETIRED)}
    stored = sum(one.rows for one in lake.files_of(PERSON_EVENTS, work.base))
    wanted = sum(one.rows for one in lake.files_of(EVENTS, work.upto))
    path = work.put("all-links", given)
    kept = rows.num_rows - count[RETIRED]
    after = stored + count[NEW] - count[RETIRED]
    identity_audit.of_events(context, [place], path, kept, (after, wanted))
    crash_points.point("identify.audited")
    if count[NEW] == rows.num_rows:
        folder = staging(context.run_id)
        ours = rows.select(person_files.SCHEMA.names)
        filesystem.write_parquet(f"{lake.path(PERSON_EVENTS)}/{folder}/part-0.parquet", ours)
        staged = lake.entries(PERSON_EVENTS, folder)
        lake.commit(PERSON_EVENTS, staged, work.base, app_id, work.upto, context.run_id)
    else:
        context.upsert(
            PERSON_EVENTS,
            work.candidate,
            "events",
            work.base,
            app_id,
            work.upto,
            stored="stored_ts",
        )
    crash_points.point("identify.events-published")
