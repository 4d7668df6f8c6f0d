"""The tables name -> class, and from plain data to a model.

A model's config is one flat mapping, the same in a recipe, a preset and a model folder:

    kind: masked            # MODELS: masked or causal
    backbone: masked        # BACKBONES; optional: each model kind has a default
    tokens, dim, width, ... # of the backbone
    classes, ...            # of the model
    head: {kind: diffusion, width: ..., ...}   # HEADS

Register a class of your own with one line: `HEADS["mine"] = Mine`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from seriatim.backbones.build import BACKBONES
from seriatim.core.construct import arguments, check_sizes, construct, pop_kind
from seriatim.core.errors import ConfigError, nearest, shown
from seriatim.heads.build import HEADS, build_head
from seriatim.models.base import Model
from seriatim.models.causal import CausalModel
from seriatim.models.masked import MaskedModel
from seriatim.nn.packed import PackedLinear

MODELS: dict[str, type[Model]] = {"masked": MaskedModel, "causal": CausalModel}


def build_model(config: Mapping[str, Any], **known: Any) -> Model:
    """A model with fresh weights; `known` are sizes that the config may leave out (tokens, dim or vocab, classes)."""
    check_sizes({**known, **config}, "model")
    kind, rest = pop_kind(config, MODELS, "model")
    backbone_kind = rest.pop("backbone", kind)
    if not isinstance(backbone_kind, str) or backbone_kind not in BACKBONES:
        hint = nearest(str(backbone_kind)[:100], BACKBONES)
        raise ConfigError(f"model.backbone: {shown(backbone_kind)} is not known{hint}")
    head_config = rest.pop("head", None)
    if not isinstance(head_config, Mapping):
        raise ConfigError("model.head: is required, a mapping such as {kind: diffusion, width: 256, depth: 3}")
    given, wanted = ("dim", "vocab") if "vocab" in known else ("vocab", "dim")
    if wanted in known and given in rest:
        takes, are = ("features", "codes") if wanted == "vocab" else ("codes", "features")
        raise ConfigError(f"model.{given}: {rest[given]!r} is for tokens that are {takes}; the tokenizer's are {are}")
    for name, value in known.items():
        if rest.setdefault(name, value) != value:
            raise ConfigError(f"model.{name}: {rest[name]!r} does not fit the tokenizer and the data ({value})")
    of_backbone = arguments(BACKBONES[backbone_kind])
    of_model = {k: v for k, v in arguments(MODELS[kind]).items() if k not in ("backbone", "head")}
    for name in rest:
        if name not in of_backbone and name not in of_model:
            hint = nearest(name, [*of_backbone, *of_model, "head", "backbone"])
            raise ConfigError(f"model: unknown key 'model.{name}'{hint}")
    told = {k: v for k, v in MODELS[kind].of_backbone(rest).items() if k in of_backbone}
    backbone = construct(BACKBONES[backbone_kind], told, "model")
    head = build_head(head_config, dim=backbone.dim, vocab=backbone.vocab)
    own = {k: v for k, v in rest.items() if k in of_model}
    return construct(MODELS[kind], own, "model", backbone=backbone, head=head)


def model_config(model: Model) -> dict[str, Any]:
    """The config that `build_model` takes back, complete."""
    head = {"kind": name_of(model.head, HEADS, "HEADS"), **model.head.config}
    return {
        "kind": name_of(model, MODELS, "MODELS"),
        "backbone": name_of(model.backbone, BACKBONES, "BACKBONES"),
        **model.backbone.config,
        **model.config,
        "head": head,
    }


def name_of(module: nn.Module, table: Mapping[str, type[Any]], label: str) -> str:
    """Under which name the class of `module` is registered."""
    for name, cls in table.items():
        if type(module) is cls:
            return name
    raise ConfigError(
        f"{type(module).__name__} is not registered; add it with {label}['name'] = {type(module).__name__}"
    )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights drawn inside depend on `seed` alone; torch's generator of the CPU is left as it was, and no other is
    touched."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def parameter_count(model: nn.Module) -> int:
    """Those packed for sampling too."""
    packed = sum(layer.count for layer in model.modules() if isinstance(layer, PackedLinear))
    return packed + sum(p.numel() for p in model.parameters())
