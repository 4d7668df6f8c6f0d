"""Models: backbone + head + order -> a loss, and a naive sampler that is the specification."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Captions", "CausalModel", "Loss", "MaskedModel", "Model", "build_model"]


__getattr__ = exporter(
    __name__,
    {
        "Captions": "seriatim.models.captions",
        "CausalModel": "seriatim.models.causal",
        "Loss": "seriatim.models.base",
        "MaskedModel": "seriatim.models.masked",
        "Model": "seriatim.models.base",
        "build_model": "seriatim.models.build",
    },
)
