"""Who is near whom: precision and recall of a set of samples, and whether they were copied. In float64.

n, m vectors of F features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from seriatim.core.errors import DataError
from seriatim.evaluation.metrics import Array, checked, same_width

CHUNK = 1 << 24  # distances held at a time: 128 MB


def radii(manifold: Array, k: int) -> Array:
    """The way of each vector (n, F) to its k-th nearest neighbour: (n,)."""
    return np.asarray(neighbours(manifold, manifold, k, itself=False)[0][:, -1])


def covered(points: Array, manifold: Array, radius: Array) -> float:
    """The share of `points` in at least one of the balls around the vectors of `manifold`.

    Of samples among real images it is the precision, and the other way round the recall, if each ball reaches to the
    k-th nearest neighbour (`radii`; Kynkaanniemi et al. 2019, eq. 1 and 2).
    """
    inside = [(distances <= radius).any(axis=1) for _, distances in chunks(points, manifold)]
    return float(np.concatenate(inside).mean())


def neighbours(
    points: npt.ArrayLike, among: npt.ArrayLike, k: int, *, itself: bool = True
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Distances (n, k) of each of `points` to its k nearest `among` (m, F), and which these are (n, k).

    Without `itself`, the two are one set and no vector is a neighbour of its own.
    """
    x, y = checked(points, "points"), checked(among, "among")
    same_width(x, y)
    if k > len(y) - (not itself):
        raise DataError(f"k: {k} neighbours among {len(y)} vectors; ask for fewer")
    found, which = [], []
    for first, distances in chunks(x, y):
        if not itself:
            rows = np.arange(len(distances))
            distances[rows, first + rows] = np.inf
        near = np.argpartition(distances, k - 1, axis=1)[:, :k] if k < len(y) else np.argsort(distances, axis=1)
        order = np.take_along_axis(distances, near, axis=1).argsort(axis=1, kind="stable")
        near = np.take_along_axis(near, order, axis=1)
        found.append(np.take_along_axis(distances, near, axis=1))
        which.append(near)
    return np.concatenate(found), np.concatenate(which)


def chunks(x: Array, y: Array) -> Iterator[tuple[int, Array]]:
    """(first row, distances (rows, m)) of a few rows of x at a time to all of y."""
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x y: one product. Centred first, or far from zero all digits would cancel.
    centre = y.mean(axis=0)
    x, y = x - centre, y - centre
    squares = (y**2).sum(axis=1)  # (m,)
    rows = max(1, CHUNK // len(y))
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        squared = (part**2).sum(axis=1, keepdims=True) + squares - 2 * part @ y.T  # (rows, m)
        yield first, np.sqrt(squared.clip(min=0))


def copying(samples: npt.ArrayLike, train: npt.ArrayLike, held_out: npt.ArrayLike) -> float:
    """Median way of samples to their nearest training image, over that of held-out images to theirs.

    About 1: samples are as near to the training images as any new image is. Far below 1: they were copied.
    """
    return float(np.median(neighbours(samples, train, 1)[0]) / usual_way(train, held_out))


def usual_way(train: npt.ArrayLike, held_out: npt.ArrayLike) -> float:
    """Median way of held-out images to their nearest training image."""
    way = float(np.median(neighbours(held_out, train, 1)[0]))
    if way == 0:
        raise DataError("held_out: more than half of its images are training images; hold out others")
    return way
