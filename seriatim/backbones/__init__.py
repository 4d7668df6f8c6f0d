"""Backbones compute a vector z for each requested token from the known tokens and the condition."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Backbone", "Causal", "Masked", "Parallel", "Sequential"]


__getattr__ = exporter(
    __name__,
    {
        "Backbone": "seriatim.backbones.base",
        "Parallel": "seriatim.backbones.base",
        "Sequential": "seriatim.backbones.base",
        "Causal": "seriatim.backbones.causal_transformer",
        "Masked": "seriatim.backbones.masked_transformer",
    },
)
