"""The fast sampling loop of parallel models. It generates the same tokens as `MaskedModel.sample`.

It differs from the naive sampler in these ways:
- one pass of the backbone computes conditional and unconditional rows and skips rows that are not needed;
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
from seriatim.core.orders import CONFIDENCE, ORDERS, RANDOM, order_vectors
from seriatim.core.schedules import unknown_after
from seriatim.core.settings import Settings
from seriatim.core.spec import TokenSpec
from seriatim.heads.base import Guidance, Head
from seriatim.sampling.draw import Drawing
from seriatim.sampling.step import Batch, Drawn, Step, begin

STEPS = 64  # sampling steps of an image when the settings give no number
FEW_CONDITIONS = 8  # above this number, one pass over all images costs less than one pass for each condition


@torch.no_grad()
def parallel_steps(backbone: Parallel, head: Head, batch: Batch) -> Iterator[Step]:
    """Yield a `Step` after each sampling step; the last one holds all tokens, which nobody has checked yet."""
    settings, B, L, device = batch.settings, len(batch.condition), backbone.spec.count, batch.condition.vectors.device
    steps = settings.num_inference_steps or STEPS
    tokens, known = begin(backbone.spec, B, device, batch.start)
    confident = batch.order is None and settings.order == CONFIDENCE
    order = None if confident else order_of(batch.order, settings, backbone.spec)
    vectors = None if confident else order_vectors(order, batch.keys.fold("order"), known)  # (B, L)
    begun = left = (~known).sum(dim=1).tolist()  # the number of unknown tokens of each image, at first and now
    passes = GuidedPasses(backbone, batch.condition, batch.null, head.neighbours)
    draw = Drawing(head, settings, device)
    token_keys = batch.keys.fold("token")
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
            scales = torch.tensor([settings.guidance_at(w, m, L) for w, m in zip(batch.scale, left, strict=True)])
            with torch.autocast(device.type, dtype=batch.dtype, enabled=batch.dtype != torch.float32):
                z, z_null = passes.z(tokens, known, ask, rows, places, scales)  # (N, C)
            sound = sound & torch.isfinite(z).all()
            guidance = None if z_null is None else Guidance.of(scales[rows], len(rows), device)
            own = token_keys.select(rows).fold(places)
            if confident:  # a token may be drawn again in a later step
                own = own.fold("step").fold(step)
            warmth = batch.temperature
            warmth = warmth[rows.to(device)] if isinstance(warmth, Tensor) else warmth
            drawn = draw(z, own.to(device), z_null, guidance, warmth, [shares[row] for row in rows.tolist()])
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


class GuidedPasses:
    """Runs a parallel backbone once for the conditional and the unconditional rows of those images that need them.

    A finished image needs no row, and an image whose guidance scale is 1 needs no unconditional row. While no token is
    known, z depends on the condition alone, so it is computed once for each distinct condition of the batch.
    """

    def __init__(self, backbone: Parallel, condition: Condition, null: Condition, neighbours: bool) -> None:
        self.backbone, self.neighbours = backbone, neighbours
        self.both = condition.join(null)  # 2 B rows
        self.images = len(condition)
        self.chosen = torch.empty(0, dtype=torch.long)
        self.condition = condition

    def z(
        self, tokens: Tensor, known: Tensor, ask: Tensor, rows: Tensor, places: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """z and z_null (N, C) for the tokens at rows and places (N,), with guidance scales (B,).

        All arguments but the tokens are on the host. z_null is None if no row is guided; if only some rows are, z_null
        equals z in the others.
        """
        asking = torch.zeros(self.images, dtype=torch.bool).scatter(0, rows, True)  # (B,)
        guided = asking & (scale != 1.0)
        names = self.both.names
        if names is not None and not bool(known.any()) and len(set(names)) <= FEW_CONDITIONS + 1:
            return self._of_nothing(rows, places, bool(guided.any()))
        chosen = torch.cat([asking, guided]).nonzero()[:, 0]  # rows of `both`
        if not torch.equal(chosen, self.chosen):
            there = chosen.to(tokens.device)
            self.chosen, self.index, self.index_there = chosen, chosen % self.images, there % self.images
            self.condition = self.both.select(chosen) if len(chosen) < len(self.both) else self.both
        z = self.backbone.z(
            self.condition, tokens[self.index_there], known[self.index], ask[self.index], self.neighbours
        )
        z, z_guided = z[: len(rows)], z[len(rows) :]
        if not bool(guided.any()):
            return z, None
        if bool(guided[rows].all()):
            return z, z_guided
        # Rows of scale 1 take z as their z_null, because guidance then leaves z as it is.
        return z, z.index_copy(0, guided[rows].nonzero()[:, 0].to(z.device), z_guided)

    def _of_nothing(self, rows: Tensor, places: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """z and z_null (N, C) while no token is known.

        Each distinct condition is computed alone, so that z does not depend on what else is in the batch.
        """
        spec, B, device = self.backbone.spec, self.images, self.both.vectors.device
        names = list(self.both.names or ())
        nothing = torch.zeros(1, spec.count, dtype=torch.bool)
        first = {name: row for row, name in reversed(list(enumerate(names)))}  # the first row of each condition
        wanted = {name: first[name] for name in names[: 2 * B if guided else B]}
        every = [
            self.backbone.z(
                self.both.select(slice(row, row + 1)), spec.blank(1, device), nothing, ~nothing, self.neighbours
            )
            for row in wanted.values()
        ]  # (L, C) each
        number = {name: i for i, name in enumerate(wanted)}
        table = torch.cat(every)

        rows_of = [rows, rows + B] if guided else [rows]  # rows of `both`
        chosen = [torch.tensor([number[names[row]] for row in some.tolist()], dtype=torch.long) for some in rows_of]
        z = [table.index_select(0, (which * spec.count + places).to(device)) for which in chosen]
        return z[0], z[1] if guided else None


def order_of(order: Tensor | Sequence[int] | None, settings: Settings, spec: TokenSpec) -> Tensor | None:
    """The positions in the order of generation, (L,) or (B, L); None if each image has a random order."""
    if order is not None:
        return torch.as_tensor(order)
    if settings.order is None or settings.order == RANDOM:
        return None
    if isinstance(settings.order, str):
        return torch.tensor(ORDERS[settings.order](*(spec.grid or (1, spec.count))))
    return torch.tensor(settings.order)


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
