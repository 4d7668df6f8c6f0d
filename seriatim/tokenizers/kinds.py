"""The table that maps names to tokenizer classes. Register one of your own with `TOKENIZERS["mine"] = Mine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seriatim.core.construct import check_sizes, construct, pop_kind
from seriatim.core.errors import ConfigError, shown
from seriatim.tokenizers.arrays import Arrays
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.detok import Detok
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels
from seriatim.tokenizers.pretrained import Pretrained
from seriatim.tokenizers.vq import FSQ, VQ

PLACES = ("path", "subfolder")  # the keys of a recipe that name a place outside of a saved folder

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "arrays": Arrays,
    "detok": Detok,
    "fsq": FSQ,
    "kl": KL,
    "kmeans": KMeans,
    "pixels": Pixels,
    "pretrained": Pretrained,
    "vq": VQ,
}


def build_tokenizer(config: Mapping[str, Any], *, stored: bool = False) -> Tokenizer:
    """A tokenizer with fresh statistics from a config such as `{"kind": "pixels", "size": 8, ...}`.

    A config that was `stored` in a folder must not name another place, such as a hub repository; otherwise whoever
    wrote the folder would decide what is downloaded and read here. Raises ConfigError.
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
    """The config from which `build_tokenizer` makes a tokenizer like this one."""
    for kind, cls in TOKENIZERS.items():
        if type(tokenizer) is cls:
            return {"kind": kind, **tokenizer.config}
    raise ValueError(f"{type(tokenizer).__name__} is not registered in TOKENIZERS; add it under a name")
