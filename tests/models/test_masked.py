"""The masked model: its loss, its order, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import randomise
from typing_extensions import override

from seriatim.backbones.masked_transformer import Masked
from seriatim.core.errors import UsageError
from seriatim.core.random import Noise
from seriatim.core.schedules import mask_ratio
from seriatim.heads.base import Head, HeadLoss
from seriatim.heads.diffusion import Diffusion
from seriatim.models.build import seeded
from seriatim.models.masked_model import MaskedModel

L, D = 9, 4


def make(classes: int = 3, **options: float) -> MaskedModel:
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
    def loss(self, z: torch.Tensor, target: torch.Tensor, noise: Noise) -> HeadLoss:
        self.targets.append(target)
        rows = z.mean(dim=1) + torch.arange(len(z))
        return HeadLoss(2 * rows, torch.full((len(z),), 2.0), {"part": rows})


def test_the_head_sees_the_masked_tokens_and_only_those() -> None:
    head = Recorder()
    model = MaskedModel(Masked(L, D, width=32, depth=1, heads=2, buffer=2), head, classes=0)
    tokens = torch.arange(5 * L * D, dtype=torch.float32).view(5, L, D)
    for seed in range(20):
        model.loss(tokens, None, Noise.shared(seed, 5))
        target = head.targets[-1]
        masked = math.ceil(L * mask_ratio(Noise.shared(seed, 5).once()))
        assert target.shape == (5 * masked, D), "one ratio for the batch, every image masked alike"
        images = (target[:, 0] // (L * D)).long()
        assert torch.equal(images, torch.arange(5).repeat_interleave(masked)), "image by image"
        places = (target[:, 0] % (L * D) / D).view(5, masked)
        assert (places.diff(dim=1) > 0).all(), "in raster order"
    assert len({tuple(t[:, 0].tolist()) for t in head.targets}) > 10, "another mask each time"


def test_the_mean_weighs_tokens_and_draws_alike() -> None:
    model = MaskedModel(Masked(L, D, width=32, depth=1, heads=2, buffer=2), Recorder(), classes=0)
    loss = model.loss(torch.randn(2, L, D), None, Noise.shared(0, 2))
    assert loss.mean.item() == pytest.approx(2 * loss.parts["part"].item(), rel=1e-5)


def test_labels_are_dropped_in_training_only() -> None:
    seen: list[torch.Tensor] = []
    model = make(label_dropout=0.5)
    start = model.backbone.start
    model.backbone.start = lambda condition, B: (seen.append(condition), start(condition, B))[1]  # type: ignore[method-assign, func-returns-value]
    tokens, labels = torch.randn(200, L, D), torch.ones(200, dtype=torch.long)
    model.train().loss(tokens, labels, Noise.shared(0, 200))
    dropped = (seen[0] == model.no_class).all(dim=1)
    assert 60 < int(dropped.sum()) < 140
    assert torch.equal(seen[0][~dropped], model.class_embedding[1].expand(int((~dropped).sum()), -1))
    model.eval().loss(tokens, labels, Noise.shared(0, 200))
    assert not (seen[1] == model.no_class).all(dim=1).any()


def test_the_same_noise_gives_the_same_loss() -> None:
    model, tokens, labels = make().eval(), torch.randn(4, L, D), torch.tensor([0, 1, 2, 0])
    losses = [model.loss(tokens, labels, Noise.shared(seed, 4)).mean.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(3)
    first = model.loss(tokens, labels).mean.item()
    torch.manual_seed(3)
    assert model.loss(tokens, labels).mean.item() == first, "without noise, torch's own generator decides"


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
        loss = model.loss(tokens, labels, Noise.shared(step, 64)).mean
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.25 * first
    drawn = model.eval().sample(torch.tensor([0, 1] * 8), Noise.per_image(range(16)), steps=4, num_diffusion_steps=25)
    error = (drawn - images.repeat(8, 1, 1)).abs()
    assert float(error.mean()) < 0.15, float(error.mean())


def test_unconditional_models_need_no_labels() -> None:
    model = make(classes=0).eval()
    randomise(model, scale=0.05)
    drawn = model.sample(None, Noise.per_image([1, 2]), steps=3, num_diffusion_steps=5)
    assert drawn.shape == (2, L, D) and bool(torch.isfinite(drawn).all())
    assert not any("class_embedding" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        ([0, 3], 3, "labels: 3 is not allowed; they must be from 0 to 2, or -1 for no class"),
        ([0, -2], 3, "labels: -2 is not allowed; they must be from 0 to 2"),
        ([0, -1], 0, "labels: 0 is not allowed; they must be -1, without classes"),
        ([0, 1, 2], 3, "one for each image"),
    ],
)
def test_bad_labels_are_named(labels: list[int], classes: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(classes=classes).loss(torch.randn(2, L, D), torch.tensor(labels))


def test_bad_models_are_named() -> None:
    with pytest.raises(UsageError, match="head: it draws 5 features"):
        MaskedModel(Masked(L, D, width=32, depth=1), Diffusion(5, 16, 1))
    for option in ({"label_dropout": 2.0}, {"min_mask_ratio": 0.0}, {"mask_ratio_std": 0.0}, {"classes": -1}):
        with pytest.raises(UsageError, match=next(iter(option))):
            make(**{"classes": 3, **option})  # type: ignore[arg-type]


def test_tokens_of_another_shape_are_named() -> None:
    with pytest.raises(UsageError, match=r"tokens: shape \(2, 8, 4\) is not \(B, 9, 4\)"):
        make().loss(torch.randn(2, 8, D))
