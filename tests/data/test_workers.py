"""Worker processes end with whoever asked for them: no exception, early stop or exit leaves one or waits for one."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from seriatim.core.errors import DataError
from seriatim.data.base import ImageData
from seriatim.data.loader import Batches, Loader


class Grey(ImageData):
    """64 grey images; what is drawn after `whole` of them can't be read."""

    def __init__(self, whole: int = 64) -> None:
        self.count, self.whole, self.class_names, self.drawn = 64, whole, [], 0

    def images(self, index: Tensor) -> Tensor:
        self.drawn += len(index)
        if self.drawn > self.whole:
            raise DataError("data: an image can't be read")
        return torch.zeros(len(index), 3, 8, 8, dtype=torch.uint8)

    @override
    def labels(self, index: Tensor) -> Tensor | None:
        return None


def test_an_error_ends_them_even_while_it_is_held() -> None:
    with pytest.raises(DataError, match=r"^data: an image can't be read$") as caught:
        list(Loader(Batches(Grey(whole=20), 0, 0, 64, 8), 1))
    assert caught.value.__traceback__ is not None and not multiprocessing.active_children()


def test_stopping_early_ends_them() -> None:
    batches = iter(Loader(Batches(Grey(), 0, 0, 64, 8), 2))
    assert len(next(batches)) == 8 and len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_leaving_the_program_amid_batches_ends_them() -> None:
    code = """
from seriatim.data import loader
from data.test_workers import Batches, Grey, Loader
from typing_extensions import override
loader.GRACE = 0.5
held = iter(Loader(Batches(Grey(), 0, 0, 64, 8), 1))
print(len(next(held)))
cycle = [held]
cycle.append(cycle)  # so that only Python's own end finds it
del held
"""
    where = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=where)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
