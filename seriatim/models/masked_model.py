"""The masked autoregressive model of Li et al. 2024 (MAR) generates several tokens a step, in any order.

Section 3.4 of the paper: in training, a random share of the tokens is masked and the head models each of them given z;
in sampling, the tokens are generated set by set in a random order. Unusual:
- the whole batch shares one mask ratio of at least 0.7, which keeps the encoder short (or each image has its own);
- the unconditional input is a vector of its own, not a row of the class embedding;
- codes may be generated in the order "confidence", as in MaskGIT (Chang et al. 2022): each step draws all unknown
  tokens and keeps the likeliest.

Shapes: B images, L tokens, D features (codes have no such axis), N tokens asked for, C width of z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from seriatim.backbones.base import Parallel
from seriatim.conditions.base import Condition, Conditioner
from seriatim.core.buckets import padded_counts
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.core.orders import CONFIDENCE, order_vectors
from seriatim.core.schedules import mask_ratio, unknown_after
from seriatim.core.settings import Settings
from seriatim.heads.base import Guidance, Head, HeadLoss
from seriatim.models.base import SequenceModel, make_conditioner, summed
from seriatim.sampling.draw import Drawing
from seriatim.sampling.parallel import STEPS, order_of, parallel_steps, surest
from seriatim.sampling.step import Batch, Start, Step, begin, check_finite


class MaskedModel(SequenceModel):
    """`MaskedModel(Masked(tokens=256, dim=16, width=768, depth=12), Diffusion(dim=16), classes=1000)`."""

    backbone: Parallel

    def __init__(
        self,
        backbone: Parallel,
        head: Head,
        *,
        classes: int = 0,  # 0 makes the model unconditional
        label_dropout: float = 0.1,  # the share of training images whose label is dropped, which guidance needs
        min_mask_ratio: float = 0.7,
        mask_ratio_std: float = 0.25,  # of a normal distribution around 1, truncated to [min_mask_ratio, 1]
        mask_ratio_per: Literal["step", "image"] = "step",  # FractalMAR draws a ratio for each "image"
        caption_dim: int | None = None,  # the number of features of the text encoder; None means no captions
        caption_tokens: int | None = None,  # the number of positions of a caption; None means 1
        conditioner: Conditioner | None = None,  # replaces classes and captions
    ) -> None:
        if not isinstance(backbone, Parallel):
            raise UsageError(
                f"backbone: {type(backbone).__name__} is not parallel; a masked model asks for several tokens at once, "
                "from all that is known: use the backbone `masked` or `bidirectional`, or the kind `causal`"
            )
        made = conditioner or make_conditioner(backbone.width, classes, caption_dim, caption_tokens)
        super().__init__(backbone, head, made, label_dropout)
        if not 0 < min_mask_ratio <= 1:
            raise UsageError(f"min_mask_ratio: {min_mask_ratio!r} is not allowed; it must be in (0, 1]")
        if not mask_ratio_std > 0:
            raise UsageError(f"mask_ratio_std: {mask_ratio_std!r} is not allowed; it must be above 0")
        self.min_mask_ratio, self.mask_ratio_std, self.mask_ratio_per = min_mask_ratio, mask_ratio_std, mask_ratio_per
        self.buckets = 0  # how many numbers of tokens may be asked for in training (core/buckets.py); 0 means any

    @property
    def config(self) -> dict[str, object]:
        config = {**super().config, "min_mask_ratio": self.min_mask_ratio, "mask_ratio_std": self.mask_ratio_std}
        return config if self.mask_ratio_per == "step" else config | {"mask_ratio_per": self.mask_ratio_per}

    # --- training -------------------------------------------------------------------------------------------------

    def losses(self, tokens: Tensor, condition: Condition, keys: Keys, step: Keys | None = None) -> HeadLoss:
        """The head's loss over the masked tokens of each image (Li et al. 2024, eq. 1, section 3.4).

        `tokens` is (B, L, D), or codes (B, L).
        """
        B, L = tokens.shape[:2]
        device, keys = tokens.device, keys.host  # which tokens are masked is decided on the host
        order = keys.fold("order").permutation(L)  # (B, L); the first entries are the masked positions
        counts = torch.tensor(self._masked(keys, step)).expand(B)  # the number of masked tokens of each image
        masked = first_of(order, counts)  # (B, L), on the host
        ask = first_of(order, padded_counts(counts, L, self.buckets))  # more tokens than those, if lengths are padded
        rows, places = ask.nonzero().unbind(1)  # (N,): the image of each token asked for, and its position
        z = self.backbone.z(condition, tokens, ~masked, ask, self.head.neighbours)  # (N, C)
        target = tokens.flatten(0, 1).index_select(0, (rows * L + places).to(device))
        own = keys.fold("token").select(rows).fold(places).to(device)
        loss = self.head.loss(z, target, own)
        if self.buckets:  # the losses of known tokens, which are asked for as padding only, don't count
            kept = masked[rows, places].nonzero()[:, 0]
            loss, rows = loss.select(kept.to(device)), rows[kept]
        return summed(loss, B, rows.to(device))

    def _masked(self, keys: Keys, step: Keys | None) -> list[int]:
        """The number of masked tokens: one number for all images, or one for each image."""
        common = self.mask_ratio_per == "step" and step is not None
        drawn = (step if common and step is not None else keys).fold("ratio").uniform().tolist()
        ratios = [mask_ratio(u, std=self.mask_ratio_std, low=self.min_mask_ratio) for u in drawn]
        return [math.ceil(self.tokens * ratio) for ratio in ratios]

    # --- sampling: the specification; `seriatim.sampling.parallel` is the fast loop ---------------------------------

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
        """Tokens (B, L, D), or codes (B, L): each step generates a set from the end of each image's order vector.

        Known tokens stay as they are, and the token and guidance schedules begin at the share of tokens that each image
        knows. With the order "confidence" a step draws all unknown tokens and keeps the likeliest.
        """
        B, L, device = len(condition), self.tokens, condition.vectors.device
        steps, w = settings.num_inference_steps or STEPS, settings.guidance_scale
        tokens, known = begin(self.spec, B, device, start)
        confident = order is None and settings.order == CONFIDENCE
        positions = None if confident else order_of(order, settings, self.spec)
        vectors = None if confident else order_vectors(positions, keys.fold("order"), known)  # (B, L)
        draw = Drawing(self.head, settings, device)
        begun = left = (~known).sum(dim=1).tolist()  # the number of unknown tokens of each image, at first and now
        for step in range(steps):
            shares = [1 - now / L for now in left]
            left = [
                unknown_after(step, steps, L, now, first, settings.token_schedule, settings.min_tokens)
                for now, first in zip(left, begun, strict=True)
            ]
            ask = ~known
            if vectors is not None:
                ask &= ~torch.zeros_like(known).scatter(1, vectors, torch.arange(L) < torch.tensor(left)[:, None])
            if not ask.any():
                break  # images with fewer unknown tokens than steps are finished early
            rows, places = ask.nonzero().unbind(1)  # (N,): the image of each token asked for, and its position
            scale = torch.tensor([settings.guidance_at(w, now, L) for now in left])[rows]
            guidance = Guidance.of(scale, len(rows), device)
            z = self.backbone.z(condition, tokens, known, ask, self.head.neighbours)  # (N, C)
            z_null = self.backbone.z(null, tokens, known, ask, self.head.neighbours) if guidance is not None else None
            own = keys.fold("token").select(rows).fold(places)
            own = own.fold("step").fold(step) if confident else own
            known_shares = [shares[row] for row in rows.tolist()]
            drawn = draw(z, own.to(device), z_null, guidance, settings.temperature, known_shares)
            if confident:
                sure = self.head.confidence(z, drawn, z_null, guidance).cpu()  # (N,)
                falling = settings.choice_temperature * (1 - (step + 1) / steps)
                keep = surest(sure, rows, own.fold("choice").uniform(), left, falling)
                ask, drawn = ask.masked_scatter(ask, keep), drawn[keep.to(device)]
            tokens[ask.to(device)] = drawn
            known |= ask
        check_finite(tokens, draw.sound)
        return tokens

    def loop(self, batch: Batch) -> Iterator[Step]:
        return parallel_steps(self.backbone, self.head, batch)

    def check_settings(self, settings: Settings) -> None:
        if settings.order == CONFIDENCE and not self.head.discrete:
            raise UsageError(
                f"order: 'confidence' needs a head of codes; {type(self.head).__name__} draws features; use random"
            )
        super().check_settings(settings)


def first_of(order: Tensor, counts: Tensor) -> Tensor:
    """A mask (B, L) of the first counts[b] positions in the order of each image (B, L)."""
    B, L = order.shape
    return torch.zeros(B, L, dtype=torch.bool).scatter(1, order, torch.arange(L) < counts[:, None])
