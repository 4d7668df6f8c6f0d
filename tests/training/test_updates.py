"""Training without a run folder, as benchmarks use it: what it counts, saves, goes on from and refuses."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.core.errors import NumericsError
from seriatim.core.keys import Keys
from seriatim.models.base import Loss
from seriatim.training.state import Trainables
from seriatim.training.updates import power_average, updates

SIZE, WIDTH = 4, 3


def line() -> Trainables:
    model = nn.Linear(WIDTH, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    average = AveragedModel(model, multi_avg_fn=power_average(8))
    return Trainables(model, average, torch.optim.Adam(model.parameters()))


def batch_of(update: int) -> Tensor:
    return Keys.of("batch", update).fold(torch.arange(SIZE)).normal(WIDTH)


def loss_of(parts: Trainables, x: Tensor) -> Loss:
    off = (parts.model(x)[:, 0] - x.sum(dim=1)).square()
    return Loss(off.sum(), torch.tensor(float(len(x))), {})


def train(parts: Trainables, count: int, **options: Path | float | None) -> list[dict[str, float]]:
    found = []
    states = updates(
        parts,
        batch_of,
        lambda x, _: loss_of(parts, x),
        size=SIZE,
        rate=lambda images: 1e-3 * images,
        **options,  # type: ignore[arg-type]
    )
    for run in states:
        found.append({"seen": run.seen, "steps": run.steps, **run.sums})
        if run.steps == count:
            return found
    raise AssertionError("the updates ended")


def test_updates_are_those_of_a_plain_loop() -> None:
    ours, plain = line(), line()
    found = train(ours, 5, clip=0.5)
    for n in range(5):
        plain.optimiser.param_groups[0]["lr"] = 1e-3 * SIZE * (n + 1)
        loss_of(plain, batch_of(n)).mean.backward()
        nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        plain.update()
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert [row["seen"] for row in found] == [SIZE * n for n in range(6)], "the first is the state before all updates"
    assert [row["steps"] for row in found] == list(range(6))


def test_only_updates_take_of_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that every reading moves by one: batches read it too, and so does the caller."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))
    parts = line()

    def slow(update: int) -> Tensor:
        for _ in range(5):
            time.process_time()
        return batch_of(update)

    states = updates(parts, slow, lambda x, _: loss_of(parts, x), size=SIZE, rate=lambda _: 1e-3)
    spent = []
    for run in states:
        spent.append(run.sums["seconds"])
        for _ in range(7):
            time.process_time()
        if run.steps == 3:
            break
    assert [b - a for a, b in pairwise(spent)] == [1.0, 1.0, 1.0]


def test_a_stopped_one_goes_on_bitwise(tmp_path: Path) -> None:
    whole, stopped, again = line(), line(), line()
    every = train(whole, 6)
    train(stopped, 4, folder=tmp_path, save_seconds=0.0)
    assert [path.name for path in all_checkpoints(tmp_path)] == [f"{3 * SIZE:012d}"], "saved before each update"
    rest = train(again, 6, folder=tmp_path, save_seconds=1e9)
    assert rest[0]["steps"] == 3 and rest[-1]["loss"] == every[-1]["loss"]
    for a, b in zip(whole.average.module.parameters(), again.average.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_is_not_finite_ends_it_before_the_update() -> None:
    parts = line()
    states = updates(parts, batch_of, lambda x, n: loss_of(parts, x / (2 - n)), size=SIZE, rate=lambda _: 1e-3)
    with pytest.raises(NumericsError, match=f"the loss is not finite after {2 * SIZE} images"):
        for _ in states:
            before = [parameter.clone() for parameter in parts.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))


def test_the_power_average_is_as_wide_whenever_it_is_looked_at() -> None:
    """Of a value that grows by one with each update, the average is about a ninth of the way behind."""
    model = nn.Linear(1, 1, bias=False)
    average = AveragedModel(model, multi_avg_fn=power_average(8))
    for n in range(1, 901):
        with torch.no_grad():
            model.weight.fill_(n)
        average.update_parameters(model)
        if n in (90, 900):
            assert next(average.module.parameters()).item() == pytest.approx(n * 8 / 9, rel=0.02)
