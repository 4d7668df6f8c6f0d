"""Tokenizers turn images into tokens and back."""

from __future__ import annotations

from seriatim.core.lazy import exporter

__all__ = ["FSQ", "KL", "VQ", "Arrays", "Detok", "KMeans", "Latent", "Pixels", "Pretrained", "Quantiser", "Tokenizer"]


__getattr__ = exporter(
    __name__,
    {
        "Arrays": "seriatim.tokenizers.arrays",
        "Detok": "seriatim.tokenizers.detok",
        "FSQ": "seriatim.tokenizers.vq",
        "KL": "seriatim.tokenizers.kl",
        "KMeans": "seriatim.tokenizers.kmeans",
        "Latent": "seriatim.tokenizers.latent",
        "Pixels": "seriatim.tokenizers.pixels",
        "Pretrained": "seriatim.tokenizers.pretrained",
        "Quantiser": "seriatim.tokenizers.quantise",
        "Tokenizer": "seriatim.tokenizers.base",
        "VQ": "seriatim.tokenizers.vq",
    },
)
