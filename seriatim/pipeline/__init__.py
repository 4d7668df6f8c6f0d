"""The pipeline turns a request into images with their metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

if TYPE_CHECKING:
    from seriatim.pipeline.arguments import SettingsArgs as SettingsArgs
    from seriatim.pipeline.loading import load as load
    from seriatim.pipeline.pipeline import Pipeline as Pipeline
    from seriatim.pipeline.request import SampleRequest as SampleRequest
    from seriatim.pipeline.result import Result as Result
else:
    __all__, __getattr__, __dir__ = exports(
        __name__,
        {
            "arguments": "SettingsArgs",
            "loading": "load",
            "pipeline": "Pipeline",
            "request": "SampleRequest",
            "result": "Result",
        },
    )
