"""The request: everything that affects an image, and nothing else."""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, StrictInt, model_validator

from seriatim.core.errors import UsageError, caller_level
from seriatim.core.names import as_text
from seriatim.core.orders import CONFIDENCE, RASTER, check_order_name, check_permutation
from seriatim.core.random import derive_seed
from seriatim.core.schedules import check_guidance, check_one_a_step, check_token_schedule
from seriatim.core.validation import Strict

MOST_IMAGES = 1 << 20  # of a request: their tokens stay in memory together

Label = Annotated[
    Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | str | None,
    BeforeValidator(lambda label: as_text(label) if isinstance(label, str) else label),
]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Images = Annotated[StrictInt, Field(ge=1, le=MOST_IMAGES)]
Steps = Annotated[StrictInt, Field(ge=1, le=1 << 20)]  # over an image: one for each token of the largest
InnerSteps = Annotated[StrictInt, Field(ge=1, le=10_000)]  # inside a head
Strength = Annotated[float, Field(ge=0, le=1e6)]  # of guidance or temperature


def order_value(value: Any) -> Any:
    """A name as it is; positions, or a list of them for each image, as tuples."""
    if isinstance(value, str):
        return value
    rows = value if isinstance(value, (list, tuple)) else ()
    nested = all(isinstance(row, (list, tuple)) for row in rows)
    positions = [p for row in rows for p in row] if nested else rows
    if not positions or any(type(p) is not int for p in positions):
        raise ValueError("must be a name, a list of positions, or such a list for each image")
    return tuple(tuple(row) for row in rows) if nested else tuple(rows)


Order = Annotated[str | tuple[int, ...] | tuple[tuple[int, ...], ...], BeforeValidator(order_value)]


class SampleRequest(Strict):
    """What to draw. The same request gives the same images."""

    class_labels: tuple[Label, ...] = (None,)  # a class each: its number, its name, or None for no class
    num_images_per_label: Images = 1
    seed: Seed = 0  # image i has the seed hash(seed, i), unless `seeds` names one for each image
    seeds: tuple[Seed, ...] | None = None
    guidance_scale: Strength = 1.0
    guidance_schedule: str = "linear"
    guidance_interval: tuple[float, float] | None = None  # known shares, of the schedule "interval"
    guidance_power: float | None = None  # of the schedule "power-cosine"; None: 1
    num_inference_steps: Steps = 64  # over the image
    token_schedule: str = "cosine"
    min_tokens: Steps = 1  # of a step, as long as that many are unknown
    order: Order = "random"  # or a name in ORDERS; or positions, the first drawn first, for all images or for each
    temperature: Strength = 1.0
    num_diffusion_steps: InnerSteps = 100  # inside a diffusion head
    num_diffusion_steps_last: InnerSteps | None = None  # when all but the last tokens are known; None: same
    solver: str | None = None  # diffusion: ddpm, sde-dpm++, ddim or dpm++; flow: euler or heun; None: the head's own
    top_k: StrictInt | None = Field(None, ge=1, lt=2**63)  # of codes, or bins: the likeliest alone; None: all
    top_p: float | None = Field(None, gt=0, le=1)  # of codes, bins or Gaussians: the likeliest that together reach this
    guidance_mode: str | None = None  # of a mixture: exact or resample; None: the head's own
    feature_schedule: str | None = None  # of a nested head: constant, linear or cosine over its parts; None: constant
    choice_temperature: Strength = 4.5  # of the order "confidence": noise on it, falling to 0
    start_timestep: StrictInt | None = Field(None, ge=0, lt=2**63)  # None: the stable start; 999: as published

    @model_validator(mode="after")
    def _fits(self) -> SampleRequest:
        if not self.class_labels:
            raise ValueError("class_labels: is empty; name at least one class, or None")
        if self.num_images > MOST_IMAGES:
            raise ValueError(
                f"num_images_per_label: {self.num_images:,} images in all; at most {MOST_IMAGES:,} at once"
            )
        check_token_schedule(self.token_schedule)
        check_guidance(self.guidance_schedule, self.guidance_interval, self.guidance_power)
        self.check_order()
        first, last = self.num_diffusion_steps, self.num_diffusion_steps_last
        if last is not None and last > first:
            raise ValueError(f"num_diffusion_steps_last: {last} is not allowed; at most num_diffusion_steps, {first}")
        if self.seeds is not None and len(self.seeds) != self.num_images:
            raise ValueError(f"seeds: {len(self.seeds)} given for {self.num_images} images; give one for each")
        return self

    def check_order(self, tokens: int | None = None) -> None:
        """Refuse an order that has no such name, or is no permutation of a model's tokens, where it is known."""
        if isinstance(self.order, str):
            return check_order_name(self.order)
        rows = [row for row in self.order if not isinstance(row, int)]
        if rows and len(rows) != self.num_images:
            raise UsageError(f"order: {len(rows)} given for {self.num_images} images; give one, or one for each")
        if tokens is not None:
            for i, row in enumerate(rows):
                check_permutation(row, tokens, f"order[{i}]")
            if not rows:
                check_permutation([p for p in self.order if isinstance(p, int)], tokens)

    @property
    def num_images(self) -> int:
        return len(self.class_labels) * self.num_images_per_label

    def image_seeds(self) -> list[int]:
        if self.seeds is not None:
            return list(self.seeds)
        return [derive_seed(self.seed, i) for i in range(self.num_images)]

    def image_labels(self) -> list[Label]:
        """The label of each image: all of the first label, then all of the second, ..."""
        return [label for label in self.class_labels for _ in range(self.num_images_per_label)]


def seeds_of(generators: Any, images: int) -> tuple[int, ...]:
    """A seed for each image, drawn from torch's generators: one for all, or a list with one an image."""
    many = list(generators) if isinstance(generators, (list, tuple)) else [generators] * images
    if not all(isinstance(each, torch.Generator) for each in many):
        raise UsageError(f"generator: {generators!r} is not allowed; give one of torch's, or a list with one an image")
    if len(many) != images:
        raise UsageError(f"generator: {len(many)} given for {images} images; give one, or one for each")
    return tuple(int(torch.randint(2**62, (), generator=each, device=each.device).item()) for each in many)


def fitted(request: SampleRequest, tokens: int, order: str | None = None) -> SampleRequest:
    """The request for a model with this many tokens; `order` is that of a model that draws one token a step."""
    return clamped(request, tokens) if order is None else one_a_step(request, tokens, order)


def one_a_step(request: SampleRequest, tokens: int, order: str) -> SampleRequest:
    """The request for a model that draws one token a step, in its own order: what isn't said follows from that."""
    own = {"num_inference_steps": tokens, "order": order}
    request = request.model_copy(update={k: v for k, v in own.items() if k not in request.model_fields_set})
    check_one_a_step(request.num_inference_steps, tokens, request.token_schedule, request.min_tokens)
    if request.order == CONFIDENCE:
        raise UsageError("order: 'confidence' asked of a causal model, which draws one token a step; leave it out")
    if order == RASTER and request.order != RASTER and not is_raster(request.order):
        raise UsageError(
            "order: a causal model of raster order draws in no other; leave it out, or train one with order=random"
        )
    return request


def is_raster(order: Any) -> bool:
    """Whether positions, or those of each image, count from 0."""
    if isinstance(order, str) or not order:
        return False
    return all(tuple(row) == tuple(range(len(row))) for row in (order if isinstance(order[0], tuple) else (order,)))


def clamped(request: SampleRequest, tokens: int) -> SampleRequest:
    """The request for a model with this many tokens; more steps than they need are clamped, with a warning."""
    most = math.ceil(tokens / request.min_tokens)
    if request.num_inference_steps <= most:
        return request
    fewer = request.model_copy(update={"num_inference_steps": most})
    if "num_inference_steps" not in request.model_fields_set:  # nobody asked for so many
        return fewer
    tokens_of = f"{tokens} tokens" if request.min_tokens == 1 else f"{tokens} tokens at {request.min_tokens} a step"
    warnings.warn(
        f"num_inference_steps: {request.num_inference_steps} is more than the model's {tokens_of}; using {most}",
        stacklevel=caller_level(),
    )
    return fewer
