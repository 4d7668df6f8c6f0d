"""From features to named figures, each with a standard error.

A figure is named by what made it: "FID" and its kin with the known Inception weights alone, else FD[name].
n samples, m reference images, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from seriatim.core.errors import DataError, UsageError, nearest
from seriatim.evaluation.base import FeatureExtractor
from seriatim.evaluation.blocks import Vectors
from seriatim.evaluation.metrics import (
    Array,
    Figure,
    accuracy,
    covariance,
    gaussian_frechet,
    inception_score,
    kernel_distance,
    matrix_root,
    with_error,
    within_class_variance,
)
from seriatim.evaluation.neighbours import covered, neighbours, radii, usual_way
from seriatim.evaluation.reference import Labels

K_NEAREST = 3  # of precision and recall
MANIFOLD = 10_000  # images of each side in precision and recall, as many as ADM's reference batches hold

Index = npt.NDArray[np.int64]
Measure = Callable[[Index], float]  # the figure of some of the samples


@dataclass(frozen=True)
class Set:
    """One side of a comparison."""

    vectors: Vectors
    labels: Labels | None = None  # (n,), in the model's numbering


@dataclass(frozen=True)
class Reference:
    """The other: real images, or what is known of them."""

    vectors: Vectors | None
    labels: Labels | None = None
    pool: tuple[Array, Array] | None = None  # mean and covariance of features, where others computed them
    spatial: tuple[Array, Array] | None = None
    class_map: Labels | None = None  # the extractor's number of each of the model's classes
    held_out: Vectors | None = None  # real images beside the reference, for copying
    roots: dict[str, Array] = field(default_factory=dict)  # of covariances, computed once


def named(short: str, extractor: FeatureExtractor) -> str:
    """ "FD" -> "FID" with the known Inception weights, "FD[name]" with any other features."""
    known = {"FD": "FID", "KD": "KID", "sFD": "sFID"}
    return known.get(short, short) if extractor.standard else f"{short}[{extractor.name}]"


# --- the figures: samples and reference -> a measure of each name, or nothing where they lack what it needs ----------


def frechet(samples: Set, reference: Reference) -> dict[str, Measure]:
    found = {"FD": between(samples.vectors.features, reference.pool, reference, "features")}
    if samples.vectors.spatial is not None:
        found["sFD"] = between(samples.vectors.spatial, reference.spatial, reference, "spatial")
    return {name: measure for name, measure in found.items() if measure is not None}


def between(x: Array, given: tuple[Array, Array] | None, reference: Reference, which: str) -> Measure | None:
    if given is None:
        real = getattr(reference.vectors, which, None)
        if real is None:
            return None
        key = f"{which} moments"
        if key not in reference.roots:
            reference.roots[key] = covariance(real)
        given = real.mean(axis=0), reference.roots[key]
    mean, cov = given
    if len(mean) != x.shape[1]:
        raise DataError(f"features: the reference has {len(mean)}, the samples {x.shape[1]}; use its extractor")
    if which not in reference.roots:
        reference.roots[which] = matrix_root(cov)
    root = reference.roots[which]
    return lambda i: gaussian_frechet(mean, cov, x[i].mean(axis=0), covariance(x[i]), root)


def kernel(samples: Set, reference: Reference) -> dict[str, Measure]:
    if reference.vectors is None:
        return {}
    x, real = samples.vectors.features, reference.vectors.features
    return {"KD": lambda i: kernel_distance(x[i], real)}


def manifold(samples: Set, reference: Reference) -> dict[str, Measure]:
    if reference.vectors is None:
        return {}
    x, real = samples.vectors.features[:MANIFOLD], spaced(reference.vectors.features, MANIFOLD)
    if "radii" not in reference.roots:
        reference.roots["radii"] = radii(real, K_NEAREST)
    radius = reference.roots["radii"]
    return {
        "precision": lambda i: covered(x[i[i < len(x)]], real, radius),
        "recall": lambda i: covered(real, x[i[i < len(x)]], radii(x[i[i < len(x)]], K_NEAREST)),
    }


def score(samples: Set, reference: Reference) -> dict[str, Measure]:
    logits = samples.vectors.logits
    return {} if logits is None else {"IS": lambda i: inception_score(logits[i])}


def conditional(samples: Set, reference: Reference) -> dict[str, Measure]:
    logits, labels, numbers = samples.vectors.logits, samples.labels, reference.class_map
    if logits is None or labels is None or numbers is None:
        return {}
    wanted = numbers[labels]
    return {"accuracy": lambda i: accuracy(logits[i], wanted[i])}


def diversity(samples: Set, reference: Reference) -> dict[str, Measure]:
    """The variance within a class, over that of the reference's."""
    labels, real = samples.labels, reference.vectors
    if labels is None or real is None or reference.labels is None:
        return {}
    x, usual = samples.vectors.features, within_class_variance(real.features, reference.labels)
    return {"diversity": lambda i: within_class_variance(x[i], labels[i]) / usual}


def copying(samples: Set, reference: Reference) -> dict[str, Measure]:
    if reference.vectors is None or reference.held_out is None:
        return {}
    real = reference.vectors.features
    if "usual way" not in reference.roots:
        reference.roots["usual way"] = np.array(usual_way(real, reference.held_out.features))
    usual = float(reference.roots["usual way"])
    ways = neighbours(samples.vectors.features, real, 1)[0][:, 0]  # (n,)
    return {"nearest": lambda i: float(np.median(ways[i])) / usual}


FIGURES: dict[str, Callable[[Set, Reference], dict[str, Measure]]] = {
    "frechet": frechet,
    "kernel": kernel,
    "manifold": manifold,
    "score": score,
    "accuracy": conditional,
    "diversity": diversity,
    "nearest": copying,
}


def figures_of(
    samples: Set, reference: Reference, extractor: FeatureExtractor, which: Sequence[str] = tuple(FIGURES)
) -> dict[str, Figure]:
    """Every figure of `which` that these sets allow, by its name."""
    found = {}
    for kind in which:
        for short, measure in FIGURES[kind](samples, reference).items():
            found[named(short, extractor)] = with_error(measure, len(samples.vectors))
    return found


# --- what is refused before hours of work -------------------------------------------------------------------------


def check_figures(which: Sequence[str]) -> tuple[str, ...]:
    for kind in which:
        if kind not in FIGURES:
            raise UsageError(f"figures: {kind!r} is not known{nearest(kind, FIGURES)}")
    return tuple(dict.fromkeys(which)) or tuple(FIGURES)


def check_count(argument: str, count: int, extractor: FeatureExtractor, which: Sequence[str]) -> None:
    """Refuse fewer images than a figure can be computed of."""
    if "frechet" in which and count <= extractor.dim:
        raise DataError(
            f"{argument}: {count} images are too few for the {extractor.dim} features of {extractor.name!r}, whose "
            f"covariance would be singular; take at least {extractor.dim + 1}, or choose figures without frechet"
        )
    if count < 4 * K_NEAREST:
        raise DataError(f"{argument}: {count} images are too few for any figure; take at least {4 * K_NEAREST}")


def class_map(extractor: FeatureExtractor, classes: int, names: Sequence[str]) -> Labels | None:
    """The extractor's number of each of the model's classes (K,); None where its classes are others."""
    theirs = list(extractor.class_names)
    if not classes or extractor.standard or extractor.classes != classes:
        return None
    if theirs and names:
        return np.array([theirs.index(n) for n in names]) if sorted(theirs) == sorted(names) else None
    return np.arange(classes)


def spaced(x: Array, most: int) -> Array:
    """At most `most` rows, evenly chosen: sources are sorted by class."""
    return x if len(x) <= most else x[np.linspace(0, len(x) - 1, most).round().astype(np.int64)]
