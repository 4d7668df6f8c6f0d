"""Sample the tokens of a step from a head.

With `num_diffusion_steps_last` the head takes fewer diffusion steps the more tokens of an image are known already.

Shapes: N tokens, C width of z, D features of a token (codes have no such axis).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.core.schedules import annealed_steps
from seriatim.core.settings import Settings
from seriatim.heads.base import Guidance, Head

STEPS = "num_diffusion_steps"  # the option of a head that `num_diffusion_steps_last` anneals


class Drawing:
    """Samples tokens from a head, and keeps one plan of the head for each number of diffusion steps that it needs."""

    def __init__(self, head: Head, settings: Settings, device: torch.device) -> None:
        self.head, self.device, self.last = head, device, settings.num_diffusion_steps_last
        self.given = settings.head_options
        options = head.options(**self.given)
        self.first: int = getattr(options, STEPS, 1)
        if self.last is not None and not hasattr(options, STEPS):
            raise UsageError(f"num_diffusion_steps_last: the {type(head).__name__} head has no steps to anneal")
        self.plans: dict[int, Any] = {self.first: head.plan(options, device)}
        self.sound = torch.ones((), dtype=torch.bool, device=device)  # False once a sampled code was out of range

    def plan(self, count: int) -> Any:
        """The head's plan for `count` diffusion steps, made at the first use."""
        if count not in self.plans:
            self.plans[count] = self.head.plan(self.head.options(**{**self.given, STEPS: count}), self.device)
        return self.plans[count]

    def __call__(
        self,
        z: Tensor,
        keys: Keys,
        z_null: Tensor | None,
        guidance: Guidance | None,
        temperature: float | Tensor,
        shares: list[float],
    ) -> Tensor:
        """Sampled tokens (N, D) for z (N, C).

        shares[n] is the share of tokens that were known before this step in the image of the n-th token.
        """
        drawn = self._drawn(z, keys, z_null, guidance, temperature, shares)
        if self.head.discrete:  # logits that are not finite give a code out of range; `check_finite` reports it later
            self.sound = self.sound & (drawn < self.head.output).all()
            drawn = drawn.clamp(max=self.head.output - 1)
        return drawn

    def _drawn(
        self,
        z: Tensor,
        keys: Keys,
        z_null: Tensor | None,
        guidance: Guidance | None,
        temperature: float | Tensor,
        shares: list[float],
    ) -> Tensor:
        if self.last is None:
            return self.head.sample(z, keys, self.plan(self.first), z_null, guidance, temperature)
        counts = torch.tensor([annealed_steps(self.first, self.last, share) for share in shares])  # (N,)
        some_counts = counts.unique().tolist()
        if len(some_counts) == 1:  # the usual case: all images of the batch know the same share of their tokens
            return self.head.sample(z, keys, self.plan(some_counts[0]), z_null, guidance, temperature)
        drawn: Tensor | None = None
        for count in some_counts:
            rows = (counts == count).nonzero()[:, 0]
            there = rows.to(z.device)
            some = None if guidance is None else guidance.select(rows)
            part = self.head.sample(
                z[there],
                keys.select(there),
                self.plan(count),
                None if z_null is None or some is None else z_null[there],
                some,
                temperature[there] if isinstance(temperature, Tensor) else temperature,
            )
            drawn = part.new_empty(len(z), *part.shape[1:]) if drawn is None else drawn
            drawn[there] = part
        assert drawn is not None, "a step draws at least one token"
        return drawn
