"""Backbones compute a vector z for each requested token from the known tokens and the condition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

if TYPE_CHECKING:
    from seriatim.backbones.base import Backbone as Backbone
    from seriatim.backbones.base import Parallel as Parallel
    from seriatim.backbones.base import Sequential as Sequential
    from seriatim.backbones.bidirectional_transformer import Bidirectional as Bidirectional
    from seriatim.backbones.causal_transformer import Causal as Causal
    from seriatim.backbones.masked_transformer import Masked as Masked
else:
    __all__, __getattr__, __dir__ = exports(
        __name__,
        {
            "base": "Backbone Parallel Sequential",
            "bidirectional_transformer": "Bidirectional",
            "causal_transformer": "Causal",
            "masked_transformer": "Masked",
        },
    )
