"""Load batches ahead of time, in the order of the run. They are the same with any number of workers.

Where several processes train together, each loads its share of every batch: consecutive images of it.

Shapes: B images, c channels, H x W pixels.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from seriatim.core.errors import ConfigError, DataError, ResourceError, SeriatimError
from seriatim.core.plugins import after_plugins, plugin_files
from seriatim.core.random import derive_seed
from seriatim.core.terminal import say
from seriatim.data.base import BEGINNING, ImageData, Order, Position, Row, StreamData, mirror

ENOUGH = 100  # rows of a stream that are read before the share of unusable ones is judged
GRACE = 60.0  # seconds that a worker survives SIGTERM, so that the trainer can finish its step and save


class Share(NamedTuple):
    """The share of each batch that one of several processes loads."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """The slice of a batch of `count` images. All are equally long, but for the last ones, which may be empty."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))


ALL = Share()


@dataclass(frozen=True)
class Batch:
    """The images of a batch, or one process's share of them; where that share is empty, one image that counts nothing.

    All numbers in the run count the images of all processes.
    """

    first: int  # the number in the run of the first of these images
    images: Tensor  # (B, c, H, W): uint8, or float in [-1, 1]; moments (B, m, h, w) if the data are cached
    labels: Tensor | None  # (B,)
    index: Tensor  # (B,) the numbers in the data set; for a stream, the numbers in the run
    names: tuple[str, ...] = ()  # the names of a stream's images; other data know them by index
    after: Position = BEGINNING  # the position of a stream after this batch
    left_out: Mapping[str, str] = field(default_factory=dict)  # rows of a stream that can't be used, with reasons
    whole: range = range(0)  # the numbers in the run of all images of the batch
    spare: bool = False  # whether this process has no image of the batch, so that the one here counts nothing

    def __len__(self) -> int:
        return len(self.index)

    def pin_memory(self) -> Batch:
        """The batch with images in pinned memory, from which CUDA copies while the host goes on."""
        return replace(self, images=self.images.pin_memory())


class Sent:
    """What is sent to worker processes. Those that are not forked load the plug-ins before they read the data."""

    def __reduce__(self) -> tuple[Any, ...]:
        return after_plugins, (type(self), plugin_files()), self.__dict__


class Batches(Sent, Dataset[Batch]):
    """The batches of a run. Batch n holds the images first + n B, ... and depends on (data, seed, n) alone."""

    def __init__(self, data: ImageData, seed: int, first: int, total: int, batch_size: int, share: Share = ALL) -> None:
        self.data, self.seed, self.first, self.total, self.batch_size = data, seed, first, total, batch_size
        self.share = share
        self.order = Order(data.count, derive_seed(seed, "data"))

    def __len__(self) -> int:
        return -(-(self.total - self.first) // self.batch_size)

    def __getitem__(self, n: int) -> Batch:
        begin = self.first + n * self.batch_size
        whole = range(begin, min(begin + self.batch_size, self.total))
        ours = whole[self.share.of(len(whole))]
        numbers = ours or whole[:1]
        index = self.order(numbers.start, len(numbers))
        if self.data.flips:
            images = self.data.mirrored(index, coins(self.seed, numbers.start, len(numbers)))
        else:
            images = self.data.images(index)
        labels = self.data.labels(index)
        return Batch(numbers.start, images, labels, index, whole=whole, spare=not ours)


class InOrder(Batches):
    """Batches of the images first, ..., total - 1 in the order of the data, none of them mirrored."""

    def __init__(self, data: ImageData, first: int, total: int, batch_size: int) -> None:
        super().__init__(data, 0, first, total, batch_size)

    def __getitem__(self, n: int) -> Batch:
        first = self.first + n * self.batch_size
        whole = range(first, min(first + self.batch_size, self.total))
        index = torch.arange(whole.start, whole.stop)
        return Batch(first, self.data.images(index), self.data.labels(index), index, whole=whole)


class StreamBatches(Sent, IterableDataset[Batch]):
    """The batches of a run on a stream, read from `position` on. Batch n depends on (data, seed, n) alone.

    Each of several processes reads and decodes all rows, since the images of a batch are known only once it is known
    which rows can be used.
    """

    def __init__(
        self,
        data: StreamData,
        seed: int,
        first: int,
        total: int,
        batch_size: int,
        position: Position = BEGINNING,
        share: Share = ALL,
    ) -> None:
        self.data, self.seed, self.first, self.total, self.batch_size = data, seed, first, total, batch_size
        self.position, self.share = position, share

    def __iter__(self) -> Iterator[Batch]:
        rows, first, read, bad = self.data.rows(self.seed, self.position), self.first, 0, 0
        while first < self.total:
            good: list[Row] = []
            left_out = {}
            while len(good) < min(self.batch_size, self.total - first):
                row = next(rows)
                read += 1
                if row.why is None:
                    good.append(row)
                    continue
                left_out[row.name], bad = row.why, bad + 1
                if read >= ENOUGH and bad > self.data.max_bad * read:
                    raise DataError(
                        f"data: {bad} of {read} rows can't be used (the last: {row.name}: {row.why}); more than "
                        f"data.max_bad={self.data.max_bad:g}; repair or remove them, or raise data.max_bad"
                    )
            whole = range(first, first + len(good))
            mine = self.share.of(len(good))
            ours = good[mine] or good[:1]
            begin = whole[mine].start if good[mine] else first
            images = torch.from_numpy(np.stack([row.pixels for row in ours]))
            if self.data.flips:
                images = mirror(images, coins(self.seed, begin, len(ours)))
            labels = torch.tensor([row.label for row in ours]) if self.data.class_names else None
            names, index = tuple(row.name for row in ours), torch.arange(begin, begin + len(ours))
            yield Batch(begin, images, labels, index, names, good[-1].after, left_out, whole, not good[mine])
            first += len(good)


def coins(seed: int, first: int, count: int) -> Tensor:
    """A mask (count,) of the images of a run that are mirrored: a random half, which depends on their numbers alone."""
    return torch.tensor([derive_seed(seed, "flip", g) & 1 == 1 for g in range(first, first + count)])


def batches_of(
    data: ImageData,
    seed: int,
    first: int,
    total: int,
    batch_size: int,
    position: Position = BEGINNING,
    share: Share = ALL,
) -> Batches | StreamBatches:
    """The batches of images first, ..., total - 1 of a run, or one process's `share` of each."""
    if isinstance(data, StreamData):
        return StreamBatches(data, seed, first, total, batch_size, position, share)
    return Batches(data, seed, first, total, batch_size, share)


class WorkerLost(ResourceError):
    """A worker process died. The loader raises this between two steps, where the next batch is asked for."""


class Loader:
    """Iterates over batches, in pinned memory if `pin`. `waited` is how many seconds the training loop has waited."""

    def __init__(self, batches: Batches | StreamBatches, workers: int, *, pin: bool = False) -> None:
        if isinstance(batches, StreamBatches) and workers > 1:
            raise ConfigError(
                f"training.workers: {workers} is not allowed; at most one worker can read a stream: set 0 or 1"
            )
        self.batches, self.workers, self.pin = batches, workers, pin
        self.waited = 0.0

    def __iter__(self) -> Generator[Batch]:
        source: Any = DataLoader(
            self.batches,
            batch_size=None,  # the data set returns whole batches
            sampler=range(len(self.batches)) if isinstance(self.batches, Batches) else None,
            num_workers=self.workers,
            pin_memory=self.pin,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=leave_signals_to_the_trainer,
            generator=torch.Generator(),  # otherwise torch's global generator would be used
        )
        ready: Any = iter(source)
        # Torch's handler for dead workers could raise in the middle of an update. Without it the loss of a worker is
        # noticed where the next batch is asked for.
        torchs = silence_child_signals() if self.workers else None
        try:
            while (batch := self._next(ready)) is not None:
                if isinstance(self.batches, StreamBatches):
                    for name, why in batch.left_out.items():
                        say(f"left out: {name}: {why}")
                        self.batches.data.bad[name] = why
                yield batch
        finally:
            if self.workers:  # at once: an exception may keep them alive, and Python would wait for them at exit
                ready._shutdown_workers()
            if torchs is not None:
                signal.signal(signal.SIGCHLD, torchs)

    def _next(self, ready: Iterator[Batch]) -> Batch | None:
        begin = time.perf_counter()
        try:
            return next(ready, None)
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, SeriatimError) or not self.workers or not lost_worker(error):
                raise
            raise WorkerLost(
                "training.workers: a process that reads images was killed, as a rule because memory ran out; set "
                f"training.workers=0, or fewer than {self.workers}, or a smaller training.batch_size"
            ) from error
        except DataError as error:  # torch puts the worker's traceback before the message, which is the last line
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.removeprefix(f"{DataError.__module__}.DataError: ")) from None
        finally:
            self.waited += time.perf_counter() - begin


def silence_child_signals() -> Any:
    """Remove the handler for ended child processes and return it; None if this thread can't set handlers."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def lost_worker(error: Exception) -> bool:
    """Whether an error of the data loader means that a worker died. It can take one of several forms."""
    said = any(words in str(error) for words in ("DataLoader worker", "received 0 items of ancdata", "shared memory"))
    return said or isinstance(error, (ConnectionError, EOFError))


def leave_signals_to_the_trainer(_: int) -> None:
    """Keep a worker alive on signals until the trainer has saved, because signals reach the whole process group."""

    def end(*_: object) -> None:
        timer = threading.Timer(GRACE, os._exit, (0,))
        timer.daemon = True
        timer.start()

    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)  # ignoring it would make Python wait for ever at exit
    torch.set_num_threads(1)


def to_float(images: Tensor) -> Tensor:
    """The images as floats in [-1, 1]; float images are in that range already."""
    return images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images
