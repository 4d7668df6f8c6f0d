"""The pipeline turns a request into images with their metadata."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Pipeline", "Result", "SampleRequest", "load"]

__getattr__ = exporter(
    __name__,
    {
        "Pipeline": "seriatim.pipeline.pipeline",
        "Result": "seriatim.pipeline.result",
        "SampleRequest": "seriatim.pipeline.request",
        "load": "seriatim.pipeline.loading",
    },
)
