"""A log of ten nights in which items are born along the way, as a world of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.gold_world import DAY, Event, ring, write_gold, write_silver
from tests.support.recorded import SOURCE, World, opened

ASKED = ("--split", "nightly", "--nights", "3")


def born_along_the_way() -> dict[str, list[Event]]:
    """A ring whose users also meet an item that was born that day, and one of the day before."""
    story = ring(users=30)
    for number, (name, events) in enumerate(story.items()):
        day = number % 10
        own: list[Event] = [(f"day{day}", day * DAY + 1000 + number, 0)]
        if day < 9:
            own.append((f"day{day}", (day + 1) * DAY + 2000 + number, 0))
        told = sorted([*events, *own], key=lambda e: e[1])
        starts = np.cumsum([n == 0 or e[1] // DAY != told[n - 1][1] // DAY
                            for n, e in enumerate(told)])  # fmt: skip
        story[name] = [(e[0], e[1], int(s)) for e, s in zip(told, starts, strict=True)]
    return story


@contextmanager
def nights_at(root: Path) -> Iterator[World]:
    with opened(root) as there:
        write_gold(there.lake, "toy", born_along_the_way())
        write_silver(there.lake, "toy", born_along_the_way())
        there.source.write_text(SOURCE.replace('split = "temporal"\n', ""))
        yield there


def say(world: World, *words: str) -> tuple[int, Any, str, str]:
    """A command on its source: status, JSON, what it said, its errors."""
    return world.run(words[0], "--source", str(world.source), "--json", *words[1:])
