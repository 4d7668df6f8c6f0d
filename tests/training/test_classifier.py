"""Training a classifier: that it learns, resumes bitwise, and refuses what it can't use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import read_picture, signal_in_step
from PIL import Image

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.cli.main import run
from seriatim.core.errors import ConfigError, DataError, NumericsError, SeriatimError, Stopped, UsageError
from seriatim.data import labelled
from seriatim.data.labelled import augmented, build_labelled, draws_of, held_out_share
from seriatim.evaluation.residual_net import ResNet, load_classifier
from seriatim.training import classifier, engine
from seriatim.training.classifier import build, train_classifier
from seriatim.training.config import ClassifierRecipe, dump, read_any, read_recipe
from seriatim.training.loop import train
from seriatim.training.precision import Choice

TINY = [
    "data={kind: digits, test_share: 0.2}", "model.widths=[16]", "model.depth=[1]", "training.images=320",
    "training.batch_size=32", "training.log_images=64", "training.save_images=160", "training.test_images=128",
    "training.warmup_images=64", "training.crop=1", "training.cutout=2", "training.dtype=float32", "training.threads=1",
]  # fmt: skip


def tiny(*overrides: str) -> ClassifierRecipe:
    recipe = read_any("classifier-cifar10-tiny", [*TINY, *overrides])
    assert isinstance(recipe, ClassifierRecipe)
    return recipe


def lines(run: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "loader_share")} for row in read]


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor file of the last checkpoint, and of the model, as bytes."""
    newest = all_checkpoints(run / "checkpoints")[-1]
    names = ("model.safetensors", "average.safetensors", "optimiser.safetensors")
    found = {name: (newest / name).read_bytes() for name in names}
    return {**found, "final": (run / "model" / "classifier.safetensors").read_bytes()}


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Callable[[], None]:
    signal_in_step(monkeypatch, steps)
    return monkeypatch.undo


def pictures(folder: Path, classes: str = "ab", count: int = 6, side: int = 8) -> Path:
    """Noisy pictures, those of each class of a brightness of its own."""
    chance = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = 40 + 60 * k + chance.integers(0, 60, (side, side, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


# --- the run --------------------------------------------------------------------------------------------------------


@pytest.mark.curves
def test_a_run_folder_and_that_it_learns(tmp_path: Path) -> None:
    recipe = tiny(
        "training.images=8000", "training.log_images=1600", "training.test_images=3200", "training.cutout=0",
        "training.save_images=4000",
    )  # fmt: skip
    result = train_classifier(recipe, tmp_path / "run", quiet=True)
    out = tmp_path / "run"
    assert {p.name for p in out.iterdir()} == {
        "recipe.yaml", "data.json", "environment.json", "metrics.jsonl", "training.png", "accuracy.png",
        "results.json", "checkpoints", "model", ".lock",
    }  # fmt: skip
    assert read_any(str(out / "recipe.yaml")) == recipe
    rows = lines(out)
    assert [row["images"] for row in rows] == [1600, 3200, 4800, 6400, 8000]
    assert ["test_accuracy" in row for row in rows] == [False, True, False, True, True]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["accuracy"] > rows[0]["accuracy"]
    assert result.accuracy.plain > 0.9 and result.test_images == 287 and result.images == 8000
    report = json.loads((out / "results.json").read_text())
    assert report["test"] == result.accuracy.plain == rows[-1]["test_accuracy"], "float32 was asked for"
    assert report["test_with_mirror_images"] == result.accuracy.mirrored
    assert list(report["classes"]) == [str(d) for d in range(10)]
    for name in ("training.png", "accuracy.png"):
        assert read_picture(out / name).size[0] > 300
    trained = load_classifier(out)
    assert trained.name == "classifier-cifar10-tiny" and trained.accuracy["test"] == result.accuracy.plain
    assert trained.class_names == [str(d) for d in range(10)] and trained.size == (8, 8)
    assert trained.provenance["images"] == 8000
    assert f"{result.accuracy.plain:.2%}" in (out / "model" / "README.md").read_text()
    test = build(recipe, quiet=True)[1]
    logits = trained.net(test.images(torch.arange(test.count)))
    right = (logits.argmax(dim=1) == test.labels(torch.arange(test.count))).double().mean().item()
    assert right == result.accuracy.plain, "what was measured is what was saved"


def test_it_overfits_a_small_set(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", "abc", count=4)
    recipe = tiny(
        f"data={{kind: folder, path: {folder}, test_path: {folder}, size: 8}}",
        "training.images=1280",
        "training.save_images=0",
    )
    result = train_classifier(recipe, tmp_path / "run", quiet=True)
    assert result.accuracy.plain == 1.0 and lines(tmp_path / "run")[-1]["accuracy"] > 0.95


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_steps_are_four_and_six(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Bitwise: weights, averages, batch norms, momentum, metrics."""
    recipe = tiny(f"training.dtype={dtype}")
    train_classifier(recipe, tmp_path / "whole", quiet=True)
    undo = stop_after(monkeypatch, 4)
    with pytest.raises(Stopped, match=r"SIGTERM: stopped after 128 images, saved .*000000000128; go on with --resume"):
        train_classifier(recipe, tmp_path / "parts", quiet=True)
    undo()
    assert not (tmp_path / "parts" / "model").exists()
    train_classifier(recipe, tmp_path / "parts", resume=True, quiet=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


@pytest.mark.parametrize("lost", ["draws", "momentum"])
def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    train_classifier(tiny(), tmp_path / "whole", quiet=True)
    undo = stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        train_classifier(tiny(), tmp_path / "parts", quiet=True)
    undo()
    if lost == "draws":
        true = classifier.draws_of
        monkeypatch.setattr(classifier, "draws_of", lambda seed, first, count: true(seed + 1, first, count))
    else:
        true_load = engine.checkpoints.load

        def forgetful(path: Path, parts: Any) -> Any:
            state = true_load(path, parts)
            parts.optimiser.state.clear()
            return state

        monkeypatch.setattr(engine.checkpoints, "load", forgetful)
    train_classifier(tiny(), tmp_path / "parts", resume=True, quiet=True)
    assert weights(tmp_path / "whole") != weights(tmp_path / "parts")


def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))  # what the caller did before must not matter
        train_classifier(tiny(f"seed={seed}", "training.images=64"), tmp_path / name, quiet=True)
    a, b, c = (weights(tmp_path / name)["final"] for name in "abc")
    assert a == b and a != c


def test_probing_for_speed_changes_nothing(tmp_path: Path) -> None:
    """What batch norm saw while dtypes and threads were tried is forgotten."""
    train_classifier(tiny("training.images=64"), tmp_path / "a", quiet=True)
    true = engine.fastest

    def probed(*arguments: Any) -> Choice:
        loss_of = arguments[3]
        loss_of(torch.float32).mean.backward()
        return Choice("float32", 1, {})

    engine.fastest = probed  # type: ignore[assignment]
    try:
        train_classifier(tiny("training.images=64", "training.dtype=auto"), tmp_path / "b", quiet=True)
    finally:
        engine.fastest = true
    assert weights(tmp_path / "a")["final"] == weights(tmp_path / "b")["final"]


def test_what_is_not_finite_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = ResNet.forward, [0]

    def poisoned(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return true(self, images) * (float("nan") if calls[0] == 3 else 1.0)

    monkeypatch.setattr(ResNet, "forward", poisoned)
    with pytest.raises(NumericsError, match=r"the loss is not finite \(nan\) after 64 images"):
        train_classifier(tiny(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.label_smoothing=0.3"], "training.label_smoothing: 0.1 in "),
        (["model.depth=[2]"], "model.depth: [1] in "),
        (["data.test_share=0.3"], "data.test_share: 0.2 in "),
    ],
)
def test_other_settings_are_not_resumed(tmp_path: Path, overrides: list[str], words: str) -> None:
    train_classifier(tiny("training.images=32"), tmp_path, quiet=True)
    with pytest.raises(ConfigError) as caught:
        train_classifier(tiny(*overrides), tmp_path, resume=True, quiet=True)
    assert words in str(caught.value)
    with pytest.raises(UsageError, match="holds a run already"):
        train_classifier(tiny(), tmp_path, quiet=True)
    with pytest.raises(SeriatimError, match=r"holds 'classifier.safetensors', which is no part of a model"):
        train(read_recipe("mar-digits"), tmp_path, resume=True, quiet=True)


# --- data -----------------------------------------------------------------------------------------------------------


def test_held_out_images_are_a_share_of_each_class_and_none_is_trained_on(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", "abc", count=10)
    data, test = build_labelled({"kind": "folder", "path": str(folder), "size": 8, "test_share": 0.2}, 0, quiet=True)
    assert (data.count, test.count) == (24, 6)
    assert torch.bincount(test.labels(torch.arange(6))).tolist() == [2, 2, 2]
    names = {data.name(i) for i in range(24)} | {test.name(i) for i in range(6)}
    assert len(names) == 30, "every image is in one of the two"
    again = held_out_share(data.source, 0.2, 0)[1]
    assert torch.equal(again, test.index) and not torch.equal(held_out_share(data.source, 0.2, 1)[1], test.index)
    assert data.fingerprint() != test.fingerprint()


def test_images_are_read_once(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data")
    config = {"kind": "folder", "path": str(folder), "test_path": str(folder), "size": 8}
    data, test = build_labelled(config, 0, quiet=True)
    before = data.images(torch.arange(data.count))
    for path in folder.rglob("*.png"):
        path.unlink()
    assert torch.equal(data.images(torch.arange(data.count)), before) and before.dtype == torch.uint8
    assert torch.equal(test.images(torch.tensor([3])), before[3:4]) and data.count == 12


def test_a_run_of_the_other_kind_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(read_recipe("mar-digits")))
    (tmp_path / "data.json").write_text('{"fingerprint": "x"}')
    with pytest.raises(ConfigError, match=r"kind: .* holds the run of a generator, not of a classifier"):
        train_classifier(tiny(), tmp_path, resume=True, quiet=True)


def test_augmentation_depends_on_the_number_in_the_run_alone() -> None:
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    draws = draws_of(0, 10, 6)
    whole = augmented(images, draws, 2, 3)
    assert torch.equal(draws, torch.cat([draws_of(0, 10, 2), draws_of(0, 12, 4)]))
    parts = [augmented(images[part], draws[part], 2, 3) for part in (slice(2), slice(2, 6))]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.min() >= -1 and whole.max() <= 1 and whole.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(draws_of(1, 10, 6), draws), "another seed, another draw"
    assert torch.equal(augmented(images, draws, 0, 0), images.float() / 127.5 - 1)


def test_crops_mirror_the_border() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4) / 16
    seen = set()
    for draw in range(9):  # down = draw % 3 - 1, right = draw // 3 - 1
        moved = augmented(image, torch.tensor([draw]), 1, 0)
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="reflect")
        expected = padded[:, :, draw % 3 : draw % 3 + 4, draw // 3 : draw // 3 + 4]
        assert torch.equal(moved, expected)
        seen.add(tuple(moved.flatten().tolist()))
    assert len(seen) == 9


def test_cutout_greys_a_square() -> None:
    image = torch.ones(200, 3, 8, 8)
    grey = (augmented(image, draws_of(0, 0, 200), 0, 4) == 0).all(dim=1)  # (B, H, W)
    areas = grey.sum(dim=(1, 2))
    assert areas.max() == 16 and areas.min() >= 4, "less where it hangs over the border"
    assert (grey.sum(dim=1).max(dim=1).values <= 4).all()
    assert grey.any(dim=0).all(), "anywhere"


def test_bad_data_is_one_line(tmp_path: Path) -> None:
    two, flat, one = pictures(tmp_path / "two"), tmp_path / "flat", pictures(tmp_path / "one", "a")
    other, single = pictures(tmp_path / "other", "ac"), pictures(tmp_path / "single", count=1)
    flat.mkdir()
    (two / "a" / "0.png").rename(flat / "0.png")

    def refused(error: type[SeriatimError], words: str, **data: Any) -> None:
        with pytest.raises(error) as caught:
            build_labelled({"kind": "folder", "size": 8, **data}, 0, quiet=True)
        assert words in str(caught.value) and "\n" not in str(caught.value), caught.value

    refused(DataError, "data.path: has no classes; a classifier needs two or more", path=str(flat))
    refused(DataError, "data.path: has the one class 'a'; a classifier needs two or more", path=str(one))
    refused(DataError, "'b' is only in data.path", path=str(two), test_path=str(other))
    refused(DataError, "'b' is only in data.test_path", path=str(other), test_path=str(two))
    refused(DataError, "data.test_path: ", path=str(two), test_path=str(tmp_path / "nowhere"))
    refused(DataError, "class 'a' has 1 usable images, so none can be held out", path=str(single))
    refused(ConfigError, "data.test_share: 1.5 is not allowed", path=str(two), test_share=1.5)
    refused(ConfigError, "data.test_path: 5 is not allowed", path=str(two), test_path=5)
    refused(ConfigError, "unknown key 'data.tset_path'", path=str(two), tset_path="x")
    with pytest.raises(ConfigError, match="data of kind 'digits' has no path"):
        build_labelled({"kind": "digits", "test_path": "x"}, 0)


def test_more_images_than_memory_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"data: \d+ images of 3 x 8 x 8 take .* lower data.size"):
        build_labelled({"kind": "folder", "path": str(pictures(tmp_path / "x")), "size": 8}, 0, quiet=True)


# --- recipes and the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.betas=[0.9, 0.9]"], "unknown key 'training.betas'"),
        (["tokenizer.patch=2"], "unknown key 'tokenizer.patch'"),
        (["training.crpo=2"], "unknown key 'training.crpo'; did you mean 'crop'"),
        (["training.label_smoothing=1"], "training.label_smoothing"),
        (["kind=generator"], "kind: "),
        (["training.batch_size=1"], "training.batch_size"),
    ],
)
def test_recipes_that_are_wrong(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(*overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_recipes_that_do_not_fit_the_data() -> None:
    with pytest.raises(ConfigError, match=r"training.crop: 8 is not allowed; it must be less than the side, 8"):
        build(tiny("training.crop=8"), quiet=True)
    with pytest.raises(ConfigError, match=r"model.widths: 4 stages halve images of side 8 away"):
        build(tiny("model.widths=[4, 4, 4, 4]", "model.depth=[0, 0, 0, 0]"), quiet=True)


def test_other_verbs_refuse_a_classifiers_recipe() -> None:
    with pytest.raises(
        UsageError, match="'classifier-cifar10' trains a classifier, which `seriatim train` alone takes"
    ):
        read_recipe("classifier-cifar10")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pictures(tmp_path / "data", "abc", count=10)
    settings = ("data.path=data", "data.size=8", *TINY[1:])
    train = ("train", "classifier-cifar10-tiny", *settings, "--out", "run")

    def succeeded(*arguments: str) -> Any:
        assert run(arguments) == 0
        return json.loads(capsys.readouterr().out)

    def refused(code: int, words: str, *arguments: str) -> None:
        capsys.readouterr()
        assert run(arguments) == code
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1 and words in printed

    plan = succeeded(*train, "--dry-run", "--json")
    assert plan["training_images"] == 27 and plan["test_images"] == 3 and plan["classes"] == 3
    assert not (tmp_path / "run").exists()
    report = succeeded(*train, "--json")
    assert report["images"] == 320 and report["test_images"] == 3 and 0 <= report["test_accuracy"] <= 1
    assert load_classifier(tmp_path / "run").class_names == ["a", "b", "c"]
    assert run([*train, "--resume"]) == 0 and "test_accuracy" in capsys.readouterr().out
    assert succeeded("recipes", "show", "run/recipe.yaml", "--json")["kind"] == "classifier"
    refused(2, "run holds a run already", *train)
    refused(4, "holds a classifier, which draws nothing", "sample", "run")
    refused(2, "trains a classifier, which `seriatim train` alone takes", "cache", "classifier-cifar10", "--out", "c")
    for path in (*(folder / "a").iterdir(), *(folder / "b").iterdir()):
        path.unlink()
    refused(3, "of data, a/, b/ would be a class without pictures", *train[:-1], "other")
    for name in "ab":
        (folder / name).rmdir()
    refused(3, "has the one class 'c'; a classifier needs two or more", *train[:-1], "other")
