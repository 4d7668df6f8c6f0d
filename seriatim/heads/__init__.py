"""Heads model the distribution p(x | z) of one token."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Bins", "Categorical", "Diffusion", "Flow", "GaussianMixture", "Guidance", "Head", "HeadLoss", "Mixture"]


__getattr__ = exporter(
    __name__,
    {
        "Bins": "seriatim.heads.bins",
        "Categorical": "seriatim.heads.categorical",
        "Diffusion": "seriatim.heads.diffusion",
        "Flow": "seriatim.heads.flow",
        "GaussianMixture": "seriatim.heads.gaussians",
        "Guidance": "seriatim.heads.base",
        "Head": "seriatim.heads.base",
        "HeadLoss": "seriatim.heads.base",
        "Mixture": "seriatim.heads.mixture",
    },
)
