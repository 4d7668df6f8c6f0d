"""A generated picture carries its request into every PNG file, whoever writes it, and into nothing else."""

from __future__ import annotations

import copy
import json
import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers import make_bundle
from PIL import Image, PngImagePlugin

from seriatim.checkpoints.native import save_bundle
from seriatim.cli.main import run
from seriatim.core.errors import UsageError
from seriatim.pipeline.metadata import KEY, read_recorded
from seriatim.pipeline.pipeline import Pipeline
from seriatim.pipeline.result import Result
from seriatim.pipeline.sample_image import SampleImage


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(make_bundle(), device="cpu")


@pytest.fixture(scope="module")
def result(pipe: Pipeline) -> Result:
    return pipe(["cat", "dog"], seed=4, num_inference_steps=2, num_diffusion_steps=3)


def test_a_picture_that_the_user_saves_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_bundle(make_bundle(), tmp_path / "model")
    drawn = Pipeline.from_pretrained(tmp_path / "model", device="cpu")(["cat", "dog"], seed=4, num_diffusion_steps=3)
    drawn.images[1].save(tmp_path / "x.png")
    capsys.readouterr()
    command = ["sample", str(tmp_path / "model"), "--device", "cpu", "--from", str(tmp_path / "x.png"), "--json"]
    assert run([*command, "--out", str(tmp_path / "out")]) == 0
    pixels = json.loads(capsys.readouterr().out)["pixels"]
    assert pixels == "identical" or pixels.startswith("largest difference 1 of 255")


def test_all_ways_write_the_same_file(result: Result, tmp_path: Path) -> None:
    saved = result.save(tmp_path / "out")
    result.images[1].save(tmp_path / "named.PNG")
    result.images[1].save(tmp_path / "other.bin", format="png")
    stream = BytesIO()
    result.images[1].save(stream, "PNG")
    with open(tmp_path / "open.png", "wb") as file:
        result.images[1].save(file)
    ways = [tmp_path / "named.PNG", tmp_path / "other.bin", tmp_path / "open.png"]
    assert {result.png(1), stream.getvalue(), *(path.read_bytes() for path in ways)} == {saved[1].read_bytes()}
    says = read_recorded(tmp_path / "named.PNG")[1]
    assert says.label == "dog" and says.sample_request() == result.request.part([1]) and not says.edited


def test_the_text_of_a_caller_is_kept(result: Result, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a dog")
    result.images[1].save(tmp_path / "x.png", pnginfo=info)
    result.images[1].save(tmp_path / "x.gif")
    with Image.open(tmp_path / "x.png") as image, Image.open(tmp_path / "x.gif") as other:
        assert image.info["Title"] == "a dog" and KEY not in image.info and KEY not in other.info


def test_other_pixels_are_no_longer_those_of_the_request(result: Result, tmp_path: Path) -> None:
    for i, other in enumerate((result.images[0].resize((4, 4)), result.images[0].rotate(90), result.images[0].copy())):
        assert type(other) is Image.Image
        other.save(tmp_path / f"{i}.png")
        with Image.open(tmp_path / f"{i}.png") as image:
            assert KEY not in image.info
    changed = copy.deepcopy(result.images[0])
    changed.putpixel((0, 0), 255 - changed.getpixel((0, 0)))
    changed.save(tmp_path / "changed.png")
    command = ["sample", "no-model", "--from", str(tmp_path / "changed.png"), "--out", str(tmp_path / "out")]
    assert run(command) == 3, "the pixels were changed later"


def test_a_picture_survives_pickling(result: Result, tmp_path: Path) -> None:
    for again in (pickle.loads(pickle.dumps(result.images[0])), copy.deepcopy(result.images[0])):
        assert isinstance(again, SampleImage) and again.says == result.images[0].says
        assert np.array_equal(np.asarray(again), np.asarray(result.images[0]))
        again.save(tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes() == result.png(0)


def test_png_is_of_pil_images_that_are_there(pipe: Pipeline, result: Result) -> None:
    with pytest.raises(UsageError, match="i: 2 is not allowed; the result has images 0 to 1"):
        result.png(2)
    with pytest.raises(UsageError, match="output_type"):
        pipe(seed=0, output_type="np", num_inference_steps=2).png(0)


def test_an_edited_picture_says_so(pipe: Pipeline, result: Result) -> None:
    again = pipe.regenerate(result, [0, 1], seed=9)
    assert again.images[0].says.edited and not result.images[0].says.edited
