"""`check_backbone` passes sound backbones and catches each way to break a contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_groups import Groups

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
        lambda: Groups(9, dim=3),
        lambda: Groups(6, vocab=7),
    ],
    ids=["masked", "masked codes", "causal", "any order", "causal scalars", "groups", "groups of codes"],
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
    def step(self, state: Any, content: Any = None, *valid: Any, **ask: Any) -> Tensor:
        return super().step(state, content if content is None else 0 * content, *valid, **ask)


class IgnoresPadding(Causal):
    def step(self, state: Any, content: Any = None, *valid: Any, **ask: Any) -> Tensor:
        return super().step(state, content, None, *valid[1:], **ask)


class SelectsOthers(Causal):
    def start(self, condition: Condition, order: Tensor | None = None) -> Any:
        state = super().start(condition, order)
        select = type(state).select
        state.select = lambda rows: select(state, rows if isinstance(rows, slice) else rows.flip(0))  # type: ignore[method-assign]
        return state


class SilentlyTogether(Causal):
    """Answers for each of several tokens with z of the next one."""

    def step(self, state: Any, content: Any = None, *valid: Any, **asked: Any) -> Tensor:
        z = super().step(state, content, *valid)
        return z.expand(-1, asked["ask"].shape[1], -1) if "ask" in asked else z


class ClaimsGroups(Causal):
    groups = True


class SeesItsGroup(Groups):
    def sequence_of_groups(self, condition: Any, tokens: Tensor, order: Any, sizes: Sequence[int]) -> Tensor:
        z = super().sequence_of_groups(condition, tokens, order, sizes)
        return z + (0 if max(sizes) == 1 else tokens.mean(dim=(1, 2))[:, None, None])


class ShortGroups(Groups):
    def sequence_of_groups(self, condition: Any, tokens: Tensor, order: Any, sizes: Sequence[int]) -> Tensor:
        z = super().sequence_of_groups(condition, tokens, order, sizes)
        return z if max(sizes) == 1 else z[:, :-1]


class ForgetsGroups(Groups):
    def sequence_of_groups(self, condition: Any, tokens: Tensor, order: Any, sizes: Sequence[int]) -> Tensor:
        given = tokens if max(sizes) == 1 else 0 * tokens
        return super().sequence_of_groups(condition, given, order, sizes)


class SingleTokensDiffer(Groups):
    """One pass over groups of one token each is another one than over single tokens."""

    def sequence(self, condition: Condition, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        return super().sequence_of_groups(condition, tokens, order, [1] * self.tokens)

    def sequence_of_groups(self, condition: Any, tokens: Tensor, order: Any, sizes: Sequence[int]) -> Tensor:
        return super().sequence_of_groups(condition, tokens, order, sizes) + 1


class CausalInside(Groups):
    """The tokens of a group enter one after another, so that they don't see one another as in one pass."""

    def step(self, state: Any, content: Any = None, *valid: Any, **asked: Any) -> Tensor:
        if content is None or valid:
            return super().step(state, content, *valid, **asked)
        return [super(CausalInside, self).step(state, each, **asked) for each in content.split(1, dim=1)][-1]


class SortsRequests(Groups):
    def step(self, state: Any, content: Any = None, *valid: Any, **asked: Any) -> Tensor:
        z = super().step(state, content, *valid, **asked)
        if content is not None or "ask" not in asked:
            return z
        return z.gather(1, asked["ask"].argsort(1)[..., None].expand_as(z))


class CountsRequests(Groups):
    def step(self, state: Any, content: Any = None, *valid: Any, **asked: Any) -> Tensor:
        lone = content is None and not asked and state.counts[0] > 0
        return super().step(state, content, *valid, **asked) + (0.1 if lone else 0)


class MindsPadding(Groups):
    def step(self, state: Any, content: Any = None, *valid: Any, **asked: Any) -> Tensor:
        z = super().step(state, content, *valid, **asked)
        return z + asked["ask_valid"].float().mean() if "ask_valid" in asked else z


class PadsGroups(Groups):
    def step(self, state: Any, content: Any = None, *valid: Any, **asked: Any) -> Tensor:
        z = super().step(state, content, *valid, **asked)
        return z + (~valid[0]).float().mean() if valid else z


class IgnoresKnown(Masked):
    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        return super().z(condition, 0 * tokens, known, ask, neighbours)


class MindsAsked(Masked):
    def z(self, condition: Condition, tokens: Tensor, known: Tensor, ask: Tensor, neighbours: bool = False) -> Tensor:
        z = super().z(condition, tokens, known, ask, neighbours)
        return z if neighbours else z + ask.sum(dim=1)[ask.nonzero()[:, 0]][:, None]


class IgnoresTokens(Causal):
    def sequence(self, condition: Condition, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        return super().sequence(condition, 0 * tokens, order)


class NoCondition(Causal):
    def sequence(self, condition: Condition, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        return super().sequence(Condition(0 * condition.vectors), tokens, order)


class SelectsAll(Causal):
    def start(self, condition: Condition, order: Tensor | None = None) -> Any:
        state = super().start(condition, order)
        state.select = lambda rows: state  # type: ignore[method-assign]  # noqa: ARG005
        return state


class RequestsMove(Groups):
    def step(self, state: Any, content: Any = None, *valid: Any, **asked: Any) -> Tensor:
        z = super().step(state, content, *valid, **asked)
        state.condition = state.condition + (0.5 if asked else 0)
        return z


def spoiled(kind: type[Backbone], method: str, change: Callable[[Tensor], Tensor]) -> type[Backbone]:
    """A subclass whose `method` gives what `change` makes of the right result."""

    def changed(self: Backbone, *given: Any, **named: Any) -> Tensor:
        return change(getattr(kind, method)(self, *given, **named))

    return type("Spoiled", (kind,), {method: changed})


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
        (spoiled(Masked, "z", lambda z: z[:-1]), r"z has shape \(\d+, 16\), not"),
        (spoiled(Masked, "z", lambda z: z * float("inf")), "z is not finite"),
        (IgnoresKnown, "ignores known tokens"),
        (MindsAsked, "depends on what else is asked for"),
        (spoiled(Masked, "z", lambda z: z[:, :4] if z.ndim == 3 else z), "with neighbours has shape"),
        (spoiled(Causal, "sequence", lambda z: z[:, :-1]), r"sequence has shape \(4, 8, 16\)"),
        (IgnoresTokens, "ignores token 0"),
        (NoCondition, "ignores its condition"),
        (spoiled(Causal, "step", lambda z: z[:, 0]), r"step has shape \(4, 16\), not \(4, 1, 16\)"),
        (SelectsAll, "two selected rows has length 4"),
        (ShortGroups, r"sequence_of_groups has shape \(4, 8, 16\)"),
        (RequestsMove, "a request changes the state"),
        (SilentlyTogether, "gives z of several tokens, so set `groups`"),
        (ClaimsGroups, r"lacks sequence_of_groups\(\)"),
        (SingleTokensDiffer, "of single tokens differs"),
        (SeesItsGroup, "looks at its own tokens"),
        (ForgetsGroups, "ignores token 0 of an earlier group"),
        (CausalInside, r"with a group of \d differs from sequence_of_groups"),
        (SortsRequests, "depends on the order of the request"),
        (CountsRequests, "what else is requested"),
        (MindsPadding, "fewer valid requests"),
        (PadsGroups, "fewer valid tokens"),
    ],
)
def test_each_breach_is_caught(broken: Callable[..., Backbone], words: str) -> None:
    cases: dict[Any, dict[str, Any]] = {Masked: MASKED, Causal: CAUSAL, Groups: {"tokens": 9, "dim": 3}}
    arguments = next(given for kind, given in cases.items() if issubclass(broken, kind))  # type: ignore[arg-type]
    with pytest.raises((AssertionError, ValueError, NotImplementedError), match=words):
        check_backbone(lambda: broken(**arguments))


def test_too_few_tokens_show_too_little() -> None:
    with pytest.raises(AssertionError, match="has 4 tokens; make one of at least 5"):
        check_backbone(lambda: Groups(4, dim=1))


def test_something_else_is_no_backbone() -> None:
    with pytest.raises(AssertionError, match="neither Parallel nor Sequential"):
        check_backbone(lambda: torch.nn.Linear(2, 2))  # type: ignore[arg-type, return-value]
