"""`gold.sequences` and a registered model -> `gold.recommendations`: a list for every user.

compute   the version that the alias names (or the one that is asked for), loaded once, scores all
          users of the newest `gold.sequences`, by the rules of `[serving]`; its lists are staged as
          data files (users who may be given nothing, because they have seen every item or by the
          rules, get none, and are counted)
audit     the suite of `expectations/recommendations.py`
publish   one commit: the new lists, and those of other versions that have an alias still; lists of
          versions that nobody names any more go

A plain process: PyTorch needs no JVM. Scored again from the same versions, by rules that allow the
same, nothing is written.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs.audit import arrow_columns, suite
from jobs.core import crash_points
from jobs.core.arrow_types import arrow_schema
from jobs.core.errors import SettingsError, counted
from jobs.core.plan import Plan, Publish, ScoreFacts, earlier, idle, score_plan
from jobs.core.tables import ITEMS, RECOMMENDATIONS, SEQUENCES
from jobs.lake import filesystem, foreign, foreign_columns
from jobs.lake.context import Candidate, Context, Result
from jobs.lake.data_files import staging
from jobs.lake.filesystem import rows_of, rust_uri
from jobs.lake.manifest import Manifest, Staged
from jobs.lake.tasks import run
from jobs.recommend import checks, rule_checks
from jobs.recommend.rules import Resolved, possible, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltalake import DeltaTable

    from models.core.rows import Ints, Rows
    from models.networks.saved_model import Stored
    from models.registry.register import Registered

OPTIONS = ("alias", "model_version", "k")
USERS_A_FILE = 131_072  # ours
MOST = "most.parquet"


@dataclass
class ScoreManifest(Manifest):
    """What the steps of `score` tell each other."""

    base: int
    """The version of `gold.recommendations` that the candidate was computed from."""
    upto: int
    """The version of `gold.sequences` that was scored."""
    version: str
    """The model's, in the registry."""
    uri: str
    size: int
    """Items of a list, at most."""
    method: str
    excludes: bool
    """Whether it differs by user how many items a list may have: the model leaves out what the user
    has seen, or there are rules."""
    empty: bool = False
    """Whether there is nothing to publish."""
    users: int = 0
    nothing: int = 0
    """Users who may be given nothing, and get no list."""
    rules: str | None = None
    """The digest of the rules; None: there are none."""
    removed: dict[str, int] = field(default_factory=dict)
    """By key of `[serving]`: how many items of the model's vocabulary it excludes."""
    short: int = 0
    """Users who may be given fewer items than were asked for."""
    notes: list[str] = field(default_factory=list)
    kept: int = 0
    """Lists of other versions that stay."""
    scoring_s: float = 0.0
    made: list[str] = field(default_factory=list)
    """The files of the lists."""
    staged: Staged = field(default_factory=list)

    @staticmethod
    def plan_of_old(old: dict[str, Any]) -> Plan:
        return idle("score") if old["empty"] else earlier("score", Publish.REPLACE)


def compute(
    context: Context, alias: str | None = None, model_version: int | None = None, k: int = 100
) -> Candidate:
    """Score all users.

    Raises:
        SettingsError: no such model, or one that cannot score these sequences.
    """
    lake, name = context.lake, context.source.name
    if k < 1:
        raise SettingsError(f"--k {k}: use 1 or more: a list has at least one item")
    upto = lake.version(SEQUENCES)
    if upto is None or not lake.rows(SEQUENCES):
        raise SettingsError(
            f"{lake.path(SEQUENCES)} has no rows: run python -m jobs run --source {name} first"
        )
    foreign.make_ready(context, SEQUENCES, ITEMS, RECOMMENDATIONS)
    foreign.refuse_changed_input(context, SEQUENCES, ITEMS)
    lake.create(RECOMMENDATIONS, upgrade=False)
    base = lake.version(RECOMMENDATIONS)
    assert base is not None
    model, stored = loaded(name, alias, model_version)
    candidate = context.candidate(RECOMMENDATIONS)
    ruled = resolve(context, stored.item_ids, upto)
    size, each = min(k, len(stored.item_ids)), excludes(stored) or ruled is not None
    changed = foreign.changed(lake, RECOMMENDATIONS)
    manifest = ScoreManifest(
        plan=score_plan(ScoreFacts(there=False)), base=base, upto=upto, version=model.version,
        uri=model.uri, size=size, method=stored.facts["method"], excludes=each,
    )  # fmt: skip
    if ruled is not None:
        manifest.rules, manifest.removed = ruled.digest, ruled.removed
        manifest.notes = ruled.notes
    if changed is None and lake.consumed(RECOMMENDATIONS, SEQUENCES) == upto:
        longest = _longest(context, base, manifest)
        most = _possible(context, stored, upto, size, ruled) if each else size
        manifest.empty = longest == most
        manifest.plan = score_plan(ScoreFacts(manifest.empty))
    context.decide(manifest.plan)
    if not manifest.empty:
        lake.create(RECOMMENDATIONS)
        manifest.base = lake.version(RECOMMENDATIONS) or 0
        fill(context, candidate, stored, model, manifest, ruled)
    candidate.save(manifest)
    crash_points.point("score.computed")
    return candidate


def loaded(source: str, alias: str | None, number: int | None) -> tuple[Registered, Stored]:
    """The model that is meant, from MLflow."""
    from models.core.errors import UserError
    from models.networks.saved_model import load
    from models.registry import tracking
    from models.registry.register import find

    try:
        client, _ = tracking.connect(source)
        model = find(client, source, alias, number)
        with tracking.downloaded(client, model.run_id, "trained") as folder:
            stored = load(folder)
    except UserError as error:
        raise SettingsError(str(error)) from None
    if stored.facts.get("preprocess", "gold") != "gold":
        raise SettingsError(
            f"{model.uri} was trained with --preprocess {stored.facts['preprocess']}, so it does not "
            "know all users of gold.sequences: register a model that was trained without it"
        )
    return model, stored


def excludes(stored: Stored) -> bool:
    """Whether the model leaves out what a user has seen."""
    return stored.config.model.repeat_policy == "exclude_seen"


def _longest(context: Context, base: int, manifest: ScoreManifest) -> int | None:
    """The length of the longest list that the model version has already by these rules (one tells,
    unless each user has its own); None: there are none."""
    table = context.lake.open(RECOMMENDATIONS)
    assert table is not None
    table.load_as_version(base)
    # (A table of an earlier version has lists without rules, and no such column yet.)
    ruled = [field.name for field in table.schema().fields if field.name == "rules"]
    lists = _lists_of(table, manifest.version, ["items", *ruled])
    parts = [*itertools.islice(lists, None if manifest.excludes else 1)]
    if any(
        (one["rules"][0].as_py() if ruled else None) != manifest.rules
        for one in parts
        if one.num_rows
    ):
        return None
    return max((pc.max(pc.list_value_length(one["items"])).as_py() for one in parts), default=None)


def _lists_of(
    table: DeltaTable, version: str, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of a model version."""
    own = ds.field("model_version") == version
    return filesystem.matching(rows_of(table), own, ["model_version"], columns)


def _possible(
    context: Context, stored: Stored, upto: int, size: int, ruled: Resolved | None
) -> int:
    """The longest list where it differs by user what may be given."""
    _, rows = _asked(context, stored, upto)
    return min(size, int(_most(stored, rows, ruled).max()))


def _most(stored: Stored, rows: Rows, ruled: Resolved | None) -> Ints:
    """int64[U]: how many items each user may be given."""
    return possible(stored, rows, None if ruled is None else ruled.rules, excludes(stored))


def _asked(context: Context, stored: Stored, upto: int) -> tuple[list[str], Rows]:
    """The users of a version of gold.sequences, and what the model knows of their events."""
    from models.data.sequences import cache_folder, open_sequences, read_items
    from models.data.splits import Events, known_rows, vocabulary_of

    lake, source = context.lake, context.source.name
    make = f"python -m jobs run --source {source}"
    sequences = open_sequences(
        rust_uri(lake.path(SEQUENCES)), upto, cache_folder(lake.root, source), make
    )
    known = read_items(rust_uri(lake.path(ITEMS)), make)
    rows, _, _ = known_rows(Events.of(sequences), vocabulary_of(stored.item_ids, *known))
    return sequences.user_id, rows


def most_of_users(context: Context, stored: Stored, upto: int, ruled: Resolved | None) -> pa.Table:
    """`user_id` of a version of gold.sequences, and how many items each may be given: `most`."""
    names, rows = _asked(context, stored, upto)
    return _most_table(names, _most(stored, rows, ruled))


def _most_table(names: list[str], most: Ints) -> pa.Table:
    return pa.table({"user_id": pa.array(names, pa.string()), "most": pa.array(most)})


def as_long_as_can_be(users: Any, size: Ints, given: pa.Table, asked: int) -> bool:
    """Whether each user's list has as many items as were asked for, or all that may be returned.

    Args:
        users, size: of the lists: whose they are, and how many items they have.
        given: as `most_of_users` makes it.
    """
    place = pc.index_in(users, given["user_id"].combine_chunks())
    if place.null_count:
        return False  # nobody of that name was to have a list
    most = given["most"].to_numpy()[place.to_numpy(zero_copy_only=False)]
    return bool((size == np.minimum(most, asked)).all())


def fill(
    context: Context, candidate: Candidate, stored: Stored, model: Registered,
    manifest: ScoreManifest, ruled: Resolved | None,
) -> None:  # fmt: skip
    """Stage the lists of all users, and those that stay."""
    from models.serving.all_users import lists

    lake = context.lake
    names, rows = _asked(context, stored, manifest.upto)
    began = time.monotonic()
    folder, users = staging(context.run_id), pa.array(names, pa.string())
    # Who has seen the whole catalogue, or all that the rules allow, can be given nothing. Any other
    # empty list is a fault of the model's, and stays for the suite to refuse.
    nothing = np.zeros(len(names), dtype=bool)
    if manifest.excludes:
        most = _most(stored, rows, ruled)
        nothing, manifest.short = most == 0, int((most < manifest.size).sum())
        filesystem.write_parquet(candidate.path(MOST), _most_table(names, most))
    rules = None if ruled is None else ruled.rules

    def parts() -> Iterator[pa.Table]:
        for at, table in lists(stored, rows, manifest.size, rules):
            given = ~(nothing[at] & (pc.list_value_length(table["items"]).to_numpy() == 0))
            some = table["items"].filter(pa.array(given))
            yield _rows(context, users.take(pa.array(at[given])), some, model, manifest.rules)

    made = _write(context, folder, "lists", parts())
    seconds = time.monotonic() - began
    for version in sorted(model.aliased - {model.version}):
        table = lake.open(RECOMMENDATIONS)
        assert table is not None
        table.load_as_version(manifest.base)
        schema = arrow_schema(RECOMMENDATIONS.columns)
        kept = [rows.cast(schema) for rows in _lists_of(table, version, schema.names)]
        if kept:
            old = pa.concat_tables(kept).sort_by("user_id")
            made += _write(context, folder, f"kept-{version}", iter([old]))
            manifest.kept += old.num_rows
    manifest.users, manifest.nothing = len(users), int(nothing.sum())
    manifest.scoring_s, manifest.made = round(seconds, 3), made
    manifest.staged = lake.entries(RECOMMENDATIONS, folder, made)


def _rows(
    context: Context, users: pa.Array, items: Any, model: Registered, rules: str | None
) -> pa.Table:
    count = len(users)
    columns = [
        users,
        pa.repeat(model.name, count),
        pa.repeat(model.version, count),
        pa.repeat(pa.scalar(context.started, pa.timestamp("us", "UTC")), count),
        items.combine_chunks(),
        pa.repeat(pa.scalar(rules, pa.string()), count),
    ]
    schema = arrow_schema(RECOMMENDATIONS.columns)
    return pa.table(columns, names=schema.names).cast(schema)


def _write(context: Context, folder: str, name: str, parts: Iterator[pa.Table]) -> list[str]:
    """Rows as files of at most so many users; their paths."""
    place = f"{context.lake.path(RECOMMENDATIONS)}/{folder}"
    made: list[str] = []
    waiting: list[pa.Table] = []

    def put() -> None:
        made.append(f"{place}/{name}-{len(made):05d}.parquet")
        filesystem.write_parquet(made[-1], pa.concat_tables(waiting))
        waiting.clear()

    for part in parts:
        waiting.append(part)
        if sum(one.num_rows for one in waiting) >= USERS_A_FILE:
            put()
    if waiting:
        put()
    return made


def audit(context: Context, candidate: Candidate) -> None:
    """Raises: AuditFailed, AuditErrored."""
    manifest = candidate.manifest(ScoreManifest)
    context.decide(manifest.plan)
    if manifest.empty:
        return
    lake = context.lake
    held = run(None, checks.recommendations_hold, manifest.made, checks.LISTS_DDL, "string")
    new = [one for one in held if one["version"] == manifest.version]
    known = lake.table_of(ITEMS, int(lake.version(ITEMS) or 0), ["item_id"])["item_id"]
    facts = {
        "items_are_known": all(
            pc.all(
                pc.is_in(pa.array(one["items"], pa.string()), known.combine_chunks()), min_count=0
            ).as_py()
            for one in new
        ),
        "lists_are_whole": _whole(candidate, manifest, new),
        "users_balance": sum(one["rows"] for one in new) + manifest.nothing
        == lake.table_of(SEQUENCES, manifest.upto, ["user_id"]).num_rows,
    } | _ruled(context, manifest)
    versions = {one["version"] for one in held}
    apart = all(arrow_columns.apart([h for h in held if h["version"] == v]) for v in versions)
    if apart and all(one["holds"] for one in held):
        number = sum(one["rows"] for one in held)
        suite.audit_certified(context, RECOMMENDATIONS, number, facts)
    else:
        engine = context.thresholds.whole_tables()
        context.enter(engine)
        staged = lake.staged(RECOMMENDATIONS, manifest.staged)
        suite.audit_candidate(context, RECOMMENDATIONS, staged, facts, engine)
    crash_points.point("score.audited")


def _ruled(context: Context, manifest: ScoreManifest) -> dict[str, bool]:
    """Whether the new lists keep each rule."""
    if manifest.rules is None:
        return rule_checks.none()
    parts = [rows for path in manifest.made if (rows := _new_rows(path, manifest)).num_rows]
    if not parts:
        return rule_checks.none()
    rows = pa.concat_tables(parts).combine_chunks()
    items = rows["items"].combine_chunks()
    ids = pa.ListArray.from_arrays(items.offsets, items.values.field("item_id"))
    return rule_checks.rules_held(context, manifest.upto, rows["user_id"].combine_chunks(), ids)


def _new_rows(path: str, manifest: ScoreManifest) -> pa.Table:
    """The rows of a staged file that are of the model version that was asked for."""
    rows = filesystem.read_parquet(path, ["user_id", "model_version", "items"])
    return rows.filter(pc.equal(rows["model_version"], manifest.version))


def _whole(candidate: Candidate, manifest: ScoreManifest, new: list[dict[str, Any]]) -> bool:
    """Whether the new lists have as many items as were asked for, or all that may be returned."""
    size = manifest.size
    if not manifest.excludes:
        return all(one["least"] == one["most"] == size for one in new)
    given = filesystem.read_parquet(candidate.path(MOST))
    for path in manifest.made:
        rows = _new_rows(path, manifest)
        length = pc.fill_null(pc.list_value_length(rows["items"]), 0).to_numpy()
        if not as_long_as_can_be(rows["user_id"], length, given, size):
            return False
    return True


def publish(context: Context, candidate: Candidate) -> Result:
    """Raises: Conflict: another run changed `gold.recommendations` since."""
    lake, manifest = context.lake, candidate.manifest(ScoreManifest)
    context.decide(manifest.plan)
    result = Result(files=[manifest.uri], tables_in={SEQUENCES.full_name: manifest.upto})
    said = f"{manifest.uri} ({manifest.method}), gold.sequences version {manifest.upto}"
    if manifest.empty:
        result.notes.append(f"{said}: these lists are there already")
    else:
        foreign_columns.replace_rows(
            context, RECOMMENDATIONS, manifest.staged, manifest.base,
            lake.app_id(RECOMMENDATIONS, SEQUENCES), manifest.upto,
        )  # fmt: skip
        crash_points.point("score.published")
        result.notes.append(f"{said}: {in_words(manifest)}")
    result.notes += manifest.notes
    result.tables[RECOMMENDATIONS.full_name] = lake.told(RECOMMENDATIONS)
    if manifest.rules is not None and not manifest.empty:
        result.tables[RECOMMENDATIONS.full_name]["rules"] = manifest.removed | {
            "short_users": manifest.short,
            "users_without_list": manifest.nothing,
        }
    return result


def in_words(manifest: ScoreManifest) -> str:
    """How many lists were made, how long, how fast."""
    rate = manifest.users / max(manifest.scoring_s, 1e-3)
    most = "at most " if manifest.excludes else ""
    said = f"{counted(manifest.users, 'user')}, {most}{manifest.size} items each, {rate:,.0f} users a second"
    if manifest.kept:
        said += f", {counted(manifest.kept, 'list')} of other versions left as before"
    if manifest.rules is not None:
        gone = ", ".join(f"{key} {count:,}" for key, count in manifest.removed.items()) or "none"
        said += (
            f"; items of the model that a rule excludes for everybody: {gone}; "
            f"{manifest.short:,} users may be given fewer than {manifest.size} items, "
            f"{manifest.nothing:,} of them nothing: they get no list"
        )
    elif manifest.nothing:
        said += f", {manifest.nothing:,} users have seen every item and get no list"
    return said
