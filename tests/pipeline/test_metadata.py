"""A PNG says how it was made; what it says is believed no further than it can be checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make_bundle
from PIL import Image, PngImagePlugin

from seriatim.checkpoints.native import save_bundle
from seriatim.cli.main import run
from seriatim.core.errors import DataError, UsageError
from seriatim.pipeline.loading import load
from seriatim.pipeline.metadata import KEY, LONGEST, read_recorded
from seriatim.pipeline.pipeline import Pipeline

FEW = ["--num-inference-steps", "3", "--num-diffusion-steps", "4"]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model/, and out/ with four pictures that it has drawn in one batch."""
    monkeypatch.chdir(tmp_path)
    save_bundle(make_bundle(), tmp_path / "model")
    labels = ["--label", "cat", "--label", "dog", "--num-images-per-label", "2"]
    assert run(["sample", "model", *labels, *FEW, "--guidance-scale", "2", "--seed", "5", "--out", "out"]) == 0
    return tmp_path


def rewritten(path: Path, text: str | None, key: str = KEY) -> Path:
    """The picture with another text chunk."""
    with Image.open(path) as image:
        image.load()
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt(key, text)
    image.save(path, pnginfo=info)
    return path


def test_a_picture_is_repeated_alone(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in sorted((drawn / "out").glob("0*.png")):
        capsys.readouterr()
        assert run(["sample", "model", "--from", str(file), "--out", f"again-{file.stem}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["images"] == 1
        assert found["pixels"] == "identical" or found["pixels"].startswith("largest difference 1 of 255")
        again = np.asarray(Image.open(next((drawn / f"again-{file.stem}").glob("0*.png")))).astype(int)
        assert np.abs(again - np.asarray(Image.open(file))).max() <= 1


def test_what_is_recorded(drawn: Path) -> None:
    _, says = read_recorded(drawn / "out" / "0002-dog.png")
    assert says.label == "dog" and says.request["guidance_scale"] == 2.0 and says.request["class_labels"] == ["dog"]
    assert says.model_sha256 == load(drawn / "model", device="cpu").bundle.sha256
    assert says.versions["dtype"] == "float32" and {"seriatim", "torch", "device"} <= says.versions.keys()
    text = Image.open(drawn / "out" / "0002-dog.png").text[KEY]  # type: ignore[attr-defined]
    assert str(drawn) not in text, "nothing of the machine it was drawn on"


def test_python_saves_the_same(tmp_path: Path) -> None:
    pipe = Pipeline(make_bundle(), device="cpu")
    files = pipe(class_labels=["cat", None], seed=1).save(tmp_path)
    assert [file.name for file in files] == ["0000-cat.png", "0001-image.png"]
    image, says = read_recorded(files[1])
    again = pipe(request=says.sample_request())
    assert np.abs(np.asarray(again.images[0]).astype(int) - np.asarray(image)).max() <= 1
    with pytest.raises(UsageError, match="only PIL images can be saved"):
        pipe(seed=0, output_type="np").save(tmp_path)


def good(path: Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text[KEY])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _says: None, "has no metadata"),
        (lambda _says: "{", "is not JSON"),
        (lambda _says: "[" * 50_000, "nested deeper"),
        (lambda _says: "[]", "not a mapping"),
        (lambda _says: " " * (LONGEST + 1), "characters long"),
        (lambda says: json.dumps({**says, "format": 2}), "format: "),
        (lambda says: json.dumps({**says, "hook": "rm"}), "unknown key 'hook'"),
        (lambda says: json.dumps({**says, "request": {"seed": -1}}), "seed: "),
        (lambda says: json.dumps({**says, "request": {**says["request"], "num_images_per_label": 500}}), "seeds: "),
        (lambda _says: '{"format": ' + "9" * 5000 + "}", "5,000 digits"),
        (lambda _says: '{"format": Infinity}', "Infinity"),
        (lambda says: json.dumps({**says, "request": {"class_labels": ["cat"] * 50}}), "asks for 50 images"),
        (lambda says: json.dumps({**says, "request": {"class_labels": [0] * 9 + ["x" * 9000]}}), "asks for 10 images"),
    ],
)
def test_hostile_metadata_is_one_line(drawn: Path, capsys: pytest.CaptureFixture[str], change: Any, words: str) -> None:
    path = drawn / "out" / "0000-cat.png"
    rewritten(path, change(good(path)))
    with pytest.raises(DataError) as caught:
        read_recorded(path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    capsys.readouterr()
    assert run(["sample", "model", "--from", str(path), "--out", "again"]) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (drawn / "again").exists()


def test_a_hostile_option_of_the_head_is_one_line(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a head takes is known where the model is: it refuses the number before anything is drawn."""
    path = drawn / "out" / "0000-cat.png"
    says = good(path)
    rewritten(path, json.dumps({**says, "request": {**says["request"], "num_diffusion_steps": 10**9}}))
    assert run(["sample", "model", "--from", str(path), "--out", "again"]) in (2, 3)
    said = capsys.readouterr().err
    assert "num_diffusion_steps: 1000000000 is not allowed" in said and len(said.strip().splitlines()) == 1
    assert not (drawn / "again").exists()


def test_a_decompression_bomb_in_the_text(drawn: Path) -> None:
    path = drawn / "out" / "0000-cat.png"
    with Image.open(path) as image:
        image.load()
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, "x" * (1 << 26), zip=True)  # 64 MB in 64 kB
    image.save(path, pnginfo=info)
    with pytest.raises(DataError) as caught:
        read_recorded(path)
    assert "\n" not in str(caught.value)


def test_what_can_not_be_repeated(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = drawn / "out" / "0000-cat.png"

    def line(*arguments: str, code: int) -> str:
        capsys.readouterr()
        assert run(["sample", *arguments, "--out", "again"]) == code
        lines = capsys.readouterr().err.strip().splitlines()
        return lines[-1]

    before = path.read_bytes()
    assert run(["sample", "model", "--from", str(path), "--out", "out", "--overwrite"]) == 2
    assert "which would be replaced" in capsys.readouterr().err and path.read_bytes() == before
    assert "is not a file" in line("model", "--from", "nothing.png", code=2)
    assert "seed: given together with --from" in line("model", "--from", str(path), "--seed", "3", code=2)
    (drawn / "text.png").write_text("no picture")
    assert "is not a readable PNG" in line("model", "--from", "text.png", code=3)
    other = make_bundle(width=16)
    save_bundle(other, drawn / "other")
    assert "was drawn by" in line("other", "--from", str(path), code=4)
    says = good(path)
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    rewritten(path, json.dumps(says))
    assert "were changed later" in line("model", "--from", str(path), code=3)
    rewritten(path, json.dumps({**says, "edited": True}))
    assert "edited from another picture" in line("model", "--from", str(path), code=3)


def test_another_picture_is_told_from_rounding(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from seriatim.pipeline.metadata import pixels_sha256

    path = drawn / "out" / "0000-cat.png"
    says = good(path)
    inverted = Image.fromarray(255 - np.asarray(Image.open(path)))
    inverted.save(path)
    rewritten(path, json.dumps({**says, "pixels_sha256": pixels_sha256(inverted), "versions": {"torch": "1.0"}}))
    assert run(["sample", "model", "--from", str(path), "--out", "again"]) == 5
    assert "the repeated picture differs: largest difference" in capsys.readouterr().err
