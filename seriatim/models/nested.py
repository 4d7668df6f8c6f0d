"""The nested head cuts a token into parts and models them with an inner sequence model whose condition is z.

Zhao et al. 2025 (ARINAR): p(x | z) = prod_i p(x_i | z, x_1 .. x_{i-1}) over the features of a token, where each factor
is a one-dimensional mixture of Gaussians. Li et al. 2025 (FractalGen): the parts are sub-patches, then the colours of a
pixel. Here any split makes the parts (`splits.py`), any sequence model, parallel or sequential, is the inner model, and
any head, even a nested one, is its head. Unusual:
- the loss sums over the parts but counts a token once, so that log-probabilities are those of whole tokens;
- under guidance z and z_null both continue from the same generated part;
- temperature and guidance may change from part to part (`feature_schedule`), like ARINAR's "bilevel" schedules;
- a guide, which is a head for a summary of the token, may come first; its sample becomes one more condition
  (FractalGen's guiding pixel);
- part i has the key `part/token/i`, as any token of a sequence model, in the loss and where parts are drawn set by set,
  but `part/i` where they are drawn one by one, because another name would change the image of every seed.

Shapes: N tokens, D features of a token, T parts, g features of a part, C width of z, P vectors of z.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import torch
from torch import Tensor

from seriatim.conditions.base import Condition
from seriatim.conditions.vectors import Vectors
from seriatim.core.errors import UsageError, check_known
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.heads.base import Guidance, Head, HeadLoss
from seriatim.models.base import SequenceModel
from seriatim.models.causal_model import CausalModel
from seriatim.models.splits import Split
from seriatim.nn.linear import Linear, at_least_float32
from seriatim.sampling.parallel import parallel_steps
from seriatim.sampling.sequential import dense
from seriatim.sampling.step import Batch

FEATURE_SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class NestedOptions:
    """The options that a nested head adds to those of its inner head."""

    feature_schedule: Annotated[
        str, "How guidance and temperature change over the parts of a token: constant, linear or cosine."
    ] = "constant"


@dataclasses.dataclass(frozen=True)
class NestedPlan:
    """The options of the nested head, and the plans of its inner head and its guide."""

    options: Any
    inner: Any  # the plan of the inner model's head
    guide: Any  # the plan of the guide; None without a guide


class Nested(Head):
    """`Nested(Features(16), model)`, where `model` is a sequence model of the parts with a `Vectors` conditioner."""

    Options: type = NestedOptions

    def __init__(self, split: Split, model: SequenceModel, guide: Head | None = None) -> None:
        super().__init__()
        if not isinstance(model.conditioner, Vectors):
            raise UsageError("model: inside a nested head its condition is z; build it with conditioner=Vectors(...)")
        if (model.spec.shape, model.spec.vocab) != (split.spec.shape, split.spec.vocab):
            raise UsageError(
                f"model: it has {model.spec.count} tokens of {model.spec.what}, the split makes {split.spec.count} of "
                f"{split.spec.what}"
            )
        if isinstance(model, CausalModel) and model.backbone.any_order:
            raise UsageError("order: 'random' is not allowed inside a token, only 'raster'")
        if guide is not None and guide.spec.dim != split.spec.dim:
            raise UsageError(f"guide: it draws {guide.spec.what}, the summary of a token has {split.spec.what}")
        self.split, self.model, self.guide = split, model, guide
        self.output, self.parts = split.dim, split.spec.count
        self.sequential = isinstance(model, CausalModel)
        leaf = model.head
        self.guides, self.tempers = leaf.guides, leaf.tempers
        # A guide leaves no exact likelihood because the summary would count twice; a parallel model has only a bound.
        self.has_density = leaf.has_density and guide is None and self.sequential
        fields = [(f.name, f.type, f) for f in dataclasses.fields(leaf.Options) if f.name != "feature_schedule"]
        self.Options = dataclasses.make_dataclass("Options", fields, bases=(NestedOptions,), frozen=True)
        self.z_dim = model.conditioner.inputs
        if guide is not None:
            guide.bind(self.z_dim)
            self.guide_embed = Linear(guide.output, self.z_dim)

    @property
    def neighbours(self) -> bool:  # type: ignore[override]
        """Whether the condition also holds z of the four neighbouring tokens; it then has five vectors."""
        return self.model.conditioner.count - (self.guide is not None) == 5

    # --- conditions -----------------------------------------------------------------------------------------------

    def condition(self, z: Tensor, summary: Tensor | None) -> Condition:
        """The condition of the parts from z, (N, C) or (N, P, C), and with a guide from the token's summary (N, g)."""
        vectors = z[:, None] if z.ndim == 2 else z
        if summary is not None:
            vectors = torch.cat([vectors, self.guide_embed(summary)[:, None].to(vectors.dtype)], dim=1)
        return self.model.conditioner(vectors, len(vectors))

    @staticmethod
    def own(z: Tensor) -> Tensor:
        """The token's own z, (N, C), without those of its neighbours."""
        return z if z.ndim == 2 else z[:, 0]

    # --- likelihood -----------------------------------------------------------------------------------------------

    def _cut(self, z: Tensor, target: Tensor) -> Tensor:
        return self.split.cut(at_least_float32(target, z))

    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        """The inner model's loss summed over the parts of each token; z (N, C) or (N, P, C), target (N, D).

        A token counts as 1, however many parts it has.
        """
        summary, own = None, HeadLoss(z.new_zeros(len(z)), z.new_zeros(len(z)))
        if self.guide is not None:
            summary = self.split.summary(at_least_float32(target, z))
            own = self.guide.loss(self.own(z), summary, keys.fold("guide"))
        inner = self.model.losses(self._cut(z, target), self.condition(z, summary), keys.fold("part"))
        count = inner.count / self.parts
        if self.guide is None:
            return HeadLoss(inner.sum, count, inner.parts)
        # The guide's loss is one more term of the token. Its mean over draws gets the weight of the token.
        guided = own.sum / own.count * count
        return HeadLoss(inner.sum + guided, count, {**inner.parts, "guide": guided})

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """The normalised log density of tokens (N,) in nats, summed over the parts, each given the parts before it."""
        return self.log_prob_of_parts(z, target).sum(dim=1)

    def log_prob_of_parts(self, z: Tensor, target: Tensor) -> Tensor:
        """log p(x_i | z, x_1 .. x_{i-1}) of each part in the order of generation, in nats: (N, T)."""
        if not self.has_density:
            return super().log_prob(z, target)
        parts = self._cut(z, target)
        inner = self.model.backbone.sequence(self.condition(z, None), parts).flatten(0, 1)  # (N T, W)
        return self.model.head.log_prob(inner, parts.flatten(0, 1)).view(len(z), self.parts)

    @torch.no_grad()
    def entropy(self, z: Tensor, tokens: Tensor) -> Tensor:
        """The entropy of each feature in nats, given z and the parts of `tokens` before the feature's part: (N, D)."""
        if not self.sequential:
            return super().entropy(z, tokens)
        z = z.float()
        parts = self._cut(z, tokens)
        inner = self.model.backbone.sequence(self.condition(z, None), parts).flatten(0, 1)  # (N T, W)
        each = self.model.head.entropy(inner, parts.flatten(0, 1))
        return self.split.join(each.view(len(z), self.parts, -1))

    # --- sampling -------------------------------------------------------------------------------------------------

    def check_options(self, options: Any, temperature: float = 1.0) -> None:
        super().check_options(options, temperature)
        schedule = options.feature_schedule
        check_known(FEATURE_SCHEDULES, feature_schedule=schedule)
        if schedule != "constant" and not self.sequential:
            raise UsageError(f"feature_schedule: {schedule!r} needs parts that come one by one; leave it out")
        leaf = self.model.head
        leaf.check_options(leaf.options(**self._leaf(options)), temperature)

    def _leaf(self, options: Any) -> dict[str, Any]:
        """The subset of `options` that belongs to the inner head."""
        return {f.name: getattr(options, f.name) for f in dataclasses.fields(self.model.head.Options)}

    @torch.no_grad()
    def plan(self, options: Any = None, device: torch.device | str = "cpu") -> NestedPlan:
        options = self.options() if options is None else options
        leaf = self.model.head
        guide = None if self.guide is None else self.guide.plan(None, device)
        return NestedPlan(options, leaf.plan(leaf.options(**self._leaf(options)), device), guide)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        keys: Keys,
        plan: NestedPlan | None = None,
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Tokens (N, D), generated part by part; the inner head samples one part of all rows at a time.

        `feature_schedule` applies to the parts of this head only. If the inner head is nested too, it uses the guidance
        and temperature of its part for all of its own parts.
        """
        plan = self.plan(device=z.device) if plan is None else plan
        self.check_sampling(z_null, guidance, temperature)
        if not len(z):
            return z.new_zeros(0, self.output, dtype=torch.float32)
        with torch.autocast(z.device.type, enabled=False):
            z, z_null = z.float(), None if guidance is None or z_null is None else z_null.float()
            summary = None
            if self.guide is not None:
                null = None if z_null is None else self.own(z_null)
                summary = self.guide.sample(self.own(z), keys.fold("guide"), plan.guide, null, guidance, temperature)
            condition = self.condition(z, summary)
            null_condition = None if z_null is None else self.condition(z_null, summary)
            part_keys = keys.fold("part")
            if not self.sequential:
                return self._parallel(condition, null_condition, part_keys, plan, guidance, temperature)
            schedule, T = plan.options.feature_schedule, self.parts

            def warmth(i: int) -> float | Tensor:
                factor = scheduled(schedule, i + 1, T)
                if factor == 1.0:
                    return temperature
                warm = 1.0 + factor * (temperature - 1.0)
                return warm.clamp(min=0.0) if isinstance(warm, Tensor) else max(0.0, warm)

            parts, sound = dense(
                self.model.backbone,
                self.model.head,
                condition,
                null_condition,
                part_keys.split(T),
                plan.inner,
                lambda i: None if guidance is None else guidance.scheduled(scheduled(schedule, i + 1, T)),
                warmth,
            )
            return self._joined(parts, sound)

    def _joined(self, parts: Tensor, sound: Tensor | None) -> Tensor:
        """The tokens (N, D) of parts (N, T, g). All are NaN if `sound`, a bool on the device, is False.

        Nothing waits for the device here, because the sampler over the image checks the tokens of a batch once.
        """
        tokens = self.split.join(parts)
        return tokens if sound is None else torch.where(sound, tokens, math.nan)

    def _parallel(
        self,
        condition: Condition,
        null: Condition | None,
        keys: Keys,
        plan: NestedPlan,
        guidance: Guidance | None,
        temperature: float | Tensor,
    ) -> Tensor:
        """Tokens (N, D) whose parts are generated set by set, since the parallel loop takes each token as an image."""
        settings = Settings(
            num_inference_steps=self.parts, guidance_schedule="constant", head_options=self._leaf(plan.options)
        )
        scale = [1.0] * len(condition) if guidance is None else guidance.host.tolist()
        batch = Batch(condition, condition if null is None else null, keys.host, settings, scale, temperature)
        *_, last = parallel_steps(self.model.backbone, self.model.head, batch)
        return self._joined(last.tokens, last.sound)

    @torch.no_grad()
    def sample_naive(
        self,
        z: Tensor,
        keys: Keys,
        plan: NestedPlan | None = None,
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Tokens (N, D) without a cache: the specification of `sample` for parts that are generated one by one."""
        plan = self.plan(device=z.device) if plan is None else plan
        schedule, T, keys = plan.options.feature_schedule, self.parts, keys.fold("part")
        condition = self.condition(z.float(), None)
        null = None if z_null is None else self.condition(z_null.float(), None)
        parts = self.split.spec.blank(len(z), z.device)
        for i in range(T):
            factor = scheduled(schedule, i + 1, T)
            now = None if guidance is None else guidance.scheduled(factor)
            inner = self.model.backbone.sequence(condition, parts)[:, i]
            inner_null = None
            if now is not None and null is not None:
                inner_null = self.model.backbone.sequence(null, parts)[:, i]
            warm = max(0.0, 1.0 + factor * (temperature - 1.0))
            parts[:, i] = self.model.head.sample(inner, keys.fold(i), plan.inner, inner_null, now, warm)
        return self.split.join(parts)


def scheduled(kind: str, i: int, count: int) -> float:
    """The factor f at part i of 1..count; a temperature or guidance scale v becomes 1 + f (v - 1) there.

    These are the "bilevel" schedules in the code of Zhao et al. 2025. "linear" raises f to 1.5 at the last part, and
    "cosine" lowers it to 0.
    """
    if kind == "linear":
        return 1 + 0.5 * i / count
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * i / count))
    return 1.0
