"""Seriatim: autoregressive image generation, any tokenizer x backbone x order x head.

    import seriatim
    pipe = seriatim.load("demo/model")
    pipe(class_labels=[3], seed=7).images[0].save("three.png")

Importing this package imports no torch; a public name does, when it is first used.
"""

from __future__ import annotations

from seriatim.core.lazy import exporter

__version__ = "0.2.0"

_PUBLIC = {
    "BACKBONES": "seriatim.models.registry",
    "FEATURES": "seriatim.evaluation.features",
    "FeatureExtractor": "seriatim.evaluation.base",
    "Features": "seriatim.evaluation.base",
    "HEADS": "seriatim.models.registry",
    "MODELS": "seriatim.models.registry",
    "ORDERS": "seriatim.core.orders",
    "PRESETS": "seriatim.zoo",
    "SPLITS": "seriatim.models.registry",
    "TOKENIZERS": "seriatim.tokenizers.kinds",
    "CheckpointError": "seriatim.core.errors",
    "ConfigError": "seriatim.core.errors",
    "DataError": "seriatim.core.errors",
    "NumericsError": "seriatim.core.errors",
    "Pipeline": "seriatim.pipeline.pipeline",
    "ResourceError": "seriatim.core.errors",
    "Result": "seriatim.pipeline.result",
    "SampleRequest": "seriatim.pipeline.request",
    "SeriatimError": "seriatim.core.errors",
    "Step": "seriatim.sampling.step",
    "UsageError": "seriatim.core.errors",
    "evaluate": "seriatim.evaluation.run",
    "load": "seriatim.pipeline.loading",
    "open_features": "seriatim.evaluation.features",
    "sweep": "seriatim.evaluation.sweep",
    "train": "seriatim.training.loop",
}

__all__ = sorted(["__version__", *_PUBLIC])

__getattr__ = exporter(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
