"""The contract of a head: the distribution p(x | z) of one token.

N tokens (rows), C width of z, D features of a token (or V, a vocabulary).

A head of your own is one class, `class Mine(Head)`, with a constructor that takes what `config` records, `bind`,
`loss` and `sample`; register it with `seriatim.HEADS["mine"] = Mine` and prove it with
`seriatim.testing.check_head(Mine, ...)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.errors import UsageError, nearest
from seriatim.core.random import Noise


@dataclass
class HeadLoss:
    """Sums, not means: the model divides, so that tokens weigh alike whatever the batch."""

    sum: Tensor  # (N,) summed over the draws of a token
    count: Tensor  # (N,) how many draws that was
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,) sums of the same draws


class Head(nn.Module):
    """What every head is.

    A subclass sets, in its constructor,
      output         D, the features of a token (or V, where tokens are codes)
      config         the constructor's arguments, as plain data
    and says what it can't do: `guides`, `tempers`, `has_density`.
    """

    output: int
    z_dim: int | None = None  # C; None until `bind`
    config: dict[str, Any]
    discrete = False  # draws codes (N,) int64, of which there are `output`, not features (N, D)
    guides = True  # can sample with guidance
    tempers = True  # can sample at a temperature other than 1
    has_density = False  # has log_prob
    sample_options: frozenset[str] = frozenset()  # further keyword arguments of `sample`

    def bind(self, z_dim: int) -> None:
        """Fix C, the width of z, and build what depends on it; the model calls this once."""
        if self.z_dim is not None and self.z_dim != z_dim:
            raise UsageError(f"z_dim: this {type(self).__name__} head was built for {self.z_dim}, not for {z_dim}")
        self.z_dim = z_dim

    def loss(self, z: Tensor, target: Tensor, noise: Noise) -> HeadLoss:
        """z (N, C), target (N, D) -> the loss of each token, not reduced over tokens."""
        raise NotImplementedError(f"{type(self).__name__} lacks loss()")

    def sample(
        self,
        z: Tensor,
        noise: Noise,
        z_null: Tensor | None = None,
        guidance: float | Tensor = 1.0,
        temperature: float = 1.0,
        **steps: Any,
    ) -> Tensor:
        """z (N, C) -> one token for each row: (N, D).

        z_null (N, C) is z without the condition; `guidance`, one number or (N,), is how far to go from there
        through z: 1 is z itself. `temperature` below 1 is sharper. `steps` are the head's own `sample_options`.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks sample()")

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:  # noqa: ARG002
        """The normalised log density (or probability) of target (N, D) given z (N, C), in nats: (N,)."""
        raise UsageError(f"the {type(self).__name__} head has no density: log_prob is not defined for it")

    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002
        """That of each feature given z (N, C) and, where a head nests, the features of `tokens` (N, D) drawn before it.

        In nats: (N, D), or (N, 1) of codes (N,). Of p itself, before guidance and temperature.
        """
        lacks = "has no density: entropy is not defined for it"
        why = "can't tell the entropy of each feature" if self.has_density else lacks
        raise UsageError(f"the {type(self).__name__} head {why}")

    def confidence(self, z: Tensor, codes: Tensor, z_null: Tensor | None, guidance: float | Tensor) -> Tensor:  # noqa: ARG002
        """log p of drawn codes (N,) under the guided distribution (N,): for the order "confidence", of codes alone."""
        raise UsageError(f"the {type(self).__name__} head draws no codes: it has no confidence in them")

    def check_options(self, temperature: float = 1.0, **options: Any) -> None:
        """Refuse a temperature, or values of `sample_options`, that `sample` would refuse, before any work is done."""
        if not 0 <= temperature < math.inf:
            raise UsageError(
                f"temperature: {temperature!r} is not allowed; it must be 0 or more and finite (1 is the model's)"
            )
        if temperature != 1.0 and not self.tempers:
            raise UsageError(
                f"temperature: the {type(self).__name__} head can't sample at {temperature}; leave it at 1"
            )
        for name in sorted(options.keys() - self.sample_options):
            hint = nearest(name, sorted(self.sample_options))
            raise UsageError(f"{name}: the {type(self).__name__} head has no such setting{hint}")

    def check_sampling(
        self, z: Tensor, z_null: Tensor | None, guidance: float | Tensor, temperature: float
    ) -> Tensor | None:
        """Check what was asked of `sample`; return the guidance scale of each row (N, 1), None where all are 1."""
        name = type(self).__name__
        Head.check_options(self, temperature)
        scale = torch.as_tensor(guidance, dtype=torch.float32)  # looked at where it is: an accelerator isn't waited for
        if bool((scale == 1.0).all()):
            return None
        if not self.guides:
            raise UsageError(f"guidance: the {name} head can't be guided; leave the scale at 1")
        if z_null is None:
            raise UsageError("guidance: a scale other than 1 needs z_null, z without the condition")
        if not bool(torch.isfinite(scale).all()):
            raise UsageError("guidance: the scale must be finite")
        return scale.expand(len(z))[:, None].to(z.device, non_blocking=True)
