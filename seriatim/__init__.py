"""Seriatim: autoregressive image generation, any tokenizer x backbone x order x head.

    import seriatim
    pipe = seriatim.load("demo/model")
    pipe(class_labels=[3], seed=7).images[0].save("three.png")

Importing this package imports no torch; a public name does, when it is first used.
"""

from __future__ import annotations

from seriatim.core.lazy import exports

__version__ = "0.2.0"

_PUBLIC, __getattr__ = exports(
    __name__,
    {
        "core.errors": "CheckpointError ConfigError DataError NumericsError ResourceError SeriatimError UsageError",
        "core.orders": "ORDERS",
        "evaluation.base": "FeatureExtractor Features",
        "evaluation.compare": "compare",
        "evaluation.features": "FEATURES open_features",
        "evaluation.run": "evaluate",
        "evaluation.sweep": "sweep",
        "models.registry": "BACKBONES HEADS MODELS SPLITS",
        "pipeline.loading": "load",
        "pipeline.pipeline": "Pipeline",
        "pipeline.request": "SampleRequest",
        "pipeline.result": "Result",
        "sampling.step": "Step",
        "tokenizers.kinds": "TOKENIZERS",
        "training.loop": "train",
        "zoo": "PRESETS",
    },
)

__all__ = sorted(["__version__", *_PUBLIC])


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
