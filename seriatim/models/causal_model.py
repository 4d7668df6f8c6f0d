"""The causal autoregressive model generates one token after another, each conditioned on those before it.

It follows Sun et al. 2024 (LlamaGen) and takes any head: codes as published there, or features as in Li et al. 2024
(MAR), table 1. Unusual:
- the unconditional input is a vector of its own, where LlamaGen has one more row in its class table;
- the order may be "random": every image has its own order, and the backbone is told which token comes next (as in RAR,
  Yu et al. 2024). Such a model can sample in any order, and can begin from known tokens, which come first in the order.

Shapes: B images, L tokens, D features (codes have no such axis), C width of z, P prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from seriatim.backbones.base import Sequential
from seriatim.conditions.base import Condition, Conditioner
from seriatim.core.errors import UsageError, check_known
from seriatim.core.keys import Keys
from seriatim.core.orders import CONFIDENCE, RANDOM, RASTER, order_vectors, positions_of
from seriatim.core.settings import Settings
from seriatim.heads.base import Guidance, Head, HeadLoss
from seriatim.models.base import SequenceModel, make_conditioner, summed
from seriatim.sampling.draw import Drawing
from seriatim.sampling.parallel import order_of
from seriatim.sampling.sequential import sequential_steps
from seriatim.sampling.step import Batch, Start, Step, begin, check_finite


class CausalModel(SequenceModel):
    """`CausalModel(Causal(tokens=256, vocab=16384), Categorical(16384, bias=False), classes=1000)`."""

    one_by_one = True
    backbone: Sequential

    def __init__(
        self,
        backbone: Sequential,
        head: Head,
        *,
        classes: int = 0,  # 0 makes the model unconditional
        label_dropout: float = 0.1,  # the share of training images whose label is dropped, which guidance needs
        order: Literal["raster", "random"] | None = None,  # None takes the order of the backbone
        caption_dim: int | None = None,  # the number of features of the text encoder; None means no captions
        caption_tokens: int | None = None,  # the number of positions of a caption; None takes the backbone's prefix
        conditioner: Conditioner | None = None,  # replaces classes and captions
    ) -> None:
        if not isinstance(backbone, Sequential):
            raise UsageError(
                f"backbone: {type(backbone).__name__} is not sequential; a causal model needs one that sees only what "
                "comes before a token: use `causal`"
            )
        own = RANDOM if backbone.any_order else RASTER
        if order is not None:
            check_known((RASTER, RANDOM), order=order)
            if order != own:
                needs, has = ({RANDOM: "any", RASTER: "raster"}[name] for name in (order, own))
                raise UsageError(f"order: {order!r} needs a backbone of order {needs!r}, not {has!r}")
        prefix = getattr(backbone, "prefix", 1)
        if conditioner is None:
            tokens = prefix if caption_dim is not None and caption_tokens is None else caption_tokens
            conditioner = make_conditioner(backbone.width, classes, caption_dim, tokens)
        if conditioner.count not in (1, prefix):
            raise UsageError(
                f"caption_tokens: {conditioner.count} does not fit the backbone's prefix of {prefix}; give the same"
            )
        super().__init__(backbone, head, conditioner, label_dropout)
        self.order = own

    @property
    def config(self) -> dict[str, object]:
        return {**super().config, "order": self.order}

    @staticmethod
    def of_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
        order = {RASTER: "raster", RANDOM: "any"}.get(str(config.get("order")))  # the model refuses other values
        told = {k: v for k, v in config.items() if k != "order"} | ({"order": order} if order else {})
        if config.get("caption_tokens") is not None:
            told.setdefault("prefix", config["caption_tokens"])
        return told

    # --- training -------------------------------------------------------------------------------------------------

    @override
    def losses(self, tokens: Tensor, condition: Condition, keys: Keys, step: Keys | None = None) -> HeadLoss:
        """The head's loss over all tokens of each image, for tokens (B, L, D) or codes (B, L), in one pass."""
        B, L = tokens.shape[:2]
        device = tokens.device
        order = keys.host.fold("order").permutation(L) if self.order == RANDOM else None  # (B, L), on the host
        z = self.backbone.sequence(condition, tokens, None if order is None else order.to(device))
        rows = torch.arange(B).repeat_interleave(L)  # (B L,): the image of each token
        places = torch.arange(L).repeat(B) if order is None else order.flatten()  # (B L,)
        target = tokens.flatten(0, 1)  # (B L, D)
        if order is not None:
            target = target.index_select(0, (rows * L + places).to(device))
        own = keys.fold("token").to(device).select(rows).fold(places)
        return summed(self.head.loss(z.flatten(0, 1), target, own), B, rows.to(device))

    # --- sampling: the specification; `seriatim.sampling.sequential` is the fast loop -------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        null: Condition,
        keys: Keys,
        settings: Settings,
        start: Start | None = None,
        order: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Tokens (B, L, D), or codes (B, L), generated one at a time in each image's order.

        Known tokens come first and stay as they are.
        """
        B, L, device = len(condition), self.tokens, condition.vectors.device
        self.check_settings(settings)
        tokens, known = begin(self.spec, B, device, start)
        vectors = self.sampling_order(order_of(order, settings, self.spec), keys, known)  # (B, L), on the host
        given = vectors.to(device) if self.order == RANDOM else None
        draw = Drawing(self.head, settings, device)
        for i in range(L):
            places = vectors[:, i]
            rows = (~known[torch.arange(B), places]).nonzero()[:, 0]  # (N,): images in which this token is unknown
            if not len(rows):
                continue
            there, places = rows.to(device), places[rows]
            scale = settings.guidance_at(settings.guidance_scale, L - i - 1, L)
            guidance = Guidance.of(scale, len(rows), device)
            z = self.backbone.sequence(condition, tokens, given)[there, i]  # (N, C)
            z_null = self.backbone.sequence(null, tokens, given)[there, i] if guidance is not None else None
            own = keys.fold("token").select(rows).fold(places).to(device)
            tokens[there, places.to(device)] = draw(z, own, z_null, guidance, settings.temperature, [i / L] * len(rows))
        check_finite(tokens, draw.sound)
        return tokens

    def loop(self, batch: Batch) -> Iterator[Step]:
        self.check_settings(batch.settings)
        images = len(batch.condition)
        known = torch.zeros(images, self.tokens, dtype=torch.bool) if batch.start is None else batch.start.known.cpu()
        vectors = self.sampling_order(order_of(batch.order, batch.settings, self.spec), batch.keys, known)
        return sequential_steps(self.backbone, self.head, batch, vectors)

    def check_settings(self, settings: Settings) -> None:
        if settings.num_inference_steps not in (None, self.tokens):
            raise UsageError(
                f"num_inference_steps: {settings.num_inference_steps} steps asked of a causal model of {self.tokens} "
                "tokens, which generates one token a step; leave it out"
            )
        for name in ("token_schedule", "min_tokens"):
            value = getattr(settings, name)
            if value != Settings.model_fields[name].default:
                raise UsageError(
                    f"{name}: {value!r} asked of a causal model, which generates one token a step; leave it out"
                )
        if settings.order == CONFIDENCE:
            raise UsageError("order: 'confidence' asked of a causal model, which draws one token a step; leave it out")
        if self.order == RASTER and settings.order is not None:
            order = order_of(None, settings, self.spec)
            self._check_raster(None if order is None else positions_of(order, len(order), self.tokens))
        super().check_settings(settings)

    def sampling_order(self, order: Tensor | None, keys: Keys, known: Tensor) -> Tensor:
        """The positions of each image in the order of generation, known ones first: (B, L), on the host."""
        B, L = known.shape
        if self.order == RANDOM:
            return order_vectors(order, keys.fold("order"), known).flip(-1)
        if bool(known.any()):
            raise UsageError(
                "known: a causal model of raster order sees only what comes before a token, not what is kept after it; "
                "to repaint, use a masked model, or a causal one trained with order=random"
            )
        if order is not None:
            self._check_raster(positions_of(order, B, L))
        return torch.arange(L).expand(B, L)

    def _check_raster(self, order: Tensor | None) -> None:
        """Raise UsageError if positions (L,) or (B, L) are not in raster order; None stands for a random order."""
        if order is None or bool((order != torch.arange(self.tokens)).any()):
            raise UsageError(
                "order: a causal model of raster order draws in no other; leave it out, or train one with order=random"
            )
