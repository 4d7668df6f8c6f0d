"""The fast sampling loop of parallel models. It generates the same tokens as `MaskedModel.sample`.

It differs from the naive sampler in these ways:
- one pass of the backbone computes conditional and unconditional rows and skips rows that are not needed
  (`guidance.py`);
- the first step, where no token is known, is computed once for each condition;
- masks and row indices stay on the host, so that no step waits for an accelerator; only the order "confidence" asks it
  once a step which codes are the likeliest;
- the backbone runs in half precision if `dtype` asks for it, while the head is always float32;
- it yields a `Step` after each step.

Shapes: B images, L tokens, D features, N tokens asked for, C width of z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seriatim.backbones.base import Parallel
from seriatim.conditions.base import Condition
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.core.orders import CONFIDENCE, ORDERS, RANDOM, order_vectors
from seriatim.core.schedules import unknown_after
from seriatim.core.settings import Settings
from seriatim.core.spec import TokenSpec
from seriatim.heads.base import Guidance, Head
from seriatim.sampling.draw import Drawing
from seriatim.sampling.guidance import GuidedPasses, scales_at
from seriatim.sampling.step import Drawn, Start, Step, begin

STEPS = 64  # sampling steps of an image when the settings give no number


@torch.no_grad()
def parallel_steps(
    backbone: Parallel,
    head: Head,
    condition: Condition,
    null: Condition,
    keys: Keys,
    settings: Settings,
    start: Start | None = None,
    order: Tensor | Sequence[int] | None = None,
    scale: Sequence[float] | None = None,
    temperature: float | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Yield a `Step` after each sampling step; the last one holds all tokens. `checked` refuses bad numbers.

    `condition` and `null` hold B images each, and `keys` has B rows on the host. `order`, (L,) or (B, L), lists
    positions and overrides settings.order; `scale` (B) and `temperature` (B,) override the settings for each image. The
    backbone runs in `dtype`.
    """
    B, L, device = len(condition), backbone.tokens, condition.vectors.device
    steps = settings.num_inference_steps or STEPS
    full = [settings.guidance_scale] * B if scale is None else list(scale)
    warmth = settings.temperature if temperature is None else temperature
    tokens, known = begin(backbone.spec, B, device, start)
    confident = is_confidence(settings.order, head) and order is None
    vectors = (
        None if confident else order_vectors(order_of(order, settings, backbone.spec), keys.fold("order"), known)
    )  # (B, L)
    begun = left = (~known).sum(dim=1).tolist()  # the number of unknown tokens of each image, at first and now
    passes = GuidedPasses(backbone, condition, null, head.neighbours)
    draw = Drawing(head, settings, device)
    token_keys = keys.fold("token")
    sound = torch.ones((), dtype=torch.bool, device=device)
    for step in range(steps):
        shares = [1 - now / L for now in left]  # the share of each image's tokens that is known before this step
        left = [
            unknown_after(step, steps, L, now, first, settings.token_schedule, settings.min_tokens)
            for now, first in zip(left, begun, strict=True)
        ]
        ask = ~known
        if vectors is not None:
            ask &= ~torch.zeros_like(known).scatter(1, vectors, torch.arange(L) < torch.tensor(left)[:, None])
        rows, places = ask.nonzero().unbind(1)  # (N,): the image of each token asked for, and its position
        drawn_here: Drawn | None = None
        if len(rows):  # an image with fewer unknown tokens than steps is finished early
            scales = torch.tensor(scales_at(settings, full, left, L))  # (B,)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                z, z_null = passes.z(tokens, known, ask, rows, places, scales)  # (N, C)
            sound = sound & torch.isfinite(z).all()
            guidance = None if z_null is None else Guidance.of(scales[rows], len(rows), device)
            own = token_keys.select(rows).fold(places)
            if confident:  # a token may be drawn again in a later step
                own = own.fold("step").fold(step)
            warm = warmth[rows.to(device)] if isinstance(warmth, Tensor) else warmth
            there = own.to(device)
            drawn = draw(z, there, z_null, guidance, warm, [shares[row] for row in rows.tolist()])
            if confident:
                sure = head.confidence(z, drawn, z_null, guidance)  # (N,)
                falling = settings.choice_temperature * (1 - (step + 1) / steps)
                kept = surest(sure.cpu(), rows, own.fold("choice").uniform(), left, falling)  # (N,)
                ask, rows, places = ask.masked_scatter(ask, kept), rows[kept], places[kept]
                keep = kept.nonzero()[:, 0].to(device)
                drawn, z = drawn[keep], z[keep]
            flat = (rows * L + places).to(device, non_blocking=True)
            tokens = tokens.flatten(0, 1).index_copy(0, flat, drawn).view_as(tokens)
            known = known | ask
            drawn_here = Drawn(head, z, drawn, rows, places)
        all_sound = sound & draw.sound
        made = Step(step, steps, "tokens", tokens, known, drawn=drawn_here, sound=all_sound, last=step == steps - 1)
        yield made
        tokens = made.tokens


def order_of(order: Tensor | Sequence[int] | None, settings: Settings, spec: TokenSpec) -> Tensor | None:
    """The positions in the order of generation, (L,) or (B, L); None if each image has a random order."""
    if order is not None:
        return torch.as_tensor(order)
    if settings.order is None or settings.order == RANDOM:
        return None
    if isinstance(settings.order, str):
        return torch.tensor(ORDERS[settings.order](*(spec.grid or (1, spec.count))))
    return torch.tensor(settings.order)


def is_confidence(order: object, head: Head) -> bool:
    """Whether the order is "confidence". Raises UsageError if the head's tokens are not codes."""
    if order != CONFIDENCE:
        return False
    if not head.discrete:
        raise UsageError(f"order: 'confidence' needs a head of codes; {type(head).__name__} draws features; use random")
    return True


def surest(sure: Tensor, rows: Tensor, u: Tensor, left: list[int], temperature: float) -> Tensor:
    """A mask (N,) bool of the sampled tokens that are kept (MaskGIT, section 3.2).

    Image b keeps its likeliest tokens and masks left[b] of them again. `sure` (N,) is log p of each token, `rows` (N,)
    is its image, `u` (N,) is uniform noise; all are on the host. Gumbel noise lets less likely tokens through in early
    steps; its temperature falls to 0.
    """
    score = sure.float() - temperature * torch.log(-torch.log(u.clamp(min=1e-20)))
    keep = torch.zeros(len(score), dtype=torch.bool)
    for image, count in enumerate(left):
        mine = (rows == image).nonzero()[:, 0]
        keep[mine[score[mine].argsort(descending=True, stable=True)[: len(mine) - count]]] = True
    return keep
