"""Options that a head does not have, or that are not finite, are refused in one line."""

from __future__ import annotations

import dataclasses
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
from seriatim.models.build import build_head

CAUSAL = {"kind": "causal", "width": 8, "depth": 1, "head": {"kind": "diffusion", "width": 8, "depth": 1}}
HEADS: list[Head] = [
    Bins(dim=2),
    Categorical(5),
    Diffusion(2, width=8, depth=1),
    Flow(2, width=8, depth=1),
    Mixture(2, width=8),
    build_head({"kind": "nested", "split": {"kind": "features"}, "model": CAUSAL}, dim=2, vocab=None, z_dim=8),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_options_that_a_head_does_not_have(head: Head) -> None:
    head.check_options(head.options())
    has = {field.name for field in dataclasses.fields(head.Options)}
    others: dict[str, Any] = {"top_k": 3, "guidance_mode": "exact", "start_timestep": 5, "nosuch": 1}
    assert not others.keys() <= has
    for name, value in others.items():
        if name not in has:
            with pytest.raises(
                UsageError, match=rf"^{name}: the {type(head).__name__} head has no (such option|options)"
            ):
                head.options(**{name: value})


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
@pytest.mark.parametrize("temperature", [math.inf, math.nan, -1.0])
def test_temperatures_that_are_none(head: Head, temperature: float) -> None:
    with pytest.raises(UsageError, match=r"^temperature: "):
        head.check_options(head.options(), temperature)
