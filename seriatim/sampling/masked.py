"""The fast loop of masked models: the same draws and the same tokens as `MaskedModel.sample`, step by step.

What it does better: one pass for conditional and unconditional rows; none for the latter where the scale is 1, and
none for images that are finished; rows known on the CPU, where the noise is drawn; the backbone in half precision if
asked; a stream of steps.

Shapes: B images, L tokens, D features, N tokens asked for, C width of z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seriatim.core.errors import NumericsError
from seriatim.core.orders import order_vectors
from seriatim.core.random import Noise
from seriatim.core.schedules import check_guidance, check_token_schedule, guidance_at, unknown_after
from seriatim.models.masked import MaskedModel, draw


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
    order: Tensor | Sequence[int] | None = None,  # (L,) or (B, L), the first drawn first; None: random
    tokens: Tensor | None = None,  # (B, L, D) to begin from, of which those not known are ignored
    known: Tensor | None = None,  # (B, L) bool; each image may know other tokens, and another number of them
    guidance_scale: float = 1.0,
    guidance_schedule: str = "linear",
    guidance_interval: Sequence[float] | None = None,
    guidance_power: float | None = None,
    temperature: float = 1.0,
    token_schedule: str = "cosine",
    min_tokens: int = 1,
    num_diffusion_steps_last: int | None = None,  # None: as many steps inside the head all over the image
    dtype: torch.dtype = torch.float32,  # of the backbone; the head is always float32
    **head_steps: Any,
) -> Iterator[Step]:
    """Yield a `Step` after each of `steps` steps over the images; the last holds all tokens."""
    B, L = len(noise), model.backbone.tokens
    model.check_labels(labels, B)
    check_token_schedule(token_schedule, min_tokens)
    check_guidance(guidance_schedule, guidance_interval, guidance_power)
    tokens, known_there = model.begin(B, tokens, known)
    device, known = tokens.device, known_there.cpu()  # on the CPU, as are orders and rows
    order = order_vectors(order, noise, known)  # (B, L)
    begun = left = (~known).sum(dim=1).tolist()  # unknown tokens of each image: at first, and now
    passes = Passes(model, labels, B)
    for step in range(steps):
        shares = [1 - now / L for now in left]  # known when the step begins
        left = [
            unknown_after(step, steps, L, now, first, token_schedule, min_tokens)
            for now, first in zip(left, begun, strict=True)
        ]
        later = torch.zeros_like(known).scatter(1, order, torch.arange(L) < torch.tensor(left)[:, None])
        ask = ~known & ~later
        rows = ask.nonzero()[:, 0]  # (N,): the image of each token asked for
        if len(rows):  # with fewer unknown tokens than steps, all is known early
            scale = torch.tensor(
                [guidance_at(guidance_schedule, guidance_scale, m, L, guidance_interval, guidance_power) for m in left]
            )
            ask_there = ask.to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                z, z_null = passes.z(tokens, known.to(device), ask_there, rows, scale)  # (N, C)
            drawn = draw(
                model.head, rows, z, noise, z_null, scale, temperature, shares, num_diffusion_steps_last, head_steps
            )
            tokens = tokens.masked_scatter(ask_there[..., None], drawn)  # rows are in raster order
            known = known | ask
        yield Step(step, steps, "tokens", tokens, known)
    if not bool(torch.isfinite(tokens).all()):
        raise NumericsError(
            "the sampled tokens are not finite: the model is not trained enough for these settings; "
            "lower guidance_scale, or leave start_timestep at its default"
        )


class Passes:
    """Conditional and unconditional rows in one pass of the backbone, of the images that need them.

    A finished image needs none, one whose scale is 1 no unconditional ones. When that changes, which it seldom does,
    the backbone's state is made anew.
    """

    def __init__(self, model: MaskedModel, labels: Tensor | None, images: int) -> None:
        self.backbone = model.backbone
        self.conditions = torch.cat([model.condition(labels, images), model.condition(None, images)])  # (2 B, width)
        self.images, self.chosen = images, torch.empty(0, dtype=torch.long)

    def z(
        self, tokens: Tensor, known: Tensor, ask: Tensor, rows: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """z and z_null (N, C) of rows (N,); scale (B,); these two on the CPU, the rest on the device."""
        asking = torch.zeros(self.images, dtype=torch.bool).scatter(0, rows, True)  # (B,)
        guided = asking & (scale != 1.0)
        chosen = torch.cat([asking, guided]).nonzero()[:, 0]  # of 2 B
        if not torch.equal(chosen, self.chosen):
            self.chosen, there = chosen, chosen.to(tokens.device)
            self.state = self.backbone.start(self.conditions[there], len(chosen))
            self.index = there % self.images
        z = self.backbone.z(self.state, tokens[self.index], known[self.index], ask[self.index])
        z, z_guided = z[: len(rows)], z[len(rows) :]
        if not bool(guided.any()):
            return z, None
        if bool(guided[rows].all()):
            return z, z_guided
        # where the scale is 1, z itself stands for z_null: z + 1 (z - z)
        return z, z.masked_scatter(guided[rows].to(z.device)[:, None], z_guided)
