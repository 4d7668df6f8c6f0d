"""`check_head` passes a sound head and catches each way to break the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.keys import Keys
from seriatim.heads.base import Guidance, Head, HeadLoss, column
from seriatim.testing import check_head


class Gaussian(Head):
    """N(mean(z), std^2): the smallest sound head."""

    tempers = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output, self.config = dim, {"dim": dim}

    def bind(self, z_dim: int) -> None:
        if self.z_dim is None:
            self.mean = nn.Linear(z_dim, self.output)
            self.log_std = nn.Parameter(torch.zeros(self.output))
        super().bind(z_dim)

    @override
    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        error = -self.density(z).log_prob(target).sum(dim=1)
        return HeadLoss(error, torch.ones_like(error))

    def density(self, z: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.mean(z), self.log_std.exp(), validate_args=False)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        keys: Keys,
        plan: Any = None,  # noqa: ARG002
        z_null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        self.check_sampling(z_null, guidance, temperature)
        mean = self.mean(z)
        if guidance is not None and z_null is not None:
            mean = self.mean(z_null) + guidance.column * (mean - self.mean(z_null))
        return mean + column(temperature) * self.log_std.exp() * keys.normal(self.output)


def test_a_sound_head_passes() -> None:
    check_head(Gaussian, learn=False)


def test_a_head_that_cannot_represent_the_density_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"standard deviation|between the modes"):
        check_head(Gaussian)


class WrongShape(Gaussian):
    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        loss = super().loss(z, target, keys)
        return HeadLoss(loss.sum.mean(), loss.count)


class LooksAtOthers(Gaussian):
    def loss(self, z: Tensor, target: Tensor, keys: Keys) -> HeadLoss:
        return super().loss(z - z.mean(dim=0), target, keys)


class GlobalRandom(Gaussian):
    def sample(self, z: Tensor, keys: Keys, *a: Any, **k: Any) -> Tensor:
        return super().sample(z, keys, *a, **k) + 0 * torch.randn(len(z), 1)


class IgnoresKeys(Gaussian):
    @torch.no_grad()
    @override
    def sample(self, z: Tensor, keys: Keys, *a: Any, **k: Any) -> Tensor:
        return self.mean(z)


class KeepsState(Gaussian):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.hidden = torch.rand(1).item() if torch.empty(0).device.type != "meta" else 0.0

    def sample(self, z: Tensor, keys: Keys, *a: Any, **k: Any) -> Tensor:
        return super().sample(z, keys, *a, **k) + self.hidden


class WrongConfig(Gaussian):
    def __init__(self, dim: int, extra: int = 1) -> None:
        super().__init__(dim)
        self.config = {"dim": dim, "extra": extra + 1}


class IgnoresTemperature(Gaussian):
    def check_sampling(self, z_null: Tensor | None, guidance: Any, temperature: Any) -> None:
        super().check_sampling(z_null, guidance, abs(temperature))


class GuidesInSilence(Gaussian):
    guides = False

    @override
    def check_sampling(self, z_null: Tensor | None, guidance: Any, temperature: Any) -> None:
        super().check_sampling(None, None, temperature)


class ChecksNothingEarly(Gaussian):
    def check_options(self, options: Any, temperature: float = 1.0) -> None:
        pass


class TakesAnyOption(Gaussian):
    def options(self, **given: Any) -> Any:
        return given


class KeepsWeights(Gaussian):
    """Remembers the mean of the z that it saw first, as a cache would."""

    @torch.no_grad()
    def sample(self, z: Tensor, keys: Keys, *a: Any, **k: Any) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = self.log_std.detach().clone()
        return super().sample(z, keys, *a, **k) + self.kept - self.log_std


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (WrongShape, "has shape"),
        (LooksAtOthers, "depends on the other tokens"),
        (GlobalRandom, "global generator"),
        (IgnoresKeys, "ignores its keys"),
        (KeepsState, "keeps state outside"),
        (WrongConfig, "constructor's arguments"),
        (IgnoresTemperature, "negative temperature"),
        (ChecksNothingEarly, "check_options must refuse"),
        (TakesAnyOption, "must refuse an option"),
        (KeepsWeights, "keeps something of earlier weights"),
        (GuidesInSilence, "must refuse|negative temperature"),
    ],
)
def test_each_breach_is_caught(broken: Callable[..., Head], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_head(broken, learn=False)
