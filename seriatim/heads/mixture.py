"""The mixture head: a few Gaussians whose parameters a network computes from z, as in GIVT (Tschannen et al. 2023).

p(x | z) = sum_k pi_k(z) N(x; mu_k(z), Sigma_k(z)), Sigma_k diagonal, or full by its Cholesky factor. The loss is the
negative log-likelihood, exact; one pass of the network is all that a draw needs. Unusual:
- nothing is clamped: a variance may become as small as training makes it;
- guidance draws from p_c^w p_u^(1-w), which is no mixture: `guided.py` has the two ways;
- depth 0 is one Linear of z, whose output is laid out as that of ARINAR's inner head (Zhao et al. 2025).

Shapes: N tokens, D features, C width of z, W width of the network, d blocks, K components, S candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.errors import NumericsError, UsageError, nearest
from seriatim.core.random import Noise
from seriatim.heads.base import Head, HeadLoss
from seriatim.heads.gaussians import GaussianMixture
from seriatim.heads.guided import resample_product, sample_product
from seriatim.nn.blocks import MLP, NORM_EPS, xavier
from seriatim.nn.linear import Linear

COVARIANCES = ("diagonal", "full")
GUIDANCE_MODES = ("exact", "resample")
CANDIDATES = 1000  # S, as published


class Mixture(Head):
    """p(x | z) as K Gaussians, by d residual MLP blocks of width W; with d = 0 by one Linear."""

    has_density = True
    sample_options = frozenset({"top_p", "guidance_mode"})

    def __init__(
        self,
        dim: int,  # D
        components: int = 16,  # K
        *,
        width: int = 1024,  # W
        depth: int = 3,  # d
        covariance: str = "diagonal",  # or "full"
        z_dim: int | None = None,  # C; None: the model tells
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1),
            ("components", components, 1),
            ("width", width, 1),
            ("depth", depth, 0),
        ):
            if value < least:
                raise UsageError(f"{name}: {value!r} is not allowed; it must be at least {least}")
        if covariance not in COVARIANCES:
            raise UsageError(f"covariance: {covariance!r} is not known{nearest(str(covariance), COVARIANCES)}")
        self.output, self.components, self.width, self.depth = dim, components, width, depth
        self.full = covariance == "full"
        self.config = {"dim": dim, "components": components, "width": width, "depth": depth, "covariance": covariance}
        if z_dim is not None:
            self.bind(z_dim)

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            W, K, D = self.width, self.components, self.output
            count = 2 * K * D + K + (K * D * (D - 1) // 2 if self.full else 0)
            if self.depth:
                self.z_embed = Linear(z_dim, W)
                self.norms = nn.ModuleList(nn.LayerNorm(W, eps=NORM_EPS) for _ in range(self.depth + 1))
                self.blocks = nn.ModuleList(MLP(W, 1.0) for _ in range(self.depth))
                xavier(self)
            # [K D means | K D log-variances | K logits | K D(D-1)/2 below the diagonal, row by row], by component
            self.final = Linear(W if self.depth else z_dim, count)
            nn.init.normal_(self.final.weight, std=0.02)
            nn.init.zeros_(self.final.bias)
            nn.init.normal_(self.final.bias[: K * D], std=0.5)  # apart, or they would learn the same
        super().bind(z_dim)

    def forward(self, z: Tensor) -> Tensor:
        """z (N, C) -> the parameters as they are laid out, float32: (N, 2 K D + K), more with full covariances."""
        if self.depth:
            z = self.z_embed(z)  # (N, W)
            for norm, block in zip(self.norms, self.blocks, strict=False):
                z = z + block(norm(z))
            z = self.norms[-1](z)
        with torch.autocast(z.device.type, enabled=False):  # a log-variance of three digits is none
            return self.final(z.float())

    def mixture(self, z: Tensor) -> GaussianMixture:
        """z (N, C) -> p(x | z) of each row; NumericsError if a parameter, or what it is made from, is not finite."""
        flat = self(z)
        made = unpacked(flat, self.components, self.output)
        if bool(torch.isfinite(flat).all()):  # one look, at each part of each step
            return made
        named = {"log-variance": made.log_std, "mean": made.means, "logit": made.logits}
        name = next((name for name, t in named.items() if not bool(torch.isfinite(t).all())), "covariance")
        if not bool(torch.isfinite(z).all()):  # in a nested head, also for a token that isn't finite
            raise NumericsError(
                "the Mixture head is given a z that is not finite: training has diverged, or tokens or weights are "
                "damaged; check the data, lower the learning rate, or go back to an earlier checkpoint"
            )
        raise NumericsError(
            f"the Mixture head's {name} of a component is not finite: training has diverged, or the weights "
            "are damaged; lower the learning rate, or go back to an earlier checkpoint"
        )

    @override
    def loss(self, z: Tensor, target: Tensor, noise: Noise) -> HeadLoss:
        """z (N, C), target (N, D) -> -log p(target | z), in nats, summed over features; `noise` is not used."""
        nll = -self.log_prob(z, target)
        return HeadLoss(nll, torch.ones_like(nll))

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """The normalised log density, in nats: z (N, C), target (N, D) -> (N,)."""
        made = self.mixture(z)
        with torch.autocast(z.device.type, enabled=False):
            return made.log_prob(target.float())

    @torch.no_grad()
    @override
    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:
        """Of each feature given z alone, by quadrature (`GaussianMixture.feature_entropy`): (N, D)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.mixture(z.float()).feature_entropy()

    # --- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Noise,
        z_null: Tensor | None = None,
        guidance: float | Tensor = 1.0,
        temperature: float = 1.0,
        *,
        top_p: float = 1.0,  # of the weights: the lightest components that are not needed for it draw nothing
        guidance_mode: str | None = None,  # "exact" or "resample"; None: exact where D = 1
        **unknown: Any,
    ) -> Tensor:
        """Tokens (N, D). The temperature scales standard deviations, never weights.

        A row whose scale is 1 draws a uniform number and D normal ones; a guided one a uniform number ("exact"), or
        those of its S candidates and one more ("resample"): whatever the other rows do. `top_p` is of the conditional
        mixture. "exact" is so on the support that `sample_product` defines, "resample" approximate.
        """
        if unknown:
            raise UsageError(f"{sorted(unknown)[0]}: the Mixture head has no such sampling option")
        scale = self.check_sampling(z, z_null, guidance, temperature)  # (N, 1) or None
        self.check_options(temperature, top_p=top_p, guidance_mode=guidance_mode)
        exact = (guidance_mode or GUIDANCE_MODES[self.output != 1]) == "exact"
        with torch.autocast(z.device.type, enabled=False):
            cond = self.mixture(z.float()).nucleus(top_p)
            if scale is None or z_null is None:
                return cond.sample(noise.uniform(), noise.normal(self.output), temperature)
            guided = scale[:, 0] != 1
            if bool(guided.all()):  # as nearly always: nothing is picked and put back
                return self._product(cond, z_null, scale[:, 0], noise, temperature, exact)
            drawn = z.new_empty(len(z), self.output, dtype=torch.float32)
            plain, rows = (~guided).nonzero()[:, 0], guided.nonzero()[:, 0]
            of = noise.select(plain)
            drawn[plain] = cond.select(plain).sample(of.uniform(), of.normal(self.output), temperature)
            drawn[rows] = self._product(
                cond.select(rows), z_null[rows], scale[rows, 0], noise.select(rows), temperature, exact
            )
            return drawn

    def _product(
        self, cond: GaussianMixture, z_null: Tensor, w: Tensor, noise: Noise, temperature: float, exact: bool
    ) -> Tensor:
        """Tokens (N, D) of p_c^w p_u^(1-w); w (N,), none of them 1."""
        null = self.mixture(z_null.float())
        if exact:
            return sample_product(cond, null, w, noise.uniform(), temperature)[:, None]
        candidates = noise.uniform(CANDIDATES), noise.normal(CANDIDATES, self.output)
        return resample_product(cond, null, w, candidates, noise.uniform(), temperature)

    def check_options(self, temperature: float = 1.0, **options: Any) -> None:
        super().check_options(temperature, **options)
        top_p, mode = options.get("top_p", 1.0), options.get("guidance_mode")
        if not 0 < top_p <= 1:
            raise UsageError(f"top_p: {top_p!r} is not allowed; it must be above 0 and at most 1 (all components)")
        if mode is not None and mode not in GUIDANCE_MODES:
            raise UsageError(f"guidance_mode: {mode!r} is not known{nearest(str(mode), GUIDANCE_MODES)}")
        if mode == "exact" and self.output != 1:
            raise UsageError(
                f"guidance_mode: 'exact' is for one feature, and this head draws {self.output}; use 'resample'"
            )


def unpacked(flat: Tensor, components: int, dim: int) -> GaussianMixture:
    """[K D means | K D log-variances | K logits], (N, 2 K D + K), component by component; more is below the diagonal.

    With full covariances the log-variances are those of L's diagonal: 2 log L_dd.
    """
    N, K, D = len(flat), components, dim
    means, log_variances, logits, below = flat.split([K * D, K * D, K, flat.shape[1] - 2 * K * D - K], dim=1)
    lower = None
    if below.shape[1]:
        row, column = torch.tril_indices(D, D, -1, device=flat.device)
        lower = flat.new_zeros(N, K, D, D)
        lower[:, :, row, column] = below.view(N, K, D * (D - 1) // 2)
    return GaussianMixture(logits, means.view(N, K, D), 0.5 * log_variances.view(N, K, D), lower)
