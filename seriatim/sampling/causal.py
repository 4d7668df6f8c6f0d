"""The fast loop of causal models: the same draws and the same tokens as `CausalModel.sample`, step by step.

What it does better: keys and values of earlier tokens are kept, so that a step costs one position; conditional and
unconditional rows go in one batch, the latter until the guidance schedule needs them no more; nothing in a step waits
for an accelerator; the backbone in half precision if asked; a stream of steps.

Shapes: B images, L tokens, D features, N tokens asked for, C width of z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from seriatim.core.orders import RANDOM
from seriatim.core.random import Noise
from seriatim.core.schedules import check_guidance, check_one_a_step, guidance_at
from seriatim.models.causal import CausalModel, Condition
from seriatim.models.masked import draw
from seriatim.sampling.masked import Drawn, Step, refuse_not_finite


@torch.no_grad()
def causal_steps(
    model: CausalModel,
    labels: Condition,  # (B,), or captions
    noise: Noise,  # one row and one generator for each image
    *,
    steps: int | None = None,  # L, which is what None stands for
    order: Tensor | Sequence[int] | str | None = None,  # (L,) or (B, L), the first drawn first; None: the model's
    tokens: Tensor | None = None,  # (B, L, D) to begin from, of which those not known are ignored
    known: Tensor | None = None,  # (B, L) bool; each image may know other tokens, and another number of them
    guidance_scale: float = 1.0,
    guidance_schedule: str = "linear",
    guidance_interval: Sequence[float] | None = None,
    guidance_power: float | None = None,
    temperature: float = 1.0,
    token_schedule: str = "cosine",  # as in every request; of a token a step there is no other
    min_tokens: int = 1,
    num_diffusion_steps_last: int | None = None,  # None: as many steps inside the head all over the image
    choice_temperature: float = 0.0,  # noqa: ARG001 # of an order that these models don't have
    dtype: torch.dtype = torch.float32,  # of the backbone; the head is always float32
    first: object = None,  # noqa: ARG001 # of masked models
    **head_steps: Any,
) -> Iterator[Step]:
    """Yield a `Step` after each of L tokens of the images; the last holds all tokens."""
    B, L = len(noise), model.backbone.tokens
    model.check_labels(labels, B)
    check_one_a_step(steps, L, token_schedule, min_tokens)
    check_guidance(guidance_schedule, guidance_interval, guidance_power)
    tokens, known_there = model.begin(B, tokens, known)
    device, known = tokens.device, known_there.cpu()
    vectors = model.drawing_order(order, noise, known)  # (B, L)
    scales = [
        guidance_at(guidance_schedule, guidance_scale, L - i - 1, L, guidance_interval, guidance_power)
        for i in range(L)
    ]
    guided = max((i + 1 for i in range(L) if scales[i] != 1.0), default=0)  # steps from which on no one is guided
    passes = Passes(model, labels, vectors.to(device), guided)
    for i in range(L):
        places = vectors[:, i]
        rows = (~known[torch.arange(B), places]).nonzero()[:, 0]  # (N,): images that don't know this token
        if len(rows):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                z, z_null = passes.z(tokens, i)  # (B, C)
            if len(rows) < B:
                there = rows.to(device, non_blocking=True)
                z, z_null = z[there], None if z_null is None else z_null[there]
            drawn = draw(
                model.head, rows, z, noise, z_null, torch.full((B,), scales[i]), temperature, [i / L] * B,
                num_diffusion_steps_last, head_steps,
            )  # fmt: skip
            flat = (rows * L + places[rows]).to(device, non_blocking=True)
            tokens = tokens.flatten(0, 1).index_copy(0, flat, drawn).view_as(tokens)
            known = known.scatter(1, places[:, None], True)
        before = version(tokens)
        of = Drawn(model.head, z, drawn, rows, places[rows]) if len(rows) else None
        if i == L - 1:
            refuse_not_finite(tokens)  # before anybody can take them for a result
        yield Step(i, L, "tokens", tokens, known, drawn=of)
        if version(tokens) != before:  # who looked at the step wrote other tokens: the cache is of those before
            passes.begin()


def version(tokens: Tensor) -> int:
    """Changes when the tokens are written to; not told of those made in torch's inference mode."""
    return 0 if tokens.is_inference() else tokens._version


class Passes:
    """Conditional and unconditional rows in one pass of the backbone, as long as anyone is guided."""

    def __init__(self, model: CausalModel, labels: Condition, vectors: Tensor, guided: int) -> None:
        self.backbone, self.vectors, self.guided = model.backbone, vectors, guided
        self.images = len(vectors)
        condition, null, valid = model.conditions(labels, self.images)
        self.condition = torch.cat([condition, null]) if guided else condition  # (2 B, A), or (B, A)
        self.valid = torch.cat([valid, valid]) if guided and valid is not None else valid
        self.ordered = model.order == RANDOM
        self.begin()

    def begin(self) -> None:
        """A state that has seen no token."""
        rows = len(self.condition)
        order = self.vectors.repeat(rows // self.images, 1) if self.ordered else None
        self.state = self.backbone.start(self.condition, rows, order, self.valid)

    def z(self, tokens: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        """z and z_null (B, C) of the i-th token of each image; tokens (B, L, D) of which the first i are known."""
        B = self.images
        z = tokens
        for j in range(self.state.drawn, i + 1):  # one, unless tokens were known at first
            if j >= self.guided and len(self.state.prefix) > B:
                self.state = self.state.first(B)
            z = self.backbone.step(self.state, self.drawn(tokens, j - 1) if j else None)
        return z[:B], z[B:] if len(z) > B else None

    def drawn(self, tokens: Tensor, j: int) -> Tensor:
        """The j-th token of each row of the state: (B or 2 B, D)."""
        index = self.vectors[:, j : j + 1]  # (B, 1)
        if self.backbone.vocab is None:
            index = index[..., None].expand(-1, -1, tokens.shape[-1])
        one = tokens.gather(1, index)[:, 0]  # (B, D)
        return one if len(self.state.prefix) == self.images else torch.cat([one, one])
