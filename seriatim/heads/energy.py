"""The energy head turns noise into a token in one pass of a small MLP, trained with the energy score.

Shao et al. 2025 (EAR), "Continuous Visual Autoregressive Generation via Score Maximization", section 3: the energy
score 2 E|x - y|^a - E|x - x'|^a, of independent draws x and x' of the model and a token y, is strictly proper for
0 < a < 2 (Gneiting & Raftery 2007, eq. 22), so its minimum is the distribution of the tokens. Unusual:
- z is the input of the network, and the noise modulates its blocks (adaLN): the diffusion head has them the other way;
- guidance acts on z before the network, so that a guided token also takes one pass;
- the temperature scales the shift of each block, as published. It follows from no density: below 1 it need not make
  samples sharper, and samples still differ at temperature 0;
- there is no density.

Shapes: N tokens, D features, C width of z, W width of the network, d blocks, K numbers of noise, M pairs of draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.core.errors import UsageError, check_least
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance, Head, HeadLoss, Plan, column
from seriatim.nn.adaln import AdaLNBlock, AdaLNOutput
from seriatim.nn.block import xavier
from seriatim.nn.linear import Linear, at_least_float32


class Energy(Head):
    """p(x | z) as the output of d blocks of width W for random noise; `draws` pairs of samples train each token."""

    def __init__(
        self,
        dim: int,  # D
        width: int = 1024,  # W
        depth: int = 6,  # d
        *,
        draws: int = 2,  # M, the pairs of samples for each token of a training step
        noise: int = 64,  # K, the numbers of noise for a sample
        alpha: float = 1.0,  # the exponent of distances
        tau: float = 1.0,  # the weight of the distance between samples; below 1 makes the samples less diverse
        z_dim: int | None = None,  # C; None means that the model sets it
    ) -> None:
        super().__init__()
        check_least(1, dim=dim, width=width, depth=depth, draws=draws, noise=noise)
        if not 0 < alpha < 2:
            raise UsageError(f"alpha: {alpha!r} is not allowed; it must be above 0 and below 2 (published: 1)")
        if not 0 <= tau <= 1:
            raise UsageError(f"tau: {tau!r} is not allowed; it must be in [0, 1], and 1 learns the data's distribution")
        self.output, self.width, self.draws, self.noise, self.alpha, self.tau = dim, width, draws, noise, alpha, tau
        self.config = {"dim": dim, "width": width, "depth": depth, "draws": draws}
        self.config |= {"noise": noise, "alpha": alpha, "tau": tau}
        self.noise_embed = Linear(noise, width)
        self.blocks: Sequence[AdaLNBlock] = nn.ModuleList(AdaLNBlock(width) for _ in range(depth))  # type: ignore[assignment]
        self.final = AdaLNOutput(width, dim)
        xavier(self)
        # All modulations and the output begin at zero, so that a fresh head returns 0 for every noise.
        for layer in (*(block.modulation for block in self.blocks), self.final.modulation, self.final.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if z_dim is not None:
            self.bind(z_dim)

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.z_embed = Linear(z_dim, self.width)
            xavier(self.z_embed)
        super().bind(z_dim)

    def forward(self, z: Tensor, noise: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """Tokens (N, D) from z (N, C) and noise (N, K), uniform in [-0.5, 0.5); the temperature is a number or (N, 1).

        The temperature scales the shifts of the blocks, but not the shift of the output (EAR's published code).
        """
        condition = F.silu(self.noise_embed(noise))  # (N, W)
        h = self.z_embed(z)  # (N, W)
        for block in self.blocks:
            if isinstance(temperature, float) and temperature == 1.0:  # so in training, which may recompute or compile
                h = block(h, condition)  # (N, W)
            else:
                shift, scale, gate = block.modulate(condition)
                h = block.modulated(h, shift * temperature, scale, gate)  # (N, W)
        return self.final(h, condition)

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The energy loss per token, summed over M pairs (x, x'), of z (N, C) and y = target (N, D).

        Each pair adds |x - y|^a + |x' - y|^a - tau |x - x'|^a (Shao et al. 2025, section 3.2).
        """
        N, M, K = len(target), self.draws, self.noise
        uniform = at_least_float32(keys.fold("noise").uniform(M, 2, K), z)  # (N, M, 2, K)
        noise = uniform.permute(2, 1, 0, 3).reshape(2 * M * N, K) - 0.5  # first the x of all draws, then the x'
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would count its rounding as distance of samples
            made = self(at_least_float32(z).repeat(2 * M, 1), noise)  # (2 M N, D)
        x, other = made.view(2, M, N, self.output)  # each (M, N, D)
        y = at_least_float32(target, z)
        attraction = distance(x - y, self.alpha) + distance(other - y, self.alpha)  # (M, N)
        spread = distance(x - other, self.alpha)  # (M, N)
        energy = (attraction - self.tau * spread).sum(dim=0)  # (N,)
        parts = {"attraction": attraction.sum(dim=0), "spread": spread.sum(dim=0)}
        return HeadLoss(energy, torch.full_like(energy, M), parts)

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
        """Sampled tokens (N, D), from one pass of the network whatever the guidance."""
        _ = plan  # this head has no options
        self.check_sampling(z_null, guidance, temperature)
        noise = keys.fold("noise").uniform(self.noise) - 0.5  # (N, K)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if guidance is not None and z_null is not None:
                z = torch.lerp(z_null.float(), z, guidance.column)  # w z + (1 - w) z_null; exactly z where w is 1
            return self(z, noise, column(temperature))


def distance(difference: Tensor, alpha: float) -> Tensor:
    """The Euclidean norm over the last axis, to the power of `alpha`; its gradient is 0 where the difference is 0.

    The gradient is infinite there if alpha is below 1, and both samples of a pair are equal as long as a head is fresh.
    """
    norm = torch.linalg.vector_norm(difference, dim=-1)
    if alpha == 1.0:
        return norm
    some = norm > 0
    return torch.where(some, norm, 1.0).pow(alpha) * some
