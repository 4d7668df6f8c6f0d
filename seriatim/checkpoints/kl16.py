"""MAR's KL-16 and other autoencoders in LDM's layout: official names <-> diffusers' AutoencoderKL.

    encoder.down.I.block.J, .attn.J, .downsample    encoder.down_blocks.I.resnets.J, .attentions.J, .downsamplers.0
    encoder.mid.block_1, .attn_1, .block_2          encoder.mid_block.resnets.0, .attentions.0, .resnets.1
    decoder.up.I, 0 at full resolution              decoder.up_blocks.(n - 1 - I), 0 at the lowest
    norm, q, k, v, proj_out of an attention         group_norm, to_q, to_k, to_v, to_out.0: matrices, not convolutions
    nin_shortcut, norm_out                          conv_shortcut, conv_norm_out

C channels, z channels of a latent, n levels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints.official import as_float32
from seriatim.core.errors import CheckpointError, UsageError, one_line
from seriatim.tokenizers.kl import KL

IGNORED = "loss."  # LPIPS and the discriminator
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
RULES = (  # ours -> official; the level of a decoder's block is reversed afterwards
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".\1.\2.block.\3."),
    (r"\.(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r".\1.\2.attn.\3."),
    (r"\.(down|up)_blocks\.(\d+)\.\1samplers\.0\.", r".\1.\2.\1sample."),
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
)


def official_name(name: str, levels: int) -> str:
    """`encoder.mid_block.resnets.0.conv1.weight` -> `encoder.mid.block_1.conv1.weight`."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    if ".attn" in name:
        for ours, theirs in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return re.sub(r"(?<=\.up\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)


def key_table(tokenizer: KL) -> dict[str, tuple[str, torch.Size]]:
    """Official name -> our name in the autoencoder, and the shape of the official tensor."""
    levels = len(tokenizer.config["block_out_channels"])
    table = {}
    for name, tensor in tokenizer.autoencoder.state_dict().items():
        official, shape = official_name(name, levels), tensor.shape
        if ".attn" in official and tensor.ndim == 2:
            shape = torch.Size((*shape, 1, 1))  # (C, C) as a 1x1 convolution
        table[official] = name, shape
    return table


def kl16_from_tokenizer(tokenizer: KL) -> dict[str, Tensor]:
    """The autoencoder's weights under official names, of official shapes."""
    state = tokenizer.autoencoder.state_dict()
    return {official: state[name].reshape(shape) for official, (name, shape) in key_table(tokenizer).items()}


def tokenizer_from_kl16(
    tensors: Mapping[str, Tensor], where: str, *, size: int | Sequence[int] = 256, patch: int = 1, scale: float = 0.2325
) -> KL:
    """A tokenizer from an official state dict, whose every size is read off its tensors, cast to float32.

    Raises CheckpointError, one line that begins with `where` and names the tensor that is missing, unknown, of another
    shape or not finite. `loss.*` is left out. UsageError where `size` does not fit.
    """
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(IGNORED)}
    with torch.device("meta"):
        tokenizer = sized(given, where, size, patch, scale)
    table = key_table(tokenizer)
    refuse(where, "lacks", table.keys() - given.keys())
    refuse(where, "has an unknown", given.keys() - table.keys())
    weights = {}
    for official, (name, shape) in table.items():
        tensor = given[official]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {official!r} has shape {tuple(tensor.shape)}, {tuple(shape)} beside the others"
            )
        ours = tokenizer.autoencoder.get_parameter(name).shape
        weights[name] = as_float32(tensor, official, where).clone().reshape(ours).contiguous()
    tokenizer.autoencoder.load_state_dict(weights, assign=True)
    return tokenizer


def sized(tensors: Mapping[str, Tensor], where: str, size: int | Sequence[int], patch: int, scale: float) -> KL:
    """A tokenizer of the sizes that the tensors show."""

    def width(name: str, dim: int, ndim: int = 4) -> int:
        if name not in tensors:
            raise CheckpointError(f"{where} lacks tensor {name!r}: not the weights of an autoencoder in LDM's layout")
        if tensors[name].ndim != ndim:
            raise CheckpointError(f"{where}: tensor {name!r} has shape {tuple(tensors[name].shape)}, not {ndim} sides")
        return tensors[name].shape[dim]

    def count(pattern: str) -> int:
        return next(i for i in itertools.count() if pattern.format(i) not in tensors)

    conv = "encoder.down.{}.block.0.conv1.weight"
    levels = max(1, count(conv))
    widths = [width(conv.format(i), 0) for i in range(levels)]

    def attends(half: str) -> list[int]:
        return [i for i in range(levels) if f"{half}.{i}.attn.0.q.weight" in tensors]

    arguments: dict[str, Any] = {
        "latent_channels": width("decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": max(1, count("encoder.down.0.block.{}.conv1.weight")),
        "attention": attends("encoder.down"),
        "decoder_attention": attends("decoder.up"),
    }
    channels = width("encoder.conv_in.weight", 1)
    try:
        KL(2 ** (levels - 1), 1, channels, **arguments)
    except UsageError as error:
        raise CheckpointError(
            f"{where}: its tensors are not those of an autoencoder we know: {one_line(error)}"
        ) from error
    return KL(size, patch, channels, scale=scale, **arguments)  # what is wrong now is the caller's


def refuse(where: str, verb: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise CheckpointError(f"{where} {verb} tensor {found[0]!r}{more}: not the weights of an LDM autoencoder")
