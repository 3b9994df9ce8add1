"""What published lists were worth: the events of a night against the lists that were there before.

A night is a UTC day. A question is a user with the distinct items of the user's positive events of
the night; the lists that it is asked of are those that were published before an event happened, so a
night in which lists were published has questions before and after. Of each model version that had
lists, `ops.lists` gets one row: hit rate and NDCG@10 as an evaluation counts them, beside those of
`recent_pop` and `personal_top`, made from the version of `gold.sequences` that the lists were made
from. Decisions:
 * A user without an event in that version is new. New users have no list, and none of a baseline
   either: they count as misses for all three, so the three differ by the lists alone.
 * A known user without a list (who has seen everything, or whom the rules leave nothing) is a miss.
 * Where lists were made by rules, baselines follow the rules of today.
 * Events before the first publication are left out, and counted.
 * A log that is replayed has no event that is newer than a publication. Where no lists were published
   before the end of the night, those are taken, the newest first, whose version of `gold.sequences`
   has no event of the night or later, and the row says `clock` = log.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from expectations import lists as suite
from expectations.lists import JUDGED, LIST_METRICS
from jobs.audit import great_expectations
from jobs.core import webhook
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import AuditFailed, SettingsError
from jobs.core.tables import ITEMS, LISTS, RECOMMENDATIONS, SEQUENCES
from jobs.lake.context import Context, Result
from jobs.lake.delta import QUIET
from jobs.lake.filesystem import rows_of, rust_uri
from jobs.recommend.counted import Counted, K
from jobs.recommend.rules import DAY_US, newest_event, resolve

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from models.core.rows import Bools, Ints
    from models.data.sequences import Sequences

EPOCH = date(1970, 1, 1)
ENDS = ("", "_low", "_high")
UNREADABLE = (DeltaError, OSError, pa.ArrowException)
"""What reading a version raises whose files are gone."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Publication:
    """A version of `gold.recommendations`: when it was committed (us), and the version of
    `gold.sequences` that its newest lists were made from."""

    version: int
    at_us: int
    sequences: int


@dataclass(frozen=True)
class Events:
    """The positive events of a night: int64[N] each, user (a place in `users`), item (gold's
    item_index), ts (us)."""

    users: list[str]
    user: Ints
    item: Ints
    ts: Ints

    def inside(self, low: int, high: int) -> Events:
        at = (self.ts >= low) & (self.ts < high)
        return Events(self.users, self.user[at], self.item[at], self.ts[at])


@dataclass(frozen=True)
class Answers:
    """Values of Q questions: user int64[Q], known bool[Q], targets int64[Q], values float64[Q, M] in
    the order of `JUDGED` x `LIST_METRICS`."""

    user: Ints
    known: Bools
    targets: Ints
    values: NDArray[np.float64]


def judge(context: Context) -> Result:
    """Compare the lists with the events of the run's day (default: the day of the newest event).

    Raises:
        SettingsError: there are no sequences yet.
        AuditFailed: what was counted cannot be.
    """
    lake, source = context.lake, context.source
    version = lake.version(SEQUENCES)
    if version is None or not lake.rows(SEQUENCES):
        raise SettingsError(
            f"{lake.path(SEQUENCES)} has no rows: run python -m jobs run --source {source.name} first"
        )
    result = Result(tables_in={SEQUENCES.full_name: version})
    day = context.day or EPOCH + timedelta(days=newest_event(context, version) // DAY_US)
    low = (day - EPOCH).days * DAY_US
    every = published(context)
    spans, clock = publications(context, every, low)
    if not spans:
        result.notes.append(f"the night of {day}: skipped, no lists were made before it")
        return result
    events = night(opened(context, version), low)
    if not len(events.ts):
        result.notes.append(f"the night of {day}: skipped, it has no positive event")
        return result
    rows, notes = judged(context, day, events, every, spans, clock)
    result.notes += notes
    if not rows:
        result.notes.append(f"the night of {day}: skipped, none of its events has lists to judge")
        return result
    changed = store(context, rows)
    result.tables[LISTS.full_name] = lake.told(LISTS)
    result.notes += [in_words(row) for row in rows]
    if changed:
        _alarm(context, day, result)
    else:
        result.notes.append("these rows are in ops.lists already")
    return result


def opened(context: Context, version: int) -> Sequences:
    """A version of `gold.sequences`, as the arrays that scoring and training keep of it.

    Raises:
        SettingsError: it cannot be read any more.
    """
    from models.core.errors import UserError
    from models.data.sequences import cache_folder, open_sequences

    lake, source = context.lake, context.source.name
    make = f"python -m jobs run --source {source}"
    try:
        return open_sequences(
            rust_uri(lake.path(SEQUENCES)), version, cache_folder(lake.root, source), make
        )
    except UserError as error:
        raise SettingsError(str(error)) from None


def night(sequences: Sequences, low: int) -> Events:
    """The positive events of the day that begins at `low` us."""
    from models.core.rows import POSITIVE, ragged

    ts = sequences.ts
    at = (ts >= low) & (ts < low + DAY_US) & (sequences.feedback == POSITIVE)
    index, user = ragged(sequences.start, sequences.length)
    mine = at[index]
    index, user = index[mine], user[mine]
    return Events(sequences.user_id, user, sequences.item[index].astype(np.int64), ts[index])


# -- which lists ----------------------------------------------------------------------------------


def published(context: Context) -> list[Publication]:
    """All versions of `gold.recommendations` that moved rows, oldest first."""
    table = context.lake.open(RECOMMENDATIONS)
    if table is None:
        return []
    of, found = context.lake.app_id(RECOMMENDATIONS, SEQUENCES), []
    for commit in table.history():
        if commit.get("operation") in QUIET:
            continue
        table.load_as_version(commit["version"])
        upto = table.transaction_version(of)
        if upto is not None:
            found.append(Publication(commit["version"], 1000 * commit["timestamp"], upto))
    return found[::-1]


Spans = list[tuple[Publication, int, int]]
"""Lists, and the times from and before which events are compared with them."""


def publications(context: Context, every: list[Publication], low: int) -> tuple[Spans, str]:
    """The lists that are judged by the night that begins at `low`, and by which clock they were
    chosen."""
    high = low + DAY_US
    early = [one for one in every if one.at_us < high]
    if early:
        ends = [one.at_us for one in early[1:]] + [high]
        spans = [(one, max(low, one.at_us), end) for one, end in zip(early, ends, strict=True)]
        return [span for span in spans if span[1] < span[2]], "published"
    newest: dict[int, int] = {}
    for one in reversed(every):
        if one.sequences not in newest:
            newest[one.sequences] = _newest(context, one.sequences)
        if newest[one.sequences] < low:
            return [(one, low, high)], "log"
    return [], "log"


def _newest(context: Context, version: int) -> int:
    """The time of a version's newest event; the end of time where it cannot be read any more."""
    try:
        return newest_event(context, version)
    except UNREADABLE as error:
        print(f"gold.sequences version {version} cannot be read any more: {error}", flush=True)
        return int(np.iinfo(np.int64).max)


# -- what they were worth -------------------------------------------------------------------------


def judged(
    context: Context, day: date, events: Events, every: list[Publication], spans: Spans,
    clock: str,
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """A row for each model version that had lists, and what to say of the rest."""
    answers: dict[str, list[Answers]] = {}
    facts: dict[str, Row] = {}
    notes: list[str] = []
    for publication, low, high in spans:
        asked = events.inside(low, high)
        if not len(asked.ts):
            continue
        try:
            lists = _lists_at(context, publication.version)
        except UNREADABLE:
            notes.append(
                f"gold.recommendations version {publication.version} cannot be read any more"
            )
            continue
        for name in sorted(pc.unique(lists["model_version"]).to_pylist()):
            mine = lists.filter(pc.equal(lists["model_version"], name)).combine_chunks()
            made = mine["created_ts"][0].as_py()
            since = next((one for one in every if one.at_us + 1000 > _us(made)), None)
            if since is None:
                continue
            try:
                answers.setdefault(name, []).append(_answers(context, asked, mine, since.sequences))
            except SettingsError as error:
                notes.append(f"lists of model version {name}: skipped: {error}")
                continue
            facts[name] = {
                "source": context.source.name, "night": day, "model_version": name,
                "model_name": mine["model_name"][0].as_py(), "clock": clock,
                "published_ts": _time(publication.at_us), "created_ts": made,
                "sequences_version": since.sequences,
            }  # fmt: skip
    missed = int((events.ts < min(low for _, low, _ in spans)).sum())
    if missed:
        notes.append(f"{missed:,} positive events of {day} were before the first lists: left out")
    rows = [facts[name] | {"events_left_out": missed} | _counted(answers[name]) for name in facts]
    return rows, notes


def _lists_at(context: Context, version: int) -> pa.Table:
    """`gold.recommendations` as it was; a column that it did not have is null."""
    path = rust_uri(context.lake.path(RECOMMENDATIONS))
    rows = rows_of(DeltaTable(path, version=version)).to_table()
    for field in arrow_schema(RECOMMENDATIONS.columns):
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows


def _us(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _time(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


def _answers(context: Context, asked: Events, lists: pa.Table, upto: int) -> Answers:
    """Questions of one model version's lists.

    Raises:
        SettingsError: the version of `gold.sequences` that they were made from is gone, so there are
            no baselines; or a rule cannot be evaluated.
    """
    from models.evaluation.metrics import per_target

    past = opened(context, upto)
    lake = context.lake
    items = lake.table_of(ITEMS, int(lake.version(ITEMS) or 0), ["item_id", "item_index"])
    items = items.combine_chunks()
    width = int(pc.max(items["item_index"]).as_py()) + 1
    pairs = np.unique(asked.user * width + asked.item)
    owner, target = pairs // width, pairs % width
    users, start = np.unique(owner, return_index=True)
    question, ends = np.searchsorted(users, owner), np.append(start, len(owner))
    names = pa.array([asked.users[one] for one in users], pa.string())
    at = pc.index_in(names, pa.array(past.user_id, pa.string())).to_numpy(zero_copy_only=False)
    known = ~np.isnan(at.astype(np.float64))
    place = np.where(known, at, -1).astype(np.int64)
    ruled = None
    if lists["rules"][0].as_py() is not None:
        by_index = items.sort_by("item_index").filter(
            pc.field("item_index") <= int(past.item.max())
        )
        ruled = resolve(context, by_index["item_id"].to_pylist(), upto)
    counted = Counted.of(past, None if ruled is None else ruled.rules)
    tens = {
        "served": _served(lists, names, known, items),
        "recent_pop": counted.recent_pop(place),
        "personal_top": counted.personal_top(place),
    }
    values = []
    for name in JUDGED:
        hit = tens[name][question] == target[:, None]
        where = np.where(hit.any(1), hit.argmax(1) + 1, np.iinfo(np.int64).max)
        found = per_target(where, ends, (K,))
        values += [found[f"{metric}@{K}"] for metric in ("hr", "ndcg")]
    return Answers(users, known, np.diff(ends), np.stack(values, axis=1))


def _served(lists: pa.Table, names: pa.Array, known: Bools, items: pa.Table) -> Ints:
    """int64[Q, 10]: gold's item_index of the first ten of each user's list, 0 where there is none."""
    tens = np.zeros((len(names), K), dtype=np.int64)
    row = pc.index_in(names, lists["user_id"].combine_chunks())
    there = np.flatnonzero(row.is_valid().to_numpy(zero_copy_only=False) & known)
    column = lists["items"].combine_chunks().take(row.take(pa.array(there)))
    length = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    of = np.repeat(np.arange(len(there)), length)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(length) - length, length)
    first = nth < K
    ids = column.flatten().field("item_id").filter(pa.array(first))
    index = (
        items["item_index"]
        .combine_chunks()
        .take(pc.index_in(ids, items["item_id"].combine_chunks()))
    )
    tens[there[of[first]], nth[first]] = pc.fill_null(index, 0).to_numpy()
    return tens


def _counted(parts: list[Answers]) -> Row:
    """The counts and means of a row: each user's mean first, then over users, with intervals."""
    from models.evaluation.metrics import per_user

    user = np.concatenate([one.user for one in parts])
    values = np.concatenate([one.values for one in parts])
    known = np.concatenate([one.known for one in parts])
    users, means = per_user({str(at): values[:, at] for at in range(values.shape[1])}, user)
    of_all = np.stack([means[str(at)] for at in range(values.shape[1])], axis=1)
    is_known = np.isin(users, user[known])
    row: Row = {
        "users": len(users),
        "new_users": int((~is_known).sum()),
        "targets": int(sum(one.targets.sum() for one in parts)),
    }
    row |= _means(of_all, "")
    row |= _means(of_all[is_known], "known_", row if is_known.all() else None)
    return row


def _means(values: NDArray[np.float64], prefix: str, same: Row | None = None) -> Row:
    """Means of some users with their intervals, null of nobody. Args: same: a row that has them
    already, without the prefix."""
    from models.evaluation.metrics import bootstrap

    names = [f"{one}_{metric}" for one in JUDGED for metric in LIST_METRICS]
    if same is not None:
        return {f"{prefix}{name}{end}": same[f"{name}{end}"] for name in names for end in ENDS}
    if not len(values):
        return {f"{prefix}{name}{end}": None for name in names for end in ENDS}
    three = (values.mean(axis=0), *bootstrap(values))
    return {
        f"{prefix}{name}{end}": float(of[at])
        for end, of in zip(ENDS, three, strict=True)
        for at, name in enumerate(names)
    }


# -- the table ------------------------------------------------------------------------------------


def store(context: Context, rows: list[Row]) -> int:
    """Put rows that are new, or not as they were, into `ops.lists`, audited; how many.

    Raises:
        AuditFailed: a row breaks the suite; none is put.
    """
    lake = context.lake
    lake.create(LISTS)
    there = {tuple(one[name] for name in LISTS.key): one for one in lake.small(LISTS).to_pylist()}
    changed = [
        row for row in rows if not _alike(row, there.get(tuple(row[name] for name in LISTS.key)))
    ]
    if not changed:
        return 0
    made = [row | {"made_ts": context.started} for row in changed]
    audit(context, pa.Table.from_pylist(made, arrow_schema(LISTS.columns)))
    lake.put_small(LISTS, [tuple(row[name] for name in LISTS.columns) for row in made])
    return len(made)


def _alike(row: Row, stored: Row | None) -> bool:
    """Whether a stored row says the same; sums may round otherwise on another machine."""
    if stored is None:
        return False
    return all(
        math.isclose(value, stored[name], rel_tol=1e-9, abs_tol=1e-12)
        if isinstance(value, float) and isinstance(stored[name], float)
        else value == stored[name]
        for name, value in row.items()
    )


def audit(context: Context, rows: pa.Table) -> None:
    """The suite of `expectations/lists.py`, its conditions asked by DataFusion.

    Raises:
        AuditFailed: a row breaks it.
    """
    from deltalake import QueryBuilder, write_deltalake

    checks = suite.checks()
    with tempfile.TemporaryDirectory(prefix="sessionmill-lists-") as folder:
        write_deltalake(folder, rows)
        asked = QueryBuilder().register("lists", DeltaTable(folder))
        counts = {"rows": rows.num_rows}
        for check in checks:
            broken = f"SELECT 1 FROM lists WHERE NOT ({check.condition})"
            if check.unique:
                key = ", ".join(check.unique)
                broken = f"SELECT {key} FROM lists GROUP BY {key} HAVING count(*) > 1"
            counts[check.name] = pa.table(asked.execute(broken).read_all()).num_rows
    verdict = great_expectations.judge(context, LISTS, counts, checks, {}, {})
    if verdict.failed:
        said = "\n".join(
            f"  {great_expectations.described(checks, name)}: {count} rows"
            for name, count in verdict.failed.items()
        )
        raise AuditFailed(
            f"{LISTS.full_name}: {len(verdict.failed)} of {verdict.checks} checks failed, nothing is "
            f"written; the page is {verdict.docs}\n{said}"
        )


# -- in words, and the alarm ----------------------------------------------------------------------


def in_words(row: Row) -> str:
    said = ", ".join(
        f"{name} {row[f'{name}_ndcg_at_10']:.4f} [{row[f'{name}_ndcg_at_10_low']:.4f}, "
        f"{row[f'{name}_ndcg_at_10_high']:.4f}]"
        for name in JUDGED
    )
    by = "" if row["clock"] == "published" else ", by the log's clock"
    return (
        f"the night of {row['night']}, model version {row['model_version']}{by}: {row['users']:,} "
        f"users ({row['new_users']:,} new), {row['targets']:,} targets; NDCG@10 {said}; hit rate@10 "
        f"{row['served_hr_at_10']:.4f}"
    )


def is_below(row: Row) -> bool:
    """Whether the lists were worth less than the better baseline's interval."""
    best = max(JUDGED[1:], key=lambda name: row[f"{name}_ndcg_at_10"])
    return bool(row["served_ndcg_at_10"] < row[f"{best}_ndcg_at_10_low"])


def _alarm(context: Context, day: date, result: Result) -> None:
    """Tell of a row of nights, up to `day`, in which the newest lists were worth less than counting."""
    nights: dict[date, Row] = {}
    for row in context.lake.small(LISTS).to_pylist():
        newest = nights.get(row["night"])
        if row["night"] <= day and (newest is None or row["created_ts"] > newest["created_ts"]):
            nights[row["night"]] = row
    wanted = context.source.serving.nights
    last = [nights[one] for one in sorted(nights)[-wanted:]]
    if len(last) < wanted or not all(map(is_below, last)):
        return
    words = (
        f"{context.source.name}: in the last {wanted} nights with lists, {last[0]['night']} to "
        f"{last[-1]['night']}, the lists were worth less than counting (serving.nights = {wanted})\n"
        + "\n".join(f"  {in_words(row)}" for row in last)
        + "\nLook at what changed (python -m models report); go back with python -m models rollback, "
        "or train anew"
    )
    result.notes.append(words)
    webhook.send(
        "lists",
        words,
        source=context.source.name,
        day=day,
        nights=[str(row["night"]) for row in last],
        ndcg={name: last[-1][f"{name}_ndcg_at_10"] for name in JUDGED},
    )
