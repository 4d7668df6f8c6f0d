"""l-DeTok's tokenizer (Yang et al. 2025, arXiv 2507.15856): two vision transformers, trained to denoise latents.

What is unusual: in training the encoder sees a random part of the patches, latents are interpolated with strong noise,
and the decoder must draw the whole image from what is left. So latents learn to bear what a generator gets wrong. The
positions of attention look like a rotation, but are none (see `turned`).

Training calls `coded(images, keys, kept)` and `draw(latents, kept)`; which patches are kept and how much noise is added
in between is the objective's part (`training/tokenizer_losses.py`). All other methods compute the whole image.

Shapes: B images, c channels, H x W pixels, p stride, h x w = L patches, S patches that are seen, z channels of a
latent, C width, n heads, d = C/n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.errors import UsageError, check_least, shown
from seriatim.core.keys import Keys
from seriatim.nn.attention import attend
from seriatim.nn.block import gather
from seriatim.nn.linear import Linear, at_least_float32
from seriatim.nn.patch import patchify, unpatchify
from seriatim.tokenizers.base import digest_of, sides
from seriatim.tokenizers.latent import LOGVAR, Latent, Statistics, kl_divergence
from seriatim.tokenizers.trainable import Coded

NORM_EPS = 1e-6
FASTEST, BASE = 7.0, 10000.0  # the positions' highest frequency, in turns over the image, and its ratio to the lowest
INIT = 0.02  # standard deviation of fresh matrices and convolutions


# --- blocks -------------------------------------------------------------------------------------------------------


def angle_table(grid: tuple[int, int], d: int) -> Tensor:
    """The cosines and sines that `turned` takes for each cell of a grid: (2, h w, d), float32, on the CPU.

    The angles of a cell are (y F, x F), where y and x go from 0 to 1 over the grid and F = (f, f) holds d/4 frequencies
    f_i = 2 pi 7 10000^(-i / (d/4 - 1)) twice.
    """
    quarter = d // 4
    f = 2 * math.pi * FASTEST * BASE ** -(torch.arange(quarter, device="cpu") / (quarter - 1))
    rows, columns = (torch.linspace(0, 1, n, device="cpu") for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = torch.stack([y.flatten(), x.flatten()], dim=1)[:, :, None] * f.repeat(2)  # (L, 2, d/2)
    angles = angles.flatten(1)  # (L, d)
    return torch.stack([angles.cos(), angles.sin()])


def turned(x: Tensor, table: Tensor) -> Tensor:
    """x cos + R x sin, where R maps each pair of neighbours (x_2i, x_2i+1) to (-x_2i+1, x_2i): x (..., S, d).

    `table` (2, ..., S, d) has one angle for each feature. Both features of a pair have the same angle in a rotation,
    but not here: the authors' frequencies differ within a pair, and the published weights were trained so.
    """
    cos, sin = table
    y = at_least_float32(x)
    crossed = torch.stack([-y[..., 1::2], y[..., ::2]], dim=-1).flatten(-2)
    return (y * cos + crossed * sin).to(x.dtype)


class Attention(nn.Module):
    """Self-attention whose queries and keys are turned by their places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x (B, S, C) -> (B, S, C); `table` is (2, 1 or B, 1, S, d)."""
        B, S, C = x.shape
        heads = self.qkv(x).view(B, S, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (3, B, n, S, d)
        q, k = turned(heads[0], table), turned(heads[1], table)
        x = attend(q, k, heads[2])  # (B, n, S, d)
        out: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return out


class GatedMLP(nn.Module):
    """W2 (SiLU(a) * b), where a and b are the halves of W1 x (Shazeer 2020); 8/3 C hidden features, rounded down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.fc1 = Linear(width, 2 * hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(F.silu(a) * b)
        return out


class Block(nn.Module):
    """A pre-norm block: x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = GatedMLP(width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), table)
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """Positions, blocks and norms: what encoder and decoder have in common."""

    table: Tensor  # (2, L, d)

    def __init__(self, grid: tuple[int, int], width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(grid[0] * grid[1], width) * width**-0.5)
        self.norm_in = nn.RMSNorm(width, eps=NORM_EPS)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm_out = nn.RMSNorm(width, eps=NORM_EPS)
        self.register_buffer("table", angle_table(grid, width // heads), persistent=False)

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """x (B, L, C) -> (B, L, C); with `at` (B, S) int64, only the patches there: (B, S, C)."""
        x, table = x + self.positions, self.table[:, None, None]  # (2, 1, 1, L, d)
        if at is not None:
            x, table = gather(x, at), self.table[:, at][:, :, None]  # (2, B, 1, S, d)
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x, table)
        x = self.norm_out(x)
        return x


# --- the network --------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Patches of pixels -> the moments of their latents."""

    def __init__(
        self, grid: tuple[int, int], channels: int, stride: int, z: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, width, stride, stride)
        self.trunk = Trunk(grid, width, depth, heads)
        self.to_moments = Linear(width, 2 * z)

    def forward(self, images: Tensor, at: Tensor | None = None) -> Tensor:
        """Images (B, c, H, W) -> mean and log-variance of each latent (B, L or S, 2z)."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, L, C)
        moments: Tensor = self.to_moments(self.trunk(x, at))
        return moments


class Decoder(nn.Module):
    """Latents -> pixels."""

    def __init__(
        self, grid: tuple[int, int], channels: int, stride: int, z: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.grid, self.channels, self.stride = grid, channels, stride
        self.embed = Linear(z, width)
        self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.trunk = Trunk(grid, width, depth, heads)
        self.to_pixels = Linear(width, stride * stride * channels)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, latents: Tensor, kept: Tensor | None = None) -> Tensor:
        """Latents (B, L, z), of which those not `kept` (B, L) are replaced by the mask token -> (B, c, H, W)."""
        x = self.embed(latents)  # (B, L, C)
        if kept is not None:
            x = torch.where(kept[..., None], x, self.mask_token.to(x.dtype))
        pixels = self.to_pixels(self.trunk(x))  # (B, L, p p c), the channel last
        pixels = pixels.unflatten(-1, (-1, self.channels)).transpose(-1, -2).flatten(-2)  # (B, L, c p p)
        images: Tensor = self.conv_out(unpatchify(pixels, self.stride, *self.grid))
        return images


class Transformers(nn.Module):
    """The encoder and the decoder."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=INIT)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


# --- the tokenizer ------------------------------------------------------------------------------------------------


class Detok(Latent):
    """l-DeTok as a tokenizer. The defaults are the published BB of 171,712,628 parameters.

    Weights are random until others are loaded. `fit` measures mean and variance of the posterior's *means*, as the
    authors do, while training and `tokens` with keys sample the posterior. Positions are learned, so weights fit one
    size of images only.
    """

    masks = True

    def __init__(
        self,
        size: int | Sequence[int] = 256,
        patch: int = 1,
        channels: int = 3,
        *,
        stride: int = 16,
        latent_channels: int = 16,
        width: int | Sequence[int] = 768,  # of encoder and decoder, or [encoder, decoder]; depth and heads likewise
        depth: int | Sequence[int] = 12,
        heads: int | Sequence[int] = 12,
        statistics: Statistics = "channel",
        mean: Sequence[float] | None = None,  # of each channel of a latent, used until others are measured; None is 0
        std: Sequence[float] | None = None,  # None is 1
    ) -> None:
        check_least(1, stride=stride, latent_channels=latent_channels)
        if channels not in (1, 3):
            raise UsageError(f"channels: {channels!r} is not allowed; it must be 1 or 3")
        H, W = sides(size)
        if H % stride or W % stride:
            raise UsageError(f"size: {H}x{W} is not allowed; both sides must be multiples of {stride}, the stride")
        shape = {name: pair(name, value) for name, value in (("width", width), ("depth", depth), ("heads", heads))}
        for C, n in zip(shape["width"], shape["heads"], strict=True):
            if C % n or C // n % 4 or C // n < 8:
                raise UsageError(
                    f"heads: {n} is not allowed with width {C}; the features of a head, width / heads, must be a "
                    "multiple of 4, and at least 8"
                )
        first, second = ([shape[name][i] for name in ("width", "depth", "heads")] for i in (0, 1))
        common: Any = ((H // stride, W // stride), channels, stride, latent_channels)
        super().__init__(
            Transformers(Encoder(*common, *first), Decoder(*common, *second)),
            size,
            patch,
            channels,
            stride=stride,
            latent_channels=latent_channels,
            gaussian=True,
            statistics=statistics,
            given=(
                numbers("mean", mean, latent_channels, default=0.0),
                numbers("std", std, latent_channels, default=1.0, least=0.0),
            ),
        )
        self.config |= {"stride": stride, "latent_channels": latent_channels, **shape}
        self.config |= {
            "mean": self._given[0].tolist() if mean else None,
            "std": self._given[1].tolist() if std else None,
        }

    @override
    def encode(self, images: Tensor) -> Tensor:
        return self.on_grid(self.autoencoder.encoder(images))

    @override
    def draw(self, latents: Tensor, kept: Tensor | None = None) -> Tensor:
        """The images, not clamped, of latents (B, z, h, w); the mask token replaces those not in the mask `kept`."""
        kept = None if kept is None else kept.to(latents.device, non_blocking=True)
        images: Tensor = self.autoencoder.decoder(patchify(latents, 1), kept)
        return images

    @override
    def coded(self, images: Tensor, keys: Keys, kept: Tensor | None = None) -> Coded:
        """Sampled latents (B, z, h, w) of images, and their KL divergence from a standard normal distribution.

        `kept` (B, L) is a mask, equally many for each image, of the patches that the encoder sees; it stays on the
        host, so that nobody waits for a device. The other latents are zero.
        """
        at = None
        if kept is not None:
            count = int(kept[0].sum())
            at = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]  # (B, S), raster order
            at = at.to(images.device, non_blocking=True)
        moments = at_least_float32(self.autoencoder.encoder(images, at))  # (B, L or S, 2z)
        mean, logvar = moments.chunk(2, dim=-1)
        std = (0.5 * logvar.clamp(*LOGVAR)).exp()
        h, w = self.size[0] // self.stride, self.size[1] // self.stride
        noise = patchify(keys.to(images.device).normal(self.latent_channels, h, w), 1)  # (B, L, z)
        latents = mean + std * (noise if at is None else gather(noise, at))
        if at is not None:
            latents = torch.zeros_like(noise).scatter(1, at[..., None].expand_as(latents), latents)
        return Coded(self.on_grid(latents), {"kl": kl_divergence(mean, std)})

    def on_grid(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, D, h', w')."""
        return unpatchify(x, 1, self.size[0] // self.stride, self.size[1] // self.stride)

    @override
    def sums(self, moments: Tensor) -> Tensor:
        """As in the base class, but without the variances, because the statistics are those of means."""
        sums = super().sums(moments)
        sums[2] = 0
        return sums

    # --- what moments depend on -----------------------------------------------------------------------------------

    def moments_config(self) -> dict[str, Any]:
        """The settings of images and encoder; the decoder's and the statistics are applied after the moments."""
        shape = {name: self.config[name][0] for name in ("width", "depth", "heads")}
        return {name: self.config[name] for name in ("size", "channels", "stride", "latent_channels")} | shape

    def moments_fingerprint(self) -> str:
        return digest_of(type(self).__name__, self.moments_config(), self.autoencoder.encoder.state_dict())


def pair(name: str, value: int | Sequence[int]) -> list[int]:
    """The two numbers, for encoder and decoder, that one number or two stand for."""
    two = [value, value] if isinstance(value, int) else list(value)
    if len(two) != 2:
        raise UsageError(f"{name}: {shown(value)} is not allowed; give one number, or [encoder, decoder]")
    check_least(1, **{name: min(two)})
    return [int(n) for n in two]


def numbers(
    name: str, given: Sequence[float] | None, count: int, *, default: float, least: float = -math.inf
) -> list[float]:
    """The given `count` numbers, which must be above `least`."""
    if given is None:
        return [default] * count
    values = [float(x) for x in given]
    if len(values) != count:
        half = "; the authors' files have them of means and of log-variances, of which the first half counts"
        raise UsageError(
            f"{name}: {len(values)} numbers are not allowed; give {count}, one for each channel of a latent"
            f"{half if len(values) == 2 * count else ''}"
        )
    if not all(math.isfinite(x) and x > least for x in values):
        raise UsageError(f"{name}: {shown(values)} is not allowed; all must be finite{' and positive' * (least == 0)}")
    return values
