"""A task is a kind of model and its data, in the form that the engine trains."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seriatim.checkpoints.native import PARTS
from seriatim.core.errors import UsageError
from seriatim.core.stopping import StopRequest
from seriatim.data.base import ImageData
from seriatim.data.loader import Batch
from seriatim.models.base import Loss
from seriatim.training.distributed import World
from seriatim.training.log import MetricsLog
from seriatim.training.state import RunState, Trainables


@dataclass(frozen=True)
class Costs:
    """The seconds that a run spends beside its steps."""

    sample: float = 0.0  # to draw one more image of a preview
    look: float = 0.0  # of a preview, however few its images are
    judged: float = 0.0  # of the figures at each checkpoint
    test: float = 0.0  # of a test
    end: float = 0.0  # of what is done once, at the end


class Task(ABC):
    """What the engine must know about a kind of model and its data."""

    recipe: Any  # the engine replaces it by one that records everything measured or changed
    data: ImageData
    parts: Trainables
    total: int  # the number of images of the whole run
    accumulate = 1  # the number of forward and backward passes of each update, unless `micro_batch` says it
    micro_batch: int | None = None  # the number of images that one of these passes computes in each process
    splits = True  # whether `loss` can compute a part of a batch; otherwise it always computes the whole batch
    files: tuple[str, ...] = PARTS  # the files in the folder `model` that `finish` writes
    what = "a model"  # what that folder holds, for messages

    def check(self) -> None:  # noqa: B027
        """Raise an error, before anything is written, if a new run can't begin."""

    def check_resumed(self, path: Path) -> None:  # noqa: B027
        """Raise an error if the run can't go on from the checkpoint `path` with what the recipe names now."""

    def settle(self, recipe: Any) -> None:
        """Take the recipe with the amounts that were decided after the task was made."""
        self.recipe, self.total = recipe, recipe.training.images

    def costs(self, run: RunState, image: float, most: float) -> Costs:  # noqa: ARG002
        """What the run will spend beside its steps, if an image takes `image` seconds in a step.

        Measuring it may take about `most` seconds. All processes call this together.
        """
        return Costs()

    @abstractmethod
    def begin(self, stop: StopRequest) -> None:
        """Measure or read what training needs before its first step. It is not called when a run is resumed."""

    @abstractmethod
    def batches(self, run: RunState) -> Generator[Batch]:
        """Yield the batches that remain for the state `run`."""

    @abstractmethod
    def loss(self, batch: Batch, part: slice, dtype: torch.dtype) -> Loss:
        """The loss of the images `part` of a batch. Its `parts` are averaged like the loss and logged by name."""

    def standard(self, means: Mapping[str, float], before: float | None) -> float | None:
        """The loss that tells which checkpoint is best: of the means since the last line, or `before` without any."""
        return means.get("loss", before)

    @abstractmethod
    def trial(self) -> Callable[[torch.dtype], Loss]:
        """A function that computes the loss of a first batch in a given dtype and has no side effects."""

    def largest_micro_batch(self, world: World) -> int:
        """How many images a process can compute at once; called for `training.micro_batch: auto`."""
        raise NotImplementedError(f"{type(self).__name__} lacks largest_micro_batch()")

    def slices(self, size: int) -> list[slice]:
        """Slices that split `size` images of this process into equal parts, of which the last may be smaller."""
        step = self.micro_batch or -(-size // self.accumulate)
        return [slice(i, min(i + step, size)) for i in range(0, size, step)]

    def losses(self, batch: Batch, dtype: torch.dtype) -> Iterator[Loss]:
        """Yield the loss of each part of a batch; `gradients` goes backward through one before it takes the next."""
        for part in self.slices(len(batch)):
            yield self.loss(batch, part, dtype)

    def spread(self, world: World) -> None:
        """Prepare the model for training by several processes. Raises UsageError if this kind of model can't be."""
        if world.size > 1:
            raise UsageError(
                f"train: WORLD_SIZE={world.size} is set, but {self.what} is trained by one process; start it without "
                "torchrun"
            )

    @abstractmethod
    def nominal(self, batch: Batch) -> float:
        """The expected count of a batch's loss; gradients are scaled to the true count before clipping."""

    @abstractmethod
    def finish(self, run: RunState, log: MetricsLog) -> None:
        """Write the trained model and other results."""

    @abstractmethod
    def curves(self, log: MetricsLog) -> None:
        """Draw the curves of the log."""

    def settings_in_force(self) -> AbstractContextManager[None]:
        """A context with the settings of torch and of the model's modules that hold while the run lasts."""
        return contextlib.nullcontext()

    def config(self, run: RunState) -> Mapping[str, Any] | None:  # noqa: ARG002
        """The config of the model for checkpoints, so that they can be used without the run; None writes no config."""
        return None

    def updated(self) -> None:
        """Do what follows an update of the weights, in all processes."""
        return None

    def tested(self, run: RunState, *, last: bool) -> dict[str, float]:  # noqa: ARG002
        """Figures on test images for the next line of the log; empty if none are due."""
        return {}

    def judged(self, before: int, run: RunState, stop: StopRequest, *, last: bool) -> dict[str, float] | None:  # noqa: ARG002
        """Figures on images that are not trained on, for the log; empty if none are due since `before` images.

        All processes call this together. If one of them is asked to stop meanwhile, all give up and return None.
        """
        return {}

    def look(self, before: int, run: RunState, stop: StopRequest, *, last: bool) -> None:  # noqa: ARG002
        """Draw sample pictures if they are due since `before` images were seen; the `last` ones end the run."""
        return None
