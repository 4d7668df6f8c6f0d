"""Tokenizers turn images into tokens and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seriatim.core.lazy import exports

if TYPE_CHECKING:
    from seriatim.tokenizers.arrays import Arrays as Arrays
    from seriatim.tokenizers.base import Tokenizer as Tokenizer
    from seriatim.tokenizers.detok import Detok as Detok
    from seriatim.tokenizers.kl import KL as KL
    from seriatim.tokenizers.kmeans import KMeans as KMeans
    from seriatim.tokenizers.latent import Latent as Latent
    from seriatim.tokenizers.pixels import Pixels as Pixels
    from seriatim.tokenizers.pretrained import Pretrained as Pretrained
    from seriatim.tokenizers.quantise import Quantiser as Quantiser
    from seriatim.tokenizers.vq import FSQ as FSQ
    from seriatim.tokenizers.vq import VQ as VQ
else:
    __all__, __getattr__, __dir__ = exports(
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
