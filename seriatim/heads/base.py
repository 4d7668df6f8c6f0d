"""The interface of a head, which models the distribution p(x | z) of one token.

N tokens (rows), C width of z, D features of a token (or V, a vocabulary).

Your own head is one class, `class Mine(Head)`, with `bind`, `loss` and `sample`, and with a constructor whose arguments
`config` records. Register it with `seriatim.HEADS["mine"] = Mine` and test it with
`seriatim.testing.check_head(Mine, ...)`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.construct import checked_types
from seriatim.core.errors import UsageError, nearest, one_line, shown
from seriatim.core.keys import Keys
from seriatim.core.spec import TokenSpec


@dataclass
class HeadLoss:
    """Losses as sums and counts; the caller divides, so that every token has the same weight in any batch."""

    sum: Tensor  # (N,) the loss of a token, summed over its draws
    count: Tensor  # (N,) the number of those draws
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,) sums of the same draws, for logs

    def select(self, rows: Tensor) -> HeadLoss:
        """The losses of the given rows, an index tensor on the device of the losses."""
        parts = {name: value.index_select(0, rows) for name, value in self.parts.items()}
        return HeadLoss(self.sum.index_select(0, rows), self.count.index_select(0, rows), parts)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of N rows; a row with the scale w predicts null + w (conditional - null).

    The rows that are guided are also known on the host, so that no code has to wait for an accelerator to find them.
    """

    scale: Tensor  # (N,) float32, on the device of z
    host: Tensor  # (N,) float32, the same scales on the host
    guided: Tensor  # (N,) bool, on the host, True where the scale is not 1

    @classmethod
    def of(cls, scale: Tensor | float, rows: int, device: torch.device | str) -> Guidance | None:
        """The guidance of `rows` rows from their scales, one number or (N,) on the host; None if no row is guided."""
        host = torch.as_tensor(scale, dtype=torch.float32).expand(rows)
        assert host.device.type == "cpu", "guidance: scales must be on the host, so that no device is waited for"
        guided = host != 1.0
        if not bool(guided.any()):
            return None
        if not bool(torch.isfinite(host).all()):
            raise UsageError("guidance: the scale must be finite")
        return cls(host.to(device, non_blocking=True), host, guided)

    @property
    def column(self) -> Tensor:
        """The scales with a feature axis, (N, 1), so that they can be multiplied with features."""
        return self.scale[:, None]

    @property
    def all(self) -> bool:
        """True if every row is guided."""
        return bool(self.guided.all())

    def select(self, rows: Tensor) -> Guidance | None:
        """The guidance of the given rows, which are a tensor on the host; None if none of them is guided."""
        return Guidance.of(self.host[rows], len(rows), self.scale.device)

    def scheduled(self, factor: float) -> Guidance | None:
        """The guidance with the scales 1 + factor (w - 1); None if no row is guided any more."""
        if factor == 1.0:
            return self
        return Guidance.of(1.0 + factor * (self.host - 1.0), len(self.host), self.scale.device)


@dataclass(frozen=True)
class NoOptions:
    """The options of a head that has none."""


@dataclass(frozen=True)
class Plan:
    """The values that sampling a batch needs and that do not depend on z: the options, and tables in subclasses.

    A plan is made once for each batch. Heads do not keep it, so that later changes of the weights always take effect.
    """

    options: Any


def column(value: float | Tensor) -> float | Tensor:
    """A temperature that can be multiplied with (N, D): one number for all rows as it is, or (N,) as (N, 1)."""
    return value[:, None] if isinstance(value, Tensor) else value


class Head(nn.Module):
    """The base class of all heads.

    A subclass sets, in its constructor,
      output         D, the features of a token (or V, where tokens are codes)
      config         the constructor's arguments, as plain data
    and declares what it can do: `guides`, `tempers`, `has_density`, `Options`.
    """

    output: int
    z_dim: int | None = None  # C; None until `bind`
    config: dict[str, Any]
    discrete = False  # it generates codes (N,) int64 below `output` instead of features (N, D)
    guides = True  # it can sample with guidance
    tempers = True  # it can sample at a temperature other than 1
    has_density = False  # it has log_prob
    neighbours = False  # it takes z (N, 5, C): of the token, and of its neighbours above, below, left and right
    placed = False  # it takes `place` (N,), the index of the part of a token to model, in loss and sample
    Options: Any = NoOptions  # a frozen dataclass of further settings of `sample`, with their defaults

    @property
    def spec(self) -> TokenSpec:
        """The spec of the single token that this head models."""
        return TokenSpec(1, vocab=self.output) if self.discrete else TokenSpec(1, dim=self.output)

    def bind(self, z_dim: int) -> None:
        """Set C, the width of z, and build the layers that depend on it; the model calls this once."""
        if self.z_dim is not None and self.z_dim != z_dim:
            raise UsageError(f"z_dim: this {type(self).__name__} head was built for {self.z_dim}, not for {z_dim}")
        self.z_dim = z_dim

    # --- training -------------------------------------------------------------------------------------------------

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The loss of each token, not reduced over tokens, for z (N, C), target (N, D) or codes (N,), and N keys."""
        raise NotImplementedError(f"{type(self).__name__} lacks loss()")

    # --- sampling -------------------------------------------------------------------------------------------------

    def options(self, **given: Any) -> Any:
        """The checked options of `sample`; raises UsageError for an option that this head does not have."""
        allowed = [f.name for f in dataclasses.fields(self.Options)]
        try:
            hints = typing.get_type_hints(self.Options)
        except (NameError, TypeError):  # a user's class may have annotations that can't be resolved; it checks itself
            hints = {}
        for name, value in given.items():
            if name not in allowed:
                raise UsageError(
                    f"{name}: the {type(self).__name__} head has no such option{nearest(name, allowed)}"
                    if allowed
                    else f"{name}: the {type(self).__name__} head has no options; leave it out"
                )
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise UsageError(f"{name}: {shown(value)} is not allowed; it must be an integer of 64 bits")
            kinds = set(typing.get_args(hints.get(name)) or (hints.get(name),)) - {type(None)}
            if isinstance(value, (bool, str)) and kinds <= {int, float}:  # pydantic would convert them to numbers
                raise UsageError(f"{name}: {shown(value)} is not allowed; it must be a number")
        try:
            options = self.Options(**checked_types(self.Options, given, "head"))
        except (TypeError, ValueError) as error:
            raise UsageError(one_line(error).removeprefix("head.")) from error
        self.check_options(options)
        return options

    def check_options(self, options: Any, temperature: float = 1.0) -> None:  # noqa: ARG002
        """Raise UsageError for options or a temperature that `sample` does not support; called before any work."""
        Head.check_sampling(self, None, None, temperature)

    def plan(self, options: Any = None, device: torch.device | str = "cpu") -> Any:  # noqa: ARG002
        """The values that `sample` needs besides z, computed once for a batch: options, tables, time embeddings."""
        return Plan(self.options() if options is None else options)

    def sample(
        self,
        z: Tensor,
        keys: Keys,
        plan: Any = None,
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """One sampled token for each row: z (N, C) and N keys -> features (N, D) or codes (N,).

        z_null (N, C) is z without the condition; it is None if and only if `guidance` is None. `temperature` is a
        number or (N,); values below 1 make samples sharper. `plan` is the result of `plan()`; None means the default
        options.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks sample()")

    def check_sampling(self, z_null: Tensor | None, guidance: Guidance | None, temperature: float | Tensor) -> None:
        """Raise UsageError if `sample` does not support these arguments; no values are read from a device."""
        if isinstance(temperature, Tensor):
            if not self.tempers:
                raise UsageError(f"temperature: the {type(self).__name__} head has no temperature; use 1")
        elif not 0 <= temperature < math.inf:
            raise UsageError(
                f"temperature: {temperature!r} is not allowed; it must be finite and 0 or more (1 is the model's own)"
            )
        elif temperature != 1.0 and not self.tempers:
            raise UsageError(f"temperature: the {type(self).__name__} head can't sample at {temperature}; use 1")
        if guidance is None:
            return
        if not self.guides:
            raise UsageError(f"guidance: the {type(self).__name__} head does not support guidance; use a scale of 1")
        if z_null is None:
            raise UsageError("guidance: a scale other than 1 needs z_null, z without the condition")

    # --- density --------------------------------------------------------------------------------------------------

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:  # noqa: ARG002
        """The normalised log density (or probability) of target (N, D) given z (N, C), in nats: (N,)."""
        raise UsageError(f"the {type(self).__name__} head has no density: log_prob is not defined for it")

    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002
        """The entropy of each feature in nats: (N, D), or (N, 1) for codes.

        The entropy is conditioned on z (N, C) and, in a nested head, also on the features of `tokens` (N, D) that are
        generated earlier. It is the entropy of p itself, without guidance and temperature.
        """
        lacks = "has no density: entropy is not defined for it"
        why = "can't compute the entropy of each feature" if self.has_density else lacks
        raise UsageError(f"the {type(self).__name__} head {why}")

    def confidence(self, z: Tensor, codes: Tensor, z_null: Tensor | None, guidance: Guidance | None) -> Tensor:  # noqa: ARG002
        """log p of generated codes (N,) under the guided distribution, (N,); the order "confidence" needs it."""
        raise UsageError(f"order: 'confidence' needs a head of codes; {type(self).__name__} draws features; use random")
