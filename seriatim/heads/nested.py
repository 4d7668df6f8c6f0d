"""A head that nests: it cuts its token into parts and draws them one by one, with a backbone and a head of its own.

Zhao et al. 2025 (ARINAR): p(x | z) = prod_i p(x_i | z, x_1 .. x_{i-1}) over the features of a token, each factor a
one-dimensional mixture of Gaussians. Here the parts may be any (`splits.py`), and the head of a part is any head, one
that nests included. What the inner backbone is told as its condition is z; what it gives for a part is that part's z.
Unusual:
- the loss sums over parts, so that a token weighs as one token, and log-probabilities are those of tokens;
- under guidance two streams run, of z and of z_null, and both go on from the same drawn part;
- temperature and guidance may change from part to part (`feature_schedule`).

Shapes: N tokens, D features of a token, T parts, g features of a part, C width of z, W width of the inner backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from seriatim.backbones.build import BACKBONES
from seriatim.backbones.causal import Causal
from seriatim.core.construct import arguments, construct, pop_kind
from seriatim.core.errors import ConfigError, UsageError, nearest
from seriatim.core.random import Noise
from seriatim.heads.base import Head, HeadLoss
from seriatim.heads.splits import SPLITS, build_split
from seriatim.heads.table import HEADS, build_head

FEATURE_SCHEDULES = ("constant", "linear", "cosine")
Value = TypeVar("Value", float, Tensor)


class Nested(Head):
    """`Nested(16, split={"kind": "features"}, backbone={"kind": "causal", ...}, head={"kind": "mixture", ...})`."""

    def __init__(
        self,
        dim: int,  # D
        *,
        split: Mapping[str, Any],  # a kind of SPLITS
        backbone: Mapping[str, Any],  # `causal`: its tokens, their features and the width of its condition follow
        head: Mapping[str, Any],  # a kind of HEADS: its dim follows
        z_dim: int | None = None,  # C; None: the model tells
    ) -> None:
        super().__init__()
        if dim < 1:
            raise UsageError(f"dim: {dim!r} is not allowed; it must be at least 1")
        parts = build_split(split, dim)
        self.output, self.parts, self.part_dim = dim, len(parts), len(parts[0])  # D, T, g
        flat = [i for part in parts for i in part]
        self._order = None if flat == sorted(flat) else flat  # the features as they are drawn
        self._back = sorted(range(dim), key=flat.__getitem__)
        self._kind, self._given = self._backbone_config(backbone)
        with torch.device("meta"):  # what is wrong with it is said now, though it waits for the width of z
            config = self._build(1).config
        self.head = build_head(head, dim=self.part_dim, vocab=None, where="head")
        self.guides, self.tempers, self.has_density = self.head.guides, self.head.tempers, self.head.has_density
        self.sample_options = self.head.sample_options | {"feature_schedule"}
        defaults = {n: p.default for n, p in arguments(SPLITS[split["kind"]]).items() if n != "dim"}
        self.config = {
            "dim": dim,
            "split": {"kind": split["kind"], **defaults, **split},
            "backbone": {"kind": self._kind, **{k: v for k, v in config.items() if k != "condition_width"}},
            "head": {"kind": head["kind"], **self.head.config},
        }
        if z_dim is not None:
            self.bind(z_dim)

    def _backbone_config(self, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Kind and arguments of the inner backbone, with the sizes that the split gives."""
        kind, rest = pop_kind(config, BACKBONES, "backbone")
        if not issubclass(BACKBONES[kind], Causal):
            fit = [name for name, cls in BACKBONES.items() if issubclass(cls, Causal)]
            raise ConfigError(f"backbone.kind: {kind!r} can't draw part after part{nearest('', fit)}")
        for name, size in (("tokens", self.parts), ("dim", self.part_dim)):
            if rest.setdefault(name, size) != size:
                raise ConfigError(
                    f"backbone.{name}: {rest[name]!r} does not fit a token of {self.output} features in {self.parts} "
                    f"parts of {self.part_dim}: it is {size}; leave it out"
                )
        for name in ("condition_width", "vocab"):
            if rest.get(name) is not None:
                raise ConfigError(f"backbone.{name}: follows from what is around a nested head; leave it out")
        for name, only in (("order", "raster"), ("prefix", 1)):
            if rest.get(name, only) != only:
                raise ConfigError(f"backbone.{name}: {rest[name]!r} is not allowed inside a token, only {only!r}")
        return kind, rest

    def _build(self, z_dim: int) -> Causal:
        built = construct(BACKBONES[self._kind], self._given, "backbone", condition_width=z_dim)
        assert isinstance(built, Causal), f"{type(built).__name__} is no causal backbone"
        return built

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.backbone = self._build(z_dim)
            self.head.bind(self.backbone.z_dim)
        super().bind(z_dim)

    # --- parts ----------------------------------------------------------------------------------------------------

    def cut(self, tokens: Tensor) -> Tensor:
        """Tokens (N, D) -> their parts as they are drawn: (N, T, g)."""
        if tokens.ndim != 2 or tokens.shape[1] != self.output:
            raise UsageError(
                f"tokens: shape {tuple(tokens.shape)} does not fit a head of {self.parts} parts of {self.part_dim}; "
                f"give (N, {self.output})"
            )
        x = tokens if self._order is None else tokens[:, self._order]
        return x.reshape(len(x), self.parts, self.part_dim)

    def joined(self, parts: Tensor) -> Tensor:
        """The inverse of `cut`."""
        x = parts.flatten(1)
        return x if self._order is None else x[:, self._back]

    # --- likelihood -----------------------------------------------------------------------------------------------

    def inner(self, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, C), target (N, D) -> the z of each part given those before it (N T, W), and the parts (N T, g)."""
        parts = self.cut(target.to(z.dtype) if z.dtype == torch.float64 else target.float())
        return self.backbone.sequence(z, parts).flatten(0, 1), parts.flatten(0, 1)

    def loss(self, z: Tensor, target: Tensor, noise: Noise) -> HeadLoss:
        """z (N, C), target (N, D) -> the inner head's loss, summed over parts; a token counts as one part does."""
        N, T = len(z), self.parts
        loss = self.head.loss(*self.inner(z, target), noise.select(torch.arange(N).repeat_interleave(T)))
        parts = {name: value.view(N, T).sum(dim=1) for name, value in loss.parts.items()}
        return HeadLoss(loss.sum.view(N, T).sum(dim=1), loss.count.view(N, T).float().mean(dim=1), parts)

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """The normalised log density, in nats: the sum over parts of that of each given those before it; (N,)."""
        return self.log_prob_of_parts(z, target).sum(dim=1)

    def log_prob_of_parts(self, z: Tensor, target: Tensor) -> Tensor:
        """log p(x_i | z, x_1 .. x_{i-1}) in nats, as drawn: (N, T).

        Of tokens that the head itself drew, the mean of its negative is the entropy of each part, in expectation.
        """
        if not self.has_density:
            return super().log_prob(z, target)
        return self.head.log_prob(*self.inner(z, target)).view(len(z), self.parts)

    @torch.no_grad()
    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:
        """That of each feature given z and the parts of `tokens` drawn before its own: (N, D), in nats."""
        inner, parts = self.inner(z.float(), tokens)
        return self.joined(self.head.entropy(inner, parts).view(len(z), self.parts, self.part_dim))

    # --- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Noise,
        z_null: Tensor | None = None,
        guidance: float | Tensor = 1.0,
        temperature: float = 1.0,
        *,
        feature_schedule: str = "constant",  # of temperature and guidance over the parts, as ARINAR's "bilevel"
        naive: bool = False,  # all parts anew for each of them, without a cache: the specification
        **options: Any,  # of the inner head
    ) -> Tensor:
        """Tokens (N, D), part by part; for each part the inner head makes its draws for all rows.

        The schedule is of this head's parts alone: heads inside the inner head keep what a part was given.
        """
        unknown = sorted(options.keys() - self.head.sample_options)
        if unknown:
            raise UsageError(f"{unknown[0]}: the {type(self.head).__name__} head inside has no such sampling option")
        scale = self.check_sampling(z, z_null, guidance, temperature)  # (N, 1) or None
        self.check_options(temperature, feature_schedule=feature_schedule, **options)
        if not len(z):
            return z.new_zeros(0, self.output, dtype=torch.float32)
        N, T = len(z), self.parts
        with torch.autocast(z.device.type, enabled=False):
            both = (z if scale is None or z_null is None else torch.cat([z, z_null])).float()  # (N or 2 N, C)
            following = (self._anew if naive else self._cached)(both)
            drawn: list[Tensor] = []
            for i in range(1, T + 1):
                inner = following(drawn)  # (N or 2 N, W)
                warmth = max(0.0, scheduled(feature_schedule, float(temperature), i, T))
                if scale is None:
                    part = self.head.sample(inner, noise, None, 1.0, warmth, **options)
                else:
                    w = scheduled(feature_schedule, scale[:, 0], i, T)
                    part = self.head.sample(inner[:N], noise, inner[N:], w, warmth, **options)
                drawn.append(part if scale is None else part.repeat(2, 1))
            return self.joined(torch.stack(drawn, dim=1)[:N])

    def _cached(self, z: Tensor) -> Callable[[list[Tensor]], Tensor]:
        """From the parts drawn so far, (rows, g) each, to the z of the next (rows, W): one place a step."""
        state = self.backbone.start(z, len(z))
        return lambda drawn: self.backbone.step(state, drawn[-1] if drawn else None)

    def _anew(self, z: Tensor) -> Callable[[list[Tensor]], Tensor]:
        """The same from the definition: what comes later is zero, and is not looked at."""

        def following(drawn: list[Tensor]) -> Tensor:
            parts = z.new_zeros(len(z), self.parts, self.part_dim)
            for i, part in enumerate(drawn):
                parts[:, i] = part
            return self.backbone.sequence(z, parts)[:, len(drawn)]

        return following

    def check_options(self, temperature: float = 1.0, **options: Any) -> None:
        super().check_options(temperature, **options)
        schedule = options.pop("feature_schedule", "constant")
        if schedule not in FEATURE_SCHEDULES:
            raise UsageError(f"feature_schedule: {schedule!r} is not known{nearest(str(schedule), FEATURE_SCHEDULES)}")
        self.head.check_options(temperature, **options)


def scheduled(kind: str, value: Value, i: int, count: int) -> Value:
    """A temperature or guidance scale at part i of 1..count; 1 stays 1 (Zhao et al. 2025's code, `bilevel_schedule`).

    linear: from the value on, half as far from 1 again at the last; cosine: from the value down to 1 at the last.
    """
    if kind == "linear":
        return value + (value - 1) * (0.5 * i / count)
    if kind == "cosine":
        return 1 + (value - 1) * (0.5 * (1 + math.cos(math.pi * i / count)))
    return value


HEADS["nested"] = Nested  # a head of heads: it needs the table that it stands in
