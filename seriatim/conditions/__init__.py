"""Conditions, such as classes and captions, on which an image or a part of a token is generated."""

from __future__ import annotations

from seriatim.core.lazy import exports

__all__, __getattr__ = exports(
    __name__,
    {
        "base": "Condition Conditioner",
        "captions": "CaptionEmbedder Captions",
        "classes": "Classes",
        "vectors": "Vectors",
    },
)
