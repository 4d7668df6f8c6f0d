"""Choose the dtype and the number of CPU threads for training by measuring them, unless they are given."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from seriatim.core.device import DTYPES, slow_in_bfloat16, synchronise
from seriatim.models.base import Loss

ROUNDS, FEWEST = 7, 3  # the largest and smallest number of timed passes of each candidate
ENOUGH = 10.0  # seconds of timed passes in all, after which only FEWEST rounds are made
HOPELESS = 4.0  # a candidate is left out when every pass of it took so many times as long as one of another's
NEARLY = 1.05  # fewer threads that take at most so many times as long as the fastest candidate are preferred


class Choice(NamedTuple):
    """The chosen dtype and threads, and what was measured if there were several candidates."""

    dtype: str
    threads: int
    seconds: dict[str, float]  # the median seconds of a pass of each candidate
    passes: dict[str, list[float]] = {}  # noqa: RUF012  # the seconds of each timed pass

    @property
    def name(self) -> str:
        return f"{self.dtype} with {self.threads} thread{'s' * (self.threads > 1)}"

    def __str__(self) -> str:
        figures = ", ".join(
            f"{name} {value:.3g} ({min(self.passes[name]):.3g} to {max(self.passes[name]):.3g} in "
            f"{len(self.passes[name])})"
            for name, value in self.seconds.items()
        )
        return f"{self.name}: median seconds of a pass forward and backward, timed in turns, are {figures}"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """A context in which torch uses `count` CPU threads; the former number is restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(
    dtype: str,
    count: int | str,
    device: torch.device,
    loss_of: Callable[[torch.dtype], Loss],
    enough: float = ENOUGH,
) -> Choice:
    """The dtype and the number of threads to use. A value of "auto" is replaced by the fastest in a few passes.

    The candidates take turns several times, in one direction and then in the other, and their medians are compared, so
    that a machine that is busy for a while slows all of them alike, and one slow pass decides nothing. On a CPU, one
    thread is a candidate: for small models it is nearly as fast as all threads, and if another process uses a core, two
    threads that wait for each other can be a hundred times slower (docs/log.md). Where both are about as fast, the
    fewer threads are taken. After `enough` seconds only the fewest rounds are made. A candidate that is several times
    as slow is timed once, and bfloat16 is no candidate on a CPU that only emulates it.
    """
    every = torch.get_num_threads()
    dtypes = [dtype]
    if dtype == "auto":
        dtypes = [name for name in DTYPES if name == "float32" or not slow_in_bfloat16(device)]
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
        if number >= FEWEST and sum(map(sum, times.values())) > enough:
            break
        for candidate in left if number % 2 == 0 else left[::-1]:
            times[candidate].append(seconds(candidate, device, loss_of))
        bound = HOPELESS * min(max(times[candidate]) for candidate in left)
        left = [candidate for candidate in left if min(first[candidate], *times[candidate]) <= bound]
    medians = {candidate: statistics.median(found) for candidate, found in times.items()}
    best = min(medians[candidate] for candidate in left)
    chosen = min((c for c in left if medians[c] <= NEARLY * best), key=lambda c: (c[1], medians[c]))
    names = {candidate: Choice(*candidate, {}).name for candidate in candidates}
    return Choice(
        *chosen,
        {names[candidate]: round(value, 6) for candidate, value in medians.items()},
        {names[candidate]: [round(value, 6) for value in found] for candidate, found in times.items()},
    )


def seconds(candidate: tuple[str, int], device: torch.device, loss_of: Callable[[torch.dtype], Loss]) -> float:
    """The seconds of one forward and backward pass with a candidate."""
    name, count = candidate
    with threads(count):
        begin = time.perf_counter()
        loss_of(DTYPES[name]).mean.backward()
        synchronise(device)
        return time.perf_counter() - begin
