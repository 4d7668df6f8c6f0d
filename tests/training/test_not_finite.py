"""With `training.on_nan=skip` a batch whose loss or gradient is not finite leaves nothing behind but a count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import signal_in_step, untimed_metrics
from safetensors.torch import load_file
from torch import Tensor

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.core.errors import ConfigError, NumericsError, Stopped
from seriatim.data.loader import Batch
from seriatim.models.base import Loss
from seriatim.training import classifier
from seriatim.training.classifier import train_classifier
from seriatim.training.config import ClassifierRecipe, Recipe, read_any, read_recipe
from seriatim.training.loop import GeneratorTask, train

TINY = [
    "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=16", "training.log_images=32", "training.dtype=float32", "training.threads=1",
    "training.images=128", "training.save_images=16", "training.keep=99", "training.on_nan=skip",
]  # fmt: skip


def tiny(*overrides: str) -> Recipe:
    return read_recipe("mar-digits", [*TINY, *overrides])


def tensors(run: Path, images: int) -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"{images:012d}"
    return {
        f"{name}/{key}": tensor
        for name in ("model", "average", "optimiser")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes the batches which begin after so many images not finite."""

    def poisoned(*at: int, value: float = float("nan"), gradient: bool = False) -> None:
        true = GeneratorTask.loss

        def loss(self: GeneratorTask, batch: Batch, part: slice, dtype: torch.dtype) -> Loss:
            found = true(self, batch, part, dtype)
            if batch.whole.start not in at:
                return found
            if gradient:
                found.sum.register_hook(lambda g: g * value)
                return found
            return Loss(found.sum * value, found.count, found.parts)

        monkeypatch.setattr(GeneratorTask, "loss", loss)

    return poisoned


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_batch_updates_nothing(
    tmp_path: Path, poison: Callable[..., None], capsys: pytest.CaptureFixture[str], what: str, value: float
) -> None:
    poison(64, value=value, gradient=what == "gradient")
    train(tiny(), tmp_path, quiet=True)
    assert same(tensors(tmp_path, 64), tensors(tmp_path, 80)), "weights, averages and moments"
    assert not same(tensors(tmp_path, 48), tensors(tmp_path, 64)) and not same(
        tensors(tmp_path, 80), tensors(tmp_path, 96)
    )
    states = [json.loads((path / "state.json").read_text()) for path in all_checkpoints(tmp_path / "checkpoints")]
    assert [state["steps"] for state in states] == [1, 2, 3, 4, 4, 5, 6, 7]
    assert [row.get("skipped") for row in untimed_metrics(tmp_path)] == [None, None, 1, 1]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in untimed_metrics(tmp_path))
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(said) == 1 and f"the {what} is not finite (" in said[0] and "after 64 images" in said[0]
    assert "number 1 of at most 10 in a row" in said[0]


def test_the_others_train_as_if_it_had_not_been_there(tmp_path: Path, poison: Callable[..., None]) -> None:
    """The mean loss of a line is that of the batches that were not skipped."""
    train(tiny("training.images=80", "training.log_images=16"), tmp_path / "each", quiet=True)
    poison(64)
    train(tiny("training.images=80", "training.log_images=80"), tmp_path / "run", quiet=True)
    means = [row["loss"] for row in untimed_metrics(tmp_path / "each")[:4]]
    assert untimed_metrics(tmp_path / "run")[0]["loss"] == pytest.approx(sum(means) / 4, rel=1e-6)


@pytest.mark.parametrize("steps", [[4], [5], [6], [5, 1]])
def test_resuming_around_skipped_batches_is_bitwise(
    tmp_path: Path, poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    """The fifth and the sixth batch are skipped; the run is stopped before, in between and after."""
    poison(64, 80)
    train(tiny(), tmp_path / "whole", quiet=True)
    for number, step in enumerate(steps):
        with monkeypatch.context() as patched:
            signal_in_step(patched, step)
            with pytest.raises(Stopped):
                train(tiny(), tmp_path / "parts", resume=number > 0, quiet=True)
    train(tiny(), tmp_path / "parts", resume=True, quiet=True)
    assert same(tensors(tmp_path / "whole", 128), tensors(tmp_path / "parts", 128))
    assert untimed_metrics(tmp_path / "whole") == untimed_metrics(tmp_path / "parts")


def test_too_many_in_a_row_end_the_run(
    tmp_path: Path, poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in a row are allowed here, as often as they come. A run that is resumed between them goes on counting."""
    poison(16, 32, 64, 80, 96)
    with monkeypatch.context() as patched:
        signal_in_step(patched, 6)
        with pytest.raises(Stopped):
            train(tiny("training.max_skips=2"), tmp_path, quiet=True)
    with pytest.raises(NumericsError) as caught:
        train(tiny("training.max_skips=2"), tmp_path, resume=True, quiet=True)
    message = str(caught.value)
    assert "the loss is not finite (nan) after 96 images" in message and "\n" not in message
    assert "the 2 batches before it were skipped too" in message and "training.max_skips" in message
    assert same(tensors(tmp_path, 64), tensors(tmp_path, 96)), "nothing was updated"
    train(tiny("training.max_skips=3"), tmp_path, resume=True, quiet=True)
    assert read_recipe(str(tmp_path / "recipe.yaml")).changes == ["after 96 images: training.max_skips from 2 to 3"]
    assert untimed_metrics(tmp_path)[-1]["skipped"] == 5


@pytest.mark.curves
def test_a_line_of_skipped_batches_alone_has_no_loss(tmp_path: Path, poison: Callable[..., None]) -> None:
    poison(96, 112)
    result = train(tiny(), tmp_path, quiet=True)
    *_, before, last = untimed_metrics(tmp_path)
    assert last.keys() == {"images", "learning_rate", "skipped"} and last["skipped"] == 2
    assert result.loss == before["loss"] and (tmp_path / "training.png").is_file()


def test_a_run_that_stopped_goes_on_by_skipping(tmp_path: Path, poison: Callable[..., None]) -> None:
    poison(64)
    with pytest.raises(NumericsError, match=r"nothing was updated; .*; training\.on_nan=skip goes on without such"):
        train(tiny("training.on_nan=stop"), tmp_path, quiet=True)
    train(tiny(), tmp_path, resume=True, quiet=True)
    assert read_recipe(str(tmp_path / "recipe.yaml")).changes == ["after 64 images: training.on_nan from stop to skip"]


def test_batch_norm_forgets_a_skipped_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with a value that is not finite would make the statistics of batch norm so for ever."""
    true = classifier.augmented

    def damaged(images: Tensor, draws: Any, *rest: Any) -> Tensor:
        found = true(images, draws, *rest)
        current[0] += 1
        return found * float("nan") if current[0] == 3 else found

    current = [0]
    monkeypatch.setattr(classifier, "augmented", damaged)
    recipe = read_any(
        "classifier-cifar10-tiny",
        [
            "data={kind: digits, test_share: 0.2}", "model.widths=[16]", "model.depth=[1]", "training.images=256",
            "training.batch_size=64", "training.save_images=64", "training.keep=9", "training.log_images=64",
            "training.crop=1", "training.dtype=float32", "training.threads=1", "training.on_nan=skip",
        ],
    )  # fmt: skip
    assert isinstance(recipe, ClassifierRecipe)
    train_classifier(recipe, tmp_path, device="cpu", quiet=True)
    assert [row.get("skipped") for row in untimed_metrics(tmp_path)] == [None, None, 1, 1]
    assert same(tensors(tmp_path, 128), tensors(tmp_path, 192))
    assert any("running_mean" in name for name in tensors(tmp_path, 192))


@pytest.mark.parametrize("setting", ["on_nan=ignore", "on_nan=1", "max_skips=0", "max_skips=1.5", "max_skips=-1"])
def test_settings_that_mean_nothing_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{setting.split('=')[0]}"):
        tiny(f"training.{setting}")
