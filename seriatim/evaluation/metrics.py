"""Distances between two sets of feature vectors, in float64.

n, m vectors of F features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from seriatim.core.errors import DataError

Array = npt.NDArray[np.float64]


def frechet_distance(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of Gaussians fitted to a (n, F) and b (m, F).

    Dowson & Landau 1982; Heusel et al. 2017, eq. 6. Needs at least two vectors in each. Few vectors bias the value
    upward, so compare it only with that of equally many real ones.
    """
    x, y = checked(a, "a"), checked(b, "b")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features: {x.shape[1]} in one set, {y.shape[1]} in the other; use one extractor for both")
    return gaussian_frechet(x.mean(axis=0), covariance(x), y.mean(axis=0), covariance(y))


def gaussian_frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """The Frechet distance of two Gaussians."""
    # tr (A B)^(1/2) = sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum()
    return float(max(distance, 0.0))


def covariance(x: Array) -> Array:
    centred = x - x.mean(axis=0)
    return np.asarray(centred.T @ centred / (len(x) - 1))


def within_class_variance(x: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The variance around the mean of each class, averaged over classes and features."""
    features, classes = checked(x, "x"), np.asarray(labels)
    parts = [features[classes == c].var(axis=0, ddof=1).mean() for c in np.unique(classes) if (classes == c).sum() > 1]
    if not parts:
        raise DataError("labels: no class has two members; within-class variance needs at least two")
    return float(np.mean(parts))


def checked(x: npt.ArrayLike, name: str) -> Array:
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 2 or len(array) < 2:
        raise DataError(f"{name}: shape {array.shape} is not (n, F) with n of at least 2")
    if not np.isfinite(array).all():
        raise DataError(f"{name}: has features that are not finite")
    return array
