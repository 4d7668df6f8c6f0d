"""The table of heads: name -> class; `nested` puts itself into it. Register one of your own: `HEADS["mine"] = Mine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seriatim.core.construct import construct, pop_kind
from seriatim.core.errors import ConfigError
from seriatim.heads.base import Head
from seriatim.heads.bins import Bins
from seriatim.heads.categorical import Categorical
from seriatim.heads.diffusion import Diffusion
from seriatim.heads.flow import Flow
from seriatim.heads.mixture import Mixture

HEADS: dict[str, type[Head]] = {
    "bins": Bins,
    "categorical": Categorical,
    "diffusion": Diffusion,
    "flow": Flow,
    "mixture": Mixture,
}


def build_head(config: Mapping[str, Any], *, dim: int | None, vocab: int | None, where: str = "model.head") -> Head:
    """`{"kind": "diffusion", "width": 256}` -> a head with fresh weights for tokens of D features, or of V codes."""
    kind, rest = pop_kind(config, HEADS, where)
    if HEADS[kind].discrete != (vocab is not None):
        real, codes = f"{dim} real features", f"codes of {vocab}"
        ours, theirs = ("codes", real) if HEADS[kind].discrete else ("real features", codes)
        fit = ", ".join(name for name, cls in HEADS.items() if cls.discrete == (vocab is not None))
        raise ConfigError(
            f"{where}.kind: {kind!r} draws {ours}, the tokens are {theirs}; choose a head that draws those ({fit}), or "
            f"a tokenizer of {ours}"
        )
    name, size = ("dim", dim) if vocab is None else ("vocab", vocab)
    if rest.setdefault(name, size) != size:
        raise ConfigError(f"{where}.{name}: {rest[name]!r} does not fit the backbone's tokens ({size}); leave it out")
    return construct(HEADS[kind], rest, where)
