"""`check_backbone` passes sound backbones and catches each way to break a contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seriatim.backbones.base import Backbone
from seriatim.backbones.causal_transformer import Causal
from seriatim.backbones.masked_transformer import Masked
from seriatim.conditions.base import Condition
from seriatim.testing import check_backbone

MASKED: dict[str, Any] = {"tokens": 9, "dim": 3, "width": 16, "depth": 1, "heads": 2, "buffer": 2, "dropout": 0.0}
CAUSAL: dict[str, Any] = {"tokens": 9, "dim": 3, "width": 16, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Masked(**MASKED),
        lambda: Masked(**{**MASKED, "dim": None, "vocab": 7, "grid": (1, 9), "width": (16, 24)}),
        lambda: Causal(**CAUSAL),
        lambda: Causal(**{**CAUSAL, "dim": None, "vocab": 7, "order": "any"}),
        lambda: Causal(**{**CAUSAL, "conditioning": "both", "norm": "layer", "positions": "learned", "dim": 1}),
    ],
    ids=["masked", "masked codes", "causal", "causal codes in any order", "causal scalars"],
)
def test_our_own_pass(make: Callable[[], Backbone]) -> None:
    assert isinstance(check_backbone(make), Backbone)


class LooksAtUnknown(Masked):
    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        return super().z(condition, tokens, known, ask, neighbours) + tokens.mean()


class LooksAtOthers(Masked):
    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        return super().z(condition, tokens, known, ask, neighbours) + known.float().mean()


class IgnoresCondition(Masked):
    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        return super().z(Condition(0 * condition.vectors), tokens, known, ask, neighbours)


class WrongNeighbours(Masked):
    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        z = super().z(condition, tokens, known, ask, neighbours)
        return z[:, [0, 2, 1, 3, 4]] if neighbours else z


class WrongOrder(Masked):
    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        return super().z(condition, tokens, known, ask, neighbours).flip(0)


class LooksAhead(Causal):
    def sequence(self, condition: Condition, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        return super().sequence(condition, tokens, order) + tokens.mean(dim=(1, 2))[:, None, None]


class ForgetsContent(Causal):
    def step(self, state: Any, content: Any = None, *valid: Any) -> Tensor:
        return super().step(state, content if content is None else 0 * content, *valid)


class IgnoresPadding(Causal):
    def step(self, state: Any, content: Any = None, *valid: Any) -> Tensor:
        return super().step(state, content, None, *valid[1:])


class SelectsOthers(Causal):
    def start(self, condition: Condition, order: Tensor | None = None) -> Any:
        state = super().start(condition, order)
        select = type(state).select
        state.select = lambda rows: select(state, rows if isinstance(rows, slice) else rows.flip(0))  # type: ignore[method-assign]
        return state


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (LooksAtUnknown, "looks at tokens that are not known"),
        (LooksAtOthers, "depends on the other images"),
        (IgnoresCondition, "ignores its condition"),
        (WrongNeighbours, "with neighbours: they are above"),
        (WrongOrder, "depends on|ignores known"),
        (LooksAhead, "looks ahead"),
        (ForgetsContent, "differs from sequence"),
        (IgnoresPadding, "fewer valid tokens|content"),
        (SelectsOthers, "selected or joined rows"),
    ],
)
def test_each_breach_is_caught(broken: Callable[..., Backbone], words: str) -> None:
    arguments = MASKED if issubclass(broken, Masked) else CAUSAL  # type: ignore[arg-type]
    with pytest.raises((AssertionError, ValueError), match=words):
        check_backbone(lambda: broken(**arguments))


def test_something_else_is_no_backbone() -> None:
    with pytest.raises(AssertionError, match="neither Parallel nor Sequential"):
        check_backbone(lambda: torch.nn.Linear(2, 2))
