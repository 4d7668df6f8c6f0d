"""The settings that all samplers share, defined once.

The keyword arguments in Python, the options of the command line, the settings of evaluations and the fields of requests
all come from the fields of `Settings`. Options that only one kind of head has go into `head_options`, which the head
checks.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictInt, model_validator

from seriatim.core.errors import UsageError, check_known, nearest_part
from seriatim.core.orders import check_order_name
from seriatim.core.schedules import GUIDANCE_OPTIONS, GUIDANCE_SCHEDULES, TOKEN_SCHEDULES
from seriatim.core.validation import Strict


def order_value(value: Any) -> Any:
    """An order with its lists turned into tuples, which can be hashed; names and None are returned unchanged."""
    if value is None or isinstance(value, str):
        return value
    rows = value if isinstance(value, (list, tuple)) else ()
    nested = all(isinstance(row, (list, tuple)) for row in rows)
    positions = [p for row in rows for p in row] if nested else rows
    if not positions or any(type(p) is not int for p in positions):
        raise ValueError("must be a name, a list of positions, or such a list for each image")
    return tuple(tuple(row) for row in rows) if nested else tuple(rows)


Order = Annotated[str | tuple[int, ...] | tuple[tuple[int, ...], ...] | None, BeforeValidator(order_value)]


Steps = Annotated[StrictInt, Field(ge=1, le=1 << 20)]  # steps over an image; no image has more tokens than this
InnerSteps = Annotated[StrictInt, Field(ge=1, le=10_000)]  # denoising steps inside a head
Strength = Annotated[float, Field(ge=0, le=1e6)]  # a guidance scale or a temperature


def setting(default: Any, panel: str, description: str) -> Any:
    """A field of `Settings`; the help text of the command line lists it in `panel` with its description."""
    return Field(default, description=description, json_schema_extra={"panel": panel})


class Settings(Strict):
    """How images are sampled. A setting that is not given takes the model's default, or else the default below."""

    num_inference_steps: Steps | None = setting(
        None, "Steps", "Steps over the image. None means 64, or one step a token for a causal model."
    )
    token_schedule: str = setting("cosine", "Steps", "How many tokens each step generates: cosine or linear.")
    min_tokens: Steps = setting(1, "Steps", "The fewest tokens that a step generates, while so many are unknown.")
    num_diffusion_steps_last: InnerSteps | None = setting(
        None,
        "Steps",
        "Denoising steps at the end of the image; the number falls linearly from num_diffusion_steps to this. "
        "None means that it stays the same.",
    )
    order: Order = setting(
        None,
        "Order and temperature",
        "The order in which tokens are generated: random, raster, halton, spiral, confidence (codes only), or "
        "positions such as 3,1,0,2 (one list for all images, or one for each). None means the model's own order.",
    )
    choice_temperature: Strength = setting(
        4.5, "Order and temperature", "Noise on the confidence of codes, which falls to 0; only with order=confidence."
    )
    temperature: Strength = setting(
        1.0, "Order and temperature", "Values below 1 make samples sharper; 1 is the model's distribution."
    )
    guidance_scale: Strength = setting(1.0, "Guidance", "Classifier-free guidance scale w; 1 is no guidance.")
    guidance_schedule: str = setting(
        "linear", "Guidance", "Guidance over the image: linear, constant, interval or power-cosine."
    )
    guidance_interval: tuple[float, float] | None = setting(
        None,
        "Guidance",
        "The shares of known tokens, low and high, between which guidance is on; only with guidance_schedule=interval.",
    )
    guidance_power: float | None = setting(
        None,
        "Guidance",
        "A larger power makes guidance start later; only with guidance_schedule=power-cosine. None means 1.",
    )
    head_options: dict[str, Any] = Field(default_factory=dict, description="Options that only this kind of head has.")

    def __hash__(self) -> int:
        """A hash; only the names of the head options enter it, because their values may be lists."""
        return hash((*(value for name, value in self if name != "head_options"), frozenset(self.head_options)))

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        schedule, interval, power = self.guidance_schedule, self.guidance_interval, self.guidance_power
        check_known(TOKEN_SCHEDULES, nearest_part, token_schedule=self.token_schedule)
        check_known(GUIDANCE_SCHEDULES, nearest_part, guidance_schedule=schedule)
        for owner, name in GUIDANCE_OPTIONS.items():
            if getattr(self, name) is not None and schedule != owner:
                only = f"only valid with guidance_schedule={owner!r} (got {schedule!r})"
                raise UsageError(f"{name}: {only}; leave it out or change that")
        if schedule == "interval" and interval is None:
            raise UsageError(
                "guidance_interval: is missing; give the shares of known tokens between which guidance is on, such as "
                "0.2 and 1"
            )
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise UsageError(f"guidance_interval: {interval} is not allowed; it must be 0 <= low <= high <= 1")
        if power is not None and not 0 < power < math.inf:
            raise UsageError(f"guidance_power: {power!r} is not allowed; it must be above 0")
        if isinstance(self.order, str):
            check_order_name(self.order)
        return self

    def guidance_at(self, scale: float, unknown: int, tokens: int) -> float:
        """The guidance scale of a step after which `unknown` of `tokens` tokens are unknown; `scale` is the full scale.

        As in the published schedule, at least one token counts as unknown, even after the last step.
        """
        own = GUIDANCE_OPTIONS.get(self.guidance_schedule)  # the name of the schedule's only setting
        value = None if own is None else getattr(self, own)
        schedule = GUIDANCE_SCHEDULES[self.guidance_schedule]
        return schedule(scale, max(1, unknown), tokens, *(() if value is None else (value,)))
