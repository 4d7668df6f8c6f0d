"""A size is a side, or height and width, for every tokenizer alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seriatim.core.errors import UsageError
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.detok import Detok
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.vq import VQ

SMALL: list[tuple[type[Tokenizer], dict[str, Any]]] = [
    (Pixels, {}),
    (KMeans, {}),
    (Detok, {"stride": 4, "width": 16, "depth": 1, "heads": 2}),
    (VQ, {"block_out_channels": [32], "latent_channels": 32, "layers_per_block": 1, "vocab": 4}),
]


@pytest.mark.parametrize(("cls", "options"), SMALL)
@pytest.mark.parametrize("size", [(8, 8, 8), (8,), (), 0, -8, (0, 8), (8, -8)])
def test_sizes_that_are_none(cls: Any, options: dict[str, Any], size: Any) -> None:
    with torch.device("meta"), pytest.raises(UsageError, match=r"^size: .* it must be a side in pixels, or"):
        cls(size, **options)


@pytest.mark.parametrize(("cls", "options"), SMALL)
def test_sizes(cls: Any, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        assert cls(8, **options).size == cls([8, 8], **options).size == (8, 8)
        assert cls((4, 8), **options).size == (4, 8)
