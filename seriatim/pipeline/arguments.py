"""The types of the keyword arguments of sampling, for type checkers and editors.

They are the fields of `SampleRequest` and the options of the packaged heads; a test keeps them equal. At run time the
request decides what is allowed. Put the options of a head of your own into `head_options`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class SettingsArgs(TypedDict, total=False):
    """The settings of a request except `class_labels`; `help(seriatim.SampleRequest)` tells units and defaults."""

    # What to draw
    num_images_per_label: int
    seed: int
    seeds: Sequence[int] | None
    # Steps over the image
    num_inference_steps: int | None
    token_schedule: str
    min_tokens: int
    order: str | Sequence[int] | Sequence[Sequence[int]] | None
    # Guidance and temperature
    guidance_scale: float
    guidance_schedule: str
    guidance_interval: Sequence[float] | None
    guidance_power: float | None
    temperature: float
    choice_temperature: float
    # The head
    head_options: Mapping[str, Any]
    num_diffusion_steps: int
    num_diffusion_steps_last: int | None
    start_timestep: int | None
    timesteps: Sequence[int] | None
    solver: str | None
    top_k: int | None
    top_p: float | None
    guidance_mode: str | None
    feature_schedule: str | None
