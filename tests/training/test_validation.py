"""A run is judged on images that it does not train on, at draws that are the same each time."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import metrics, tiny_run, untimed_metrics
from PIL import Image
from processes import together

from seriatim.checkpoints.native import Bundle, load_bundle
from seriatim.checkpoints.run_names import find
from seriatim.checkpoints.unfinished import all_checkpoints, best_of
from seriatim.core.errors import ConfigError, DataError, NumericsError, Stopped, UsageError
from seriatim.core.files import write_manifest
from seriatim.core.stopping import StopRequest
from seriatim.data.held_out import Part
from seriatim.data.loader import Batches, Share
from seriatim.training import judge, setup, state
from seriatim.training import log as log_module
from seriatim.training.classifier import train_classifier
from seriatim.training.distributed import joined
from seriatim.training.judge import LEAST, MOST, Judge, SampleDistance, validation_loss
from seriatim.training.log import loss_curve
from seriatim.training.loop import train

tiny = partial(
    tiny_run,
    "model.dropout=0.1",
    "training.log_images=48",
    "training.images=128",
    "training.save_images=32",
    "training.keep=9",
    "sampling.num_inference_steps=2",
    "sampling.num_diffusion_steps=2",
)


# --- the validation loss --------------------------------------------------------------------------------------------


def test_it_is_measured_at_each_checkpoint_and_is_that_of_its_weights(tmp_path: Path) -> None:
    train(tiny("data.validation=0.1"), tmp_path, quiet=True)
    found = {row["images"]: row["validation_loss"] for row in metrics(tmp_path) if "validation_loss" in row}
    assert list(found) == [32, 64, 96, 128] and len(set(found.values())) == 4
    assert all("loss" in row for row in metrics(tmp_path))
    data, _ = setup.build_inputs(tiny("data.validation=0.1"))
    assert data.held_out is not None
    for path in all_checkpoints(tmp_path / "checkpoints"):
        bundle = load_bundle(path)
        again = [validation_loss(bundle.model, bundle.tokenizer, data.held_out, torch.float32) for _ in range(2)]
        assert again[0] == again[1] == pytest.approx(found[int(path.name)], rel=1e-6)
    assert json.loads((tmp_path / "data.json").read_text())["held_out"] == data.held_out.count


def test_validate_images_asks_for_more(tmp_path: Path) -> None:
    train(tiny("data.validation=0.1", "training.save_images=0", "training.validate_images=48"), tmp_path, quiet=True)
    assert [row["images"] for row in metrics(tmp_path) if "validation_loss" in row] == [48, 96, 128]


def test_judging_changes_nothing_of_the_weights(tmp_path: Path) -> None:
    """The same images are trained on in both, so that only looking at the others differs."""
    train(tiny("data.validation=0.1", "training.save_images=0"), tmp_path / "seldom", quiet=True)
    more = ["training.evaluate_images=70", "training.evaluate_features=pixels"]
    train(tiny("data.validation=0.1", *more), tmp_path / "often", quiet=True)
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("seldom", "often"))
    assert one == two


def test_nobody_trains_on_the_images_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the run reads in two passes is compared with what is held out, by content."""
    seen: set[bytes] = set()
    true = Batches.__getitem__

    def read(self: Batches, n: int) -> Any:
        batch = true(self, n)
        seen.update(image.numpy().tobytes() for image in batch.images)
        return batch

    monkeypatch.setattr(Batches, "__getitem__", read)
    recipe = tiny("data.validation=0.5", "training.images=1600", "training.batch_size=200", "training.save_images=0")
    train(recipe, tmp_path, quiet=True)
    data, _ = setup.build_inputs(recipe)
    assert data.held_out is not None
    held = {image.numpy().tobytes() for image in data.held_out.images(torch.arange(data.held_out.count))}
    trained = {image.numpy().tobytes() for image in data.images(torch.arange(data.count))}
    assert seen == trained and not seen & held


def test_stopping_and_resuming_gives_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.test_resume import stop_after, weights

    recipe = tiny("data.validation=0.1", "training.validate_images=48")
    train(recipe, tmp_path / "whole", quiet=True)
    undo = stop_after(monkeypatch, 5)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "parts", quiet=True)
    undo()
    train(recipe, tmp_path / "parts", resume=True, quiet=True)
    assert untimed_metrics(tmp_path / "whole") == untimed_metrics(tmp_path / "parts")
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_other_images_held_out_are_another_run(tmp_path: Path) -> None:
    train(tiny("data.validation=0.1", "training.images=16"), tmp_path, quiet=True)
    with pytest.raises(DataError, match="its images are not those that"):
        train(tiny("data.validation=0.2", "training.images=32"), tmp_path, resume=True, quiet=True)


class Few:
    """A data set of so many images, of which it is noted which are read."""

    def __init__(self, count: int) -> None:
        self.count, self.cached, self.read = count, False, torch.zeros(count, dtype=torch.long)

    def images(self, index: torch.Tensor) -> torch.Tensor:
        self.read += torch.bincount(index, minlength=self.count)
        return torch.zeros(len(index), 1, 8, 8)

    def labels(self, index: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(index), dtype=torch.long)


@pytest.mark.parametrize("written", ["1e-1", "1e-01", "0.1", ".1"])
def test_a_share_may_be_written_as_python_writes_it(written: str) -> None:
    data, _ = setup.build_inputs(tiny(f"data.validation={written}"))
    expected, _ = setup.build_inputs(tiny("data.validation=0.1"))
    assert data.held_out is not None and expected.held_out is not None
    assert data.held_out.count == expected.held_out.count > 0


@pytest.mark.parametrize("written", ["nan", "1e3", "-1e-1"])
def test_a_share_that_is_none_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match=r"data.validation: .* give a share between 0 and 1"):
        setup.build_inputs(tiny(f"data.validation={written}"))


@pytest.mark.parametrize("count", [1, 5, 100, 3000])
def test_each_image_is_used_about_equally_often(count: int) -> None:
    _, tokenizer, model = setup.build(tiny())
    data: Any = Few(count)
    assert validation_loss(model, tokenizer, data, torch.float32) is not None
    assert int(data.read.sum()) == min(max(count, LEAST), MOST)
    assert int(data.read.max() - data.read.min()) <= 1


def test_a_stop_is_not_kept_waiting() -> None:
    _, tokenizer, model = setup.build(tiny())
    stop = StopRequest()
    stop.requested = "SIGTERM"
    data: Any = Few(5)
    assert validation_loss(model.train(), tokenizer, data, torch.float32, stop) is None
    assert model.training and not int(data.read.sum())


# --- the best checkpoint --------------------------------------------------------------------------------------------


def checkpoints(folder: Path, states: dict[int, dict[str, Any]]) -> Path:
    made = folder / "pattern"
    train(tiny("training.images=16"), made, quiet=True)
    pattern = all_checkpoints(made / "checkpoints")[-1]
    for seen, says in states.items():
        path = shutil.copytree(pattern, folder / "run" / "checkpoints" / f"{seen:012d}")
        (path / "state.json").write_text(json.dumps({**json.loads((path / "state.json").read_text()), **says}))
        write_manifest(path, ("config.json", *state.FILES))
    for shared in pattern.parent.glob("tokenizer-*"):
        shutil.copy(shared, folder / "run" / "checkpoints")
    return folder / "run"


def test_the_best_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    run = checkpoints(
        tmp_path,
        {
            1: {"loss": 0.1, "validation_loss": 0.9, "validated": 1},
            2: {"loss": 0.3, "validation_loss": 0.5, "validated": 2},
            3: {"loss": 0.2, "validation_loss": 0.5, "validated": 2},  # that of earlier weights
            4: {"loss": 0.0},
        },
    )
    assert find(f"{run}@best").folder.name == f"{2:012d}"
    state.prune(run / "checkpoints", keep=1)
    assert [int(path.name) for path in all_checkpoints(run / "checkpoints")] == [2, 4]
    (run / "checkpoints" / f"{2:012d}" / "model.safetensors").write_bytes(b"")
    found = best_of(run / "checkpoints")
    assert found is not None and int(found.name) == 4, "without one, the training loss decides"


# --- samples --------------------------------------------------------------------------------------------------------


def test_samples_are_compared_at_each_checkpoint(tmp_path: Path) -> None:
    more = ["training.evaluate_images=80", "training.evaluate_features=pixels", "training.save_images=64"]
    train(tiny("data.validation=0.3", *more), tmp_path, quiet=True)
    found = {row["images"]: row["FD[pixels]"] for row in metrics(tmp_path) if "FD[pixels]" in row}
    assert list(found) == [64, 128] and all(value > 0 for value in found.values())
    judge = SampleDistance(tiny(*more).training, setup.build_inputs(tiny("data.validation=0.3"))[0])
    again = judge.measured(load_bundle(f"{tmp_path}@128"))
    assert again == pytest.approx(found[128], rel=1e-4), "those of the averaged weights, at the same seeds"


def test_what_they_are_compared_with() -> None:
    """The images held out, or all others where those are too few for the features."""
    settings = tiny("training.evaluate_images=80", "training.evaluate_features=pixels").training
    many, few = (setup.build_inputs(tiny(f"data.validation={share}"))[0] for share in ("0.3", "0.02"))
    assert SampleDistance(settings, many).data is many.held_out
    assert few.held_out is not None and few.held_out.count <= 64
    assert SampleDistance(settings, few).data is few
    plain = setup.build_inputs(tiny())[0]
    assert SampleDistance(settings, plain).data is plain


def test_a_figure_that_is_not_finite_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny("data.validation=0.3", "training.evaluate_images=80", "training.evaluate_features=pixels")
    data, tokenizer, model = setup.build(recipe)
    made, bundle = Judge(recipe.training, data), Bundle(model, tokenizer, data.class_names, recipe.sampling)
    asked = partial(made.figures, bundle, 32, torch.float32, StopRequest(), validated=True, evaluated=True)
    monkeypatch.setattr(judge, "validation_loss", Mock(return_value=float("nan")))
    monkeypatch.setattr(SampleDistance, "measured", Mock(return_value=2.0))
    assert asked() == {"FD[pixels]": 2.0}
    assert "the validation_loss after 32 images is not finite (nan)" in capsys.readouterr().err
    monkeypatch.setattr(judge, "validation_loss", Mock(return_value=1.0))
    monkeypatch.setattr(SampleDistance, "measured", Mock(side_effect=NumericsError("a sample is not finite")))
    assert asked() == {"validation_loss": 1.0}
    assert "no FD[pixels] after 32 images: a sample is not finite" in capsys.readouterr().err
    monkeypatch.setattr(SampleDistance, "measured", Mock(return_value=None))
    assert asked() is None, "somebody asked to stop"


def test_samples_are_judged_by_a_classifier_of_our_own(tmp_path: Path) -> None:
    """The features of its network decide, and its folder may be named in every way that `evaluate` takes."""
    from training.test_classifier import tiny as tiny_classifier

    train_classifier(tiny_classifier("training.images=64", "name=digit-judge"), tmp_path / "classifier", quiet=True)
    more = ["training.evaluate_images=40", "training.images=64", "training.save_images=64"]
    for number, folder in enumerate((tmp_path / "classifier", tmp_path / "classifier" / "model")):
        run = tmp_path / str(number)
        train(tiny(*more, f"training.evaluate_features={folder}"), run, quiet=True)
        (figure,) = (row["FD[digit-judge]"] for row in metrics(run) if "FD[digit-judge]" in row)
        settings = tiny(*more, f"training.evaluate_features={folder}").training
        again = SampleDistance(settings, setup.build_inputs(tiny())[0]).measured(load_bundle(f"{run}@latest"))
        assert figure > 0 and again == pytest.approx(figure, rel=1e-4)


@pytest.mark.fresh_process
def test_processes_share_the_images_and_get_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, two and three processes: each image is read by one of them, and the figures differ by rounding alone."""
    recipe = tiny("data.validation=0.4", "training.evaluate_images=70", "training.evaluate_features=pixels")
    monkeypatch.setattr(judge, "MOST_REAL", 100)
    data, tokenizer, model = setup.build(recipe)
    assert data.held_out is not None
    setup.fit_tokenizer(tokenizer, data, quiet=True)
    bundle = Bundle(model, tokenizer, data.class_names, recipe.sampling)

    def work() -> tuple[float | None, float | None, list[int], int]:
        read: list[int] = []
        true = Part.images

        def counted(self: Part, index: torch.Tensor) -> torch.Tensor:
            read.extend(index.tolist())
            return true(self, index)

        Part.images = counted  # type: ignore[method-assign]
        with joined("cpu") as world:
            loss = validation_loss(model, tokenizer, data.held_out, torch.float32, None, world)  # type: ignore[arg-type]
            distance, validated = SampleDistance(recipe.training, data), len(read)
            found = [distance.measured(bundle, None, world) for _ in range(2)]
        assert found[0] == found[1]
        return loss, found[0], sorted(read[:validated]), len(read) - validated

    ((loss, distance, images, real),) = together(1, work, tmp_path / "1")
    assert loss and distance and len(images) == data.held_out.count and real == 100
    for size in (2, 3):
        found = together(size, work, tmp_path / str(size))
        assert all(one[0] == pytest.approx(loss, rel=1e-9) for one in found), "the same batches, added up differently"
        assert all(one[1] == pytest.approx(distance, rel=1e-3) for one in found)
        assert sorted(i for one in found for i in one[2]) == images and all(one[2] for one in found)
        assert [one[3] for one in found] == [len(range(100)[Share(r, size).of(100)]) for r in range(size)]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.validate_images=64"], r"training\.validate_images: no images are held out; set data\.validation"),
        (["data.validation=2"], r"data\.validation: 2 is not allowed; give a share between 0 and 1"),
        (["training.evaluate_images=80"], r"training\.evaluate_features: is required by training\.evaluate_images"),
        (["training.evaluate_features=pixels"], r"training\.evaluate_features: is used with training\.evaluate_images"),
        (
            ["training.evaluate_images=80", "training.evaluate_features=pixls"],
            r"training\.evaluate_features: 'pixls' is neither an extractor nor a path .*; did you mean 'pixels'",
        ),
        (
            ["training.evaluate_images=64", "training.evaluate_features=pixels"],
            r"training\.evaluate_images: 64 images are too few for the 64 features of 'pixels'",
        ),
    ],
)
def test_what_is_wrong_is_named_before_training(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises((ConfigError, DataError, UsageError), match=words) as caught:
        train(tiny(*overrides), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_samples_need_pictures_to_be_compared_with(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((40, 16, 4), np.float32))
    words = [f"data={{kind: arrays, path: {tmp_path}/tokens.npy}}", "tokenizer={kind: arrays}"]
    settings = tiny(*words, "training.evaluate_images=80", "training.evaluate_features=pixels")
    with pytest.raises(ConfigError, match=r"training\.evaluate_images: the data holds no pictures"):
        SampleDistance(settings.training, setup.build_inputs(settings)[0])


# --- the curve ------------------------------------------------------------------------------------------------------


def test_the_curve_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    true = log_module.empty_figure

    def kept() -> tuple[Any, Any]:
        figure, axes = true()
        drawn.append(figure)
        return figure, axes

    monkeypatch.setattr(log_module, "empty_figure", kept)
    lines: list[dict[str, Any]] = [
        {"images": 1, "loss": 2.0},
        {"images": 2, "loss": 1.5, "validation_loss": 1.8, "FD[pixels]": 40.0},
        {"images": 3, "loss": 1.2},
    ]
    path = loss_curve(lines, tmp_path / "curve.png", "toy")
    labels = {line.get_label(): list(line.get_xdata()) for axes in drawn[0].axes for line in axes.get_lines()}
    assert labels == {"loss": [1, 2, 3], "validation": [2], "FD[pixels]": [2]}
    assert drawn[0].axes[1].get_ylabel() == "FD[pixels]"
    with Image.open(path) as picture:
        picture.load()
    drawn.clear()
    loss_curve(lines[:1], tmp_path / "plain.png", "toy")
    assert len(drawn[0].axes) == 1
