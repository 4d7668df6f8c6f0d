"""Continuous latents of a variational autoencoder with a KL term (LDM; MAR's KL-16), using diffusers' AutoencoderKL.

Shapes: c channels, z channels of a latent, n levels. Level 0 has the full resolution, and each next level half of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from seriatim.core.errors import UsageError, check_least
from seriatim.tokenizers.latent import Latent, Statistics, given_scale

GROUPS = 32  # the number of groups of every group norm


class KL(Latent):
    """A KL autoencoder as a tokenizer. The defaults are MAR's KL-16 with 66,456,019 parameters.

    Its encoder has attention at the last level and in the middle, its decoder in the middle only. Weights are random
    until others are loaded.
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
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        attention: Sequence[int] | None = None,  # levels where the encoder has attention; None means the last
        decoder_attention: Sequence[int] = (),  # levels where the decoder has attention
    ) -> None:
        widths = [int(width) for width in block_out_channels]
        levels = range(len(widths))
        attends = [len(widths) - 1] if attention is None else sorted(set(attention))
        decoder_attends = sorted(set(decoder_attention))
        if not widths or min(widths) < 1 or any(width % GROUPS for width in widths):
            raise UsageError(f"block_out_channels: {widths} is not allowed; they must be multiples of {GROUPS}")
        check_least(1, latent_channels=latent_channels, layers_per_block=layers_per_block)
        for name, chosen in (("attention", attends), ("decoder_attention", decoder_attends)):
            if not set(chosen) <= set(levels):
                raise UsageError(f"{name}: {chosen} is not allowed; the levels are 0 to {len(widths) - 1}")
        if channels not in (1, 3):
            raise UsageError(f"channels: {channels!r} is not allowed; it must be 1 or 3")
        super().__init__(
            autoencoder_kl(channels, latent_channels, widths, layers_per_block, attends, decoder_attends),
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
            "layers_per_block": layers_per_block,
            "attention": attends,
            "decoder_attention": decoder_attends,
        }


def autoencoder_kl(
    channels: int,
    latent_channels: int,
    widths: list[int],
    layers: int,
    attention: list[int],
    decoder_attention: list[int],
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
        norm_num_groups=GROUPS,
    )
    return network
