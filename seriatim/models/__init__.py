"""Models join a condition, an order, a backbone and a head; each has a loss, and a naive sampler as specification."""

from __future__ import annotations

from seriatim.core.lazy import exports

__all__, __getattr__ = exports(
    __name__,
    {
        "base": "Loss SequenceModel",
        "build": "build_model",
        "causal_model": "CausalModel",
        "masked_model": "MaskedModel",
        "nested": "Nested",
    },
)
