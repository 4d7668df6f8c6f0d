"""Letters, digits and flags are not mirrored; pictures without a side are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from seriatim.data.mirroring import Mirroring, may_mirror, odd_features, telling_names


def digits(count: int, mirrored: bool = False) -> tuple[torch.Tensor, list[int]]:
    """Handwritten digits as colour pictures of 32x32 pixels; with `mirrored` half are mirror images."""
    values, labels = load_digits(return_X_y=True)
    levels = (values[:count].reshape(-1, 8, 8) * 15.9).astype(np.uint8)
    large = [np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC)) for each in levels]
    pixels = torch.from_numpy(np.stack(large))[:, None].expand(-1, 3, -1, -1).clone()
    if mirrored:
        chosen = torch.from_numpy(np.random.default_rng(1).random(count) < 0.5)  # whatever the digit
        pixels[chosen] = pixels[chosen].flip(-1)
    return pixels, labels[:count].tolist()


def clouds(count: int) -> torch.Tensor:
    """Smooth coloured noise, which has no side."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC)) for each in small]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2)


def decided(pixels: torch.Tensor, labels: list[int] | None = None, classes: int = 0) -> Mirroring:
    return may_mirror(pixels, labels or [0] * len(pixels), [f"kind {i}." for i in range(classes)])


def test_digits_are_told_from_their_mirror_images() -> None:
    pixels, labels = digits(300)
    found = decided(pixels, labels, 10)
    assert not found.allowed and found.accuracy is not None and found.accuracy > 0.8 and found.images == 300
    assert "from their mirror images" in found.why


def test_the_same_digits_in_both_directions_may_be_mirrored() -> None:
    """What decides is the direction, and not that they are digits."""
    pixels, labels = digits(300, mirrored=True)
    found = decided(pixels, labels, 10)
    assert found.allowed and found.accuracy is not None and 0.35 < found.accuracy < 0.6


def test_pictures_without_a_side_may_be_mirrored() -> None:
    found = decided(clouds(300))
    assert found.allowed and found.accuracy is not None and 0.4 < found.accuracy < 0.6


def test_one_class_of_digits_among_others_decides() -> None:
    """Of all pictures few are told from their mirror images, but nearly all of that class."""
    pixels, _ = digits(60)
    both = torch.cat([clouds(500), pixels])
    found = decided(both, [0] * 500 + [1] * 60, 2)
    assert not found.allowed and "of 'kind 1.'" in found.why


def test_few_pictures_can_not_tell() -> None:
    found = decided(clouds(39))
    assert not found.allowed and found.accuracy is None and "39 pictures are too few" in found.why


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["Flags", "faces"], []),
        (["road signs"], []),
        (["a", "b", "c"], []),
        ([str(i) for i in range(10)], []),
        ([], [f"letter_{i}.png" for i in range(3)]),
    ],
)
def test_names_that_tell(names: list[str], files: list[str]) -> None:
    found = may_mirror(clouds(100), [0] * 100, names, files)
    assert not found.allowed and "names tell" in found.why and found.accuracy is None


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["flagpole", "assignment", "dogs"], []),
        (["x", "cat"], []),
        ([], ["sign.png", "tree.png", "house.png"]),
        (["automobile"], ["flags/house.png"]),
    ],
)
def test_names_that_do_not_tell(names: list[str], files: list[str]) -> None:
    assert telling_names(names, files) == ""


def test_features_change_their_sign_with_the_direction() -> None:
    pixels = clouds(50)
    features = odd_features(torch.cat([pixels, pixels.flip(-1)]))
    assert np.allclose(features[:50], -features[50:], atol=1e-4) and np.abs(features).max() > 0.01


def test_pictures_of_one_colour_are_no_error() -> None:
    found = decided(torch.full((60, 3, 32, 32), 255, dtype=torch.uint8))
    assert found.allowed or found.accuracy is not None
