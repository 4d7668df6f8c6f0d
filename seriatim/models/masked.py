"""The masked autoregressive model of Li et al. 2024 (MAR): any order, several tokens a step.

Section 3.4: in training, a random share of the tokens is masked and the head models each of them given z; in sampling,
tokens become known set by set in a random order. Unusual:
- one mask ratio for the whole batch, at least 0.7, so that the encoder is short;
- unconditional is a vector of its own, not a row of the class embedding.

Shapes: B images, L tokens, D features, N tokens asked for, C width of z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.backbones.base import Backbone
from seriatim.core.errors import UsageError
from seriatim.core.orders import order_vectors
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


@dataclass
class Loss:
    """The mean over all asked tokens and draws; `parts` are its terms, for logs."""

    mean: Tensor  # ()
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> ()


class MaskedModel(nn.Module):
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
        super().__init__()
        if classes < 0:
            raise UsageError(f"classes: {classes!r} is not allowed; it must be 0 (unconditional) or more")
        if not 0 <= label_dropout <= 1:
            raise UsageError(f"label_dropout: {label_dropout!r} is not allowed; it must be in [0, 1]")
        if not 0 < min_mask_ratio <= 1:
            raise UsageError(f"min_mask_ratio: {min_mask_ratio!r} is not allowed; it must be in (0, 1]")
        if not mask_ratio_std > 0:
            raise UsageError(f"mask_ratio_std: {mask_ratio_std!r} is not allowed; it must be above 0")
        if head.output != backbone.dim:
            raise UsageError(f"head: it draws {head.output} features, the backbone's tokens have {backbone.dim}")
        head.bind(backbone.z_dim)
        self.backbone, self.head = backbone, head
        self.classes, self.label_dropout, self.min_mask_ratio = classes, label_dropout, min_mask_ratio
        self.mask_ratio_std = mask_ratio_std
        self.no_class = nn.Parameter(torch.randn(1, backbone.width) * 0.02)
        if classes:
            self.class_embedding = nn.Parameter(torch.randn(classes, backbone.width) * 0.02)

    @property
    def tokens(self) -> int:
        return self.backbone.tokens

    def condition(self, labels: Tensor | None, images: int) -> Tensor:
        """labels (B,), -1 for no class, or None -> (B, width)."""
        if labels is None:
            return self.no_class.expand(images, -1)
        table = self.no_class if not self.classes else torch.cat([self.class_embedding, self.no_class])
        return F.embedding(labels % len(table), table)  # -1 is the last row: no class

    def check_labels(self, labels: Tensor | None, images: int) -> None:
        if labels is None:
            return
        if labels.shape != (images,):
            raise UsageError(f"labels: shape {tuple(labels.shape)} is not ({images},), one for each image")
        if bool((labels >= self.classes).any()) or bool((labels < -1).any()):
            raise UsageError(f"labels: must be from 0 to {self.classes - 1}, or -1 for no class")

    # --- training -------------------------------------------------------------------------------------------------

    def loss(self, tokens: Tensor, labels: Tensor | None = None, noise: Noise | None = None) -> Loss:
        """tokens (B, L, D), labels (B,) -> the head's loss over masked tokens (Li et al. 2024, eq. 1, section 3.4)."""
        if tokens.ndim != 3 or tokens.shape[1:] != (self.backbone.tokens, self.backbone.dim):
            wanted = f"(B, {self.backbone.tokens}, {self.backbone.dim})"
            raise UsageError(f"tokens: shape {tuple(tokens.shape)} is not {wanted}; it is the tokenizer's output")
        B, L, _ = tokens.shape
        self.check_labels(labels, B)
        noise = Noise.shared(None, B, tokens.device) if noise is None else noise
        if labels is not None and self.training:
            labels = torch.where(noise.uniform() < self.label_dropout, -1, labels)
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

    def begin(self, images: int, tokens: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """What sampling begins from, copied: tokens (B, L, D), zero where unknown; known (B, L), by default none."""
        B, L, D, device = images, self.backbone.tokens, self.backbone.dim, self.no_class.device
        if tokens is None and known is None:
            return torch.zeros(B, L, D, device=device), torch.zeros(B, L, dtype=torch.bool, device=device)
        if tokens is None or known is None:
            missing, given = ("tokens", "known") if tokens is None else ("known", "tokens")
            raise UsageError(
                f"{missing}: is missing, though {given} is given; sampling begins from both or from neither"
            )
        if known.shape != (B, L) or known.dtype != torch.bool:
            raise UsageError(f"known: {known.dtype} of shape {tuple(known.shape)} is not allowed; give bool ({B}, {L})")
        if tokens.shape != (B, L, D):
            raise UsageError(
                f"tokens: shape {tuple(tokens.shape)} is not ({B}, {L}, {D}); it is the tokenizer's output"
            )
        tokens, known = tokens.to(device, torch.float32), known.to(device, copy=True)
        if not bool(torch.isfinite(tokens[known]).all()):
            raise UsageError("tokens: a known one is not finite; check the images that they come from")
        return torch.where(known[..., None], tokens, 0.0), known

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | None,  # (B,)
        noise: Noise,  # one row and one generator for each image
        *,
        steps: int = 64,
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
        **head_steps: Any,
    ) -> Tensor:
        """Tokens (B, L, D), known set by set: a step takes tokens from the end of each image's order vector.

        Known tokens stay as they are. Both schedules run from each image's own known share.
        """
        B, L = len(noise), self.backbone.tokens
        self.check_labels(labels, B)
        check_token_schedule(token_schedule, min_tokens)
        check_guidance(guidance_schedule, guidance_interval, guidance_power)
        tokens, known = self.begin(B, tokens, known)
        order = order_vectors(order, noise, known)  # (B, L)
        state, null = self.backbone.start(self.condition(labels, B), B), self.backbone.start(self.condition(None, B), B)
        begun = left = (~known).sum(dim=1).tolist()  # unknown tokens of each image: at first, and now
        for step in range(steps):
            shares = [1 - now / L for now in left]  # known when the step begins
            left = [
                unknown_after(step, steps, L, now, first, token_schedule, min_tokens)
                for now, first in zip(left, begun, strict=True)
            ]
            first_left = torch.arange(L) < torch.tensor(left)[:, None]  # (B, L)
            later = torch.zeros_like(known).scatter(1, order, first_left.to(known.device))
            ask = ~known & ~later
            if not ask.any():
                break  # with fewer unknown tokens than steps, all is known early
            rows = ask.nonzero()[:, 0]  # (N,): the image of each token asked for
            scale = tokens.new_tensor(
                [guidance_at(guidance_schedule, guidance_scale, m, L, guidance_interval, guidance_power) for m in left]
            )
            z = self.backbone.z(state, tokens, known, ask)  # (N, C)
            z_null = self.backbone.z(null, tokens, known, ask) if guidance_scale != 1 else None
            tokens[ask] = draw(
                self.head, rows, z, noise, z_null, scale, temperature, shares, num_diffusion_steps_last, head_steps
            )
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
