"""The table of tokenizers: name -> class. Register one of your own with `TOKENIZERS["mine"] = Mine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seriatim.core.construct import construct, pop_kind
from seriatim.tokenizers.arrays import Arrays
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.pretrained import Pretrained
from seriatim.tokenizers.vq import VQ

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "arrays": Arrays,
    "kl": KL,
    "kmeans": KMeans,
    "pixels": Pixels,
    "pretrained": Pretrained,
    "vq": VQ,
}


def build_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """`{"kind": "pixels", "size": 8, ...}` -> a tokenizer with fresh statistics."""
    kind, rest = pop_kind(config, TOKENIZERS, "tokenizer")
    return construct(TOKENIZERS[kind], rest, "tokenizer")


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The config that `build_tokenizer` takes back."""
    for kind, cls in TOKENIZERS.items():
        if type(tokenizer) is cls:
            return {"kind": kind, **tokenizer.config}
    raise ValueError(f"{type(tokenizer).__name__} is not registered in TOKENIZERS; add it under a name")
