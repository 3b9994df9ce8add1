"""Ways of telling a model about sessions, feedback and habits: +st, +sse, +tsa, +fb, +habit. None
knows the backbone it is in.

An encoding may put tokens into the sequence, before labels are given (`evidence`) or after
(`layout`), change the embedded tokens (`embed`), offer features of each position (`features`), which
a backbone takes in its own way, and add to the scores of the users' own items (`history`, `added`).
Everything it does not need it inherits, doing nothing. Formulas: IEEE Access 2025, Seol, Ko and Lee (paper A).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from models.core.habit import FEATURES, Asked, Habits, OwnItems
from models.core.rows import EXPOSED, FEEDBACK, NO_LABEL, Ints, Rows, ragged
from models.networks.batch import NO_FEEDBACK, Batch, Tokens

BLOCK = 8192  # pairs whose hidden layer stays in a processor's cache
ROOM = 3  # tokens: the newest event, its session token, and the request


class EncodingSizes(Protocol):
    """What encodings read of a model's configuration."""

    @property
    def dim(self) -> int: ...
    @property
    def max_len(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def time_features(self) -> int: ...
    @property
    def sse_index(self) -> str: ...
    @property
    def tsa_time(self) -> str: ...
    @property
    def time_origin_us(self) -> int: ...
    @property
    def request_time(self) -> str: ...
    @property
    def exposures(self) -> int: ...
    @property
    def habit_events(self) -> int: ...
    @property
    def table_std(self) -> float: ...


class Encoding(nn.Module):
    """The interface, and an encoding that does nothing."""

    feature_dim: int = 0
    reads_history: bool = False  # whether `history` is asked
    reads_sessions: bool = False  # whether other sessions of the same events change anything

    def __init__(self, config: EncodingSizes) -> None:
        super().__init__()

    def extra_tokens(self, rows: Rows) -> Ints:
        """int64[E]: how many tokens this puts beside each event."""
        return np.zeros(len(rows.item), dtype=np.int64)

    def evidence(self, tokens: Tokens, rows: Rows) -> Tokens:
        return tokens

    def layout(self, tokens: Tokens, causal: bool) -> Tokens:
        return tokens

    def embed(self, x_BLD: torch.Tensor, batch: Batch) -> torch.Tensor:
        return x_BLD

    def features(self, batch: Batch) -> torch.Tensor | None:
        """float[B, L, feature_dim], or None."""
        return None

    def history(self, rows: Rows, asked: Asked) -> OwnItems | None:
        """What is to be known of users' own items at N positions, or None; one encoding of a model
        at most reads it."""
        return None

    def added(self, own: OwnItems) -> torch.Tensor | None:
        """float32[P]: what is added to the scores of own items, or None."""
        return None

    def of_another_scale(self) -> list[nn.Parameter]:
        """Parameters whose gradients say nothing of the size of others': they are clipped apart."""
        return []

    def first(self) -> list[nn.Parameter]:
        """Parameters that learn before the backbone does; see `TrainConfig.habit_epochs`."""
        return []


class SessionToken(Encoding):
    """+st: one learned token before the first item of every session. Costs D.

    It has that item's time and segment and a position of its own; it is never masked and, in cloze
    models, never a label [code]. In causal models, by `request_time` [ours]:
     * `known`: crossing into a session is predicted from its token and only from it (label at the
       token = the session's first item, or its set; label at the item before = none);
     * `last_event`: no label at the token; the last item of a session predicts the next one.
    """

    reads_sessions = True

    def __init__(self, config: EncodingSizes) -> None:
        super().__init__(config)
        self.known = config.request_time == "known"
        self.token = nn.Parameter(torch.randn(config.dim) * config.table_std)

    def extra_tokens(self, rows: Rows) -> Ints:
        return rows.opens.astype(np.int64)

    def layout(self, tokens: Tokens, causal: bool) -> Tokens:
        at = np.flatnonzero(tokens.opens)
        predicts = causal and self.known
        if predicts:
            tokens = replace(tokens, label=np.where(tokens.crossing, NO_LABEL, tokens.label))
        return tokens.insert(
            at,
            row=tokens.row[at],
            event=tokens.event[at],
            token=tokens.session_token,
            ts=tokens.ts[at],
            ordinal=tokens.ordinal[at],
            opens=False,
            feedback=NO_FEEDBACK,
            own=NO_LABEL,
            label=tokens.own[at] if predicts else NO_LABEL,
            crossing=False,
        )

    def embed(self, x_BLD: torch.Tensor, batch: Batch) -> torch.Tensor:
        is_token = (batch.token == batch.num_items + 2).unsqueeze(-1)
        return torch.where(is_token, self.token.to(x_BLD.dtype), x_BLD)


class SessionSegment(Encoding):
    """+sse: a learned vector for the session's place, added before dropout. Costs S_max * D.

    `from_newest` [code]: the newest session is S_max, all older than the newest S_max-1 share 1.
    `from_oldest` [ours]: min(ordinal, S_max), which no later session can change. Padding adds 0.
    """

    reads_sessions = True

    def __init__(self, config: EncodingSizes) -> None:
        super().__init__(config)
        self.from_newest = config.sse_index == "from_newest"
        self.table = nn.Parameter(torch.randn(config.segments, config.dim) * config.table_std)

    def index(self, batch: Batch) -> torch.Tensor:
        """int64[B, L]: 0 at padding, else 1..S_max."""
        size = self.table.shape[0]
        if self.from_newest:
            index = (size - batch.newest[:, None] + batch.ordinal).clamp(1, size)
        else:
            index = batch.ordinal.clamp(1, size)
        return index.masked_fill(batch.padding, 0)

    def embed(self, x_BLD: torch.Tensor, batch: Batch) -> torch.Tensor:
        zero = self.table.new_zeros(1, self.table.shape[1])
        return x_BLD + nn.functional.embedding(self.index(batch), torch.cat([zero, self.table]))


class TimeFeatures(Encoding):
    """+tsa: phi(t) = cos(w*t + b), w and b learned, t in seconds. Costs 2T here.

    What a backbone adds for taking them (a projection in every attention layer, wider inputs of
    recurrent layers) is the backbone's. The phase is float64, counted from the data's own epoch;
    `raw_float32` counts from 1970 in float32, as the reference does.
    """

    def __init__(self, config: EncodingSizes) -> None:
        super().__init__(config)
        self.feature_dim = config.time_features
        self.raw = config.tsa_time == "raw_float32"
        self.origin_us = config.time_origin_us
        self.frequency = nn.Parameter(10.0 ** -torch.linspace(0, 9, self.feature_dim))
        self.shift = nn.Parameter(torch.zeros(self.feature_dim))

    def of_another_scale(self) -> list[nn.Parameter]:
        # d cos(w*t) / dw grows with t, up to years in seconds: 10^5 times all other gradients
        # together. Clipped with them it would leave them nothing.
        return [self.frequency]

    def features(self, batch: Batch) -> torch.Tensor:
        if self.raw:
            seconds = (batch.ts // 1_000_000).to(torch.float32)
            return torch.cos(seconds[..., None] * self.frequency + self.shift)
        seconds = (batch.ts - self.origin_us).to(torch.float64) / 1e6
        phase = seconds[..., None] * self.frequency.to(torch.float64)
        phase = torch.remainder(phase, 2 * torch.pi) + self.shift.to(torch.float64)
        return torch.cos(phase).to(self.frequency.dtype)


class Feedback(Encoding):
    """+fb: a learned vector for what became of an item, added to its token. Costs 4 D.

    What makes next-item models equal to SessionRec in what they know: items that were shown with
    an event and not taken follow it as tokens of their own, `exposures` a session at most (and so
    few that the event itself stays in the window), each once, the first shown first [ours]. They are known when the event is, so the event's label
    moves to the last of them. A hidden item has neither.
    """

    reads_sessions = True

    def __init__(self, config: EncodingSizes) -> None:
        super().__init__(config)
        self.most = max(0, min(config.exposures, config.max_len - ROOM))
        self.table = nn.Parameter(torch.randn(len(FEEDBACK), config.dim) * config.table_std)

    def extra_tokens(self, rows: Rows) -> Ints:
        start, _, nth = rows.offered
        before = np.concatenate([[0], np.cumsum(nth < self.most)])
        return np.asarray(before[start[1:]] - before[start[:-1]])

    def evidence(self, tokens: Tokens, rows: Rows) -> Tokens:
        start, item, nth = rows.offered
        shown, at = ragged(start[tokens.event], np.diff(start)[tokens.event])
        shown, at = shown[nth[shown] < self.most], at[nth[shown] < self.most]
        return tokens.insert(
            at + 1,
            row=tokens.row[at],
            event=tokens.event[at],
            token=item[shown],
            ts=tokens.ts[at],
            ordinal=tokens.ordinal[at],
            opens=False,
            feedback=EXPOSED,
            own=NO_LABEL,
            label=NO_LABEL,
            crossing=False,
        )

    def embed(self, x_BLD: torch.Tensor, batch: Batch) -> torch.Tensor:
        zero = self.table.new_zeros(1, self.table.shape[1])
        return x_BLD + nn.functional.embedding(
            batch.feedback - NO_FEEDBACK, torch.cat([zero, self.table])
        )


class SideEncoding(Encoding):
    """`+side`: item vectors have what the catalogue says of the items (`side_information.py`), so
    that an item without any event has a score. Its parameters are there; it adds nothing here."""


class Habit(Encoding):
    """+habit: what a user did with each of their own items, added to that item's score [ours].

    w_2 . relu(W_1 f + b_1) + b_2 of the F features of `models/core/habit.py`, with H hidden units;
    0 for all other items, so that b_2 is what sets own items apart from them. w_2 and b_2 begin at
    0: a model starts as it is without. Costs (F + 2) H + 1, whatever the backbone and its sizes.

    The past of a position is what the log has before its label (`next_session`: before the label's
    session), also where a cloze model hides some of it: what is added to a position's scores
    reaches no other position. It is the user's whole past, beyond the L tokens too; the items are
    those of its newest `habit_events` events.
    """

    HIDDEN = 12
    reads_history = True
    reads_sessions = True

    def __init__(self, config: EncodingSizes) -> None:
        super().__init__(config)
        self.events = config.habit_events
        self.up = nn.Linear(len(FEATURES), self.HIDDEN)
        self.down = nn.Linear(self.HIDDEN, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def first(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def history(self, rows: Rows, asked: Asked) -> OwnItems | None:
        return Habits.of(rows).own_items(rows, asked, self.events)

    def added(self, own: OwnItems) -> torch.Tensor | None:
        weights = self.up.weight, self.up.bias, self.down.weight, self.down.bias
        result: torch.Tensor = _Head.apply(own.feature, *weights)  # type: ignore[no-untyped-call]
        return result


class _Head(torch.autograd.Function):
    """w_2 . relu(W_1 f + b_1) + b_2 of features float32[F, P].

    In blocks that stay in a processor's cache, the hidden layer made again for the gradients: two
    thirds of the time, and a quarter of the memory, of what autograd makes of the formula.
    """

    @staticmethod
    def forward(
        ctx: Any,
        feature: torch.Tensor,
        up: torch.Tensor,
        up_bias: torch.Tensor,
        down: torch.Tensor,
        down_bias: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(feature, up, up_bias, down)
        value = feature.new_empty(feature.shape[1])
        for at in _blocks(feature):
            hidden = torch.addmm(up_bias[:, None], up, feature[:, at]).relu_()
            torch.mv(hidden.T, down[0], out=value[at])
        return value.add_(down_bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        feature, up, up_bias, down = ctx.saved_tensors
        of_up, of_bias = torch.zeros_like(up.T), torch.zeros_like(up_bias)
        of_down = torch.zeros_like(down[0])
        for at in _blocks(feature):
            part, grad = feature[:, at], grads[0][at]
            hidden = torch.addmm(up_bias[:, None], up, part).relu_()
            of_down.addmv_(hidden, grad)
            inner = torch.ops.aten.threshold_backward(down.T * grad, hidden, 0)
            of_up.addmm_(part, inner.T)
            of_bias += inner.sum(1)
        return None, of_up.T, of_bias, of_down[None], grads[0].sum()[None]


def _blocks(feature: torch.Tensor) -> list[slice]:
    size = feature.shape[1]
    step = BLOCK if feature.device.type == "cpu" else max(1, size)
    return [slice(begin, begin + step) for begin in range(0, size, step)]
