"""Tokenizers turn images into tokens and back."""

from __future__ import annotations

from seriatim.core.lazy import exports

__all__, __getattr__ = exports(
    __name__,
    {
        "arrays": "Arrays",
        "base": "Tokenizer",
        "detok": "Detok",
        "kl": "KL",
        "kmeans": "KMeans",
        "latent": "Latent",
        "pixels": "Pixels",
        "pretrained": "Pretrained",
        "quantise": "Quantiser",
        "vq": "FSQ VQ",
    },
)
