"""Does the instrument find a planted effect of 5 %, and nothing where there is nothing?

    python benchmarks/power.py [--only counted,recorded,trained] [--repeats 100] [--out FILE.md] [--json]

Every repetition is a comparison made anew: a log, trainings, values by user, and the decision that
`compare` (interval over users and seeds), `seeds` (planned looks) or the gate would make of them.
Counted: what follows an item is counted in a drawn log, with and without a bit that tells something.
Recorded: values are drawn with the variances of the logs in `results/`. Trained: gru4rec with and
without +st on a log where sessions open with other items. Where there is no effect, both sides are
trainings of one method. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scipy import stats

from models.core.rows import Floats, Ints
from models.evaluation.components import components, over_seeds
from models.evaluation.metrics import per_target
from models.evaluation.sequential import OPEN, look
from models.experiments.seeds import Plan
from models.selection.gate import judge

REPO = Path(__file__).resolve().parents[1]
EFFECT = 0.05
FIRST, MOST = 3, 8  # seeds of each method at the first and the last look: those of `models seeds`
GATE_DRAWS = 1000
Values = tuple[Floats, Floats]  # float64[U, S] of both methods, the same users


# -- a log of bits, and models that count ---------------------------------------------------------

ITEMS, USERS, TARGETS, LINES = 40, 40, 12, 60_000
TOLD = 0.37  # what makes the true effect one of 5 %


@dataclass(frozen=True)
class Log:
    """float64[ITEMS, 2, ITEMS]: what follows an item, by the bit; `habits`: how far users differ."""

    follows: Floats
    habits: float = 0.6

    @staticmethod
    def planned(told: float, seed: int = 0) -> Log:
        """`told`: the share of events that follow the bit and not the item alone."""
        dice = np.random.default_rng(seed)
        places = np.argsort(dice.random((ITEMS, 3, ITEMS)), axis=2)
        drawn = zipf(ITEMS)[places]
        return Log((1 - told) * drawn[:, :1] + told * drawn[:, 1:])

    def lines(self, number: int, dice: np.random.Generator) -> Floats:
        """float64[ITEMS, 2, ITEMS]: how often each line comes in a log of so many lines."""
        whole = self.follows / self.follows.sum()
        return dice.multinomial(number, whole.ravel()).reshape(whole.shape).astype(float)

    def asked(self, users: int, dice: np.random.Generator) -> tuple[Ints, Ints, Ints]:
        """int64[users, TARGETS]: items, bits, and what followed; each user has favourite items."""
        favourites = dice.dirichlet(np.full(ITEMS, self.habits), users)
        item = (dice.random((users, TARGETS, 1)) > favourites.cumsum(1)[:, None]).sum(2)
        item = np.minimum(item, ITEMS - 1)
        bit = dice.integers(0, 2, item.shape)
        chance = self.follows[item, bit].cumsum(-1)
        target = (dice.random((*item.shape, 1)) * chance[..., -1:] > chance).sum(-1)
        return item, bit, np.minimum(target, ITEMS - 1)


def zipf(items: int) -> Floats:
    share = 1 / np.arange(1, items + 1) ** 1.1
    return np.asarray(share / share.sum())


def trained(lines: Floats, sees_bit: bool, dice: np.random.Generator | None) -> Ints:
    """int64[ITEMS, 2, ITEMS]: the place of each item in the list of a model of these lines, from 1.
    A seed of a training is a sample of the lines, with replacement."""
    if dice is not None:
        share = lines / lines.sum()
        lines = dice.multinomial(int(lines.sum()), share.ravel()).reshape(share.shape).astype(float)
    counts = lines if sees_bit else np.repeat(lines.sum(1, keepdims=True), 2, axis=1)
    return np.argsort(np.argsort(-counts, axis=2, kind="stable"), axis=2) + 1


def ndcg(places: Ints, asked: tuple[Ints, Ints, Ints]) -> Floats:
    """float64[U]: NDCG@10 of each user."""
    place = places[asked].ravel()
    values = per_target(place, np.arange(len(place) + 1), (10,))["ndcg@10"]
    mean: Floats = values.reshape(asked[0].shape).mean(1)
    return mean


def effect_of(log: Log) -> tuple[float, float]:
    """(NDCG@10 without the bit, what the bit adds) of models of the whole distribution."""
    asked = log.asked(60_000, np.random.default_rng(99))
    plain, told = (ndcg(trained(log.follows, sees, None), asked).mean() for sees in (False, True))
    return float(plain), float(told - plain)


def counted(log: Log, sees_bit: bool, seeds: int, repeats: int, seed: int) -> Iterator[Values]:
    """Comparisons made anew: a log, questions, `seeds` trainings of each method."""
    dice = np.random.default_rng(seed)
    for _ in range(repeats):
        lines, asked = log.lines(LINES, dice), log.asked(USERS, dice)
        one, other = (
            np.stack([ndcg(trained(lines, sees, dice), asked) for _ in range(seeds)], axis=1)
            for sees in (sees_bit, False)
        )
        yield one, other


# -- values with the variances of recorded comparisons --------------------------------------------

GRIDS = {
    "clicks": "globo-*.json", "films": "ml-1m-*.json", "baskets": "completejourney.json",
}  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """What a results file says of a log: users, mean NDCG@10 of what is compared with, the variance
    of a user's difference of one training each, and that of a training's mean."""

    users: int
    base: float
    by_user: float
    by_training: float

    @staticmethod
    def of(pattern: str) -> Recorded:
        from models.experiments.results import BY, together

        written = together(sorted((REPO / "results").glob(pattern)))
        users = written["comparison"]["users"]
        rows = [row for row in written["comparison"]["methods"] if row["vs_vanilla"]]
        mean = {row["method"]: row[f"{BY}_mean"] for row in written["comparison"]["methods"]}
        width = [row["vs_vanilla"]["high"] - row["vs_vanilla"]["low"] for row in rows]
        scores: dict[str, list[float]] = {}
        for cell in written["cells"]:
            scores.setdefault(cell["method"], []).append(cell["metrics"][BY]["value"])
        spread = [np.var(many, ddof=1) for many in scores.values() if len(many) > 1]
        return Recorded(
            users=users,
            base=float(np.mean([mean[row["vs_vanilla"]["method"]] for row in rows])),
            by_user=users * float(np.mean(np.square(width))) / (2 * stats.norm.isf(0.025)) ** 2,
            by_training=float(np.mean(spread)),
        )

    def drawn(
        self, effect: float, rest: float, seeds: int, dice: np.random.Generator
    ) -> tuple[Values, tuple[Floats, Floats]]:
        """Values by user, and each training's true mean.

        rest: the share of the users' variance that another training would change. A results file does
        not say it, so both ends are shown.
        """
        own = rest * self.by_user / 2
        training = np.sqrt(max(0.0, self.by_training - own / self.users))
        user = dice.normal(0, np.sqrt((1 - rest) * self.by_user), (self.users, 1))
        true = [self.base * (1 + more) + dice.normal(0, training, seeds) for more in (effect, 0.0)]
        one, other = (
            mean + dice.normal(0, np.sqrt(own), (self.users, seeds)) if own else
            np.broadcast_to(mean, (self.users, seeds)).copy() for mean in true
        )  # fmt: skip
        return (one + user, other), (true[0], true[1])


def promoted(values: Values, true: tuple[Floats, Floats]) -> tuple[bool, bool]:
    """What the gate does, and whether the promoted model is in truth no better. The challenger is the
    best of its method's trainings by the very users that decide, which is worse than choosing on the
    validation period; the champion is a training of the other method."""
    one, other = values
    best = int(one.mean(0).argmax())
    verdict = judge(one[:, best], other[:, 0], 2 * one.shape[1], 0.0, GATE_DRAWS)
    return verdict["better"], verdict["better"] and true[0][best] <= true[1][0]


# -- models that are really trained ---------------------------------------------------------------

READERS, EVENTS, NEWS = 200, 30, 30
OPENINGS = 0.58  # the share of a session's first items that do not follow the item before
DAY = 86_400 * 1_000_000
METHOD, ENCODED = "gru4rec", "gru4rec+st"
SETTINGS = {
    "epochs": 5, "patience": 5, "batch_size": 16, "learning_rate": 2e-2, "all_windows": False,
    "request_time": "known", "validation_targets": 0,
}  # fmt: skip


def sequences(dice: np.random.Generator) -> Any:
    """A log in which an item is followed by some of its own, and a session opens with some of its own
    in `OPENINGS` of the cases. Which these are is the same in all logs."""
    from models.data.sequences import Sequences

    places = np.argsort(np.random.default_rng(0).random((NEWS + 1, NEWS)), axis=1)
    inside, opening = np.split(zipf(NEWS)[places], [NEWS])
    follows = np.stack([inside, (1 - OPENINGS) * inside + OPENINGS * opening], axis=1).cumsum(-1)
    opens = dice.random((READERS, EVENTS)) < 0.4
    opens[:, 0] = True
    item = np.zeros((READERS, EVENTS), dtype=np.int64)
    item[:, 0] = dice.integers(NEWS, size=READERS)
    for place in range(1, EVENTS):
        chance = follows[item[:, place - 1], opens[:, place].astype(int)]
        item[:, place] = np.minimum((dice.random((READERS, 1)) > chance).sum(1), NEWS - 1)
    when = np.arange(EVENTS) * 10 * DAY + np.arange(READERS)[:, None] * 1000
    none = np.zeros(READERS * EVENTS, dtype=np.int8)
    return Sequences(
        path="", version=0, table_id="", user_id=[f"u{number}" for number in range(READERS)],
        start=np.arange(READERS) * EVENTS, length=np.full(READERS, EVENTS),
        item=(item + 1).ravel().astype(np.int32), ts=when.ravel().astype(np.int64),
        session=opens.cumsum(1).ravel().astype(np.int32), feedback=none,
        exposed=np.zeros(0, np.int32), exposed_count=none.astype(np.int32),
    )  # fmt: skip


def scored(log: Any, method: str, seed: int) -> Floats:
    """float64[U]: NDCG@10 of each reader of a model, trained and evaluated as `train` does it."""
    from models.data.load import Data
    from models.data.splits import TEST, Cut, Events, Filters, periods, targets, training_rows
    from models.evaluation.evaluate import evaluate
    from models.networks.methods import config
    from models.training.fit import fit

    events = Events.of(log)
    valid, test = (int(share * EVENTS) * 10 * DAY for share in (0.55, 0.65))
    period = periods(events, cut := Cut(split="temporal", valid_from=valid, test_from=test))
    none = Filters(min_item_events=1, min_session_events=1, min_user_sessions=1)
    training = training_rows(events, period, none)
    names = [str(one) for one in training.vocabulary]
    data = Data(log, events, cut, period, training, names)
    chosen = config(method, "tiny", seed=seed, **SETTINGS)
    chosen = replace(chosen, model=replace(chosen.model, time_origin_us=0))
    fitted = fit(chosen, data, lambda _: None)
    asked = targets(events, period, TEST, training.vocabulary, "next_item")
    values: Floats = evaluate(fitted.model, asked, ks=(10,)).values["ndcg@10"]
    return values


def really_trained(repeats: int, seeds: int = 2) -> Iterator[tuple[Values, Values]]:
    """Comparisons with an effect, and without one: on one log, trainings of both methods, and other
    trainings of the plain one."""
    for number in range(repeats):
        log = sequences(np.random.default_rng(1000 + number))
        seed = 100 * number
        one, other, again = (
            np.stack([scored(log, method, seed + first + n) for n in range(seeds)], axis=1)
            for method, first in ((ENCODED, 0), (METHOD, 0), (METHOD, seeds))
        )
        yield (one, other), (again, other)


# -- what is decided, and how often ---------------------------------------------------------------


def by_compare(values: Values, seeds: int) -> bool:
    """Whether `compare` finds a difference with the first `seeds` trainings of each method."""
    _, low, high = over_seeds(values[0][:, :seeds], values[1][:, :seeds])
    return not low <= 0 <= high


PLAN = Plan(
    pairs=(), first_seed=1, first=FIRST, step=1, most=MOST, detect_pct=0.0, alpha=0.05,
    spending="obrien-fleming", trained_by={},
)  # fmt: skip


def by_seeds(values: Values, bounds: list[float]) -> bool:
    """Whether `seeds` finds one at any of its looks."""
    return any(
        look(values[0][:, :number], values[1][:, :number], bound, 0.0).verdict != OPEN
        for number, bound in zip(PLAN.looks, bounds, strict=True)
    )


def row(what: str, decided_by: str, effect: float, found: list[bool]) -> dict[str, Any]:
    """A share with its binomial interval (Clopper and Pearson, 95 %); effect: in percent."""
    test = stats.binomtest(sum(found), len(found))
    low, high = test.proportion_ci()
    return {
        "what": what, "decided_by": decided_by, "effect_pct": round(effect, 2),
        "repeats": len(found), "found": int(sum(found)), "low": float(low), "high": float(high),
    }  # fmt: skip


def run_counted(repeats: int) -> list[dict[str, Any]]:
    rows, bounds = [], PLAN.bounds
    for told, sees in ((TOLD, True), (0.0, False)):
        log = Log.planned(told)
        plain, effect = effect_of(log)
        drawn = list(counted(log, sees, MOST, repeats, seed=1 + sees))
        share = 100 * effect / plain if sees else 0.0
        rows += [
            row(
                "models that count", f"compare, {n} seeds", share, [by_compare(v, n) for v in drawn]
            )
            for n in (2, FIRST, 5)
        ]
        name = f"seeds, looks at {FIRST} to {MOST}"
        rows.append(row("models that count", name, share, [by_seeds(v, bounds) for v in drawn]))
    return rows


def run_recorded(repeats: int) -> list[dict[str, Any]]:
    rows, bounds = [], PLAN.bounds
    for name, pattern in GRIDS.items():
        log = Recorded.of(pattern)
        for effect in (2 * EFFECT, EFFECT, 0.0):
            for rest in (0.0, 1.0):
                dice = np.random.default_rng(int(100 * effect + rest))
                drawn = [log.drawn(effect, rest, MOST, dice) for _ in range(repeats)]
                part = "themselves" if not rest else "training"
                what = f"{name}; users differ by {part}"
                for n in (2, FIRST, 5, MOST):
                    found = [by_compare(values, n) for values, _ in drawn]
                    rows.append(row(what, f"compare, {n} seeds", 100 * effect, found))
                found = [by_seeds(values, bounds) for values, _ in drawn]
                rows.append(row(what, f"seeds, looks at {FIRST} to {MOST}", 100 * effect, found))
                gate = [promoted(*each) for each in drawn]
                found = [better if effect else wrong for better, wrong in gate]
                rows.append(row(what, "gate", 100 * effect, found))
    return rows


def run_trained(repeats: int, minutes: float = math.inf) -> list[dict[str, Any]]:
    """As many repetitions as end within so many minutes of the clock, two at least."""
    import torch

    torch.set_num_threads(1)
    there, none, shares, least = [], [], [], []
    began, started = time.process_time(), time.monotonic()
    for number, (pair, same) in enumerate(really_trained(repeats), 1):
        there.append(by_compare(pair, 2))
        none.append(by_compare(same, 2))
        shares.append(100 * float(pair[0].mean() - pair[1].mean()) / float(pair[1].mean()))
        least.append(100 * components(*pair).detectable(READERS, 2) / float(pair[1].mean()))
        spent = time.process_time() - began
        print(f"[{number}/{repeats}] {shares[-1]:+.1f} %, {spent:.0f} s", file=sys.stderr)
        if number > 1 and time.monotonic() - started > 60 * minutes:
            break
    what = f"{ENCODED} against {METHOD}, trained"
    effect = row(what, "compare, 2 seeds", float(np.mean(shares)), there)
    effect |= {
        "effect_error_pct": float(np.std(shares, ddof=1) / np.sqrt(len(shares))),
        "detectable_pct": float(np.median(least)),
    }
    other = row(f"{METHOD} against other seeds of itself, trained", "compare, 2 seeds", 0.0, none)
    return [effect, other]


def table(rows: list[dict[str, Any]]) -> str:
    """A row for what was drawn or trained with one effect, a column for each way of deciding."""
    ways = list(dict.fromkeys(one["decided_by"] for one in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for one in rows:
        error = f" ± {one['effect_error_pct']:.1f}" if "effect_error_pct" in one else ""
        effect = f"{one['effect_pct']:+.1f}{error} %" if one["effect_pct"] else "none"
        cells.setdefault((one["what"], effect), {})[one["decided_by"]] = (
            f"{one['found']} of {one['repeats']} ({one['low']:.2f} to {one['high']:.2f})"
        )
    lines = ["| values of | true difference | " + " | ".join(ways) + " |"]
    lines.append("|---" * (2 + len(ways)) + "|")
    for (what, effect), found in cells.items():
        lines.append(f"| {what} | {effect} | " + " | ".join(found.get(w, "") for w in ways) + " |")
    return "\n".join(lines)


PAGE = """# Does the instrument find what is there?

Each repetition is a comparison made anew. *Found*: the decision says that there is a difference;
where there is none, that is a false finding. Intervals are binomial, 95 % (Clopper and Pearson).
[What a comparison says](../docs/concepts/comparisons.md) explains the decisions.
"""
SECTIONS = {
    "counted": """## Models that count

What follows an item is counted in a drawn log of 60,000 lines, with and without a bit that tells
something; 40 users with 12 questions each. Where there is no effect, neither sees the bit.
""",
    "recorded": """## Values like those of the recorded comparisons

Drawn with the numbers of users, the scores and the variances that the files in results/ have. The
files do not say how much of what differs between users another training would change, so both ends
are shown. The gate promotes models, not methods: where methods do not differ, its column counts
promoted models that are in truth no better. Its challenger is the best of eight trainings by the
very users that decide.
""",
    "trained": """## Models that are really trained

A log of 200 readers in which sessions open with other items; the encoding tells where they open. Its
true effect is the mean over all repetitions, with its standard error. Where there is no effect, both
sides are trainings of gru4rec by other seeds.
""",
}


def put(page: Path, name: str, rows: list[dict[str, Any]], command: str) -> None:
    """The section of the page that these rows are of, made anew; others stay."""
    from models.core.environment import code_version, machine

    text = page.read_text(encoding="utf-8") if page.exists() else ""
    there = {part.partition("\n")[0]: f"## {part}" for part in text.split("\n## ")[1:]}
    box = machine()
    made = (
        f"`{command}`, {time.strftime('%Y-%m-%d')}, commit {code_version()[:7]}, "
        f"{box['processor']}, {box['cores']} cores."
    )
    if detectable := rows[0].get("detectable_pct"):
        made += f" Median of what could be seen with 80 %: {detectable:.1f} %."
    title = SECTIONS[name].partition("\n")[0].removeprefix("## ")
    there[title] = "\n".join([SECTIONS[name], made, "", table(rows)])
    order = [one.partition("\n")[0].removeprefix("## ") for one in SECTIONS.values()]
    parts = [PAGE, *(there[one].strip("\n") + "\n" for one in order if one in there)]
    page.write_text("\n".join(parts), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="trained: no more repetitions after these"
    )
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    args = parser.parse_args()
    runs = {
        "counted": lambda: run_counted(args.repeats),
        "recorded": lambda: run_recorded(args.repeats),
        "trained": lambda: run_trained(args.repeats, args.minutes),
    }
    command = f"python benchmarks/power.py --only {{}} --repeats {args.repeats}"
    if args.minutes < math.inf:
        command += f" --minutes {args.minutes:g}"
    found = {}
    for name in args.only.split(","):
        found[name] = runs[name]()
        print(table(found[name]), flush=True)
        if args.out:
            put(args.out, name, found[name], command.format(name))
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
