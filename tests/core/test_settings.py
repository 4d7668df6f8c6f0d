"""The settings that all samplers share: defaults, plain data, one line for what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from seriatim.core.errors import UsageError
from seriatim.core.settings import Settings
from seriatim.core.validation import parse


def test_nothing_given_is_no_guidance_and_the_models_own_order() -> None:
    settings = Settings()
    assert (settings.num_inference_steps, settings.order, settings.guidance_scale) == (None, None, 1.0)
    assert (settings.temperature, settings.head_options) == (1.0, {})


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("order", ["halton", [2, 0, 1], [[2, 0, 1], [0, 1, 2]]])
def test_they_survive_json(order: Any) -> None:
    settings = Settings(order=order, guidance_scale=2.5, head_options={"top_k": 3})
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_they_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().temperature = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temprature": 0.5}, "unknown key 'temprature'; did you mean 'temperature'"),
        ({"temperature": -0.1}, "temperature"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 2.0}, "num_inference_steps"),
        ({"min_tokens": 0}, "min_tokens"),
        ({"token_schedule": "cosin"}, "token_schedule: 'cosin' is not known; did you mean 'cosine'"),
        ({"order": "sprial"}, "order: 'sprial' is not known; did you mean 'spiral'"),
        ({"order": [0, True]}, "order: must be a name"),
        ({"guidance_schedule": "interval"}, "guidance_interval: is missing"),
        ({"guidance_power": 2.0}, "guidance_power"),
        ({"num_diffusion_steps_last": 0}, "num_diffusion_steps_last"),
        ({"choice_temperature": -1}, "choice_temperature"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(Settings, values, error=UsageError)
    assert words in str(caught.value) and "\n" not in str(caught.value)
