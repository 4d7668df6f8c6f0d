"""Heads: the distribution p(x | z) of one token."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Diffusion", "Head", "HeadLoss"]


__getattr__ = exporter(
    __name__,
    {
        "Diffusion": "seriatim.heads.diffusion",
        "Head": "seriatim.heads.base",
        "HeadLoss": "seriatim.heads.base",
    },
)
