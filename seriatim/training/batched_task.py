"""A task whose batches may be split into parts and shared by several processes: generators and tokenizers.

Shapes: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from seriatim.core.device import DTYPES
from seriatim.core.keys import Keys
from seriatim.data.base import ImageData, Position
from seriatim.data.loader import Batch, Loader, Share, batches_of
from seriatim.models.base import Loss
from seriatim.training.distributed import ALONE, World, replicated, synchronised
from seriatim.training.micro_batch import largest_fitting
from seriatim.training.state import RunState
from seriatim.training.task import Task


class BatchedTask(Task):
    """Reads the batches of a run, splits them, and gives every process the same number of passes."""

    model: nn.Module  # has the parameters that are trained
    net: nn.Module  # computes the loss: the model, or the model inside DDP
    where: torch.device
    probed = 0  # the number in the run of the first image that is tried for `micro_batch: auto`

    def set_up(self, recipe: Any, data: ImageData, model: nn.Module, where: torch.device) -> None:
        """Set what the methods below need; a constructor calls it first."""
        settings = recipe.training
        self.recipe, self.data, self.model, self.net, self.where = recipe, data, model, model, where
        self.world = ALONE
        self.total, self.accumulate = settings.images, settings.accumulate
        self.micro_batch = settings.micro_batch if isinstance(settings.micro_batch, int) else None
        self.keys, self.step_keys = Keys.of(recipe.seed, "train"), Keys.of(recipe.seed, "step")

    def spread(self, world: World) -> None:
        if world.size > 1:
            self.net = replicated(self.model, world.first(self.some_idle))
        self.world = world

    def some_idle(self) -> bool:
        """Whether some trained parameters, as those of somebody's own head, take no part in the loss."""
        self.trial()(torch.float32).sum.backward()
        idle = any(p.grad is None for p in self.model.parameters() if p.requires_grad)
        self.model.zero_grad(set_to_none=True)
        return idle

    def batches(self, run: RunState) -> Generator[Batch]:
        settings = self.recipe.training
        position, share = Position(*run.position), Share(self.world.rank, self.world.size)
        batches = batches_of(self.data, self.recipe.seed, run.seen, self.total, settings.batch_size, position, share)
        return iter(Loader(batches, settings.workers, pin=self.where.type == "cuda" and torch.cuda.is_available()))

    def probe(self) -> Batch:
        """The first batch of the run."""
        first = batches_of(self.data, self.recipe.seed, 0, self.total, self.recipe.training.batch_size)
        return next(iter(Loader(first, 0)))

    def trial(self) -> Callable[[torch.dtype], Loss]:
        probe = self.probe()
        return lambda dtype: self.loss(probe, self.slices(len(probe))[0], dtype)

    def largest_micro_batch(self, world: World) -> int:
        probe, settings = self.probe(), self.recipe.training
        dtype = DTYPES.get(settings.dtype, torch.float32)  # float32 takes most, if the dtype will be measured

        def loss_of(count: int, step: int) -> Loss:  # a model may draw for each step how many tokens are masked
            first = self.probed + step
            return self.loss(replace(probe, whole=range(first, first + len(probe))), slice(0, count), dtype)

        images = Share(0, world.size).of(len(probe)).stop
        replicas = world.size > 1 and not getattr(settings, "shard", False)
        copies = 3 if replicas else 2  # DDP copies gradients to buckets
        return largest_fitting(images, loss_of, self.parts.trained, self.where, world.local_size, copies)

    def losses(self, batch: Batch, dtype: torch.dtype) -> Iterator[Loss]:
        # All processes must go forward equally often, so one with fewer parts repeats its first and counts nothing.
        ours = [] if batch.spare else self.slices(len(batch))
        longest = Share(0, self.world.size).of(len(batch.whole))  # the first process has the most images
        rounds = len(self.slices(longest.stop))
        for number in range(rounds):
            with synchronised(self.net, last=number == rounds - 1):
                if number < len(ours):
                    yield self.loss(batch, ours[number], dtype)
                else:
                    loss = self.loss(batch, slice(0, 1), dtype)
                    yield Loss(loss.sum * 0, loss.count * 0, {name: value * 0 for name, value in loss.parts.items()})
