"""MAR's official checkpoints (Li et al. 2024): `checkpoint-last.pth`, or one safetensors file for each size.

The table says what each tensor is called there and here. Sizes follow from shapes; what shapes don't reveal (attention
heads) comes from the preset with the same sizes, or from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from seriatim.checkpoints import shapes
from seriatim.checkpoints.native import Bundle
from seriatim.checkpoints.official import OfficialFile
from seriatim.checkpoints.shapes import count, loaded, named_preset, shape
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.models.base import SequenceModel
from seriatim.models.build import model_config
from seriatim.models.masked_model import MaskedModel
from seriatim.tokenizers.base import Tokenizer
from seriatim.zoo import Preset

ENTRIES = ("model_ema", "model")  # of an official file; the average is what its authors sample from
ARGUMENTS = {"dropout": "proj_dropout", "label_dropout": "label_drop_prob", "min_mask_ratio": "mask_ratio_min"}
NAMES = {"mar-b": "mar-base", "mar-l": "mar-large", "mar-h": "mar-huge"}  # of files that hold one size each

# ours -> official; {i} is a number
TABLE = {
    "conditioner.no_class": "fake_latent",
    "conditioner.class_embedding": "class_emb.weight",
    "backbone.token_embed.{p}": "z_proj.{p}",
    "backbone.embed_norm.{p}": "z_proj_ln.{p}",
    "backbone.encoder_positions": "encoder_pos_embed_learned",
    "backbone.encoder.{i}.norm1.{p}": "encoder_blocks.{i}.norm1.{p}",
    "backbone.encoder.{i}.attention.qkv.{p}": "encoder_blocks.{i}.attn.qkv.{p}",
    "backbone.encoder.{i}.attention.proj.{p}": "encoder_blocks.{i}.attn.proj.{p}",
    "backbone.encoder.{i}.norm2.{p}": "encoder_blocks.{i}.norm2.{p}",
    "backbone.encoder.{i}.mlp.fc1.{p}": "encoder_blocks.{i}.mlp.fc1.{p}",
    "backbone.encoder.{i}.mlp.fc2.{p}": "encoder_blocks.{i}.mlp.fc2.{p}",
    "backbone.encoder_norm.{p}": "encoder_norm.{p}",
    "backbone.decoder_embed.{p}": "decoder_embed.{p}",
    "backbone.mask_token": "mask_token",
    "backbone.decoder_positions": "decoder_pos_embed_learned",
    "backbone.decoder.{i}.norm1.{p}": "decoder_blocks.{i}.norm1.{p}",
    "backbone.decoder.{i}.attention.qkv.{p}": "decoder_blocks.{i}.attn.qkv.{p}",
    "backbone.decoder.{i}.attention.proj.{p}": "decoder_blocks.{i}.attn.proj.{p}",
    "backbone.decoder.{i}.norm2.{p}": "decoder_blocks.{i}.norm2.{p}",
    "backbone.decoder.{i}.mlp.fc1.{p}": "decoder_blocks.{i}.mlp.fc1.{p}",
    "backbone.decoder.{i}.mlp.fc2.{p}": "decoder_blocks.{i}.mlp.fc2.{p}",
    "backbone.decoder_norm.{p}": "decoder_norm.{p}",
    "backbone.output_positions": "diffusion_pos_embed_learned",
    "head.time_embed.0.{p}": "diffloss.net.time_embed.mlp.0.{p}",
    "head.time_embed.2.{p}": "diffloss.net.time_embed.mlp.2.{p}",
    "head.z_embed.{p}": "diffloss.net.cond_embed.{p}",
    "head.x_embed.{p}": "diffloss.net.input_proj.{p}",
    "head.blocks.{i}.norm.{p}": "diffloss.net.res_blocks.{i}.in_ln.{p}",
    "head.blocks.{i}.fc1.{p}": "diffloss.net.res_blocks.{i}.mlp.0.{p}",
    "head.blocks.{i}.fc2.{p}": "diffloss.net.res_blocks.{i}.mlp.2.{p}",
    "head.blocks.{i}.modulation.{p}": "diffloss.net.res_blocks.{i}.adaLN_modulation.1.{p}",
    "head.final.modulation.{p}": "diffloss.net.final_layer.adaLN_modulation.1.{p}",
    "head.final.linear.{p}": "diffloss.net.final_layer.linear.{p}",
}
# Official tensors with one more axis in front than ours
UNSQUEEZED = {"mask_token", "encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"}


def official_name(ours: str) -> str:
    """What the official code calls our tensor."""
    return shapes.official_name(ours, TABLE)


def model_from_mar(
    file: OfficialFile, *, heads: int | tuple[int, int] | None = None, preset: str | None = None
) -> SequenceModel:
    """The model of an official file, strictly: every tensor is used, none is missing, all are finite.

    Raises CheckpointError, one line that names the tensor.
    """
    config = infer(file.tensors, str(file.path))
    set_trunk(config, file, heads, named_preset(config, preset, str(file.path), NAMES))
    config["head"]["draws"] = file.whole("diffusion_batch_mul", 4, least=1)
    return loaded(config, file, file.tensors, official_name)


def set_trunk(
    config: dict[str, Any],
    file: OfficialFile,
    heads: int | tuple[int, int] | None,
    known: Preset | None,
    name: str = "heads",  # of the argument that gives them
) -> None:
    """What shapes don't reveal: attention heads, as given or as the preset has them, and what the script was told."""
    if heads is not None:
        config["heads"] = list(heads) if isinstance(heads, tuple) else [heads, heads]
    elif known is not None:
        config["heads"] = [known.model["heads"]] * 2
    else:
        raise UsageError(
            f"{name}: {file.path} has {config['depth'][0]}+{config['depth'][1]} blocks of width {config['width'][0]}, "
            "which is no preset's, and weights don't tell the number of attention heads; give it"
        )
    for ours, theirs in ARGUMENTS.items():
        if theirs in file.arguments:
            config[ours] = float(file.argument(theirs, 0.0, most=1))


def infer(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Every size that shapes reveal, as a config of `build_model` without heads."""
    config = infer_trunk(tensors, where)
    width, _ = shape(tensors, "diffloss.net.input_proj.weight", 2, where)
    config["head"] = {"kind": "diffusion", "width": width, "depth": count(tensors, "diffloss.net.res_blocks", where)}
    return config


def infer_trunk(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The same without the head, of which there are several kinds."""
    width, dim = shape(tensors, "z_proj.weight", 2, where)
    _, tokens, z_dim = shape(tensors, "diffusion_pos_embed_learned", 3, where)
    _, rows, _ = shape(tensors, "encoder_pos_embed_learned", 3, where)
    hidden, _ = shape(tensors, "encoder_blocks.0.mlp.fc1.weight", 2, where)
    if rows <= tokens:
        raise CheckpointError(f"{where}: 'encoder_pos_embed_learned' has {rows} rows for {tokens} tokens and a buffer")
    return {
        "kind": "masked",
        "tokens": tokens,
        "dim": dim,
        "width": [width, z_dim],
        "depth": [count(tensors, "encoder_blocks", where), count(tensors, "decoder_blocks", where)],
        "buffer": rows - tokens,
        "mlp_ratio": hidden / width,
        "classes": shape(tensors, "class_emb.weight", 2, where)[0] if "class_emb.weight" in tensors else 0,
    }


def bundle_from_mar(file: OfficialFile, tokenizer: Tokenizer, class_names: list[str], **options: Any) -> Bundle:
    """A model folder's content: model, tokenizer, the authors' sampling settings where the sizes are a preset's."""
    model = model_from_mar(file, **options)
    usual = {"guidance_schedule": "linear", "num_diffusion_steps": 100}
    return bundle_of(model, file, tokenizer, class_names, NAMES, usual)


def bundle_of(
    model: SequenceModel,
    file: OfficialFile,
    tokenizer: Tokenizer,
    class_names: list[str],
    among: Collection[str],
    usual: Mapping[str, Any],
) -> Bundle:
    """A model folder's content, with the settings of the preset `among` that has the same sizes, or else `usual`."""
    shapes.check_fit(model, tokenizer, class_names, "vae")
    preset = named_preset(model_config(model), None, str(file.path), among)
    sampling = dict(preset.sampling if preset else usual)
    if "cfg" in file.arguments and not preset:
        sampling["guidance_scale"] = float(file.argument("cfg", 1.0))
    provenance = {"converted_from": file.path.name, "weights": file.which, "preset": preset.name if preset else None}
    return Bundle(model, tokenizer, class_names, sampling, provenance)


def mar_tensors(model: SequenceModel) -> dict[str, Tensor]:
    """The weights under their official names and shapes; raises UsageError for a model that isn't MAR's."""
    if type(model) is not MaskedModel:
        raise UsageError(f"model: {type(model).__name__} can't be written as MAR; it must be a masked model")
    if (backbone := model_config(model)["backbone"]) != "masked":
        raise UsageError(f"model: its backbone {backbone!r} can't be written as MAR, whose backbone is `masked`")
    result = {}
    for ours, tensor in model.state_dict().items():
        try:
            theirs = official_name(ours)
        except KeyError:
            raise UsageError(f"model: {ours!r} has no counterpart in MAR; its head must be `diffusion`") from None
        result[theirs] = tensor.detach()[None] if theirs in UNSQUEEZED else tensor.detach()
    return result


def patch_of(dim: int, channels: int) -> int:
    """Side of the latent patch that makes tokens of `dim` features."""
    patch = math.isqrt(dim // channels) if dim % channels == 0 else 0
    if patch * patch * channels != dim:
        raise UsageError(f"vae: its latents have {channels} channels; tokens of {dim} features are no patches of them")
    return patch
