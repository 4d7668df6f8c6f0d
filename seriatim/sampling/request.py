"""The request: everything that affects an image, and nothing else."""

from __future__ import annotations

import warnings
from typing import Annotated

from pydantic import Field, StrictInt, model_validator

from seriatim.core.errors import caller_level
from seriatim.core.random import derive_seed
from seriatim.core.schedules import check_token_schedule, guidance_at
from seriatim.core.validation import Strict

Label = StrictInt | str | None
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]


class SampleRequest(Strict):
    """What to draw. The same request gives the same images."""

    class_labels: tuple[Label, ...] = (None,)  # a class each: its number, its name, or None for no class
    num_images_per_label: StrictInt = Field(1, ge=1)
    seed: Seed = 0  # image i has the seed hash(seed, i), unless `seeds` names one for each image
    seeds: tuple[Seed, ...] | None = None
    guidance_scale: float = Field(1.0, ge=0)
    guidance_schedule: str = "linear"
    num_inference_steps: StrictInt = Field(64, ge=1)  # over the image
    token_schedule: str = "cosine"
    temperature: float = Field(1.0, ge=0)
    num_diffusion_steps: StrictInt = Field(100, ge=1)  # inside a diffusion head
    num_diffusion_steps_last: StrictInt | None = Field(None, ge=1)  # when all but the last tokens are known; None: same
    solver: str = "ddpm"  # of a diffusion head: ddpm, ddim or dpm++
    start_timestep: StrictInt | None = Field(None, ge=0)  # None: the stable start; 999: as published

    @model_validator(mode="after")
    def _fits(self) -> SampleRequest:
        if not self.class_labels:
            raise ValueError("class_labels: is empty; name at least one class, or None")
        check_token_schedule(self.token_schedule)
        guidance_at(self.guidance_schedule, 1.0, 1, 1)
        first, last = self.num_diffusion_steps, self.num_diffusion_steps_last
        if last is not None and last > first:
            raise ValueError(f"num_diffusion_steps_last: {last} is not allowed; at most num_diffusion_steps, {first}")
        if self.seeds is not None and len(self.seeds) != self.num_images:
            raise ValueError(f"seeds: {len(self.seeds)} given for {self.num_images} images; give one for each")
        return self

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


def clamped(request: SampleRequest, tokens: int) -> SampleRequest:
    """The request for a model with this many tokens; more steps than tokens are clamped, with a warning."""
    if request.num_inference_steps <= tokens:
        return request
    warnings.warn(
        f"num_inference_steps: {request.num_inference_steps} is more than the model's {tokens} tokens; using {tokens}",
        stacklevel=caller_level(),
    )
    return request.model_copy(update={"num_inference_steps": tokens})
