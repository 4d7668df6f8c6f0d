"""Options that a head does not have, or that are not finite, are refused in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from seriatim.core.errors import UsageError
from seriatim.heads.base import Head
from seriatim.heads.bins import Bins
from seriatim.heads.categorical import Categorical
from seriatim.heads.diffusion import Diffusion
from seriatim.heads.flow import Flow
from seriatim.heads.mixture import Mixture
from seriatim.heads.nested import Nested

HEADS: list[Head] = [
    Bins(dim=2),
    Categorical(5),
    Diffusion(2, width=8, depth=1),
    Flow(2, width=8, depth=1),
    Mixture(2, width=8),
    Nested(
        2,
        split={"kind": "features"},
        backbone={"kind": "causal", "width": 8, "depth": 1},
        head={"kind": "diffusion", "width": 8, "depth": 1},
    ),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_options_that_a_head_does_not_have(head: Head) -> None:
    head.check_options()
    others: dict[str, Any] = {"top_k": 3, "guidance_mode": "exact", "start_timestep": 5, "nosuch": 1}
    for name, value in others.items():
        if name not in head.sample_options:
            with pytest.raises(UsageError, match=rf"^{name}: the {type(head).__name__} head has no such setting"):
                head.check_options(**{name: value})


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
@pytest.mark.parametrize("temperature", [math.inf, math.nan, -1.0])
def test_temperatures_that_are_none(head: Head, temperature: float) -> None:
    with pytest.raises(UsageError, match=r"^temperature: "):
        head.check_options(temperature=temperature)
