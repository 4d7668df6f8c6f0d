"""In which dtype and with how many CPU threads to train: measured, where it isn't said."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from seriatim.core.device import DTYPES
from seriatim.models.base import Loss

ROUNDS, FEWEST = 5, 3  # timed passes forward and backward of each candidate
ENOUGH = 10.0  # seconds of timed passes after which no more rounds than the fewest are begun


class Choice(NamedTuple):
    """What to train with, and what it was chosen by: the median seconds of each candidate, where there were several."""

    dtype: str
    threads: int
    seconds: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.dtype} with {self.threads} thread{'s' * (self.threads > 1)}"

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.seconds.items())
        return f"{self.name}: median seconds of a pass forward and backward are {figures}"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` CPU threads inside; what there was before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(dtype: str, count: int | str, device: torch.device, loss_of: Callable[[torch.dtype], Loss]) -> Choice:
    """The dtype and the thread count to use; what is "auto" is the faster in a few passes.

    The candidates take turns, several times, and their medians are compared: a machine that is busy for a while slows
    all of them alike, and one slow pass decides nothing. One thread is a candidate on a CPU: for small models it is
    nearly as fast as all, and when another process wants a core, two threads that wait for each other can be a hundred
    times slower (docs/log.md).
    """
    every = torch.get_num_threads()
    dtypes = list(DTYPES) if dtype == "auto" else [dtype]
    if count != "auto":
        counts = [int(count)]
    else:
        counts = sorted({every, 1} if device.type == "cpu" else {every}, reverse=True)
    candidates = list(product(dtypes, counts))
    if len(candidates) == 1:
        return Choice(*candidates[0], {})
    for candidate in candidates:
        seconds(candidate, device, loss_of)  # what is made at the first pass is not timed
    times: dict[tuple[str, int], list[float]] = {candidate: [] for candidate in candidates}
    for number in range(ROUNDS):
        if number >= FEWEST and sum(map(sum, times.values())) > ENOUGH:
            break
        for candidate in candidates:
            times[candidate].append(seconds(candidate, device, loss_of))
    medians = {candidate: statistics.median(found) for candidate, found in times.items()}
    chosen = min(candidates, key=lambda candidate: medians[candidate])
    return Choice(*chosen, {Choice(*candidate, {}).name: round(value, 6) for candidate, value in medians.items()})


def seconds(candidate: tuple[str, int], device: torch.device, loss_of: Callable[[torch.dtype], Loss]) -> float:
    """Seconds of one pass forward and backward."""
    name, count = candidate
    with threads(count):
        begin = time.perf_counter()
        loss_of(DTYPES[name]).mean.backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - begin
