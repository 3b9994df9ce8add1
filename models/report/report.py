"""One HTML page that a manager reads: what the nights did, what the log is like, which method won, by
how much, what the gate said, what is recommended to whom, and where every number is from.

Self-contained: no network, no library in the browser; sorting is forty lines of script. Whatever a
log or a registry says is text, never markup. Pictures are SVG, each with its numbers in words.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.core.settings import settings
from jobs.core.tables import SEQUENCES
from jobs.lake import filesystem
from models.core.config import ModelConfig, TrainConfig
from models.core.errors import UserError
from models.core.knobs import knobs
from models.core.rows import run_starts
from models.data.lineage import published, runs_of
from models.data.sequences import Sequences, cache_folder, open_sequences, read_items
from models.data.splits import in_words
from models.experiments import results
from models.networks.methods import BASELINES
from models.registry import tracking
from models.report.examples import lists_beside_what_came
from models.selection.compare import BY, budget_of, not_recommended, sees_more, tuned_unequally

if TYPE_CHECKING:
    from jobs.core.source_file import Source

NIGHTS = 30
PEOPLE = 4  # ours: whose lists are shown
LAST_EVENTS = 12
LINES = 10
DAY_US = 86_400_000_000
HOUR_US = 3_600_000_000
BLUE, GREY = "#1f5f99", "#5a5a5a"


def report(source: Source, lake: str, comparison: str | None, file: Path | None) -> dict[str, Any]:
    """Write the page, and log it to the comparison's run in MLflow.

    Args:
        comparison: which; None: the newest.
        file: where; None: `<lake>/<source>/report.html`, where `jobs forget` looks.

    Raises:
        UserError: there is no comparison yet.
    """
    client, experiment = tracking.connect(source.name)
    tags = {tracking.COMPARISON: comparison} if comparison else {}
    found = tracking.runs(client, experiment, kind="compare", **tags)
    if not found:
        which = f" {comparison!r}" if comparison else ""
        there = tracking.comparisons_there(client, experiment, "compare", comparison)
        raise UserError(
            f"no comparison{which} of {source.name!r} is recorded{there}. To record it, run `python -m models compare --source "
            f"{source.name} --comparison {comparison or 'NAME'}`"
        )
    run_id = found[0].info.run_id
    outcome = _artifact(client, run_id, "compare.json")
    path, cache = SEQUENCES.path(lake, source.name), cache_folder(lake, source.name)
    make = f"python -m jobs run --source {source.name}"
    sequences = open_sequences(path, outcome["table_version"], cache, make)
    page = _page(
        source=source.name,
        outcome=outcome,
        more=sees_more(outcome),
        sentences=[*not_recommended(outcome), *tuned_unequally(outcome)],
        answers=answers(outcome),
        tuned=[(row["method"], budget_of(row)) for row in outcome["methods"] if budget_of(row)],
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        cut=in_words(outcome["cut"]),
        gate=_gate(client, experiment),
        nights=_nights(lake, source.name),
        days=_days(lake, source.name),
        log=statistics(sequences),
        shape=_shape(sequences),
        score=_score_plot(outcome),
        curves=_curves(client, outcome),
        people=_people(lake, source.name, sequences),
        examples=lists_beside_what_came(client, outcome, source, lake),
        worth=_worth(lake, source.name),
        lineage=_lineage(lake, source.name, outcome),
        kinds=[row for row in outcome["methods"] if row["by_target"]],
        ages=[row for row in outcome["methods"] if row.get("by_age")],
        settings=_settings(client, outcome),
    )
    filesystem.write_text(place := str(file or f"{lake}/{source.name}/report.html"), page)
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        copy = Path(folder) / "report.html"
        copy.write_text(page, encoding="utf-8")
        client.log_artifact(run_id, str(copy))
    return {
        "page": place,
        "comparison": outcome["comparison"],
        "mlflow_run_id": run_id,
        "url": _url(experiment, run_id),
    }


def answers(outcome: dict[str, Any]) -> list[tuple[str, str]]:
    """What is asked first of a comparison, and what it says: question, answer."""
    best = outcome["methods"][0]
    versus, name = best.get("vs_baseline"), best["method"]
    if versus is None:
        counted = tracking.method_of(name) in BASELINES
        better = (
            f"No. {name} only counts, and no trained method has a higher score."
            if counted
            else f"{name} has the highest score. No baseline was compared with it."
        )
        known = [("Is training worth it?", better)]
    else:
        base = best[BY] - versus["difference"]
        share = f" ({100 * versus['difference'] / base:+.1f} %)" if base else ""
        sure = {
            "better": "Yes: the interval excludes 0.",
            "worse": "It is significantly worse.",
            "cannot tell": "No: the interval includes 0, so the difference is not significant.",
        }[versus["verdict"]]
        least = versus.get("detectable_pct")
        if least is not None:
            sure += f" A difference below {least:.1f} % would probably not have been seen."
        known = [
            ("Is it better?", f"{name} against {versus['method']}, the best that only counts: "
             f"{best[BY]:.4f} and {base:.4f} NDCG@10."),
            ("By how much?", f"{versus['difference']:+.4f}{share}, 95 % interval "
             f"{versus['low']:+.4f} to {versus['high']:+.4f}."),
            ("Are we sure?", sure),
        ]  # fmt: skip
    added = best["num_params_added"]
    cost = f"{best['seconds']:,.0f} s to train and evaluate once, {best['num_params']:,} parameters"
    if added:
        cost += f", {added:,} more than its backbone ({best['params_added_pct']:.2f} %)"
    return [*known, ("What did it cost?", cost + ".")]


def _url(experiment: str, run_id: str) -> str | None:
    """Where a browser finds the page in MLflow; None without a server."""
    uri = settings().mlflow_page or tracking.tracking_uri()
    if not uri.startswith("http"):
        return None
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}/artifacts/report.html"


def _page(**told: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(**told)


def _artifact(client: Any, run_id: str, name: str) -> dict[str, Any]:
    with tracking.downloaded(client, run_id, name) as file:
        return dict(tracking.read_json(file))


def _settings(client: Any, outcome: dict[str, Any]) -> dict[str, Any] | None:
    """How the best of the trained methods was set, with what each setting means; None: baselines
    alone were compared."""
    trained = [
        row for row in outcome["methods"] if tracking.method_of(row["method"]) not in BASELINES
    ]
    if not trained:
        return None
    given = client.get_run(trained[0]["mlflow_run_id"]).data.params
    rows = [
        {"name": one.name, "value": given[f"{part}.{one.name}"], "means": told.help}
        for part, kind in (("model", ModelConfig), ("train", TrainConfig))
        for one, told in knobs(kind)
        if f"{part}.{one.name}" in given  # (an earlier version has fewer)
    ]
    return {"method": trained[0]["method"], "rows": rows}


def _gate(client: Any, experiment: str) -> str | None:
    """What the gate said last, in words."""
    from models.selection.gate import in_words as words_of

    decided = tracking.runs(client, experiment, kind="gate")
    return words_of(_artifact(client, decided[0].info.run_id, "gate.json")) if decided else None


# -- tables of the lake ---------------------------------------------------------------------------


def _rows(lake: str, source: str, table: Any) -> list[dict[str, Any]]:
    from deltalake import DeltaTable
    from deltalake.exceptions import TableNotFoundError

    from jobs.lake.filesystem import rows_of, rust_uri

    try:
        rows: list[dict[str, Any]] = (
            rows_of(DeltaTable(rust_uri(table.path(lake, source)))).to_table().to_pylist()
        )
    except TableNotFoundError:
        return []
    return rows


def _nights(lake: str, source: str) -> list[dict[str, Any]]:
    """What the last runs did, the newest first; the steps of one night are one row."""
    from jobs.core.tables import RUNS

    batches: dict[str, dict[str, Any]] = {}
    for row in sorted(_rows(lake, source, RUNS), key=lambda row: row["started_ts"]):
        if row["job"] not in ("run", "ingest", "sessionize", "items", "sequences"):
            continue
        told = batches.setdefault(
            row["batch"],
            {
                "day": row["day"],
                "began": row["started_ts"],
                "counts": {},
                "rejects": {},
                "seconds": 0.0,
                "outcome": "ok",
                "message": None,
            },
        )
        told["seconds"] += row["seconds"]
        for name in ("counts", "rejects"):
            for key, value in dict(row[name] or ()).items():
                told[name][key] = told[name].get(key, 0) + value
        # (A step that failed and was repeated with success is no failure of the night.)
        told["outcome"], told["message"] = row["outcome"], row["message"]
    newest = sorted(batches.values(), key=lambda one: one["began"], reverse=True)
    return newest[:NIGHTS]


def _days(lake: str, source: str) -> str | None:
    """Events of each day, as `ops.nights` has them."""
    from jobs.core.tables import NIGHTS as TABLE

    rows = sorted(_rows(lake, source, TABLE), key=lambda row: row["day"])[-90:]
    if len(rows) < 2:
        return None

    def draw(axis: Any) -> None:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        axis.bar([row["day"] for row in rows], [row["events"] for row in rows], color=BLUE)
        places = AutoDateLocator(maxticks=6)
        axis.xaxis.set_major_locator(places)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(places))
        axis.set_ylabel("events")

    return figure(draw, (5, 2.2))


def _worth(lake: str, source: str) -> str | None:
    """What the newest lists of each night were worth beside counting, as `ops.lists` has it."""
    from jobs.core.tables import LISTS

    nights: dict[Any, dict[str, Any]] = {}
    for row in sorted(_rows(lake, source, LISTS), key=lambda row: row["created_ts"]):
        nights[row["night"]] = row
    rows = [nights[one] for one in sorted(nights)][-90:]
    if len(rows) < 2:
        return None

    def draw(axis: Any) -> None:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        when = [row["night"] for row in rows]
        for name, colour, style in (
            ("served", BLUE, "-"),
            ("recent_pop", GREY, ":"),
            ("personal_top", GREY, "--"),
        ):
            of = f"{name}_ndcg_at_10"
            low, high = ([row[f"{of}_{end}"] for row in rows] for end in ("low", "high"))
            axis.fill_between(when, low, high, color=colour, alpha=0.15, lw=0)
            axis.plot(when, [row[of] for row in rows], style, color=colour, label=name)
        places = AutoDateLocator(maxticks=6)
        axis.xaxis.set_major_locator(places)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(places))
        axis.set_ylabel("NDCG@10")
        axis.legend(fontsize=7, ncols=3)

    return figure(draw, (5, 2.4))


def _lineage(lake: str, source: str, outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """From the compared version of `gold.sequences` back to the files: each step's run."""
    runs = runs_of(lake, source)
    wanted, chain = {"gold.sequences": outcome["table_version"]}, []
    for table in ("gold.sequences", "silver.sessions", "bronze.events"):
        if table not in wanted:
            continue
        # The run that published it, or the newest version before it (packing files makes some).
        found = published(runs, table, wanted[table])
        if found is None:
            break
        version, run = found
        chain.append(
            {
                "table": table,
                "version": wanted[table],
                "published": version,
                "run": run["run_id"],
                "batch": run["batch"],
                "day": run["day"],
                "files": len(run["files"] or ()),
            }
        )
        wanted |= dict(run["tables_in"] or ())
        wanted |= {k: v for k, v in dict(run["tables_out"] or ()).items() if k != table}
    return chain


def _people(lake: str, source: str, sequences: Sequences) -> list[dict[str, Any]]:
    """Some users' last session beside their list; from all over the lists that are there."""
    from jobs.core.tables import ITEMS, RECOMMENDATIONS
    from jobs.lake.filesystem import rust_uri

    rows = _rows(lake, source, RECOMMENDATIONS)
    if not rows:
        return []
    newest = max(rows, key=lambda row: row["created_ts"])
    rows = [row for row in rows if row["model_version"] == newest["model_version"]]
    rows.sort(key=lambda row: str(row["user_id"]))
    make = f"python -m jobs run --source {source}"
    index, ids = read_items(rust_uri(ITEMS.path(lake, source)), make)
    name = dict(zip(index.tolist(), ids, strict=True))
    place = {user: at for at, user in enumerate(sequences.user_id)}
    found: list[dict[str, Any]] = []
    for row in rows[:: max(1, len(rows) // PEOPLE)][:PEOPLE]:
        at = place.get(row["user_id"])
        if at is None:
            continue
        begin = int(sequences.start[at])
        end = begin + int(sequences.length[at])
        session = sequences.session[begin:end]
        last = np.flatnonzero(session == session[-1])[-LAST_EVENTS:] + begin
        found.append(
            {
                "user": row["user_id"],
                "sessions": int(session[-1]),
                "when": str(np.datetime64(int(sequences.ts[last[-1]]), "us"))[:16].replace(
                    "T", " "
                ),
                "last": [name.get(int(sequences.item[one]), "?") for one in last],
                "list": [item["item_id"] for item in row["items"][:LINES]],
                "model": f"{row['model_name']} version {row['model_version']}",
            }
        )
    return found


# -- what the log is like -------------------------------------------------------------------------


def _borders(sequences: Sequences) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[Any]]:
    """Event numbers user by user; does a session begin at each; does a user."""
    length = np.asarray(sequences.length)
    before = np.cumsum(length) - length
    order = np.arange(length.sum()) + np.repeat(np.asarray(sequences.start) - before, length)
    user = np.zeros(len(order), bool)
    user[before] = True
    session = np.asarray(sequences.session)[order]
    return order, user | run_starts(session), user


def statistics(sequences: Sequences) -> dict[str, Any]:
    """Events, users, sessions; medians and 90th percentiles of lengths, pauses, sessions a user."""
    order, begins, user = _borders(sequences)
    lengths, pauses, sessions = _parts(sequences, order, begins, user)

    def middle(values: NDArray[Any]) -> dict[str, float]:
        if not len(values):
            return {"half": 0.0, "most": 0.0}
        return {"half": float(np.median(values)), "most": float(np.quantile(values, 0.9))}

    first, last = (int(f(sequences.ts)) if len(order) else 0 for f in (np.min, np.max))
    return {
        "events": len(order),
        "users": len(sequences.user_id),
        "sessions": int(begins.sum()),
        "items": len(np.unique(sequences.item)),
        "length": middle(lengths),
        "pause_s": middle(pauses),
        "per_user": middle(sessions),
        "first": str(np.datetime64(first, "us"))[:10],
        "last": str(np.datetime64(last, "us"))[:10],
    }


def _parts(
    sequences: Sequences, order: NDArray[Any], begins: NDArray[Any], user: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Events of each session; seconds between events of one session; sessions of each user."""
    ts = np.asarray(sequences.ts)[order]
    lengths = np.diff(np.append(np.flatnonzero(begins), len(order)))
    pauses = np.diff(ts)[~begins[1:]] / 1e6
    sessions = np.add.reduceat(begins, np.flatnonzero(user)) if len(order) else lengths
    return lengths, pauses, sessions


def _shape(sequences: Sequences) -> dict[str, str] | None:
    """Pictures of the distributions, and of the hours of the week."""
    order, begins, user = _borders(sequences)
    if not len(order):
        return None
    lengths, pauses, sessions = _parts(sequences, order, begins, user)
    ts = np.asarray(sequences.ts)[order]
    hours = (ts // HOUR_US) % 24
    weekday = (ts // DAY_US + 3) % 7  # 1 January 1970 was a Thursday
    week = np.zeros((7, 24), np.int64)
    np.add.at(week, (weekday, hours), 1)

    def histogram(values: NDArray[Any], unit: str) -> str:
        top = max(1.0, float(values.max())) if len(values) else 1.0
        edges = 2.0 ** np.arange(0, np.ceil(np.log2(top)) + 2)
        count = np.histogram(np.maximum(values, 1), edges)[0]

        def draw(axis: Any) -> None:
            axis.bar(range(len(count)), count, width=0.9, color=BLUE)
            axis.yaxis.set_major_formatter("{x:,.0f}")
            step = max(1, -(-len(count) // 6))
            axis.set_xticks(
                range(0, len(count), step), [f"{edge:,.0f}" for edge in edges[:-1:step]]
            )
            axis.set_xlabel(f"{unit}\n(each bar: up to twice as many)")

        return figure(draw, (3.6, 2.3))

    def draw_week(axis: Any) -> None:
        axis.imshow(week, aspect="auto", cmap="Blues")
        axis.set_yticks(range(7), ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"])
        axis.set_xticks(range(0, 24, 3))
        axis.set_xlabel("hour, UTC")

    return {
        "lengths": histogram(lengths, "events of a session"),
        "pauses": histogram(pauses, "seconds between events of a session"),
        "sessions": histogram(sessions, "sessions of a user"),
        "week": figure(draw_week, (3.6, 2.3)),
    }


# -- methods --------------------------------------------------------------------------------------


def _score_plot(outcome: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory(prefix="sessionmill-") as folder:
        file = Path(folder) / "score.svg"
        results.plot({"comparison": outcome}, file, phone=True)
        return _inline(file.read_text(encoding="utf-8"))


def _curves(client: Any, outcome: dict[str, Any]) -> str | None:
    """Validation by epoch, of each method's best seed."""
    told = {}
    for row in outcome["methods"]:
        history = client.get_metric_history(row["mlflow_run_id"], "validation_ndcg_at_10")
        if len(history) > 1:
            points = sorted((one.step, one.value) for one in history)
            told[row["method"]] = points
    if not told:
        return None

    def draw(axis: Any) -> None:
        for number, (method, points) in enumerate(told.items()):
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            axis.plot(*zip(*points, strict=True), style, lw=1.2, label=method)
        axis.set_xlabel("epoch")
        axis.locator_params(axis="x", integer=True)
        axis.set_ylabel("NDCG@10, validation")
        axis.legend(fontsize=7, ncols=2)

    return figure(draw, (5, 3))


def figure(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """A picture as SVG that is in a page."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {
        "svg.hashsalt": "sessionmill",
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
    }
    with matplotlib.rc_context(style):
        made, axis = pyplot.subplots(figsize=size, layout="constrained")
        draw(axis)
        text = io.StringIO()
        made.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(made)
    return _inline(text.getvalue())


def _inline(svg: str) -> str:
    """An SVG file without its head; its ids made its own, since a page has many."""
    mark = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{mark}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{mark}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
