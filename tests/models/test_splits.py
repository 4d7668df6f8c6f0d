"""How a nested head cuts its token into parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seriatim.core.errors import UsageError
from seriatim.models.build import build_split
from seriatim.nn.patch import patchify

CASES: list[tuple[dict[str, Any], int]] = [
    ({"kind": "features"}, 3),
    ({"kind": "features", "group": 2, "order": "reversed"}, 4),
    ({"kind": "features", "group": 2, "order": [1, 2, 0]}, 6),
    ({"kind": "rgb"}, 12),
    ({"kind": "patches", "size": 2}, 48),
    ({"kind": "patches", "size": 1, "channels": 1}, 9),
]


@pytest.mark.parametrize(("config", "dim"), CASES, ids=str)
def test_join_is_the_inverse_of_cut(config: dict[str, Any], dim: int) -> None:
    split, x = build_split(config, dim), torch.randn(5, dim)
    parts = split.cut(x)
    assert parts.shape == (5, *split.spec.shape) and torch.equal(split.join(parts), x)
    assert torch.equal(split.summary(x), parts.mean(dim=1))


def test_features_come_in_their_order() -> None:
    x = torch.arange(4.0)[None]
    assert build_split({"kind": "features"}, 4).cut(x)[0].tolist() == [[0], [1], [2], [3]]
    assert build_split({"kind": "features", "group": 2, "order": "reversed"}, 4).cut(x)[0].tolist() == [[2, 3], [0, 1]]
    assert build_split({"kind": "features", "order": [2, 0, 1]}, 3).cut(x[:, :3])[0].tolist() == [[2], [0], [1]]


def test_colours() -> None:
    images = torch.arange(3)[None, :, None, None].expand(1, 3, 2, 2).float()  # a patch whose pixels tell their colour
    assert build_split({"kind": "rgb"}, 12).cut(patchify(images, 2)[0]).tolist() == [[[0.0] * 4, [1.0] * 4, [2.0] * 4]]


def test_patches_of_a_patch_are_those_of_the_image() -> None:
    images = torch.randn(2, 3, 4, 4)
    split = build_split({"kind": "patches", "size": 2}, 48)
    assert split.spec.grid == (2, 2)
    assert torch.equal(split.cut(patchify(images, 4)[:, 0]), patchify(images, 2))


@pytest.mark.parametrize(
    ("config", "dim", "words"),
    [
        ({"kind": "patches", "size": 3}, 48, "size: 3 does not divide a patch of 4 x 4 pixels"),
        ({"kind": "patches", "size": 1}, 10, "channels: 3 does not make a token of 10 features a square patch"),
        ({"kind": "features", "group": 0}, 4, "group: 0 does not divide"),
    ],
)
def test_what_does_not_fit(config: dict[str, Any], dim: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_split(config, dim)
