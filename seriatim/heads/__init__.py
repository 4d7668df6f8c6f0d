"""Heads: the distribution p(x | z) of one token."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Bins", "Categorical", "Diffusion", "Flow", "GaussianMixture", "Head", "HeadLoss", "Mixture", "Nested"]


__getattr__ = exporter(
    __name__,
    {
        "Bins": "seriatim.heads.bins",
        "Categorical": "seriatim.heads.categorical",
        "Diffusion": "seriatim.heads.diffusion",
        "Flow": "seriatim.heads.flow",
        "GaussianMixture": "seriatim.heads.gaussians",
        "Head": "seriatim.heads.base",
        "HeadLoss": "seriatim.heads.base",
        "Mixture": "seriatim.heads.mixture",
        "Nested": "seriatim.heads.nested",
    },
)
