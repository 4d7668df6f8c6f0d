"""Lengths that are rounded up to a few values in training: the loss and its gradients stay what they are."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from helpers import many, randomise
from torch import nn

from seriatim.core.buckets import bucket_size, padded_counts, padded_length
from seriatim.core.keys import Keys
from seriatim.models.build import build_model, seeded
from seriatim.training.wrapping import bucketed

L = 24
DIFFUSION = {"kind": "diffusion", "width": 12, "depth": 1, "draws": 2}
PARALLEL_INSIDE = {
    "kind": "nested",
    "split": {"kind": "features"},
    "model": {
        "kind": "masked",
        "width": 8,
        "depth": 1,
        "heads": 1,
        "buffer": 1,
        "dropout": 0.0,
        "mask_ratio_per": "image",
        "min_mask_ratio": 0.3,
        "head": {"kind": "mixture", "components": 2, "depth": 0},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "one ratio for all": {"head": DIFFUSION},
    "one for each image": {"head": DIFFUSION, "mask_ratio_per": "image"},
    "codes": {"dim": None, "vocab": 7, "head": {"kind": "categorical"}},
    "a mixture": {"head": {"kind": "mixture", "components": 2, "width": 12, "depth": 1}, "mask_ratio_per": "image"},
    "a parallel model inside": {"head": PARALLEL_INSIDE},
}


def make(**changes: Any) -> nn.Module:
    config = {
        "kind": "masked",
        "tokens": L,
        "dim": 4,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "buffer": 2,
        "dropout": 0.0,
        "classes": 3,
        "min_mask_ratio": 0.2,
        "mask_ratio_std": 0.6,
        **changes,
    }
    with seeded(0):
        model = build_model({name: value for name, value in config.items() if value is not None})
    randomise(model)
    return model.double()


def tokens_of(model: Any, images: int) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(1)
    if model.spec.vocab is not None:
        return torch.randint(model.spec.vocab, (images, L), generator=numbers)
    return torch.randn(images, L, 4, generator=numbers, dtype=torch.float64)


def loss_and_gradients(model: Any, seed: int, images: int = 3) -> dict[str, torch.Tensor]:
    model.zero_grad()
    labels = torch.arange(images) % 3
    loss = model(tokens_of(model, images), labels, many(seed, images), Keys.of(seed))
    loss.sum.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "sum": loss.sum.detach(), "count": loss.count, **{f"part {k}": v for k, v in loss.parts.items()}}


@pytest.mark.parametrize("buckets", [3, 5, 12])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_neither_loss_nor_gradients(name: str, buckets: int) -> None:
    model = make(**MODELS[name])
    for seed in range(3):
        plain = loss_and_gradients(model, seed)
        with bucketed(model, buckets):
            padded = loss_and_gradients(model, seed)
        assert plain.keys() == padded.keys()
        for key, value in plain.items():
            assert torch.allclose(value, padded[key], rtol=1e-9, atol=1e-9), key


def shapes_at_linear_layers(model: nn.Module, images: int) -> dict[str, set[tuple[int, ...]]]:
    """The shapes of the inputs of each Linear over many mask ratios."""
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: found[name].add(tuple(x[0].shape)))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    for seed in range(60):
        loss_and_gradients(model, seed, images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["one ratio for all", "one for each image", "a mixture"])
def test_there_are_at_most_as_many_shapes_as_buckets(name: str) -> None:
    model, buckets = make(**MODELS[name]), 4
    free = shapes_at_linear_layers(model, 2)
    with bucketed(model, buckets):
        bound = shapes_at_linear_layers(model, 2)
    assert free.keys() == bound.keys()
    assert max(len(shapes) for shapes in bound.values()) <= buckets
    assert max(len(shapes) for shapes in free.values()) > 2 * buckets, "without buckets there are many"


def test_buckets_end_with_the_context_and_leave_samples_alone() -> None:
    model: Any = make(head=DIFFUSION)
    known = torch.zeros(1, L, dtype=torch.bool)
    known[0, :5] = True
    condition, tokens = model.condition(torch.tensor([1]), 1), tokens_of(model, 1)
    with torch.no_grad():
        z = model.backbone.z(condition, tokens, known, ~known)
        with bucketed(model, 3):
            assert model.buckets == model.backbone.buckets == 3
            assert torch.equal(model.backbone.z(condition, tokens, known, ~known), z)
    assert model.buckets == model.backbone.buckets == 0


@pytest.mark.parametrize(("most", "buckets"), [(1, 1), (7, 3), (16, 16), (16, 20), (256, 16), (100, 16), (5, 0)])
def test_lengths_take_at_most_so_many_values(most: int, buckets: int) -> None:
    lengths = {padded_length(length, most, buckets) for length in range(1, most + 1)}
    assert all(length <= padded_length(length, most, buckets) <= most for length in range(most + 1))
    assert len(lengths) <= (buckets or most)
    assert all(length % bucket_size(most, buckets) == 0 or length == most for length in lengths)


@pytest.mark.parametrize("images", [1, 3, 8])
def test_counts_are_raised_as_little_as_their_sum_needs(images: int) -> None:
    numbers, most, buckets = torch.Generator().manual_seed(0), 30, 7
    size, sums, tops = bucket_size(most, buckets), set(), set()
    for _ in range(200):
        counts = torch.randint(1, most + 1, (images,), generator=numbers)
        raised = padded_counts(counts, most, buckets)
        assert (raised >= counts).all() and (raised <= padded_length(int(counts.max()), most, buckets)).all()
        assert int((raised - counts).sum()) < images * size
        sums.add(int(raised.sum()))
        tops.add(padded_length(int(raised.max()), most, buckets))
    assert len(sums) <= buckets and len(tops) <= buckets
