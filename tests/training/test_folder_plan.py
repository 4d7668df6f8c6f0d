"""A folder in the place of a recipe: what is chosen, what is said, and that the recipe repeats the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.test_mirroring import digits
from PIL import Image

from seriatim.cli.main import run as command
from seriatim.core.errors import ConfigError, DataError, UsageError
from seriatim.core.images import read_png
from seriatim.evaluation.sheet import places_of
from seriatim.models.base import Loss
from seriatim.training import budget, folder_plan, look, option_choice
from seriatim.training.config import read_any
from seriatim.training.folder_plan import FolderPlan, name_of, plan_folder, sized
from seriatim.training.option_choice import choose
from seriatim.training.plan_table import EXPECTED, OPTIONS, TRAINING
from seriatim.training.plan_words import expected, tokenizer_loss
from seriatim.training.precision import Choice

ONE = ["training.images=64", "training.threads=1", "training.dtype=float32"]
TINY = [
    "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "sampling.num_diffusion_steps=2", "training.batch_size=16", "training.threads=1", "training.dtype=float32",
]  # fmt: skip


def pictures(folder: Path, count: int, side: int = 32, label: str = "", seed: int = 0, mode: str = "RGB") -> Path:
    """Smooth coloured noise, each picture another."""
    (folder / label).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([seed, *label.encode()])
    for i in range(count):
        image = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image.resize((side, side), Image.Resampling.BICUBIC).convert(mode).save(folder / label / f"{i}.png")
    return folder


def planned(folder: Path, *settings: str, **options: Any) -> FolderPlan:
    return plan_folder(folder, settings=[*ONE, *settings], device="cpu", quiet=True, **options)


def said(plan: FolderPlan) -> str:
    return "\n".join(plan.lines)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LEAST_MEASURING", 0.0)
    monkeypatch.setattr(option_choice, "ENOUGH", 0.0)
    monkeypatch.setattr(look, "FEWEST_UPDATES", 1)


# --- choosing -------------------------------------------------------------------------------------------------------


def test_photographs_without_classes(tmp_path: Path) -> None:
    plan = planned(pictures(tmp_path / "my photos", 60))
    recipe = plan.recipe
    assert recipe.name == "my photos" and recipe.data["path"] == str(tmp_path / "my photos")
    assert recipe.data | {"path": ""} == {
        "kind": "folder", "path": "", "size": 32, "channels": 3, "flip": True, "classes": True, "max_bad": 0.5,
        "empty": "ignore", "background": "white", "memory": True,
    }  # fmt: skip
    assert recipe.model == OPTIONS[0].model and recipe.training.images == 64
    assert "guidance_scale" not in recipe.sampling and recipe.training.optimiser == TRAINING["optimiser"]
    assert "found 60 pictures without classes\n  all of 32x32 pixels, in colour, none transparent" in said(plan)
    assert "60 pictures are few: samples will be near copies of them" in said(plan)


def test_classes_have_guidance_and_digits_are_not_mirrored(tmp_path: Path) -> None:
    pixels, labels = digits(300)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (tmp_path / "data" / f"number {label}.").mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(image[0].numpy()).resize((28, 28))
        small.save(tmp_path / "data" / f"number {label}." / f"{i}.png")
    plan = planned(tmp_path / "data")
    data = plan.recipe.data
    assert (data["flip"], data["channels"], data["size"]) == (False, 1, 28)
    assert plan.recipe.tokenizer["components"] == 16 and plan.recipe.sampling["guidance_scale"] > 1
    assert "grey" in said(plan) and "not mirrored in training: names tell of letters, flags" in said(plan)


def test_transparent_pictures_that_white_would_hide(tmp_path: Path) -> None:
    for i in range(20):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        image.paste((255, 255, 250, 255), (i, 8, 30 + i, 50))
        image.save(tmp_path / f"{i}.png")
    plan = planned(tmp_path)
    assert plan.recipe.data["background"] == "black"
    assert "100% with transparent parts" in said(plan) and "on black" in said(plan)


@pytest.mark.parametrize(
    ("side", "size", "patch"), [(8, 8, 2), (30, 28, 4), (32, 32, 4), (63, 32, 4), (64, 32, 4), (500, 32, 4)]
)
def test_the_size_is_not_larger_than_the_pictures(tmp_path: Path, side: int, size: int, patch: int) -> None:
    recipe = planned(pictures(tmp_path, 4, side)).recipe
    assert (recipe.data["size"], recipe.tokenizer["patch"]) == (size, patch)


def test_settings_change_the_plan(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 6, label="a")
    recipe = planned(folder, "data.size=64", "data.classes=false", "model.depth=1", "data.flip=true").recipe
    assert (recipe.data["size"], recipe.tokenizer["patch"], recipe.model["depth"]) == (64, 8, 1)
    assert recipe.data["flip"] is True and recipe.data["classes"] is False
    for setting in ("data.size=[32,64]", "data.size=0", "data.size=big"):
        with pytest.raises(ConfigError, match=r"data\.size: .* is not allowed with a folder of pictures"):
            planned(folder, setting)
    for setting, said_of_it in (
        ("training.lerning_rate=1", "did you mean 'learning_rate'"),
        ("training.images=many", r"training\.images: 'many' is not allowed; it must be a whole number"),
        ("training.images=0", r"training\.images: 0 is not allowed"),
        ("training=5", "training"),
        ("data=5", "data"),
        ("data.channels=2", "channels: 2 is not allowed"),
    ):
        with pytest.raises(UsageError, match=said_of_it):
            planned(folder, setting)
    pictures(folder, 1)
    with pytest.raises(DataError, match=r"data\.loose=ignore"):
        planned(folder)
    assert "found 6 pictures in 1 class by folder, 6 each: a" in said(planned(folder, "data.loose=ignore"))


def test_many_passes_hold_some_pictures_out(tmp_path: Path) -> None:
    folder = pictures(tmp_path, 400, 8)
    assert planned(folder, "training.images=2000").recipe.data["validation"] == 0.05
    assert "validation" not in planned(folder, "training.images=1999").recipe.data
    assert "memory" not in planned(folder, "training.images=400").recipe.data


def test_the_largest_option_that_sees_enough_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the speed that is measured; none is tried after the first that would see too few."""
    tried: list[str] = []
    pace = {"small": 0.01, "medium": 0.04, "medium, 64 pixels": 0.2, "large, 64 pixels": 1.0}

    class Timed:
        size = 1
        model = torch.nn.Linear(2, 3)

        def __init__(self, option: Any, *_: Any) -> None:
            tried.append(option.name)
            self.name = option.name

        def loss(self, _: torch.dtype) -> Loss:
            raise AssertionError("time is made up")

    monkeypatch.setattr(option_choice, "Trial", Timed)
    monkeypatch.setattr(option_choice, "fastest", lambda *_: Choice("float32", 1, {}))
    monkeypatch.setattr(option_choice, "seconds", lambda _candidate, _where, loss: pace[loss.__self__.name] / 1.1)
    options = [sized(option, option.size) for option in OPTIONS]

    def chosen(time: float, images: int | None = None) -> tuple[str, int]:
        tried.clear()
        found = choose(options, time, images, 3, 0, torch.device("cpu"))
        return found.option.name, found.images

    assert chosen(60) == ("small", 6000 // 32 * 32) and tried == ["small", "medium"]
    assert chosen(799) == ("small", 79_872)
    assert chosen(803)[0] == "medium" and tried == ["small", "medium", "medium, 64 pixels"]
    assert chosen(21_000)[0] == "medium, 64 pixels"
    assert chosen(1e9)[0] == "large, 64 pixels" and len(tried) == 4
    assert chosen(1e-9) == ("small", 32), "one batch at least"
    assert chosen(1.0, 30_000) == ("medium", 30_000) and chosen(1.0, 5) == ("small", 5)


# --- what is said ---------------------------------------------------------------------------------------------------


def test_twelve_pictures(tmp_path: Path) -> None:
    plan = planned(pictures(tmp_path, 12))
    assert "note: 12 pictures: the model learns by heart what it sees, and gives it back" in said(plan)
    assert "expect: the training pictures again" in said(plan)


def test_forty_classes_of_three(tmp_path: Path) -> None:
    for i in range(40):
        pictures(tmp_path, 3, label=f"kind {i}.")
    plan = planned(tmp_path)
    assert "40 classes of 3: the model cannot learn what a class looks like; train without classes" in said(plan)
    assert "data.classes=false" in said(plan)
    assert "in 40 classes by folder, 3 each: kind 0., kind 1., " in said(plan) and "and 30 more" in said(plan)


def test_rare_classes_are_named(tmp_path: Path) -> None:
    for label, count in (("many", 40), ("more", 40), ("rare", 4)):
        pictures(tmp_path, count, label=label)
    text = said(planned(tmp_path))
    assert "1 class with fewer than 10 pictures will not be learned: rare" in text
    assert "in 3 classes by folder, 4 to 40 each" in text


def test_broken_files_and_copies(tmp_path: Path) -> None:
    pictures(tmp_path, 20)
    for i in range(10):
        (tmp_path / f"copy {i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    text = said(planned(tmp_path))
    assert "1 that can't be read, and will be left out (1 x not a " in text
    assert "20 of 30 are nearly the same as another one" in text and "make the set smaller than it looks" in text


def test_one_large_photograph(tmp_path: Path) -> None:
    pictures(tmp_path, 1, 600)
    with Image.open(tmp_path / "0.png") as image:
        image.resize((800, 600)).save(tmp_path / "0.png")
    text = said(planned(tmp_path))
    assert "found 1 picture without classes" in text and "all of 800x600 pixels" in text
    assert "the only picture: the model learns by heart" in text
    assert "which cuts off 25% of most" in text and "samples are 32x32 pixels, however large" in text


def test_expectations_grow_with_the_images() -> None:
    lines = [expected(images, 5000, 10) for images, _ in EXPECTED]
    assert len(set(lines)) == len(EXPECTED) and "there is time for 0% of the pictures only" in lines[0]
    assert "near copies" in expected(100_000, 500, 0) and "near copies" not in expected(10_000, 500, 0)
    assert "a class is seen 1,000 times on average" in expected(10_000, 5000, 10)
    assert [tokenizer_loss(psnr, 64, 32).split("loses ")[1][:8] for psnr in (50, 35, 30, 20)] == [
        "nothing ", "hardly a", "a little", "fine gra",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cars", "cars"),
        ("..", None),
        (".hidden", "hidden"),
        ("a:b\\c", "a-b-c"),
        ("Ünïcode", "Ünïcode"),
        ("é" * 80, None),
    ],
)
def test_a_folder_gives_a_name(tmp_path: Path, name: str, found: str | None) -> None:
    given = name_of(tmp_path / name)
    assert given == found if found is not None else 0 < len(given.encode()) <= 100


# --- refusals -------------------------------------------------------------------------------------------------------


def test_folders_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is an empty folder; name one with pictures"):
        planned(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    with pytest.raises(DataError, match="holds no pictures"):
        planned(tmp_path / "texts")
    monkeypatch.setattr(folder_plan, "is_run", lambda _: True)
    with pytest.raises(
        UsageError, match="is the folder of a run, not of pictures; go on with `seriatim train --resume"
    ):
        planned(pictures(tmp_path / "run", 1))


def test_one_process_makes_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="one process makes the plan; start it without torchrun"):
        planned(pictures(tmp_path, 2))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick", "steady")
def test_a_folder_is_trained_and_its_recipe_repeats_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("cat", "dog"):
        pictures(tmp_path / "pets", 8, label=label)
    out = tmp_path / "run"
    assert command(["train", str(tmp_path / "pets"), *TINY, "--minutes", "0.02", "--out", str(out)]) == 0
    told = capsys.readouterr().err
    plan = (out / "plan.txt").read_text().splitlines()
    assert plan[0] == "found 16 pictures in 2 classes by folder, 8 each: cat, dog" and "\n".join(plan) in told
    places = places_of(read_png(out / "tokenizer.png"))
    assert places is not None and places.words == ("original", "decoded")
    assert (out / "samples" / "guidance.png").is_file()
    assert command(["train", str(out / "recipe.yaml"), "--out", str(tmp_path / "again"), "--json"]) == 0
    one, two = ((folder / "model" / "model.safetensors").read_bytes() for folder in (out, tmp_path / "again"))
    assert one == two
    settings = read_any(str(out / "recipe.yaml")).training
    assert command(["train", str(tmp_path / "pets"), "--minutes", "5", "--out", str(out)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert command(["train", str(tmp_path / "pets"), "--minutes", "5", "--out", str(out), "--resume=auto"]) == 0
    told = capsys.readouterr().err
    assert "found 16" not in told and f"goes on to the {settings.images:,} images" in told
    assert command(["train", str(tmp_path / "pets"), *TINY, "--minutes", "0.02", "--out", str(out), "--overwrite"]) == 0


def test_a_dry_run_plans_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", 9)
    assert command(["train", "photos", *TINY, "training.images=32", "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    assert '"images": 32' in captured.out and "found 9 pictures" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_packaged_recipe_comes_before_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "mar-digits", 2)
    assert command(["train", "mar-digits", *TINY, "training.images=32", "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    assert '"training_images": 1437' in captured.out and "found" not in captured.err
    assert command(["train", "./mar-digits", *TINY, "training.images=32", "--dry-run", "--json"]) == 0
    assert "found 2 pictures" in capsys.readouterr().err


def test_images_in_the_place_of_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "photos", 9)
    words = ["train", str(tmp_path / "photos"), *TINY, "training.images=32", "--out", str(tmp_path / "run")]
    assert command([*words, "--minutes", "3"]) == 2
    assert "can't go with training.images" in capsys.readouterr().err
    assert command([*words, "--resume"]) == 2 and "no run to resume" in capsys.readouterr().err
    assert command([*words, "--resume=auto"]) == 0
    assert read_any(str(tmp_path / "run" / "recipe.yaml")).training.images == 32
