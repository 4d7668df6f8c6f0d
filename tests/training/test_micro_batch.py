"""The size of a micro-batch: what it may be, the largest that fits, and that it does not change the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_masked, many, randomise
from pretend_cuda import pretend, pretend_cuda
from torch import Tensor, nn

from seriatim.core.errors import ConfigError, ResourceError
from seriatim.core.keys import Keys
from seriatim.models.base import Loss
from seriatim.training import micro_batch as module
from seriatim.training.engine import gradients
from seriatim.training.micro_batch import divisors, kept_by_autograd, largest_fitting, micro_batches

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("number", "wanted"), [(1, [1]), (12, [1, 2, 3, 4, 6, 12]), (49, [1, 7, 49]), (97, [1, 97])])
def test_divisors(number: int, wanted: list[int]) -> None:
    assert divisors(number) == wanted


def test_a_batch_is_made_of_micro_batches() -> None:
    assert micro_batches(64, 64) == 1 and micro_batches(64, 8) == 8 and micro_batches(64, 8, processes=4) == 2
    with pytest.raises(ConfigError, match=r"micro_batch: 5 images do not divide .*batch_size 12; .*1, 2, 3, 4, 6, 12"):
        micro_batches(12, 5)
    with pytest.raises(ConfigError, match=r"4 images in each of 2 processes do not divide .* 12; .*: 1, 2, 3, 6"):
        micro_batches(12, 4, processes=2)
    with pytest.raises(ConfigError, match=r"use a batch size that 5 processes divide"):
        micro_batches(12, 1, processes=5)


WEIGHT = nn.Parameter(torch.ones(10))


def loss_of(count: int) -> Loss:
    """Keeps 1,000 numbers for each image, and another thousand for all."""
    x = torch.ones(count, 100, 10) * WEIGHT  # the square keeps it
    fixed = torch.ones(100, 10) * WEIGHT
    return Loss(x.square().sum() + fixed.square().sum(), torch.tensor(float(count)), {})


def test_what_a_forward_pass_keeps_grows_with_its_images() -> None:
    fixed, each = kept_by_autograd(loss_of, 8)
    assert each == pytest.approx(2 * 4000, rel=0.01), "ones and their product"
    assert fixed == pytest.approx(2 * 4000 + 40, rel=0.01)


@pytest.mark.parametrize(("room", "wanted"), [(1e9, 12), (8000 * 7.5 + 8200, 6), (8000 * 1.2 + 8200, 1)])
def test_a_cpu_takes_what_its_memory_allows(monkeypatch: pytest.MonkeyPatch, room: float, wanted: int) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: room / module.SHARE + 2 * 3 * 40)
    assert largest_fitting(12, loss_of, [WEIGHT], CPU) == wanted


def test_no_room_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 100.0)
    with pytest.raises(ResourceError, match=r"training\.micro_batch: not even one image at a time fits into memory"):
        largest_fitting(12, loss_of, [WEIGHT], CPU)


class Accelerator:
    """Runs out of memory above a number of images, as CUDA does, with room for the optimiser taken before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most, self.tried, self.emptied = most, list[int](), 0
        self.weight = pretend(nn.Linear(4, 1)).weight
        monkeypatch.setattr(torch.accelerator, "empty_cache", self._empty, raising=False)

    def _empty(self) -> None:
        self.emptied += 1

    def loss_of(self, count: int) -> Loss:
        self.tried.append(count)
        if count > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        total = self.weight.sum() * count
        return Loss(total, torch.ones_like(total), {})


def test_an_accelerator_tries_from_the_largest_down(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_cuda():
        device = Accelerator(monkeypatch, most=5)
        assert largest_fitting(12, device.loss_of, [device.weight], CUDA) == 4
        assert device.tried == [12, 6, 4] and device.emptied == 2 and device.weight.grad is None
        device = Accelerator(monkeypatch, most=0)
        with pytest.raises(ResourceError, match=r"not even one image"):
            largest_fitting(12, device.loss_of, [device.weight], CUDA)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(_: int) -> Loss:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pretend_cuda(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        largest_fitting(4, broken, [pretend(nn.Linear(2, 2)).weight], CUDA)


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_gradients_do_not_depend_on_the_micro_batch(size: int) -> None:
    model: Any = make_masked().double()
    randomise(model)
    tokens = torch.randn(12, 16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, keys = torch.arange(12) % 3, many(0, 12)

    def loss(begin: int, count: int) -> Loss:
        part = torch.arange(begin, begin + count)
        made: Loss = model(tokens[part], labels[part], keys.select(part), Keys.of(7))
        return made

    def found(each: int) -> list[Tensor]:
        model.zero_grad()
        parts = (loss(i * each, each) for i in range(micro_batches(12, each)))
        gradients(list(model.parameters()), parts, 12 * 16, clip=3.0)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found(12), found(size), strict=True))


@pytest.mark.gpu
def test_a_real_device_finds_a_size_that_fits() -> None:
    device = torch.device("cuda", 0)
    weight = nn.Parameter(torch.ones(1 << 10, device=device))
    most = torch.cuda.mem_get_info(device)[1]

    def large(count: int) -> Loss:
        x = torch.ones(count, most // 16 // (1 << 12), 1 << 10, device=device) * weight
        total = x.square().sum()
        return Loss(total, torch.ones_like(total), {})

    assert 1 <= largest_fitting(64, large, [weight], device) < 64
