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
        self.first: int | None = getattr(head.options(**self.given), STEPS, None)
        if self.last is not None and self.first is None:
            raise UsageError(f"num_diffusion_steps_last: the {type(head).__name__} head has no steps to anneal")
        self.plans: dict[int | None, Any] = {}
        self.sound = torch.ones((), dtype=torch.bool, device=device)  # False once a sampled code was out of range

    def plan(self, count: int | None) -> Any:
        """The head's plan for `count` diffusion steps, made at the first use; None for a head without such steps."""
        if count not in self.plans:
            options = self.given if count is None else {**self.given, STEPS: count}
            self.plans[count] = self.head.plan(self.head.options(**options), self.device)
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
        counts = [self.first]  # the numbers of diffusion steps, one for all tokens or one for each
        if self.first is not None and self.last is not None:
            counts = [annealed_steps(self.first, self.last, share) for share in shares]
        if len(set(counts)) == 1:  # the usual case: all images of the batch know the same share of their tokens
            drawn = self.head.sample(z, keys, self.plan(counts[0]), z_null, guidance, temperature)
        else:
            parts, places = [], []
            for count in set(counts):
                rows = torch.tensor([row for row, other in enumerate(counts) if other == count])
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
                parts.append(part)
                places.append(there)
            drawn = torch.cat(parts)[torch.cat(places).argsort()]
        if self.head.discrete:  # logits that are not finite give a code out of range; `check_finite` reports it later
            self.sound = self.sound & (drawn < self.head.output).all()
            drawn = drawn.clamp(max=self.head.output - 1)
        return drawn
