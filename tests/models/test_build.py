"""From plain data to a model and back; registering a class of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import naive
from typing_extensions import override

from seriatim.core.errors import ConfigError
from seriatim.core.keys import Keys
from seriatim.heads.base import Head, HeadLoss
from seriatim.models.build import build_model, model_config, seeded
from seriatim.models.registry import HEADS
from seriatim.testing import check_head

CONFIG: dict[str, Any] = {
    "kind": "masked", "tokens": 4, "dim": 3, "width": 32, "depth": 1, "heads": 2, "buffer": 2, "classes": 2,
    "head": {"kind": "diffusion", "width": 16, "depth": 1},
}  # fmt: skip


def test_config_round_trip() -> None:
    model = build_model(CONFIG)
    full = model_config(model)
    assert model_config(build_model(full)) == full
    assert full["head"] == {"kind": "diffusion", "dim": 3, "width": 16, "depth": 1, "draws": 4, "train_steps": 1000}


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with seeded(1):
        a = build_model(CONFIG)
    assert torch.equal(before, torch.get_rng_state())
    with seeded(1):
        b = build_model(CONFIG)
    with seeded(2):
        c = build_model(CONFIG)
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.get_parameter("conditioner.no_class"), c.get_parameter("conditioner.no_class"))


def test_no_generator_of_another_device_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would seed those of all devices, which nobody puts back."""
    seeds: list[int] = []

    def spy() -> Callable[[int], None]:
        return lambda seed: seeds.append(seed)  # another object each time: PyTorch keeps a table of its functions

    for device, name in ((torch.cuda, "manual_seed_all"), (torch.xpu, "manual_seed_all"), (torch.mps, "manual_seed")):
        monkeypatch.setattr(device, name, spy())
    torch.manual_seed(5)
    assert seeds, "this test would not see it"
    seeds.clear()
    before = torch.get_rng_state()
    with seeded(1):
        torch.rand(1)
    check_head(HEADS["diffusion"], width=16, depth=1, learn=False)
    assert not seeds and torch.equal(before, torch.get_rng_state())


def test_the_generator_is_put_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        _ = 1 / 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "maskd"}, "model.kind: 'maskd' is not known; did you mean 'masked'"),
        ({"widht": 3}, "unknown key 'model.widht'; did you mean 'width'"),
        ({"head": {"kind": "diffusion", "widht": 3}}, "unknown key 'model.head.widht'; did you mean 'width'"),
        ({"head": {"kind": "difusion"}}, "model.head.kind: 'difusion' is not known; did you mean 'diffusion'"),
        ({"head": None}, "model.head: is required"),
        ({"backbone": "mask"}, "model.backbone: 'mask' is not known; did you mean 'masked'"),
        ({"heads": 5}, "model.heads: 5 does not divide the width 32"),
        ({"head": {"kind": "diffusion", "depth": 0}}, "model.head.depth: 0 is not allowed"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model({**CONFIG, **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_that_contradict_the_data_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.tokens: 4 does not fit"):
        build_model(CONFIG, tokens=16)


class Point(Head):
    """A head of a user's own: the mean, and nothing else."""

    guides = tempers = False

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.output, self.config, self.scale = dim, {"dim": dim, "scale": scale}, scale

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.linear = torch.nn.Linear(z_dim, self.output)
        super().bind(z_dim)

    @override
    def loss(self, z: torch.Tensor, target: torch.Tensor, keys: Keys) -> HeadLoss:
        error = (self.linear(z) - target).square().mean(dim=1)
        return HeadLoss(error, torch.ones_like(error))

    def sample(self, z: torch.Tensor, keys: Keys, *_: Any, **__: Any) -> torch.Tensor:
        return self.linear(z) + 0 * keys.normal(self.output)


def test_a_head_of_ones_own_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "point", Point)
    model = build_model({**CONFIG, "head": {"kind": "point", "scale": 2.0}})
    assert isinstance(model.head, Point) and model.head.scale == 2.0
    assert model_config(model)["head"] == {"kind": "point", "dim": 3, "scale": 2.0}
    loss = model(torch.randn(2, 4, 3), torch.tensor([0, 1]))
    loss.mean.backward()
    assert naive(model, torch.tensor([0]), Keys.of_seeds([0]), steps=2).shape == (1, 4, 3)


def test_an_unregistered_head_cannot_be_saved() -> None:
    from seriatim.backbones.masked_transformer import Masked
    from seriatim.models.masked_model import MaskedModel

    model = MaskedModel(Masked(4, 3, width=32, depth=1), Point(3))
    with pytest.raises(ConfigError, match=r"Point is not registered; add it with HEADS"):
        model_config(model)
