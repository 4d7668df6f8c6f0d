"""Backbones: from what is known to a vector z for every token asked for."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Backbone", "Causal", "Masked"]


__getattr__ = exporter(
    __name__,
    {
        "Backbone": "seriatim.backbones.base",
        "Causal": "seriatim.backbones.causal",
        "Masked": "seriatim.backbones.masked",
    },
)
