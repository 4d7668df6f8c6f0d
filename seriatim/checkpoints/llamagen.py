"""LlamaGen's official checkpoints (Sun et al. 2024): class- and text-conditional transformers over codes.

A `.pt` of the training script ("model", perhaps "ema"), one of DeepSpeed ("module"), a bare state dict (the larger
models, from FSDP), or safetensors. The table says what each tensor is called there and here. Sizes follow from shapes;
attention heads come from the preset with the same trunk, or from the caller; how many tokens an image has, no weight
tells: it is the tokenizer's, and must be what the file says of it, where it does.

What such files hold besides weights is dropped: `freqs_cis`, the rotary table, after a look at its length, and the
keys and values that a sampling run left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints import shapes
from seriatim.checkpoints.native import Bundle
from seriatim.checkpoints.official import OfficialFile
from seriatim.checkpoints.shapes import count, loaded, named_preset, refuse, shape
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.core.spec import grid_of
from seriatim.models.base import SequenceModel
from seriatim.models.build import model_config
from seriatim.tokenizers.base import Tokenizer

ENTRIES = ("model", "ema", "module")  # of an official file; its authors sample from the first
NAMES = ("llamagen-b", "llamagen-l", "llamagen-xl", "llamagen-xxl", "llamagen-3b")
CLASSES = "cls_embedding.embedding_table.weight"  # (classes + 1, C): the last row is no class
NULL_CAPTION = "cls_embedding.uncond_embedding"  # (T, F)
LEFT = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\.[kv]_cache")  # what is no weight

# ours -> official; {i} is a number
TABLE = {
    "conditioner.class_embedding": f"{CLASSES} but its last row",  # as `apart` calls them
    "conditioner.no_class": f"{CLASSES}, its last row",
    "conditioner.no_caption": NULL_CAPTION,
    "conditioner.mlp.fc1.weight": "cls_embedding.cap_proj.fc1.weight",
    "conditioner.mlp.down.weight": "cls_embedding.cap_proj.fc2.weight",
    "backbone.token_embed.weight": "tok_embeddings.weight",
    "backbone.blocks.{i}.norm1.weight": "layers.{i}.attention_norm.weight",
    "backbone.blocks.{i}.attention.qkv.weight": "layers.{i}.attention.wqkv.weight",
    "backbone.blocks.{i}.attention.proj.weight": "layers.{i}.attention.wo.weight",
    "backbone.blocks.{i}.norm2.weight": "layers.{i}.ffn_norm.weight",
    "backbone.blocks.{i}.mlp.gate.weight": "layers.{i}.feed_forward.w1.weight",
    "backbone.blocks.{i}.mlp.down.weight": "layers.{i}.feed_forward.w2.weight",
    "backbone.blocks.{i}.mlp.up.weight": "layers.{i}.feed_forward.w3.weight",
    "backbone.norm.weight": "norm.weight",
    "head.logits.weight": "output.weight",
}
# What a model must be to be LlamaGen's
FORM = {
    "kind": "causal",
    "backbone": "causal",
    "order": "raster",
    "condition_width": None,
    "conditioning": "prefix",
    "norm": "rms",
    "mlp": "swiglu",
    "positions": "rope",
    "rotate_prefix": False,
    "start_token": False,
    "bias": False,
    "attention_scale": 1.0,
}


def official_name(ours: str) -> str:
    """What the official code calls our tensor."""
    return shapes.official_name(ours, TABLE)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights, the class table as the two tensors that we have; what is no weight is left out."""
    result = {name: tensor for name, tensor in tensors.items() if not LEFT.fullmatch(name)}
    table = result.pop(CLASSES, None)
    if table is not None and table.ndim == 2:
        result[TABLE["conditioner.class_embedding"]] = table[:-1]
        result[TABLE["conditioner.no_class"]] = table[-1:]
    return result


def model_from_llamagen(
    file: OfficialFile,
    *,
    tokens: int,
    grid: Sequence[int] | None = None,
    heads: int | None = None,
    preset: str | None = None,
) -> SequenceModel:
    """The model of an official file, strictly: every weight is used, none is missing, all are finite.

    Raises CheckpointError, one line that names the tensor.
    """
    where = str(file.path)
    config = infer(file.tensors, where)
    made_for = said_tokens(file, config["prefix"])
    if made_for not in (None, tokens):
        raise CheckpointError(
            f"{where}: was made for {made_for} tokens, the tokenizer makes {tokens}; give one for images of another "
            "size (--size, where it is a file)"
        )
    known = named_preset(config, preset, where, NAMES)
    if heads is None and known is None:
        raise UsageError(
            f"heads: {where} has {config['depth']} blocks of width {config['width']}, which is no preset's, and "
            "weights don't tell the number of attention heads; give it"
        )
    config |= {"tokens": tokens, "grid": list(grid or grid_of(None, tokens))}
    config["heads"] = heads if heads is not None or known is None else known.model["heads"]
    config["dropout"] = float(file.argument("dropout_p", 0.1, most=0.999))
    config["label_dropout"] = float(file.argument("class_dropout_prob", 0.1, most=1))
    return loaded(config, file, apart(file.tensors), official_name)


def said_tokens(file: OfficialFile, prefix: int) -> int | None:
    """How many tokens an image has, where its rotary table or the training script's arguments tell."""
    if "freqs_cis" in file.tensors:
        return len(file.tensors["freqs_cis"]) - prefix
    size, stride = (file.arguments.get(name) for name in ("image_size", "downsample_size"))
    if isinstance(size, int) and isinstance(stride, int) and size >= stride > 0:
        return (size // stride) ** 2
    return None


def infer(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Every size that shapes reveal, as a config of `build_model` without tokens and heads."""
    vocab, width = shape(tensors, "tok_embeddings.weight", 2, where)
    hidden, _ = shape(tensors, "layers.0.feed_forward.w1.weight", 2, where)
    if CLASSES not in tensors and NULL_CAPTION not in tensors:
        refuse(where, "lacks", [CLASSES])
    condition: dict[str, Any] = {"prefix": 1}
    if NULL_CAPTION in tensors:
        T, F = shape(tensors, NULL_CAPTION, 2, where)
        condition = {"prefix": T, "classes": 0, "caption_dim": F, "caption_tokens": T}
    else:
        condition["classes"] = shape(tensors, CLASSES, 2, where)[0] - 1
    return {
        **FORM,
        **condition,
        "vocab": vocab,
        "width": width,
        "depth": count(tensors, "layers", where),
        "hidden": hidden,
        "head": {"kind": "categorical", "bias": False},
    }


def bundle_from_llamagen(file: OfficialFile, tokenizer: Tokenizer, class_names: list[str], **options: Any) -> Bundle:
    """A model folder's content: model, tokenizer, the authors' sampling settings where the sizes are a preset's."""
    model = model_from_llamagen(file, tokens=tokenizer.count, grid=tokenizer.grid, **options)
    shapes.check_fit(model, tokenizer, class_names, "vq")
    preset = named_preset(model_config(model), None, str(file.path), NAMES)
    sampling = dict(preset.sampling) if preset and model.classes else {"guidance_schedule": "constant"}
    provenance = {"converted_from": file.path.name, "weights": file.which, "preset": preset.name if preset else None}
    return Bundle(model, tokenizer, class_names, sampling, provenance)


def llamagen_tensors(model: SequenceModel) -> dict[str, Tensor]:
    """The weights under their official names; raises UsageError for a model that isn't LlamaGen's."""
    config = model_config(model)
    head = config["head"]
    form = {key: config.get(key) for key in FORM} | {"head.kind": head["kind"], "head.bias": head.get("bias")}
    for key, value in (FORM | {"head.kind": "categorical", "head.bias": False}).items():
        if form[key] != value:
            raise UsageError(
                f"model: can't be written as LlamaGen, whose {key} is {value!r}, not {form[key]!r}: its "
                "code would draw something else"
            )
    if not model.classes and config.get("caption_dim") is None:
        raise UsageError("model: can't be written as LlamaGen, which takes classes or captions; it has neither")
    result = {official_name(ours): tensor.detach() for ours, tensor in model.state_dict().items()}
    if model.classes:
        parts = [result.pop(TABLE[name]) for name in ("conditioner.class_embedding", "conditioner.no_class")]
        result[CLASSES] = torch.cat(parts)
    return result
