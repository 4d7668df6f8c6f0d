"""Choose among the sizes and models of `plan_table.py` the largest that sees enough images in the time, by measuring.

Shapes: B images, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seriatim.core.keys import Keys
from seriatim.models.base import Loss
from seriatim.models.build import build_model, parameter_count, seeded
from seriatim.nn.onednn_training import prepare_training
from seriatim.training.plan_table import BATCHES, COMPONENTS, Option
from seriatim.training.precision import fastest, seconds

TIMED, TIMED_ON_DEVICE = 16, 64  # images of a pass that is timed, on a CPU and on an accelerator
ENOUGH = 2.0  # seconds of passes by which dtype and threads are chosen
PASSES = 2  # of each option; the first one compiles
UPDATE = 1.1  # the time of a step, as a factor of that of its pass forward and backward


@dataclass(frozen=True)
class Sized(Option):
    """An option for pictures of a size that may not be its own."""

    @property
    def tokens(self) -> int:
        return (-(-self.size // self.patch)) ** 2

    def components(self, wanted: int, channels: int) -> int:
        """The features of a token, if a token of 4x4 pixels had so many as are `wanted`."""
        return max(1, min(channels * self.patch**2, wanted * self.patch**2 // 16))


@dataclass(frozen=True)
class Chosen:
    option: Sized
    images: int  # that a training sees
    parameters: int
    rate: float | None  # images a second, if they were measured


class Trial:
    """A model of an option, random tokens, and their loss."""

    def __init__(self, option: Sized, channels: int, classes: int, where: torch.device) -> None:
        self.size = TIMED if where.type == "cpu" else TIMED_ON_DEVICE
        side = round(option.tokens**0.5)
        dim = option.components(COMPONENTS[0], channels)
        with seeded(0):
            sizes: dict[str, Any] = {"tokens": option.tokens, "dim": dim, "grid": [side, side], "classes": classes}
            self.model = build_model(option.model, **sizes).to(where).train()
            self.tokens = torch.randn(self.size, option.tokens, dim).to(where)  # (B, L, D)
        if where.type == "cpu":
            prepare_training(self.model)
        self.labels = torch.arange(self.size) % classes if classes else None
        self.keys, self.step = Keys.of(0).fold(torch.arange(self.size)), Keys.of(0, "step")

    def loss(self, dtype: torch.dtype) -> Loss:
        with torch.autocast(self.tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss: Loss = self.model(self.tokens, self.labels, self.keys, self.step)
        return loss


def choose(
    options: Sequence[Sized], time: float, images: int | None, channels: int, classes: int, where: torch.device
) -> Chosen:
    """The last option that is worth its time, for a training of `time` seconds or of so many `images`.

    Options come from the fastest to the slowest, so none is measured after the first that would see too few images.
    """
    chosen: Chosen | None = None
    fast: tuple[str, int] | None = None
    for option in options:
        if images is not None and chosen is not None and images < option.worth:
            break
        trial = Trial(option, channels, classes, where)
        rate, seen = None, images
        if seen is None:
            if fast is None:
                choice = fastest("auto", "auto", where, trial.loss, ENOUGH)
                fast = choice.dtype, choice.threads
            took = min(seconds(fast, where, trial.loss) for _ in range(PASSES)) * UPDATE
            rate = trial.size / took
            seen = rounded(int(time * rate))
            if chosen is not None and seen < option.worth:
                break
        chosen = Chosen(option, seen, parameter_count(trial.model), rate)
    assert chosen is not None, "the first option is taken in any case"
    return chosen


def batch_for(images: int) -> int:
    """The images of a batch in a training of so many."""
    return [size for least, size in BATCHES if images >= least][-1]


def rounded(images: int) -> int:
    """So many images in whole batches, at least one."""
    size = batch_for(images)
    return max(1, images // size) * size
