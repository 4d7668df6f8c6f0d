"""A request holds everything that affects an image, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, StrictInt, model_validator

from seriatim.core.errors import UsageError, nearest
from seriatim.core.names import as_text
from seriatim.core.orders import CONFIDENCE, check_permutation
from seriatim.core.random import derive_seed
from seriatim.core.settings import Settings
from seriatim.core.terminal import warn
from seriatim.core.validation import parse
from seriatim.models.base import SequenceModel
from seriatim.models.registry import HEADS
from seriatim.sampling.draw import STEPS as HEAD_STEPS
from seriatim.sampling.parallel import STEPS

MOST_IMAGES = 1 << 20  # in one request, because all their tokens are in memory together

Label = Annotated[
    Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | str | None,
    BeforeValidator(lambda label: as_text(label) if isinstance(label, str) else label),
]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Images = Annotated[StrictInt, Field(ge=1, le=MOST_IMAGES)]


def head_option_names() -> set[str]:
    """The names of the options of all registered heads. A call may give them as settings, as in `pipe(top_k=5)`."""
    return {f.name for head in HEADS.values() for f in dataclasses.fields(head.Options)}


def request_fields() -> list[str]:
    """The names of all settings of a request, including head options."""
    return [*SampleRequest.model_fields, *sorted(head_option_names())]


def gathered(values: Mapping[str, Any], options: Collection[str] = ()) -> dict[str, Any]:
    """The settings with head options moved into `head_options`; an option of None is left out.

    Head options are those named in `options`, and those of all registered heads.
    """
    result: dict[str, Any] = {}
    moved: dict[str, Any] = {}
    for name, value in values.items():
        is_option = name in options or (name not in SampleRequest.model_fields and name in head_option_names())
        (moved if is_option else result)[name] = value
    moved = {name: value for name, value in moved.items() if value is not None}
    return result | ({"head_options": {**(result.get("head_options") or {}), **moved}} if moved else {})


class SampleRequest(Settings):
    """What to generate, and how. The same request gives the same images."""

    class_labels: tuple[Label, ...] = Field(  # type checkers know a default by its keyword alone
        default=(None,), description="The classes to generate: each a number, a name, or None for no class."
    )
    num_images_per_label: Images = Field(default=1, description="The number of images of each class in class_labels.")
    seed: Seed = Field(
        default=0, description="The seed; image i depends on the pair (seed, i) unless `seeds` is given."
    )
    seeds: tuple[Seed, ...] | None = Field(default=None, description="A seed for each image; replaces `seed`.")

    @model_validator(mode="before")
    @classmethod
    def _head_options(cls, values: Any) -> Any:
        return gathered(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _of_these_images(self) -> SampleRequest:
        if not self.class_labels:
            raise ValueError("class_labels: is empty; give at least one class, or None")
        if self.num_images > MOST_IMAGES:
            raise ValueError(
                f"num_images_per_label: {self.num_images:,} images in all; ask for at most {MOST_IMAGES:,} at once"
            )
        if isinstance(self.order, tuple) and isinstance(self.order[0], tuple) and len(self.order) != self.num_images:
            raise ValueError(
                f"order: {len(self.order)} orders given for {self.num_images} images; give one, or one for each"
            )
        if self.seeds is not None and len(self.seeds) != self.num_images:
            raise ValueError(f"seeds: {len(self.seeds)} given for {self.num_images} images; give one for each")
        return self

    @property
    def num_images(self) -> int:
        """The number of images that the request asks for in all."""
        return len(self.class_labels) * self.num_images_per_label

    def image_seeds(self) -> list[int]:
        """A list with the seed of each image."""
        if self.seeds is not None:
            return list(self.seeds)
        return [derive_seed(self.seed, i) for i in range(self.num_images)]

    def part(self, images: Sequence[int]) -> SampleRequest:
        """The request for some of the images, by their numbers, which generates them as this one does.

        Without `seeds` the images go on after the last one: there the labels begin again with the first.
        """
        every, each = self.class_labels, self.num_images_per_label
        labels = tuple(every[i // each % len(every)] for i in images)
        seeds = tuple(derive_seed(self.seed, i) if self.seeds is None else self.seeds[i] for i in images)
        update = {"class_labels": labels, "num_images_per_label": 1, "seeds": seeds}
        order = self.order
        if isinstance(order, tuple) and isinstance(order[0], tuple):
            update["order"] = tuple(order[i] for i in images)
        return self.model_copy(update=update)


def seeds_of(generators: Any, images: int) -> tuple[int, ...]:
    """Seeds for `images` images, drawn from one torch.Generator, or from a list with one for each image."""
    many = list(generators) if isinstance(generators, (list, tuple)) else [generators] * images
    if not all(isinstance(each, torch.Generator) for each in many):
        raise UsageError(f"generator: {generators!r} is not allowed; give a torch.Generator, or one for each image")
    if len(many) != images:
        raise UsageError(f"generator: {len(many)} generators given for {images} images; give one, or one for each")
    return tuple(int(torch.randint(2**62, (), generator=each, device=each.device).item()) for each in many)


def left_out(defaults: Mapping[str, Any], model: SequenceModel) -> list[str]:
    """The head options among a model's default settings that its head does not have."""
    options = {f.name for f in dataclasses.fields(model.head.Options)}
    return sorted(set(gathered(defaults, options).get("head_options", {})) - options)


def resolved(values: Mapping[str, Any], defaults: Mapping[str, Any], model: SequenceModel) -> SampleRequest:
    """The request for a model from a caller's settings, with the model's defaults filled in and everything checked.

    Raises UsageError that names the setting if it would have no effect, or is a head option that the model's head does
    not have. Defaults that the head does not have are left out.
    """
    options = {f.name for f in dataclasses.fields(model.head.Options)}
    given, usual = gathered(values, options), gathered(defaults, options)
    kept = {name: value for name, value in usual.get("head_options", {}).items() if name in options}
    merged = {**usual, **given, "head_options": {**kept, **given.get("head_options", {})}}
    for name in merged:
        if name not in SampleRequest.model_fields:
            raise UsageError(f"unknown key {name!r}{nearest(name, {*SampleRequest.model_fields, *options})}")
    return fitted(parse(SampleRequest, merged, error=UsageError), model, {*given, *given.get("head_options", {})})


def fitted(request: SampleRequest, model: SequenceModel, given: Collection[str] = ()) -> SampleRequest:
    """The request with steps and order filled in for this model; raises UsageError if the model can't follow it.

    `given` names the settings that the caller gave, which are refused if they would have no effect.
    """
    head, order = model.head, request.order
    model.check_settings(request)
    if isinstance(order, tuple):
        for i, row in enumerate(order):
            if isinstance(row, tuple):
                check_permutation(row, model.tokens, f"order[{i}]")
        if isinstance(order[0], int):
            check_permutation([p for p in order if isinstance(p, int)], model.tokens)
    unconditional = not model.classes and "caption_dim" not in model.conditioner.config
    anneals = HEAD_STEPS in {f.name for f in dataclasses.fields(head.Options)}
    reasons = {
        "guidance_scale": "the model is unconditional" if unconditional and request.guidance_scale != 1 else "",
        "choice_temperature": "only valid with order='confidence'" if order != CONFIDENCE else "",
        "num_diffusion_steps_last": "" if anneals else f"the {type(head).__name__} head has no steps to anneal",
    }
    for name, reason in reasons.items():
        if name in given and reason and getattr(request, name) is not None:
            raise UsageError(f"{name}: would have no effect ({reason}); leave it out")
    last = request.num_diffusion_steps_last
    if last is not None and anneals:
        first = getattr(head.options(**request.head_options), HEAD_STEPS)
        if last > first:
            raise UsageError(f"num_diffusion_steps_last: {last} is more than {HEAD_STEPS}; give at most {first}")
    most = model.tokens if model.one_by_one else math.ceil(model.tokens / request.min_tokens)
    steps = request.num_inference_steps
    if steps is None:
        steps = most if model.one_by_one else min(STEPS, most)
    elif steps > most:
        each = "" if request.min_tokens == 1 else f" at {request.min_tokens} a step"
        warn(f"num_inference_steps: {steps} is more than the model's {model.tokens} tokens{each}; using {most}")
        steps = most
    return request.model_copy(update={"num_inference_steps": steps, "order": model.order if order is None else order})
