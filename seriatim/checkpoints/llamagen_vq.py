"""LlamaGen's tokenizers VQ-16 and VQ-8 (Sun et al. 2024): official names <-> ours.

    encoder.conv_blocks.I.res.J, .attn.J, .downsample   encoder.down_blocks.I.resnets.J, .attentions.J, .downsamplers.0
    decoder.conv_blocks.I, 0 at the lowest resolution   decoder.up_blocks.I, the same order
    mid.0, .1, .2 of either                             mid_block.resnets.0, .attentions.0, .resnets.1
    norm, q, k, v, proj_out of an attention             group_norm, to_q, to_k, to_v, to_out.0: matrices
    nin_shortcut, norm_out                              conv_shortcut, conv_norm_out
    quantize.embedding.weight                           quantiser.codebook
    quantize.codebook_used                              nothing: which codes the last 65,536 tokens of training had

C features of a codeword, V codewords.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seriatim.checkpoints.kl16 import ATTENTION, check_groups
from seriatim.checkpoints.official import OfficialFile
from seriatim.checkpoints.shapes import Autoencoder
from seriatim.core.errors import CheckpointError
from seriatim.tokenizers.vq import VQ

ENTRIES = ("ema", "model")  # of an official file
IGNORED = "quantize.codebook_used"
CODEBOOK = "quantize.embedding.weight"
HINT = "not the weights of a tokenizer of LlamaGen's"
RULES = (  # ours -> official
    (r"\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".conv_blocks.\1.res.\2."),
    (r"\.(?:down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r".conv_blocks.\1.attn.\2."),
    (r"\.(down|up)_blocks\.(\d+)\.\1samplers\.0\.", r".conv_blocks.\2.\1sample."),
    (r"\.mid_block\.resnets\.0\.", r".mid.0."),
    (r"\.mid_block\.attentions\.0\.", r".mid.1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.2."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
    (r"^quantiser\.codebook$", CODEBOOK),
)


def official_name(name: str) -> str:
    """`encoder.mid_block.resnets.0.conv1.weight` -> `encoder.mid.0.conv1.weight`."""
    attention = ".attentions." in name
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    if attention:
        for ours, theirs in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def tokenizer_from_file(file: OfficialFile, *, size: int | Sequence[int] = 256) -> VQ:
    """The tokenizer of an official file; what the training script's arguments say of the codebook must be so."""
    where, said = str(file.path), file.arguments
    codebook = file.tensors.get(CODEBOOK)
    if codebook is not None and codebook.ndim == 2:
        for key, found in (("codebook_size", codebook.shape[0]), ("codebook_embed_dim", codebook.shape[1])):
            if isinstance(said.get(key), int) and said[key] != found:
                raise CheckpointError(
                    f"{where}: tensor {CODEBOOK!r} has shape {tuple(codebook.shape)}, but the file's own arguments say "
                    f"{key}={said[key]}: a codebook of another size; was it put together from two files?"
                )
    return tokenizer_from_llamagen(file.tensors, where, size=size, l2=bool(said.get("codebook_l2_norm", True)))


def tokenizer_from_llamagen(
    tensors: Mapping[str, Tensor], where: str, *, size: int | Sequence[int] = 256, l2: bool = True
) -> VQ:
    """A tokenizer from an official state dict, whose every size is read off its tensors, cast to float32.

    `l2`, which no shape shows, is True in all that was published. Raises CheckpointError, one line that begins with
    `where` and names the tensor that is missing, unknown, of another shape or not finite. UsageError where `size` does
    not fit.
    """
    known = Autoencoder({name: tensor for name, tensor in tensors.items() if name != IGNORED}, where, HINT)
    widths, decoder = (known.widths(f"{half}.conv_blocks.{{}}.res.0.conv1.weight") for half in ("encoder", "decoder"))
    check_groups(widths, where)
    check_groups(decoder, where)
    code_dim = known.width("quant_conv.weight", 0)
    if known.width(CODEBOOK, 1, axes=2) != code_dim:
        raise CheckpointError(
            f"{where}: tensor {CODEBOOK!r} has shape {tuple(tensors[CODEBOOK].shape)}: a codebook of another size; "
            f"its codewords must have {code_dim} features, as 'quant_conv.weight' gives"
        )
    arguments: dict[str, Any] = {
        "vocab": known.width(CODEBOOK, 0, axes=2),
        "code_dim": code_dim,
        "latent_channels": known.width("quant_conv.weight", 1),
        "block_out_channels": widths,
        "decoder_block_out_channels": decoder[::-1],
        "layers_per_block": known.count("encoder.conv_blocks.0.res.{}.conv1.weight"),
        "l2": l2,
    }
    channels = known.width("encoder.conv_in.weight", 1)
    with torch.device("meta"):
        known.check(lambda: VQ(2 ** (len(widths) - 1), channels, **arguments), arguments)
        tokenizer = VQ(size, channels, **arguments)  # what is wrong now is the caller's
    known.fill(tokenizer, official_name)
    return tokenizer.requires_grad_(False).eval()
