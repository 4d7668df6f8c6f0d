"""The contract of all tokenizers.

Shapes: B images, c channels, H x W pixels in [-1, 1], h x w = L tokens of D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.device import full_float32
from seriatim.core.errors import DataError, UsageError, shown
from seriatim.core.keys import Keys
from seriatim.core.spec import TokenSpec

CHUNK = 1 << 20  # pixels that pass through a network at once, to bound memory


class Tokenizer(nn.Module):
    """The base class of tokenizers.

    The constructor of a subclass sets
      size       (H, W) of the images
      channels   c, 1 or 3
      levels     the number of values that a pixel can have: 256 for 8 bits
      grid       (h, w)
      dim        D, the number of features of a token, or of a codeword
      vocab      V, the number of codes, if tokens are codes
      pictures   False if `decode` does not return pictures
      config     the constructor's arguments, as plain data
    All other state must be in its state_dict, because loading builds the tokenizer without memory and fills that in.

    A tokenizer moves its inputs to its own device, and its outputs are there. Pictures, moments and tokens of features
    are float32 and are computed in float32, even inside autocast.
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
        """The device of the weights and statistics."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def count(self) -> int:
        """L, the number of tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def spec(self) -> TokenSpec:
        """The spec of an image's tokens; a model for these tokens must have the same."""
        return TokenSpec(self.count, self.dim if self.vocab is None else None, self.vocab, self.grid)

    @property
    def cell(self) -> tuple[int, int]:
        """The height and width of a token in pixels."""
        return self.size[0] // self.grid[0], self.size[1] // self.grid[1]

    def moments(self, images: Tensor) -> Tensor:
        """The parameters of the posterior of images (B, c, H, W) in [-1, 1], which a latent cache stores."""
        raise NotImplementedError(f"{type(self).__name__} lacks moments()")

    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        """Tokens (B, L, D) of about unit variance, sampled from the posterior, or its mode if there are no keys.

        A tokenizer with a vocabulary returns codes (B, L) int64.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks tokens()")

    def decode(self, tokens: Tensor) -> Tensor:
        """The images (B, c, H, W) in [-1, 1] of tokens (B, L, D), or of codes (B, L)."""
        raise NotImplementedError(f"{type(self).__name__} lacks decode()")

    def embeddings(self, codes: Tensor) -> Tensor:
        """The codewords (B, L, D) of codes (B, L)."""
        raise NotImplementedError(f"{type(self).__name__} lacks embeddings()")

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """The images (B, c, H, W) in [-1, 1] of codewords, or means of codewords, (B, L, D)."""
        raise NotImplementedError(f"{type(self).__name__} lacks decode_embeddings()")

    def look(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        """The images (B, c, H, W) of tokens of which only those in the mask `known` (B, L) are known.

        Unknown codes are decoded as the mean codeword.
        """
        if self.vocab is None:
            return self.decode(tokens.float())
        if known is None or bool(known.all()):
            return self.decode(tokens)
        every = torch.arange(self.vocab, device=tokens.device)
        every = torch.cat([every, every.new_zeros(-len(every) % self.count)]).view(-1, self.count)  # (n, L)
        mean = self.embeddings(every).flatten(0, 1)[: self.vocab].mean(dim=0)  # (D,)
        return self.decode_embeddings(torch.where(known[..., None].to(self.device), self.embeddings(tokens), mean))

    def by_parts(self, run: Callable[[Tensor], Tensor], batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`run` of a batch, a few images at a time, which bounds the memory of a network. The result is float32.

        It is computed in full float32, or under autocast to another `dtype`.
        """
        device = batch.device
        with full_float32(device) if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype):
            parts = batch.split(max(1, CHUNK // (self.size[0] * self.size[1])))
            return torch.cat([run(part) for part in parts]).float()

    def check_codes(self, codes: Tensor) -> Tensor:
        """The codes on the tokenizer's device. Raises UsageError unless they are (B, L) int64 in the vocabulary."""
        vocab, L = self.vocab or 0, self.count
        if codes.ndim != 2 or codes.shape[1] != L or codes.dtype != torch.long:
            raise UsageError(f"codes: {codes.dtype} of shape {tuple(codes.shape)} is not allowed; give int64 (B, {L})")
        low, high = torch.stack(codes.aminmax()).tolist() if codes.numel() else (0, 0)  # one read of a device
        if not 0 <= low <= high < max(1, vocab):
            raise UsageError(f"codes: from {low} to {high} are not all in the vocabulary, 0 to {vocab - 1}")
        return codes.to(self.device)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure the statistics that normalise tokens, over batches of images."""
        self.fit_moments(self.moments(images) for images in batches)

    def fit_moments(self, batches: Iterable[Tensor]) -> None:
        """Measure the same statistics over batches of moments, since a latent cache has no images.

        Tokenizers without statistics do nothing here.
        """

    def fingerprint(self) -> str:
        """The sha256 of settings, weights and statistics."""
        return digest_of(type(self).__name__, self.config, self.state_dict())

    def moments_config(self) -> dict[str, Any]:
        """The settings that moments depend on, without those of later steps, such as the patch size."""
        return self.config

    def moments_fingerprint(self) -> str:
        """The sha256 of `moments_config()` and of all weights that moments depend on; a latent cache is keyed by it.

        A tokenizer overrides this if it has weights or statistics that moments don't depend on; otherwise caches would
        be refused without need.
        """
        return self.fingerprint()

    def check_images(self, images: Tensor) -> Tensor:
        """The images as float32 on the tokenizer's device. Raises DataError unless they are (B, c, H, W)."""
        wanted = (self.channels, *self.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise DataError(
                f"images: shape {tuple(images.shape)} is not (B, {', '.join(map(str, wanted))}); "
                "resize them or choose another tokenizer size"
            )
        return images.to(self.device, torch.float32)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """The height and width given by one number for both, or by two numbers."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"size: {shown(size)} is not allowed; it must be a side in pixels, or [height, width]")
    return int(pair[0]), int(pair[1])


def digest_of(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of a name, plain data and tensors."""
    digest = hashlib.sha256(json.dumps([name, config], sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, c, H, W) in [-1, 1] rounded to (B, H, W, c) uint8 on the CPU."""
    x = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to("cpu", torch.uint8)
