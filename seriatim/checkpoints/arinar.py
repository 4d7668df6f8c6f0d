"""ARINAR's official checkpoints (Zhao et al. 2025): MAR's trunk, and a head that draws a token's features one by one.

Two things weights don't tell, and the authors changed both without a word:
- the attention heads inside the head: 4 at first, 16 in their code of today; tensors have the same shapes;
- a temperature above 1: it divided standard deviations at first (sharper), it multiplies them today. Ours multiplies.

What was published first is called "release" here, the other "current".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints import mar, shapes
from seriatim.checkpoints.native import Bundle
from seriatim.checkpoints.official import OfficialFile
from seriatim.checkpoints.shapes import count, named_preset, refuse, shape
from seriatim.core.errors import CheckpointError, UsageError, check_known
from seriatim.core.keys import Keys
from seriatim.heads.mixture import Mixture
from seriatim.models.base import SequenceModel
from seriatim.models.build import head_config, model_config
from seriatim.models.masked_model import MaskedModel
from seriatim.models.nested import Nested
from seriatim.tokenizers.base import Tokenizer
from seriatim.zoo import VAR_BLOCK

NAMES = {"arinar-b": "arinar-base", "arinar-l": "arinar-large"}  # of files that hold one size each
INNER_HEADS = {"release": 4, "current": 16}
CONVENTIONS = tuple(INNER_HEADS)

# ours -> official; {i} is a number
OF_HEAD = {
    "head.model.backbone.start_token": "arhead.start_token",
    "head.model.backbone.positions": "arhead.pos_embedding",
    "head.model.backbone.token_embed.{p}": "arhead.input_proj.{p}",
    "head.model.backbone.condition_embed.{p}": "arhead.cond_proj.{p}",
    "head.model.backbone.blocks.{i}.attention.qkv.weight": "arhead.blocks.{i}.attn.mat_qkv.weight",
    "head.model.backbone.blocks.{i}.attention.q_bias": "arhead.blocks.{i}.attn.q_bias",
    "head.model.backbone.blocks.{i}.attention.v_bias": "arhead.blocks.{i}.attn.v_bias",
    "head.model.backbone.blocks.{i}.attention.proj.{p}": "arhead.blocks.{i}.attn.proj.{p}",
    "head.model.backbone.blocks.{i}.mlp.fc1.{p}": "arhead.blocks.{i}.ffn.fc1.{p}",
    "head.model.backbone.blocks.{i}.mlp.down.{p}": "arhead.blocks.{i}.ffn.fc2.{p}",
    "head.model.backbone.blocks.{i}.modulation.{p}": "arhead.blocks.{i}.ada_lin.1.{p}",
    "head.model.backbone.norm.modulation.{p}": "arhead.head_nm.ada_lin.1.{p}",
    "head.model.head.final.{p}": "arhead.head.{p}",
}
TABLE = {k: v for k, v in mar.TABLE.items() if not k.startswith("head.")} | OF_HEAD
UNSQUEEZED = mar.UNSQUEEZED | {"arhead.start_token", "arhead.pos_embedding"}
ZERO = "arhead.blocks.{i}.attn.zero_k_bias"  # a buffer: keys have no bias, and the file says so in zeros


def official_name(ours: str) -> str:
    """What the official code calls our tensor."""
    return shapes.official_name(ours, TABLE)


def model_from_arinar(
    file: OfficialFile,
    *,
    inner_heads: int = INNER_HEADS["release"],
    trunk_heads: int | tuple[int, int] | None = None,
    preset: str | None = None,
) -> SequenceModel:
    """The model of an official file, strictly: every tensor is used, none is missing, all are finite.

    Raises CheckpointError, one line that names the tensor.
    """
    where = str(file.path)
    config = infer(file.tensors, where)
    mar.set_trunk(config, file, trunk_heads, named_preset(config, preset, where, NAMES), "trunk_heads")
    config["head"]["model"]["heads"] = inner_heads
    return shapes.loaded(config, file, without_zeros(file.tensors, where), official_name)


def infer(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Every size that shapes reveal, as a config of `build_model` without attention heads."""
    flow = sorted(name for name in tensors if name.startswith("arhead.nf."))
    if flow:
        raise CheckpointError(f"{where}: {flow[0]!r} is of a flow inside the head (use_nf), which is not read here")
    config = mar.infer_trunk(tensors, where)
    width, group = shape(tensors, "arhead.input_proj.weight", 2, where)
    numbers, _ = shape(tensors, "arhead.head.weight", 2, where)
    hidden, _ = shape(tensors, "arhead.blocks.0.ffn.fc1.weight", 2, where)
    if numbers % (2 * group + 1):
        raise CheckpointError(
            f"{where}: 'arhead.head.weight' gives {numbers} numbers, no mixture of Gaussians of {group} features"
        )
    config["head"] = {
        "kind": "nested",
        "split": {"kind": "features", "group": group},
        "model": {
            "kind": "causal",
            "width": width,
            "depth": count(tensors, "arhead.blocks", where),
            "hidden": hidden,
            **VAR_BLOCK,
            "head": {"kind": "mixture", "components": numbers // (2 * group + 1), "depth": 0},
        },
    }
    return config


def without_zeros(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """All tensors but the buffers of zeros, each of which must be there and zero."""
    rest = dict(tensors)
    for i in range(count(tensors, "arhead.blocks", where)):
        name = ZERO.format(i=i)
        if name not in rest:
            refuse(where, "lacks", [name])
        if bool(shapes.as_float32(rest.pop(name), name, where).any()):
            raise CheckpointError(
                f"{where}: tensor {name!r} is not zero; the keys of this model have a bias, ours none"
            )
    return rest


def our_temperature(value: float, convention: str) -> float:
    """A temperature of the authors' as ours: below 1 is sharper."""
    check_known(CONVENTIONS, temperature_convention=convention)
    return 1 / value if convention == "release" and value else value


@torch.no_grad()
def losses_by_heads(file: OfficialFile, tokens: Tensor, *, draws: int = 4, **options: Any) -> dict[int, float]:
    """The loss of tokens (B, L, D), in nats a token, under each number of heads that the files may mean.

    Weights trained with the other number are so much worse that a few images tell.
    """
    found, rows = {}, torch.arange(len(tokens))
    for heads in INNER_HEADS.values():
        model = model_from_arinar(file, inner_heads=heads, **options)
        losses = [model(tokens, None, Keys.of(i).fold(rows), Keys.of(i, "step")) for i in range(draws)]
        found[heads] = sum(float(loss.mean) for loss in losses) / draws  # the same masks for both
    return found


def bundle_from_arinar(
    file: OfficialFile,
    tokenizer: Tokenizer,
    class_names: list[str],
    *,
    convention: str | None = None,  # of the temperature among the file's arguments; None: that of the inner heads
    inner_heads: int = INNER_HEADS["release"],
    **options: Any,
) -> Bundle:
    """A model folder's content: model, tokenizer, the authors' sampling settings where the sizes are a preset's."""
    model = model_from_arinar(file, inner_heads=inner_heads, **options)
    made = mar.bundle_of(model, file, tokenizer, class_names, NAMES, {"guidance_schedule": "linear"})
    if "temperature" in file.arguments:
        usual = {heads: name for name, heads in INNER_HEADS.items()}.get(inner_heads, "current")
        made.sampling["temperature"] = our_temperature(file.argument("temperature", 1.0, most=100), convention or usual)
    if file.arguments.get("bilevel_schedule", "constant") != "constant":
        made.sampling["feature_schedule"] = str(file.arguments["bilevel_schedule"])
    made.provenance["inner_heads"] = inner_heads
    return made


def arinar_tensors(model: SequenceModel) -> dict[str, Tensor]:
    """The weights under their official names and shapes; raises UsageError for a model that isn't ARINAR's."""
    if type(model) is not MaskedModel or model_config(model)["backbone"] != "masked":
        raise UsageError(f"model: {type(model).__name__} can't be written as ARINAR; it must be a masked model")
    head = model.head
    if not isinstance(head, Nested) or not isinstance(head.model.head, Mixture) or not head.sequential:
        raise UsageError(f"model: its head is {type(head).__name__}; ARINAR's is `nested` with a `mixture` inside")
    split, block = head_config(head)["split"], head_config(head)["model"]
    unlike = {f"model.{k}": v for k, v in VAR_BLOCK.items() if block[k] != v}
    if (split["kind"], split.get("order")) != ("features", "natural"):
        unlike["split"] = "features in natural order"
    if head.model.head.depth or head.model.head.full:
        unlike["head"] = "a mixture of depth 0, diagonal"
    if unlike:
        name, value = next(iter(unlike.items()))
        raise UsageError(f"model: its head.{name} has no counterpart in ARINAR's code, whose is {value!r}")
    result = {}
    for ours, tensor in model.state_dict().items():
        theirs = official_name(ours)
        result[theirs] = tensor.detach()[None] if theirs in UNSQUEEZED else tensor.detach()
    for i in range(block["depth"]):
        result[ZERO.format(i=i)] = torch.zeros(block["width"])
    return result


def inner_heads_of(model: SequenceModel) -> int:
    """How many attention heads its head has: what the official code must be told, and files don't say."""
    assert isinstance(model.head, Nested), f"{type(model.head).__name__} has no backbone of its own"
    return int(head_config(model.head)["model"]["heads"])
