"""The fast loop of each kind of model, under one call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch import Tensor

from seriatim.core.device import plain_torch
from seriatim.core.errors import UsageError
from seriatim.core.random import Noise
from seriatim.models.base import Model
from seriatim.models.captions import Captions
from seriatim.models.causal import CausalModel
from seriatim.models.masked import MaskedModel
from seriatim.sampling.causal import causal_steps
from seriatim.sampling.masked import Step, masked_steps

LOOPS: dict[type[Model], Callable[..., Iterator[Step]]] = {MaskedModel: masked_steps, CausalModel: causal_steps}


def steps_of(model: Model, labels: Tensor | Captions | None, noise: Noise, **settings: Any) -> Iterator[Step]:
    """Yield a `Step` after each step over a batch; labels (B,), a row of noise for each image."""
    for kind in type(model).__mro__:
        if kind in LOOPS:
            return LOOPS[kind](model, labels, noise, **settings)
    name = type(model).__name__
    raise UsageError(f"model: there is no loop for {name}; register one with LOOPS[{name}] = ...")


def one_by_one(steps: Generator[Step]) -> Iterator[Step]:
    """The same steps, each made with torch as it must be; between them the caller has it as it was."""
    try:
        while True:
            with plain_torch():
                step = next(steps, None)
            if step is None:
                return
            yield step
    finally:
        steps.close()
