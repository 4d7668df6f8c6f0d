"""Conditions, such as classes and captions, on which an image or a part of a token is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

if TYPE_CHECKING:
    from seriatim.conditions.base import Condition as Condition
    from seriatim.conditions.base import Conditioner as Conditioner
    from seriatim.conditions.captions import CaptionEmbedder as CaptionEmbedder
    from seriatim.conditions.captions import Captions as Captions
    from seriatim.conditions.classes import Classes as Classes
    from seriatim.conditions.vectors import Vectors as Vectors
else:
    __all__, __getattr__, __dir__ = exports(
        __name__,
        {
            "base": "Condition Conditioner",
            "captions": "CaptionEmbedder Captions",
            "classes": "Classes",
            "vectors": "Vectors",
        },
    )
