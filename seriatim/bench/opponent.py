"""What the bench asks of a sampler, ours or an official one; and the draws that make two of them comparable.

B images, L tokens, D features, N tokens asked for in a step, T steps inside the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.bench.timing import Stages
from seriatim.core.keys import Keys


@dataclass(frozen=True)
class Workload:
    """What is drawn: one batch."""

    labels: tuple[int, ...]  # one for each image; -1 for none
    steps: int
    guidance: float
    schedule: str = "linear"
    temperature: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)  # further settings, which the original hasn't
    head_options: Mapping[str, Any] = field(default_factory=dict)
    every: int = 1  # each so many steps are computed, the others skipped, and the time scaled; 1 where none can be
    last: bool = False  # the last step too, which holds most memory

    def computed(self) -> list[int]:
        """The steps that are computed: in the middle of each run of `every`."""
        middle = list(range(self.every // 2, self.steps, self.every)) or [self.steps // 2]
        return sorted({*middle, self.steps - 1}) if self.last else middle

    @property
    def factor(self) -> float:
        return self.steps / len(self.computed())


@dataclass
class Draws:
    """All random numbers of a run, in the order in which they were drawn."""

    orders: Tensor | None = None  # (B, L)
    normal: list[Tensor] = field(default_factory=list)  # each (T+1, N, D), or (N, D)


Pair = tuple[Tensor, Tensor]  # ours and the original's, which must be alike


class RecordingKeys(Keys):
    """Keys that give the same numbers as the given ones, and remember them."""

    def __init__(self, keys: Keys, draws: Draws) -> None:
        self.keys, self.draws, self.device = keys, draws, keys.device

    @cached_property
    def words(self) -> Tensor:  # type: ignore[override]
        return self.keys.words

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Keys:
        return RecordingKeys(self.keys.to(device), self.draws)

    def fold(self, data: int | str | Tensor) -> Keys:
        return RecordingKeys(self.keys.fold(data), self.draws)

    def select(self, rows: Tensor | slice) -> Keys:
        return RecordingKeys(self.keys.select(rows), self.draws)

    def split(self, count: int) -> tuple[Keys, ...]:
        return tuple(RecordingKeys(part, self.draws) for part in self.keys.split(count))

    def draw(self, kind: str, shape: tuple[int, ...], high: int = 0) -> Tensor:
        made = self.keys.draw(kind, shape, high)
        if kind == "normal":
            self.draws.normal.append(made.transpose(0, 1) if len(shape) == 2 else made)  # (T+1, N, D)
        elif kind == "permutation":
            self.draws.orders = made
        return made


class Opponent:
    """A sampler of one workload. Timed are the steps that the workload computes; `stages` are filled where asked."""

    name: str
    model: nn.Module
    dtype: str

    def sample(self, workload: Workload, draws: Draws, stages: Stages | None = None) -> tuple[Tensor, float]:
        """Draw a batch -> tokens (B, L, D), or codes (B, L), on the CPU, and seconds (scaled, where steps are skipped).

        Replays `draws` if they hold any; ours fills them otherwise.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks sample()")


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes (of an object, its name, what it is inside), put back afterwards."""
    missing = object()
    before = [(where, name, vars(where).get(name, missing)) for where, name, _ in changes]
    try:
        for where, name, value in changes:
            object.__setattr__(where, name, value) if isinstance(where, nn.Module) else setattr(where, name, value)
        yield
    finally:
        for where, name, value in reversed(before):
            if value is missing:
                delattr(where, name)
            else:
                setattr(where, name, value)


def timed(stages: Stages | None, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, its seconds added to a stage."""
    if stages is None:
        return function

    def call(*arguments: Any, **options: Any) -> Any:
        with stages.of(name):
            return function(*arguments, **options)

    return call
