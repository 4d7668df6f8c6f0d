"""Conditions, such as classes and captions, on which an image or a part of a token is generated."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Captions", "Classes", "Condition", "Conditioner", "Vectors"]


__getattr__ = exporter(
    __name__,
    {
        "Captions": "seriatim.conditions.captions",
        "CaptionEmbedder": "seriatim.conditions.captions",
        "Classes": "seriatim.conditions.classes",
        "Condition": "seriatim.conditions.base",
        "Conditioner": "seriatim.conditions.base",
        "Vectors": "seriatim.conditions.vectors",
    },
)
