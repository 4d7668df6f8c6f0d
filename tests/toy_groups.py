"""A small sequential backbone whose tokens come in groups, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.backbones.base import Sequential, token_embedding
from seriatim.conditions.base import Condition
from seriatim.core.spec import TokenSpec


@dataclass
class Seen:
    """What a row of the toy has seen: its tokens embedded, and what they became when they looked at one another."""

    condition: Tensor  # (B, 1, C)
    order: Tensor  # (B, L)
    embedded: Tensor  # (B, K, C)
    made: Tensor  # (B, K, C)
    valid: Tensor  # (B, K) bool
    counts: list[int]  # tokens of each row

    def __len__(self) -> int:
        return len(self.counts)

    def select(self, rows: Tensor | slice) -> Seen:
        c, o, e, m, v = (t[rows] for t in (self.condition, self.order, self.embedded, self.made, self.valid))
        return Seen(c, o, e, m, v, torch.tensor(self.counts)[rows].tolist())

    def join(self, other: Seen) -> Seen:
        most = max(self.valid.shape[1], other.valid.shape[1])
        pairs = []
        for a, b in zip(vars(self).values(), vars(other).values(), strict=True):
            if a is self.counts:
                pairs.append(a + b)
            elif a is self.condition or a is self.order:
                pairs.append(torch.cat([a, b]))
            else:  # rows that have seen fewer are padded
                fill = [(0, 0) * (t.ndim - 2) + (0, most - t.shape[1]) for t in (a, b)]
                pairs.append(torch.cat([F.pad(t, by) for t, by in zip((a, b), fill, strict=True)]))
        return Seen(*pairs)


class Groups(Sequential):
    """As in locality-aware parallel decoding: those of a group see one another when known, and those before them."""

    any_order = groups = True

    def __init__(self, tokens: int, *, dim: int | None = None, vocab: int | None = None, width: int = 16) -> None:
        super().__init__()
        self.spec, self.width, self.z_dim = TokenSpec(tokens, dim=dim, vocab=vocab), width, width
        self.config = {"tokens": tokens, "dim": dim, "vocab": vocab, "width": width}
        self.embed = token_embedding(self.spec, width)
        self.places, self.asked = (torch.nn.Parameter(torch.randn(tokens, width)) for _ in range(2))
        self.mix, self.out = (torch.nn.Linear(width, width) for _ in range(2))

    def look(self, x: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        """x (B, n, C) looks at (B, K, C) where the mask (B, n, K) says; with nothing to look at it stays."""
        scores = (self.mix(x) @ at.transpose(1, 2)).masked_fill(~mask, -1e9).softmax(dim=-1) * mask
        return x + self.out(scores @ at).tanh()

    def sequence_of_groups(
        self, condition: Condition, tokens: Tensor, order: Tensor | None, sizes: Sequence[int]
    ) -> Tensor:
        B, L = tokens.shape[:2]
        order = torch.arange(L).expand(B, L) if order is None else order
        group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # (L,)
        ordered = tokens[torch.arange(B)[:, None], order]
        x = self.embed(ordered) + F.embedding(order, self.places)
        x = self.look(x, x, (group <= group[:, None]).expand(B, L, L))  # block-causal
        front = condition.vectors[:, :1]
        before = F.pad(group < group[:, None], (1, 0), value=True).expand(B, L, L + 1)
        return self.look(front + F.embedding(order, self.asked), torch.cat([front, x], dim=1), before)

    def sequence(self, condition: Condition, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        return self.sequence_of_groups(condition, tokens, order, [1] * self.tokens)

    def start(self, condition: Condition, order: Tensor | None = None) -> Seen:
        B, C = len(condition), self.width
        order = torch.arange(self.tokens).expand(B, -1) if order is None else order
        nothing = condition.vectors.new_zeros(B, 0, C)
        return Seen(condition.vectors[:, :1], order, nothing, nothing, torch.zeros(B, 0, dtype=torch.bool), [0] * B)

    def step(
        self,
        state: Seen,
        content: Tensor | None = None,
        content_valid: Tensor | None = None,
        ask: Tensor | None = None,
        ask_valid: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        seen, last = torch.tensor(state.counts)[:, None], self.tokens - 1
        if content is not None and content.shape[1]:
            m = content.shape[1]
            valid = torch.ones(len(state), m, dtype=torch.bool) if content_valid is None else content_valid
            at = state.order.gather(1, (seen + torch.arange(m)).clamp(max=last))
            x = self.embed(content) + F.embedding(at, self.places)
            state.embedded, state.valid = torch.cat([state.embedded, x], 1), torch.cat([state.valid, valid], 1)
            mask = state.valid[:, None].expand(-1, m, -1)
            state.made = torch.cat([state.made, self.look(x, state.embedded, mask)], dim=1)
            state.counts = [a + b for a, b in zip(state.counts, valid.sum(dim=1).tolist(), strict=True)]
            seen = torch.tensor(state.counts)[:, None]
        ask = state.order.gather(1, seen.clamp(max=last)) if ask is None else ask
        x = state.condition + F.embedding(ask, self.asked)
        mask = F.pad(state.valid, (1, 0), value=True)[:, None].expand(-1, ask.shape[1], -1)
        return self.look(x, torch.cat([state.condition, state.made], dim=1), mask)
