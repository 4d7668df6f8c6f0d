"""What sequence models of every kind share: the condition, the checks, and a loss that is a sum and a count.

B images, L tokens, D features of a token or V codes, C width of z.
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
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.core.orders import RANDOM
from seriatim.core.settings import Settings
from seriatim.core.spec import TokenSpec
from seriatim.heads.base import Head, HeadLoss
from seriatim.sampling.step import Start, Step


class Loss(NamedTuple):
    """The loss of a batch as a sum and a count, so that parts of a batch add up exactly."""

    sum: Tensor  # () over all tokens asked for and all draws made for them
    count: Tensor  # type: ignore[assignment]  # () how many these are; tuple.count is not needed here
    parts: dict[str, Tensor]  # name -> () sums of the terms of the loss, for logs

    @property
    def mean(self) -> Tensor:
        """The mean over tokens and draws: ()."""
        return self.sum / self.count


class SequenceModel(nn.Module):
    """Condition + order + backbone + head. `forward` is the loss of a batch, `sample` the naive sampler."""

    one_by_one = False  # generates one token a step: as many steps as there are tokens
    order = RANDOM  # which token comes when, unless a request says
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

    @property
    def spec(self) -> TokenSpec:
        return self.backbone.spec

    @property
    def tokens(self) -> int:
        """L, the number of tokens of an image."""
        return self.backbone.spec.count

    @property
    def classes(self) -> int:
        """How many classes there are; 0 without classes."""
        return self.conditioner.classes

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments but for backbone and head, as plain data."""
        return {**self.conditioner.config, "label_dropout": self.label_dropout}

    @staticmethod
    def of_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
        """A flat config as the backbone takes it, where an argument of the model also tells the backbone something."""
        return dict(config)

    # --- the condition --------------------------------------------------------------------------------------------

    def condition(self, inputs: Any, images: int) -> Condition:
        """The condition of so many images from labels (B,), captions or vectors; None is no condition."""
        self.conditioner.check(inputs, images)
        return self.conditioner(inputs, images)

    def null(self, images: int, like: Condition | None = None) -> Condition:
        """The condition of images without one, for guidance."""
        return self.conditioner.null(images, like)

    # --- training -------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, inputs: Any = None, keys: Keys | None = None, step: Keys | None = None) -> Loss:
        """The loss of a batch: tokens (B, L, D) or codes (B, L), inputs (labels (B,) or captions).

        keys: B rows, one for each image, on the host. step: one row, common to the whole optimiser step. Without keys,
        both are drawn from torch's own generator.
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
        """The loss of each image (B,): what `forward` sums. Where `step` is None, nothing is common to the images."""
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
        """Tokens (B, L, D), or codes (B, L): the naive sampler, which is the specification."""
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
        """The same tokens by the fast loop, step by step.

        `scale` and `temperature`, one number for each image, override those of the settings. `dtype` is that of the
        backbone.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks steps()")

    def check_settings(self, settings: Settings) -> Settings:
        """The settings as this model follows them; raises UsageError for those that it can't follow."""
        self.head.check_options(self.head.options(**settings.head_options), settings.temperature)
        return settings


def make_conditioner(width: int, classes: int, caption_dim: int | None, caption_tokens: int | None) -> Conditioner:
    """The conditioner that a model's arguments describe: classes, or captions of so many features and positions."""
    if caption_dim is None:
        if caption_tokens is not None:
            raise UsageError(f"caption_tokens: {caption_tokens} given without caption_dim, the features of each")
        return Classes(classes, width)
    if classes:
        raise UsageError(f"classes: {classes} given with caption_dim; a model takes classes or captions")
    return CaptionEmbedder(caption_dim, caption_tokens or 1, width)


def summed(loss: HeadLoss, images: int, rows: Tensor) -> HeadLoss:
    """Losses of tokens (N,) as losses of images (B,); rows (N,) is the image of each."""

    def of(value: Tensor) -> Tensor:
        return value.new_zeros(images).index_add(0, rows, value)

    return HeadLoss(of(loss.sum), of(loss.count), {name: of(value) for name, value in loss.parts.items()})
