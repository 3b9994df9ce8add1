"""What a catalogue says of items: read as it was known at the cut, and mixed into item vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.core.config import ModelConfig
from models.core.rows import Floats, Ints


@dataclass(frozen=True)
class Side:
    """Attributes of V items, from one version of gold.item_attributes.

    code int64[V, C] (a category's values from 1, 0 where nothing is known), sizes (so many codes
    each category has, 0 counted), value float64[V, M] (mean 0, deviation 1 over the items that
    have one; 0 for the others), known (of so many items something),
    words int64[V, X, WORDS] (of X text columns; see `words_of`).
    """

    code: Ints
    sizes: tuple[int, ...]
    value: Floats
    version: int
    known: int
    values: dict[str, list[str]] = field(default_factory=dict)
    words: Ints | None = None


WORDS, BUCKETS = 24, 4096  # ours: of one text that are read; that words are hashed into


def words_of(texts: Sequence[str]) -> Ints:
    """int64[N, WORDS]: the words of texts, and pairs of neighbours, each once, as numbers 1..BUCKETS
    by hashing: nothing is learnt or downloaded for it, and a word that is new has a number. 0 where
    there are no more; of longer texts those with the lowest numbers are read."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(
        n_features=BUCKETS, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", norm=None, binary=True,
        alternate_sign=False,
    )  # fmt: skip
    found = hashed.transform(texts).tocsr()
    found.sort_indices()
    row = np.repeat(np.arange(len(texts)), np.diff(found.indptr))
    place = np.arange(len(found.indices)) - found.indptr[row]
    words = np.zeros((len(texts), WORDS), dtype=np.int64)
    read = place < WORDS
    words[row[read], place[read]] = found.indices[read] + 1
    return words


def _table(size: int, width: int) -> nn.Embedding:
    """Row 0, where nothing is known, is a constant. Others start as far out as items do."""
    table = nn.Embedding(size, width, padding_idx=0)
    nn.init.normal_(table.weight, std=width**-0.5)
    with torch.no_grad():
        table.weight[0].zero_()
    return table


class SideInformation(nn.Module):
    """e + W_2 gelu(W_1 [e; categories; numbers; texts]): item vectors with what the catalogue says.

    Paper B's concatenation and MLP; that it is added to the item's own vector, beginning at 0, is
    ours: it starts as the model without. Parameters: `side_dim` a value of a category and, counted
    though it stays 0, of "not known"; (D + (C + X) side_dim + M) D + D of W_1, D^2 + D of W_2;
    and (BUCKETS + 1) side_dim a text column, of which a text is the mean of its words' vectors.
    """

    def __init__(self, num_items: int, config: ModelConfig) -> None:
        super().__init__()
        sizes, dim, width = config.categories, config.dim, config.side_dim
        self.tables = nn.ModuleList(_table(size, width) for size in sizes)
        self.texts = nn.ModuleList(_table(BUCKETS + 1, width) for _ in range(config.texts))
        self.up = nn.Linear(dim + (len(sizes) + config.texts) * width + config.numbers, dim)
        self.down = nn.Linear(dim, dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.code: torch.Tensor  # of items 0..V: 0 is padding
        self.value: torch.Tensor
        self.register_buffer("code", torch.zeros(num_items + 1, len(sizes), dtype=torch.long))
        self.register_buffer("value", torch.zeros(num_items + 1, config.numbers))
        shape = (num_items + 1, config.texts, WORDS)
        words = torch.zeros(shape, dtype=torch.long) if config.texts else None
        self.words: torch.Tensor | None
        self.register_buffer("words", words)  # (none: it is not among the weights of older models)

    def fill(self, side: Side) -> None:
        self.code[1:] = torch.from_numpy(side.code)
        self.value[1:] = torch.from_numpy(side.value).to(self.value.dtype)
        if self.words is not None and side.words is not None:
            self.words[1:] = torch.from_numpy(side.words)

    def forward(self, item_N: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        """float[..., N, D], of items `item_N` whose own vectors are `x_ND`."""
        code = self.code[item_N]
        parts = [table(code[..., number]) for number, table in enumerate(self.tables)]
        for number, table in enumerate(self.texts):
            assert self.words is not None
            word = self.words[item_N, number]
            count = (word > 0).sum(-1, keepdim=True).clamp(min=1)
            parts.append(table(word).sum(-2) / count)
        mixed = torch.cat([x_ND, *parts, self.value[item_N]], dim=-1)
        result: torch.Tensor = x_ND + self.down(functional.gelu(self.up(mixed)))
        return result
