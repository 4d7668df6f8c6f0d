"""The types of the keyword arguments of sampling, for type checkers and editors.

They are the fields of `SampleRequest` and the options of the packaged heads; a test keeps them equal. At run time the
request decides what is allowed. Put the options of a head of your own into `head_options`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any, TypedDict, TypeVar, get_type_hints

import numpy as np
from torch import Tensor

Label = int | np.integer | str | None
ClassLabels = Label | Sequence[Label] | np.ndarray | Tensor  # one label, or several; None means no class
F = TypeVar("F", bound=Callable[..., Any])


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


class _Usual:
    """Stands in a signature for "the model's default", which only the model knows."""

    def __repr__(self) -> str:
        return "..."


def spelled_out(function: F) -> F:
    """Let `help()` and completion at run time name every setting of a function that takes `**settings`.

    Type checkers read the settings from `Unpack[SettingsArgs]`; Python's own signature would show `**settings` alone.
    """
    signature = inspect.signature(function)
    named = [each for each in signature.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    usual = _Usual()
    settings = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=usual, annotation=hint)
        for name, hint in get_type_hints(SettingsArgs).items()
        if name not in signature.parameters
    ]
    function.__signature__ = signature.replace(parameters=[*named, *settings])  # type: ignore[attr-defined]
    return function
