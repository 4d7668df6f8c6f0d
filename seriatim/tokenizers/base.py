"""The contract of a tokenizer.

B images, c channels, H x W pixels in [-1, 1], h x w = L tokens of D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.errors import DataError, UsageError, shown
from seriatim.core.keys import Keys
from seriatim.core.spec import TokenSpec


class Tokenizer(nn.Module):
    """What every tokenizer is.

    A subclass sets, in its constructor,
      size       (H, W) of the images
      channels   c, 1 or 3
      levels     how many values a pixel can have: 256 for 8 bits
      grid       (h, w)
      dim        D, the features of a token, or of a codeword
      vocab      V, how many codes there are, where tokens are codes
      pictures   False where `decode` gives no pictures
      config     the constructor's arguments, as plain data
    All else that it knows is in its state_dict: loading builds it without memory and fills that in.

    Everything that is given to a tokenizer is moved to its device, and everything that it returns is there. Pictures,
    moments and tokens of features are float32 and are computed in float32, inside autocast too.
    """

    size: tuple[int, int]
    channels: int
    levels: int
    grid: tuple[int, int]
    dim: int
    vocab: int | None = None
    pictures: bool = True
    config: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The device of its weights and statistics."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def count(self) -> int:
        """L, the tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def spec(self) -> TokenSpec:
        """The tokens of an image, which those of a model must be."""
        return TokenSpec(self.count, self.dim if self.vocab is None else None, self.vocab, self.grid)

    @property
    def cell(self) -> tuple[int, int]:
        """Pixels of a token, height and width."""
        return self.size[0] // self.grid[0], self.size[1] // self.grid[1]

    def moments(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) in [-1, 1] -> what a latent cache stores: the parameters of a posterior."""
        raise NotImplementedError(f"{type(self).__name__} lacks moments()")

    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        """Moments -> tokens (B, L, D) of about unit variance: a draw from the posterior, or its mode without keys.

        Codes (B, L) int64 where there is a vocabulary.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks tokens()")

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D), or codes (B, L) -> images (B, c, H, W) in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} lacks decode()")

    def embeddings(self, codes: Tensor) -> Tensor:
        """Codes (B, L) -> their codewords (B, L, D)."""
        raise NotImplementedError(f"{type(self).__name__} lacks embeddings()")

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """Codewords, or means of some (B, L, D) -> images (B, c, H, W) in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} lacks decode_embeddings()")

    def look(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        """Tokens of which some are known (B, L) -> images (B, c, H, W); an unknown code shows as the mean codeword."""
        if self.vocab is None:
            return self.decode(tokens.float())
        if known is None or bool(known.all()):
            return self.decode(tokens)
        every = torch.arange(self.vocab, device=tokens.device)
        every = torch.cat([every, every.new_zeros(-len(every) % self.count)]).view(-1, self.count)  # (n, L)
        mean = self.embeddings(every).flatten(0, 1)[: self.vocab].mean(dim=0)  # (D,)
        return self.decode_embeddings(torch.where(known[..., None].to(self.device), self.embeddings(tokens), mean))

    def check_codes(self, codes: Tensor) -> Tensor:
        """The codes on the tokenizer's device; refuses what is not (B, L) int64 inside the vocabulary."""
        vocab, L = self.vocab or 0, self.count
        if codes.ndim != 2 or codes.shape[1] != L or codes.dtype != torch.long:
            raise UsageError(f"codes: {codes.dtype} of shape {tuple(codes.shape)} is not allowed; give int64 (B, {L})")
        low, high = torch.stack(codes.aminmax()).tolist() if codes.numel() else (0, 0)  # one read of a device
        if not 0 <= low <= high < max(1, vocab):
            raise UsageError(f"codes: from {low} to {high} are not all in the vocabulary, 0 to {vocab - 1}")
        return codes.to(self.device)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure, over batches of images, the statistics that normalise tokens."""
        self.fit_moments(self.moments(images) for images in batches)

    def fit_moments(self, batches: Iterable[Tensor]) -> None:
        """The same over batches of moments, which is what a latent cache has. Nothing where nothing is measured."""

    def fingerprint(self) -> str:
        """sha256 of settings, weights and statistics."""
        return digest_of(type(self).__name__, self.config, self.state_dict())

    def moments_config(self) -> dict[str, Any]:
        """The settings that moments depend on; not those of what `tokens` does with them, such as a patch."""
        return self.config

    def moments_fingerprint(self) -> str:
        """What a latent cache is keyed by: sha256 of `moments_config()` and of all weights that moments depend on.

        One with weights or statistics that moments don't depend on says so here, or caches are refused needlessly.
        """
        return self.fingerprint()

    def check_images(self, images: Tensor) -> Tensor:
        """The images as float32 on the tokenizer's device; refuses what is not (B, c, H, W)."""
        wanted = (self.channels, *self.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise DataError(
                f"images: shape {tuple(images.shape)} is not (B, {', '.join(map(str, wanted))}); "
                "resize them or choose another tokenizer size"
            )
        return images.to(self.device, torch.float32)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from one number for both, or from two."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"size: {shown(size)} is not allowed; it must be a side in pixels, or [height, width]")
    return int(pair[0]), int(pair[1])


def digest_of(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a name, plain data and tensors."""
    digest = hashlib.sha256(json.dumps([name, config], sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, c, H, W) in [-1, 1] -> (B, H, W, c) uint8, rounded, on the CPU."""
    x = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to("cpu", torch.uint8)
