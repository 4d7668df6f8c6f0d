"""Codes of an autoencoder with a codebook (VQGAN; LlamaGen's VQ-16 and VQ-8), using diffusers' Encoder and Decoder.

Training calls `coded(images, keys)` and `draw(codewords)`, and gives the codes and vectors of each step to a
`CodeWatch`, which revives codes that are not used.

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
from seriatim.nn.patch import unpatchify
from seriatim.tokenizers.base import Tokenizer, digest_of, sides
from seriatim.tokenizers.finite_scalar import FiniteScalar
from seriatim.tokenizers.kl import level_widths, norm_groups
from seriatim.tokenizers.quantise import Quantiser
from seriatim.tokenizers.trainable import Coded


class CodeAutoencoder(Tokenizer):
    """The base class of tokenizers with an encoder and a decoder of convolutions, and a quantiser between them.

    The quantiser has `vocab`, `dim`, `codes(vectors)`, `lookup(codes)`, and `forward(vectors)`, which training calls.

    Encoder and decoder have attention after every block of the last level, and in the middle. Weights are frozen, and
    random until others are loaded.

    Moments are the codes themselves, (B, 1, h, w), because nothing is sampled. A latent cache thus keeps 2 bytes for
    each token instead of 4 C, and training from it looks up no codewords.
    """

    vocab: int
    masks = False  # the encoder sees all of an image

    def __init__(
        self,
        quantiser: Any,
        size: int | Sequence[int],
        channels: int,
        latent_channels: int,
        widths: list[int],  # of the encoder's levels
        decoder: Sequence[int] | None,  # widths; None takes those of the encoder
        layers_per_block: int,  # in the encoder; the decoder has one more
        groups: int | None,  # of the group norms; None: the most up to 32 that divide all widths
    ) -> None:
        super().__init__()
        decoder = widths if decoder is None else [int(width) for width in decoder]
        if len(decoder) != len(widths) or min(decoder) < 1:
            raise UsageError(
                f"decoder_block_out_channels: {decoder} is not allowed; give the channels of each of {len(widths)} "
                "levels"
            )
        check_least(1, latent_channels=latent_channels, layers_per_block=layers_per_block)
        if channels not in (1, 3):
            raise UsageError(f"channels: {channels!r} is not allowed; it must be 1 or 3")
        self.stride = stride = 2 ** (len(widths) - 1)
        H, W = sides(size)
        if H % stride or W % stride:
            raise UsageError(f"size: {H}x{W} is not allowed; both sides must be multiples of {stride}, the stride")
        self.size, self.channels, self.levels = (H, W), channels, 256
        self.grid, self.dim, self.vocab = (H // stride, W // stride), quantiser.dim, quantiser.vocab
        self.config = {
            "size": [H, W],
            "channels": channels,
            "latent_channels": latent_channels,
            "block_out_channels": widths,
            "decoder_block_out_channels": decoder,
            "layers_per_block": layers_per_block,
            **({} if groups is None else {"groups": groups}),
        }
        self.encoder, self.decoder = halves(channels, latent_channels, widths, decoder, layers_per_block, groups)
        self.quant_conv = nn.Conv2d(latent_channels, self.dim, 1)
        self.quantiser = quantiser
        self.post_quant_conv = nn.Conv2d(self.dim, latent_channels, 1)
        self.requires_grad_(False).eval()

    # --- with gradients, in the precision of the caller -----------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """The features (B, C, h, w) of images (B, c, H, W) before they are quantised."""
        features: Tensor = self.quant_conv(self.encoder(images))
        return features

    def coded(self, images: Tensor, keys: Keys, kept: Tensor | None = None) -> Coded:  # noqa: ARG002
        """The codewords (B, C, h, w) of images, and the losses of the quantiser. Nothing is drawn from the keys."""
        assert kept is None, f"{type(self).__name__} can't be shown a part of an image"
        found = self.quantiser(self.encode(images).permute(0, 2, 3, 1))  # (B, h, w, C)
        codewords = found.values.permute(0, 3, 1, 2)
        return Coded(codewords, found.losses, found.codes.flatten(1), found.vectors.flatten(1, 2))

    def draw(self, latents: Tensor, kept: Tensor | None = None) -> Tensor:
        """The images (B, c, H, W), not clamped, of codewords (B, C, h, w)."""
        assert kept is None, f"{type(self).__name__} has no mask token"
        images: Tensor = self.decoder(self.post_quant_conv(latents))
        return images

    @property
    def last_layer(self) -> Tensor:
        """The weights of the last layer of the decoder."""
        weight: Tensor = self.decoder.conv_out.weight  # type: ignore[union-attr, assignment]
        return weight

    # --- images to codes and back ---------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """The same features, in float32, a few images at a time."""
        return self.by_parts(self.encode, self.check_images(images))

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
        return self.by_parts(self.draw, x).clamp(-1, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decode_embeddings(self.embeddings(tokens))

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


class VQ(CodeAutoencoder):
    """A VQ autoencoder as a tokenizer. The defaults are LlamaGen's VQ-16 (Sun et al. 2024, arXiv 2406.06525).

    VQ-16 has 71,883,403 parameters. VQ-8 has block_out_channels (128, 256, 256, 512) and 70,109,835 parameters. The
    stride is 1 with one level, and each further level doubles it. `stride` and `width` are a short form of
    `block_out_channels`: `width` channels at the full resolution, twice as many at each next level, and at most four
    times as many.
    """

    def __init__(
        self,
        size: int | Sequence[int] = 256,
        channels: int = 3,
        *,
        vocab: int = 16384,
        code_dim: int = 8,
        latent_channels: int = 256,
        block_out_channels: Sequence[int] | None = None,
        decoder_block_out_channels: Sequence[int] | None = None,
        stride: int | None = None,
        width: int | None = None,
        groups: int | None = None,
        layers_per_block: int = 2,
        l2: bool = True,  # whether only the directions of codewords matter
    ) -> None:
        check_least(1, vocab=vocab, code_dim=code_dim)
        widths = level_widths(block_out_channels, stride, width)
        blocks = (latent_channels, widths, decoder_block_out_channels, layers_per_block, groups)
        super().__init__(Quantiser(vocab, code_dim, l2=l2), size, channels, *blocks)
        self.config |= {"vocab": vocab, "code_dim": code_dim, "l2": l2}


class FSQ(CodeAutoencoder):
    """The same network with finite scalar quantisation, which needs no codebook (Mentzer et al. 2023).

    `code_levels` has the number of levels of each feature of a codeword. The default is the paper's for about 2^12
    codes; for about 2^8, 2^10, 2^14 and 2^16 it has (8, 6, 5), (8, 5, 5, 5), (8, 8, 8, 6, 5) and (8, 8, 8, 5, 5, 5).
    """

    def __init__(
        self,
        size: int | Sequence[int] = 256,
        channels: int = 3,
        *,
        code_levels: Sequence[int] = (7, 5, 5, 5, 5),
        latent_channels: int = 256,
        block_out_channels: Sequence[int] | None = None,
        decoder_block_out_channels: Sequence[int] | None = None,
        stride: int | None = None,
        width: int | None = None,
        groups: int | None = None,
        layers_per_block: int = 2,
    ) -> None:
        widths = level_widths(block_out_channels, stride, width)
        blocks = (latent_channels, widths, decoder_block_out_channels, layers_per_block, groups)
        super().__init__(FiniteScalar(code_levels), size, channels, *blocks)
        self.config |= {"code_levels": list(self.quantiser.levels)}


def halves(
    channels: int, latent_channels: int, widths: list[int], decoder: list[int], layers: int, groups: int | None
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
            norm_num_groups=norm_groups(widths, groups),
            double_z=False,
        ),
        Decoder(
            in_channels=latent_channels,
            out_channels=channels,
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * (n - 1)),
            block_out_channels=tuple(decoder),
            layers_per_block=layers,
            norm_num_groups=norm_groups(decoder, groups),
        ),
    )
