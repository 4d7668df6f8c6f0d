"""Every model with every head on a device: nothing mixes host and device; the host waits once for a batch of images.

There is no device here but the CPU: `pretend_cuda` stands for one. What it draws is what the CPU draws.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import many, randomise
from pretend_cuda import Pretend, pretend, pretend_cuda, real
from torch import Tensor

from seriatim.core.settings import Settings
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, seeded

B, L, D = 2, 4, 4
LEAF: dict[str, Any] = {"kind": "mixture", "components": 2, "depth": 0}
INNER: dict[str, Any] = {"kind": "causal", "width": 16, "depth": 1, "heads": 2}
SETS: dict[str, Any] = {"kind": "masked", "width": 16, "depth": 1, "heads": 2, "buffer": 2, "dropout": 0.0}
MODEL: dict[str, dict[str, Any]] = {
    "masked": SETS,
    "masked, a ratio for each image": {**SETS, "mask_ratio_per": "image", "min_mask_ratio": 0.2},
    "bidirectional": {**SETS, "backbone": "bidirectional"},
    "raster": INNER,
    "raster, adaln": {**INNER, "conditioning": "both", "positions": "learned"},
    "random": {**INNER, "order": "random"},
}
HEAD: dict[str, dict[str, Any]] = {
    "bins": {"kind": "bins", "bins": 8},
    "categorical": {"kind": "categorical"},
    "diffusion": {"kind": "diffusion", "width": 16, "depth": 1},
    "energy": {"kind": "energy", "width": 16, "depth": 1, "noise": 4},
    "flow": {"kind": "flow", "width": 16, "depth": 1},
    "mixture": {"kind": "mixture", "components": 3, "width": 16, "depth": 1},
    "mixture, full": {"kind": "mixture", "components": 2, "width": 16, "depth": 1, "covariance": "full"},
    "nested": {"kind": "nested", "split": {"kind": "features"}, "model": {**INNER, "head": LEAF}},
    "nested, diffusion": {
        "kind": "nested", "split": {"kind": "features"},
        "model": {**INNER, "head": {"kind": "diffusion", "width": 16, "depth": 1}},
    },
    "nested, sets inside parts": {
        "kind": "nested", "split": {"kind": "features", "group": 2},
        "model": {**INNER, "head": {
            "kind": "nested", "split": {"kind": "features"},
            "model": {**SETS, "buffer": 1, "head": {"kind": "nested", "split": {"kind": "features"},
                                                    "model": {**INNER, "head": LEAF}}},
        }},
    },
    "nested, sets and a guide": {
        "kind": "nested", "split": {"kind": "features"}, "guide": LEAF,
        "model": {**SETS, "head": {"kind": "bins", "bins": 8}},
    },
}  # fmt: skip
DEEP = "nested, sets inside parts"
CASES = [("bidirectional", "energy"), ("bidirectional", "mixture")]
CASES += [(kind, head) for kind in ("masked", "raster", "random") for head in HEAD if head != DEEP]
CASES += [("raster", DEEP)]
CASES += [(kind, head) for kind in MODEL if "," in kind for head in ("categorical", "mixture")]
STEPS = {"diffusion", "flow", "nested, diffusion"}
each = pytest.mark.parametrize(("kind", "head"), CASES)


def make(kind: str, head: str) -> SequenceModel:
    size: dict[str, Any] = {"vocab": 6} if head == "categorical" else {"dim": D}
    with seeded(0):
        model = build_model({**MODEL[kind], "head": HEAD[head]}, tokens=L, classes=2, **size).eval()
    randomise(model, scale=0.1)
    return model


def settings_of(head: str, **more: Any) -> Settings:
    options = {"num_diffusion_steps": 2} if head in STEPS else {}
    return Settings(guidance_scale=2.0, head_options=options, **more)


def arguments(model: SequenceModel, settings: Settings) -> tuple[Any, ...]:
    condition = model.condition(torch.tensor([0, 1]), B)
    return condition, model.null(B, condition), many(0, B), settings


def tokens_of(model: SequenceModel) -> Tensor:
    vocab = model.spec.vocab
    return torch.arange(B * L).view(B, L) % vocab if vocab else many(1, B).normal(L, D)


def same(found: Any, expected: Tensor) -> None:
    assert isinstance(found, Pretend), "what a model returns is on its device"
    torch.testing.assert_close(real(found), expected, atol=1e-3, rtol=1e-3)


@each
@torch.no_grad()
def test_sampling(kind: str, head: str) -> None:
    model, settings = make(kind, head), settings_of(head)
    expected = model.sample(*arguments(model, settings))
    with pretend_cuda() as device:
        there = pretend(copy.deepcopy(model))
        same(there.sample(*arguments(there, settings)), expected)
        given = arguments(there, settings)
        device.reset()
        *_, last = there.steps(*given)
        assert sum(device.reads.values()) == 1, device.reads
        same(last.tokens, expected)


@each
def test_training(kind: str, head: str) -> None:
    model, keys = make(kind, head).train(), many(2, B)
    tokens, labels = tokens_of(model), torch.tensor([0, 1])
    loss = model(tokens, labels, keys, many(3, 1)).mean
    loss.backward()
    with pretend_cuda() as device:
        there = pretend(copy.deepcopy(model))
        there.zero_grad()
        sent = pretend(tokens)
        device.reset()
        found = there(sent, labels, keys, many(3, 1)).mean
        found.backward()
        assert sum(device.reads.values()) == 0, device.reads
        same(found.detach(), loss.detach())
        for a, b in zip(there.parameters(), model.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if b.grad is not None:
                same(a.grad, b.grad)
