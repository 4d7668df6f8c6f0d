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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints.shapes import mapped, shape
from seriatim.core.errors import CheckpointError, UsageError, one_line
from seriatim.tokenizers.kl import GROUPS, KL

IGNORED = "loss."  # LPIPS and the discriminator
HINT = "not the weights of an autoencoder in LDM's layout"
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


def kl16_from_tokenizer(tokenizer: KL) -> dict[str, Tensor]:
    """The autoencoder's weights under official names, of official shapes; attention's matrices are convolutions."""
    levels, result = len(tokenizer.config["block_out_channels"]), {}
    for name, tensor in tokenizer.autoencoder.state_dict().items():
        official = official_name(name, levels)
        matrix = ".attn" in official and tensor.ndim == 2
        result[official] = tensor[..., None, None] if matrix else tensor  # (C, C, 1, 1)
    return result


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
    levels = len(tokenizer.config["block_out_channels"])
    wanted = {name: tensor.shape for name, tensor in tokenizer.autoencoder.state_dict().items()}
    weights = mapped(given, wanted, lambda name: official_name(name, levels), where, HINT)
    # The tokenizer shares no memory with the tensors that the caller has.
    tokenizer.autoencoder.load_state_dict({name: t.clone() for name, t in weights.items()}, assign=True)
    return tokenizer


def check_groups(widths: Sequence[int], where: str) -> None:
    """Raise CheckpointError for widths that the official group norms can't have; shapes do not show their groups."""
    if any(width % GROUPS for width in widths):
        raise CheckpointError(
            f"{where}: its levels have {list(widths)} channels, but official autoencoders have multiples of {GROUPS}"
        )


def sized(tensors: Mapping[str, Tensor], where: str, size: int | Sequence[int], patch: int, scale: float) -> KL:
    """A tokenizer of the sizes that the tensors show."""

    def width(name: str, axis: int) -> int:
        return shape(tensors, name, 4, where, HINT)[axis]

    def count(pattern: str) -> int:
        return next(i for i in itertools.count() if pattern.format(i) not in tensors)

    conv = "encoder.down.{}.block.0.conv1.weight"
    levels = max(1, count(conv))
    widths = [width(conv.format(i), 0) for i in range(levels)]

    check_groups(widths, where)

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
