"""Models join a condition, an order, a backbone and a head; each has a loss, and a naive sampler as specification."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["CausalModel", "Loss", "MaskedModel", "Nested", "SequenceModel", "build_model"]


__getattr__ = exporter(
    __name__,
    {
        "CausalModel": "seriatim.models.causal_model",
        "Loss": "seriatim.models.base",
        "MaskedModel": "seriatim.models.masked_model",
        "Nested": "seriatim.models.nested",
        "SequenceModel": "seriatim.models.base",
        "build_model": "seriatim.models.build",
    },
)
