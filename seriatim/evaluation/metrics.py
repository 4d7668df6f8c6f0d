"""Figures of one or two sets of feature vectors, in float64.

n, m vectors of F features; K classes.

Ours, though torchmetrics has some: its FID, KID and inception score take images, of its own Inception unless wrapped,
and keep float32 features; its `poly_mmd` wants equally many of both. A test compares with it where it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    same_width(x, y)
    return gaussian_frechet(x.mean(axis=0), covariance(x), y.mean(axis=0), covariance(y))


def gaussian_frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array, root: Array | None = None) -> float:
    """The Frechet distance of two Gaussians; `root` is that of cov_a, for who compares many with one."""
    # tr (A B)^(1/2) = sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    root = matrix_root(cov_a) if root is None else root
    cross = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum()
    return float(max(distance, 0.0))


def matrix_root(matrix: Array) -> Array:
    """The symmetric root of a symmetric positive semi-definite matrix (F, F)."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)


def covariance(x: Array) -> Array:
    centred = x - x.mean(axis=0)
    return np.asarray(centred.T @ centred / (len(x) - 1))


def subset_discrepancies(x: Array, y: Array, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Array:
    """The discrepancies of random subsets of x (n, F) and y (m, F), of which KID is the mean: (subsets,)."""
    random = np.random.default_rng(seed)

    def drawn(z: Array) -> Array:
        return z[random.choice(len(z), min(subset_size, len(z)), replace=False)]

    return np.array([discrepancy(drawn(x), drawn(y)) for _ in range(subsets)])


def discrepancy(x: Array, y: Array) -> float:
    """The unbiased squared maximum mean discrepancy of x (n, F) and y (m, F): Binkowski et al. 2018, eq. 4.

    It is the mean k(x, x') plus the mean k(y, y') over pairs of two, less twice the mean k(x, y), with the kernel
    (x y / F + 1)^3. It may be negative.
    """
    return mean_of_pairs(polynomial(x, x)) + mean_of_pairs(polynomial(y, y)) - 2 * float(polynomial(x, y).mean())


def polynomial(x: Array, y: Array) -> Array:
    """k(x, y) = (x y / F + 1)^3: (n, m)."""
    k = x @ y.T / x.shape[1] + 1
    return np.asarray(k * k * k)  # a power is ten times slower


def mean_of_pairs(k: Array) -> float:
    """Of a kernel (n, n), over pairs of two."""
    return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))


def inception_score(logits: npt.ArrayLike) -> float:
    """exp of the mean KL divergence of p(class | image) from p(class): from 1 to K. Salimans et al. 2016."""
    x = checked(logits, "logits")
    log_p = x - x.max(axis=1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=1, keepdims=True))  # (n, K)
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    terms = np.where(p > 0, p * (log_p - np.log(np.maximum(marginal, np.finfo(np.float64).tiny))), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))


def accuracy(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of images (n, K) that are taken for the class asked for (n,)."""
    x, wanted = checked(logits, "logits"), np.asarray(labels)
    if wanted.shape != (len(x),) or wanted.min() < 0 or wanted.max() >= x.shape[1]:
        raise DataError(f"labels: {wanted.shape} of them do not fit logits of shape {x.shape}; classes begin at 0")
    return float((x.argmax(axis=1) == wanted).mean())


class Spread(NamedTuple):
    """The values of a figure over groups of images, from which its standard error is computed.

    The squared error is `scale` times the sum of squared deviations from the mean. Two models' spreads over the same
    groups can be subtracted value by value, which gives the error of their difference.
    """

    values: tuple[float, ...]
    scale: float
    degrees: float  # degrees of freedom of the squared error, for Student's t

    @property
    def error(self) -> float:
        x = np.asarray(self.values)
        return float(np.sqrt(self.scale * ((x - x.mean()) ** 2).sum()))

    @classmethod
    def jackknife(cls, values: Sequence[float]) -> Spread:
        """Of a figure's values without each group in turn."""
        return cls(tuple(float(x) for x in values), (len(values) - 1) / len(values), len(values) - 1)


class Figure(NamedTuple):
    """A figure with its standard error, and what that was computed from where another figure may be subtracted."""

    value: float
    error: float
    spread: Spread | None = None


def with_error(figure: Callable[[Any], float], count: int, groups: int = 10, seed: int = 0) -> Figure:
    """figure(indices) of all `count` images, and how far another such set of images would be from it.

    The error is the jackknife's: each of `groups` random groups left out in turn (Efron & Stein 1981). A bootstrap
    would draw images twice, which nearest neighbours and covariances take for something else.
    """
    everything = np.arange(count)
    values = [figure(np.setdiff1d(everything, group)) for group in random_groups(count, groups, seed)]
    return jackknifed(figure(everything), values)


def jackknifed(value: float, without: Sequence[float]) -> Figure:
    """A figure with the jackknife's error, from its values without each group in turn."""
    spread = Spread.jackknife(without)
    return Figure(value, spread.error, spread)


def random_groups(count: int, groups: int = 10, seed: int = 0) -> list[npt.NDArray[np.int64]]:
    """The numbers 0, ..., count - 1 in groups of about the same size."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[g :: min(groups, count)] for g in range(min(groups, count))]


def frechet_with_error(x: Array, mean: Array, cov: Array, root: Array) -> Figure:
    """`with_error` of the distance of x (n, F) to a Gaussian, `root` that of its covariance.

    The same as computing every covariance anew, at the price of one: of ten groups, moments are sums.
    """
    centre = x.mean(axis=0)
    parts = [x[group] - centre for group in random_groups(len(x))]  # centred, or the differences below would cancel
    products = [part.T @ part for part in parts]  # (F, F)
    whole = np.sum(products, axis=0)
    values = []
    for part, product in zip(parts, products, strict=True):
        left = len(x) - len(part)
        shift = -part.sum(axis=0) / left  # of the mean of those left, from the centre
        without = (whole - product - left * np.outer(shift, shift)) / (left - 1)
        values.append(gaussian_frechet(mean, cov, centre + shift, without, root))
    return jackknifed(gaussian_frechet(mean, cov, centre, whole / (len(x) - 1), root), values)


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


def same_width(x: Array, y: Array) -> None:
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features: {x.shape[1]} in one set, {y.shape[1]} in the other; use one extractor for both")
