"""The mixture head, a few Gaussians whose parameters a network computes from z, as in GIVT (Tschannen et al. 2023).

p(x | z) = sum_k pi_k(z) N(x; mu_k(z), Sigma_k(z)), where Sigma_k is diagonal, or full by its Cholesky factor. The loss
is the exact negative log-likelihood, and sampling needs only one pass of the network. Unusual:
- nothing is clamped, so that a variance may become as small as training makes it;
- guidance samples from p_c^w p_u^(1-w), which is not a mixture; `guided.py` has two ways to do this;
- depth 0 is one Linear of z, whose output has the layout of ARINAR's inner head (Zhao et al. 2025).

Shapes: N tokens, D features, C width of z, W width of the network, d blocks, K components, S candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.errors import UsageError, check_known, check_least
from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance, Head, HeadLoss, Plan, column
from seriatim.heads.gaussians import GaussianMixture
from seriatim.heads.guided import resample_product, sample_product
from seriatim.nn.block import MLP, NORM_EPS, xavier
from seriatim.nn.linear import Linear, at_least_float32

COVARIANCES = ("diagonal", "full")
GUIDANCE_MODES = ("exact", "resample")
CANDIDATES = 1000  # S, the published number


@dataclass(frozen=True)
class MixtureOptions:
    """The options for sampling a token from the mixture."""

    top_p: Annotated[
        float, "Sample only from the heaviest components that together reach this weight; 1 means all."
    ] = 1.0
    guidance_mode: Annotated[
        str | None, "How to guide: exact or resample. None means exact for one feature, and resample for more."
    ] = None


class Mixture(Head):
    """p(x | z) as K Gaussians, computed by d residual MLP blocks of width W, or by one Linear if d = 0."""

    has_density = True
    Options = MixtureOptions

    def __init__(
        self,
        dim: int,  # D
        components: int = 16,  # K
        *,
        width: int = 1024,  # W
        depth: int = 3,  # d
        covariance: str = "diagonal",  # or "full"
        z_dim: int | None = None,  # C; None means that the model sets it
    ) -> None:
        super().__init__()
        check_least(1, dim=dim, components=components, width=width)
        check_least(0, depth=depth)
        check_known(COVARIANCES, covariance=covariance)
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
            # Layout: [K D means | K D log-variances | K logits | K D(D-1)/2 below the diagonal, row by row]
            self.final = Linear(W if self.depth else z_dim, count)
            nn.init.normal_(self.final.weight, std=0.02)
            nn.init.zeros_(self.final.bias)
            nn.init.normal_(self.final.bias[: K * D], std=0.5)  # equal means would all learn the same
        super().bind(z_dim)

    def forward(self, z: Tensor) -> Tensor:
        """The parameters of the mixtures of z (N, C): (N, 2 K D + K), or more with full covariances."""
        if self.depth:
            z = self.z_embed(z)  # (N, W)
            for norm, block in zip(self.norms, self.blocks, strict=False):
                z = z + block(norm(z))
            z = self.norms[-1](z)
        with torch.autocast(z.device.type, enabled=False):  # the three digits of bfloat16 are too few for log-variances
            return self.final(at_least_float32(z))

    def mixture(self, z: Tensor) -> GaussianMixture:
        """p(x | z) of each row of z (N, C); samplers and the training loop check that it is finite."""
        return unpacked(self(z), self.components, self.output)

    @override
    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """-log p(target | z) in nats, for z (N, C) and target (N, D); `keys` are not used."""
        nll = -self.log_prob(z, target)
        return HeadLoss(nll, torch.ones_like(nll))

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """The normalised log density in nats, (N,), for z (N, C) and target (N, D)."""
        made = self.mixture(z)
        with torch.autocast(z.device.type, enabled=False):
            return made.log_prob(target.to(made.means.dtype))

    @torch.no_grad()
    @override
    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:
        """The entropy of each feature given only z, in nats, by quadrature: (N, D)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.mixture(at_least_float32(z)).feature_entropy()

    # --- sampling -------------------------------------------------------------------------------------------------

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
        """Sampled tokens (N, D). The temperature scales standard deviations and never weights.

        A row depends only on its own key and z, not on the other rows. `top_p` acts on the conditional mixture. "exact"
        guidance is exact on the support that `sample_product` defines, and "resample" is approximate.
        """
        options = self.options() if plan is None else plan.options
        self.check_sampling(z_null, guidance, temperature)
        with torch.autocast(z.device.type, enabled=False):
            cond = self.mixture(at_least_float32(z)).nucleus(options.top_p)
            if guidance is None or z_null is None:
                return self._free(cond, keys, temperature)
            if guidance.all:  # in this usual case no rows need to be selected
                return self._product(cond, z_null, guidance.scale, keys, temperature, options)
            drawn = self._free(cond, keys, temperature)
            rows = guidance.guided.nonzero()[:, 0]
            there = rows.to(z.device)
            warmth = temperature[there] if isinstance(temperature, Tensor) else temperature
            product = self._product(
                cond.select(there), z_null[there], guidance.scale[there], keys.select(there), warmth, options
            )
            return drawn.index_copy(0, there, product)

    def _free(self, cond: GaussianMixture, keys: Keys, temperature: float | Tensor) -> Tensor:
        """Tokens (N, D) sampled without guidance."""
        u, normal = keys.fold("component").uniform(), keys.fold("value").normal(self.output)
        return cond.sample(u, normal, column(temperature))

    def _product(
        self,
        cond: GaussianMixture,
        z_null: Tensor,
        w: Tensor,
        keys: Keys,
        temperature: float | Tensor,
        options: MixtureOptions,
    ) -> Tensor:
        """Tokens (N, D) sampled from p_c^w p_u^(1-w), for scales w (N,) that are not 1."""
        null = self.mixture(at_least_float32(z_null))
        if (options.guidance_mode or GUIDANCE_MODES[self.output != 1]) == "exact":
            u = keys.fold("product").uniform()
            return sample_product(cond, null, w, u, column(temperature))[:, None]
        some = keys.fold("candidates")
        candidates = some.fold("component").uniform(CANDIDATES), some.fold("value").normal(CANDIDATES, self.output)
        return resample_product(cond, null, w, candidates, keys.fold("choice").uniform(), column(temperature))

    def check_options(self, options: MixtureOptions, temperature: float = 1.0) -> None:
        super().check_options(options, temperature)
        top_p, mode = options.top_p, options.guidance_mode
        if not 0 < top_p <= 1:
            raise UsageError(f"top_p: {top_p!r} is not allowed; it must be above 0 and at most 1 (all components)")
        if mode is not None:
            check_known(GUIDANCE_MODES, guidance_mode=mode)
        if mode == "exact" and self.output != 1:
            raise UsageError(
                f"guidance_mode: 'exact' is only for one feature, and this head has {self.output}; use 'resample'"
            )


def unpacked(flat: Tensor, components: int, dim: int) -> GaussianMixture:
    """The mixture with the parameters [K D means | K D log-variances | K logits], (N, 2 K D + K), by component.

    With full covariances the entries of L below the diagonal follow, and the log-variances are those of L's diagonal:
    2 log L_dd.
    """
    N, K, D = len(flat), components, dim
    means, log_variances, logits, below = flat.split([K * D, K * D, K, flat.shape[1] - 2 * K * D - K], dim=1)
    lower = None
    if below.shape[1]:
        row, column = torch.tril_indices(D, D, -1, device=flat.device)
        lower = flat.new_zeros(N, K, D, D)
        lower[:, :, row, column] = below.view(N, K, D * (D - 1) // 2)
    return GaussianMixture(logits, means.view(N, K, D), 0.5 * log_variances.view(N, K, D), lower)
