"""EAR's official checkpoints (Shao et al. 2025): one bidirectional stack of blocks and an energy head.

The authors have released no weights (May 2025), so these files are those of one's own trainings with their code. The
table says what each tensor is called there and here. Weights do not tell the attention heads, which come from the
preset with the same sizes or from the caller, nor the exponent and the weight of the loss, which come from the
arguments in the file.
"""

from __future__ import annotations

from typing import Any

from seriatim.checkpoints import mar, shapes
from seriatim.checkpoints.native import Bundle
from seriatim.checkpoints.official import OfficialFile
from seriatim.checkpoints.shapes import count, loaded, named_preset, shape
from seriatim.core.errors import UsageError
from seriatim.models.base import SequenceModel
from seriatim.tokenizers.base import Tokenizer

SAMPLING = {
    "guidance_schedule": "linear",
    "num_inference_steps": 64,
    "temperature": 0.7,
}  # what the authors' README says
BUFFER = 64  # the published size
ARGUMENTS = {"dropout": "proj_dropout", "label_dropout": "label_drop_prob", "min_mask_ratio": "mask_ratio_min"}
NAMES = {"ear-b": "ear-base", "ear-l": "ear-large", "ear-h": "ear-huge"}  # of files that hold one size each

# ours -> official; {i} is a number
TABLE = {
    "conditioner.no_class": "fake_latent",
    "conditioner.class_embedding": "class_emb.weight",
    "backbone.token_embed.{p}": "z_proj.{p}",
    "backbone.mask_token": "mask_token",
    "backbone.positions": "decoder_pos_embed_learned",
    "backbone.blocks.{i}.norm1.{p}": "decoder_blocks.{i}.norm1.{p}",
    "backbone.blocks.{i}.attention.qkv.{p}": "decoder_blocks.{i}.attn.qkv.{p}",
    "backbone.blocks.{i}.attention.proj.{p}": "decoder_blocks.{i}.attn.proj.{p}",
    "backbone.blocks.{i}.norm2.{p}": "decoder_blocks.{i}.norm2.{p}",
    "backbone.blocks.{i}.mlp.fc1.{p}": "decoder_blocks.{i}.mlp.fc1.{p}",
    "backbone.blocks.{i}.mlp.fc2.{p}": "decoder_blocks.{i}.mlp.fc2.{p}",
    "backbone.norm.{p}": "decoder_norm.{p}",
    "head.noise_embed.{p}": "scoreloss.net.noise_embed.{p}",
    "head.z_embed.{p}": "scoreloss.net.input_proj.{p}",
    "head.blocks.{i}.norm.{p}": "scoreloss.net.res_blocks.{i}.in_ln.{p}",
    "head.blocks.{i}.fc1.{p}": "scoreloss.net.res_blocks.{i}.mlp.0.{p}",
    "head.blocks.{i}.fc2.{p}": "scoreloss.net.res_blocks.{i}.mlp.2.{p}",
    "head.blocks.{i}.modulation.{p}": "scoreloss.net.res_blocks.{i}.adaLN_modulation.1.{p}",
    "head.final.modulation.{p}": "scoreloss.net.final_layer.adaLN_modulation.1.{p}",
    "head.final.linear.{p}": "scoreloss.net.final_layer.linear.{p}",
}


def official_name(ours: str) -> str:
    """What the official code calls our tensor."""
    return shapes.official_name(ours, TABLE)


def model_from_ear(
    file: OfficialFile, *, heads: int | None = None, buffer: int | None = None, preset: str | None = None
) -> SequenceModel:
    """The model of an official file, strictly: every tensor is used, none is missing, all are finite.

    Raises CheckpointError, one line that names the tensor.
    """
    config = infer(file, buffer)
    known = named_preset(config, preset, str(file.path), NAMES)
    if heads is None and known is None:
        raise UsageError(
            f"heads: {file.path} has {config['depth']} blocks of width {config['width']}, which is no preset's, and "
            "weights don't tell the number of attention heads; give it"
        )
    config["heads"] = heads if known is None or heads is not None else known.model["heads"]
    for ours, theirs in ARGUMENTS.items():
        if theirs in file.arguments:
            config[ours] = float(file.argument(theirs, 0.0, most=1))
    config["head"] |= {
        "draws": file.whole("score_batch_mul", 2, least=1),
        "alpha": float(file.argument("alpha", 1.0, most=2)),
        "tau": float(file.argument("train_temperature", 1.0, most=1)),
    }
    return loaded(config, file, file.tensors, official_name)


def infer(file: OfficialFile, buffer: int | None = None) -> dict[str, Any]:
    """Every size of the model, as a config of `build_model` without attention heads.

    The positions of the buffer and of the tokens are one tensor, so their numbers do not follow from shapes: the size
    of the buffer is `buffer`, or the one among the file's arguments, or the published 64. Raises UsageError for a
    `buffer` that the file's arguments contradict.
    """
    tensors, where = file.tensors, str(file.path)
    width, dim = shape(tensors, "z_proj.weight", 2, where)
    _, rows, _ = shape(tensors, "decoder_pos_embed_learned", 3, where)
    hidden, _ = shape(tensors, "decoder_blocks.0.mlp.fc1.weight", 2, where)
    head_width, noise = shape(tensors, "scoreloss.net.noise_embed.weight", 2, where)
    told = file.whole("buffer_size", buffer or BUFFER, least=1)
    if buffer not in (None, told):
        raise UsageError(f"buffer: {buffer} is not allowed; {where} was trained with buffer_size={told}; leave it out")
    buffer = told
    if not 1 <= buffer < rows:
        raise UsageError(
            f"buffer: {buffer} is not allowed; {where} has {rows} positions for the buffer and the tokens, so it must "
            f"be from 1 to {rows - 1}"
        )
    return {
        "kind": "masked",
        "backbone": "bidirectional",
        "tokens": rows - buffer,
        "dim": dim,
        "width": width,
        "depth": count(tensors, "decoder_blocks", where),
        "buffer": buffer,
        "mlp_ratio": hidden / width,
        "classes": shape(tensors, "class_emb.weight", 2, where)[0] if "class_emb.weight" in tensors else 0,
        "head": {
            "kind": "energy",
            "width": head_width,
            "depth": count(tensors, "scoreloss.net.res_blocks", where),
            "noise": noise,
        },
    }


def bundle_from_ear(file: OfficialFile, tokenizer: Tokenizer, class_names: list[str], **options: Any) -> Bundle:
    """A model folder's content: model, tokenizer, the authors' sampling settings."""
    model = model_from_ear(file, **options)
    return mar.bundle_of(model, file, tokenizer, class_names, NAMES, SAMPLING)
