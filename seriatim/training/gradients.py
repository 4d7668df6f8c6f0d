"""The gradients of one step: added up over parts of a batch and over processes, scaled by the count, and clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seriatim.models.base import Loss
from seriatim.training.distributed import ALONE, World, whole


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
    on the number of processes. The device is waited for twice: for the loss and for the norm.

    The parameters `apart`, which are among those `trained`, are clipped by a norm of their own.
    """
    sums: dict[str, Tensor] = {}
    for loss in losses:
        (loss.sum / nominal).backward()
        for name, value in (("loss", loss.sum), ("count", loss.count), *loss.parts.items()):
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    flag = torch.full((), float(stop), device=sums["loss"].device)
    values = world.total(torch.stack([flag, *sums.values()])).tolist()
    means = dict(zip(sums, values[1:], strict=True))
    count = means.pop("count")
    # The gradients are means over the processes of sums over their images.
    factor = nominal * world.size / count
    torch._foreach_mul_([parameter.grad for parameter in trained if parameter.grad is not None], factor)
    other = {id(parameter) for parameter in apart}
    norm = whole(torch.nn.utils.clip_grad_norm_([p for p in trained if id(p) not in other], clip)).item()
    if other:
        opponents = whole(torch.nn.utils.clip_grad_norm_(apart, clip)).item()
        norm = norm if math.isfinite(opponents) else opponents
    return Gradients({name: value / count for name, value in means.items()}, norm, values[0] > 0)
