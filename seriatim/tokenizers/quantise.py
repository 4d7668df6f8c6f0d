"""A codebook: the nearest codeword of each vector, what training it minimises, and how much of it is used.

N vectors of C features, V codewords.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.core.device import full_float32
from seriatim.core.errors import UsageError

MOST_DISTANCES = 1 << 24  # N x V of them at a time, to bound memory
SHARPNESS = 0.01  # temperature of the entropy term
LOG_FLOOR = 1e-5  # of the official entropy term


@dataclass(frozen=True)
class Quantised:
    """What a quantiser makes of vectors."""

    values: Tensor  # (..., C): codewords, through which the gradient goes straight to the vectors
    codes: Tensor  # (...) int64
    losses: dict[str, Tensor] = field(default_factory=dict)  # codebook, commitment, entropy: () each, weighted


def nearest_codes(vectors: Tensor, codewords: Tensor) -> Tensor:
    """Vectors (N, C), codewords (V, C) -> (N,) int64: the least squared distance; of equal ones the first.

    |z - e|^2 = |z|^2 + |e|^2 - 2 z e, as published codes compute it: near-ties fall as they do there. Autocast would
    flip them.
    """
    with full_float32(vectors.device):
        square = codewords.square().sum(dim=1)  # (V,)
        found = [
            (some.square().sum(dim=1, keepdim=True) + square - 2 * some @ codewords.T).argmin(dim=1)
            for some in vectors.split(max(1, MOST_DISTANCES // len(codewords)))
        ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=vectors.device)


class Quantiser(nn.Module):
    """V codewords of C features (van den Oord et al. 2017, arXiv 1711.00937).

    With `l2` both vectors and codewords count by direction alone (Yu et al. 2022, arXiv 2110.04627): they are
    normalised whenever they are used, for what is stored drifts in training.
    """

    def __init__(
        self, vocab: int, dim: int, *, l2: bool = True, commitment: float = 0.25, entropy: float = 0.0
    ) -> None:
        super().__init__()
        for name, value in (("vocab", vocab), ("dim", dim)):
            if value < 1:
                raise UsageError(f"{name}: {value!r} is not allowed; it must be at least 1")
        self.vocab, self.dim, self.l2, self.commitment, self.entropy = vocab, dim, l2, commitment, entropy
        weight = torch.empty(vocab, dim).uniform_(-1 / vocab, 1 / vocab)
        self.codebook = nn.Parameter(F.normalize(weight, dim=-1) if l2 else weight)

    def normalised(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2 else vectors

    def codes(self, vectors: Tensor) -> Tensor:
        """(..., C) -> the code of each: (...)."""
        flat = self.normalised(vectors.flatten(0, -2))
        return nearest_codes(flat, self.normalised(self.codebook)).view(vectors.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (...) -> codewords (..., C)."""
        return F.embedding(codes, self.normalised(self.codebook))

    def forward(self, vectors: Tensor) -> Quantised:
        """Vectors (..., C) -> codewords with a gradient, and the losses (1711.00937, eq. 3)."""
        z, e = self.normalised(vectors), self.normalised(self.codebook)
        with torch.no_grad():
            codes = nearest_codes(z.flatten(0, -2), e).view(z.shape[:-1])
        chosen = F.embedding(codes, e)  # (..., C)
        losses = {
            "codebook": (chosen - z.detach()).square().mean(),
            "commitment": self.commitment * (chosen.detach() - z).square().mean(),
        }
        if self.entropy:
            losses["entropy"] = self.entropy * entropy_loss(z.flatten(0, -2), e)
        return Quantised(z + (chosen - z).detach(), codes, losses)  # straight through


def entropy_loss(vectors: Tensor, codewords: Tensor) -> Tensor:
    """Vectors (N, C), codewords (V, C) -> (): entropy of a vector's soft code, minus that of all together.

    It falls when each vector is sure of its code and all codes are used. The temperature is 0.01.
    """
    square = vectors.square().sum(dim=1, keepdim=True) + codewords.square().sum(dim=1)
    logits = -(square - 2 * vectors @ codewords.T) / SHARPNESS  # (N, V)
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    mean = p.mean(dim=0)  # (V,)
    each = -(p * log_p).sum(dim=1).mean()
    return each + (mean * (mean + LOG_FLOOR).log()).sum()


class Usage:
    """How often each of V codes occurs, added batch by batch."""

    def __init__(self, vocab: int) -> None:
        self.counts = torch.zeros(vocab, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        self.counts += torch.bincount(codes.detach().flatten().cpu(), minlength=len(self.counts))

    def summary(self) -> dict[str, float]:
        """codes        of the vocabulary
        used         share of them that occur at all
        perplexity   exp of the entropy: as many equally frequent codes say as much
        bits         of a code, its entropy
        largest      share of all tokens that have the most frequent code
        """
        p = self.counts.double() / max(1, int(self.counts.sum()))
        entropy = float(torch.special.entr(p).sum())  # nats
        return {
            "codes": len(p),
            "used": float((self.counts > 0).double().mean()),
            "perplexity": float(torch.tensor(entropy, dtype=torch.float64).exp()),
            "bits": entropy / float(torch.log(torch.tensor(2.0, dtype=torch.float64))),
            "largest": float(p.max()),
        }
