"""Models: condition + order + backbone + head -> a loss, and a naive sampler that is the specification."""

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
