"""The table of tokenizers: name -> class. Register one of your own with `TOKENIZERS["mine"] = Mine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seriatim.core.construct import check_sizes, construct, pop_kind
from seriatim.core.errors import ConfigError, shown
from seriatim.tokenizers.arrays import Arrays
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.pretrained import Pretrained
from seriatim.tokenizers.vq import VQ

PLACES = ("path", "subfolder")  # keys of a recipe that say where a tokenizer is found

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "arrays": Arrays,
    "kl": KL,
    "kmeans": KMeans,
    "pixels": Pixels,
    "pretrained": Pretrained,
    "vq": VQ,
}


def build_tokenizer(config: Mapping[str, Any], *, stored: bool = False) -> Tokenizer:
    """`{"kind": "pixels", "size": 8, ...}` -> a tokenizer with fresh statistics.

    A config that was `stored` in a folder is complete: it must name no other place, such as a repository of the hub,
    or whoever wrote the folder would decide what is fetched and read here.
    """
    check_sizes(config, "tokenizer")
    kind, rest = pop_kind(config, TOKENIZERS, "tokenizer")
    for name in PLACES:
        if stored and rest.get(name) is not None:
            raise ConfigError(
                f"tokenizer.{name}: {shown(rest[name])} names a place outside of the folder, which a saved tokenizer "
                "never does; save it again with save_tokenizer or save_bundle"
            )
    return construct(TOKENIZERS[kind], rest, "tokenizer")


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The config that `build_tokenizer` takes back."""
    for kind, cls in TOKENIZERS.items():
        if type(tokenizer) is cls:
            return {"kind": kind, **tokenizer.config}
    raise ValueError(f"{type(tokenizer).__name__} is not registered in TOKENIZERS; add it under a name")
