"""Orders say which token of an image is generated when. Each order is a pure function of the grid (h, w).

Symbols: B images, L = h w tokens on a grid of h rows and w columns; position p is row p // w, column p % w.

There are two conventions, and `order_vectors` converts between them. Users list the positions in the order in which
they are generated, the first one first. The samplers take tokens from the end of an order vector, as the official code
of MAR does, so that the first m entries of the vector are the tokens that stay unknown.

You can add your own order as a function of (h, w): `seriatim.ORDERS["mine"] = lambda h, w: [...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import torch
from torch import Tensor

from seriatim.core.errors import UsageError, nearest, or_of_plugin
from seriatim.core.keys import Keys

RANDOM = "random"  # not a function of the grid: each image gets its own permutation from its key
RASTER = "raster"
CONFIDENCE = "confidence"  # not a function of the grid: all codes are sampled at once and the likeliest are kept


def raster(h: int, w: int) -> list[int]:
    """The positions row by row, each row from left to right."""
    return list(range(h * w))


def halton(h: int, w: int) -> list[int]:
    """The positions in the order in which the Halton sequence (1960) visits them, far from those generated before.

    Point i = 1, 2, ... is (column, row) = (phi_2(i) w, phi_3(i) h), rounded down, where phi_b(i) is the radical inverse
    of i in base b. The computation uses integers, so that rounding errors cannot change the order. The loop ends,
    because every 2^a 3^b consecutive points put one point into each box of size 2^-a x 3^-b (Halton 1960), and every
    cell contains such a box.
    """
    seen: dict[int, None] = {}  # a dict keeps the order of insertion
    for i in count(1):
        if len(seen) == h * w:
            break
        (x, of_x), (y, of_y) = radical_inverse(i, 2), radical_inverse(i, 3)
        seen.setdefault(y * h // of_y * w + x * w // of_x)
    return list(seen)


def radical_inverse(i: int, base: int) -> tuple[int, int]:
    """The radical inverse phi_base(i) as a fraction (numerator, denominator)."""
    numerator, denominator = 0, 1
    while i:
        i, digit = divmod(i, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator, denominator


def spiral(h: int, w: int) -> list[int]:
    """The positions along a square spiral from the centre outwards: right, down, left, up.

    The parts of the spiral outside a grid that is not square are skipped. With an even number of rows or columns, the
    spiral starts at the upper or left one of the two middle cells.
    """
    cells = ((row, column) for row, column in walk((h - 1) // 2, (w - 1) // 2) if 0 <= row < h and 0 <= column < w)
    return [row * w + column for row, column in islice(cells, h * w)]


def walk(row: int, column: int) -> Iterator[tuple[int, int]]:
    """Iterate over the (row, column) cells of an endless square spiral: 1 right, 1 down, 2 left, 2 up, 3 right, ..."""
    yield row, column
    for turn in count():
        down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn % 4]
        for _ in range(turn // 2 + 1):
            row, column = row + down, column + right
            yield row, column


ORDERS: dict[str, Callable[[int, int], Sequence[int]]] = {RASTER: raster, "halton": halton, "spiral": spiral}


# --- checking ---------------------------------------------------------------------------------------------------


def check_order_name(name: str) -> None:
    names = (RANDOM, CONFIDENCE, *ORDERS)
    if name not in names:
        hint = or_of_plugin(f"{nearest(name, names)}; or give the positions")
        raise UsageError(f"order: {name!r} is not known{hint}")


def check_permutation(positions: Sequence[int], tokens: int, name: str = "order", of: str = "tokens") -> None:
    """Raise UsageError unless `positions` names each of 0..tokens-1 exactly once."""
    what_to_do = f"name each position from 0 to {tokens - 1} once"
    if len(positions) != tokens:
        raise UsageError(f"{name}: {len(positions)} positions given for {tokens} {of}; {what_to_do}")
    seen: set[int] = set()
    for position in positions:
        if not 0 <= position < tokens:
            raise UsageError(f"{name}: position {position} is out of range; {what_to_do}")
        if position in seen:
            raise UsageError(f"{name}: position {position} is given twice; {what_to_do}")
        seen.add(position)


# --- for the samplers -------------------------------------------------------------------------------------------


def order_vectors(order: Tensor | Sequence[int] | str | None, keys: Keys, known: Tensor) -> Tensor:
    """The order vector of each image, (B, L), on the device of `known` (B, L); samplers take tokens from its end.

    `order` lists positions, the first one generated first: (L,) for all images, or (B, L); None draws a random
    permutation for each image from its key. Known tokens are moved to the end of the vector, so that its first m
    entries are the m unknown tokens.
    """
    B, L = known.shape
    if order is None:
        vectors = keys.permutation(L).to(known.device)  # (B, L)
    else:
        vectors = positions_of(order, B, L).to(known.device).flip(-1).expand(B, L)
    last = known.gather(1, vectors).to(torch.uint8).argsort(dim=1, stable=True)  # unknown tokens before known tokens
    return vectors.gather(1, last)


def positions_of(order: Tensor | Sequence[int] | str, images: int, tokens: int) -> Tensor:
    """The given order as a tensor (L,) or (B, L) int64; raises UsageError unless it is a permutation."""
    if isinstance(order, str):
        if order not in ORDERS:  # "random" and "confidence" are not functions of the grid
            raise UsageError(f"order: {order!r} is not allowed here; give the positions, or leave it out")
        raise UsageError(f"order: {order!r} needs a grid here; give seriatim.ORDERS[{order!r}](h, w)")
    given = torch.as_tensor(order)
    if given.ndim not in (1, 2) or given.is_floating_point() or (given.ndim == 2 and len(given) != images):
        allowed = f"({tokens},) for all images or ({images}, {tokens})"
        raise UsageError(f"order: {given.dtype} of shape {tuple(given.shape)} is not allowed; give integers {allowed}")
    for i, row in enumerate(given.reshape(-1, given.shape[-1]).tolist()):
        check_permutation(row, tokens, "order" if given.ndim == 1 else f"order[{i}]")
    return given.long()
