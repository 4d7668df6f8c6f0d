"""Minutes become the amounts of a recipe once: they fit the time, measuring changes nothing, resuming keeps them."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import untimed_metrics
from PIL import Image
from processes import command, together
from training.test_resume import stop_after

from seriatim.cli.main import run as in_process
from seriatim.core.errors import Stopped, UsageError
from seriatim.training import budget as budgets
from seriatim.training import look
from seriatim.training.budget import Budget, Pace, decided
from seriatim.training.classifier import train_classifier
from seriatim.training.config import AnyRecipe, ClassifierRecipe, Recipe, TokenizerRecipe, read_any
from seriatim.training.look import FACTORS, PREVIEWS
from seriatim.training.loop import train
from seriatim.training.task import Costs
from seriatim.training.tokenizer_task import train_tokenizer

TINY = [
    "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=16", "training.dtype=float32", "training.threads=1",
    "sampling.num_inference_steps=2", "sampling.num_diffusion_steps=2",
]  # fmt: skip
SHORT = 0.02  # minutes


def tiny(*overrides: str) -> Recipe:
    found = read_any("mar-digits", [*TINY, *overrides])
    assert isinstance(found, Recipe)
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are measured for a moment only, and runs are looked at however few updates a slow machine has time for."""
    monkeypatch.setattr(budgets, "LEAST_MEASURING", 0.0)
    monkeypatch.setattr(look, "FEWEST_UPDATES", 1)


def spent(recipe: AnyRecipe, pace: Pace, classes: int) -> float:
    """The seconds that a run with these amounts would take."""
    settings: Any = recipe.training
    images, costs = settings.images, pace.costs
    seconds = images * pace.image + costs.end + budgets.END
    seconds += math.ceil(images / settings.save_images) * (pace.save + costs.judged)
    if isinstance(recipe, ClassifierRecipe):
        return seconds + (math.ceil(images / settings.test_images) * costs.test if settings.test_images else 0.0)
    looks = math.ceil(images / settings.sample_images) if settings.sample_images else 0
    drawn = settings.sample_each * (min(settings.sample_rows, classes) if classes else budgets.WITHOUT_CLASSES)
    sweep = len(FACTORS) - 1 if classes and isinstance(recipe, Recipe) else 0
    return seconds + (looks + sweep * bool(looks)) * (drawn * costs.sample + costs.look)


# --- deciding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [1, 5, 20, 120, 3000])
@pytest.mark.parametrize("image", [1e-4, 0.02, 0.2])
@pytest.mark.parametrize("sample", [0.001, 0.1])
@pytest.mark.parametrize("classes", [0, 10, 1000])
def test_amounts_fit_into_the_time(minutes: float, image: float, sample: float, classes: int) -> None:
    pace = Pace(image, 1.0, Costs(sample=sample, look=0.3, judged=2.0))
    left = 60.0 * minutes
    recipe = decided(tiny(), Budget(minutes), pace, left, classes)
    settings: Any = recipe.training
    if settings.images > settings.batch_size:
        assert spent(recipe, pace, classes) <= left
    if minutes >= 5:
        assert spent(recipe, pace, classes) >= 0.9 * left, "the time is used"
        assert settings.images * image >= 0.6 * left, "most of it for training"
    if settings.images >= PREVIEWS * settings.batch_size:
        assert math.ceil(settings.images / settings.sample_images) == PREVIEWS
    assert settings.images % settings.batch_size == 0
    assert settings.warmup_images == pytest.approx(settings.images * 5000 / 72_000, abs=1)
    assert settings.images <= 110 * settings.log_images
    if left > 2 * budgets.BETWEEN_SAVES:
        assert settings.save_images * image <= budgets.BETWEEN_SAVES, "a long run is saved often"


def test_previews_are_as_large_as_the_time_allows() -> None:
    def shape(sample: float, minutes: float, classes: int) -> tuple[int, int]:
        pace = Pace(0.02, 0.5, Costs(sample=sample, look=0.3))
        settings: Any = decided(tiny(), Budget(minutes), pace, 60 * minutes, classes).training
        return settings.sample_rows, settings.sample_each

    assert shape(0.01, 20, 10) == (10, 8)
    assert shape(0.1, 1, 10) == (5, 1)
    assert shape(1.0, 1, 10) == (4, 1), "some classes are seen however slow sampling is"
    assert shape(0.01, 20, 3) == (3, 8)
    assert shape(0.001, 20, 0)[1] == 4 and shape(1.0, 1, 0)[1] == 1


def test_previews_that_would_take_the_time_are_fewer() -> None:
    def looks(look: float) -> float:
        settings: Any = decided(tiny(), Budget(1), Pace(0.01, 0.1, Costs(sample=0.01, look=look)), 60.0, 10).training
        assert settings.images * 0.01 >= 30, "half of the time is for training at least"
        return math.ceil(settings.images / settings.sample_images) if settings.sample_images else 0

    assert [looks(seconds) for seconds in (0.3, 2.0, 3.0, 4.0, 7.0, 100.0)] == [8, 8, 4, 2, 0, 0]


def test_given_settings_are_kept() -> None:
    pace = Pace(0.02, 1.0, Costs(sample=0.05, look=0.3))
    given = {"warmup_images": 7, "log_images": 8, "save_images": 0, "sample_images": 500, "sample_each": 2}
    recipe = tiny(*(f"training.{name}={value}" for name, value in given.items()))
    found = decided(recipe, Budget(10, given=frozenset(given)), pace, 600.0, 10)
    assert {name: getattr(found.training, name) for name in given} == given
    free = decided(recipe, Budget(10), pace, 600.0, 10)
    looked = found.training.images / 500 * (20 * 0.05 + 0.3)
    time = (1 - budgets.RESERVE) * 600
    assert found.training.images * 0.02 + looked == pytest.approx(time, rel=0.05), "frequent previews cost images"
    assert free.training.images > found.training.images


def test_a_tokenizer_and_a_classifier_have_amounts_of_their_own() -> None:
    recipe = read_any("kl-32", ["objective.gan=0.5", "objective.gan_start=85000", "training.images=170000"])
    assert isinstance(recipe, TokenizerRecipe)
    pace = Pace(0.04, 1.0, Costs(look=0.9, judged=3.0, end=20.0))
    found = decided(recipe, Budget(10), pace, 600.0, 10)
    assert isinstance(found, TokenizerRecipe)
    assert found.objective.gan_start == pytest.approx(found.training.images / 2, abs=1)
    read = read_any("classifier-cifar10")
    pace = Pace(0.001, 1.0, Costs(test=4.0, end=12.0))
    judged = decided(read, Budget(10), pace, 600.0, 10)
    assert isinstance(judged, ClassifierRecipe) and 0 < judged.training.test_images <= judged.training.images / 7
    assert spent(judged, pace, 10) <= 600 and judged.training.images * 0.001 > 480
    slow = decided(read, Budget(1), Pace(0.001, 1.0, Costs(test=40.0)), 60.0, 10)
    assert isinstance(slow, ClassifierRecipe) and slow.training.test_images == 0, "only the end is tested"


def test_time_that_is_over_leaves_half_of_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("seriatim.training.budget.time.monotonic", lambda: now[0])
    budget = Budget(2, began=100.0)
    now[0] += 30
    assert budget.left() == 90
    now[0] += 500
    assert budget.left() == 60


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, 1e9, "5"])
def test_minutes_that_cannot_be(minutes: Any) -> None:
    with pytest.raises(UsageError, match=r"^minutes: .* is not allowed; it must be above 0 and at most 527,040"):
        Budget(minutes)


def test_minutes_and_images_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["training.images=32"], ["training.images=32", "--resume=auto"]):
        assert in_process(["train", "mar-digits", *words, "--minutes", "1", "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "minutes: can't go with training.images" in said
    assert not (tmp_path / "run").exists()


# --- runs -----------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> bytes:
    name = "classifier.safetensors" if (folder / "model" / "classifier.safetensors").exists() else "model.safetensors"
    if not (folder / "model" / name).exists():
        name = "tokenizer.safetensors"
    return (folder / "model" / name).read_bytes()


def repeats(folder: Path, again: Path, run: Callable[..., Any]) -> Any:
    """The settings of a run of some minutes, which its recipe repeats bitwise: measuring has changed nothing."""
    recipe = read_any(str(folder / "recipe.yaml"))
    run(recipe, again, quiet=True)
    assert weights(folder) == weights(again) and untimed_metrics(folder) == untimed_metrics(again)
    return recipe.training


@pytest.mark.usefixtures("quick", "steady")
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.dtype=auto", "training.micro_batch=5", "data.validation=0.1"],
        ["training.optimiser=muon", "model={kind: causal, width: 16, depth: 1, heads: 1, dropout: 0.1, "
         "head: {kind: diffusion, width: 16, depth: 1}}", "training.workers=1", "sampling.num_inference_steps=null"],
    ],
)  # fmt: skip
def test_a_run_of_minutes_is_repeated_by_its_recipe(tmp_path: Path, overrides: list[str]) -> None:
    train(tiny(*overrides), tmp_path / "run", minutes=SHORT, quiet=True)
    settings = repeats(tmp_path / "run", tmp_path / "again", train)
    found = json.loads((tmp_path / "run" / "environment.json").read_text())["budget"]
    assert found["minutes"] == SHORT and found["images"] == settings.images and found["seconds_per_image"] > 0
    shown = [path for path in (tmp_path / "run" / "samples").iterdir() if path.stem.isdigit()]
    assert len(shown) == min(PREVIEWS, settings.images // 16) and (tmp_path / "run" / "model").is_dir()


@pytest.mark.usefixtures("quick")
def test_a_classifier_of_minutes(tmp_path: Path) -> None:
    """Its batch norms forget the steps that were measured."""
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (8, 8), 9 * i + (100 if label == "a" else 0)).save(tmp_path / "data" / label / f"{i}.png")
    recipe = read_any("classifier-cifar10", [
        f"data={{kind: folder, path: {tmp_path / 'data'}, size: 8, channels: 1}}", "model.widths=[4]",
        "model.depth=[0]", "training.batch_size=8", "training.crop=1", "training.cutout=0", "training.threads=1",
        "training.dtype=float32",
    ])  # fmt: skip
    assert isinstance(recipe, ClassifierRecipe)
    train_classifier(recipe, tmp_path / "run", minutes=SHORT, quiet=True)
    settings = repeats(tmp_path / "run", tmp_path / "again", train_classifier)
    assert settings.images % 8 == 0


@pytest.mark.usefixtures("quick")
def test_a_tokenizer_of_minutes(tmp_path: Path) -> None:
    """Its codes are counted from the first step of the run on."""
    recipe = read_any("vq-32-tiny", [
        "data={kind: digits, validation: 0.1}", "tokenizer.stride=2", "tokenizer.width=32", "tokenizer.vocab=16",
        "objective.revive_images=64", "training.batch_size=8", "training.threads=1",
        "training.dtype=float32",
    ])  # fmt: skip
    assert isinstance(recipe, TokenizerRecipe)
    train_tokenizer(recipe, tmp_path / "run", minutes=SHORT, quiet=True)
    repeats(tmp_path / "run", tmp_path / "again", train_tokenizer)


@pytest.mark.usefixtures("quick")
def test_a_stopped_run_goes_on_to_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same minutes, and with others, as a command of a queue does that is put back into it."""
    undo = stop_after(monkeypatch, 3)
    with pytest.raises(Stopped, match="SIGTERM: stopped after 48 images"):
        train(tiny(), tmp_path / "run", minutes=2, quiet=True)
    undo()
    first = read_any(str(tmp_path / "run" / "recipe.yaml"))
    monkeypatch.setattr(budgets, "fitted", lambda *_, **__: pytest.fail("it was decided already"))
    for minutes in (2, 9):
        undo = stop_after(monkeypatch, 3)
        with pytest.raises(Stopped):
            train(tiny(), tmp_path / "run", resume="auto", minutes=minutes, quiet=True)
        undo()
        said = capsys.readouterr().err
        assert f"goes on to the {first.training.images:,} images that were decided when it began" in said
        assert read_any(str(tmp_path / "run" / "recipe.yaml")) == first
    for how in (["--resume"], ["--resume=auto"]):
        words = ["train", "mar-digits", *TINY, *how, "--minutes", "2", "--out", str(tmp_path / "run")]
        undo = stop_after(monkeypatch, 2)
        assert in_process(words) == 143
        undo()
        assert read_any(str(tmp_path / "run" / "recipe.yaml")) == first


@pytest.mark.usefixtures("quick")
def test_a_signal_while_steps_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has begun yet, and the same command begins it."""
    true = budgets.gradients

    def signalling(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return true(*arguments, **{**options, "stop": True})

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped before the first step; begin it again"):
        patch.setattr(budgets, "gradients", signalling)
        train(tiny(), tmp_path / "run", minutes=SHORT, quiet=True)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    train(tiny(), tmp_path / "run", minutes=SHORT, quiet=True)
    assert (tmp_path / "run" / "model").is_dir()


def test_a_step_that_takes_the_whole_time_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "LEAST_MEASURING", 0.0)
    monkeypatch.setattr(budgets, "MEASURING", 0.0)
    result = train(tiny(), tmp_path / "run", minutes=1e-9, quiet=True)
    assert result.images == 16
    found = json.loads((tmp_path / "run" / "environment.json").read_text())["budget"]
    assert found["measured_steps"] <= 1


def test_a_dry_run_tells_the_amounts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "mar-digits", *TINY, "--minutes", "0.5", "--out", str(tmp_path / "run"), "--dry-run", "--json"]
    assert in_process(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] % 16 == 0 and found["sample_images"] == math.ceil(found["images"] / 8)
    assert found["seconds_to_the_end"] < 30 and not (tmp_path / "run").exists()


@pytest.mark.fresh_process
@pytest.mark.parametrize("shard", ["false", "true"])
def test_several_processes_decide_together(tmp_path: Path, shard: str) -> None:
    words = ["train", "mar-digits", *TINY, "model.dropout=0", f"training.shard={shard}", "--minutes", "0.05"]
    found = together(2, partial(command, *words, "--out", str(tmp_path / "run")), tmp_path / "found")
    assert [code for code, _ in found] == [0, 0], found
    settings: Any = read_any(str(tmp_path / "run" / "recipe.yaml")).training
    assert settings.images % 16 == 0 and untimed_metrics(tmp_path / "run")[-1]["images"] == settings.images
    assert len([line for _, lines in found for line in lines if line.startswith("0.05 minutes")]) == 1
    torch.set_num_threads(1)
