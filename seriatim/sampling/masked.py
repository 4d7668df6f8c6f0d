"""The fast loop of masked models: the same draws and the same tokens as `MaskedModel.sample`, step by step.

What it does better: one pass for conditional and unconditional rows; none for the latter where the scale is 1;
rows known on the CPU, where the noise is drawn; the backbone in half precision if asked; a stream of steps.

Shapes: B images, L tokens, D features, N tokens asked for, C width of z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seriatim.core.errors import NumericsError
from seriatim.core.random import Noise
from seriatim.core.schedules import guidance_at, unknown_after
from seriatim.models.masked import MaskedModel, annealed


@dataclass(frozen=True)
class Step:
    """What is known after a step over a batch of images."""

    index: int  # 0-based, over all batches of a request
    total: int
    stage: str  # "tokens"
    tokens: Tensor  # (B, L, D); unknown ones are zero
    known: Tensor  # (B, L) bool
    images: range = field(default=range(0))  # which images of the request this batch holds
    decode: Callable[[Tensor], list[Image.Image]] | None = field(default=None, repr=False)

    def preview(self) -> list[Image.Image]:
        """The images as known so far; unknown tokens show as the mean of the training images."""
        assert self.decode is not None, "this step was made without a tokenizer"
        return self.decode(self.tokens)


@torch.no_grad()
def masked_steps(
    model: MaskedModel,
    labels: Tensor | None,  # (B,)
    noise: Noise,  # one row and one generator for each image
    *,
    steps: int,
    guidance_scale: float = 1.0,
    guidance_schedule: str = "linear",
    temperature: float = 1.0,
    token_schedule: str = "cosine",
    num_diffusion_steps_last: int | None = None,  # None: as many steps inside the head all over the image
    dtype: torch.dtype = torch.float32,  # of the backbone; the head is always float32
    **head_steps: Any,
) -> Iterator[Step]:
    """Yield a `Step` after each of `steps` steps over the images; the last holds all tokens."""
    B, L, D = len(noise), model.backbone.tokens, model.backbone.dim
    model.check_labels(labels, B)
    device = model.no_class.device
    tokens = torch.zeros(B, L, D, device=device)
    known = torch.zeros(B, L, dtype=torch.bool)  # on the CPU, as are orders and rows
    order = noise.permutation(L).cpu()  # (B, L)
    condition, no_class = model.condition(labels, B), model.condition(None, B)
    alone, both = model.backbone.start(condition, B), None
    left = L
    for step in range(steps):
        inside = annealed(head_steps, num_diffusion_steps_last, 1 - left / L)
        before, left = left, unknown_after(step, steps, L, left, schedule=token_schedule)
        ask = torch.zeros_like(known).scatter(1, order[:, left:before], True)
        scale = guidance_at(guidance_schedule, guidance_scale, left, L)
        known_there, ask_there = known.to(device), ask.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if scale == 1.0:
                z, z_null = model.backbone.z(alone, tokens, known_there, ask_there), None  # (N, C)
            else:
                both = both or model.backbone.start(torch.cat([condition, no_class]), 2 * B)
                twice = (t.repeat(2, *[1] * (t.ndim - 1)) for t in (tokens, known_there, ask_there))
                z, z_null = model.backbone.z(both, *twice).chunk(2)
        rows = ask.nonzero()[:, 0]  # (N,)
        drawn = model.head.sample(z, noise.select(rows), z_null, scale, temperature, **inside)
        tokens = tokens.masked_scatter(ask_there[..., None], drawn)  # rows are in raster order
        known = known | ask
        yield Step(step, steps, "tokens", tokens, known)
    if not bool(torch.isfinite(tokens).all()):
        raise NumericsError(
            "the sampled tokens are not finite: the model is not trained enough for these settings; "
            "lower guidance_scale, or leave start_timestep at its default"
        )
