"""True and false are not numbers, although Python and pydantic take them for 1 and 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import Field, StrictInt

from seriatim.core.construct import construct
from seriatim.core.errors import ConfigError, SeriatimError
from seriatim.core.settings import Settings
from seriatim.core.validation import Strict, parse
from seriatim.training.config import Training, read_recipe

NUMBERS = [name for name, field in Training.model_fields.items() if isinstance(field.default, (int, float))]
NUMBERS = [name for name in NUMBERS if not isinstance(Training.model_fields[name].default, bool)]


class Kinds(Strict):
    number: float = 1.0
    least: float = Field(0.5, ge=0)
    perhaps: float | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    count: StrictInt = 1
    switch: bool = False
    either: bool | Literal["full"] = True
    number_or_switch: float | bool = 2.0
    text: str = ""
    anything: Any = None


@pytest.mark.parametrize("name", ["number", "least", "perhaps", "count"])
@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(name: str, value: bool) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: must be a number, not true or false \(got {value}\)$"):
        parse(Kinds, {name: value})


def test_a_pair_of_numbers_holds_none_either() -> None:
    with pytest.raises(ConfigError, match=r"^pair: must be a number, not true or false"):
        parse(Kinds, {"pair": [0.25, True]})


def test_where_truth_values_are_meant_they_stay() -> None:
    kinds = parse(Kinds, {"switch": True, "either": False, "number_or_switch": True, "anything": [True]})
    assert kinds.switch is True and kinds.either is False and kinds.number_or_switch is True


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_of_a_recipe_is_a_truth_value(name: str) -> None:
    assert "learning_rate" in NUMBERS and "clip" in NUMBERS and "images" not in NUMBERS
    with pytest.raises(ConfigError) as caught:
        read_recipe("mar-digits", [f"training.{name}=true"])
    assert f"training.{name}: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["guidance_scale", "temperature", "guidance_power"])
def test_no_number_of_a_request_is_a_truth_value(name: str) -> None:
    with pytest.raises(SeriatimError, match=rf"^{name}: must be a number, not true or false"):
        parse(Settings, {name: True})


def build(width: int | list[int] = 8, ratio: float = 4.0, *, flip: bool = True, path: str = "a") -> Any:
    return width, ratio, flip, path


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"width": True}, r"^model\.width: must be a number"),
        ({"width": [8, True]}, r"^model\.width: must be a number"),
        ({"ratio": False}, r"^model\.ratio: must be a number"),
        ({"path": ""}, r"^model\.path: is empty; name a file or folder$"),
    ],
)
def test_no_number_of_a_part_is_a_truth_value(config: dict[str, Any], words: str) -> None:
    made: Callable[..., Any] = build
    with pytest.raises(ConfigError, match=words):
        construct(made, config, "model")
    assert construct(made, {"flip": False}, "model") == (8, 4.0, False, "a")


@pytest.mark.parametrize("name", ["init_from", "evaluate_features"])
def test_an_empty_path_is_not_taken_for_none(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{name}: is empty; name a path, or leave it out"):
        read_recipe("mar-digits", [f'training.{name}=""'])
