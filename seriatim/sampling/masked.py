"""The fast loop of masked models: the same draws and the same tokens as `MaskedModel.sample`, step by step.

What it does better: one pass for conditional and unconditional rows; none for the latter where the scale is 1, and
none for images that are finished; the first step of a class once; masks and rows on the CPU, where the noise is drawn,
so that an accelerator is not waited for; the backbone in half precision if asked; a stream of steps.

Shapes: B images, L tokens, D features, N tokens asked for, C width of z.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from seriatim.core.errors import NumericsError
from seriatim.core.orders import order_vectors
from seriatim.core.random import Noise
from seriatim.core.schedules import check_guidance, check_token_schedule, guidance_at, unknown_after
from seriatim.heads.base import Head
from seriatim.models.base import Model
from seriatim.models.masked import CHOICE_TEMPERATURE, MaskedModel, draw, is_confidence, surest
from seriatim.nn.packed import prepare, version

M = TypeVar("M", bound=Model)
FEW_CLASSES = 8  # of a batch: with more, one pass of all images costs less than one for each class


@dataclass(frozen=True)
class Drawn:
    """The N tokens of a step, and what they were drawn from."""

    head: Head
    z: Tensor  # (N, C), of the condition
    tokens: Tensor  # (N, D), or codes (N,)
    rows: Tensor  # (N,): the image of each
    places: Tensor  # (N,): and where in it


@dataclass(frozen=True)
class Step:
    """What is known after a step over a batch of images."""

    index: int  # 0-based, over all batches of a request
    total: int
    stage: str  # "tokens"
    tokens: Tensor  # (B, L, D), or codes (B, L); unknown ones are zero
    known: Tensor  # (B, L) bool
    images: range = field(default=range(0))  # which images of the request this batch holds
    decode: Callable[[Tensor, Tensor], list[Image.Image]] | None = field(default=None, repr=False)
    drawn: Drawn | None = field(default=None, repr=False)  # in this step; None: nothing was

    def preview(self) -> list[Image.Image]:
        """The images as known so far; unknown tokens show as the mean of the training images."""
        assert self.decode is not None, "this step was made without a tokenizer"
        return self.decode(self.tokens, self.known)

    def entropy(self) -> Tensor:
        """What the model did not know, in nats: (B, L, D), or (B, L, 1) of codes; NaN but for tokens of this step.

        Of each feature given all that was drawn before it, under the class, before guidance and temperature: of
        mixtures, bins, and heads that nest them, and of codes. Of features in units of the model's tokens.
        """
        shape = (*self.known.shape, 1 if self.tokens.ndim == 2 else self.tokens.shape[-1])
        result = torch.full(shape, torch.nan, device=self.tokens.device)
        if self.drawn is not None:
            d = self.drawn
            result[d.rows.to(result.device), d.places.to(result.device)] = d.head.entropy(d.z, d.tokens).float()
        return result


@torch.no_grad()
def masked_steps(
    model: MaskedModel,
    labels: Tensor | None,  # (B,)
    noise: Noise,  # one row and one generator for each image
    *,
    steps: int,
    order: Tensor | Sequence[int] | str | None = None,  # (L,) or (B, L), the first drawn first; None: random
    tokens: Tensor | None = None,  # (B, L, D) to begin from, of which those not known are ignored
    known: Tensor | None = None,  # (B, L) bool; each image may know other tokens, and another number of them
    guidance_scale: float = 1.0,
    guidance_schedule: str = "linear",
    guidance_interval: Sequence[float] | None = None,
    guidance_power: float | None = None,
    temperature: float = 1.0,
    token_schedule: str = "cosine",
    min_tokens: int = 1,
    num_diffusion_steps_last: int | None = None,  # None: as many steps inside the head all over the image
    choice_temperature: float = CHOICE_TEMPERATURE,  # of the order "confidence"
    dtype: torch.dtype = torch.float32,  # of the backbone; the head is always float32
    first: FirstStep | None = None,  # of this model, to keep it from one call to the next
    **head_steps: Any,
) -> Iterator[Step]:
    """Yield a `Step` after each of `steps` steps over the images; the last holds all tokens."""
    B, L = len(noise), model.backbone.tokens
    model.check_labels(labels, B)
    check_token_schedule(token_schedule, min_tokens)
    check_guidance(guidance_schedule, guidance_interval, guidance_power)
    tokens, known_there = model.begin(B, tokens, known)
    device, known = tokens.device, known_there.cpu()
    confident = is_confidence(order, model.head)
    vectors = None if confident else order_vectors(order, noise, known)  # (B, L)
    begun = left = (~known).sum(dim=1).tolist()  # unknown tokens of each image: at first, and now
    passes = Passes(model, labels, B, first if first is not None and first.model is model else FirstStep(model))
    for step in range(steps):
        shares = [1 - now / L for now in left]  # known when the step begins
        left = [
            unknown_after(step, steps, L, now, at_first, token_schedule, min_tokens)
            for now, at_first in zip(left, begun, strict=True)
        ]
        ask = ~known
        if vectors is not None:
            ask &= ~torch.zeros_like(known).scatter(1, vectors, torch.arange(L) < torch.tensor(left)[:, None])
        rows, places = ask.nonzero().unbind(1)  # (N,): the image of each token asked for, and where in it
        if len(rows):  # with fewer unknown tokens than steps, all is known early
            scale = torch.tensor(
                [guidance_at(guidance_schedule, guidance_scale, m, L, guidance_interval, guidance_power) for m in left]
            )
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                z, z_null = passes.z(tokens, known, ask, rows, places, scale)  # (N, C)
            drawn = draw(
                model.head, rows, z, noise, z_null, scale, temperature, shares, num_diffusion_steps_last, head_steps
            )
            if confident:
                sure = model.head.confidence(z, drawn, z_null, scale[rows])  # (N,)
                keep = surest(sure, rows, noise.select(rows), left, choice_temperature * (1 - (step + 1) / steps))
                kept = keep.cpu()
                ask, drawn, rows, places = ask.masked_scatter(ask, kept), drawn[keep], rows[kept], places[kept]
                z = z[keep]
            flat = (rows * L + places).to(device, non_blocking=True)
            tokens = tokens.flatten(0, 1).index_copy(0, flat, drawn).view_as(tokens)
            known = known | ask
        of = Drawn(model.head, z, drawn, rows, places) if len(rows) else None
        if step == steps - 1:
            refuse_not_finite(tokens)  # before anybody can take them for a result
        yield Step(step, steps, "tokens", tokens, known, drawn=of)


def refuse_not_finite(tokens: Tensor) -> None:
    if not bool(torch.isfinite(tokens).all()):
        raise NumericsError(
            "the sampled tokens are not finite: the model is not trained enough for these settings; "
            "lower guidance_scale, or leave start_timestep at its default"
        )


def prepare_model(model: M, dtype: torch.dtype = torch.float32) -> M:
    """Lay a model's weights out for sampling alone, in place: packed on a CPU, the backbone's products in `dtype`.

    What meets tokens stays in float32: its input layer (`token_embed`) and the head.
    """
    prepare(model.backbone, dtype, keep=("token_embed",))
    prepare(model.head)
    return model


class FirstStep:
    """z of images of which nothing is known: it depends on the class alone, and is kept for the classes made last."""

    def __init__(self, model: Model, most: int = 32) -> None:
        self.model, self.most = model, most
        self.kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.made_with: object = None

    def z(self, label: int) -> Tensor:
        """Class, or -1 for none -> (L, C). Made class by class, so that it doesn't depend on what is asked with it."""
        if self.made_with != (now := version(self.model)):
            self.kept.clear()
            self.made_with = now
        device = self.model.device
        half = torch.is_autocast_enabled(device.type)
        key = (label, torch.get_autocast_dtype(device.type) if half else None)
        z = self.kept.get(key)
        if z is None:
            backbone, L = self.model.backbone, self.model.tokens
            state = backbone.start(self.model.condition(torch.tensor([label], device=device), 1), 1)
            nothing = torch.zeros(1, L, dtype=torch.bool)
            z = backbone.z(state, backbone.blank(1, device), nothing, ~nothing)
            self.kept[key] = z
            while len(self.kept) > self.most:
                self.kept.popitem(last=False)
        return z


class Passes:
    """Conditional and unconditional rows in one pass of the backbone, of the images that need them.

    A finished image needs none, one whose scale is 1 no unconditional ones. When that changes, which it seldom does,
    the backbone's state is made anew.
    """

    def __init__(self, model: MaskedModel, labels: Tensor | None, images: int, first: FirstStep) -> None:
        self.backbone, self.first = model.backbone, first
        self.labels = [-1] * images if labels is None else labels.tolist()
        self.conditions = torch.cat([model.condition(labels, images), model.condition(None, images)])  # (2 B, width)
        self.images, self.chosen = images, torch.empty(0, dtype=torch.long)
        self.few = len(set(self.labels)) <= FEW_CLASSES

    def z(
        self, tokens: Tensor, known: Tensor, ask: Tensor, rows: Tensor, places: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """z and z_null (N, C) of rows and places (N,); scale (B,). All on the CPU but the tokens."""
        asking = torch.zeros(self.images, dtype=torch.bool).scatter(0, rows, True)  # (B,)
        guided = asking & (scale != 1.0)
        if self.few and not bool(known.any()):
            return self.of_nothing(rows, places, bool(guided.any()))
        chosen = torch.cat([asking, guided]).nonzero()[:, 0]  # of 2 B
        if not torch.equal(chosen, self.chosen):
            self.chosen, there = chosen, chosen.to(tokens.device)
            self.state = self.backbone.start(self.conditions[there], len(chosen))
            self.index, self.index_there = chosen % self.images, there % self.images
        z = self.backbone.z(self.state, tokens[self.index_there], known[self.index], ask[self.index])
        z, z_guided = z[: len(rows)], z[len(rows) :]
        if not bool(guided.any()):
            return z, None
        if bool(guided[rows].all()):
            return z, z_guided
        # where the scale is 1, z itself stands for z_null: z + 1 (z - z)
        return z, z.index_copy(0, guided[rows].nonzero()[:, 0].to(z.device), z_guided)

    def of_nothing(self, rows: Tensor, places: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """The same where nothing is known."""
        labels, which = torch.tensor(self.labels).unique(return_inverse=True)
        every = torch.cat([self.first.z(label) for label in labels.tolist()])  # (classes L, C)
        L = len(every) // len(labels)
        z = every.index_select(0, (which[rows] * L + places).to(every.device))
        return z, self.first.z(-1).index_select(0, places.to(every.device)) if guided else None
