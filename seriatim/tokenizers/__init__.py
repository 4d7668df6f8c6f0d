"""Tokenizers: images to tokens and back."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["Pixels", "Tokenizer"]


__getattr__ = exporter(__name__, {"Pixels": "seriatim.tokenizers.pixels", "Tokenizer": "seriatim.tokenizers.base"})
