"""Codes of an autoencoder with a codebook (VQGAN; LlamaGen's VQ-16 and VQ-8), using diffusers' Encoder and Decoder.

Shapes: B images, c channels, H x W pixels, n levels, z channels of a latent, C features of a codeword, V codewords,
h x w = L codes of an image. Level 0 has the full resolution, and each next level half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.errors import DataError, UsageError, check_least
from seriatim.core.keys import Keys
from seriatim.nn.patch import patchify, unpatchify
from seriatim.tokenizers.base import Tokenizer, digest_of, sides
from seriatim.tokenizers.kl import GROUPS
from seriatim.tokenizers.quantise import Quantised, Quantiser


class VQ(Tokenizer):
    """A VQ autoencoder as a tokenizer. The defaults are LlamaGen's VQ-16 (Sun et al. 2024, arXiv 2406.06525).

    VQ-16 has 71,883,403 parameters. VQ-8 has block_out_channels (128, 256, 256, 512) and 70,109,835 parameters. Encoder
    and decoder have attention after every block of the last level, and in the middle. Weights are frozen, and random
    until others are loaded.

    Moments are the codes themselves, (B, 1, h, w), because nothing is sampled. A latent cache thus keeps 2 bytes for
    each token instead of 4 C, and training from it looks up no codewords.
    """

    vocab: int

    def __init__(
        self,
        size: int | Sequence[int] = 256,
        channels: int = 3,
        *,
        vocab: int = 16384,
        code_dim: int = 8,
        latent_channels: int = 256,
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512),
        decoder_block_out_channels: Sequence[int] | None = None,  # None takes those of the encoder
        layers_per_block: int = 2,  # in the encoder; the decoder has one more
        l2: bool = True,  # whether only the directions of codewords matter
    ) -> None:
        super().__init__()
        widths = [int(width) for width in block_out_channels]
        decoder = widths if decoder_block_out_channels is None else [int(w) for w in decoder_block_out_channels]
        for name, chosen in (("block_out_channels", widths), ("decoder_block_out_channels", decoder)):
            if not chosen or min(chosen) < 1 or any(width % GROUPS for width in chosen):
                raise UsageError(f"{name}: {chosen} is not allowed; they must be multiples of {GROUPS}")
        if len(decoder) != len(widths):
            raise UsageError(
                f"decoder_block_out_channels: {decoder} is not allowed; the encoder has {len(widths)} levels"
            )
        check_least(1, vocab=vocab, code_dim=code_dim, latent_channels=latent_channels)
        check_least(1, layers_per_block=layers_per_block)
        if channels not in (1, 3):
            raise UsageError(f"channels: {channels!r} is not allowed; it must be 1 or 3")
        stride = 2 ** (len(widths) - 1)
        H, W = sides(size)
        if H % stride or W % stride:
            raise UsageError(f"size: {H}x{W} is not allowed; both sides must be multiples of {stride}, the stride")
        self.size, self.channels, self.levels = (H, W), channels, 256
        self.grid, self.dim, self.vocab = (H // stride, W // stride), code_dim, vocab
        self.config = {
            "size": [H, W],
            "channels": channels,
            "vocab": vocab,
            "code_dim": code_dim,
            "latent_channels": latent_channels,
            "block_out_channels": widths,
            "decoder_block_out_channels": decoder,
            "layers_per_block": layers_per_block,
            "l2": l2,
        }
        self.encoder, self.decoder = halves(channels, latent_channels, widths, decoder, layers_per_block)
        self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
        self.quantiser = Quantiser(vocab, code_dim, l2=l2)
        self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)
        self.requires_grad_(False).eval()

    # --- images to codes and back ---------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """The features (B, C, h, w) of images (B, c, H, W) before they are quantised."""
        return self.by_parts(lambda part: self.quant_conv(self.encoder(part)), self.check_images(images))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """The codes (B, 1, h, w) int64 of images (B, c, H, W)."""
        return self.quantiser.codes(self.features(images).permute(0, 2, 3, 1))[:, None]

    @override
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        if moments.is_floating_point() or moments.ndim != 4 or tuple(moments.shape[1:]) != (1, *self.grid):
            shape = f"{str(moments.dtype).removeprefix('torch.')} of shape {tuple(moments.shape)}"
            raise DataError(
                f"moments: {shape} is not codes (B, 1, {self.grid[0]}, {self.grid[1]}); "
                "they were made by another tokenizer or for another size"
            )
        return self.check_codes(moments.long().flatten(1))  # (B, L)

    @torch.no_grad()
    def embeddings(self, codes: Tensor) -> Tensor:
        return self.quantiser.lookup(self.check_codes(codes))  # (B, L, C)

    @torch.no_grad()
    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        x = unpatchify(embeddings.to(self.device, torch.float32), 1, *self.grid)  # (B, C, h, w)
        return self.draw(x).clamp(-1, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decode_embeddings(self.embeddings(tokens))

    def draw(self, quantised: Tensor) -> Tensor:
        """The images (B, c, H, W), not clamped, of codewords (B, C, h, w)."""
        return self.by_parts(lambda part: self.decoder(self.post_quant_conv(part)), quantised)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised]:
        """The reconstructions, not clamped, and the quantiser's output.

        They have gradients only after `requires_grad_(True)`, because the weights are frozen at first.
        """
        found = self.quantiser(patchify(self.features(images), 1))  # (B, L, C)
        return self.draw(unpatchify(found.values, 1, *self.grid)), found

    # --- what moments depend on -----------------------------------------------------------------------------------

    def moments_config(self) -> dict[str, Any]:
        """All settings except those of the decoder."""
        return {key: value for key, value in self.config.items() if key != "decoder_block_out_channels"}

    def moments_fingerprint(self) -> str:
        weights = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.startswith(("encoder.", "quant_conv.", "quantiser."))
        }
        return digest_of(type(self).__name__, self.moments_config(), weights)


def halves(
    channels: int, latent_channels: int, widths: list[int], decoder: list[int], layers: int
) -> tuple[nn.Module, nn.Module]:
    """An Encoder and a Decoder of diffusers with random weights."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder  # this import takes seconds

    n = len(widths)
    return (
        Encoder(
            in_channels=channels,
            out_channels=latent_channels,
            down_block_types=(*["DownEncoderBlock2D"] * (n - 1), "AttnDownEncoderBlock2D"),
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            norm_num_groups=GROUPS,
            double_z=False,
        ),
        Decoder(
            in_channels=latent_channels,
            out_channels=channels,
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * (n - 1)),
            block_out_channels=tuple(decoder),
            layers_per_block=layers,
            norm_num_groups=GROUPS,
        ),
    )
