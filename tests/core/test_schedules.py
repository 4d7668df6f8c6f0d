"""Schedules: property tests, and the published numbers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seriatim.core import schedules as s
from seriatim.core.errors import UsageError
from seriatim.core.settings import Settings
from seriatim.core.validation import parse

sizes = st.integers(1, 400)


@given(tokens=sizes, data=st.data(), schedule=st.sampled_from(sorted(s.TOKEN_SCHEDULES)))
def test_every_step_takes_a_token_and_all_are_taken(tokens: int, data: st.DataObject, schedule: str) -> None:
    steps = data.draw(st.integers(1, tokens))
    counts = s.tokens_per_step(steps, tokens, schedule=schedule)
    assert len(counts) == steps and sum(counts) == tokens and min(counts) >= 1


@given(tokens=st.integers(2, 400), data=st.data(), schedule=st.sampled_from(sorted(s.TOKEN_SCHEDULES)))
def test_an_image_that_starts_with_known_tokens_is_finished(tokens: int, data: st.DataObject, schedule: str) -> None:
    unknown = data.draw(st.integers(0, tokens))
    steps = data.draw(st.integers(1, tokens))
    counts = s.tokens_per_step(steps, tokens, unknown, schedule)
    assert sum(counts) == unknown and min(counts) >= 0
    if 0 < steps <= unknown:
        assert min(counts) >= 1


def test_the_published_counts() -> None:
    """mar.md section 3: 256 tokens."""
    assert s.tokens_per_step(64, 256)[:24] == [1] * 13 + [2, 3, 2, 2, 3, 3, 3, 3, 3, 3, 4]
    assert s.tokens_per_step(32, 256)[:12] == [1, 1, 1, 2, 3, 4, 3, 5, 5, 6, 6, 7]
    assert s.tokens_per_step(32, 256)[-2:] == [13, 12]
    assert s.tokens_per_step(16, 256) == [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25]
    assert s.tokens_per_step(256, 256) == [1] * 256


@given(tokens=sizes, data=st.data(), schedule=st.sampled_from(sorted(s.TOKEN_SCHEDULES)))
def test_every_step_takes_its_least_until_none_are_left(tokens: int, data: st.DataObject, schedule: str) -> None:
    unknown, steps = data.draw(st.integers(0, tokens)), data.draw(st.integers(1, tokens + 9))
    least = data.draw(st.integers(1, tokens + 2))
    counts = s.tokens_per_step(steps, tokens, unknown, schedule, least)
    assert sum(counts) == unknown and len(counts) == steps
    left = unknown
    for count in counts:
        assert count >= min(least, left)
        left -= count
    if steps * least <= unknown:
        assert min(counts) >= least, "enough for all: no step is left without"


def test_a_least_of_one_changes_nothing_and_of_four_saves_the_slow_start() -> None:
    assert s.tokens_per_step(64, 256, min_tokens=1) == s.tokens_per_step(64, 256)
    assert s.tokens_per_step(64, 256, min_tokens=4) == [4] * 64
    assert s.tokens_per_step(64, 256, min_tokens=8) == [8] * 32 + [0] * 32
    few = s.tokens_per_step(32, 256, min_tokens=4)
    assert few[:9] == [4] * 9 and few[-4:] == s.tokens_per_step(32, 256)[-4:], "the end stays as it was"
    with pytest.raises(UsageError, match="min_tokens: 0 is not allowed"):
        s.tokens_per_step(4, 16, min_tokens=0)


def test_linear_takes_equally_many() -> None:
    assert s.tokens_per_step(8, 64, schedule="linear") == [8] * 8


def test_guidance() -> None:
    linear = Settings(guidance_schedule="linear")
    assert linear.guidance_at(2.9, 256, 256) == 1.0
    assert linear.guidance_at(2.9, 0, 256) == pytest.approx(1 + 1.9 * 255 / 256), "never the full scale"
    assert Settings(guidance_schedule="constant").guidance_at(4.0, 100, 256) == 4.0
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        Settings(guidance_schedule="linaer")


scales = st.floats(0, 20)
OPTIONS: dict[str, dict[str, Any]] = {
    "interval": {"guidance_interval": (0.3, 0.8)},
    "power-cosine": {"guidance_power": 2.5},
}


@given(scale=scales, tokens=st.integers(2, 400), schedule=st.sampled_from(sorted(s.GUIDANCE_SCHEDULES)))
def test_guidance_lies_between_none_and_full(scale: float, tokens: int, schedule: str) -> None:
    settings = Settings(guidance_schedule=schedule, **OPTIONS.get(schedule, {}))
    values = [settings.guidance_at(scale, unknown, tokens) for unknown in range(tokens, -1, -1)]
    assert all(min(1, scale) - 1e-9 <= value <= max(1, scale) + 1e-9 for value in values)
    assert values[-1] == values[-2], "the last step counts one token as unknown"
    if schedule != "interval":
        steps = [(b - a) * (1 if scale >= 1 else -1) for a, b in pairwise(values)]
        assert all(step >= -1e-9 for step in steps), "monotone"
    assert all(settings.guidance_at(1.0, unknown, tokens) == 1 for unknown in range(tokens))


@given(scale=scales, power=st.floats(0.1, 5))
def test_guidance_ends_at_the_full_scale(scale: float, power: float) -> None:
    """But for one token: of 4096."""
    cases: dict[str, dict[str, Any]] = {"linear": {}, "constant": {}, "power-cosine": {"guidance_power": power}}
    for schedule, options in cases.items():
        settings = Settings(guidance_schedule=schedule, **options)
        assert settings.guidance_at(scale, 0, 4096) == pytest.approx(scale, abs=0.01)


@given(scale=scales, ends=st.tuples(st.floats(0, 1), st.floats(0, 1)), unknown=st.integers(1, 256))
def test_outside_the_interval_the_scale_is_one(scale: float, ends: tuple[float, float], unknown: int) -> None:
    low, high = sorted(ends)
    inside = low <= (256 - unknown) / 256 <= high
    settings = Settings(guidance_schedule="interval", guidance_interval=(low, high))
    assert settings.guidance_at(scale, unknown, 256) == (scale if inside else 1.0)


def test_a_greater_power_guides_later() -> None:
    by_power = [Settings(guidance_schedule="power-cosine", guidance_power=power) for power in (0.5, 1, 2, 4)]
    at_half = [settings.guidance_at(5.0, 128, 256) for settings in by_power]
    assert at_half == sorted(at_half, reverse=True)
    assert at_half[1] == pytest.approx(3.0), "power 1: half of the way at the half"
    assert Settings(guidance_schedule="power-cosine").guidance_at(5.0, 256, 256) == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("intervall",), "guidance_schedule: 'intervall' is not known; did you mean 'interval'"),
        (("interval",), "guidance_interval: is missing; give the shares of known tokens"),
        (("interval", (0.5, 0.2)), "guidance_interval: (0.5, 0.2) is not allowed; it must be 0 <= low <= high <= 1"),
        (("interval", (0, 1.5)), "guidance_interval: (0.0, 1.5) is not allowed"),
        (
            ("linear", (0, 1)),
            "guidance_interval: only valid with guidance_schedule='interval' (got 'linear'); leave it out or change",
        ),
        (("constant", None, 2.0), "guidance_power: only valid with guidance_schedule='power-cosine' (got 'constant')"),
        (("power-cosine", None, 0.0), "guidance_power: 0.0 is not allowed; it must be above 0"),
    ],
)
def test_guidance_that_is_wrong_is_named(arguments: tuple[Any, ...], words: str) -> None:
    names = ("guidance_schedule", "guidance_interval", "guidance_power")
    with pytest.raises(UsageError) as caught:
        parse(Settings, dict(zip(names, arguments, strict=False)), error=UsageError)
    assert words in str(caught.value)


@given(st.floats(0, 1, exclude_max=True))
def test_mask_ratio_is_in_range(u: float) -> None:
    assert 0.7 <= s.mask_ratio(u) <= 1.0


def test_mask_ratio_has_the_published_distribution() -> None:
    """mar.md section 2, measured on the official code."""
    u = (torch.arange(20000) + 0.5) / 20000
    r = torch.tensor([s.mask_ratio(float(x)) for x in u], dtype=torch.float64)
    assert float(r.mean()) == pytest.approx(0.867, abs=5e-4)
    assert float(r.std()) == pytest.approx(0.0835, abs=5e-4)
    quantiles = [0.705, 0.745, 0.800, 0.874, 0.939, 0.976, 0.998]
    wanted = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)
    assert torch.allclose(r.quantile(wanted), torch.tensor(quantiles, dtype=torch.float64), atol=6e-4)
    assert float((256 * r).ceil().mean()) == pytest.approx(222.5, abs=0.1)


def test_learning_rate() -> None:
    assert [s.learning_rate(x, 100, 10) for x in (0, 5, 10, 100)] == [0, 0.5, 1, 1]
    assert s.learning_rate(55, 100, 10, "cosine") == pytest.approx(0.5)
    assert s.learning_rate(100, 100, 10, "cosine") == pytest.approx(0)
    with pytest.raises(UsageError):
        s.learning_rate(1, 2, 0, "step")


def test_ema_decay_warms_up() -> None:
    assert s.ema_decay(0, 0.9999) == pytest.approx(0.1)
    assert s.ema_decay(10**7, 0.9999) == 0.9999
    assert all(s.ema_decay(n, 0.999) <= s.ema_decay(n + 1, 0.999) for n in range(200))


def test_token_schedules_invert() -> None:
    for share, inverse in s.TOKEN_SCHEDULES.values():
        assert share(0) == pytest.approx(1) and share(1) == pytest.approx(0)
        assert all(math.isclose(inverse(share(u / 9)), u / 9, abs_tol=1e-9) for u in range(10))


@given(first=st.integers(1, 1000), last=st.integers(1, 1000), a=st.floats(0, 1), b=st.floats(0, 1))
def test_annealed_steps_go_from_the_first_to_the_last(first: int, last: int, a: float, b: float) -> None:
    assert s.annealed_steps(first, last, 0.0) == first and s.annealed_steps(first, last, 1.0) == last
    assert s.annealed_steps(first, None, a) == first == s.annealed_steps(first, first, a)
    low, high = sorted((a, b))
    ends = sorted((first, last))
    between = [s.annealed_steps(first, last, u) for u in (low, high)]
    assert ends[0] <= min(between) and max(between) <= ends[1]
    assert (between[1] - between[0]) * (last - first) >= 0, "it never turns back"
    assert abs(between[0] - (first + (last - first) * low)) <= 0.5, "linear"
