"""Decide what becomes of a batch whose loss or gradient is not finite: the run stops, or goes on without the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seriatim.core.errors import NumericsError
from seriatim.core.terminal import say
from seriatim.data.base import ImageData
from seriatim.data.loader import Batch
from seriatim.training.config import Common
from seriatim.training.distributed import World
from seriatim.training.state import RunState


class FiniteGuard:
    """Checks the loss and the gradient of each step before anything is updated.

    All processes decide the same, because the values that they check are those of all processes together.
    """

    def __init__(self, settings: Common, data: ImageData, model: nn.Module, cure: str, world: World) -> None:
        self.settings, self.data, self.cure, self.world = settings, data, cure, world
        # The forward pass changes buffers such as the statistics of batch norm, which a skipped batch must not.
        self._buffers = list(model.buffers()) if settings.on_nan == "skip" else []
        self._kept: list[Tensor] = []

    def begin_step(self) -> None:
        """Keep what the forward pass may change."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    def skips(self, run: RunState, batch: Batch, loss: float, norm: float) -> bool:
        """Whether the batch is to be skipped, which is counted in `run` and reported.

        Raises NumericsError if `training.on_nan` is "stop", or if `training.max_skips` batches in a row were skipped.
        """
        wrong = next(((what, x) for what, x in (("loss", loss), ("gradient", norm)) if not math.isfinite(x)), None)
        if wrong is None:
            run.skipped_in_a_row = 0
            return False
        what, value = wrong
        says = f"the {what} is not finite ({value}) after {run.seen} images, in the batch of images {self.named(batch)}"
        most = self.settings.max_skips
        if self.settings.on_nan == "stop":
            raise self.world.told(
                NumericsError(
                    f"{says}; nothing was updated; {self.cure}; training.on_nan=skip goes on without such batches"
                )
            )
        if run.skipped_in_a_row >= most:
            raise self.world.told(
                NumericsError(
                    f"{says}; nothing was updated, and the {most} batches before it were skipped too, which are all "
                    f"that training.max_skips allows in a row; {self.cure}"
                )
            )
        with torch.no_grad():
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(kept)
        run.skipped += 1
        run.skipped_in_a_row += 1
        if self.world.main:
            say(f"skipped a batch: {says}; number {run.skipped_in_a_row} of at most {most} in a row")
        return True

    def named(self, batch: Batch) -> str:
        """The names of the first images of a batch."""
        names = batch.names[:8] or [self.data.name(int(i)) for i in batch.index[:8]]
        return ", ".join(names) + (", ..." if len(batch.whole) > len(names) else "")
