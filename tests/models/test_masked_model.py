"""The masked model: its loss, its order, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import many, naive, randomise
from typing_extensions import override

from seriatim.backbones.causal_transformer import Causal
from seriatim.backbones.masked_transformer import Masked
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.core.schedules import mask_ratio
from seriatim.heads.base import Head, HeadLoss
from seriatim.heads.diffusion import Diffusion
from seriatim.models.build import seeded
from seriatim.models.masked_model import MaskedModel

L, D = 9, 4


def make(classes: int = 3, **options: Any) -> MaskedModel:
    with seeded(0):
        return MaskedModel(
            Masked(L, D, width=32, depth=1, heads=2, buffer=2, dropout=0.0),
            Diffusion(D, 32, 2),
            classes=classes,
            **options,
        )


class Recorder(Head):
    """Writes down what it is asked to model."""

    output = D

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[torch.Tensor] = []

    @override
    def loss(self, z: torch.Tensor, target: torch.Tensor, keys: Keys) -> HeadLoss:
        self.targets.append(target)
        rows = z.mean(dim=1) + torch.arange(len(z))
        return HeadLoss(2 * rows, torch.full((len(z),), 2.0), {"part": rows})


def test_the_head_sees_the_masked_tokens_and_only_those() -> None:
    head = Recorder()
    model = MaskedModel(Masked(L, D, width=32, depth=1, heads=2, buffer=2), head, classes=0)
    tokens = torch.arange(5 * L * D, dtype=torch.float32).view(5, L, D)
    for seed in range(20):
        model(tokens, None, many(seed, 5), Keys.of(seed, "step"))
        target = head.targets[-1]
        masked = math.ceil(L * mask_ratio(float(Keys.of(seed, "step").fold("ratio").uniform())))
        assert target.shape == (5 * masked, D), "one ratio for the batch, every image masked alike"
        images = (target[:, 0] // (L * D)).long()
        assert torch.equal(images, torch.arange(5).repeat_interleave(masked)), "image by image"
        places = (target[:, 0] % (L * D) / D).view(5, masked)
        assert (places.diff(dim=1) > 0).all(), "in raster order"
    assert len({tuple(t[:, 0].tolist()) for t in head.targets}) > 10, "another mask each time"


def test_the_mean_weighs_tokens_and_draws_alike() -> None:
    model = MaskedModel(Masked(L, D, width=32, depth=1, heads=2, buffer=2), Recorder(), classes=0)
    loss = model(torch.randn(2, L, D), None, many(0, 2))
    assert loss.mean.item() == pytest.approx(loss.parts["part"].item() / loss.count.item() * 2, rel=1e-5)
    assert loss.count.item() == 2 * math.ceil(loss.count.item() / 2) and not loss.parts["part"].requires_grad


def test_labels_are_dropped_in_training_only() -> None:
    seen: list[torch.Tensor] = []
    model = make(label_dropout=0.5)
    inner = model.losses

    def watched(tokens: torch.Tensor, condition: Condition, keys: Keys, step: Keys | None = None) -> HeadLoss:
        seen.append(condition.vectors[:, 0])
        return inner(tokens, condition, keys, step)

    model.losses = watched  # type: ignore[method-assign]
    tokens, labels = torch.randn(200, L, D), torch.ones(200, dtype=torch.long)
    no_class, embedding = (model.conditioner.get_parameter(name) for name in ("no_class", "class_embedding"))
    model.train()(tokens, labels, many(0, 200))
    dropped = (seen[0] == no_class).all(dim=1)
    assert 60 < int(dropped.sum()) < 140
    assert torch.equal(seen[0][~dropped], embedding[1].expand(int((~dropped).sum()), -1))
    model.eval()(tokens, labels, many(0, 200))
    assert not (seen[1] == no_class).all(dim=1).any()


def test_the_same_keys_give_the_same_loss() -> None:
    model, tokens, labels = make().eval(), torch.randn(4, L, D), torch.tensor([0, 1, 2, 0])
    losses = [model(tokens, labels, many(seed, 4)).mean.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(3)
    first = model(tokens, labels).mean.item()
    torch.manual_seed(3)
    assert model(tokens, labels).mean.item() == first, "without noise, torch's own generator decides"


def test_it_overfits_one_batch_and_draws_it_back() -> None:
    """Two classes, one image each: after training, asking for a class gives its image."""
    with seeded(1):
        model = MaskedModel(
            Masked(4, 2, width=48, depth=1, heads=2, buffer=2, dropout=0.0),
            Diffusion(2, 64, 2),
            classes=2,
            label_dropout=0.0,
            min_mask_ratio=0.2,
            mask_ratio_std=1.0,
        )
    images = torch.tensor([[[1.0, -1.0]] * 4, [[-1.0, 0.5]] * 4]) * torch.tensor([1.0, -1.0, 0.5, 0.8])[None, :, None]
    tokens, labels = images.repeat(32, 1, 1), torch.tensor([0, 1]).repeat(32)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(500):
        loss = model(tokens, labels, many(step, 64)).mean
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.25 * first
    drawn = naive(model.eval(), torch.tensor([0, 1] * 8), Keys.of_seeds(range(16)), steps=4, num_diffusion_steps=25)
    error = (drawn - images.repeat(8, 1, 1)).abs()
    assert float(error.mean()) < 0.15, float(error.mean())


def test_unconditional_models_need_no_labels() -> None:
    model = make(classes=0).eval()
    randomise(model, scale=0.05)
    drawn = naive(model, None, Keys.of_seeds([1, 2]), steps=3, num_diffusion_steps=5)
    assert drawn.shape == (2, L, D) and bool(torch.isfinite(drawn).all())
    assert not any("class_embedding" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        ([0, 3], 3, "labels: 3 is not allowed; they must be from 0 to 2, or -1 for no class"),
        ([0, -2], 3, "labels: -2 is not allowed; they must be from 0 to 2"),
        ([0, -1], 0, "labels: got 0, but this model is unconditional"),
        ([0, 1, 2], 3, "one integer for each image"),
    ],
)
def test_bad_labels_are_named(labels: list[int], classes: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(classes=classes)(torch.randn(2, L, D), torch.tensor(labels))


def test_bad_models_are_named() -> None:
    with pytest.raises(UsageError, match="head: it draws 5 features"):
        MaskedModel(Masked(L, D, width=32, depth=1), Diffusion(5, 16, 1))
    for option in ({"label_dropout": 2.0}, {"min_mask_ratio": 0.0}, {"mask_ratio_std": 0.0}, {"classes": -1}):
        with pytest.raises(UsageError, match=next(iter(option))):
            make(**{"classes": 3, **option})  # type: ignore[arg-type]


def test_tokens_of_another_shape_are_named() -> None:
    with pytest.raises(UsageError, match=r"tokens: shape \(2, 8, 4\) is not \(B, 9, 4\)"):
        make()(torch.randn(2, 8, D))


def test_a_mask_ratio_of_each_image() -> None:
    """As in FractalMAR: images of a batch have different numbers of masked tokens, each as alone."""
    model = make(mask_ratio_per="image", min_mask_ratio=0.2, mask_ratio_std=1.0).eval()
    tokens, labels, keys = torch.randn(6, L, D), torch.arange(6) % 3, many(1, 6)
    with torch.no_grad():
        together = model.losses(tokens, model.condition(labels, 6), keys, Keys.of(9))
        assert len(set(together.count.tolist())) > 2
        for i in range(6):
            one = slice(i, i + 1)
            alone = model.losses(tokens[one], model.condition(labels[one], 1), keys.select(one))
            assert alone.count.item() == together.count[i].item()
            assert alone.sum.item() == pytest.approx(together.sum[i].item(), rel=1e-4)


def test_what_is_no_parallel_backbone_is_refused() -> None:
    with pytest.raises(UsageError, match="backbone: Causal is not parallel"):
        MaskedModel(Causal(L, D, width=32, depth=1), Diffusion(D, 16, 1))  # type: ignore[arg-type]
