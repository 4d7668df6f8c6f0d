"""Several processes that train one model together: who they are, what they agree on, and how the model is spread.

torchrun starts the processes. Each takes its share of every batch. Gradients are averaged over all of them by DDP, or
by FSDP2, which also keeps only a share of the weights, gradients and moments on each device. The first process alone
writes files. A training of one process communicates with nobody and imports none of this machinery.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from seriatim.core.device import pick_device
from seriatim.core.errors import ResourceError, SeriatimError, UsageError, one_line
from seriatim.core.processes import Place, place
from seriatim.training.meeting import store_of_this_start

T = TypeVar("T")

PATIENCE = timedelta(hours=6)  # how long processes wait for the first one, which may measure, sample or write


class World:
    """The processes of one training."""

    def __init__(self, where: Place, device: torch.device) -> None:
        self.rank, self.size, self.local_size = where.rank, where.size, where.local_size
        self.device = device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """The result of `work`, which the first process alone does. All processes raise its error, if it has one."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        found: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.main:
            try:
                found[0] = work()
            except SeriatimError as error:
                failure, found[1] = error, error
            except Exception as error:
                failure, found[1] = error, ResourceError("the first process failed; its message says why")
        dist.broadcast_object_list(found, src=0)
        if failure is not None:
            raise failure
        if found[1] is not None:
            raise self.told(found[1])
        result: T = found[0]
        return result

    def in_turn(self, work: Callable[[], T]) -> T:
        """The result of `work`, which the first process does before the others begin, as it may fill caches."""
        done: list[T] = []
        self.first(lambda: done.append(work()))
        if done:
            return done[0]
        with contextlib.redirect_stderr(io.StringIO()):  # the first process has said what there is to say
            return work()

    def told(self, error: SeriatimError) -> SeriatimError:
        """The error, which all processes raise, marked so that only the first one prints it."""
        error.told = not self.main
        return error

    def total(self, values: Tensor) -> Tensor:
        """The sum of the values over all processes."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        values = values.to(self.device, torch.float64)
        dist.all_reduce(values)
        return values

    def rows(self, values: Tensor) -> Tensor:
        """The rows of all processes, each of which gives equally many: (n, ...) -> (n * size, ...)."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values.contiguous())
        return torch.cat(found)

    def gathered(self, value: T) -> list[T]:
        """The values of all processes in their order, in the first process; the others get an empty list."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def copy_first(self, *modules: nn.Module) -> None:
        """Copy parameters and buffers of the first process to all others."""
        if self.size > 1:
            import torch.distributed as dist

            for module in modules:
                for tensor in module.state_dict().values():
                    dist.broadcast(tensor, src=0)


# DDP keeps a reference to the group of processes. Were that the last one, the group would be freed while Python's lock
# is held, and wait for ever for a thread of its own that needs the lock. So the last reference is this one.
_GROUP: list[Any] = []

ALONE = World(Place(0, 1, 0, 1), torch.device("cpu"))


@contextlib.contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of this process on its device. Processes that torchrun started are connected while the block lasts.

    A group that exists already, such as one that another launcher made, is used and left as it is. Raises UsageError if
    nothing says where the processes meet, and ResourceError if they can't be connected or one ends before the others.
    """
    where = place()
    if where.size == 1:
        yield World(where, pick_device(device))
        return
    import torch.distributed as dist

    picked = pick_device(device)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    made = not dist.is_initialized()
    if made:
        if not os.environ.get("MASTER_ADDR"):
            raise UsageError(
                f"WORLD_SIZE: {where.size} processes, but MASTER_ADDR does not say where they meet; start with "
                "torchrun, or unset WORLD_SIZE"
            )
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        try:
            store = store_of_this_start(where, PATIENCE)
            dist.init_process_group(backend, store=store, rank=where.rank, world_size=where.size, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:  # torch raises either for an address that it can't use
            raise ResourceError(
                f"process {where.rank} of {where.size} could not meet the others, whose first one MASTER_ADDR and "
                f"MASTER_PORT name; see what the others say, then go on with --resume ({one_line(error)[:120]})"
            ) from error
        _GROUP[:] = [dist.group.WORLD]
    try:
        yield World(where, picked)
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        raise ResourceError(
            f"another process of this training ended, and its message says why; this is process {where.rank} of "
            f"{where.size}; go on with --resume ({one_line(error)[:80]})"
        ) from error
    finally:
        if made:
            dist.destroy_process_group()


def lost_peer(error: RuntimeError) -> bool:
    """Whether the error of a collective operation means that another process has ended."""
    import torch.distributed as dist

    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process")
    return isinstance(error, dist.DistError) or any(each in str(error) for each in words)


# --- the model ----------------------------------------------------------------------------------------------------


def replicated(model: nn.Module, some_idle: bool) -> nn.Module:
    """The model inside DDP, whose `forward` must be called for the gradients to be averaged over the processes.

    `some_idle` tells whether some parameters take no part in the loss, for which DDP must look at each step.
    """
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, find_unused_parameters=some_idle)


def shard(model: nn.Module, blocks: nn.Module, world: World) -> None:
    """Shard the parameters of `model` over all processes in place, by FSDP2.

    The members of each ModuleList in `blocks` are gathered one after another, and everything else at once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in list(blocks.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def synchronised(net: nn.Module, last: bool) -> Iterator[None]:
    """A context for one of several passes forward and backward, of which the last averages over the processes."""
    spread: Any = net
    if hasattr(spread, "set_requires_gradient_sync"):
        spread.set_requires_gradient_sync(last)
    elif hasattr(spread, "no_sync") and not last:
        with spread.no_sync():
            yield
        return
    yield


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one, which all processes must ask for together."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, which every process has, sharded like another one if that is sharded."""
    sharded: Any = like
    if not hasattr(sharded, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
