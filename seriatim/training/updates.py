"""Updates of the weights: the clipped gradients of a loss that comes in parts, and training without a run folder.

`engine.fit` trains into a run folder. `updates` is for whoever decides after every update whether the training goes
on, such as a benchmark whose budget is a number of images or of seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from seriatim.checkpoints.unfinished import newest_whole
from seriatim.core.errors import NumericsError
from seriatim.models.base import Loss
from seriatim.training import state as checkpoints
from seriatim.training.distributed import ALONE, World, whole
from seriatim.training.optim import set_rate
from seriatim.training.state import RunState, Trainables

B = TypeVar("B")


class Gradients(NamedTuple):
    """What one step has computed. The gradients themselves are in the parameters."""

    means: dict[str, float]  # the means of the loss and its terms over all processes
    norm: float  # of the gradients before clipping
    stop: bool  # whether a process was asked to stop


def gradients(
    trained: Sequence[Tensor],
    losses: Iterable[Loss],
    nominal: float,
    clip: float,
    world: World = ALONE,
    *,
    stop: bool = False,
    apart: Sequence[Tensor] = (),
) -> Gradients:
    """Compute the clipped gradients of a loss that comes in parts.

    Each part is a sum over its own count. It is divided by the nominal count before the backward pass, and the
    gradients are corrected once all counts are known, so that the result depends neither on how the batch is split nor
    on the number of processes. The device is waited for once: everything that the host must know is read together.

    The parameters `apart`, which are among those `trained`, are clipped by a norm of their own.
    """
    sums: dict[str, Tensor] = {}
    for loss in losses:
        (loss.sum / nominal).backward()
        for name, value in (("count", loss.count), ("loss", loss.sum), *loss.parts.items()):
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    flag = torch.full((), float(stop), device=sums["loss"].device)
    totals = world.total(torch.stack([flag, *sums.values()])).unbind()
    # The gradients are means over the processes of sums over their images.
    factor = nominal * world.size / totals[1]
    torch._foreach_mul_([parameter.grad for parameter in trained if parameter.grad is not None], factor)
    other = {id(parameter) for parameter in apart}
    norm = whole(torch.nn.utils.clip_grad_norm_([p for p in trained if id(p) not in other], clip))
    if other:
        opponents = whole(torch.nn.utils.clip_grad_norm_(apart, clip))
        norm = torch.where(opponents.isfinite(), norm, opponents)
    size, stopped, count, *values = torch.stack([norm, *totals]).tolist()
    means = {name: value / count if count else math.nan for name, value in zip(list(sums)[1:], values, strict=True)}
    return Gradients(means, size, stopped > 0)


def updates(
    parts: Trainables,
    batch_of: Callable[[int], B],
    loss_of: Callable[[B, int], Loss],
    *,
    size: int,
    rate: Callable[[int], float],
    clip: float = math.inf,
    folder: Path | None = None,
    save_seconds: float = 60.0,
) -> Iterator[RunState]:
    """Train without end, and yield the state before the first update and after each one; the caller stops.

    `batch_of(n)` makes the batch of update n, of `size` images, and `loss_of(batch, n)` computes its loss, of which all
    random numbers depend on n alone. `rate(images)` is the learning rate of the update after which `images` were seen.
    The state counts images and updates; its `sums["seconds"]` are the processor time that updates took so far, and its
    `sums["loss"]` is the loss of the last update. Batches, checkpoints and whatever the caller does between two updates
    are not counted as time.

    With `folder`, a checkpoint is written there every `save_seconds`, and the newest whole one is gone on from.

    Raises NumericsError if a loss is not finite.
    """
    run = RunState(sums={"seconds": 0.0})
    if folder is not None:
        checkpoints.sweep(folder)
        newest, _ = newest_whole(folder)
        run = run if newest is None else checkpoints.load(newest, parts)
    saved = time.monotonic()
    while True:
        yield run
        if folder is not None and time.monotonic() - saved >= save_seconds:
            checkpoints.save(folder, parts, run)
            checkpoints.prune(folder, 1)
            saved = time.monotonic()
        batch = batch_of(run.steps)
        begin = time.process_time()
        set_rate(parts.optimiser, rate(run.seen + size))
        loss = loss_of(batch, run.steps)
        run.sums["loss"] = gradients(parts.trained, [loss], float(loss.count), clip).means["loss"]
        if not math.isfinite(run.sums["loss"]):
            raise NumericsError(f"the loss is not finite after {run.seen} images")
        parts.update()
        run.sums["seconds"] += time.process_time() - begin
        run.seen, run.steps = run.seen + size, run.steps + 1


def power_average(power: float) -> Callable[[Any, Any, Tensor | int], None]:
    """The weight average of Karras et al. 2024, whose width is a share of all updates whenever it is looked at.

    The share is about 10 % for power 8. It is the `multi_avg_fn` of torch's AveragedModel.
    """

    @torch.no_grad()
    def update(average: Any, current: Any, updates: Tensor | int) -> None:
        torch._foreach_lerp_(average, current, 1 - (1 - 1 / (int(updates) + 1)) ** power)

    return update
