"""Continuous latents of a variational autoencoder with a KL term (LDM; MAR's KL-16), using diffusers' AutoencoderKL.

Shapes: c channels, z channels of a latent, n levels. Level 0 has the full resolution, and each next level half of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from seriatim.core.errors import UsageError, check_least
from seriatim.tokenizers.latent import Latent, Statistics, given_scale

GROUPS = 32  # the most groups of a group norm, and the number where all widths are multiples of it
WIDTHS = (128, 128, 256, 256, 512)  # channels of MAR's KL-16 and of LlamaGen's VQ-16
STRIDES = (1, 2, 4, 8, 16)
WIDEST = 4  # a level has at most this many times the channels of level 0


class KL(Latent):
    """A KL autoencoder as a tokenizer. The defaults are MAR's KL-16 with 66,456,019 parameters.

    Its encoder has attention at the last level and in the middle, its decoder in the middle only. Weights are random
    until others are loaded or trained. `stride` and `width` are a short form of `block_out_channels`: `width` channels
    at the full resolution, twice as many at each next level, and at most four times as many.
    """

    def __init__(
        self,
        size: int | Sequence[int] = 256,
        patch: int = 1,
        channels: int = 3,
        *,
        scale: float = 0.2325,
        statistics: Statistics = "fixed",
        latent_channels: int = 16,
        block_out_channels: Sequence[int] | None = None,
        stride: int | None = None,
        width: int | None = None,
        groups: int | None = None,  # of the group norms; None: the most up to 32 that divide all widths
        layers_per_block: int = 2,
        attention: Sequence[int] | None = None,  # levels where the encoder has attention; None means the last
        decoder_attention: Sequence[int] = (),  # levels where the decoder has attention
    ) -> None:
        widths = level_widths(block_out_channels, stride, width)
        number = norm_groups(widths, groups)
        levels = range(len(widths))
        attends = [len(widths) - 1] if attention is None else sorted(set(attention))
        decoder_attends = sorted(set(decoder_attention))
        check_least(1, latent_channels=latent_channels, layers_per_block=layers_per_block)
        for name, chosen in (("attention", attends), ("decoder_attention", decoder_attends)):
            if not set(chosen) <= set(levels):
                raise UsageError(f"{name}: {chosen} is not allowed; the levels are 0 to {len(widths) - 1}")
        if channels not in (1, 3):
            raise UsageError(f"channels: {channels!r} is not allowed; it must be 1 or 3")
        super().__init__(
            autoencoder_kl(channels, latent_channels, widths, layers_per_block, attends, decoder_attends, number),
            size,
            patch,
            channels,
            stride=2 ** (len(widths) - 1),
            latent_channels=latent_channels,
            gaussian=True,
            statistics=statistics,
            given=given_scale(scale, latent_channels),
        )
        self.config |= {
            "scale": scale,
            "latent_channels": latent_channels,
            "block_out_channels": widths,
            **({} if groups is None else {"groups": groups}),
            "layers_per_block": layers_per_block,
            "attention": attends,
            "decoder_attention": decoder_attends,
        }


def level_widths(given: Sequence[int] | None, stride: int | None, width: int | None) -> list[int]:
    """The channels of each level: those given, or those of a stride and a width, or else `WIDTHS`."""
    if stride is None and width is None:
        widths = [int(each) for each in (WIDTHS if given is None else given)]
        if not widths or min(widths) < 1:
            raise UsageError(f"block_out_channels: {widths} is not allowed; give the channels of each level")
        return widths
    if given is not None:
        raise UsageError("block_out_channels: can't go with stride and width, its short form; leave out either")
    if stride is None or width is None:
        absent, there = ("stride", "width") if stride is None else ("width", "stride")
        raise UsageError(f"{absent}: is required beside {there}")
    if stride not in STRIDES:
        raise UsageError(f"stride: {stride} is not allowed; it must be {', '.join(map(str, STRIDES[:-1]))} or 16")
    check_least(1, width=width)
    return [width * min(2**level, WIDEST) for level in range(stride.bit_length())]


def norm_groups(widths: Sequence[int], given: int | None = None) -> int:
    """The number of groups of every group norm, which divides all widths: the given one, or the most up to GROUPS."""
    if given is None:
        return math.gcd(GROUPS, *widths)
    check_least(1, groups=given)
    if any(each % given for each in widths):
        raise UsageError(f"groups: {given} is not allowed; it must divide the channels of every level, {list(widths)}")
    return given


def autoencoder_kl(
    channels: int,
    latent_channels: int,
    widths: list[int],
    layers: int,
    attention: list[int],
    decoder_attention: list[int],
    groups: int,
) -> nn.Module:
    """An AutoencoderKL of diffusers with random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # this import takes seconds

    n = len(widths)
    network: nn.Module = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple(f"{'Attn' if i in attention else ''}DownEncoderBlock2D" for i in range(n)),
        up_block_types=tuple(f"{'Attn' if i in decoder_attention else ''}UpDecoderBlock2D" for i in reversed(range(n))),
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=groups,
    )
    return network
