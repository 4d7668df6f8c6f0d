"""What `known_density` scores: samples by distance and by true density, models by true likelihood; codes of k-means.

B sequences, L tokens, D features, N samples, P directions, V codes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from known_processes import Process
from torch import Tensor

from seriatim.core.random import derive_seed, generator
from seriatim.models.base import SequenceModel

DIRECTIONS = 128


def even_labels(classes: int, count: int) -> Tensor:
    """As many of each class, class by class: (count,)."""
    return torch.arange(classes).repeat_interleave(count // classes)


class Ruler:
    """Measures samples of a process, as many of each class."""

    def __init__(self, process: Process, samples: int, truth: int) -> None:
        self.process, self.each = process, samples // process.classes
        self.labels = even_labels(process.classes, self.each * process.classes)  # (N,)
        self.directions = directions(process)  # (L D, P)
        self.quantiles, self.mean, self.low = [], [], []
        for label in range(process.classes):
            labels = torch.full((truth,), label)
            x = process.sample(labels, generator(derive_seed("truth", label)))
            along = (x.flatten(1) @ self.directions).sort(dim=0).values  # (truth, P)
            self.quantiles.append(along[((torch.arange(self.each) + 0.5) / self.each * truth).long()])  # (n, P)
            log_p = process.log_conditionals(x, labels)  # (truth, L)
            self.mean.append(log_p.mean())
            self.low.append(log_p.quantile(0.01, dim=0))  # (L,)
        self.entropy = -float(torch.stack(self.mean).mean())

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """Samples (N, L, D) of `labels`."""
        n, squares = self.each, []
        log_p = self.process.log_conditionals(samples, self.labels)  # (N, L)
        for label, truth in enumerate(self.quantiles):
            x = samples[label * n : (label + 1) * n]
            both, order = torch.cat([x.flatten(1) @ self.directions, truth]).double().sort(dim=0)  # (2n, P)
            apart = torch.where(order < n, 1 / n, -1 / n).cumsum(dim=0)  # F - G
            squares.append(float((2 * apart[:-1].square() * both.diff(dim=0)).sum(dim=0).mean()))
        mean, low = (torch.stack(v)[self.labels] for v in (self.mean, self.low))  # (N,), (N, L)
        return {
            "distance": math.sqrt(statistics.mean(squares)),
            "excess": float(log_p.mean() - mean.mean()),
            "outside": float((log_p < low).double().mean()),
        }


def directions(process: Process) -> Tensor:
    """Unit vectors (L D, P): the first half random, the others zero but for two neighbours, all pairs in turn."""
    L, D, (h, w) = process.tokens, process.dim, process.grid
    vectors = torch.randn(DIRECTIONS, L, D, generator=generator(derive_seed("directions")))
    pairs = [(i, i + 1) for i in range(L) if (i + 1) % w] + [(i, i + w) for i in range((h - 1) * w)]
    for i in range(DIRECTIONS // 2, DIRECTIONS):
        others = torch.ones(L, dtype=torch.bool)
        others[list(pairs[i % len(pairs)])] = False
        vectors[i, others] = 0
    vectors = vectors.flatten(1)
    return (vectors / vectors.norm(dim=1, keepdim=True)).T


@torch.no_grad()
def log_likelihood(
    model: SequenceModel, x: Tensor, labels: Tensor, order: Tensor | None, sizes: Sequence[int]
) -> Tensor:
    """log p of x (B, L, D) given the order (B, L) in which tokens are drawn, None: raster; sizes of the steps: (B,)."""
    (B, L), condition = x.shape[:2], model.condition(labels, len(x))
    if model.one_by_one:  # all z in one pass
        z = model.backbone.sequence(condition, x, order)  # (B, L, C)
        target = x if order is None else x.gather(1, order[..., None].expand_as(x))
        return model.head.log_prob(z.flatten(0, 1), target.flatten(0, 1)).double().view(B, L).sum(dim=1)
    places = torch.arange(L).expand(B, L) if order is None else order
    total = torch.zeros(B, dtype=torch.float64)
    known = torch.zeros(B, L, dtype=torch.bool)
    for now in places.split(list(sizes), dim=1):
        ask = torch.zeros_like(known).scatter(1, now, True)
        z = model.backbone.z(condition, x, known, ask)  # (N, C)
        total += model.head.log_prob(z, x[ask]).double().view(B, -1).sum(dim=1)
        known |= ask
    return total


class Codes:
    """Tokens as k-means centres, of those that true sequences have."""

    def __init__(self, process: Process, count: int, seed: int, sequences: int = 2000) -> None:
        from sklearn.cluster import KMeans

        g = generator(derive_seed("codes", seed))
        x = process.sample(torch.randint(process.classes, (sequences,), generator=g), g).flatten(0, 1)
        fitted = KMeans(count, n_init=1, max_iter=30, random_state=seed).fit(x.numpy())
        self.centres = torch.from_numpy(fitted.cluster_centers_).float()  # (V, D)

    def encode(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L) int64."""
        return torch.cdist(x.flatten(0, 1), self.centres).argmin(dim=1).view(x.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:
        return self.centres[codes]
