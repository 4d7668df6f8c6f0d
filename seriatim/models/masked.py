"""The masked autoregressive model of Li et al. 2024 (MAR): any order, several tokens a step.

Section 3.4: in training, a random share of the tokens is masked and the head models each of them given z; in sampling,
tokens become known set by set in a random order. Unusual:
- one mask ratio for the whole batch, at least 0.7, so that the encoder is short;
- unconditional is a vector of its own, not a row of the class embedding;
- of codes, the order may be "confidence", as in MaskGIT (Chang et al. 2022): all unknown tokens are drawn at each step,
  and those stay that are likeliest.

Shapes: B images, L tokens, D features (codes have no such axis), N tokens asked for, C width of z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seriatim.backbones.base import Backbone
from seriatim.core.errors import UsageError
from seriatim.core.orders import CONFIDENCE, order_vectors
from seriatim.core.random import Noise
from seriatim.core.schedules import (
    annealed_steps,
    check_guidance,
    check_token_schedule,
    guidance_at,
    mask_ratio,
    unknown_after,
)
from seriatim.heads.base import Head
from seriatim.models.base import Loss, Model

CHOICE_TEMPERATURE = 4.5  # MaskGIT's


class MaskedModel(Model):
    """`MaskedModel(Masked(tokens=256, dim=16, width=768, depth=12), Diffusion(dim=16), classes=1000)`."""

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        classes: int = 0,  # 0: unconditional
        label_dropout: float = 0.1,  # share of training images that see no label, for guidance
        min_mask_ratio: float = 0.7,
        mask_ratio_std: float = 0.25,  # of the normal around 1 that is cut off at min_mask_ratio and 1
    ) -> None:
        if backbone.causal:
            raise UsageError(
                f"backbone: {type(backbone).__name__} sees only what comes before a token; a masked model asks for "
                "several at once, from all that is known: use the backbone `masked`, or the kind `causal`"
            )
        super().__init__(backbone, head, classes=classes, label_dropout=label_dropout)
        if not 0 < min_mask_ratio <= 1:
            raise UsageError(f"min_mask_ratio: {min_mask_ratio!r} is not allowed; it must be in (0, 1]")
        if not mask_ratio_std > 0:
            raise UsageError(f"mask_ratio_std: {mask_ratio_std!r} is not allowed; it must be above 0")
        self.min_mask_ratio, self.mask_ratio_std = min_mask_ratio, mask_ratio_std

    @property
    def config(self) -> dict[str, object]:
        return {**super().config, "min_mask_ratio": self.min_mask_ratio, "mask_ratio_std": self.mask_ratio_std}

    # --- training -------------------------------------------------------------------------------------------------

    def loss(self, tokens: Tensor, labels: Tensor | None = None, noise: Noise | None = None) -> Loss:
        """tokens (B, L, D), labels (B,) -> the head's loss over masked tokens (Li et al. 2024, eq. 1, section 3.4)."""
        self.check_tokens(tokens)
        B, L = tokens.shape[:2]
        self.check_labels(labels, B)
        noise = Noise.shared(None, B, tokens.device) if noise is None else noise
        labels = self.drop_labels(labels, noise)
        masked = math.ceil(L * mask_ratio(noise.once(), std=self.mask_ratio_std, low=self.min_mask_ratio))
        order = noise.permutation(L)  # (B, L); its first entries are masked
        ask = torch.zeros(B, L, dtype=torch.bool, device=tokens.device).scatter(1, order[:, :masked], True)
        state = self.backbone.start(self.condition(labels, B), B)
        z = self.backbone.z(state, tokens, ~ask, ask)  # (N, C)
        rows = ask.nonzero()[:, 0]  # (N,): the image of each masked token
        loss = self.head.loss(z, tokens[ask], noise.select(rows))
        count = loss.count.sum()
        parts = {name: value.sum().detach() / count for name, value in loss.parts.items()}
        return Loss(loss.sum.sum() / count, parts)

    # --- sampling: the specification; `seriatim.sampling.masked` is the fast loop -----------------------------------

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | None,  # (B,)
        noise: Noise,  # one row and one generator for each image
        *,
        steps: int = 64,
        order: Tensor | Sequence[int] | str | None = None,  # (L,) or (B, L), the first drawn first; None: random
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
        choice_temperature: float = CHOICE_TEMPERATURE,  # of the order "confidence"
        **head_steps: Any,
    ) -> Tensor:
        """Tokens (B, L, D), known set by set: a step takes tokens from the end of each image's order vector.

        Known tokens stay as they are. Both schedules run from each image's own known share. With the order "confidence"
        a step draws all unknown tokens and keeps the likeliest.
        """
        B, L = len(noise), self.backbone.tokens
        self.check_labels(labels, B)
        check_token_schedule(token_schedule, min_tokens)
        check_guidance(guidance_schedule, guidance_interval, guidance_power)
        tokens, known = self.begin(B, tokens, known)
        confident = is_confidence(order, self.head)
        vectors = None if confident else order_vectors(order, noise, known)  # (B, L)
        state, null = self.backbone.start(self.condition(labels, B), B), self.backbone.start(self.condition(None, B), B)
        begun = left = (~known).sum(dim=1).tolist()  # unknown tokens of each image: at first, and now
        for step in range(steps):
            shares = [1 - now / L for now in left]  # known when the step begins
            left = [
                unknown_after(step, steps, L, now, first, token_schedule, min_tokens)
                for now, first in zip(left, begun, strict=True)
            ]
            ask = ~known
            if vectors is not None:
                first_left = torch.arange(L) < torch.tensor(left)[:, None]  # (B, L)
                ask &= ~torch.zeros_like(known).scatter(1, vectors, first_left.to(known.device))
            if not ask.any():
                break  # with fewer unknown tokens than steps, all is known early
            rows = ask.nonzero()[:, 0]  # (N,): the image of each token asked for
            scale = torch.tensor(
                [guidance_at(guidance_schedule, guidance_scale, m, L, guidance_interval, guidance_power) for m in left],
                device=tokens.device,
            )
            z = self.backbone.z(state, tokens, known, ask)  # (N, C)
            z_null = self.backbone.z(null, tokens, known, ask) if guidance_scale != 1 else None
            drawn = draw(
                self.head, rows, z, noise, z_null, scale, temperature, shares, num_diffusion_steps_last, head_steps
            )
            if confident:
                sure = self.head.confidence(z, drawn, z_null, scale[rows])  # (N,)
                keep = surest(sure, rows, noise.select(rows), left, choice_temperature * (1 - (step + 1) / steps))
                ask, drawn = ask.masked_scatter(ask, keep), drawn[keep]
            tokens[ask] = drawn
            known |= ask
        return tokens


def draw(
    head: Head,
    rows: Tensor,  # (N,): the image of each token asked for
    z: Tensor,  # (N, C)
    noise: Noise,  # a row for each image
    z_null: Tensor | None,
    scale: Tensor,  # (B,) of guidance
    temperature: float,
    shares: list[float],  # known of each image
    last: int | None,
    head_steps: dict[str, Any],
) -> Tensor:
    """The tokens asked for (N, D); given `last`, with the fewer steps inside the head the more an image knows."""
    if last is None:
        return head.sample(z, noise.select(rows), z_null, scale[rows], temperature, **head_steps)
    first = head_steps.get("num_diffusion_steps")
    if first is None:
        raise UsageError("num_diffusion_steps_last: needs num_diffusion_steps, where the annealing begins")
    counts = torch.tensor([annealed_steps(first, last, share) for share in shares])[rows.cpu()]  # (N,)
    drawn = z.new_empty(len(z), head.output, dtype=torch.float32)
    for count in counts.unique().tolist():  # one, unless images of the batch know different shares
        some = (counts == count).nonzero()[:, 0]
        of = rows[some.to(rows.device)]
        some = some.to(z.device)
        null = None if z_null is None else z_null[some]
        options = head_steps | {"num_diffusion_steps": count}
        drawn[some] = head.sample(z[some], noise.select(of), null, scale[of], temperature, **options)
    return drawn


def is_confidence(order: Any, head: Head) -> bool:
    """Whether the order is "confidence", which needs a head of codes that tells how sure it is."""
    if not (isinstance(order, str) and order == CONFIDENCE):
        return False
    if not head.discrete:
        raise UsageError(f"order: 'confidence' needs a head of codes; {type(head).__name__} draws features; use random")
    return True


def surest(sure: Tensor, rows: Tensor, noise: Noise, left: list[int], temperature: float) -> Tensor:
    """Which of the tokens just drawn stay (N,) bool: of each image all but `left`, the likeliest (MaskGIT, sec. 3.2).

    sure (N,) log p, rows (N,) the image of each. Gumbel noise, at a temperature that falls to 0, lets less likely ones
    through at first.
    """
    u = noise.uniform().clamp(min=1e-20).to(sure)  # (N,)
    score = (sure - temperature * torch.log(-torch.log(u))).cpu()
    rows = rows.cpu()
    keep = torch.zeros(len(score), dtype=torch.bool)
    for image, count in enumerate(left):
        mine = (rows == image).nonzero()[:, 0]
        keep[mine[score[mine].argsort(descending=True, stable=True)[: len(mine) - count]]] = True
    return keep.to(sure.device)
