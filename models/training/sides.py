"""What a catalogue said of the items, for the models that look at it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.core.config import Config
from models.core.environment import Say
from models.core.errors import UserError
from models.data.catalogue import read_side
from models.data.load import Data
from models.networks.methods import parse, reads_side
from models.networks.side_information import Side

if TYPE_CHECKING:
    from jobs.core.source_file import Source


def lists_catalogue(config: Config, source: Source) -> bool:
    """Whether a method can score items that nothing but the catalogue is known of."""
    return source.items is not None and reads_side(config.method, config.model)


def sizes_of(side: Side | None) -> dict[str, Any]:
    """What a model's configuration says of a catalogue."""
    if side is None:
        return {"categories": (), "numbers": 0, "texts": 0}
    texts = 0 if side.words is None else side.words.shape[1]
    return {"categories": side.sizes, "numbers": side.value.shape[1], "texts": texts}


def silent(_: str) -> None:
    """Of several processes, or trainings, only the main one says something."""


def with_sides(
    config: Config, data: Data, source: Source, lake: str, say: Say
) -> tuple[Config, Data]:
    """The same for both of the trainings, each with what was known when its rows end."""
    config, data = _with_side(config, data, source, lake, say)
    if data.selection is not None:
        _, selection = _with_side(config, data.selection, source, lake, silent)
        data = replace(data, selection=selection)
    return config, data


def _with_side(
    config: Config, data: Data, source: Source, lake: str, say: Say
) -> tuple[Config, Data]:
    """For models that look at it: what the source's catalogue said of the items at the cut."""
    from jobs.core.tables import ITEM_ATTRIBUTES

    part = source.items
    if not reads_side(config.method, config.model):
        return config, data
    if part is None:
        if "side" in parse(config.method)[1]:
            raise UserError(
                f"{config.method} reads a catalogue of the items, and source {source.name} has none: "
                "say in [items] of its source file where it is, or leave +side out"
            )
        return config, data
    side = read_side(
        ITEM_ATTRIBUTES.path(lake, source.name),
        data.item_ids,
        int(data.training.rows.ts.max()),
        part.categories,
        part.numbers,
        make_with=f"python -m jobs items --source {source.name}",
        texts=part.texts,
    )
    if not side.known:
        say(
            f"catalogue: of none of the {len(data.item_ids):,} items was anything known at the "
            f"newest training event ({ITEM_ATTRIBUTES.full_name} version {side.version}, column "
            "known_from): trained without it. A catalogue with {day} in items.landing is known from "
            "its day on; one without is known for always the first time it is read"
        )
        return config, data
    say(
        f"catalogue: something was known of {side.known:,} of {len(data.item_ids):,} items at the "
        f"newest training event ({ITEM_ATTRIBUTES.full_name} version {side.version})"
    )
    model = replace(config.model, **sizes_of(side))
    return replace(config, model=model), replace(data, side=side)
