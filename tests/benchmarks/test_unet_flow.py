"""The UNet that generators are compared with learns classes, is guided, and draws an image alike in any batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.core.errors import ConfigError, UsageError
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.models.base import SequenceModel
from seriatim.models.build import build_model, model_config, seeded

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from unet_flow import registered

SIDE = 4
CONFIG: dict[str, Any] = {
    "kind": "masked", "backbone": "class-only", "tokens": 1, "dim": SIDE * SIDE, "width": 8, "classes": 2,
    "head": {"kind": "unet", "channels": 1, "widths": [8, 8], "layers": 1, "attention": [1]},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    with registered():
        yield


def made(**head: Any) -> SequenceModel:
    with seeded(0):
        return build_model({**CONFIG, "head": {**CONFIG["head"], **head}})


@pytest.fixture(scope="module")
def trained(known: None) -> SequenceModel:  # noqa: ARG001
    """Trained on images whose left half is dark in class 0, and whose right half is in class 1."""
    model = made()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        keys = Keys.of(step).fold(torch.arange(32))
        labels = keys.fold("label").integers(2)
        loss = model(
            images_of(labels) + 0.1 * keys.fold("noise").normal(1, SIDE * SIDE), labels, keys, Keys.of(step)
        ).mean
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def images_of(labels: Tensor) -> Tensor:
    left = torch.arange(SIDE).lt(SIDE // 2).float().mul(-2).add(1).expand(SIDE, SIDE).reshape(1, 1, -1)
    return left * (1 - 2 * labels.float()).view(-1, 1, 1)  # (B, 1, D)


def drawn(model: SequenceModel, labels: list[int], seeds: list[int], **settings: Any) -> Tensor:
    options = {"num_diffusion_steps": 8, "bfloat16": False} | {k: settings.pop(k) for k in list(settings) if "_to" in k}
    asked = Settings(num_inference_steps=1, guidance_schedule="constant", head_options=options, **settings)
    condition = model.condition(torch.tensor(labels), len(labels))
    return model.sample(condition, model.null(len(labels)), Keys.of_seeds(seeds), asked)


def test_it_learns_classes(trained: SequenceModel) -> None:
    labels = [0, 1, 0, 1]
    found, wanted = drawn(trained, labels, [1, 2, 3, 4]), images_of(torch.tensor(labels))
    assert (found - wanted).abs().mean() < 0.3
    assert torch.equal(found.sign(), wanted)


def test_an_image_depends_on_its_seed_alone(trained: SequenceModel) -> None:
    alone, among = drawn(trained, [1], [7]), drawn(trained, [0, 1, 1], [5, 7, 8])
    assert torch.allclose(alone[0], among[1], atol=1e-5)
    assert not torch.allclose(among[1], among[2], atol=1e-2)


def test_guidance_moves_away_from_no_class_within_its_interval(trained: SequenceModel) -> None:
    plain, guided = (drawn(trained, [0, 1], [1, 2], guidance_scale=scale) for scale in (1.0, 3.0))
    assert not torch.allclose(plain, guided, atol=1e-3)
    never = drawn(trained, [0, 1], [1, 2], guidance_scale=3.0, guidance_to=-1.0)
    assert torch.allclose(plain, never, atol=1e-6)


def test_it_begins_with_zeros_and_is_built_again_from_its_config() -> None:
    model = made(patch=2, widths=[8], attention=[])
    x, t = torch.randn(3, SIDE * SIDE), torch.rand(3)
    assert torch.equal(model.head(x, t, torch.randn(3, 8)), torch.zeros(3, SIDE * SIDE))
    again = build_model(model_config(model))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dim": 15}, "15 numbers are no square image"),
        ({"tokens": 2}, "the whole image is one token"),
        ({"dim": 9}, "9 numbers are no square image that 2 levels of patch=1 can halve"),
    ],
)
def test_what_is_no_image_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_model({**CONFIG, **changes})


def test_wrong_options_are_refused(trained: SequenceModel) -> None:
    with pytest.raises(UsageError, match=r"solver: 'huen' is not known to the UNet.*heun"):
        trained.head.options(solver="huen")
    with pytest.raises(UsageError, match="num_diffusion_steps: 0 is not allowed"):
        trained.head.options(num_diffusion_steps=0)
