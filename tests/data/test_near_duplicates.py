"""Near duplicates are found, and similar pictures are not taken for them."""

from __future__ import annotations

import torch
from data.test_mirroring import clouds
from torch import Tensor

from seriatim.data.near_duplicates import near_duplicates


def numbers(found: Tensor) -> list[int]:
    return found.nonzero()[:, 0].tolist()


def test_copies_with_small_changes_are_found() -> None:
    pixels = clouds(700)  # more than are compared at once
    changed = (
        pixels[[3, 650]].float() * 0.98 + 3 + torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    )
    found = near_duplicates(torch.cat([pixels, changed.clamp(0, 255).to(torch.uint8)]))
    assert numbers(found) == [3, 650, 700, 701]


def test_other_pictures_are_none() -> None:
    pixels = clouds(100)
    assert not near_duplicates(pixels).any()
    assert not near_duplicates(torch.cat([pixels[:1], pixels[:1].flip(-1), 255 - pixels[:1]])).any()
    darker = (pixels[:1].float() * 0.4).to(torch.uint8)
    assert not near_duplicates(torch.cat([pixels[:1], darker])).any(), "the same picture, but much darker"


def test_pictures_of_one_colour_are_compared_by_it() -> None:
    levels = torch.tensor([10, 10, 200, 90], dtype=torch.uint8)
    assert numbers(near_duplicates(levels[:, None, None, None].expand(4, 3, 8, 8))) == [0, 1]
    assert not near_duplicates(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).any()
