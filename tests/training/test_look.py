"""Previews: eight of a run, one class a row under its name, the last one at several guidance scales; a timeline."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seriatim.core.images import read_png
from seriatim.evaluation.sheet import Row, places_of, save_sheet, sheet
from seriatim.training.config import Training, read_recipe
from seriatim.training.look import Preview, guidance_scales, interval, is_due, timeline
from seriatim.training.loop import train

TINY = [
    "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=16", "training.log_images=96", "training.dtype=float32", "training.threads=1",
    "training.images=96", "training.save_images=96", "sampling.num_inference_steps=2",
    "sampling.num_diffusion_steps=2",
]  # fmt: skip


def samples(folder: Path, *overrides: str) -> Path:
    train(read_recipe("mar-digits", [*TINY, *overrides]), folder, quiet=True)
    return folder / "samples"


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_samples_and_a_timeline(tmp_path: Path) -> None:
    found = samples(tmp_path / "seen", "training.sample_images=32", "training.sample_rows=5", "training.sample_each=2")
    names = sorted(path.name for path in found.iterdir())
    assert names == ["000000000032.png", "000000000064.png", "000000000096.png", "guidance.png", "timeline.png"]
    first, last = (read_png(found / name) for name in (names[0], names[2]))
    places = places_of(first)
    assert places is not None and places == places_of(last)
    assert places.words == ("0", "2", "4", "6", "8") and len(places.lefts) == 2, "spread over all classes"
    with Image.open(found / "timeline.png") as picture:
        assert picture.height > 3 * 64 and picture.width > 5 * 64, "three times; five classes beside each other"
    with Image.open(found / "guidance.png") as picture:
        assert picture.width > 3 * 2 * 64 and picture.height == pytest.approx(first.height, abs=30)
        strongest = picture.convert("RGB").crop((picture.width - 66, 0, picture.width, picture.height))
    assert np.asarray(strongest).std() > 10
    samples(tmp_path / "blind", "training.sample_images=0")
    assert not (tmp_path / "blind" / "samples").exists()
    assert weights(tmp_path / "seen") == weights(tmp_path / "blind"), "looking changes nothing"


def test_a_model_without_classes_is_shown_without_names(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(photos / f"{i}.png")
    found = samples(
        tmp_path / "run", f"data={{kind: folder, path: {photos}, size: 8}}", "tokenizer={kind: pixels, patch: 2}",
        "sampling.guidance_scale=1", "training.sample_images=48", "training.sample_each=4",
    )  # fmt: skip
    places = places_of(read_png(found / f"{48:012d}.png"))
    assert places is not None and (places.words, len(places.lefts)) == (("",) * 4, 8)
    assert not (found / "guidance.png").exists(), "guidance needs classes"


@pytest.mark.parametrize("images", [6400, 6401, 72_000, 10**9])
def test_auto_looks_eight_times(images: int) -> None:
    settings = Training(images=images, batch_size=64)
    steps = [*range(0, images, max(64, images // 10_000)), images]
    seen = [now for before, now in itertools.pairwise(steps) if is_due(settings, before, now, last=now == images)]
    assert len(seen) == 8 and seen[-1] == images


def test_short_runs_are_not_looked_at_unless_they_say_so() -> None:
    assert interval(Training(images=6399, batch_size=64)) == 0
    assert not is_due(Training(images=6399), 0, 6399, last=True)
    assert not is_due(Training(images=64_000, sample_images=0), 0, 64_000, last=True)
    assert is_due(Training(images=100, sample_images=1000), 64, 100, last=True), "the end is shown"
    with pytest.raises(ValueError, match="must be 'auto' or a whole number"):
        Training(images=10, sample_images="never")


def test_classes_of_a_preview_are_spread() -> None:
    assert Preview(10, 2).classes(3) == [0, 1, 2]
    assert Preview(10, 1).classes(1000) == list(range(0, 1000, 100))
    assert Preview(3, 2).labels(10, [str(i) for i in range(10)]) == [0, 0, 3, 3, 6, 6]
    assert Preview(3, 2).labels(0, []) == [None] * 16


@pytest.mark.parametrize(
    ("own", "scales"), [(1.0, [1, 2, 4]), (2.0, [1, 2, 3]), (4.0, [1, 2, 4, 6]), (1.5, [1, 1.5, 2.25])]
)
def test_guidance_scales_are_around_the_recipes_own(own: float, scales: list[float]) -> None:
    assert guidance_scales(own) == scales


def made(folder: Path, seen: int, level: int, **options: Any) -> None:
    words = options.get("words", ["cat", "dog"])
    rows = [Row(text, [Image.fromarray(np.full((8, 8), level + i, np.uint8))] * 5) for i, text in enumerate(words)]
    save_sheet(*sheet(rows), folder / f"{seen:012d}.png")


def test_a_damaged_grid_does_not_stop_the_timeline(tmp_path: Path) -> None:
    """The file of a full disk, one that is no picture at all, and the grid of an earlier version."""
    assert timeline(tmp_path) is None
    for seen in (32, 64, 96):
        made(tmp_path, seen, seen)
    whole = (tmp_path / f"{64:012d}.png").read_bytes()
    (tmp_path / f"{64:012d}.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"{80:012d}.png").write_text("no picture")
    Image.new("RGB", (40, 40)).save(tmp_path / f"{90:012d}.png")
    path = timeline(tmp_path)
    assert path is not None
    pixels = np.asarray(Image.open(path).convert("L"))
    areas = [int((pixels == level).sum()) // 64**2 for level in (32, 33, 64, 90, 96, 97)]
    assert areas == [4, 4, 0, 0, 4, 4], "four images of each of two classes, at the two times that are whole"


def test_a_long_run_has_a_short_timeline(tmp_path: Path) -> None:
    for seen in range(30):
        made(tmp_path, 10 * seen, 100 + seen, words=[""])
    path = timeline(tmp_path)
    assert path is not None
    pixels = np.asarray(Image.open(path).convert("L"))
    assert all((pixels == level).sum() >= 5 * 64**2 for level in (100, 129)), "the first and the last"
    assert pixels.shape[0] == 12 * 66 + 2


def test_originals_are_shown_once(tmp_path: Path) -> None:
    for seen in (10, 20):
        made(tmp_path, seen, seen, words=["original", "decoded"])
    path = timeline(tmp_path, pairs=True)
    assert path is not None
    pixels = np.asarray(Image.open(path).convert("L"))
    assert [int((pixels == level).sum()) // 64**2 for level in (10, 11, 20, 21)] == [5, 5, 0, 5]
