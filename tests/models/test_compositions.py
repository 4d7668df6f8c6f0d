"""Compositions: a model inside a token, and a backbone written from the contract alone. Accumulation of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import many, randomise
from torch import Tensor

from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, seeded
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
