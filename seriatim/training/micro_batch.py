"""How many images a process computes at once, `training.micro_batch`: a number, or the largest that fits into memory.

An update adds up the gradients of as many micro-batches as a batch has, so its result does not depend on their size,
except for rounding and for which elements dropout zeroes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from seriatim.core.construct import machine_memory
from seriatim.core.errors import ConfigError, ResourceError, is_out_of_memory
from seriatim.models.base import Loss

SHARE = 0.5  # of a CPU's available memory for what a forward pass keeps; the backward pass needs room of its own


def micro_batches(batch_size: int, micro_batch: int, processes: int = 1) -> int:
    """The number of micro-batches of each process in an update; raises ConfigError unless they fill the batch."""
    if batch_size % (micro_batch * processes):
        at_once = "" if processes == 1 else f" in each of {processes} processes"
        each, rest = divmod(batch_size, processes)
        allowed = "" if rest else f": {', '.join(map(str, divisors(each)))}"
        raise ConfigError(
            f"training.micro_batch: {micro_batch} images{at_once} do not divide training.batch_size {batch_size}; "
            + (f"use a divisor{allowed}" if allowed else f"use a batch size that {processes} processes divide")
        )
    return batch_size // (micro_batch * processes)


def divisors(number: int) -> list[int]:
    """The divisors of a number, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def largest_fitting(
    images: int, loss_of: Callable[[int], Loss], trained: Sequence[Tensor], device: torch.device
) -> int:
    """The largest divisor of `images`, those of one process in a batch, that memory allows as a micro-batch.

    `loss_of(n)` is the loss of n images, without side effects. On an accelerator, divisors are tried from the largest
    down, forward and backward, with room for the optimiser's two tensors for each weight, until one does not run out of
    memory. On a CPU, running out would end the process, so what the forward passes of one and of two images keep is
    counted, and SHARE of the memory that is available may be taken.

    Raises ResourceError if not even one image fits.
    """
    sizes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    if device.type == "cpu":
        fixed, each = kept_by_autograd(loss_of, images)
        room = SHARE * available_memory() - 3 * sizes  # the gradients and the optimiser's two tensors
        fitting = [count for count in divisors(images) if fixed + each * count <= room]
    else:
        room_of_optimiser = torch.empty(2 * sizes, dtype=torch.uint8, device=device)
        fitting = [next((count for count in reversed(divisors(images)) if fits(count, loss_of, trained)), 0)]
        del room_of_optimiser
    if not any(fitting):
        raise ResourceError(
            "training.micro_batch: not even one image at a time fits into memory; use a smaller model, or "
            "training.checkpoint_activations=true"
        )
    return max(fitting)


def fits(count: int, loss_of: Callable[[int], Loss], trained: Sequence[Tensor]) -> bool:
    """Whether the gradients of `count` images can be computed without running out of memory."""
    try:
        loss_of(count).mean.backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    finally:
        for parameter in trained:
            parameter.grad = None
    torch.accelerator.empty_cache()  # after the `except` clause, because the error holds tensors of the failed pass
    return False


def kept_by_autograd(loss_of: Callable[[int], Loss], images: int) -> tuple[float, float]:
    """The bytes that a forward pass keeps for the backward pass, as (fixed, for each image)."""
    one = kept_bytes(lambda: loss_of(1))
    if images < 2:
        return 0.0, float(one)
    each = max(0, kept_bytes(lambda: loss_of(2)) - one)
    return float(one - each), float(each)


def kept_bytes(forward: Callable[[], Loss]) -> int:
    """The bytes of all different tensors that a forward pass keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss  # only now, so that no memory was used twice
    return sum(sizes.values())


def available_memory() -> float:
    """The bytes that this process can still take: what the system says is available, or its control group's rest."""
    found = [machine_memory()]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        most, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        found += [int(most) - int(used)] if most.isdigit() else []
    except (OSError, ValueError):
        pass  # another system, or one without control groups
    return max(0.0, min(found))
