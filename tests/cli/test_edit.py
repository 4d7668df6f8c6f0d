"""`seriatim edit`, animations, and what a cancelled stream leaves behind."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from helpers import make_bundle
from PIL import Image

from seriatim.checkpoints.native import save_bundle
from seriatim.cli.main import run
from seriatim.core.errors import UsageError
from seriatim.pipeline.animation import save_animation
from seriatim.pipeline.metadata import read_recorded
from seriatim.pipeline.pipeline import Pipeline

FEW = ["--num-inference-steps", "3", "--num-diffusion-steps", "4"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model/ (8x8 grey pixels), image.png, and mask.png with a white right half."""
    monkeypatch.chdir(tmp_path)
    save_bundle(make_bundle(), tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save("image.png")
    Image.fromarray(np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None].repeat(8, 0)).save("mask.png")
    return tmp_path


def edit(*more: str) -> int:
    return run(["edit", "model", "image.png", "--mask", "mask.png", *FEW, *more])


def test_the_black_half_stays(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit("--label", "cat", "--label", "dog", "--seed", "1", "--out", "edited", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    before = np.asarray(Image.open("image.png"))
    for name in ("0000-cat.png", "0001-dog.png"):
        image, says = read_recorded(work / "edited" / name)
        assert (np.asarray(image)[:, :4] == before[:, :4]).all() and (np.asarray(image)[:, 4:] != before[:, 4:]).any()
        assert says.edited
    with Image.open(work / "edited" / "grid.png") as grid:
        assert grid.width > 4 * 64
    assert edit("--seed", "1", "--out", "edited") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert edit("--seed", "1", "--out", "edited", "--overwrite") == 0


def test_what_is_wrong_is_one_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*arguments: str, code: int = 2) -> str:
        capsys.readouterr()
        assert run(["edit", "model", *arguments, "--out", "never"]) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and not (work / "never").exists()
        return lines[0]

    assert "no such file" in line("nothing.png", "--mask", "mask.png")
    assert "no such file" in line("image.png", "--mask", "nothing.png")
    (work / "text.png").write_text("no picture")
    assert "text.png" in line("text.png", "--mask", "mask.png")
    Image.new("L", (16, 8)).save("wide.png")
    assert "image: 8x16 pixels (height x width), but the model generates 8x8" in line("wide.png", "--mask", "mask.png")
    assert "mask: 8x16 pixels is not the image's 8x8" in line("image.png", "--mask", "wide.png")
    Image.new("L", (8, 8), 0).save("black.png")
    Image.new("L", (8, 8), 255).save("white.png")
    assert "mask: is all black" in line("image.png", "--mask", "black.png")
    assert "mask: is all white" in line("image.png", "--mask", "white.png")
    assert "did you mean 'horse'" in line("image.png", "--mask", "mask.png", "--label", "hors")


def test_tokens_appear_in_an_animation(work: Path) -> None:
    assert run(["sample", "model", "--label", "cat", *FEW, "--seed", "0", "--animate", "--out", "out"]) == 0
    with Image.open(work / "out" / "animation.gif") as moving:
        assert moving.n_frames == 3 and moving.info["loop"] == 0  # type: ignore[attr-defined]
        frames = []
        for i in range(3):
            moving.seek(i)
            frames.append(np.asarray(moving.convert("RGB")))
    assert (frames[0] != frames[2]).any()
    assert run(["sample", "model", "--label", "cat", *FEW, "--batch-size", "2", "--animate", "--out", "out"]) == 2
    more = ["--num-images-per-label", "3", "--batch-size", "2"]
    assert run(["sample", "model", "--label", "cat", *FEW, *more, "--animate", "--out", "batches"]) == 0
    with Image.open(work / "batches" / "animation.gif") as moving:
        assert moving.n_frames == 3, "batches move together"  # type: ignore[attr-defined]


def test_animations_of_both_kinds(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (0, 80, 255)]
    for name in ("a.gif", "a.png"):
        with Image.open(save_animation(frames, tmp_path / name)) as moving:
            assert moving.n_frames == 3  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"a\.mp4 must end in"):
        save_animation(frames, tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="no steps"):
        save_animation([], tmp_path / "none.gif")


def test_a_cancelled_stream_frees_what_it_held() -> None:
    pipe = Pipeline(make_bundle(), device="cpu")
    stream = pipe.stream(class_labels=["cat"] * 4, seed=0, num_inference_steps=8, num_diffusion_steps=4)
    step = next(stream)
    step.preview()
    held = [weakref.ref(step.tokens), weakref.ref(step.known)]
    assert isinstance(stream, Generator)
    stream.close()
    del step, stream
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    again = pipe(class_labels=["cat"], seed=0, num_inference_steps=2, num_diffusion_steps=4)
    assert len(again.images) == 1
