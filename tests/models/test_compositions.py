"""Compositions: a model inside a token, and a backbone written from the contract alone. Accumulation of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import many, randomise
from torch import Tensor

from seriatim.backbones.base import Sequential, token_embedding
from seriatim.conditions.base import Condition
from seriatim.core.spec import TokenSpec
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_head, build_model, seeded
from seriatim.testing import check_model

LEAF = {"kind": "mixture", "components": 2, "depth": 0}
INNER = {"kind": "causal", "width": 16, "depth": 1, "heads": 2}
MASKED = {"kind": "masked", "width": 16, "depth": 1, "heads": 2, "buffer": 10, "dropout": 0.0}
HEAD: dict[str, dict[str, Any]] = {
    "diffusion": {"kind": "diffusion", "width": 16, "depth": 1},
    "flow": {"kind": "flow", "width": 16, "depth": 1},
    "mixture": {"kind": "mixture", "components": 2, "width": 16, "depth": 1},
    "bins": {"kind": "bins", "bins": 8},
    "nested": {"kind": "nested", "split": {"kind": "features"}, "model": {**INNER, "head": LEAF}},
    "categorical": {"kind": "categorical"},
}
MODEL: dict[str, dict[str, Any]] = {
    "masked": {**MASKED, "buffer": 2},
    "masked, each image": {**MASKED, "buffer": 2, "mask_ratio_per": "image"},
    "raster": INNER,
    "random": {**INNER, "order": "random"},
}


def fractal(neighbours: bool = True, guide: bool = True) -> SequenceModel:
    """Patches of 4 x 4 pixels as four of 2 x 2, from z, those of four neighbours and a guide; colours one by one."""
    pixels = {"kind": "nested", "split": {"kind": "rgb"}, "model": {**INNER, "head": {**LEAF, "components": 2}}}
    head: dict[str, Any] = {"kind": "nested", "split": {"kind": "patches", "size": 2}, "neighbours": neighbours}
    vectors = (5 if neighbours else 1) + guide
    head["model"] = {**MASKED, "buffer": vectors, "head": pixels}
    head |= {"guide": {"kind": "mixture", "components": 2, "depth": 0}} if guide else {}
    return build_model({**MASKED, "buffer": 2, "tokens": 4, "dim": 48, "classes": 2, "head": head})


@pytest.mark.parametrize(("neighbours", "guide"), [(True, True), (False, False)])
def test_a_fractal_of_three_levels(neighbours: bool, guide: bool) -> None:
    """naive == fast, alone == in a batch, exact accumulation, nothing kept; and all of it is trained."""
    check_model(lambda: fractal(neighbours, guide))
    model = fractal(neighbours, guide).train()
    randomise(model, scale=0.05)
    loss = model(torch.randn(4, 4, 48), torch.tensor([0, 1, 0, -1]), many(0, 4))
    loss.mean.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    assert ("guide" in loss.parts) == guide


PRECISIONS = [(head, dtype, bound) for head in HEAD for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-9))]


def gradients(model: SequenceModel, tokens: Tensor, parts: int) -> list[Tensor]:
    """Of the mean over a batch of 8 that is given in so many parts."""
    labels, keys, step = torch.arange(8) % 3 - 1, many(3, 8), many(4, 1)
    model.zero_grad()
    count = 0.0
    for rows in torch.arange(8).chunk(parts):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        loss = model(tokens[some], labels[some], keys.select(some), step)
        loss.sum.backward()
        count += float(loss.count)
    return [p.grad / count for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("head", "dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize("kind", MODEL)
def test_accumulation_over_parts_gives_the_gradient_of_the_whole(
    kind: str, head: str, dtype: torch.dtype, bound: float
) -> None:
    size: dict[str, Any] = {"vocab": 6} if head == "categorical" else {"dim": 3}
    with seeded(0):
        model = build_model({**MODEL[kind], "head": HEAD[head]}, tokens=9, classes=2, **size).train()
    randomise(model, scale=0.1)
    model.to(dtype)
    tokens = torch.arange(72).view(8, 9) % 6 if head == "categorical" else many(0, 8).normal(9, 3).to(dtype)
    whole = gradients(model, tokens, 1)
    largest = max(float(g.norm()) for g in whole)
    for parts in (2, 4):
        for a, b in zip(whole, gradients(model, tokens, parts), strict=True):
            assert float((a - b).norm()) <= bound * max(float(a.norm()), 1e-2 * largest)


# --- several tokens a step: the sequential contract with groups -------------------------------------------------------


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

    any_order = True

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

    def of_groups(self, condition: Condition, tokens: Tensor, order: Tensor | None, sizes: Sequence[int]) -> Tensor:
        """z of all tokens in one pass, (B, L, C), in the order, where groups of these sizes come together."""
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
        return self.of_groups(condition, tokens, order, [1] * self.tokens)

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


@torch.no_grad()
def test_a_row_of_groups_is_the_same_alone_and_beside_others() -> None:
    """Rows whose groups differ in size, and rows that join a batch later: z depends on the row's own content alone."""
    with seeded(0):
        backbone, condition = Groups(9, dim=3), Condition(torch.randn(3, 1, 16))
    order, content, sizes = many(6, 3).permutation(9), many(7, 3).normal(4, 3), [4, 1, 3]
    ask = order[:, 4:6]
    state = backbone.start(condition, order)
    together = backbone.step(state, content, torch.arange(4) < torch.tensor(sizes)[:, None], ask)
    joined: Seen | None = None
    for row, count in enumerate(sizes):
        one = slice(row, row + 1)
        alone = backbone.start(condition.select(one), order[one])
        z = backbone.step(alone, content[one, :count], ask=ask[one])
        torch.testing.assert_close(z, together[one], atol=1e-5, rtol=1e-5)
        joined = alone if joined is None else joined.join(alone)
    assert joined is not None and joined.counts == sizes
    for some, rows in ((joined, slice(0, 3)), (joined.select(torch.tensor([2, 0])), torch.tensor([2, 0]))):
        torch.testing.assert_close(backbone.step(some, ask=ask[rows]), together[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[1, 2, 3, 3], [4, 5], [1] * 9, [9]])
@pytest.mark.parametrize("kind", ["mixture", "categorical"])
@torch.no_grad()
def test_groups_of_tokens_come_together(kind: str, sizes: list[int]) -> None:
    """Content of m tokens, z of n positions: a pass over everything for each group draws what the state draws."""
    B, L = 3, 9
    size: dict[str, Any] = {"vocab": 6} if kind == "categorical" else {"dim": 3}
    with seeded(0):
        backbone = Groups(L, **size)
        head = build_head(HEAD[kind], dim=size.get("dim"), vocab=size.get("vocab"), z_dim=16)
        head.bind(16)
        randomise(head, scale=0.3)
        condition = Condition(torch.randn(B, 1, 16))
    keys, order = many(5, B), many(6, B).permutation(L)
    rows = torch.arange(B)[:, None]

    def drawn(z: Tensor, places: Tensor) -> Tensor:
        own = keys.fold("token").select(rows.expand_as(places).flatten()).fold(places.flatten())
        return head.sample(z.flatten(0, 1), own).unflatten(0, places.shape)

    def naive() -> Tensor:
        tokens, first = backbone.spec.blank(B), 0
        for count in sizes:
            z = backbone.of_groups(condition, tokens, order, sizes)[:, first : first + count]
            places = order[:, first : first + count]
            tokens[rows, places] = drawn(z, places)
            first += count
        return tokens

    def fast() -> Tensor:
        tokens, first, content = backbone.spec.blank(B), 0, None
        state = backbone.start(condition, order)
        for count in sizes:
            places = order[:, first : first + count]
            content = drawn(backbone.step(state, content, ask=places), places)
            tokens[rows, places] = content
            first += count
        return tokens

    expected = naive()
    torch.testing.assert_close(fast(), expected, atol=1e-4, rtol=1e-4)
    assert len(expected.unique()) > 3
    if len(sizes) > 1:  # a group sees those before it: other first tokens, other later ones
        keys = many(7, B)
        assert not torch.equal(naive()[:, -1], expected[:, -1])
