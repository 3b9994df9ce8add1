"""A trained model: items embedded, encodings applied, a backbone run, the catalogue scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn

from models.core.config import Config, ModelConfig, TrainConfig
from models.core.errors import UserError
from models.core.habit import Asked
from models.core.rows import NO_LABEL, Ints, Rows, Target
from models.networks.batch import (
    Batch,
    Tokens,
    append_request,
    label_cloze,
    label_next,
    pad,
    take,
    windows,
)
from models.networks.encodings import Encoding
from models.networks.losses import (
    FULL_ITEMS,
    Added,
    Classes,
    full_cross_entropy,
    gbce,
    sampled_softmax,
)
from models.networks.side_information import SideInformation

SCORED_TOKENS = 8192  # ours
SPARSE_FROM = 2**23  # ours: weights of a table of which a step of a sampled loss reads few


class Recommender(nn.Module):
    """Items embedded, encodings applied, the backbone run, all V items scored.

    The item table has rows 0 (padding), 1..V and, for cloze models, [MASK]. Tied models score by
    that table plus a bias an item; others by a layer D -> V+1, whose class 0 is never returned. A
    backbone with a `temperature` is always tied and scores by cosine / temperature, without bias.

    A backbone has the flags `cloze` and, where its `forward` takes which positions are asked for, and
    how many of one row at most, `chooses`.
    """

    full_loss = staticmethod(full_cross_entropy)
    gives_logits = True  # baselines score by counts, which give no loss

    def __init__(
        self,
        num_items: int,
        config: Config,
        backbone: Callable[[ModelConfig, int], nn.Module],
        encodings: Mapping[str, Callable[[ModelConfig], Encoding]],
    ) -> None:
        super().__init__()
        self.config = config.model
        self.num_items = num_items
        drawn = kind_of_loss(config.train, num_items) != "full"
        self.sparse = drawn and (num_items + 1) * config.model.dim >= SPARSE_FROM
        self.precision = config.train.precision  # what layers compute in; `auto`: float32
        self.backbone_joins = True  # while it does not, items' biases and what is added are scored
        made = {name: encoding(config.model) for name, encoding in encodings.items()}
        self.encodings = nn.ModuleDict(made)
        widths = sum(encoding.feature_dim for encoding in self.all_encodings())
        self.backbone = backbone(config.model, widths)
        self.cloze = bool(self.backbone.cloze)
        dim, masks = config.model.dim, int(self.cloze or config.model.reference)
        self.item = nn.Embedding(num_items + 1 + masks, dim, padding_idx=0)
        self.temperature: float | None = getattr(self.backbone, "temperature", None)
        tied = config.model.tied or self.temperature is not None
        self.first_class = int(tied)
        self.output = None if tied else nn.Linear(dim, num_items + 1)
        biased = tied and self.temperature is None
        self.bias = nn.Parameter(torch.zeros(num_items)) if biased else None
        self.share: torch.Tensor  # float32[V], of positive training events; see `fit`
        self.register_buffer("share", torch.full((num_items,), 1 / num_items), persistent=False)
        self.share_up_to: torch.Tensor  # float64[V]: of the items up to each
        summed = torch.arange(1, num_items + 1, dtype=torch.float64) / num_items
        self.register_buffer("share_up_to", summed, persistent=False)
        self.unseen: torch.Tensor  # bool[V]: items of a catalogue alone; see `fit`
        self.register_buffer("unseen", torch.zeros(num_items, dtype=torch.bool), persistent=False)
        self.some_unseen = False
        nn.init.normal_(
            self.item.weight, std=config.model.table_std if config.model.reference else dim**-0.5
        )
        with torch.no_grad():
            self.item.weight[0].zero_()
        self.side: SideInformation | None = None  # what a catalogue says of items, if it is read
        if "side" in encodings:
            self.read_side(tied)

    def all_encodings(self) -> list[Encoding]:
        return [cast(Encoding, encoding) for encoding in self.encodings.values()]

    def read_side(self, tied: bool = True) -> None:
        """Let item vectors have what the catalogue says, if it says anything.

        Raises:
            UserError: items are scored by weights that are not their vectors.
        """
        if not tied:
            raise UserError(
                "+side is part of the items' vectors, and this model scores by an output layer of its "
                "own: leave +side out, or take a preset whose item vectors score (tied)"
            )
        if self.config.categories or self.config.numbers or self.config.texts:
            self.side = SideInformation(self.num_items, self.config)

    def learns_first(self) -> list[nn.Parameter]:
        """What some encoding wants to be learnt before the backbone joins in; the items' biases are
        learnt with it. Empty: there is no such encoding."""
        first = [one for encoding in self.all_encodings() for one in encoding.first()]
        bias = self.bias if self.output is None else self.output.bias
        return [*first, bias] if first and bias is not None else first

    def join(self, yes: bool) -> None:
        """Let the backbone be scored and learn, or only what `learns_first`."""
        self.backbone_joins = yes
        first = {id(one) for one in self.learns_first()}
        for one in self.parameters():
            one.requires_grad_(yes or id(one) in first)

    def fit(self, rows: Rows) -> None:
        """Count popularity, from which sampled losses draw; start item biases at its log [ours].

        Where a catalogue is read, an item that no row has is what the catalogue says of it and nothing
        else: its own vector is 0, and no loss scores it against what was taken [ours]. It would learn
        from every label that it is not wanted, and its attributes with it.
        """
        count = np.bincount(rows.item[rows.positive], minlength=self.num_items + 1)[1:]
        share = (count + 1) / (count.sum() + self.num_items)
        self.share = torch.from_numpy(share.astype(np.float32))
        self.share_up_to = torch.from_numpy(np.cumsum(share))
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(torch.from_numpy(np.log(share) - np.log(share).mean()))
        if self.side is not None:
            known = np.zeros(self.num_items + 1, dtype=bool)
            known[rows.item] = True
            if rows.shown is not None:
                known[rows.shown] = True
            self.unseen = torch.from_numpy(~known[1:])
            self.some_unseen = bool(self.unseen.any())
            self.clear_unseen()

    def clear_unseen(self) -> None:
        """Take the vectors of their own from the items that no row has."""
        with torch.no_grad():
            self.item.weight[1 : self.num_items + 1][self.unseen] = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        """float[B, L, D]"""
        return self._run(batch)

    def states(self, batch: Batch, at_N: torch.Tensor, most: int = 0) -> torch.Tensor:
        """[N, D]: of `forward`, the positions `at_N` (indices into B*L), in the model's precision.

        most: of one row, at most; 0: they are counted, and a GPU waits for it.
        """
        low = self.precision == "bfloat16"
        if not self.backbone_joins:
            kind = torch.bfloat16 if low else torch.float32
            return torch.zeros(len(at_N), self.config.dim, dtype=kind, device=at_N.device)
        with torch.autocast(at_N.device.type, torch.bfloat16, enabled=low):
            if getattr(self.backbone, "chooses", False):
                h_ND = self._run(batch, at_N, most)
            else:
                h_ND = self._run(batch).flatten(0, 1).index_select(0, at_N)
        return h_ND.to(torch.bfloat16) if low else h_ND

    def _run(self, batch: Batch, *asked: torch.Tensor | int) -> torch.Tensor:
        x_BLD = self.embedded(batch)
        extra = []
        for encoding in self.all_encodings():
            x_BLD = encoding.embed(x_BLD, batch)
            extra.append(encoding.features(batch))
        parts = [part for part in extra if part is not None]
        features = torch.cat(parts, dim=-1) if parts else None
        result: torch.Tensor = self.backbone(x_BLD, batch, features, *asked)
        return result if self.temperature is None else nn.functional.normalize(result, dim=-1)

    def embedded(self, batch: Batch) -> torch.Tensor:
        """float[B, L, D]: what is at each position, before encodings."""
        known = batch.token.masked_fill(batch.token >= self.item.num_embeddings, 0)
        x_BLD = self.item_rows(known)
        if self.side is None:
            return x_BLD
        item = known.masked_fill(known > self.num_items, 0)
        mixed_BLD = self.side(item, x_BLD)
        return torch.where((item > 0)[..., None], mixed_BLD, x_BLD)

    def item_rows(self, item: torch.Tensor) -> torch.Tensor:
        """float[..., D]: of the item table. Where it is `sparse`, the gradient has these rows alone."""
        if self.sparse:
            return nn.functional.embedding(item, self.item.weight, sparse=True)
        rows: torch.Tensor = self.item(item)
        return rows

    def dense_gradients(self) -> None:
        """Gradients that have some of a table's rows, as the whole table's: filled with zeros once,
        not for each part and each use. None reaches padding."""
        for weight in self.parameters():
            grad = weight.grad
            if grad is not None and grad.is_sparse:
                # Public `indices()` wants each row once, and to find these a GPU is waited for.
                rows, values = grad._indices()[0], grad._values()
                weight.grad = torch.zeros_like(weight).index_add_(0, rows, values)
        if self.sparse and self.item.weight.grad is not None:
            self.item.weight.grad[0] = 0

    def catalogue(self) -> torch.Tensor:
        """float[V, D]: the items as they are scored."""
        weight = self.item.weight[1 : self.num_items + 1]
        if self.side is None:
            return weight
        item = torch.arange(1, self.num_items + 1, device=weight.device)
        mixed: torch.Tensor = self.side(item, weight)
        return mixed

    def classes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [C, D] and bias [C] of the output; item i is class i - first_class."""
        if self.output is not None:
            return self.output.weight, self.output.bias
        weight = self.catalogue()
        if self.temperature is not None:
            weight = nn.functional.normalize(weight, dim=-1) / self.temperature
        return weight, weight.new_zeros(len(weight)) if self.bias is None else self.bias

    def some_classes(self) -> Classes:
        """`classes`, worked out for those alone that a loss asks for; what no row has (`unseen`) is
        -inf."""
        return Classes(self.num_items + 1 - self.first_class, self._of)

    def _of(self, cls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.output is not None:
            if self.sparse:
                weight = nn.functional.embedding(cls, self.output.weight, sparse=True)
                return weight, self.output.bias[cls]
            return self.output.weight[cls], self.output.bias[cls]
        weight = self.item_rows(cls + 1) if self.sparse else self.item.weight[cls + 1]
        if self.side is not None:
            weight = self.side(cls + 1, weight)
        if self.temperature is not None:
            weight = nn.functional.normalize(weight, dim=-1) / self.temperature
        bias = weight.new_zeros(len(cls)) if self.bias is None else self.bias[cls]
        if self.some_unseen:
            bias = bias.masked_fill(self.unseen[cls], -torch.inf)
        return weight, bias

    @property
    def tokens_at_once(self) -> int:
        """So many tokens, with their padding, are best scored together; a history has at most L."""
        on_cpu = self.item.weight.device.type == "cpu"
        return SCORED_TOKENS if on_cpu else 16 * SCORED_TOKENS

    def windows(self, rows: Rows, shift: Ints | None) -> tuple[Ints, Ints]:
        """Users' events in windows that fit: (begin, end); see `batch.windows`."""
        cost = np.ones(len(rows.item), dtype=np.int64)
        for encoding in self.all_encodings():
            cost += encoding.extra_tokens(rows)
        return windows(rows, self.config.max_len, cost, shift)

    def training_tokens(
        self, rows: Rows, begin: Ints, end: Ints, train: TrainConfig, rng: np.random.Generator
    ) -> Tokens:
        """Windows as tokens with what is to be predicted at them."""
        target = cast(Target, train.target)
        tokens = take(rows, begin, end, self.num_items, target)
        for encoding in self.all_encodings():
            tokens = encoding.evidence(tokens, rows)
        if self.cloze:
            newest = self.config.request_time == "last_event"
            tokens = label_cloze(tokens, target, rng, train.mask_share, newest)
        else:
            tokens = label_next(tokens, rows, target)
            if train.item_noise:
                noisy = rng.random(len(tokens.token)) < train.item_noise
                other = rng.integers(1, self.num_items + 1, len(tokens.token))
                tokens = replace(tokens, token=np.where(noisy, other, tokens.token))
        for encoding in self.all_encodings():
            tokens = encoding.layout(tokens, causal=not self.cloze)
        return tokens

    def padded(self, tokens: Tokens, rows: Rows, train: TrainConfig) -> Batch:
        """Training tokens, or a part of them, as tensors."""
        target = cast(Target, train.target)
        batch = pad(tokens, self.config.max_len, rows, target)
        return self.with_history(batch, rows, lambda: self.labelled(tokens, rows, target))

    def with_history(self, batch: Batch, rows: Rows, asked: Callable[[], Asked]) -> Batch:
        """The batch with what an encoding wants to know of the users' own items."""
        if not any(encoding.reads_history for encoding in self.all_encodings()):
            return batch
        positions = asked()
        for encoding in self.all_encodings():
            own = encoding.history(rows, positions)
            if own is not None:
                batch = replace(batch, own=own)
        return batch

    def labelled(self, tokens: Tokens, rows: Rows, target: Target) -> Asked:
        """The positions that have a label once `pad` has cut the rows, in its order: their past is
        what lies before the label."""
        age = tokens.row_end[tokens.row] - 1 - np.arange(len(tokens.row))
        label = tokens.label[(age < self.config.max_len) & (tokens.label != NO_LABEL)]
        end = label if target == "next_item" else rows.session_start[label]
        user = np.searchsorted(rows.start, end, side="right") - 1
        known = self.config.request_time == "known"
        begin = rows.start[user]
        now = end if known else np.maximum(end - 1, begin)
        return Asked(begin, end, rows.ts[now], rows.ordinal[now].astype(np.int64))

    def loss(self, batch: Batch, train: TrainConfig) -> torch.Tensor:
        """The mean loss over the batch's labels."""
        h_ND = self.states(batch, batch.label_at, batch.most_labels)
        return self.retrieval(h_ND, batch, train)

    def added(self, batch: Batch) -> Added | None:
        """What encodings add to the scores of users' own items, from their history."""
        if batch.own is None:
            return None
        cls = batch.own.item - self.first_class
        for encoding in self.all_encodings():
            value = encoding.added(batch.own)
            if value is not None:
                return Added(batch.own.row, cls, value, batch.own.host_row)
        return None

    def retrieval(self, h_ND: torch.Tensor, batch: Batch, train: TrainConfig) -> torch.Tensor:
        """The labels found among all items, or among drawn ones, from the states at them."""
        label = batch.label_item - self.first_class
        kind = kind_of_loss(train, self.num_items)
        if kind == "full":
            weight, bias = self.classes()
            if self.some_unseen:
                bias = bias.masked_fill(self.unseen, -torch.inf)
            return self.full_loss(
                h_ND,
                weight,
                bias,
                batch.label_start,
                label,
                added=self.added(batch),
                edges=batch.label_edges,
            )
        given = (h_ND, self.some_classes(), batch.label_start, label)
        if kind == "sampled":
            item = self.drawn(train.negatives)
            drawn = item + 1 - self.first_class
            return sampled_softmax(*given, drawn, self.share[item], added=self.added(batch))
        item = self.drawn(train.negatives, evenly=True)
        drawn = item + 1 - self.first_class
        return gbce(*given, drawn, self.num_items, train.gbce_t, added=self.added(batch))

    def drawn(self, number: int, evenly: bool = False) -> torch.Tensor:
        """int64[number]: items 0..V-1 with replacement, by popularity or evenly.

        `torch.multinomial` reads all V shares each time, and takes 2^24 at most.
        """
        device = self.share.device
        if evenly:
            return torch.randint(self.num_items, (number,), device=device)
        at = torch.rand(number, dtype=torch.float64, device=device) * self.share_up_to[-1]
        found = torch.searchsorted(self.share_up_to, at, right=True)
        return found.clamp(max=self.num_items - 1)

    def request(
        self,
        rows: Rows,
        begin: Ints,
        end: Ints,
        request_ts: Ints | None = None,
        new_session: np.ndarray | None = None,
    ) -> Batch:
        """The batch that asks what follows the histories rows[begin[r]:end[r]] (none empty).

        `request_ts` and `new_session` are read under the policy `known` only.
        """
        known = self.config.request_time == "known" and request_ts is not None
        oldest = np.maximum(begin, end - self.config.max_len)
        tokens = take(rows, oldest, end, self.num_items, None)
        for encoding in self.all_encodings():
            tokens = encoding.evidence(tokens, rows)
        if self.cloze or known:
            tokens = append_request(
                tokens,
                cloze=self.cloze,
                request_ts=request_ts if known else None,
                new_session=new_session if known else None,
            )
        for encoding in self.all_encodings():
            tokens = encoding.layout(tokens, causal=not self.cloze)
        batch = pad(tokens, self.config.max_len)
        return self.asked_about(batch, rows, begin, end, request_ts, new_session)

    def asked_about(
        self,
        batch: Batch,
        rows: Rows,
        begin: Ints,
        end: Ints,
        request_ts: Ints | None,
        new_session: np.ndarray | None,
    ) -> Batch:
        """A request's batch, with what encodings want to know of the whole histories."""

        def asked(begin: Ints, end: Ints, whole: Rows) -> Asked:
            ts, ordinal = whole.ts[end - 1], whole.ordinal[end - 1].astype(np.int64)
            if self.config.request_time == "known" and request_ts is not None:
                ts = request_ts
                if new_session is not None:
                    ordinal = ordinal + new_session
            return Asked(begin, end, ts, ordinal)

        user = np.searchsorted(rows.start, begin, side="right") - 1
        if np.array_equal(rows.start[user], begin):
            return self.with_history(batch, rows, lambda: asked(begin, end, rows))
        part = rows.part(begin, end)
        return self.with_history(batch, part, lambda: asked(part.start[:-1], part.start[1:], part))

    @torch.inference_mode()
    def score(
        self,
        rows: Rows,
        begin: Ints,
        end: Ints,
        request_ts: Ints | None = None,
        new_session: np.ndarray | None = None,
    ) -> torch.Tensor:
        """float[R, V]: how well each item follows each history. No [MASK], no [ST], no padding."""
        batch = self.request(rows, begin, end, request_ts, new_session)
        weight, bias = self.classes()
        batch = batch.to(weight.device)
        many, length = batch.token.shape
        last = torch.arange(1, many + 1, device=weight.device) * length - 1
        h_RD = self.states(batch, last, 1).to(weight.dtype)
        scores = torch.addmm(bias, h_RD, weight.T)
        added = self.added(batch)
        if added is not None:
            scores[added.row, added.cls] += added.value
        return scores[:, 1 - self.first_class :].cpu()


def kind_of_loss(train: TrainConfig, num_items: int) -> str:
    """full, sampled or gbce."""
    if train.loss != "auto":
        return train.loss
    return "full" if num_items <= FULL_ITEMS else "sampled"
