"""Sampling into a folder: it resumes to the bit, takes jobs, and writes formats and names of the user's choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make_bundle
from PIL import Image

from seriatim.checkpoints.native import save_bundle
from seriatim.cli.main import run
from seriatim.core.errors import UsageError
from seriatim.pipeline import folder_sampling
from seriatim.pipeline.folder_sampling import FolderSampling, sample_to_folder
from seriatim.pipeline.metadata import read_recorded
from seriatim.pipeline.picture_names import check_pattern
from seriatim.pipeline.pipeline import Pipeline

FEW: dict[str, Any] = {"num_inference_steps": 2, "num_diffusion_steps": 2}
JOBS = [
    {"label": "cat", "num_images_per_label": 3, "name": "a/b"},
    {"class_labels": ["dog", None], "seeds": [7, 8]},
    {"label": "cat", "guidance_scale": 3.0, "seed": 5},
]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(make_bundle(), device="cpu")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("form", ["png", "jpg", "webp", "npy"])
def test_a_killed_sampling_goes_on_to_the_bit(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """It dies within the second batch of two; of the batch, what is there is not written again."""
    options: dict[str, Any] = {"jobs": JOBS, "format": form, "batch_size": 2, **FEW}
    whole = sample_to_folder(pipe, tmp_path / "whole", **options)
    assert len(whole) == 6 and all(file.suffix == f".{form}" for file in whole)
    true, calls = folder_sampling.save_picture, [0]

    def dying(*arguments: Any, **others: Any) -> Path:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return true(*arguments, **others)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder_sampling, "save_picture", dying)
        sample_to_folder(pipe, out, **options)
    there = sorted(out.glob(f"*.{form}"))
    assert len(there) == 3
    there[1].write_bytes(there[1].read_bytes()[:-30])  # half-written, as on a disk that lost its last block
    before = {path: path.stat().st_mtime_ns for path in there}
    sample_to_folder(pipe, out, resume=True, **options)
    assert content(out) == content(tmp_path / "whole")
    assert [path.stat().st_mtime_ns == before[path] for path in there] == [True, False, True]
    drawn = [0]
    monkeypatch.setattr(pipe, "_steps", lambda *_: drawn.append(1))  # a generator is asked for, but nothing is drawn
    sample_to_folder(pipe, out, resume=True, **options)
    assert drawn == [0, 1], "the one is the check of the request"


def test_pictures_of_another_request_are_not_mixed_in(pipe: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample_to_folder(pipe, out, ["cat"], seed=1, **FEW)
    before = content(out)
    others: list[tuple[dict[str, Any], str]] = [
        ({"class_labels": ["cat"], "seed": 2}, "seed is 1 there, 2 here"),
        ({"class_labels": ["dog"], "seed": 1}, r"class_labels is \['cat'\] there, \['dog'\] here"),
        ({"class_labels": ["cat"], "seed": 1, "guidance_scale": 4.0}, "guidance_scale is 1.5 there, 4.0 here"),
        ({"class_labels": ["cat"], "seed": 1, "format": "jpg"}, "--format or --name-pattern was another"),
        ({"class_labels": ["cat"], "seed": 1, "num_diffusion_steps": 3}, "num_diffusion_steps is 2 there, 3 here"),
    ]
    for other, words in others:
        with pytest.raises(UsageError, match=words) as caught:
            sample_to_folder(pipe, out, resume=True, **{**FEW, **other})
        assert "\n" not in str(caught.value) and content(out) == before
    assert len(sample_to_folder(pipe, out, ["cat"], resume=True, num_images_per_label=2, **FEW)) == 2, "it grows"


def test_jobs_draw_what_their_requests_draw(pipe: Pipeline, tmp_path: Path) -> None:
    files = sample_to_folder(pipe, tmp_path / "out", jobs=JOBS, **FEW)
    assert [file.name for file in files] == [
        "0000-cat.png", "0001-cat.png", "0002-cat.png", "0003-dog.png", "0004-image.png", "0005-cat.png",
    ]  # fmt: skip
    requests: list[dict[str, Any]] = [
        {"class_labels": ["cat"], "num_images_per_label": 3, "seed": 0},
        {"class_labels": ["dog", None], "seeds": [7, 8]},
        {"class_labels": ["cat"], "guidance_scale": 3.0, "seed": 5},
    ]
    alone = [image for request in requests for image in pipe(**request, **FEW).images]
    for file, image in zip(files, alone, strict=True):
        found = np.asarray(Image.open(file)).astype(int)
        assert np.abs(found - np.asarray(image)).max() <= 1, "batched with other jobs, it is rounded otherwise at most"


@pytest.mark.parametrize("form", ["jpg", "webp", "npy"])
def test_a_format_is_read_back_with_its_request(pipe: Pipeline, tmp_path: Path, form: str) -> None:
    png = sample_to_folder(pipe, tmp_path / "png", ["dog"], seed=3, **FEW)[0]
    file = sample_to_folder(pipe, tmp_path / form, ["dog"], seed=3, format=form, **FEW)[0]
    image, says = read_recorded(file)
    assert says.matches(image) and says.label == "dog"
    assert says.request == read_recorded(png)[1].request and says.pixels_sha256 == read_recorded(png)[1].pixels_sha256
    assert not says.matches(Image.eval(image, lambda value: 255 - value)), "what was changed is noticed"
    if form == "npy":
        assert np.array_equal(np.load(file), np.asarray(Image.open(png)))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{index}-{lable}", "unknown field 'lable'; did you mean 'label'"),
        ("{label.__class__}", "unknown field"),
        ("../{index}", "would make paths"),
        ("{index:99999999d}", "is not allowed for a field"),
        ("{index!r}", "is not allowed for a field"),
        ("{index", "can't be read"),
        ("{job}-{index}", "needs a file of jobs"),
        (".{index}", "begins with a dot"),
        ("{label}", "gives images 0 and 1 the same name cat.png; add {index}"),
        ("grid", "the same name grid.png"),
        ("x" * 180 + "-{label:<40}", "more than 200 bytes"),
        ("{label:d}", "can't be filled in"),
    ],
)
def test_wrong_patterns(pipe: Pipeline, tmp_path: Path, pattern: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        sample_to_folder(pipe, tmp_path / "out", ["cat", "cat"], name_pattern=pattern, **FEW)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_patterns(pipe: Pipeline, tmp_path: Path) -> None:
    pattern = "{index:03d} {label}:{number}-{seed}-{job}"
    files = sample_to_folder(pipe, tmp_path / "out", jobs=JOBS, name_pattern=pattern, **FEW)
    assert [file.name for file in files] == [
        "000 cat_0-0-a_b.png", "001 cat_1-0-a_b.png", "002 cat_2-0-a_b.png", "003 dog_0-7-1.png",
        "004 image_0-8-1.png", "005 cat_0-5-2.png",
    ]  # fmt: skip
    check_pattern("{job}", jobs=True)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield save_bundle(make_bundle(), tmp_path / "model")


WORDS = ["sample", "model", "--num-inference-steps", "2", "--num-diffusion-steps", "2", "--out", "out"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"lable": "cat"}', "unknown key 'lable'; did you mean 'label'?"),
        ('{"label": "bird"}', "'bird' is not a class of this model"),
        ('{"label": "cat", "seed": -1}', "seed: "),
        ('{"label": ["cat"]}', "label: is one class"),
        ('{"label": "cat", "class_labels": [1]}', "label: given together with class_labels"),
        ('{"name": 3}', "name: 3 is not allowed"),
        ('{"batch_size": 3}', "unknown key 'batch_size'"),
        ('["cat"]', "holds a list, not a mapping"),
        ('{"label": ', "is not JSON"),
        ('{"seed": NaN}', "NaN"),
        ('{"num_images_per_label": 1000000}', "in all"),
    ],
)
@pytest.mark.usefixtures("model")
def test_a_wrong_line_is_one_line(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    Path("jobs.jsonl").write_text('{"label": "cat", "num_images_per_label": 99999}\n\n' + line + "\n")
    assert run([*WORDS, "--jobs", "jobs.jsonl"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: jobs: jobs.jsonl, line 3") and words in said and "\n" not in said
    assert not Path("out").exists()


@pytest.mark.usefixtures("model")
def test_the_command_takes_jobs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("jobs.jsonl").write_text("\n".join(["\ufeff", *map(json.dumps, JOBS), ""]))
    words = [*WORDS, "--jobs", "jobs.jsonl", "--format", "webp", "--quality", "80", "--guidance-scale", "2", "--json"]
    assert run(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == 6 and said["jobs"] == 3
    assert [each["job"] for each in said["files"]] == ["a/b"] * 3 + ["3"] * 2 + ["4"]
    scales = [read_recorded(each["file"])[1].request["guidance_scale"] for each in said["files"]]
    assert scales == [2.0] * 5 + [3.0], "an option is a default of the lines"
    before = content(Path("out"))
    assert run(words) == 2 and "exists already" in capsys.readouterr().err
    Path(said["files"][4]["file"]).unlink()
    assert run([*words, "--resume"]) == 0 and content(Path("out")) == before
    assert json.loads(capsys.readouterr().out)["drawn_here"] == 1
    assert run(["sample", "model", "--from", said["files"][5]["file"], "--out", "again", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["pixels"]
    assert again == "identical" or again.startswith("not identical; mean difference")
    assert run([*words, "--animate"]) == 2 and run([*WORDS, "--quality", "80"]) == 2
    assert "quality: only valid with format jpg or webp" in capsys.readouterr().err
    monkeypatch.setattr(FolderSampling, "draw", None)
    assert run([*words, "--resume", "--seed", "9"]) == 2, "the first line has no seed of its own"
    assert "seed is 0 there, 9 here" in capsys.readouterr().err
