"""Seriatim: autoregressive image generation, any tokenizer x backbone x order x head.

    import seriatim
    pipe = seriatim.load("demo/model")
    pipe(class_labels=[3], seed=7).images[0].save("three.png")

Importing this package imports no torch; a public name does, when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

__version__ = "0.2.0"

if TYPE_CHECKING:
    from seriatim.backbones.base import Parallel as Parallel
    from seriatim.backbones.base import Sequential as Sequential
    from seriatim.checkpoints.native import Bundle as Bundle
    from seriatim.conditions.base import Condition as Condition
    from seriatim.conditions.base import Conditioner as Conditioner
    from seriatim.core.errors import CheckpointError as CheckpointError
    from seriatim.core.errors import ConfigError as ConfigError
    from seriatim.core.errors import DataError as DataError
    from seriatim.core.errors import NumericsError as NumericsError
    from seriatim.core.errors import ResourceError as ResourceError
    from seriatim.core.errors import SeriatimError as SeriatimError
    from seriatim.core.errors import UsageError as UsageError
    from seriatim.core.keys import Keys as Keys
    from seriatim.core.orders import ORDERS as ORDERS
    from seriatim.core.plugins import load_installed_plugins as load_installed_plugins
    from seriatim.core.plugins import load_plugin as load_plugin
    from seriatim.core.schedules import GUIDANCE_SCHEDULES as GUIDANCE_SCHEDULES
    from seriatim.core.schedules import TOKEN_SCHEDULES as TOKEN_SCHEDULES
    from seriatim.evaluation.base import FeatureExtractor as FeatureExtractor
    from seriatim.evaluation.base import Features as Features
    from seriatim.evaluation.compare import compare as compare
    from seriatim.evaluation.features import FEATURES as FEATURES
    from seriatim.evaluation.features import open_features as open_features
    from seriatim.evaluation.run import evaluate as evaluate
    from seriatim.evaluation.sweep import sweep as sweep
    from seriatim.heads.base import Head as Head
    from seriatim.models.base import SequenceModel as SequenceModel
    from seriatim.models.registry import BACKBONES as BACKBONES
    from seriatim.models.registry import CONDITIONERS as CONDITIONERS
    from seriatim.models.registry import HEADS as HEADS
    from seriatim.models.registry import MODELS as MODELS
    from seriatim.models.registry import SPLITS as SPLITS
    from seriatim.pipeline.arguments import SettingsArgs as SettingsArgs
    from seriatim.pipeline.folder_sampling import sample_to_folder as sample_to_folder
    from seriatim.pipeline.loading import load as load
    from seriatim.pipeline.pipeline import Pipeline as Pipeline
    from seriatim.pipeline.request import SampleRequest as SampleRequest
    from seriatim.pipeline.result import Result as Result
    from seriatim.sampling.step import Step as Step
    from seriatim.tokenizers.base import Tokenizer as Tokenizer
    from seriatim.tokenizers.kinds import TOKENIZERS as TOKENIZERS
    from seriatim.training.config import Recipe as Recipe
    from seriatim.training.config import read_recipe as read_recipe
    from seriatim.training.loop import train as train
    from seriatim.zoo import PRESETS as PRESETS
else:
    _PUBLIC, __getattr__, __dir__ = exports(
        __name__,
        {
            "backbones.base": "Parallel Sequential",
            "checkpoints.native": "Bundle",
            "conditions.base": "Condition Conditioner",
            "core.errors": "CheckpointError ConfigError DataError NumericsError ResourceError SeriatimError UsageError",
            "core.keys": "Keys",
            "core.orders": "ORDERS",
            "core.plugins": "load_installed_plugins load_plugin",
            "core.schedules": "GUIDANCE_SCHEDULES TOKEN_SCHEDULES",
            "evaluation.base": "FeatureExtractor Features",
            "evaluation.compare": "compare",
            "evaluation.features": "FEATURES open_features",
            "evaluation.run": "evaluate",
            "evaluation.sweep": "sweep",
            "heads.base": "Head",
            "models.base": "SequenceModel",
            "models.registry": "BACKBONES CONDITIONERS HEADS MODELS SPLITS",
            "pipeline.arguments": "SettingsArgs",
            "pipeline.folder_sampling": "sample_to_folder",
            "pipeline.loading": "load",
            "pipeline.pipeline": "Pipeline",
            "pipeline.request": "SampleRequest",
            "pipeline.result": "Result",
            "sampling.step": "Step",
            "tokenizers.base": "Tokenizer",
            "tokenizers.kinds": "TOKENIZERS",
            "training.config": "Recipe read_recipe",
            "training.loop": "train",
            "zoo": "PRESETS",
        },
    )
    __all__ = sorted(["__version__", *_PUBLIC])
