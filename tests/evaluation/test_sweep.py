"""Sweeps, memorisation, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_bundle, read_picture
from PIL import Image
from torch import Tensor

from seriatim.checkpoints.native import save_bundle
from seriatim.checkpoints.tokenizer import save_tokenizer
from seriatim.cli import main
from seriatim.core.errors import NumericsError, UsageError
from seriatim.evaluation import blocks
from seriatim.evaluation.blocks import Share, Vectors
from seriatim.evaluation.features import PixelFeatures
from seriatim.evaluation.memory import nearest_picture
from seriatim.evaluation.reference import ArrayImages, whole
from seriatim.evaluation.run import evaluate
from seriatim.evaluation.sweep import sweep
from seriatim.evaluation.tokenizers import LatentStatistics, evaluate_tokenizer, similarity
from seriatim.pipeline.pipeline import Pipeline
from seriatim.tokenizers.kmeans import KMeans
from seriatim.tokenizers.pixels import Pixels

SIZE = (8, 8)


def pictures(count: int, seed: int = 0) -> ArrayImages:
    arrays = np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 1), dtype=np.uint8)
    return ArrayImages(arrays, f"pictures {count} {seed}")


@pytest.fixture
def pipe() -> Pipeline:
    bundle = make_bundle()
    bundle.sampling |= {"num_inference_steps": 1, "num_diffusion_steps": 1}
    return Pipeline(bundle, source="mine")


# --- sweeps -------------------------------------------------------------------------------------------------------


def test_sweep(pipe: Pipeline, tmp_path: Path) -> None:
    settings = {"num": 20, "features": PixelFeatures(SIZE, 1), "real": pictures(30, 1), "quiet": True}
    settings |= {"figures": ["kernel", "manifold"]}
    fields = {"guidance_scale": [1.0, 2.0], "temperature": [0.9, 1.0]}
    first = sweep(pipe, pictures(40), tmp_path / "s", fields, share=Share(0, 2), **settings)
    assert first.missing == 0, "twenty images are one block: the first process has it"
    done = sweep(pipe, pictures(40), tmp_path / "s", fields, **settings)
    assert [point for point, _ in done.points] == [
        {"guidance_scale": g, "temperature": t} for g in (1.0, 2.0) for t in (0.9, 1.0)
    ]
    alone = evaluate(pipe, pictures(40), tmp_path / "one", guidance_scale=2.0, temperature=0.9, **settings)  # type: ignore[arg-type]
    assert done.points[2][1].figures == alone.figures, "a point is an evaluation like any other"
    written = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [point["values"] for point in written["points"]] == [point for point, _ in done.points]
    lines = (tmp_path / "s" / "sweep.md").read_text().splitlines()
    assert len(lines) == 6 and lines[0].startswith("| guidance_scale | temperature | model |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert read_picture(tmp_path / "s" / "curves.png").size[0] > 300
    assert len(list((tmp_path / "s" / "real").iterdir())) == 2, "real images are read once for all points"


def test_sweeps_that_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    settings = {"num": 20, "features": PixelFeatures(SIZE, 1), "quiet": True}
    for fields, message in (
        ({"guidance_scal": [1]}, "guidance_scal: is not a setting of a request; did you mean 'guidance_scale'"),
        ({"guidance_scale": [1, -1]}, "guidance_scale"),
        ({"guidance_scale": [1, 1]}, "given twice"),
        ({"num_inference_steps": [1], "seed": [1]}, "seed"),
        ({}, "fields: is empty"),
        ({"temperature": [1.0]}, "^figures: score needs class probabilities"),
    ):
        with pytest.raises(UsageError, match=message):
            more = {"seed": 0} if "seed" in fields else {"figures": ["score"]} if "temperature" in fields else {}
            sweep(pipe, pictures(160), tmp_path / "s", fields, **settings, **more)
    assert not list((tmp_path / "s").glob("*")), "before anything is written"


def test_sweep_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of class folders as the reference, half of it set aside."""
    monkeypatch.chdir(tmp_path)
    bundle = make_bundle()
    bundle.sampling |= {"num_inference_steps": 1, "num_diffusion_steps": 1}
    save_bundle(bundle, tmp_path / "model")
    arrays = np.random.default_rng(0).integers(0, 256, (60, *SIZE), dtype=np.uint8)
    for i, array in enumerate(arrays):
        folder = tmp_path / "photos" / ["cat", "dog", "horse"][i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{i}.png")
    common = ["sweep", "model", "solver=ddpm,ddim", "--data", "photos", "--num", "30", "--features", "pixels"]
    assert main.run([*common, "--figures", "kernel", "--figures", "diversity"]) == 0
    out = capsys.readouterr().out
    assert "solver" in out and "KD[pixels]" in out and "diversity[pixels]" in out and "real images" in out
    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert written["fields"] == {"solver": ["ddpm", "ddim"]}
    assert written["points"][0]["settings"]["reference"]["images"] == 30
    for arguments, words in ((["guidance_scale"], "field=value"), (["order=1,0"], "can't be swept")):
        assert main.run(["sweep", "model", *arguments, "--data", "photos", "--num", "30"]) == 2
        assert words in capsys.readouterr().err


# --- memorisation -------------------------------------------------------------------------------------------------


def test_a_copy_is_shown_beside_its_original(tmp_path: Path) -> None:
    data = pictures(12)
    train = whole(data, 0, ())
    images = data.images(train.index).float() / 127.5 - 1
    samples = torch.cat([-images[:3], images[7:8]])  # the last is a copy
    asked = []

    def draw(numbers: list[int]) -> Tensor:
        asked.extend(numbers)
        return samples[list(numbers)]

    def vectors(x: Tensor) -> Vectors:
        return Vectors(x.flatten(1).double().numpy())

    rows = nearest_picture(tmp_path / "n.png", vectors(samples), train, vectors(images), draw, 2)  # type: ignore[arg-type]
    assert rows[0]["sample"] == 3 and rows[0]["train"][0] == 7 and rows[0]["distance"] == pytest.approx(0, abs=1e-6)
    assert asked == [row["sample"] for row in rows] and rows[1]["distance"] > 1
    picture = read_picture(tmp_path / "n.png")
    assert picture.crop((2, 2, 66, 66)).tobytes() == picture.crop((68, 2, 132, 66)).tobytes(), "side by side"


def test_neighbours_of_an_evaluation(pipe: Pipeline, tmp_path: Path) -> None:
    settings = {"num": 20, "features": PixelFeatures(SIZE, 1), "figures": ["nearest"], "quiet": True}
    done = evaluate(pipe, pictures(40), tmp_path, neighbours=3, **settings)  # type: ignore[arg-type]
    rows = json.loads((tmp_path / "neighbours.json").read_text())
    assert len(rows) == 3 and {"sample", "seed", "distance", "train"} == rows[0].keys()
    assert done.figures is not None and list(done.figures) == ["nearest[pixels]"]
    seeds = tuple(row["seed"] for row in rows)
    drawn = pipe(class_labels=[row["sample"] % 3 for row in rows], seeds=seeds).images
    sheet = read_picture(tmp_path / "neighbours.png")
    assert np.array_equal(
        np.asarray(sheet)[2:66, 2:66], np.asarray(drawn[0].resize((64, 64), Image.Resampling.NEAREST))
    )


# --- tokenizers ---------------------------------------------------------------------------------------------------


def test_tokenizer_that_loses_nothing(tmp_path: Path) -> None:
    tokenizer = Pixels(size=8, patch=2, channels=1)
    data = pictures(200)
    tokenizer.fit([data.images(torch.arange(200)).float() / 127.5 - 1])
    found = evaluate_tokenizer(
        tokenizer, data, tmp_path, num=90, features=PixelFeatures(SIZE, 1), noise=(0.1, 0.2), quiet=True
    )
    assert found.figures["PSNR"].value == 100 and found.report["exact"] == 1
    assert found.figures["SSIM"].value == pytest.approx(1, abs=1e-6)
    assert found.figures["rFD[pixels]"].value == pytest.approx(0, abs=1e-9)
    assert found.figures["FD[pixels]"].value == pytest.approx(found.real["FD[pixels]"].value, rel=1e-9)
    # Uniform pixels have a standard deviation of 2 / 12^(1/2); noise of s of it has a PSNR of -20 log10(s / 12^(1/2)).
    for level, figure in found.noise.items():
        assert figure.value == pytest.approx(-20 * np.log10(level / 12**0.5), abs=0.6)  # less where it is clipped
    assert found.latents["std"] == pytest.approx(1, abs=0.05) and found.latents["mean"] == pytest.approx(0, abs=0.05)
    assert found.latents["directions"] == pytest.approx(4, abs=0.2), "independent pixels"
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["settings"]["tokenizer"]["sha256"] == tokenizer.fingerprint() and "PSNR" in report["markdown"]
    assert report["features"]["std"] == pytest.approx([1] * 4, abs=0.1)
    assert report["features"]["mean"] == pytest.approx([0] * 4, abs=0.1)
    assert (tmp_path / "noise.png").stat().st_size > 1000
    with Image.open(tmp_path / "reconstructions.png") as sheet:
        place = 64 + 2  # enlarged images with a gap; rows are originals, reconstructions and noisy ones, twice
        assert sheet.size == (8 * place + 2, 6 * place + 2)
        rows = [np.asarray(sheet)[2 + i * place : (i + 1) * place] for i in range(3)]
    assert np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[0], rows[2])


def test_psnr_and_ssim() -> None:
    psnr, ssim = similarity()
    x = torch.zeros(2, 1, 16, 16)
    assert psnr(x + 0.02, x).tolist() == pytest.approx([40, 40], abs=1e-4)  # range 2: 20 log10(2 / 0.02)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    noisy = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (ssim(noisy, -noisy) < -0.9).all(), "the negative is worse than nothing"
    a, b = 0.2, 0.6  # flat images in [0, 1]: (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2; Wang et al. 2004, eq. 13
    flat = ssim(x + 2 * a - 1, x + 2 * b - 1)
    assert flat.tolist() == pytest.approx([(2 * a * b + 1e-4) / (a * a + b * b + 1e-4)] * 2, rel=1e-6)


def test_latent_statistics_of_known_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 50, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.0])
    found = LatentStatistics(3)
    for part in x.split(7):
        found.add(part)
    says = found.summary()
    assert says["std_most"] == pytest.approx(2, rel=0.03) and says["std_least"] == pytest.approx(0, abs=1e-6)
    assert says["std"] == pytest.approx((5 / 3) ** 0.5, rel=0.03) and says["largest"] == float(x.abs().max())
    assert says["directions"] == pytest.approx(25 / 17, rel=0.03)
    one = LatentStatistics(1)
    one.add(torch.randn(100, 500, 1, generator=generator))
    assert found.by_feature()["std"] == pytest.approx([1, 2, 0], abs=0.05)
    assert one.summary()["fourth"] == pytest.approx(3, rel=0.03), "Gaussian"


def test_tokenizer_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(Pixels(size=8, patch=4, channels=1, components=3), tmp_path / "tokenizer")
    common = ["evaluate", "tokenizer", "--data", "digits", "--num", "100", "--features", "pixels"]
    assert main.run([*common, "--noise", "0.3"]) == 0
    out = capsys.readouterr().out
    for word in ("PSNR", "SSIM", "rFD[pixels]", "PSNR, noise 0.3", "tokens: std"):
        assert word in out
    assert main.run([*common[:-1], "none", "--noise", "0.3"]) == 2, "another evaluation's folder"
    assert "features.name: 'pixels' in evaluation/settings.json, None now" in capsys.readouterr().err
    assert main.run([*common[:-1], "none", "--json", "--out", "others"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "rFD[pixels]" not in report["figures"] and report["markdown"].endswith(" | none |")
    assert main.run([*common, "--noise", "-1"]) == 2 and "noise:" in capsys.readouterr().err
    assert main.run(["evaluate", "tokenizer", "--data", "digits", "--num", "40", "--features", "pixels"]) == 3
    assert "num: 40 images are too few for the 64 features" in capsys.readouterr().err
    for option in (["--guidance-scale", "2"], ["--batch-size", "2"], ["--neighbours", "2"]):
        assert (
            main.run([*common, *option]) == 2
            and "has no meaning in the evaluation of a tokenizer" in capsys.readouterr().err
        )


@pytest.mark.parametrize("codes", [False, True])
def test_a_tokenizers_evaluation_is_shared_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: bool
) -> None:
    monkeypatch.setattr(blocks, "SIZE", 32)
    data = pictures(260)
    tokenizer = KMeans(8, 2, 1, vocab=16) if codes else Pixels(size=8, patch=4, channels=1, components=3)
    tokenizer.fit([data.images(torch.arange(200)).float() / 127.5 - 1])
    settings = {"num": 100, "features": PixelFeatures(SIZE, 1), "quiet": True}
    alone = evaluate_tokenizer(tokenizer, data, tmp_path / "a", **settings)  # type: ignore[arg-type]
    first = evaluate_tokenizer(tokenizer, data, tmp_path / "b", share=Share(1, 2), **settings)  # type: ignore[arg-type]
    assert first.missing == 64 + 66 and not first.figures and not (tmp_path / "b" / "results.json").exists()
    left = evaluate_tokenizer(tokenizer, data, tmp_path / "b", share=Share(0, 2), **settings)  # type: ignore[arg-type]
    for name in ("figures", "real", "noise", "latents"):
        assert getattr(left, name) == getattr(alone, name), name

    def never(*_: object) -> Tensor:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(type(tokenizer), "decode", never)
    again = evaluate_tokenizer(tokenizer, data, tmp_path / "b", **settings)  # type: ignore[arg-type]
    assert again.figures == alone.figures
    with pytest.raises(UsageError, match=r"^seed: 0 in"):
        evaluate_tokenizer(tokenizer, data, tmp_path / "b", seed=1, **settings)  # type: ignore[arg-type]


def test_tokens_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tokenizer = Pixels(size=8, patch=2, channels=1)
    tokenizer.std.zero_()
    tokenizer.mean.copy_(torch.full_like(tokenizer.mean, float("nan")))
    with pytest.raises(NumericsError, match="tokens are not finite"):
        evaluate_tokenizer(tokenizer, pictures(40), tmp_path, num=20, quiet=True)
