"""A codebook: it finds the nearest codeword of each vector, has the losses that train it, and measures its usage.

Training calls `Quantiser.forward` through a tokenizer's `coded`. It sets `quantiser.entropy = True` where the entropy
term has a weight, as this term alone is expensive: N x V numbers. `code_watch.py` follows the usage of codes in
training and revives those that are not used.

Shapes: N vectors of C features, V codewords.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.core.device import full_float32
from seriatim.core.errors import check_least

MOST_DISTANCES = 1 << 24  # at most this many of the N x V distances are computed at once, to bound memory
SHARPNESS = 0.01  # the temperature of the entropy term
LOG_FLOOR = 1e-5  # added to probabilities before the logarithm, as in the official entropy term


@dataclass(frozen=True)
class Quantised:
    """Quantised vectors, their codes and the losses."""

    values: Tensor  # (..., C): codewords; the gradient passes straight through to the vectors
    codes: Tensor  # (...) int64
    vectors: Tensor  # (..., C): what was quantised, without gradient; each could be a codeword
    losses: dict[str, Tensor] = field(default_factory=dict)  # codebook, commitment, entropy: () each, without weights


def nearest_codes(vectors: Tensor, codewords: Tensor) -> Tensor:
    """The code (N,) int64 of the codeword (V, C) nearest to each vector (N, C); the first of equally near ones.

    The distance is |z - e|^2 = |z|^2 + |e|^2 - 2 z e, as in published code, so that near-ties are decided as there.
    Autocast is off, because it would decide some of them otherwise.
    """
    with full_float32(vectors.device):
        square = codewords.square().sum(dim=1)  # (V,)
        found = [
            (some.square().sum(dim=1, keepdim=True) + square - 2 * some @ codewords.T).argmin(dim=1)
            for some in vectors.split(max(1, MOST_DISTANCES // len(codewords)))
        ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=vectors.device)


class Quantiser(nn.Module):
    """A codebook of V codewords of C features (van den Oord et al. 2017, arXiv 1711.00937).

    With `l2` only the directions of vectors and codewords matter (Yu et al. 2022, arXiv 2110.04627). Both are
    normalised whenever they are used, because the stored codewords drift in training.
    """

    entropy = False  # whether `forward` computes the entropy term

    def __init__(self, vocab: int, dim: int, *, l2: bool = True) -> None:
        super().__init__()
        check_least(1, vocab=vocab, dim=dim)
        self.vocab, self.dim, self.l2 = vocab, dim, l2
        weight = torch.empty(vocab, dim).uniform_(-1 / vocab, 1 / vocab)
        self.codebook = nn.Parameter(F.normalize(weight, dim=-1) if l2 else weight)

    def normalised(self, vectors: Tensor) -> Tensor:
        """The vectors (..., C), scaled to length 1 if codewords are compared by their direction."""
        return F.normalize(vectors, dim=-1) if self.l2 else vectors

    def codes(self, vectors: Tensor) -> Tensor:
        """The code (...) of each vector (..., C)."""
        flat = self.normalised(vectors.flatten(0, -2))
        return nearest_codes(flat, self.normalised(self.codebook)).view(vectors.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """The codewords (..., C) of codes (...)."""
        return F.embedding(codes, self.normalised(self.codebook))

    def forward(self, vectors: Tensor) -> Quantised:
        """The codewords of vectors (..., C), with a straight-through gradient, and the losses (1711.00937, eq. 3).

        All is computed in float32, since autocast would decide near-ties otherwise.
        """
        with full_float32(vectors.device):
            z, e = self.normalised(vectors.float()), self.normalised(self.codebook)
            flat = z.flatten(0, -2)  # (N, C)
            codes = nearest_codes(flat.detach(), e.detach()).view(z.shape[:-1])
            chosen = F.embedding(codes, e)  # (..., C)
            losses = {
                "codebook": (chosen - z.detach()).square().mean(),
                "commitment": (chosen.detach() - z).square().mean(),
            }
            if self.entropy:
                losses["entropy"] = entropy_loss(flat, e)
            return Quantised(z + (chosen - z).detach(), codes, z.detach(), losses)  # straight through


def entropy_loss(vectors: Tensor, codewords: Tensor) -> Tensor:
    """The mean entropy of each vector's soft code minus the entropy of the mean soft code: ().

    `vectors` is (N, C), `codewords` (V, C). The loss falls as each vector prefers one code and as all codes are used.
    The temperature is 0.01.
    """
    square = vectors.square().sum(dim=1, keepdim=True) + codewords.square().sum(dim=1)
    logits = -(square - 2 * vectors @ codewords.T) / SHARPNESS  # (N, V)
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    mean = p.mean(dim=0)  # (V,)
    each = -(p * log_p).sum(dim=1).mean()
    return each + (mean * (mean + LOG_FLOOR).log()).sum()


class Usage:
    """Counts how often each of V codes occurs, batch by batch."""

    def __init__(self, vocab: int) -> None:
        self.counts = torch.zeros(vocab, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        self.counts += torch.bincount(codes.detach().flatten().cpu(), minlength=len(self.counts))

    def summary(self) -> dict[str, float]:
        return usage_figures(self.counts)


def usage_figures(counts: Tensor) -> dict[str, float]:
    """Figures of how often each of V codes occurred, (V,) whole numbers:

    codes        the size of the vocabulary
    used         the share of codes that occur at all
    perplexity   exp of the entropy: this many equally frequent codes would have the same entropy
    bits         the entropy of a code in bits
    largest      the share of all tokens that have the most frequent code
    """
    counts = counts.cpu()
    p = counts.double() / max(1, int(counts.sum()))
    entropy = float(torch.special.entr(p).sum())  # nats
    return {
        "codes": len(p),
        "used": float((counts > 0).double().mean()),
        "perplexity": math.exp(entropy),
        "bits": entropy / math.log(2),
        "largest": float(p.max()),
    }
