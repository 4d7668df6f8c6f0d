"""What models of every kind share: the condition, the checks, the loss that they return, what sampling begins from.

B images, L tokens, D features of a token or V codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seriatim.backbones.base import Backbone
from seriatim.core.errors import UsageError
from seriatim.core.orders import RANDOM
from seriatim.core.random import Noise
from seriatim.heads.base import Head


@dataclass
class Loss:
    """The mean over all asked tokens and draws; `parts` are its terms, for logs."""

    mean: Tensor  # ()
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> ()


class Model(nn.Module):
    """Backbone + head + order -> `loss(tokens, labels, noise)` and `sample(labels, noise, ...)`."""

    one_by_one = False  # draws one token a step: as many steps as there are tokens
    order = RANDOM  # what is drawn when, unless a request says

    def __init__(
        self, backbone: Backbone, head: Head, *, classes: int, label_dropout: float, no_class: bool = True
    ) -> None:
        super().__init__()
        if classes < 0:
            raise UsageError(f"classes: {classes!r} is not allowed; it must be 0 (unconditional) or more")
        if not 0 <= label_dropout <= 1:
            raise UsageError(f"label_dropout: {label_dropout!r} is not allowed; it must be in [0, 1]")
        draws, takes = (
            f"codes of a vocabulary of {vocab}" if vocab else f"{dim} features"
            for dim, vocab in (
                (head.output, head.output if head.discrete else None),
                (backbone.dim, backbone.vocab),
            )
        )
        if draws != takes:
            raise UsageError(f"head: it draws {draws}, the backbone's tokens are {takes}")
        head.bind(backbone.z_dim)
        self.backbone, self.head = backbone, head
        self.classes, self.label_dropout = classes, label_dropout
        if no_class:
            self.no_class = nn.Parameter(torch.randn(1, backbone.width) * 0.02)
        if classes:
            self.class_embedding = nn.Parameter(torch.randn(classes, backbone.width) * 0.02)

    @property
    def tokens(self) -> int:
        return self.backbone.tokens

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments but for backbone and head, as plain data."""
        return {"classes": self.classes, "label_dropout": self.label_dropout}

    @staticmethod
    def of_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
        """A flat config as the backbone takes it, where a name of the model's says something to the backbone."""
        return dict(config)

    @property
    def device(self) -> torch.device:
        return self.no_class.device

    def condition(self, labels: Tensor | None, images: int) -> Tensor:
        """labels (B,), -1 for no class, or None -> (B, width)."""
        if labels is None:
            return self.no_class.expand(images, -1)
        table = self.no_class if not self.classes else torch.cat([self.class_embedding, self.no_class])
        return F.embedding(labels % len(table), table)  # -1 is the last row: no class

    def check_labels(self, labels: Tensor | None, images: int) -> None:
        if labels is None:
            return
        if labels.shape != (images,):
            raise UsageError(f"labels: shape {tuple(labels.shape)} is not ({images},), one for each image")
        wrong = labels[(labels >= self.classes) | (labels < -1)].tolist()
        if wrong:
            allowed = f"from 0 to {self.classes - 1}, or -1 for no class" if self.classes else "-1, without classes"
            raise UsageError(f"labels: {wrong[0]} is not allowed; they must be {allowed}")

    def check_tokens(self, tokens: Tensor, images: int | None = None) -> None:
        """Refuse what is not (B, L, D), or codes (B, L) of the vocabulary."""
        vocab, shape = self.backbone.vocab, self.backbone.token_shape
        if tuple(tokens.shape[1:]) != shape or not tokens.ndim or (images is not None and len(tokens) != images):
            wanted = ", ".join(("B" if images is None else str(images), *map(str, shape)))
            raise UsageError(f"tokens: shape {tuple(tokens.shape)} is not ({wanted}); it is the tokenizer's output")
        if (vocab is None) != tokens.is_floating_point():
            wanted = "features in floating point" if vocab is None else "codes, int64"
            raise UsageError(f"tokens: {tokens.dtype} is not allowed; this model's tokens are {wanted}")
        if vocab is not None and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            low, high = int(tokens.min()), int(tokens.max())
            raise UsageError(f"tokens: codes from {low} to {high} are not all in the vocabulary, 0 to {vocab - 1}")

    def drop_labels(self, labels: Tensor | None, noise: Noise) -> Tensor | None:
        """In training, a share of the images sees no label."""
        if labels is None or not self.training:
            return labels
        return torch.where(noise.uniform() < self.label_dropout, -1, labels)

    def loss(self, tokens: Tensor, labels: Tensor | None = None, noise: Noise | None = None) -> Loss:
        """tokens (B, L, D) or codes (B, L), labels (B,) -> the mean loss of the tokens asked for."""
        raise NotImplementedError(f"{type(self).__name__} lacks loss()")

    def sample(self, labels: Tensor | None, noise: Noise, *, steps: int = 64, **settings: Any) -> Tensor:
        """labels (B,), a row and a generator of noise for each image -> tokens (B, L, D) or codes (B, L)."""
        raise NotImplementedError(f"{type(self).__name__} lacks sample()")

    def begin(self, images: int, tokens: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """What sampling begins from, copied: tokens (B, L, D), zero where unknown; known (B, L), by default none."""
        B, L, device = images, self.backbone.tokens, self.device
        blank = self.backbone.blank(B, device)
        if tokens is None and known is None:
            return blank, torch.zeros(B, L, dtype=torch.bool, device=device)
        if tokens is None or known is None:
            missing, given = ("tokens", "known") if tokens is None else ("known", "tokens")
            raise UsageError(
                f"{missing}: is missing, though {given} is given; sampling begins from both or from neither"
            )
        if known.shape != (B, L) or known.dtype != torch.bool:
            raise UsageError(f"known: {known.dtype} of shape {tuple(known.shape)} is not allowed; give bool ({B}, {L})")
        self.check_tokens(tokens, B)
        tokens, known = tokens.to(device, blank.dtype), known.to(device, copy=True)
        if not bool(torch.isfinite(tokens[known]).all()):
            raise UsageError("tokens: a known one is not finite; check the images that they come from")
        blank[known] = tokens[known]
        return blank, known
