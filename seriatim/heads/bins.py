"""The bins head models a real feature by a softmax over B intervals, as in TokenBridge (Wang et al. 2025).

This is post-hoc quantisation: latents stay as their tokenizer returns them, and only the head uses bins. x is clipped
at +-`clip`, which is taken to be `sigmas` standard deviations of a Gaussian. The B bins are equally likely under this
Gaussian, and a sampled bin becomes its mean. Unusual:
- several features are independent given z, which fails for images (FID 15.7 instead of 1.94, their table), so use this
  head inside a nested head;
- the density is that of the histogram: constant inside a bin (its mass divided by its width), and 0 beyond the clip.

Shapes: N tokens, D features, C width of z, B bins.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.errors import UsageError, check_least
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance, Head, HeadLoss, Plan, column
from seriatim.heads.categorical import CodeOptions, check_filter, draw_code, filtered
from seriatim.nn.linear import Linear, at_least_float32


class Bins(Head):
    """p(bin | z) = softmax(W z + b) for each feature."""

    has_density = True
    Options = CodeOptions

    def __init__(
        self,
        dim: int = 1,  # D
        *,
        bins: int = 64,  # B
        clip: float = 5.0,  # features are clipped to [-clip, clip]
        sigmas: float = 3.0,  # `clip` in standard deviations of the Gaussian under which all bins are equally likely
        z_dim: int | None = None,  # C; None means that the model sets it
    ) -> None:
        super().__init__()
        check_least(1, dim=dim)
        check_least(2, bins=bins)
        for name, size in (("clip", clip), ("sigmas", sigmas)):
            if not 0 < size < math.inf:
                raise UsageError(f"{name}: {size!r} is not allowed; it must be above 0")
        self.output, self.bins, self.clip = dim, bins, clip
        self.config = {"dim": dim, "bins": bins, "clip": clip, "sigmas": sigmas}
        edges, means = equal_bins(bins, sigmas)
        scale = clip / sigmas
        # These are not buffers, so that a model on the meta device has them too and casts leave them in float32.
        self.edges = torch.tensor(edges, dtype=torch.float64, device="cpu").mul(scale).float()  # (B+1,)
        self.means = torch.tensor(means, dtype=torch.float64, device="cpu").mul(scale).float()  # (B,)
        self.drawn = torch.cat([self.means, torch.tensor([math.nan], device="cpu")])  # (B+1,), see `draw_code`
        if z_dim is not None:
            self.bind(z_dim)

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.final = Linear(z_dim, self.output * self.bins)
            nn.init.zeros_(self.final.weight)  # all bins start equally likely, so that the loss starts at D log B
            nn.init.zeros_(self.final.bias)
        super().bind(z_dim)

    def logits(self, z: Tensor) -> Tensor:
        """The logits of the bins, in float32 at least: (N, D, B)."""
        return at_least_float32(self.final(z)).view(len(z), self.output, self.bins)

    def bin_of(self, x: Tensor) -> Tensor:
        """The index of the bin of each feature, int64, in the shape of x."""
        return torch.bucketize(x.float().contiguous(), self.edges[1:-1].to(x.device), right=True)

    @override
    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The cross-entropy of the bins in nats, summed over features, for z (N, C) and target (N, D)."""
        nll = F.cross_entropy(self.logits(z).flatten(0, 1), self.bin_of(target).flatten(), reduction="none")  # (N D,)
        nll = nll.view(len(z), self.output).sum(dim=1)
        return HeadLoss(nll, torch.ones_like(nll))

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """The log density (N,) of the histogram in nats: log(mass / width of the bin), and -inf beyond the clip."""
        index = self.bin_of(target)  # (N, D)
        mass = self.logits(z).log_softmax(dim=-1).gather(2, index[..., None])[..., 0]
        density = mass - self.edges.diff().log().to(target.device)[index]
        return density.masked_fill(target.abs() > self.clip, -math.inf).sum(dim=1)

    @torch.no_grad()
    @override
    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:
        """The differential entropy of each feature's histogram given z, in nats: (N, D)."""
        mass = self.logits(z).log_softmax(dim=-1)  # (N, D, B)
        return -(mass.exp() * (mass - self.edges.diff().log().to(z.device))).sum(dim=-1)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        keys: Keys,
        plan: Plan | None = None,
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """The means of sampled bins: (N, D). Guidance mixes logits, and temperature 0 takes the likeliest bin."""
        options = self.options() if plan is None else plan.options
        self.check_sampling(z_null, guidance, temperature)
        logits = self.logits(z)
        if guidance is not None and z_null is not None:
            null = self.logits(z_null)
            logits = null + guidance.column[..., None] * (logits - null)
        if isinstance(temperature, Tensor):
            temperature = temperature.repeat_interleave(self.output)  # (N D,)
        kept = filtered(logits.flatten(0, 1), column(temperature), options.top_k, options.top_p)  # (N D, B)
        drawn = draw_code(kept, keys.fold("bin").uniform(self.output).flatten())
        return self.drawn.to(z.device)[drawn].view(len(z), self.output)

    def check_options(self, options: CodeOptions, temperature: float = 1.0) -> None:
        super().check_options(options, temperature)
        check_filter(options.top_k, options.top_p)


def equal_bins(count: int, sigmas: float) -> tuple[list[float], list[float]]:
    """The edges (count + 1) and means (count) of equally likely bins of N(0, 1) truncated at +-sigmas."""
    normal = NormalDist()
    low, high = normal.cdf(-sigmas), normal.cdf(sigmas)
    inner = [normal.inv_cdf(low + (high - low) * i / count) for i in range(1, count)]
    edges = [-sigmas, *inner, sigmas]
    mass = (high - low) / count
    means = [(normal.pdf(a) - normal.pdf(b)) / mass for a, b in pairwise(edges)]
    return edges, means
