"""How long random numbers take: keys beside one generator for each image, in turn, on one thread of the CPU.

    python benchmarks/random_numbers.py
    python benchmarks/random_numbers.py --images 8 --repetitions 3

Milliseconds, medians of some repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from seriatim.core.keys import Keys
from seriatim.core.random import generator

Call = Callable[[], object]


class Generators:
    """The same draws from a generator of torch's for each row."""

    def __init__(self, seeds: Iterable[int]) -> None:
        self.each = [generator(seed) for seed in seeds]

    def uniform(self, *tail: int) -> Tensor:
        return torch.cat([torch.rand((1, *tail), generator=g) for g in self.each])

    def normal(self, *tail: int) -> Tensor:
        return torch.cat([torch.randn((1, *tail), generator=g) for g in self.each])

    def integers(self, high: int, *tail: int) -> Tensor:
        return torch.cat([torch.randint(high, (1, *tail), generator=g) for g in self.each])

    def permutation(self, n: int) -> Tensor:
        return torch.stack([torch.randperm(n, generator=g) for g in self.each])


def parts_of_keys(keys: Keys, parts: int) -> Call:
    """What a head that nests draws: two numbers for each part of a token."""

    def draw() -> None:
        for part in keys.split(parts):
            part.fold("component").uniform()
            part.fold("value").normal(1)

    return draw


def parts_of_generators(generators: Generators, parts: int) -> Call:
    def draw() -> None:
        for _ in range(parts):
            generators.uniform()
            generators.normal(1)

    return draw


def contestants(images: int) -> dict[str, tuple[Call, Call]]:
    """What is drawn: with keys, and with generators."""
    some = min(64, images)
    keys, others = Keys.of_seeds(range(images)), Generators(range(images))
    few, few_others = keys.select(slice(0, some)), Generators(range(some))
    one, one_other = keys.select(slice(0, 1)), Generators([0])
    return {
        f"uniform, {images} images": (keys.uniform, others.uniform),
        f"uniform, {images} images, from their seeds": (
            lambda: Keys.of_seeds(range(images)).uniform(),
            lambda: Generators(range(images)).uniform(),
        ),
        f"normal, {some} x 6144": (lambda: few.normal(6144), lambda: few_others.normal(6144)),
        f"integers, {some} x 64": (lambda: few.integers(1000, 64), lambda: few_others.integers(1000, 64)),
        f"permutation of 256, {some}": (lambda: few.permutation(256), lambda: few_others.permutation(256)),
        "two numbers for each of 16 parts, 1 row": (parts_of_keys(one, 16), parts_of_generators(one_other, 16)),
        f"two numbers for each of 16 parts, {some} rows": (
            parts_of_keys(few, 16),
            parts_of_generators(few_others, 16),
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=25)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    calls = contestants(options.images)
    took: dict[tuple[str, int], list[float]] = {(name, i): [] for name in calls for i in range(2)}
    for _ in range(1 + options.repetitions):
        for name, pair in calls.items():
            for i, call in enumerate(pair):
                begin = time.perf_counter()
                call()
                took[name, i].append(1000 * (time.perf_counter() - begin))
    lines = [f"{'':48}{'keys':>10}{'generators':>12}{'times':>8}"]
    for name in calls:
        keys, others = (statistics.median(took[name, i][1:]) for i in range(2))  # the first call warms up
        lines.append(f"{name:48}{keys:10.3f}{others:12.3f}{others / keys:8.1f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
