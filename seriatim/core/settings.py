"""The settings that all samplers share, written out once.

Python's keyword arguments, the options of the command line, the settings of evaluations and the fields of requests all
come from the fields of `Settings`. What one head alone understands is in `head_options`, which the head checks.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictInt, model_validator

from seriatim.core.orders import check_order_name
from seriatim.core.schedules import check_guidance, check_token_schedule
from seriatim.core.validation import Strict


def order_value(value: Any) -> Any:
    """The name of an order as it is; positions, or a list of them for each image, as tuples."""
    if value is None or isinstance(value, str):
        return value
    rows = value if isinstance(value, (list, tuple)) else ()
    nested = all(isinstance(row, (list, tuple)) for row in rows)
    positions = [p for row in rows for p in row] if nested else rows
    if not positions or any(type(p) is not int for p in positions):
        raise ValueError("must be a name, a list of positions, or such a list for each image")
    return tuple(tuple(row) for row in rows) if nested else tuple(rows)


Order = Annotated[str | tuple[int, ...] | tuple[tuple[int, ...], ...] | None, BeforeValidator(order_value)]


Steps = Annotated[StrictInt, Field(ge=1, le=1 << 20)]  # over an image: one for each token of the largest
InnerSteps = Annotated[StrictInt, Field(ge=1, le=10_000)]  # inside a head
Strength = Annotated[float, Field(ge=0, le=1e6)]  # of guidance or temperature


def setting(default: Any, panel: str, description: str) -> Any:
    """A field of `Settings`; the command line lists it in `panel` with its description."""
    return Field(default, description=description, json_schema_extra={"panel": panel})


class Settings(Strict):
    """How images are sampled. A setting that is not given has the model's default, or else the one written here."""

    num_inference_steps: Steps | None = setting(
        None, "Steps", "Steps over the image. None: 64, or one for each token of a causal model."
    )
    token_schedule: str = setting("cosine", "Steps", "How many tokens each step generates: cosine or linear.")
    min_tokens: Steps = setting(1, "Steps", "Tokens of a step at least, while so many are unknown.")
    num_diffusion_steps_last: InnerSteps | None = setting(
        None,
        "Steps",
        "Denoising steps when all but the last tokens are known; they fall linearly from num_diffusion_steps. "
        "None: no annealing.",
    )
    order: Order = setting(
        None,
        "Order and temperature",
        "Which token comes when: random, raster, halton, spiral, confidence (codes only), or positions such as "
        "3,1,0,2, the first generated first, for all images or for each. None: the model's own.",
    )
    choice_temperature: Strength = setting(
        4.5, "Order and temperature", "Noise on the confidence of codes, falling to 0; only with order=confidence."
    )
    temperature: Strength = setting(1.0, "Order and temperature", "Below 1 is sharper; 1 is the model's distribution.")
    guidance_scale: Strength = setting(1.0, "Guidance", "Classifier-free guidance scale w; 1 is no guidance.")
    guidance_schedule: str = setting(
        "linear", "Guidance", "Guidance over the image: linear, constant, interval or power-cosine."
    )
    guidance_interval: tuple[float, float] | None = setting(
        None, "Guidance", "Known shares between which there is guidance; only with guidance_schedule=interval."
    )
    guidance_power: float | None = setting(
        None, "Guidance", "The larger, the later guidance sets in; only with guidance_schedule=power-cosine. None: 1."
    )
    head_options: dict[str, Any] = Field(default_factory=dict, description="Settings that the head declares.")

    def __hash__(self) -> int:
        """Equal settings have equal hashes; of head options, which may be lists, the names alone count."""
        return hash((*(value for name, value in self if name != "head_options"), frozenset(self.head_options)))

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        check_token_schedule(self.token_schedule)
        check_guidance(self.guidance_schedule, self.guidance_interval, self.guidance_power)
        if isinstance(self.order, str):
            check_order_name(self.order)
        return self
