"""The contract of a head: the distribution p(x | z) of one token.

N tokens (rows), C width of z, D features of a token (or V, a vocabulary).

A head of your own is one class, `class Mine(Head)`, with a constructor that takes what `config` records, and with
`bind`, `loss` and `sample`. Register it with `seriatim.HEADS["mine"] = Mine` and prove it with
`seriatim.testing.check_head(Mine, ...)`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.construct import construct
from seriatim.core.errors import UsageError, nearest, one_line, shown
from seriatim.core.keys import Keys
from seriatim.core.spec import TokenSpec


@dataclass
class HeadLoss:
    """Sums, not means: whoever reduces them divides, so that tokens weigh the same whatever the batch."""

    sum: Tensor  # (N,) the loss of a token, summed over the draws made for it
    count: Tensor  # (N,) the number of those draws
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,) sums of the same draws, for logs


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of N rows: each goes from z_null through z by its scale w, z_null + w (z - z_null).

    Which rows are guided is known on the host, so that nobody looks at an accelerator to learn it.
    """

    scale: Tensor  # (N,) float32, on the device of z
    host: Tensor  # (N,) float32, the same scales on the host
    guided: Tensor  # (N,) bool, on the host: where the scale is not 1

    @classmethod
    def of(cls, scale: Tensor | float, rows: int, device: torch.device | str) -> Guidance | None:
        """The guidance of rows whose scales (N,) are known on the host; None where no row is guided."""
        host = torch.as_tensor(scale, dtype=torch.float32).expand(rows)
        assert host.device.type == "cpu", "guidance: scales are given on the host, so that no device is waited for"
        guided = host != 1.0
        if not bool(guided.any()):
            return None
        if not bool(torch.isfinite(host).all()):
            raise UsageError("guidance: the scale must be finite")
        return cls(host.to(device, non_blocking=True), host, guided)

    @property
    def column(self) -> Tensor:
        """The scales as (N, 1), to multiply features with."""
        return self.scale[:, None]

    @property
    def all(self) -> bool:
        """Whether every row is guided."""
        return bool(self.guided.all())

    def select(self, rows: Tensor) -> Guidance | None:
        """The guidance of these rows, which are given on the host; None where none of them is guided."""
        return Guidance.of(self.host[rows], len(rows), self.scale.device)

    def scheduled(self, factor: float) -> Guidance | None:
        """The guidance whose scales are 1 + factor (w - 1), which may guide no row any more."""
        if factor == 1.0:
            return self
        return Guidance.of(1.0 + factor * (self.host - 1.0), len(self.host), self.scale.device)


@dataclass(frozen=True)
class NoOptions:
    """The options of a head that has none."""


@dataclass(frozen=True)
class Plan:
    """What sampling a batch needs and what does not depend on z: the options, and tables in subclasses.

    A plan is made once for a batch. Heads keep nothing of it, so weights that change later are always seen.
    """

    options: Any


def check_numbers(options: type[Any], given: Mapping[str, Any]) -> None:
    """Refuse true, false and text for an option that is a number, which pydantic would turn into one."""
    try:
        hints = typing.get_type_hints(options)
    except (NameError, TypeError):  # annotations of a user's class that can't be imported; its own checks must do
        return
    for name, value in given.items():
        kinds = set(typing.get_args(hints.get(name)) or (hints.get(name),)) - {type(None)}
        if isinstance(value, (bool, str)) and kinds <= {int, float}:
            raise UsageError(f"{name}: {shown(value)} is not allowed; it must be a number")


def column(value: float | Tensor) -> float | Tensor:
    """A temperature as a factor of (N, D): one number for all rows, or (N,) -> (N, 1)."""
    return value[:, None] if isinstance(value, Tensor) else value


class Head(nn.Module):
    """What every head is.

    A subclass sets, in its constructor,
      output         D, the features of a token (or V, where tokens are codes)
      config         the constructor's arguments, as plain data
    and says what it can do: `guides`, `tempers`, `has_density`, `Options`.
    """

    output: int
    z_dim: int | None = None  # C; None until `bind`
    config: dict[str, Any]
    discrete = False  # draws codes (N,) int64, of which there are `output`, not features (N, D)
    guides = True  # can sample with guidance
    tempers = True  # can sample at a temperature other than 1
    has_density = False  # has log_prob
    neighbours = False  # takes z (N, 5, C): its own, and those of the neighbours above, below, left and right
    placed = False  # takes `place` (N,) in loss and sample: which part of a token it models
    Options: Any = NoOptions  # a frozen dataclass: further settings of `sample`, with their defaults

    @property
    def spec(self) -> TokenSpec:
        """The token that this head models."""
        return TokenSpec(1, vocab=self.output) if self.discrete else TokenSpec(1, dim=self.output)

    def bind(self, z_dim: int) -> None:
        """Fix C, the width of z, and build what depends on it; the model calls this once."""
        if self.z_dim is not None and self.z_dim != z_dim:
            raise UsageError(f"z_dim: this {type(self).__name__} head was built for {self.z_dim}, not for {z_dim}")
        self.z_dim = z_dim

    # --- training -------------------------------------------------------------------------------------------------

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The loss of each token, not reduced over tokens: z (N, C), target (N, D) or codes (N,), keys of N rows."""
        raise NotImplementedError(f"{type(self).__name__} lacks loss()")

    # --- sampling -------------------------------------------------------------------------------------------------

    def options(self, **given: Any) -> Any:
        """The options of `sample`, checked; one that this head does not have is refused by name."""
        allowed = [f.name for f in dataclasses.fields(self.Options)]
        for name in given:
            if name not in allowed:
                raise UsageError(
                    f"{name}: the {type(self).__name__} head has no such option{nearest(name, allowed)}"
                    if allowed
                    else f"{name}: the {type(self).__name__} head has no options; leave it out"
                )
            if isinstance(given[name], int) and not -(2**63) <= given[name] < 2**63:
                raise UsageError(f"{name}: {shown(given[name])} is not allowed; it must be an integer of 64 bits")
        check_numbers(self.Options, given)
        try:
            options = construct(self.Options, given, "head")
        except UsageError as error:
            raise UsageError(one_line(error).removeprefix("head.")) from error
        self.check_options(options)
        return options

    def check_options(self, options: Any, temperature: float = 1.0) -> None:  # noqa: ARG002
        """Raise UsageError for options or a temperature that `sample` could not follow, before any work is done."""
        self.check_temperature(temperature)

    def check_temperature(self, temperature: float) -> None:
        if not 0 <= temperature < math.inf:
            raise UsageError(
                f"temperature: {temperature!r} is not allowed; it must be 0 or more and finite (1 is the model's)"
            )
        if temperature != 1.0 and not self.tempers:
            raise UsageError(
                f"temperature: the {type(self).__name__} head can't sample at {temperature}; leave it at 1"
            )

    def plan(self, options: Any = None, device: torch.device | str = "cpu") -> Any:  # noqa: ARG002
        """What `sample` needs besides z, made once for a batch: options, tables, time embeddings."""
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
        """One token for each row: z (N, C), keys of N rows -> (N, D), or codes (N,).

        z_null (N, C) is z without the condition, None exactly where `guidance` is None. `temperature`, a number or
        (N,), is sharper below 1. `plan` is what `plan()` gave; None stands for the default options.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks sample()")

    def check_sampling(self, z_null: Tensor | None, guidance: Guidance | None, temperature: float | Tensor) -> None:
        """Raise UsageError where this head can't follow what was asked of `sample`. No device is looked at."""
        if not isinstance(temperature, Tensor):
            self.check_temperature(temperature)
        elif not self.tempers:
            raise UsageError(f"temperature: the {type(self).__name__} head has none; leave it at 1")
        if guidance is None:
            return
        if not self.guides:
            raise UsageError(f"guidance: the {type(self).__name__} head can't be guided; leave the scale at 1")
        if z_null is None:
            raise UsageError("guidance: a scale other than 1 needs z_null, z without the condition")

    # --- density --------------------------------------------------------------------------------------------------

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:  # noqa: ARG002
        """The normalised log density (or probability) of target (N, D) given z (N, C), in nats: (N,)."""
        raise UsageError(f"the {type(self).__name__} head has no density: log_prob is not defined for it")

    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002
        """The entropy of each feature in nats, (N, D), or (N, 1) for codes.

        It is conditioned on z (N, C) and, where a head nests, on the features of `tokens` (N, D) that are generated
        before it. It is the entropy of p itself, before guidance and temperature.
        """
        lacks = "has no density: entropy is not defined for it"
        why = "can't tell the entropy of each feature" if self.has_density else lacks
        raise UsageError(f"the {type(self).__name__} head {why}")

    def confidence(self, z: Tensor, codes: Tensor, z_null: Tensor | None, guidance: Guidance | None) -> Tensor:  # noqa: ARG002
        """log p of generated codes (N,) under the guided distribution: (N,). The order "confidence" needs it."""
        raise UsageError(f"the {type(self).__name__} head draws no codes: it has no confidence in them")
