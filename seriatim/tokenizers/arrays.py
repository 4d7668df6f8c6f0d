"""The tokenizer for data that are tokens already: sequences other than pictures, or tokens from another tokenizer.

Shapes: B sequences, L tokens of D features, or L codes of a vocabulary of V.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from seriatim.core.errors import DataError, UsageError
from seriatim.core.keys import Keys
from seriatim.tokenizers.base import Tokenizer

FLOOR = 1e-6  # least standard deviation relative to the mean, so that a constant feature is not divided by almost 0


class Arrays(Tokenizer):
    """Normalises features to zero mean and unit variance, which `fit` measures once; codes are left as they are.

    `decode` returns (B, L, D) in the units of the data, or codes (B, L), and never pictures. `size` is (1, L) and
    `channels` is D, as in the data; codes have 1 channel.
    """

    pictures = False

    def __init__(self, size: Sequence[int], channels: int = 1, *, vocab: int | None = None) -> None:
        super().__init__()
        if len(size) != 2 or size[0] != 1 or size[1] < 1:
            raise UsageError(f"size: {list(size)!r} is not allowed; for arrays it must be [1, tokens]")
        if channels < 1 or (vocab is not None and channels != 1):
            raise UsageError(
                f"channels: {channels!r} is not allowed; it must be the number of features of a token, or 1 for codes"
            )
        if vocab is not None and vocab < 2:
            raise UsageError(
                f"vocab: {vocab!r} is not allowed; it must be at least 2, or absent if tokens are features"
            )
        self.size = self.grid = (1, int(size[1]))
        self.channels = self.dim = channels
        self.levels, self.vocab = 256, vocab
        self.config = {"size": list(self.size), "channels": channels, "vocab": vocab}
        self.mean: Tensor
        self.std: Tensor
        self.measured: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("measured", torch.tensor(False, device="cpu"))

    def moments(self, images: Tensor) -> Tensor:
        """The moments (B, D, 1, L) of tokens (B, L, D), or (B, 1, 1, L) of codes (B, L)."""
        moments = images[:, None] if images.ndim == 2 else images.transpose(1, 2)
        return self.check_moments(moments[:, :, None])  # float32 for features, int64 for codes

    @override
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        x = self.check_moments(moments).flatten(2).transpose(1, 2)  # (B, L, D)
        return x[..., 0] if self.vocab is not None else (x - self.mean) / self.std

    def decode(self, tokens: Tensor) -> Tensor:
        if self.vocab is not None:
            return self.check_codes(tokens)
        return tokens.to(self.device, torch.float32) * self.std + self.mean

    @override
    def look(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        return self.decode(tokens)

    @override
    def embeddings(self, codes: Tensor) -> Tensor:
        raise UsageError("tokenizer: arrays of codes come without codewords; use the tokenizer that made the codes")

    @override
    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        raise UsageError("tokenizer: arrays of codes come without codewords; use the tokenizer that made the codes")

    def check_moments(self, moments: Tensor) -> Tensor:
        """The moments on the tokenizer's device.

        Raises DataError if they have another shape, are features in the place of codes or the other way round, or are
        codes outside the vocabulary.
        """
        wanted = (self.channels, *self.size)
        if moments.ndim != 4 or tuple(moments.shape[1:]) != wanted:
            length, features = moments.shape[-1], moments.shape[1]
            raise DataError(
                f"arrays: {length} tokens of {features} features, but the tokenizer takes {self.count} of "
                f"{self.channels}; name arrays of that shape"
            )
        if self.vocab is None:
            if not moments.is_floating_point():
                raise DataError("arrays: they are whole numbers; set tokenizer.vocab if they are codes")
            return moments.to(self.device, torch.float32)
        elif moments.dtype != torch.int64:
            raise DataError("arrays: codes are whole numbers, int64; leave out tokenizer.vocab if they are features")
        self.check_codes(moments[:, 0, 0])
        return moments.to(self.device)

    def fit(self, batches: Iterable[Tensor]) -> None:
        if not self.measured:
            super().fit(batches)

    def fit_moments(self, batches: Iterable[Tensor]) -> None:
        if self.measured or self.vocab is not None:
            return
        count, mean, squares = 0, torch.zeros(self.dim, dtype=torch.float64), torch.zeros(self.dim, dtype=torch.float64)
        for batch in batches:  # Chan et al. 1983: joining means and squared deviations keeps all digits
            x = self.check_moments(batch).detach().cpu().double().transpose(0, 1).flatten(1)  # (D, n)
            new, total = x.mean(dim=1), count + x.shape[1]
            shift = new - mean
            squares += (x - new[:, None]).square().sum(dim=1) + shift.square() * count * x.shape[1] / total
            mean, count = mean + shift * x.shape[1] / total, total
        if not count:
            raise DataError("no arrays to measure: the tokenizer needs at least one")
        std = (squares / count).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(std.maximum(FLOOR * mean.abs()).clamp(min=1e-12))
        self.measured.fill_(True)
