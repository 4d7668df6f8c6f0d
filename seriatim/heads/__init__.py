"""Heads: the distribution p(x | z) of one token."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Categorical", "Diffusion", "Head", "HeadLoss", "Nested"]


__getattr__ = exporter(
    __name__,
    {
        "Categorical": "seriatim.heads.categorical",
        "Diffusion": "seriatim.heads.diffusion",
        "Head": "seriatim.heads.base",
        "HeadLoss": "seriatim.heads.base",
        "Nested": "seriatim.heads.nested",
    },
)
