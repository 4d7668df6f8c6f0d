"""A small UNet with flow matching, which is what people would use instead: an opponent made of the parts of the house.

Its only token is the whole image, a patch as large as the image, and the head is a rectified flow (Liu et al. 2023,
Lipman et al. 2023) whose velocity field is diffusers' UNet2DModel. The condition is the class alone, for which the
backbone has no blocks. So it is trained, sampled, guided and judged by the very code that its rivals use: the same
images, label dropout, weight average, schedule and classifier-free guidance. Chosen as is usual for such networks:
logit-normal times (Esser et al. 2024), times and classes that scale and shift the normalised features (Dhariwal &
Nichol 2021), residual branches and an output that begin with zeros.

Shapes: N images, D = c H W numbers of an image, C width of z, E width of the embedding of time and class.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.backbones.base import Parallel
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError, check_least, nearest
from seriatim.core.keys import Keys
from seriatim.core.spec import TokenSpec
from seriatim.heads.base import Guidance, Head, HeadLoss, Plan
from seriatim.heads.flow import FLOW_SOLVERS, MOST_STEPS
from seriatim.models.registry import BACKBONES, HEADS
from seriatim.nn.linear import at_least_float32

TIME_SCALE = 1000.0  # diffusers embeds times from 0 to 1000
GROUPS = 32  # of the normalisations, or fewer where that does not divide the channels
HEAD_CHANNELS = 32  # of an attention head


class ClassOnly(Parallel):
    """z of an image's only token: the vector of its class, normalised."""

    def __init__(self, tokens: int, dim: int, *, width: int = 256) -> None:
        super().__init__()
        if tokens != 1:
            raise UsageError(f"tokens: {tokens} is not allowed; the whole image is one token: let patch be its side")
        self.spec = TokenSpec(tokens, dim=dim)
        self.width = self.z_dim = width
        self.config = {"tokens": tokens, "dim": dim, "width": width}
        self.norm = nn.LayerNorm(width)

    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:  # noqa: ARG002
        assert not neighbours, "an image that is one token has no neighbours"
        rows = ask.nonzero()[:, 0].to(tokens.device)
        z: Tensor = self.norm(condition.vectors[:, 0])[rows]  # (N, C)
        return z


@dataclass(frozen=True)
class UNetOptions:
    """The options for solving the ODE from noise to an image."""

    num_diffusion_steps: Annotated[int, "Steps from noise to an image; heun runs the network twice in each step."] = 15
    solver: Annotated[str, "The solver: euler or heun."] = "heun"
    guidance_from: Annotated[float, "The time, 0 is noise and 1 the image, at which guidance begins."] = 0.0
    guidance_to: Annotated[float, "The time at which guidance ends."] = 1.0
    bfloat16: Annotated[bool, "Whether the network computes in bfloat16."] = True


class UNetFlow(Head):
    """p(image | z) by a velocity field, x_t = (1 - t) eps + t x, whose network is a UNet."""

    tempers = False
    Options = UNetOptions

    def __init__(
        self,
        dim: int,  # D
        *,
        channels: int = 3,  # c
        patch: int = 1,  # the side of the squares of pixels that enter the network as channels
        widths: Sequence[int] = (64, 128, 128),  # channels of each level, which has half the side of the last one
        layers: int = 2,  # residual blocks of a level on the way down; one more on the way up
        attention: Sequence[int] = (2,),  # levels with attention, counted from 0
        dropout: float = 0.0,
        time_mean: float = 0.0,  # of logit(t) in training
        time_std: float = 1.0,
        z_dim: int | None = None,  # C; None means that the model sets it
    ) -> None:
        super().__init__()
        check_least(1, channels=channels, patch=patch, layers=layers)
        side = math.isqrt(dim // channels)
        if channels * side * side != dim or side % (patch * 2 ** (len(widths) - 1)):
            raise UsageError(f"dim: {dim} numbers are no square image that {len(widths)} levels of {patch=} can halve")
        self.output, self.channels, self.patch, self.side = dim, channels, patch, side
        self.time_mean, self.time_std, self.embedding = time_mean, time_std, 4 * widths[0]
        self.config = {"dim": dim, "channels": channels, "patch": patch, "widths": list(widths), "layers": layers}
        self.config |= {"attention": list(attention), "dropout": dropout}
        self.config |= {"time_mean": time_mean, "time_std": time_std}
        self.network = unet(channels * patch * patch, side // patch, widths, layers, attention, dropout)
        if z_dim is not None:
            self.bind(z_dim)

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.z_embed = nn.Linear(z_dim, self.embedding)
        super().bind(z_dim)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """v (N, D), predicted from x (N, D) at times t (N,) in [0, 1] and z (N, C)."""
        images = F.pixel_unshuffle(x.view(-1, self.channels, self.side, self.side), self.patch)
        (v,) = self.network(images, TIME_SCALE * t, self.z_embed(z), return_dict=False)
        return F.pixel_shuffle(v, self.patch).flatten(1)

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The loss of each image, of z (N, C) and target (N, D): mean over D of (v - v_hat)^2."""
        normal, eps = (at_least_float32(keys.fold(name).normal(n), z) for name, n in (("t", 1), ("eps", self.output)))
        t = torch.sigmoid(self.time_mean + self.time_std * normal)  # (N, 1)
        x = at_least_float32(target, z)
        v = self(torch.lerp(eps, x, t), t[:, 0], z).float()
        mse = (x - eps - v).square().mean(dim=1)  # (N,)
        return HeadLoss(mse, torch.ones_like(mse))

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        keys: Keys,
        plan: Plan | None = None,
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Sampled images (N, D)."""
        options: UNetOptions = self.options() if plan is None else plan.options
        self.check_sampling(z_null, guidance, temperature)
        N, steps = len(z), options.num_diffusion_steps

        def velocity(i: int, x: Tensor) -> Tensor:
            t = torch.full((len(x),), i / steps, device=x.device)
            if guidance is None or z_null is None or not options.guidance_from <= i / steps <= options.guidance_to:
                return cast(Tensor, self(x, t, z)).float()
            v = self(x.repeat(2, 1), t.repeat(2), torch.cat([z, z_null])).float()
            return v[N:] + guidance.column * (v[:N] - v[N:])

        with torch.autocast(z.device.type, torch.bfloat16, enabled=options.bfloat16):
            return FLOW_SOLVERS[options.solver](velocity, keys.fold("noise").normal(self.output), steps)

    def check_options(self, options: UNetOptions, temperature: float = 1.0) -> None:
        super().check_options(options, temperature)
        steps, solver = options.num_diffusion_steps, options.solver
        if not 1 <= steps <= MOST_STEPS:
            raise UsageError(f"num_diffusion_steps: {steps!r} is not allowed; it must be from 1 to {MOST_STEPS:,}")
        if solver not in FLOW_SOLVERS:
            raise UsageError(f"solver: {solver!r} is not known to the UNet{nearest(solver, FLOW_SOLVERS)}")


def unet(
    channels: int, side: int, widths: Sequence[int], layers: int, attention: Sequence[int], dropout: float
) -> nn.Module:
    """A UNet2DModel whose residual branches and output begin with zeros; its classes are embedded outside of it."""
    from diffusers.models.resnet import ResnetBlock2D  # this import takes seconds
    from diffusers.models.unets.unet_2d import UNet2DModel

    levels = range(len(widths))
    made: Any = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=tuple(f"{'Attn' if i in attention else ''}DownBlock2D" for i in levels),
        up_block_types=tuple(f"{'Attn' if i in attention else ''}UpBlock2D" for i in reversed(levels)),
        attention_head_dim=math.gcd(HEAD_CHANNELS, *widths),
        norm_num_groups=math.gcd(GROUPS, *widths),
        dropout=dropout,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    last = [block.conv2 for block in made.modules() if isinstance(block, ResnetBlock2D)]
    for layer in (*last, made.conv_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return cast(nn.Module, made)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """A context in which recipes and model folders may have the backbone `class-only` and the head `unet`."""
    BACKBONES["class-only"], HEADS["unet"] = ClassOnly, UNetFlow
    try:
        yield
    finally:
        del BACKBONES["class-only"], HEADS["unet"]
