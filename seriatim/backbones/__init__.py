"""Backbones compute a vector z for each requested token from the known tokens and the condition."""

from __future__ import annotations

from seriatim.core.lazy import exports

__all__, __getattr__ = exports(
    __name__,
    {
        "base": "Backbone Parallel Sequential",
        "bidirectional_transformer": "Bidirectional",
        "causal_transformer": "Causal",
        "masked_transformer": "Masked",
    },
)
