"""Splits say how a nested head cuts a token: which features form each part, and in which order the parts come.

Shapes: N tokens, D features of a token, T parts, g features of a part, with T g = D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.orders import check_permutation
from seriatim.core.spec import TokenSpec


class Split:
    """The contract of a split, and the implementation for splits that only select features.

    `spec` describes the parts as a sequence of T tokens of g features. A split whose parts are not features (codes, for
    example) overrides `cut`, `join` and `spec`.
    """

    spec: TokenSpec  # T parts, each g features or one of V codes
    config: dict[str, Any]  # the constructor's arguments without dim, as plain data

    def __init__(self, dim: int, parts: Sequence[Sequence[int]], grid: tuple[int, int] | None = None) -> None:
        """`parts` lists the features of each part, in the order in which the parts are generated."""
        flat = [i for part in parts for i in part]
        if len({len(part) for part in parts}) != 1 or sorted(flat) != list(range(dim)):
            raise UsageError(f"split: {type(self).__name__} does not cut {dim} features into parts of one size")
        self.dim = dim
        self.spec = TokenSpec(len(parts), dim=len(parts[0]), grid=grid)
        self._order = None if flat == sorted(flat) else torch.tensor(flat, device="cpu")  # None if already in order
        self._back = torch.tensor(sorted(range(dim), key=flat.__getitem__), device="cpu")

    def cut(self, tokens: Tensor) -> Tensor:
        """The parts (N, T, g) of tokens (N, D), in the order of generation."""
        if tokens.ndim != 2 or tokens.shape[1] != self.dim:
            raise UsageError(
                f"tokens: shape {tuple(tokens.shape)} does not fit a head of {self.spec.count} parts of "
                f"{self.spec.dim}; give (N, {self.dim})"
            )
        x = tokens if self._order is None else tokens.index_select(1, self._order.to(tokens.device))
        return x.reshape(len(x), *self.spec.shape)

    def join(self, parts: Tensor) -> Tensor:
        """The tokens (N, D) of parts (N, T, g); the inverse of `cut`."""
        x = parts.flatten(1)
        return x if self._order is None else x.index_select(1, self._back.to(x.device))

    def summary(self, tokens: Tensor) -> Tensor:
        """The summary (N, g) that a guide generates before the parts; here the mean of the parts."""
        return self.cut(tokens).mean(dim=1)


class Features(Split):
    """Parts of `group` neighbouring features each; `order` is the order in which the groups are generated."""

    def __init__(
        self, dim: int, *, group: int = 1, order: Literal["natural", "reversed"] | Sequence[int] = "natural"
    ) -> None:
        if group < 1 or dim % group:
            divisors = ", ".join(str(g) for g in range(1, dim + 1) if dim % g == 0)
            raise UsageError(f"group: {group!r} does not divide the {dim} features of a token; choose from {divisors}")
        count = dim // group
        if isinstance(order, str):
            places: Sequence[int] = range(count) if order == "natural" else range(count)[::-1]
        else:
            check_permutation(order, count, of="parts")
            places = order
        super().__init__(dim, [list(range(place * group, (place + 1) * group)) for place in places])
        self.config = {"group": group, "order": order if isinstance(order, str) else list(order)}


class RGB(Split):
    """Splits a patch of pixels into its red, green and blue planes (in the layout of the `pixels` tokenizer)."""

    def __init__(self, dim: int) -> None:
        if dim % 3:
            raise UsageError(f"kind: 'rgb' needs patches of three colours; a token of {dim} features is none")
        super().__init__(dim, [list(range(c * dim // 3, (c + 1) * dim // 3)) for c in range(3)])
        self.config = {}


class Patches(Split):
    """Splits a patch of `channels` x p x p pixels into patches of s x s, row by row on a grid of (p/s, p/s)."""

    def __init__(self, dim: int, *, size: int, channels: int = 3) -> None:
        side = round((dim / channels) ** 0.5) if channels >= 1 else 0
        if channels < 1 or channels * side * side != dim:
            raise UsageError(f"channels: {channels!r} does not make a token of {dim} features a square patch")
        if size < 1 or side % size:
            raise UsageError(f"size: {size!r} does not divide a patch of {side} x {side} pixels")
        index = torch.arange(dim, device="cpu").view(channels, side // size, size, side // size, size)
        parts = index.permute(1, 3, 0, 2, 4).reshape(-1, channels * size * size).tolist()
        super().__init__(dim, parts, grid=(side // size, side // size))
        self.config = {"size": size, "channels": channels}
