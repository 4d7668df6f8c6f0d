"""Processes that draw sequences of tokens on a grid, with the exact log density of every sequence.

    mixture    16 tokens in 2-D: one of eight modes, picked by the class, moves all tokens together
    field      16-D tokens on a 4x4 grid: a mixture of two Gaussian fields, correlated over the grid and over features
    order      2-D tokens on a 4x4 grid: left and upper neighbour decide between which two places a token is; simple in
               raster order, and in any other order a neighbour tells of many places

What `log_conditionals` adds up along an order is the log density, whatever the order; of `order` it knows raster alone.

Shapes: B sequences, L = h w tokens, D features, K components, G classes. Densities are float64, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from seriatim.core.errors import UsageError

GRID = (4, 4)


class Process:
    """A density of sequences (L, D) given a class."""

    grid: tuple[int, int] = GRID
    dim: int
    classes: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """labels (B,) -> (B, L, D) float32."""
        raise NotImplementedError

    def log_conditionals(self, x: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
        """log p of each token given those before it: (B, L), the i-th of the order; order (B, L), None: raster."""
        raise NotImplementedError

    def log_density(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (B, L, D), labels (B,) -> (B,)."""
        return self.log_conditionals(x, labels).sum(dim=1)


def arranged(x: Tensor, order: Tensor | None) -> Tensor:
    """x (B, L, D) in float64, the tokens in this order."""
    x = x.double()
    return x if order is None else x.gather(1, order[..., None].expand_as(x))


def sequential(weights: Tensor, log_p: Tensor) -> Tensor:
    """log sum_k w_k prod_(j <= i) p_kj minus the same up to i - 1: log weights (B, K), log_p (B, L, K) -> (B, L)."""
    total = (weights[:, None] + log_p.cumsum(dim=1)).logsumexp(dim=2)  # (B, L): log p of the first i tokens
    return total.diff(dim=1, prepend=torch.zeros_like(total[:, :1]))


class Modes(Process):
    """x_i = mean_(k, i) + noise of mode k; k is drawn once for all tokens, with probabilities of the class.

    Each token has four places on a ring, and modes share them: one token leaves several modes possible.
    """

    dim, classes = 2, 4

    def __init__(self, modes: int = 8, wide: float = 0.5, narrow: float = 0.2) -> None:
        g = torch.Generator().manual_seed(11)
        angle = (torch.randint(4, (modes, self.tokens), generator=g) + 0.5) * math.pi / 2  # (K, L)
        self.means = 1.2 * torch.stack([angle.cos(), angle.sin()], dim=-1).double()  # (K, L, D)
        turn = (torch.arange(modes) * math.pi / modes).double()
        axes = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=-1).view(modes, 2, 2)
        self.factors = axes * torch.tensor([wide, narrow]).double()  # (K, D, D): x = mean + factor eps
        half = torch.arange(modes) < modes // 2
        skewed = 0.6 ** torch.arange(modes)
        weights = torch.stack([torch.ones(modes), half.float(), 1 - half.float(), skewed]).double()
        self.weights = weights / weights.sum(dim=1, keepdim=True)  # (G, K)

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights[labels], 1, generator=generator)[:, 0]  # (B,)
        eps = torch.randn(len(k), self.tokens, self.dim, generator=generator, dtype=torch.float64)
        return (self.means[k] + torch.einsum("bde,ble->bld", self.factors[k], eps)).float()

    def log_conditionals(self, x: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
        at = torch.arange(self.tokens).expand(len(x), -1) if order is None else order
        off = arranged(x, order)[:, :, None] - self.means.transpose(0, 1)[at]  # (B, L, K, D)
        eps = torch.einsum("kde,blke->blkd", torch.linalg.inv(self.factors), off)
        size = torch.linalg.det(self.factors).abs().log()  # (K,)
        log_p = -0.5 * eps.square().sum(dim=-1) - size - math.log(2 * math.pi)  # (B, L, K)
        return sequential(self.weights[labels].log(), log_p)


class Field(Process):
    """A mixture of Gaussian fields N(0, S_k x F_k): S over the grid, F over features, weighed by the class.

    S_k falls off exponentially, along the rows in one field and along the columns in the other. F_k has three strong
    directions of its own, in which 90 % of the variance is.
    """

    dim, classes = 16, 2

    def __init__(self, reach: tuple[float, float] = (4.0, 1.0), share: float = 0.9, fields: int = 2) -> None:
        g = torch.Generator().manual_seed(12)
        w = self.grid[1]
        row, column = torch.arange(self.tokens) // w, torch.arange(self.tokens) % w
        dy, dx = ((p[:, None] - p).abs().double() for p in (row, column))  # (L, L)
        reaches = [reach, reach[::-1]][:fields]
        self.spatial = torch.stack([torch.exp(-dy / a - dx / b) for a, b in reaches])  # (K, L, L)
        strong = torch.randn(fields, self.dim, 3, generator=g, dtype=torch.float64)
        strong = strong / strong.norm(dim=2, keepdim=True)
        eye = torch.eye(self.dim, dtype=torch.float64)
        self.features = share * strong @ strong.transpose(1, 2) + (1 - share) * eye  # (K, D, D), 1 on the diagonal
        weights = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).double()[:, :fields]
        self.weights = weights / weights.sum(dim=1, keepdim=True)  # (G, K)

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights[labels], 1, generator=generator)[:, 0]  # (B,)
        eps = torch.randn(len(k), self.tokens, self.dim, generator=generator, dtype=torch.float64)
        S, F = torch.linalg.cholesky(self.spatial), torch.linalg.cholesky(self.features)
        out = torch.empty_like(eps)
        for field in range(len(S)):
            out[k == field] = S[field] @ eps[k == field] @ F[field].T
        return out.float()

    def log_conditionals(self, x: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
        """By the Cholesky factor C of S in the order asked for: x = C e, the rows of e independent, each of N(0, F)."""
        x, log_p = arranged(x, order), []
        for S, F in zip(self.spatial, self.features, strict=True):
            among = S if order is None else S[order[:, :, None], order[:, None, :]]  # (B, L, L)
            C, root = torch.linalg.cholesky(among), torch.linalg.cholesky(F)
            eye = torch.eye(self.tokens, dtype=torch.float64)
            e = torch.linalg.solve_triangular(C, eye, upper=False) @ x  # (B, L, D)
            e = e @ torch.linalg.inv(root).T
            scale = self.dim * C.diagonal(dim1=-2, dim2=-1).log() + root.diagonal().log().sum()  # (L,) or (B, L)
            log_p.append(-0.5 * e.square().sum(dim=2) - scale - 0.5 * self.dim * math.log(2 * math.pi))
        return sequential(self.weights[labels].log(), torch.stack(log_p, dim=-1))


class Order(Process):
    """x_i = +m or -m, and noise: m points where the squares of the left and the upper neighbour, as complex numbers,
    add up to, turned by an angle of the class.

    Forwards a token has two places, at weights 3 : 1. Backwards a square has two roots: a token known to the right or
    below leaves as many again, and only where both parents of that token are told apart. The first is on a ring.
    """

    dim, classes = 2, 2
    sigma, likely, soft = 0.2, 0.75, 0.05
    turns = (-math.pi / 8, math.pi / 8)

    def mean(self, left: Tensor | None, above: Tensor | None, labels: Tensor) -> Tensor:
        """Neighbours (B, D), of which one may be absent -> m (B, D), of length 1 but where squares cancel."""
        squares = [torch.view_as_complex(x.double().contiguous()).square() for x in (left, above) if x is not None]
        total = torch.stack(squares).sum(dim=0)
        turn = torch.tensor(self.turns, dtype=torch.float64)[labels]
        return torch.view_as_real(total / (total.abs().square() + self.soft).sqrt() * torch.exp(1j * turn))

    def parents(self, x: Tensor, i: int) -> tuple[Tensor | None, Tensor | None]:
        w = self.grid[1]
        return (x[:, i - 1] if i % w else None), (x[:, i - w] if i >= w else None)

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        B = len(labels)
        x = self.sigma * torch.randn(B, self.tokens, self.dim, generator=generator, dtype=torch.float64)
        u = torch.rand(B, self.tokens, generator=generator, dtype=torch.float64)
        angle = 2 * math.pi * u[:, 0]
        x[:, 0] += torch.stack([angle.cos(), angle.sin()], dim=1)
        for i in range(1, self.tokens):
            sign = torch.where(u[:, i] < self.likely, 1.0, -1.0)
            x[:, i] += sign[:, None] * self.mean(*self.parents(x, i), labels)
        return x.float()

    def log_conditionals(self, x: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
        if order is not None:
            raise UsageError("order: the process 'order' has closed conditionals in raster order only; leave it out")
        x, v = x.double(), self.sigma**2
        radius = x[:, 0].norm(dim=1)
        # a Gaussian around each point of the ring: exp(-(r^2 + 1) / 2v) I_0(r / v) / 2 pi v
        ring = -0.5 * (radius - 1).square() / v + torch.special.i0e(radius / v).log()
        parts = [ring]
        for i in range(1, self.tokens):
            m = self.mean(*self.parents(x, i), labels)
            far = torch.stack([(x[:, i] - m).square().sum(dim=1), (x[:, i] + m).square().sum(dim=1)], dim=1)  # (B, 2)
            weights = torch.tensor([self.likely, 1 - self.likely], dtype=torch.float64).log()
            parts.append((weights - 0.5 * far / v).logsumexp(dim=1))
        return torch.stack(parts, dim=1) - math.log(2 * math.pi * v)


TASKS: dict[str, Callable[[], Process]] = {"mixture": Modes, "field": Field, "order": Order}
