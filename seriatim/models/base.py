"""What all sequence models share: the condition, the checks, and a loss that is a sum and a count.

Shapes: B images, L tokens, D features of a token or V codes, C width of z.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seriatim.backbones.base import Backbone
from seriatim.conditions.base import Condition, Conditioner
from seriatim.conditions.captions import CaptionEmbedder
from seriatim.conditions.classes import Classes
from seriatim.conditions.vectors import Vectors
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.core.orders import RANDOM
from seriatim.core.settings import Settings
from seriatim.heads.base import Head, HeadLoss
from seriatim.sampling.step import Batch, Start, Step, check_finite


class Loss(NamedTuple):
    """The loss of a batch as a sum and a count, so that the losses of parts of a batch add up exactly."""

    sum: Tensor  # () the loss summed over all tokens asked for and all of the head's draws for each
    count: Tensor  # type: ignore[assignment]  # () the number of these terms; it hides tuple.count, which nobody uses
    parts: dict[str, Tensor]  # name -> () sums of the terms of the loss, for logs

    @property
    def mean(self) -> Tensor:
        """The mean over tokens and draws: ()."""
        return self.sum / self.count


class SequenceModel(nn.Module):
    """A condition, an order, a backbone and a head. `forward` is the loss of a batch, `sample` the naive sampler."""

    one_by_one = False  # whether the model generates one token a step, and so takes as many steps as tokens
    order = RANDOM  # the order of generation when a request gives none
    backbone: Any
    head: Head

    def __init__(self, backbone: Backbone, head: Head, conditioner: Conditioner, label_dropout: float) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise UsageError(f"label_dropout: {label_dropout!r} is not allowed; it must be in [0, 1]")
        if (head.spec.dim, head.spec.vocab) != (backbone.dim, backbone.vocab):
            raise UsageError(f"head: it draws {head.spec.what}, the backbone's tokens are {backbone.spec.what}")
        if conditioner.width != backbone.width:
            raise UsageError(
                f"conditioner: its vectors have width {conditioner.width}, the backbone takes {backbone.width}"
            )
        head.bind(backbone.z_dim)
        self.conditioner = conditioner
        self.backbone, self.head = backbone, head
        self.label_dropout = label_dropout
        self.spec, self.tokens = backbone.spec, backbone.spec.count  # L, the number of tokens of an image
        self.classes = conditioner.classes  # the number of classes; 0 if the model has none

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.backbone.parameters()).device

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments without backbone, head and conditioner, as plain data."""
        return {**(self.conditioner.config if is_short(self.conditioner) else {}), "label_dropout": self.label_dropout}

    @staticmethod
    def of_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
        """A flat config translated for the backbone, where an argument of the model also sets one of the backbone."""
        return dict(config)

    # --- the condition --------------------------------------------------------------------------------------------

    def condition(self, inputs: Any, images: int) -> Condition:
        """The condition of `images` images from labels (B,), captions or vectors; inputs None means no condition."""
        self.conditioner.check(inputs, images)
        return self.conditioner(inputs, images)

    def null(self, images: int, like: Condition | None = None) -> Condition:
        """The unconditional counterpart of `like` for `images` images, which guidance needs."""
        return self.conditioner.null(images, like)

    # --- training -------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, inputs: Any = None, keys: Keys | None = None, step: Keys | None = None) -> Loss:
        """The loss of a batch of tokens (B, L, D) or codes (B, L) with inputs (labels (B,) or captions).

        `keys` has B rows on the host, one for each image. `step` has one row, shared by all batches of an optimiser
        step. Without keys, both are drawn from torch's generator.
        """
        self.spec.check(tokens)
        B = len(tokens)
        if keys is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
            keys = Keys.of(seed).fold(torch.arange(B))
            step = Keys.of(seed, "step") if step is None else step
        self.conditioner.check(inputs, B)
        if self.training:
            inputs = self.conditioner.drop(inputs, self.label_dropout, keys.fold("drop"))
        loss = self.losses(tokens, self.conditioner(inputs, B), keys, step)
        parts = {name: value.sum().detach() for name, value in loss.parts.items()}
        return Loss(loss.sum.sum(), loss.count.sum(), parts)

    def losses(self, tokens: Tensor, condition: Condition, keys: Keys, step: Keys | None = None) -> HeadLoss:
        """The loss of each image (B,), which `forward` sums. If `step` is None, the images share no random numbers."""
        raise NotImplementedError(f"{type(self).__name__} lacks losses()")

    # --- sampling -------------------------------------------------------------------------------------------------

    def sample(
        self,
        condition: Condition,
        null: Condition,
        keys: Keys,
        settings: Settings,
        start: Start | None = None,
        order: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Tokens (B, L, D), or codes (B, L), from the naive sampler, which is the specification of `steps`."""
        raise NotImplementedError(f"{type(self).__name__} lacks sample()")

    def steps(
        self,
        condition: Condition,
        null: Condition,
        keys: Keys,
        settings: Settings,
        start: Start | None = None,
        order: Tensor | Sequence[int] | None = None,
        scale: Sequence[float] | None = None,
        temperature: float | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Step]:
        """Yield a `Step` after each step of the fast loop, which generates the same tokens as `sample`.

        `scale` and `temperature` override the settings with one number for each image. The backbone runs in `dtype`.
        Raises NumericsError before the last step if its tokens are not finite, which is the only time in a batch that
        this waits for an accelerator.
        """
        scale = [settings.guidance_scale] * len(condition) if scale is None else scale
        temperature = settings.temperature if temperature is None else temperature
        for step in self.loop(Batch(condition, null, keys, settings, scale, temperature, start, order, dtype)):
            if step.last:
                check_finite(step.tokens, step.sound)
            yield step

    def loop(self, batch: Batch) -> Iterator[Step]:
        """The steps of the fast loop for a batch; `steps` checks that the tokens of the last one are finite."""
        raise NotImplementedError(f"{type(self).__name__} lacks loop()")

    def check_settings(self, settings: Settings) -> None:
        """Raise UsageError if this model can't follow the settings."""
        self.head.check_options(self.head.options(**settings.head_options), settings.temperature)


def own_class(part: object) -> type[Any]:
    """The class of a part of a model; sharding replaces it by a class of torch that inherits from it."""
    return next(cls for cls in type(part).__mro__ if not cls.__module__.startswith("torch."))


def is_short(conditioner: Conditioner) -> bool:
    """Whether arguments of the model, such as `classes`, stand for its conditioner. They never do for a subclass."""
    return own_class(conditioner) in (CaptionEmbedder, Classes, Vectors)


def make_conditioner(width: int, classes: int, caption_dim: int | None, caption_tokens: int | None) -> Conditioner:
    """The conditioner for classes, or for captions of `caption_tokens` positions with `caption_dim` features each."""
    if caption_dim is None:
        if caption_tokens is not None:
            raise UsageError(f"caption_tokens: {caption_tokens} given without caption_dim, the features of each")
        return Classes(classes, width)
    if classes:
        raise UsageError(f"classes: {classes} given with caption_dim; a model takes classes or captions")
    return CaptionEmbedder(caption_dim, caption_tokens or 1, width)


def summed(loss: HeadLoss, images: int, rows: Tensor) -> HeadLoss:
    """The losses of tokens (N,) summed to losses of images (B,); rows (N,) is the image of each token."""

    def of(value: Tensor) -> Tensor:
        return value.new_zeros(images).index_add(0, rows, value)

    return HeadLoss(of(loss.sum), of(loss.count), {name: of(value) for name, value in loss.parts.items()})
