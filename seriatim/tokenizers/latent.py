"""Tokens that are patches of a frozen autoencoder's latents, normalised by measured or given statistics.

Shapes: B images, c channels, H x W pixels, s stride, z channels of a latent, h' x w' latents of an image (h' = H/s,
w' = W/s), p patch side, h x w = L tokens (h = h'/p, w = w'/p), D = z p p features, channel-major.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from seriatim.core.errors import ConfigError, DataError, NumericsError, UsageError, check_known, check_least
from seriatim.core.keys import Keys
from seriatim.nn.patch import patchify, unpatchify
from seriatim.tokenizers.base import Tokenizer, digest_of, sides
from seriatim.tokenizers.trainable import Coded

Statistics = Literal["fixed", "scale", "channel"]

LOGVAR = (-30.0, 20.0)  # the range to which log-variances are clamped when they are used
STD_FLOOR = 0.02  # least standard deviation relative to all channels, so that a nearly constant one is not amplified


@contextlib.contextmanager
def encoding_in(tokenizer: Tokenizer, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the encoder of a tokenizer of latents computes in `dtype`; others always use float32."""
    if isinstance(tokenizer, Latent):
        tokenizer.encoder_dtype = dtype
    try:
        yield
    finally:
        if isinstance(tokenizer, Latent):
            tokenizer.encoder_dtype = torch.float32


def check_encoder_dtype(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Raise ConfigError for less than float32 if tokens are not latents: pixels have no encoder, codes would change."""
    if dtype != torch.float32 and not isinstance(tokenizer, Latent):
        raise ConfigError(
            f"training.encoder_dtype: {type(tokenizer).__name__} has no encoder of continuous latents; set float32"
        )


@dataclass(frozen=True)
class Measured:
    """The statistics of latents, sampled from the posterior, that `Latent.measure` found."""

    images: int
    mean: Tensor  # (z,)
    std: Tensor  # (z,)
    scale: float  # 1 / standard deviation of all channels together


class Latent(Tokenizer):
    """The base class of tokenizers that use an autoencoder of diffusers, frozen and computed in float32.

    A token is a patch of (latent - mean) / std, by channel. `statistics` says where mean and std come from:
      fixed    they are given to the constructor and never measured
      scale    `fit` measures one standard deviation for all channels; the mean is 0 (MAR's 0.2325 is 1 / std)
      channel  `fit` measures mean and standard deviation of each channel
    `fit` measures once. The buffer `measured` is saved with mean and std in checkpoints and model folders, so that a
    run that begins with a measured tokenizer keeps its statistics.
    """

    mean: Tensor  # (z,)
    std: Tensor  # (z,)
    measured: Tensor  # ()
    autoencoder: Any
    masks = False  # convolutions see whole images
    encoder_dtype = torch.float32  # the dtype in which `moments` computes; training may lower it (`encoding_in`)

    def __init__(
        self,
        autoencoder: nn.Module,
        size: int | Sequence[int],
        patch: int,
        channels: int,
        *,
        stride: int,
        latent_channels: int,
        gaussian: bool,  # whether the posterior has a variance; otherwise it is a point
        statistics: Statistics,
        given: tuple[Sequence[float], Sequence[float]],  # mean and std, (z,) each, used until others are measured
    ) -> None:
        super().__init__()
        H, W = sides(size)
        check_least(1, patch=patch)
        if H % (stride * patch) or W % (stride * patch):
            raise UsageError(
                f"size: {H}x{W} is not allowed; both sides must be multiples of {stride * patch} "
                f"(stride {stride} of the autoencoder, patch {patch})"
            )
        check_known(get_args(Statistics), statistics=statistics)
        self.size, self.channels, self.levels, self.patch = (H, W), channels, 256, patch
        self.stride, self.latent_channels, self.gaussian = stride, latent_channels, gaussian
        self.grid = (H // stride // patch, W // stride // patch)
        self.dim = latent_channels * patch * patch
        self.config = {"size": [H, W], "patch": patch, "channels": channels, "statistics": statistics}
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        # While loading, the constructor runs on the meta device; these few numbers must be real even then.
        self._given = torch.tensor(given, dtype=torch.float32, device="cpu")  # (2, z)
        self.register_buffer("mean", self._given[0].clone())
        self.register_buffer("std", self._given[1].clone())
        self.register_buffer("measured", torch.tensor(False, device="cpu"))

    def train(self, mode: bool = True) -> Latent:
        super().train(mode)
        self.autoencoder.eval()  # it is frozen, so it stays in evaluation mode
        return self

    # --- images to tokens and back --------------------------------------------------------------------------------

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """The mean and log-variance, not clamped, of the latents of images (B, c, H, W): (B, 2z, h', w').

        A point posterior has no log-variance: (B, z, h', w').
        """
        return self.by_parts(self.encode, self.check_images(images), self.encoder_dtype)

    def encode(self, images: Tensor) -> Tensor:
        """The moments of images (B, c, H, W) in one pass, in the precision of the caller and with gradients."""
        found = self.autoencoder.encode(images, return_dict=False)[0]
        moments: Tensor = found.parameters if self.gaussian else found
        return moments

    def draw(self, latents: Tensor, kept: Tensor | None = None) -> Tensor:
        """The images (B, c, H, W), not clamped, of latents (B, z, h', w') that are not normalised, likewise."""
        assert kept is None, "a convolutional decoder has no mask token"
        images: Tensor = self.autoencoder.decode(latents, return_dict=False)[0]
        return images

    @property
    def last_layer(self) -> Tensor:
        """The weights of the last layer of the decoder."""
        convolutions = [module for module in self.autoencoder.decoder.modules() if isinstance(module, nn.Conv2d)]
        return convolutions[-1].weight

    def coded(self, images: Tensor, keys: Keys, kept: Tensor | None = None) -> Coded:
        """The contract of `trainable.Trainable`: posterior samples, with the loss "kl" of a posterior with a variance.

        The decoder takes latents in the scale of the encoder; they are normalised for generators alone.
        """
        assert kept is None, "a convolutional encoder sees whole images"
        mean, std = self.posterior(self.encode(images))
        if not self.gaussian:
            return Coded(mean)
        drawn = keys.to(mean.device).normal(*mean.shape[1:])  # (B, z, h', w')
        return Coded(mean + std * drawn, {"kl": kl_divergence(mean, std)})

    def posterior(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of the posterior, (B, z, h', w') each, on the tokenizer's device."""
        wanted = (
            self.latent_channels * (2 if self.gaussian else 1),
            self.size[0] // self.stride,
            self.size[1] // self.stride,
        )
        if moments.ndim != 4 or tuple(moments.shape[1:]) != wanted:
            raise DataError(
                f"moments: shape {tuple(moments.shape)} is not (B, {', '.join(map(str, wanted))}); "
                "they were made by another tokenizer or for another size"
            )
        moments = moments.to(self.device, torch.float32)
        if not self.gaussian:
            return moments, torch.zeros_like(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(*LOGVAR)).exp()

    @torch.no_grad()
    def tokens(self, moments: Tensor, keys: Keys | None = None) -> Tensor:
        latents, std = self.posterior(moments)
        if keys is not None and self.gaussian:
            drawn = keys.to(latents.device).normal(*latents.shape[1:])  # (B, z, h', w'), one draw for each image
            assert drawn.shape == latents.shape, f"{len(drawn)} keys for {len(latents)} images"
            latents = latents + std * drawn
        x = (latents - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        return patchify(x, self.patch)  # (B, L, D)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        x = unpatchify(tokens.to(self.device, torch.float32), self.patch, *self.grid)  # (B, z, h', w')
        latents = x * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        return self.by_parts(self.draw, latents).clamp(-1, 1)  # (B, c, H, W)

    def moments_config(self) -> dict[str, Any]:
        """The settings of autoencoder and images. Scale, statistics and patch are applied after the moments."""
        return {k: v for k, v in self.config.items() if k not in ("patch", "scale", "shift", "statistics")}

    def moments_fingerprint(self) -> str:
        return digest_of(type(self).__name__, self.moments_config(), self.autoencoder.state_dict())

    def encoder_fingerprint(self) -> str:
        """The sha256 of the weights of the encoder alone, on which the meaning of tokens depends."""
        weights = {
            name: tensor
            for name, tensor in self.autoencoder.state_dict().items()
            if name.startswith(("encoder.", "quant_conv."))
        }
        return digest_of(type(self).__name__, self.moments_config(), weights)

    # --- statistics -----------------------------------------------------------------------------------------------

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure the statistics if the config asks for it and they were not measured before."""
        if self.config["statistics"] != "fixed" and not self.measured:
            self.measure(batches, self.config["statistics"])

    def fit_moments(self, batches: Iterable[Tensor]) -> None:
        if self.config["statistics"] != "fixed" and not self.measured:
            self.measure_moments(batches, self.config["statistics"])

    def measure(self, batches: Iterable[Tensor], statistics: Statistics) -> Measured:
        """Measure the statistics over batches of images, as `measure_moments` does over moments."""
        return self.measure_moments((self.moments(images) for images in batches), statistics)

    def measure_moments(self, batches: Iterable[Tensor], statistics: Statistics) -> Measured:
        """Measure mean and variance of latents over batches of moments, and normalise by them from now on."""
        return self.measured_from(map(self.sums, batches), statistics)

    def sums(self, moments: Tensor) -> Tensor:
        """What `measured_from` needs of a batch of moments: (5, z) float64, which may be added up.

        The rows are sums of means, of their squares, and of variances; the number of latents, and that of images.
        """
        mean, std = (part.cpu().double() for part in self.posterior(moments))
        rows = [part.sum(dim=(0, 2, 3)) for part in (mean, mean.square(), std.square())]
        counts = torch.tensor([mean[:, 0].numel(), len(mean)], dtype=torch.float64)
        return torch.cat([torch.stack(rows), counts[:, None].expand(2, self.latent_channels)])

    def measured_from(self, parts: Iterable[Tensor], statistics: Statistics) -> Measured:
        """Normalise from now on by the statistics whose `sums` are given in parts.

        The variance is exactly that of posterior samples: the variance of the means plus the mean of the variances.
        """
        if statistics not in ("scale", "channel"):
            raise UsageError(f"statistics: {statistics!r} can't be measured; choose 'channel' or 'scale'")
        whole_sums = torch.zeros(5, self.latent_channels, dtype=torch.float64)
        for part in parts:
            whole_sums += part
        sums, latents, images = whole_sums[:3], whole_sums[3], int(whole_sums[4, 0])
        if not images:
            raise DataError("no images to measure: latent statistics need at least one")
        if not bool(torch.isfinite(sums).all()):
            raise NumericsError("the autoencoder's latents are not finite: its weights do not fit these images")
        mean, square, variance = sums / latents  # (z,) each
        std = (square - mean.square() + variance).clamp(min=0).sqrt()
        whole = float(((square + variance).mean() - mean.mean().square()).clamp(min=0).sqrt())
        whole = max(whole, 1e-6)  # if all latents are equal, the standard deviation is 0
        found = Measured(images, mean.float(), std.float(), 1 / whole)
        if statistics == "channel":
            self._set(mean, std.clamp(min=STD_FLOOR * whole), measured=True)
        else:
            self._set(torch.zeros_like(mean), torch.full_like(std, whole), measured=True)
        self.config["statistics"] = statistics
        return found

    def forget_statistics(self) -> None:
        """Restore the mean and std that the constructor was given."""
        self._set(*self._given, measured=False)

    def _set(self, mean: Tensor, std: Tensor, *, measured: bool) -> None:
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.measured.fill_(measured)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)), summed over the latents of an image, and the mean over images: ().

    (mu^2 + sigma^2 - 1 - log sigma^2) / 2: Kingma and Welling 2013, arXiv 1312.6114, appendix B.
    """
    variance = std.square()
    return 0.5 * (mean.square() + variance - 1 - variance.log()).flatten(1).sum(dim=1).mean()


def given_scale(scale: Any, latent_channels: int) -> tuple[list[float], list[float]]:
    """The mean and std, (z,) each, that normalise latents by multiplying them with `scale`."""
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise UsageError(f"scale: {scale!r} is not allowed; it must be positive, 1 / standard deviation of the latents")
    return [0.0] * latent_channels, [1 / scale] * latent_channels
