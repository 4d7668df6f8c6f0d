"""MAR's KL-16 and other autoencoders in LDM's layout: official names <-> diffusers' AutoencoderKL.

    encoder.down.I.block.J, .attn.J, .downsample    encoder.down_blocks.I.resnets.J, .attentions.J, .downsamplers.0
    encoder.mid.block_1, .attn_1, .block_2          encoder.mid_block.resnets.0, .attentions.0, .resnets.1
    decoder.up.I, 0 at full resolution              decoder.up_blocks.(n - 1 - I), 0 at the lowest
    norm, q, k, v, proj_out of an attention         group_norm, to_q, to_k, to_v, to_out.0: matrices, not convolutions
    nin_shortcut, norm_out                          conv_shortcut, conv_norm_out

C channels, z channels of a latent, n levels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints.shapes import Autoencoder, official_autoencoder
from seriatim.core.errors import CheckpointError
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
    """The autoencoder's weights under official names, of official shapes."""
    levels = len(tokenizer.config["block_out_channels"])
    return official_autoencoder(tokenizer.autoencoder, lambda name: official_name(name, levels))


def tokenizer_from_kl16(
    tensors: Mapping[str, Tensor], where: str, *, size: int | Sequence[int] = 256, patch: int = 1, scale: float = 0.2325
) -> KL:
    """A tokenizer from an official state dict, whose every size is read off its tensors, cast to float32.

    Raises CheckpointError, one line that begins with `where` and names the tensor that is missing, unknown, of another
    shape or not finite. `loss.*` is left out. UsageError where `size` does not fit.
    """
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(IGNORED)}
    known = Autoencoder(given, where, HINT)
    widths = known.widths("encoder.down.{}.block.0.conv1.weight")
    check_groups(widths, where)
    levels = len(widths)
    down, up = (
        [i for i in range(levels) if f"{half}.{i}.attn.0.q.weight" in given] for half in ("encoder.down", "decoder.up")
    )
    arguments: dict[str, Any] = {
        "latent_channels": known.width("decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "layers_per_block": known.count("encoder.down.0.block.{}.conv1.weight"),
        "attention": down,
        "decoder_attention": up,
    }
    channels = known.width("encoder.conv_in.weight", 1)
    with torch.device("meta"):
        known.check(lambda: KL(2 ** (levels - 1), 1, channels, **arguments), arguments)
        tokenizer = KL(size, patch, channels, scale=scale, **arguments)  # what is wrong now is the caller's
    known.fill(tokenizer.autoencoder, lambda name: official_name(name, levels))
    return tokenizer


def check_groups(widths: Sequence[int], where: str) -> None:
    """Raise CheckpointError for widths that the official group norms can't have; shapes do not show their groups."""
    if any(width % GROUPS for width in widths):
        raise CheckpointError(
            f"{where}: its levels have {list(widths)} channels, but official autoencoders have multiples of {GROUPS}"
        )
