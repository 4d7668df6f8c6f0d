"""The size of a micro-batch: what it may be, the largest that fits, and that it does not change the gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import pretend, pretend_cuda
from torch import Tensor, nn

from seriatim.core.errors import ConfigError, ResourceError
from seriatim.core.keys import Keys
from seriatim.core.processes import Place
from seriatim.core.stopping import StopRequest
from seriatim.models.base import Loss
from seriatim.training import batched_task
from seriatim.training import micro_batch as module
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.distributed import World
from seriatim.training.loop import GeneratorTask, train
from seriatim.training.micro_batch import kept_by_autograd, largest_fitting
from seriatim.training.state import RunState
from seriatim.training.updates import gradients

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


WEIGHT = nn.Parameter(torch.ones(10))


def loss_of(count: int, step: int = 0) -> Loss:  # noqa: ARG001
    """Keeps 1,000 numbers for each image, and another thousand for all."""
    x = torch.ones(count, 100, 10) * WEIGHT  # the square keeps it
    fixed = torch.ones(100, 10) * WEIGHT
    return Loss(x.square().sum() + fixed.square().sum(), torch.tensor(float(count)), {})


def test_what_a_forward_pass_keeps_grows_with_its_images() -> None:
    fixed, each = kept_by_autograd(8, loss_of)
    assert each == pytest.approx(2 * 4000, rel=0.01), "ones and their product"
    assert fixed == pytest.approx(2 * 4000 + 40, rel=0.01)


@pytest.mark.parametrize(
    ("room", "wanted"), [(1e9, 12), (8000 * 7.5 + 8200, 6), (8000 * 5.5 + 8200, 4), (8000 * 1.2 + 8200, 1)]
)
def test_a_cpu_takes_what_its_memory_allows(monkeypatch: pytest.MonkeyPatch, room: float, wanted: int) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: room / module.SHARE + 2 * 3 * 40)
    assert largest_fitting(12, loss_of, [WEIGHT], CPU) == wanted
    monkeypatch.setattr(module, "available_memory", lambda: 2 * (room / module.SHARE + 2 * 3 * 40))
    assert largest_fitting(12, loss_of, [WEIGHT], CPU, processes=2) == wanted


def test_copies_of_the_weights_take_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP keeps one more number for each weight than the optimiser does, on a CPU and on an accelerator."""
    monkeypatch.setattr(module, "available_memory", lambda: (8000 * 4 + 8200) / module.SHARE + 2 * 3 * 40)
    assert [largest_fitting(4, loss_of, [WEIGHT], CPU, copies=copies) for copies in (2, 102)] == [4, 2]
    taken: list[int] = []

    def empty(count: int, **options: Any) -> Tensor:
        taken.append(count)
        return torch.zeros(count, **options)

    with pretend_cuda():
        device = Accelerator(monkeypatch, most=5)
        monkeypatch.setattr(torch, "empty", empty)
        largest_fitting(4, device.loss_of, [device.weight], CUDA, copies=3)
    assert taken == [3 * 4 * 4]


@pytest.mark.parametrize(
    ("size", "more", "copies"),
    [(1, [], 2), (2, [], 3), (2, ["training.shard=true"], 2), (1, ["training.shard=true"], 2)],
)
def test_what_ddp_keeps_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, more: list[str], copies: int
) -> None:
    found: list[Any] = []

    def largest(*arguments: Any) -> int:
        found.append(arguments)
        return 4

    monkeypatch.setattr(batched_task, "largest_fitting", largest)
    task = GeneratorTask(read_recipe("mar-digits", [*SMALL, *more]), tmp_path, CPU, quiet=True)
    task.largest_micro_batch(World(Place(0, size, 0, size), CPU))
    assert found[0][4:] == (size, copies)


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

    def loss_of(self, count: int, step: int) -> Loss:
        self.tried.append(count)
        if count > self.most and step == 3:  # as steps that mask many tokens do
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        total = self.weight.sum() * count
        return Loss(total, torch.ones_like(total), {})


def test_an_accelerator_tries_half_as_many_until_all_steps_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_cuda():
        device = Accelerator(monkeypatch, most=5)
        assert largest_fitting(12, device.loss_of, [device.weight], CUDA) == 3
        assert device.tried == [12] * 4 + [6] * 4 + [3] * module.STEPS
        assert device.emptied == 2 and device.weight.grad is None
        device = Accelerator(monkeypatch, most=8)
        assert largest_fitting(13, device.loss_of, [device.weight], CUDA) == 7
        device = Accelerator(monkeypatch, most=0)
        with pytest.raises(ResourceError, match=r"not even one image"):
            largest_fitting(12, device.loss_of, [device.weight], CUDA)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(*_: int) -> Loss:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pretend_cuda(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        largest_fitting(4, broken, [pretend(nn.Linear(2, 2)).weight], CUDA)


class InFloat64(GeneratorTask):
    """Computes everything in float64, where rounding is far below a wrong gradient."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        super().__init__(recipe, out, CPU, quiet=True)
        self.model.double()

    def tokens(self, images: Tensor, keys: Keys) -> Tensor:
        found = super().tokens(images, keys)
        return found.double() if found.is_floating_point() else found


SMALL = [
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "model.dropout=0",
    "training.batch_size=12",
    "training.images=24",
    "training.threads=1",
    "training.dtype=float32",
]
MODELS = {"mar-digits": ["model.head.width=16", "model.head.depth=1"], "gpt-digits": []}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_do_not_depend_on_the_micro_batch(name: str, tmp_path: Path) -> None:
    """Neither does the loss, also where the batch is no multiple of it."""

    def found(*words: str) -> tuple[list[Tensor], dict[str, float], int]:
        task = InFloat64(read_recipe(name, [*SMALL, *MODELS[name], *words]), tmp_path)
        task.begin(StopRequest())
        for parameter in task.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        (batch, *_) = task.batches(RunState())
        parts = list(task.losses(batch, torch.float32))
        means = gradients(task.parts.trained, iter(parts), task.nominal(batch), clip=3.0).means
        return [p.grad for p in task.parts.trained if p.grad is not None], means, len(parts)

    whole, loss, parts = found()
    assert parts == 1 and sum(float(each.abs().sum()) for each in whole) > 1
    for size, wanted in ((1, 12), (5, 3), (6, 2), (12, 1), (40, 1)):
        split, means, parts = found(f"training.micro_batch={size}")
        assert parts == wanted and means == pytest.approx(loss, rel=1e-9)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(whole, split, strict=True))


def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which every training appends how many images it computes at once."""
    seen: list[int] = []
    true = GeneratorTask.loss

    def spy(self: GeneratorTask, batch: Any, part: slice, dtype: torch.dtype) -> Loss:
        seen.append(part.stop - part.start)
        return true(self, batch, part, dtype)

    monkeypatch.setattr(GeneratorTask, "loss", spy)
    return seen


def test_what_was_found_is_recorded_and_a_resumed_run_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, *MODELS["mar-digits"], "training.micro_batch=auto", "training.save_images=24"]
    asked: list[int] = []

    def found(images: int, *_: Any) -> int:
        asked.append(images)
        return 5

    monkeypatch.setattr(batched_task, "largest_fitting", found)
    used = sizes(monkeypatch)
    train(read_recipe("mar-digits", words), tmp_path / "run", quiet=True)
    assert asked == [12] and used == [5, 5, 2] * 2
    assert read_recipe(str(tmp_path / "run" / "recipe.yaml")).training.micro_batch == 5
    used.clear()
    for given in ("auto", "5"):
        more = [*words[:-2], f"training.micro_batch={given}", "training.save_images=24", "training.images=36"]
        train(read_recipe("mar-digits", more), tmp_path / "run", resume=True, quiet=True)
    assert asked == [12] and used == [5, 5, 2], "it is not looked for again, and the second run is finished already"
    for given, images, wanted in (("4", 48, [4, 4, 4]), ("auto", 60, [4, 4, 4]), ("null", 72, [12])):
        used.clear()
        more = [*words, f"training.micro_batch={given}", f"training.images={images}"]
        train(read_recipe("mar-digits", more), tmp_path / "run", resume=True, quiet=True)
        assert asked == [12] and used == wanted, "the last number that was used is repeated"
    with pytest.raises(ConfigError, match=r"training\.micro_batch: 'auto' is looked for when a run begins, .* number"):
        train(read_recipe("mar-digits", [*words, "training.images=84"]), tmp_path / "run", resume=True, quiet=True)


def test_a_small_model_is_computed_at_once(tmp_path: Path) -> None:
    """By what this machine's memory allows."""
    words = [*SMALL, *MODELS["mar-digits"], "training.micro_batch=auto", "training.save_images=0"]
    train(read_recipe("mar-digits", words), tmp_path / "run", quiet=True)
    assert read_recipe(str(tmp_path / "run" / "recipe.yaml")).training.micro_batch == 12


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("training.micro_batch=0", r"training\.micro_batch: must be 'auto' or a whole number from 1"),
        ("training.micro_batch=some", r"training\.micro_batch: must be 'auto' or a whole number from 1"),
        ("training.micro_batch=2.5", r"training\.micro_batch: must be 'auto' or a whole number from 1"),
        ("training.micro_batch=true", r"training\.micro_batch: must be 'auto' or a whole number from 1"),
    ],
)
def test_other_sizes_are_refused(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_recipe("mar-digits", [word])


def test_a_batch_is_split_in_one_way() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch: 4 is not allowed with accumulate=2, .*; leave one out"):
        read_recipe("mar-digits", ["training.micro_batch=4", "training.accumulate=2"])


@pytest.mark.gpu
def test_a_real_device_finds_a_size_that_fits() -> None:
    device = torch.device("cuda", 0)
    weight = nn.Parameter(torch.ones(1 << 10, device=device))
    most = torch.cuda.mem_get_info(device)[1]

    def large(count: int, _: int) -> Loss:
        x = torch.ones(count, most // 16 // (1 << 12), 1 << 10, device=device) * weight
        total = x.square().sum()
        return Loss(total, torch.ones_like(total), {})

    assert 1 <= largest_fitting(64, large, [weight], device) < 64
