"""LPIPS from a file of its weights: the layers of VGG-16, their weights of channels, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from seriatim.core.errors import CheckpointError, UsageError
from seriatim.evaluation.features import open_features
from seriatim.evaluation.lpips import SCALE, SHIFT, SLICES
from seriatim.training.perceptual import open_perceptual


def official() -> dict[str, torch.Tensor]:
    """Random tensors by the names that the `lpips` package gives them."""
    random, inner = torch.Generator().manual_seed(0), 3
    found: dict[str, torch.Tensor] = {}
    for number, convolutions in enumerate(SLICES):
        for layer, outer in convolutions:
            found[f"net.slice{number + 1}.{layer}.weight"] = (
                torch.randn(outer, inner, 3, 3, generator=random) / (4.5 * inner) ** 0.5
            )
            found[f"net.slice{number + 1}.{layer}.bias"] = 0.1 * torch.randn(outer, generator=random)
            inner = outer
        found[f"lin{number}.model.1.weight"] = torch.rand(1, inner, 1, 1, generator=random)
        found[f"lins.{number}.model.1.weight"] = found[f"lin{number}.model.1.weight"]
    return found | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}


def by_hand(tensors: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """LPIPS as its paper defines it, eq. 1."""
    both = [(z - torch.tensor(SHIFT).view(3, 1, 1)) / torch.tensor(SCALE).view(3, 1, 1) for z in (x, y)]
    total = torch.zeros(len(x))
    for number, convolutions in enumerate(SLICES):
        if number:
            both = [F.max_pool2d(z, 2) for z in both]
        for layer, _ in convolutions:
            weight, bias = (tensors[f"net.slice{number + 1}.{layer}.{kind}"] for kind in ("weight", "bias"))
            both = [F.relu(F.conv2d(z, weight, bias, padding=1)) for z in both]
        a, b = (F.normalize(z, dim=1) for z in both)
        total += F.conv2d((a - b) ** 2, tensors[f"lin{number}.model.1.weight"]).mean(dim=(1, 2, 3))
    return total


def test_the_distance_is_that_of_the_paper(tmp_path: Path) -> None:
    tensors = official()
    torch.save(tensors, tmp_path / "lpips.pth")
    distance = open_perceptual(
        f"lpips:{tmp_path / 'lpips.pth'}", [], size=(16, 16), channels=3, device=torch.device("cpu")
    )
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    assert torch.allclose(distance(y, x), by_hand(tensors, y, x), rtol=1e-3)


def test_files_that_are_not_lpips_and_images_that_are_too_small_are_one_line(tmp_path: Path) -> None:
    tensors = official()
    del tensors["lin3.model.1.weight"]
    torch.save(tensors, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"lin3\.model\.1\.weight"):
        open_features(f"lpips:{tmp_path / 'less.pth'}", size=(16, 16), channels=3)
    for which, size, says in (("lpips", 16, "needs the file"), ("lpips:nowhere", 16, "needs the file")):
        with pytest.raises(UsageError, match=says):
            open_features(which, size=(size, size), channels=3)
    with pytest.raises(UsageError, match="at least 16 pixels"):
        open_features(f"lpips:{tmp_path / 'less.pth'}", size=(8, 8), channels=3)
