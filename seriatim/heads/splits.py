"""How a nested head cuts its token: which features make each part, and which part comes first.

D features of a token, T parts, g features of a part: T g = D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from seriatim.core.construct import construct, pop_kind
from seriatim.core.errors import UsageError
from seriatim.core.orders import check_permutation

Parts = list[list[int]]  # T lists of g features each, the part drawn first in front


def features(dim: int, *, group: int = 1, order: Literal["natural", "reversed"] | Sequence[int] = "natural") -> Parts:
    """Groups of `group` neighbouring features; the order is that of the groups."""
    if group < 1 or dim % group:
        divisors = ", ".join(str(g) for g in range(1, dim + 1) if dim % g == 0)
        raise UsageError(f"group: {group!r} does not divide the {dim} features of a token; choose from {divisors}")
    count = dim // group
    if isinstance(order, str):
        places: Sequence[int] = range(count) if order == "natural" else range(count)[::-1]
    else:
        check_permutation(order, count, of="parts")
        places = order
    return [list(range(place * group, (place + 1) * group)) for place in places]


def rgb(dim: int) -> Parts:
    """A patch of pixels, colour after colour: the red plane, the green one, the blue one (`pixels` lays patches so)."""
    if dim % 3:
        raise UsageError(f"kind: 'rgb' needs patches of three colours; a token of {dim} features is none")
    return features(dim, group=dim // 3)


SPLITS: dict[str, Callable[..., Parts]] = {"features": features, "rgb": rgb}


def build_split(config: Mapping[str, Any], dim: int, where: str = "split") -> Parts:
    """`{"kind": "features", "group": 2}` -> the parts of a token of D features."""
    kind, rest = pop_kind(config, SPLITS, where)
    parts = construct(SPLITS[kind], rest, where, dim=dim)
    if len({len(part) for part in parts}) != 1 or sorted(i for part in parts for i in part) != list(range(dim)):
        raise UsageError(f"{where}: {kind!r} does not cut {dim} features into parts of one size")
    return parts
