"""In which dtype and with how many CPU threads to train: measured, where it isn't said."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch

from seriatim.core.device import DTYPES
from seriatim.models.base import Loss

PASSES = 4  # forward and backward passes of each candidate; the first is warm-up
ENOUGH = 3.0  # seconds for one candidate


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` CPU threads inside; what there was before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(
    dtype: str, count: int | str, device: torch.device, loss_of: Callable[[torch.dtype], Loss]
) -> tuple[str, int]:
    """The dtype and the thread count to use; what is "auto" is the faster in a few passes.

    One thread is a candidate on a CPU: for small models it is nearly as fast as all, and when another process wants a
    core, two threads that wait for each other can be a hundred times slower (docs/log.md).
    """
    every = torch.get_num_threads()
    dtypes = list(DTYPES) if dtype == "auto" else [dtype]
    if count != "auto":
        counts = [int(count)]
    else:
        counts = sorted({every, 1} if device.type == "cpu" else {every}, reverse=True)
    candidates = list(product(dtypes, counts))
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda candidate: seconds(candidate, device, loss_of))


def seconds(candidate: tuple[str, int], device: torch.device, loss_of: Callable[[torch.dtype], Loss]) -> float:
    """Of the quickest pass."""
    name, count = candidate
    times: list[float] = []
    with threads(count):
        while len(times) < PASSES and sum(times) < ENOUGH:
            begin = time.perf_counter()
            loss_of(DTYPES[name]).mean.backward()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - begin)
    return min(times[1:] or times)
