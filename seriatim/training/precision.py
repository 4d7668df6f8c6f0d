"""Choose the dtype and the number of CPU threads for training by measuring them, unless they are given."""

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

ROUNDS, FEWEST = 5, 3  # the largest and smallest number of timed passes of each candidate
ENOUGH = 10.0  # seconds of timed passes in all, after which only FEWEST rounds are made
HOPELESS = 4.0  # a candidate is left out when every pass of it took so many times as long as one of another's


class Choice(NamedTuple):
    """The chosen dtype and threads, and the median seconds of each candidate if there were several."""

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
    """A context in which torch uses `count` CPU threads; the former number is restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(dtype: str, count: int | str, device: torch.device, loss_of: Callable[[torch.dtype], Loss]) -> Choice:
    """The dtype and the number of threads to use. A value of "auto" is replaced by the fastest in a few passes.

    The candidates take turns several times and their medians are compared, so that a machine that is busy for a while
    slows all of them alike, and one slow pass decides nothing. On a CPU, one thread is a candidate: for small models it
    is nearly as fast as all threads, and if another process uses a core, two threads that wait for each other can be a
    hundred times slower (docs/log.md). A candidate that is several times as slow, such as bfloat16 on a processor
    without instructions for it, is timed once.
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
    # The first pass also compiles and allocates, so it only counts in that a candidate may do better than it.
    first = {candidate: seconds(candidate, device, loss_of) for candidate in candidates}
    times: dict[tuple[str, int], list[float]] = {candidate: [] for candidate in candidates}
    left = candidates
    for number in range(ROUNDS):
        if number >= FEWEST and sum(map(sum, times.values())) > ENOUGH:
            break
        for candidate in left:
            times[candidate].append(seconds(candidate, device, loss_of))
        bound = HOPELESS * min(max(times[candidate]) for candidate in left)
        left = [candidate for candidate in left if min(first[candidate], *times[candidate]) <= bound]
    medians = {candidate: statistics.median(found) for candidate, found in times.items()}
    chosen = min(left, key=lambda candidate: medians[candidate])
    return Choice(*chosen, {Choice(*candidate, {}).name: round(value, 6) for candidate, value in medians.items()})


def seconds(candidate: tuple[str, int], device: torch.device, loss_of: Callable[[torch.dtype], Loss]) -> float:
    """The seconds of one forward and backward pass with a candidate."""
    name, count = candidate
    with threads(count):
        begin = time.perf_counter()
        loss_of(DTYPES[name]).mean.backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - begin
