"""Batches ahead of time, in the order of the run, the same with any number of workers.

B images, c channels, H x W pixels.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seriatim.core.random import derive_seed
from seriatim.training.data import ImageData, Order


@dataclass(frozen=True)
class Batch:
    first: int  # the run's image that comes first
    images: Tensor  # (B, c, H, W): uint8, or float in [-1, 1]
    labels: Tensor | None  # (B,)
    index: Tensor  # (B,) of the data set

    def __len__(self) -> int:
        return len(self.index)


class Batches(Dataset[Batch]):
    """Batch number n as a function of (data, seed, n) alone: images first + n B, ..., mirrored as their number says."""

    def __init__(self, data: ImageData, seed: int, first: int, total: int, batch_size: int) -> None:
        self.data, self.seed, self.first, self.total, self.batch_size = data, seed, first, total, batch_size
        self.order = Order(data.count, derive_seed(seed, "data"))

    def __len__(self) -> int:
        return -(-(self.total - self.first) // self.batch_size)

    def __getitem__(self, n: int) -> Batch:
        first = self.first + n * self.batch_size
        size = min(self.batch_size, self.total - first)
        index = self.order(first, size)
        images = self.data.images(index)
        if self.data.flips:
            mirrored = [derive_seed(self.seed, "flip", g) & 1 == 1 for g in range(first, first + size)]
            images = torch.where(torch.tensor(mirrored).view(-1, 1, 1, 1), images.flip(-1), images)
        return Batch(first, images, self.data.labels(index), index)


class Loader:
    """Iterates over `Batches`; `waited` is how many seconds the loop has waited for them."""

    def __init__(self, batches: Batches, workers: int) -> None:
        self.batches, self.workers = batches, workers
        self.waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        source: Any = DataLoader(
            self.batches,
            batch_size=None,  # the data set makes whole batches
            sampler=range(len(self.batches)),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=leave_signals_to_the_trainer,
            generator=torch.Generator(),  # so that torch's own is left alone
        )
        ready = iter(source)
        while True:
            begin = time.perf_counter()
            batch = next(ready, None)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


def leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches the whole process group: a worker must live until the trainer has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]; float images are in that range already."""
    return images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images
