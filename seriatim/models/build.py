"""The tables name -> class, and from plain data to a model.

A model's config is one flat mapping, the same in a recipe, a preset and a model folder:

    kind: masked            # MODELS
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

from seriatim.backbones.base import Backbone
from seriatim.backbones.masked import Masked
from seriatim.core.construct import arguments, construct, pop_kind
from seriatim.core.errors import ConfigError, nearest
from seriatim.heads.base import Head
from seriatim.heads.diffusion import Diffusion
from seriatim.heads.flow import Flow
from seriatim.heads.mixture import Mixture
from seriatim.models.masked import MaskedModel
from seriatim.nn.packed import PackedLinear

HEADS: dict[str, type[Head]] = {"diffusion": Diffusion, "flow": Flow, "mixture": Mixture}
BACKBONES: dict[str, type[Backbone]] = {"masked": Masked}
MODELS: dict[str, type[MaskedModel]] = {"masked": MaskedModel}


def build_model(config: Mapping[str, Any], **known: Any) -> MaskedModel:
    """A model with fresh weights; `known` are sizes that the config may leave out (tokens, dim, classes)."""
    kind, rest = pop_kind(config, MODELS, "model")
    backbone_kind = rest.pop("backbone", kind)
    if backbone_kind not in BACKBONES:
        raise ConfigError(f"model.backbone: {backbone_kind!r} is not known{nearest(str(backbone_kind), BACKBONES)}")
    head_config = rest.pop("head", None)
    if not isinstance(head_config, Mapping):
        raise ConfigError("model.head: is required, a mapping such as {kind: diffusion, width: 256, depth: 3}")
    for name, value in known.items():
        if rest.setdefault(name, value) != value:
            raise ConfigError(f"model.{name}: {rest[name]!r} does not fit the tokenizer and the data ({value})")
    of_backbone = arguments(BACKBONES[backbone_kind])
    of_model = {k: v for k, v in arguments(MODELS[kind]).items() if k not in ("backbone", "head")}
    for name in rest:
        if name not in of_backbone and name not in of_model:
            hint = nearest(name, [*of_backbone, *of_model, "head", "backbone"])
            raise ConfigError(f"model: unknown key 'model.{name}'{hint}")
    backbone = construct(BACKBONES[backbone_kind], {k: v for k, v in rest.items() if k in of_backbone}, "model")
    head_kind, head_rest = pop_kind(head_config, HEADS, "model.head")
    head_rest.setdefault("dim", backbone.dim)
    head = construct(HEADS[head_kind], head_rest, "model.head")
    own = {k: v for k, v in rest.items() if k in of_model}
    return construct(MODELS[kind], own, "model", backbone=backbone, head=head)


def model_config(model: MaskedModel) -> dict[str, Any]:
    """The config that `build_model` takes back, complete."""
    head = {"kind": name_of(model.head, HEADS, "HEADS"), **model.head.config}
    return {
        "kind": name_of(model, MODELS, "MODELS"),
        "backbone": name_of(model.backbone, BACKBONES, "BACKBONES"),
        **model.backbone.config,
        "classes": model.classes,
        "label_dropout": model.label_dropout,
        "min_mask_ratio": model.min_mask_ratio,
        "mask_ratio_std": model.mask_ratio_std,
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
    """Weights drawn inside depend on `seed` alone; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def parameter_count(model: nn.Module) -> int:
    """Those packed for sampling too."""
    packed = sum(layer.count for layer in model.modules() if isinstance(layer, PackedLinear))
    return packed + sum(p.numel() for p in model.parameters())
