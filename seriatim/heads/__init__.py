"""Heads model the distribution p(x | z) of one token."""

from __future__ import annotations

from seriatim.core.lazy import exports

__all__, __getattr__ = exports(
    __name__,
    {
        "base": "Guidance Head HeadLoss",
        "bins": "Bins",
        "categorical": "Categorical",
        "diffusion": "Diffusion",
        "energy": "Energy",
        "flow": "Flow",
        "gaussians": "GaussianMixture",
        "mixture": "Mixture",
    },
)
