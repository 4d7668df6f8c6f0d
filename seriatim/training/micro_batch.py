"""Find how many images a process can compute at once, for `training.micro_batch: auto`.

An update adds up the gradients of all parts of a batch, so its result does not depend on their size, except for
rounding and for which elements dropout zeroes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from seriatim.core.construct import machine_memory
from seriatim.core.errors import ConfigError, ResourceError, is_out_of_memory
from seriatim.models.base import Loss

SHARE = 0.5  # of a CPU's available memory for what a forward pass keeps; the backward pass needs room of its own
STEPS = 8  # how many training steps are tried, since each may draw another number of masked tokens
LossOf = Callable[[int, int], Loss]  # (a number of images, the number of a step) -> their loss, without side effects


def largest_fitting(
    images: int,
    loss_of: LossOf,
    trained: Sequence[Tensor],
    device: torch.device,
    processes: int = 1,
    copies: int = 2,
) -> int:
    """The number of images that memory allows at once, of the `images` that one process has of a batch.

    Besides its gradient, training keeps `copies` numbers for each weight: the optimiser's two, and DDP's. On an
    accelerator, all images are tried forward and backward, with room for these copies, and then half as many, until
    memory does not run out. On a CPU, running out would end the process, so the bytes that the forward passes of one
    and of two images keep are counted, and the `processes` on this machine may take SHARE of the memory that is
    available. Raises ResourceError if not even one image fits.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    if device.type == "cpu":
        fixed, each = kept_by_autograd(images, loss_of)
        room = SHARE * available_memory() / processes - (1 + copies) * weights
        found = images if fixed + each * images <= room else int((room - fixed) // max(1.0, each))
    else:
        room_of_copies = torch.empty(copies * weights, dtype=torch.uint8, device=device)
        found = images
        while found and not fits(found, loss_of, trained):
            found = -(-found // 2) if found > 1 else 0
        del room_of_copies
    if found < 1:
        raise ResourceError(
            "training.micro_batch: not even one image at a time fits into memory; use a smaller model, or "
            "training.checkpoint_activations=true"
        )
    parts = -(-images // found)
    return -(-images // parts)  # as equal as they can be


def repeated(given: int | str | None, found: int | None) -> int | None:
    """The size that a recipe gives, or what was found when the run began. Raises ConfigError if nothing was."""
    if given == "auto" and found is None:
        raise ConfigError("training.micro_batch: 'auto' is looked for when a run begins, not later; give a number")
    return found if isinstance(given, str) else given


def fits(count: int, loss_of: LossOf, trained: Sequence[Tensor]) -> bool:
    """Whether the gradients of `count` images can be computed without running out of memory."""
    try:
        for step in range(STEPS):
            loss_of(count, step).mean.backward()
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


def kept_by_autograd(images: int, loss_of: LossOf) -> tuple[float, float]:
    """The bytes that a forward pass keeps for the backward pass, as (fixed, for each image), of the largest step."""
    one, two = (max(kept_bytes(lambda: loss_of(n, step)) for step in range(STEPS)) for n in (1, min(2, images)))  # noqa: B023
    each = max(0, two - one) if images > 1 else 0
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
