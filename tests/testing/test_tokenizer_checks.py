"""`check_tokenizer` passes sound tokenizers and catches each way to break the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.models.build import seeded
from seriatim.testing import check_tokenizer
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels

IMAGES = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def pixels(kind: Callable[..., Any] = Pixels) -> Any:
    made = kind(size=8, patch=2, channels=1)
    made.fit([IMAGES])
    return made


def test_our_own_pass() -> None:
    check_tokenizer(pixels(), error=1e-5)
    codes = KMeans(size=8, patch=2, channels=1, vocab=6)
    codes.fit([IMAGES])
    check_tokenizer(codes)
    with seeded(0):
        latent = KL(size=8, channels=1, latent_channels=2, block_out_channels=(32, 32), layers_per_block=1)
    latent.fit([IMAGES])
    check_tokenizer(latent)


class WrongShape(Pixels):
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        return super().tokens(moments, keys)[:, :-1]


class LooksAtOthers(Pixels):
    def moments(self, images: Tensor) -> Tensor:
        return super().moments(images) - images.mean()


class Loses(Pixels):
    def decode(self, tokens: Tensor) -> Tensor:
        return 0.5 * super().decode(tokens)


class DrawsFromTorch(Pixels):
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        tokens = super().tokens(moments, keys)
        return tokens if keys is None else tokens + torch.randn(tokens.shape)


class KeepsState(Pixels):
    def fit(self, batches: Any) -> None:
        super().fit(batches)
        self.hidden = 1.0

    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        return super().tokens(moments, keys) + getattr(self, "hidden", 0.0)


class Rounds(Pixels):
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        return (super().tokens(moments, keys) @ torch.eye(4)).float()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (WrongShape, "has shape"),
        (LooksAtOthers, "depend on others"),
        (Loses, "decoded pixels are off"),
        (DrawsFromTorch, "differs with the same keys"),
        (KeepsState, "rebuilt from config and weights"),
        (Rounds, "under autocast"),
    ],
)
def test_each_breach_is_caught(broken: Callable[..., Tokenizer], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_tokenizer(pixels(broken), error=0.01 if broken is Loses else None)
