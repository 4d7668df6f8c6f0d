"""Build a model from plain data, and describe a model as plain data.

A model's config is one flat mapping, the same in a recipe, a preset and a model folder:

    kind: masked            # a name in MODELS: masked or causal
    backbone: masked        # a name in BACKBONES; optional, since each kind of model has a default
    tokens, dim, width, ... # arguments of the backbone
    classes, ...            # arguments of the model
    head: {kind: diffusion, width: ..., ...}   # a name in HEADS, and arguments of the head
    conditioner: {kind: mine, ...}             # a name in CONDITIONERS; optional, since classes or captions have one

A head of kind `nested` has a split and the config of the model of the token's parts. That config leaves out all sizes
that follow from the split:

    head: {kind: nested, split: {kind: features}, model: {kind: causal, width: ..., head: {kind: mixture}}}
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from seriatim.conditions.base import Conditioner
from seriatim.conditions.vectors import Vectors
from seriatim.core.construct import arguments, check_sizes, construct, pop_kind
from seriatim.core.errors import ConfigError, nearest, nearest_part, shown
from seriatim.heads.base import Head
from seriatim.models.base import SequenceModel, is_short, own_class
from seriatim.models.nested import Nested
from seriatim.models.registry import BACKBONES, CONDITIONERS, HEADS, MODELS, SPLITS
from seriatim.models.splits import Split

CONDITIONS = ("classes", "caption_dim", "caption_tokens")  # arguments of a model that stand for its conditioner


def build_model(
    config: Mapping[str, Any], where: str = "model", z_dim: int | None = None, conditions: int = 1, **known: Any
) -> SequenceModel:
    """A model with fresh weights. `known` are sizes that the config may leave out (tokens, dim or vocab, classes).

    With `z_dim` the model is one inside a nested head: its condition is `conditions` vectors of that width. Raises
    ConfigError, which names the key as a path that begins with `where`.
    """
    check_sizes({**known, **config}, where)
    kind, rest = pop_kind(config, MODELS, where)
    backbone_kind = rest.pop("backbone", kind)
    if not isinstance(backbone_kind, str) or backbone_kind not in BACKBONES:
        hint = nearest_part(str(backbone_kind)[:100], BACKBONES)
        raise ConfigError(f"{where}.backbone: {shown(backbone_kind)} is not known{hint}")
    head_config = rest.pop("head", None)
    conditioner_config = rest.pop("conditioner", None)
    if not isinstance(head_config, Mapping):
        raise ConfigError(f"{where}.head: is required, a mapping such as {{kind: diffusion, width: 256, depth: 3}}")
    given, wanted = ("dim", "vocab") if "vocab" in known else ("vocab", "dim")
    if wanted in known and rest.get(given) is not None:
        takes, are = ("features", "codes") if wanted == "vocab" else ("codes", "features")
        raise ConfigError(f"{where}.{given}: {rest[given]!r} is for tokens that are {takes}; the tokenizer's are {are}")
    for name, value in known.items():
        if rest.setdefault(name, value) != value:
            what = "the tokenizer and the data" if z_dim is None else "the split of the token"
            raise ConfigError(f"{where}.{name}: {rest[name]!r} does not fit {what} ({value}); leave it out")
    of_backbone = arguments(BACKBONES[backbone_kind])
    of_model = {k: v for k, v in arguments(MODELS[kind]).items() if k not in ("backbone", "head", "conditioner")}
    for name in rest:
        if name not in of_backbone and name not in of_model:
            hint = nearest(name, [*of_backbone, *of_model, "head", "backbone", "conditioner"])
            raise ConfigError(f"{where}: unknown key '{where}.{name}'{hint}")
    told = {k: v for k, v in MODELS[kind].of_backbone(rest).items() if k in of_backbone}
    own = {k: v for k, v in rest.items() if k in of_model}
    if z_dim is not None:
        for name in (*CONDITIONS, "condition_width", "conditioner"):
            if rest.get(name) or (name == "conditioner" and conditioner_config is not None):
                raise ConfigError(f"{where}.{name}: follows from what is around a nested head; leave it out")
        if "condition_width" in of_backbone:
            told["condition_width"] = z_dim
    backbone = construct(BACKBONES[backbone_kind], told, where)
    conditioner: Conditioner | None = None
    if z_dim is not None:
        conditioner = Vectors(z_dim, conditions, backbone.width)
    elif conditioner_config is not None:
        conditioner = build_conditioner(conditioner_config, rest, backbone.width, f"{where}.conditioner")
    if conditioner is not None:
        own = {k: v for k, v in own.items() if k not in CONDITIONS}
    head = build_head(head_config, dim=backbone.dim, vocab=backbone.vocab, z_dim=backbone.z_dim, where=f"{where}.head")
    return construct(MODELS[kind], own, where, backbone=backbone, head=head, conditioner=conditioner)


def build_conditioner(config: Any, model: Mapping[str, Any], width: int, where: str) -> Conditioner:
    """The conditioner that a model's config asks for; its width, and its classes if it takes any, follow from those."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}: {shown(config)} is not allowed; give a mapping such as {{kind: ...}}")
    for name in ("caption_dim", "caption_tokens"):
        if model.get(name) is not None:
            raise ConfigError(f"{where}: given with {name}, which asks for another conditioner; leave one of them out")
    kind, rest = pop_kind(config, CONDITIONERS, where)
    known = {"width": width, "classes": model.get("classes", 0)}
    for name in known.keys() & rest.keys():
        raise ConfigError(f"{where}.{name}: follows from the model around it; leave it out")
    allowed = arguments(CONDITIONERS[kind])
    return construct(CONDITIONERS[kind], rest, where, **{k: v for k, v in known.items() if k in allowed})


def build_head(
    config: Mapping[str, Any],
    *,
    dim: int | None,
    vocab: int | None,
    z_dim: int | None = None,
    where: str = "model.head",
) -> Head:
    """A head with fresh weights from a config such as `{"kind": "diffusion", "width": 256}`.

    Its tokens have `dim` features, or are codes of a vocabulary of `vocab`. A nested head also needs `z_dim`, the width
    of z, when it is built.
    """
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
    if issubclass(HEADS[kind], Nested):
        if dim is None or z_dim is None:
            raise ConfigError(f"{where}: a nested head is built with dim, the features of a token, and z_dim, of z")
        return build_nested(HEADS[kind], rest, dim, z_dim, where)
    return construct(HEADS[kind], rest, where)


def build_nested(cls: Any, config: dict[str, Any], dim: int, z_dim: int, where: str) -> Nested:
    """A nested head from its split, its model and perhaps a guide.

    The keys `backbone` and `head` in the place of `model` are short for a causal model of these two.
    """
    rest = {k: v for k, v in config.items() if k not in ("dim", "z_dim")}
    split = build_split(mapping(rest, "split", where), dim, f"{where}.split")
    if "backbone" in rest or ("head" in rest and "model" not in rest):
        backbone_kind, backbone = pop_kind(mapping(rest, "backbone", where), BACKBONES, f"{where}.backbone")
        rest["model"] = {"kind": "causal", "backbone": backbone_kind, **backbone, "head": mapping(rest, "head", where)}
        del rest["backbone"], rest["head"]
    model_config = mapping(rest, "model", where)
    guide_config, neighbours = rest.pop("guide", None), bool(rest.pop("neighbours", False))
    for name in rest:
        if name not in ("split", "model"):
            raise ConfigError(
                f"{where}: unknown key '{where}.{name}'{nearest(name, ['split', 'model', 'guide', 'neighbours'])}"
            )
    guide = None
    if guide_config is not None:
        guide = build_head(guide_config, dim=split.spec.dim, vocab=split.spec.vocab, where=f"{where}.guide")
    sizes: dict[str, Any] = {"tokens": split.spec.count}
    sizes |= {"dim": split.spec.dim} if split.spec.vocab is None else {"vocab": split.spec.vocab}
    if split.spec.grid is not None and "grid" in arguments(
        BACKBONES.get(model_config.get("backbone", model_config.get("kind")), Nested)
    ):
        sizes["grid"] = list(split.spec.grid)
    vectors = (5 if neighbours else 1) + (guide is not None)
    model = build_model(model_config, f"{where}.model", z_dim, vectors, **sizes)
    return construct(cls, {}, where, split=split, model=model, guide=guide)


def mapping(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """The mapping under a required key. Raises ConfigError if it is missing or not a mapping."""
    value = config.get(name)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}.{name}: is required, a mapping such as {{kind: ...}}")
    return value


def build_split(config: Mapping[str, Any], dim: int, where: str = "split") -> Split:
    """The split of a token of `dim` features from a config such as `{"kind": "features", "group": 2}`."""
    kind, rest = pop_kind(config, SPLITS, where)
    return construct(SPLITS[kind], rest, where, dim=dim)


def model_config(model: SequenceModel) -> dict[str, Any]:
    """The complete config from which `build_model` makes a model like this one."""
    return {
        "kind": name_of(model, MODELS, "MODELS"),
        "backbone": name_of(model.backbone, BACKBONES, "BACKBONES"),
        **model.backbone.config,
        **model.config,
        **conditioner_config(model.conditioner),
        "head": head_config(model.head),
    }


def conditioner_config(conditioner: Conditioner) -> dict[str, Any]:
    """The keys of a model's config for its conditioner, unless arguments of the model stand for it."""
    if is_short(conditioner):
        return {}
    own = {name: value for name, value in conditioner.config.items() if name not in ("classes", "width")}
    kind = name_of(conditioner, CONDITIONERS, "CONDITIONERS")
    return {"classes": conditioner.classes, "conditioner": {"kind": kind, **own}}


def head_config(head: Head) -> dict[str, Any]:
    """The complete config from which `build_head` makes a head like this one."""
    kind = name_of(head, HEADS, "HEADS")
    if not isinstance(head, Nested):
        return {"kind": kind, **head.config}
    inner = {k: v for k, v in model_config(head.model).items() if k != "condition_width"}
    config = {
        "kind": kind,
        "dim": head.output,
        "split": {"kind": name_of(head.split, SPLITS, "SPLITS"), **head.split.config},
    }
    config["model"] = inner
    if head.guide is not None:
        config["guide"] = head_config(head.guide)
    return config | ({"neighbours": True} if head.neighbours else {})


def name_of(part: object, table: Mapping[str, type[Any]], label: str) -> str:
    """The name under which the class of `part` is registered. Raises ConfigError if it is not."""
    own = own_class(part)
    for name, cls in table.items():
        if own is cls:
            return name
    raise ConfigError(f"{own.__name__} is not registered; add it with {label}['name'] = {own.__name__}")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which fresh weights depend on `seed` alone.

    Afterwards torch's CPU generator is in the state it had before; no other generator is touched.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def parameter_count(model: nn.Module) -> int:
    """The number of parameters, including those that are packed for sampling."""
    packed = sum(getattr(layer, "held", 0) for layer in model.modules())
    return packed + sum(p.numel() for p in model.parameters())
