"""Compositions: a model inside a token, and a backbone written from the contract alone. Accumulation of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import many, randomise
from torch import Tensor
from toy_groups import Groups, Seen

from seriatim.conditions.base import Condition
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
            z = backbone.sequence_of_groups(condition, tokens, order, sizes)[:, first : first + count]
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
