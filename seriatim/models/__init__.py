"""Models join a condition, an order, a backbone and a head; each has a loss, and a naive sampler as specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

if TYPE_CHECKING:
    from seriatim.models.base import Loss as Loss
    from seriatim.models.base import SequenceModel as SequenceModel
    from seriatim.models.build import build_model as build_model
    from seriatim.models.causal_model import CausalModel as CausalModel
    from seriatim.models.masked_model import MaskedModel as MaskedModel
    from seriatim.models.nested import Nested as Nested
else:
    __all__, __getattr__, __dir__ = exports(
        __name__,
        {
            "base": "Loss SequenceModel",
            "build": "build_model",
            "causal_model": "CausalModel",
            "masked_model": "MaskedModel",
            "nested": "Nested",
        },
    )
