"""`check_model` passes sound models and catches each way to break the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.backbones.causal_transformer import Causal
from seriatim.backbones.masked_transformer import Masked
from seriatim.heads.base import HeadLoss
from seriatim.heads.categorical import Categorical
from seriatim.heads.mixture import Mixture
from seriatim.models.base import SequenceModel
from seriatim.models.causal_model import CausalModel
from seriatim.models.masked_model import MaskedModel
from seriatim.testing import check_model


def masked(kind: Callable[..., Any] = MaskedModel) -> Any:
    backbone = Masked(4, 1, width=16, depth=1, heads=2, buffer=2, dropout=0.0)
    return kind(backbone, Mixture(1, 2, depth=0), classes=2)


def causal(order: str) -> SequenceModel:
    backbone = Causal(4, vocab=5, width=16, depth=1, heads=2, order=order)  # type: ignore[arg-type]
    return CausalModel(backbone, Categorical(5), classes=2)


@pytest.mark.parametrize("make", [masked, lambda: causal("raster"), lambda: causal("any")])
def test_our_own_pass(make: Callable[[], SequenceModel]) -> None:
    assert isinstance(check_model(make), SequenceModel)


class MeanLoss(MaskedModel):
    """Divides by the number of images, so that parts of a batch weigh too much."""

    def losses(self, tokens: Tensor, *more: Any) -> HeadLoss:
        loss = super().losses(tokens, *more)
        return HeadLoss(loss.sum / len(tokens), loss.count, loss.parts)


class RandomLoss(MaskedModel):
    def losses(self, tokens: Tensor, *more: Any) -> HeadLoss:
        return super().losses(tokens + torch.randn(tokens.shape), *more)


class OtherLoop(MaskedModel):
    def steps(self, *arguments: Any, **more: Any) -> Any:
        for step in super().steps(*arguments, **more):
            step.replace(step.tokens + 0.1 * step.known[..., None])
            yield step


class LooksAtBatch(MaskedModel):
    def sample(self, condition: Any, *more: Any) -> Tensor:
        return super().sample(condition, *more) + 0.1 * len(condition)

    def steps(self, condition: Any, *more: Any) -> Any:
        for step in super().steps(condition, *more):
            yield step
        step.replace(step.tokens + 0.1 * len(condition))
        yield step


class ChangesKnown(MaskedModel):
    def sample(self, *arguments: Any, **more: Any) -> Tensor:
        return super().sample(*arguments, **more) * (2 if arguments[4] is not None else 1)

    def steps(self, *arguments: Any, **more: Any) -> Any:
        yield from super().steps(*arguments, **more)
        if arguments[4] is not None:
            *_, step = super().steps(*arguments, **more)
            step.replace(step.tokens * 2)
            yield step


class KeepsWeights(MaskedModel):
    kept: Tensor

    def steps(self, *arguments: Any, **more: Any) -> Any:
        bias = self.head.get_parameter("final.bias")
        if not hasattr(self, "kept"):
            object.__setattr__(self, "kept", bias.clone())
        now, bias.data = bias.data, self.kept.data
        yield from super().steps(*arguments, **more)
        bias.data = now


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (MeanLoss, "sums over parts|accumulating"),
        (RandomLoss, "differs with the same keys"),
        (OtherLoop, "the fast loop gives other tokens"),
        (LooksAtBatch, "differs alone and in a batch"),
        (ChangesKnown, "changes tokens that are known"),
    ],
)
def test_each_breach_is_caught(broken: Callable[..., Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_model(lambda: masked(broken))


def test_hidden_state_is_caught() -> None:
    with pytest.raises(AssertionError, match="keeps something of earlier weights"):
        check_model(lambda: masked(KeepsWeights))
