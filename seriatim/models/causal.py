"""The causal autoregressive model: one token after another, each from those before it.

Sun et al. 2024 (LlamaGen), with any head: of codes as published, of features as in Li et al. 2024 (MAR), table 1.
Unusual:
- unconditional is a vector of its own (LlamaGen: one more row of its class table);
- the order may be "random": every image in an order of its own, and the backbone is told which token comes next (as in
  RAR, Yu et al. 2024). Such a model draws in any order, and begins from known tokens: they come first.

Shapes: B images, L tokens, D features (codes have no such axis), C width of z, P prefix, A width of a condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from seriatim.backbones.base import Backbone
from seriatim.backbones.causal import Causal
from seriatim.core.errors import UsageError, nearest
from seriatim.core.orders import RANDOM, RASTER, order_vectors, positions_of
from seriatim.core.random import Noise
from seriatim.core.schedules import check_guidance, check_one_a_step, guidance_at
from seriatim.heads.base import Head
from seriatim.models.base import Loss, Model
from seriatim.models.captions import CaptionEmbedder, Captions
from seriatim.models.masked import draw

Condition = Tensor | Captions | None  # labels (B,), -1 for no class; or captions; or None


class CausalModel(Model):
    """`CausalModel(Causal(tokens=256, vocab=16384), Categorical(16384, bias=False), classes=1000)`."""

    one_by_one = True
    backbone: Causal

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        classes: int = 0,  # 0: unconditional
        label_dropout: float = 0.1,  # share of training images that see no label, for guidance
        order: Literal["raster", "random"] | None = None,  # None: as the backbone
        caption_dim: int | None = None,  # features of a text encoder; None: no text
        caption_tokens: int | None = None,  # T; None: the backbone's prefix
    ) -> None:
        if not backbone.causal:
            raise UsageError(
                f"backbone: {type(backbone).__name__} sees all that is known at once, in training the very tokens that "
                "are asked of it too; a causal model needs one that sees what comes before: use `causal`"
            )
        super().__init__(backbone, head, classes=classes, label_dropout=label_dropout, no_class=caption_dim is None)
        own = RANDOM if self.backbone.order == "any" else RASTER
        if order is not None and order not in (RASTER, RANDOM):
            raise UsageError(f"order: {order!r} is not known{nearest(str(order), (RASTER, RANDOM))}")
        if order is not None and order != own:
            needs = {RANDOM: "any", RASTER: "raster"}[order]
            raise UsageError(f"order: {order!r} needs a backbone of order {needs!r}, not {self.backbone.order!r}")
        self.order = own
        self.captions: CaptionEmbedder | None = None
        if caption_dim is not None:
            T, P, A = caption_tokens or self.backbone.prefix, self.backbone.prefix, backbone.width
            if classes:
                raise UsageError(f"classes: {classes} given with caption_dim; a model takes classes or captions")
            if T != P:
                raise UsageError(f"caption_tokens: {T} does not fit the backbone's prefix of {P}; give the same")
            self.captions = CaptionEmbedder(caption_dim, T, A)
        elif caption_tokens is not None:
            raise UsageError(f"caption_tokens: {caption_tokens} given without caption_dim, the features of each")

    @property
    def config(self) -> dict[str, object]:
        config = {**super().config, "order": self.order}
        if self.captions is not None:
            config |= {"caption_dim": self.captions.dim, "caption_tokens": self.captions.tokens}
        return config

    @staticmethod
    def of_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
        order = {RASTER: "raster", RANDOM: "any"}.get(str(config.get("order")))  # what is neither, the model names
        told = {k: v for k, v in config.items() if k != "order"} | ({"order": order} if order else {})
        if config.get("caption_tokens") is not None:
            told.setdefault("prefix", config["caption_tokens"])
        return told

    # --- the condition --------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.no_class.device if self.captions is None else self.captions.null.device

    def check_labels(self, labels: Condition, images: int) -> None:
        if self.captions is not None and labels is not None:
            return self.captions.check(labels, images)  # type: ignore[arg-type]
        if isinstance(labels, Captions):
            raise UsageError("labels: Captions given to a model without text; build it with caption_dim")
        super().check_labels(labels, images)

    def drop_labels(self, labels: Condition, noise: Noise) -> Any:
        if isinstance(labels, Captions) and self.captions is not None:
            return self.captions.drop(labels, self.label_dropout, noise) if self.training else labels
        return super().drop_labels(labels, noise)  # type: ignore[arg-type]

    def conditions(self, labels: Condition, images: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The condition, that of no class or caption, (B, A) or (B, P, A); which of P are no padding, None: all."""
        if self.captions is None:
            assert not isinstance(labels, Captions), "checked before"
            return self.condition(labels, images), self.condition(None, images), None
        like = labels if isinstance(labels, Captions) else None
        null = self.captions.none(images, like)
        given = null if like is None else like
        return self.captions(given), self.captions(null), given.valid

    # --- training -------------------------------------------------------------------------------------------------

    def loss(self, tokens: Tensor, labels: Condition = None, noise: Noise | None = None) -> Loss:
        """tokens (B, L, D) or codes (B, L), labels (B,) -> the head's loss over all tokens, in one pass."""
        self.check_tokens(tokens)
        B, L = tokens.shape[:2]
        self.check_labels(labels, B)
        noise = Noise.shared(None, B, tokens.device) if noise is None else noise
        condition, _, valid = self.conditions(self.drop_labels(labels, noise), B)
        order = noise.permutation(L) if self.order == RANDOM else None  # (B, L)
        z = self.backbone.sequence(condition, tokens, order, valid).flatten(0, 1)  # (B L, C)
        rows = torch.arange(B, device=tokens.device).repeat_interleave(L)  # (B L,): the image of each token
        target = tokens.flatten(0, 1)  # (B L, D)
        if order is not None:
            target = target.index_select(0, rows * L + order.flatten())
        loss = self.head.loss(z, target, noise.select(rows))
        count = loss.count.sum()
        parts = {name: value.sum().detach() / count for name, value in loss.parts.items()}
        return Loss(loss.sum.sum() / count, parts)

    # --- sampling: the specification; `seriatim.sampling.causal` is the fast loop -----------------------------------

    @torch.no_grad()
    def sample(
        self,
        labels: Condition,  # (B,), or captions
        noise: Noise,  # one row and one generator for each image
        *,
        steps: int | None = None,  # L, which is what None stands for
        order: Tensor | Sequence[int] | str | None = None,  # (L,) or (B, L), the first drawn first; None: the model's
        tokens: Tensor | None = None,  # (B, L, D) to begin from, of which those not known are ignored
        known: Tensor | None = None,  # (B, L) bool; each image may know other tokens, and another number of them
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        guidance_interval: Sequence[float] | None = None,
        guidance_power: float | None = None,
        temperature: float = 1.0,
        num_diffusion_steps_last: int | None = None,  # None: as many steps inside the head all over the image
        **head_steps: Any,
    ) -> Tensor:
        """Tokens (B, L, D), one at a time in each image's order. Known tokens stay as they are, and come first."""
        B, L = len(noise), self.backbone.tokens
        self.check_labels(labels, B)
        check_one_a_step(steps, L)
        check_guidance(guidance_schedule, guidance_interval, guidance_power)
        tokens, known = self.begin(B, tokens, known)
        vectors = self.drawing_order(order, noise, known)  # (B, L)
        condition, null, valid = self.conditions(labels, B)
        given = vectors if self.order == RANDOM else None
        for i in range(L):
            at = vectors[:, i]
            rows = (~known[torch.arange(B), at]).nonzero()[:, 0]  # (N,): images that don't know this token
            if not len(rows):
                continue
            scale = guidance_at(guidance_schedule, guidance_scale, L - i - 1, L, guidance_interval, guidance_power)
            z = self.backbone.sequence(condition, tokens, given, valid)[rows, i]  # (N, C)
            z_null = self.backbone.sequence(null, tokens, given, valid)[rows, i] if scale != 1 else None
            scales, shares = torch.full((B,), scale), [i / L] * B
            tokens[rows, at[rows]] = draw(
                self.head, rows, z, noise, z_null, scales, temperature, shares, num_diffusion_steps_last, head_steps
            )
        return tokens

    def drawing_order(self, order: Tensor | Sequence[int] | str | None, noise: Noise, known: Tensor) -> Tensor:
        """Positions of each image as they are drawn, the first first: (B, L); known ones before all."""
        B, L = known.shape
        if self.order == RANDOM:
            return order_vectors(order, noise, known).flip(-1)
        if bool(known.any()):
            raise UsageError(
                "known: a causal model of raster order sees only what comes before a token, not what is kept after it; "
                "to repaint, use a masked model, or a causal one trained with order=random"
            )
        raster = torch.arange(L, device=known.device).expand(B, L)
        if order is not None and not torch.equal(positions_of(order, B, L).expand(B, L), raster.cpu()):
            raise UsageError(
                "order: a causal model of raster order draws in no other; leave it out, or train one with order=random"
            )
        return raster
