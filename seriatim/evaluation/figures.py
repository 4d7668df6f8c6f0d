"""From features to named figures, each with a standard error.

A figure is named by what made it: "FID" and its kin with the known Inception weights alone, else FD[name].
n samples, m reference images, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from seriatim.core.errors import DataError, UsageError, nearest
from seriatim.core.names import match_names
from seriatim.core.progress import Progress
from seriatim.evaluation.base import FeatureExtractor
from seriatim.evaluation.blocks import Vectors
from seriatim.evaluation.metrics import (
    Array,
    Figure,
    Spread,
    accuracy,
    covariance,
    frechet_with_error,
    inception_score,
    matrix_root,
    mean_of_pairs,
    polynomial,
    subset_discrepancies,
    with_error,
    within_class_variance,
)
from seriatim.evaluation.neighbours import covered, neighbours, radii, usual_way
from seriatim.evaluation.reference import Labels, Part

K_NEAREST = 3  # of precision and recall
SPLIT = 5000  # images of which one inception score is: ADM's evaluator; torch-fidelity's ten of 50,000
WHOLE, SUBSET = 5000, 1000  # up to so many samples the kernel distance is of all; then of subsets, as in its paper
SOME = 4  # images that one class at least must have for its variance to be seen with a tenth left out
MANIFOLD = 10_000  # images of each side whose neighbours are sought; as many as ADM's reference batches hold

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


def frechet(samples: Set, reference: Reference) -> dict[str, Figure]:
    found = {"FD": between(samples.vectors.features, reference.pool, reference, "features")}
    if samples.vectors.spatial is not None:
        found["sFD"] = between(samples.vectors.spatial, reference.spatial, reference, "spatial")
    return {name: figure for name, figure in found.items() if figure is not None}


def between(x: Array, given: tuple[Array, Array] | None, reference: Reference, which: str) -> Figure | None:
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
    return frechet_with_error(x, mean, cov, reference.roots[which])


def kernel(samples: Set, reference: Reference) -> dict[str, Measure | Figure]:
    if reference.vectors is None:
        return {}
    x, real = samples.vectors.features, spaced(reference.vectors.features, WHOLE)
    if len(x) > WHOLE:
        # The mean over random subsets varies by itself, which a jackknife would take for the images' spread. That of
        # subsets is known, and as many as fit side by side into the samples are independent.
        each = subset_discrepancies(x, real, subset_size=SUBSET)
        independent = len(x) / SUBSET
        spread = Spread(tuple(each.tolist()), 1 / ((len(each) - 1) * independent), min(len(each), independent) - 1)
        return {"KD": Figure(float(each.mean()), spread.error, spread)}
    # All pairs, each kernel computed once: leaving images out is leaving rows and columns out.
    pairs, across = polynomial(x, x), polynomial(x, real).mean(axis=1)  # (n, n), (n,)
    if "kernel" not in reference.roots:
        reference.roots["kernel"] = np.array(mean_of_pairs(polynomial(real, real)))
    constant = float(reference.roots["kernel"])
    return {"KD": lambda i: mean_of_pairs(pairs[np.ix_(i, i)]) + constant - 2 * float(across[i].mean())}


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


def score(samples: Set, _reference: Reference) -> dict[str, Measure]:
    """The mean over random parts of about SPLIT images, as it is published: a score grows with the images it is of."""
    logits = samples.vectors.logits
    if logits is None:
        return {}
    parts = max(1, round(len(logits) / SPLIT))
    part = np.random.default_rng(0).permutation(len(logits)) % parts  # of each image, whichever others are left out
    return {"IS": lambda i: float(np.mean([inception_score(logits[i[part[i] == p]]) for p in range(parts)]))}


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
    if min(np.bincount(labels).max(), np.bincount(reference.labels).max()) < SOME:
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


FIGURES: dict[str, Callable[[Set, Reference], Mapping[str, Measure | Figure]]] = {
    "frechet": frechet,
    "kernel": kernel,
    "manifold": manifold,
    "score": score,
    "accuracy": conditional,
    "diversity": diversity,
    "nearest": copying,
}


def figures_of(
    samples: Set,
    reference: Reference,
    extractor: FeatureExtractor,
    which: Sequence[str] = tuple(FIGURES),
    *,
    quiet: bool = True,
) -> dict[str, Figure]:
    """Every figure of `which` that these sets allow, by its name."""
    found = {}
    with Progress(len(which), "measuring", "figures", quiet=quiet) as bar:
        for kind in which:
            for short, measure in FIGURES[kind](samples, reference).items():
                figure = measure if isinstance(measure, Figure) else with_error(measure, len(samples.vectors))
                found[named(short, extractor)] = figure
            bar.advance(1, kind)
    return found


# --- what is refused before hours of work -------------------------------------------------------------------------


def check_figures(which: Sequence[str]) -> tuple[str, ...]:
    for kind in which:
        if kind not in FIGURES:
            raise UsageError(f"figures: {kind!r} is not known{nearest(kind, FIGURES)}")
    return tuple(dict.fromkeys(which)) or tuple(FIGURES)


def check_possible(
    which: Sequence[str], extractor: FeatureExtractor, classes: int, names: Sequence[str], real: Part | None, file: str
) -> None:
    """Refuse figures that somebody asks for by name and that these features or this reference can't give."""
    lacks = {
        "score": "" if extractor.classes else f"class probabilities, which {extractor.name!r} has not",
        "accuracy": ""
        if class_map(extractor, classes, names) is not None
        else f"an extractor that knows the model's classes, {extractor.name!r} does not",
        "diversity": "" if real is not None and real.labels is not None else "classes, of the model and of the data",
    }
    if real is None:
        lacks |= dict.fromkeys(("kernel", "manifold", "diversity", "nearest"), f"images, which {file} has not")
    for kind in which:
        if lacks.get(kind):
            raise UsageError(f"figures: {kind} needs {lacks[kind]}; leave it out, or choose other features or data")


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
        places = match_names(names, theirs)
        return None if places is None else np.array(places)
    return np.arange(classes)


def spaced(x: Array, most: int) -> Array:
    """At most `most` rows, evenly chosen: sources are sorted by class."""
    return x if len(x) <= most else x[np.linspace(0, len(x) - 1, most).round().astype(np.int64)]
