"""The pipeline turns a request into images with their metadata."""

from __future__ import annotations

from seriatim.core.lazy import exports

__all__, __getattr__ = exports(
    __name__,
    {
        "loading": "load",
        "pipeline": "Pipeline",
        "request": "SampleRequest",
        "result": "Result",
    },
)
