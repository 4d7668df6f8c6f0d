"""`evaluate`: what is drawn, what goes on, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_bundle
from PIL import Image
from torch import Tensor
from typing_extensions import override

import seriatim.evaluation.blocks as blocks
import seriatim.evaluation.figures as figures
from seriatim.checkpoints.native import save_bundle
from seriatim.cli import main
from seriatim.cli.output import print_table
from seriatim.core.errors import DataError, NumericsError, UsageError
from seriatim.core.random import derive_seed
from seriatim.evaluation.base import FeatureExtractor, Features
from seriatim.evaluation.blocks import Blocks, Share, Vectors, eight_bits
from seriatim.evaluation.features import FEATURES, PixelFeatures, open_features
from seriatim.evaluation.figures import FIGURES, Reference, Set, figures_of
from seriatim.evaluation.metrics import Figure, discrepancy, inception_score
from seriatim.evaluation.reference import ArrayImages, as_many, balanced, halves, read_statistics, whole
from seriatim.evaluation.rows import markdown
from seriatim.evaluation.run import Evaluation, evaluate
from seriatim.pipeline.pipeline import Pipeline

NAMES = ["cat", "dog", "horse"]


class Memory:
    """Images of a test: 8x8, grey, one brightness a class."""

    channels, size = 1, (8, 8)

    def __init__(self, count: int, class_names: list[str] | None = None, seed: int = 0) -> None:
        self.count, self.seed = count, seed
        self.class_names = NAMES if class_names is None else class_names
        generator = torch.Generator().manual_seed(seed)
        self._labels = torch.arange(count) % max(1, len(self.class_names))
        self._images = (torch.randn(count, 1, 8, 8, generator=generator) * 0.3).clamp(-1, 1)

    def images(self, index: Tensor) -> Tensor:
        return self._images[index]

    def labels(self, index: Tensor) -> Tensor | None:
        return self._labels[index] if self.class_names else None

    def fingerprint(self) -> str:
        return f"memory {self.count} {self.seed}"


class Mean(FeatureExtractor):
    """Mean and spread of the pixels; the brightest third is class 2."""

    def __init__(self, name: str = "mean") -> None:
        super().__init__()
        self.name, self.dim, self.classes, self.class_names, self.config = name, 2, 3, NAMES, {}

    def forward(self, images: Tensor) -> Features:
        flat = images.flatten(1)
        mean = flat.mean(dim=1)
        return Features(torch.stack([mean, flat.std(dim=1)], dim=1), torch.stack([-mean, mean * 0, mean], dim=1))


@pytest.fixture
def pipe() -> Pipeline:
    bundle = make_bundle()
    bundle.sha256 = "0" * 64
    return Pipeline(bundle, source="runs/mine/model")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZE", 16)


def run(pipe: Pipeline, out: Path, **settings: object) -> Evaluation:
    given: dict[str, object] = {"num": 40, "features": Mean(), "real": Memory(60, seed=1), "quiet": True}
    return evaluate(pipe, Memory(90), out, **{**given, **settings})  # type: ignore[arg-type]


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_request_whatever_batch_or_process(pipe: Pipeline, tmp_path: Path) -> None:
    """Image i has class i mod K and the seed hash(seed, i); shards together are the whole."""
    first = run(pipe, tmp_path / "a", seed=5)
    for process in (1, 0):
        second = run(pipe, tmp_path / "b", seed=5, share=Share(process, 2), batch_size=7)
        assert (second.figures is None) == (process == 1) and (second.missing > 0) == (process == 1)
    assert first.figures is not None and second.figures is not None
    for name, figure in first.figures.items():
        assert second.figures[name].value == pytest.approx(figure.value, abs=1e-3), name
    labels = [i % 3 for i in range(40)]
    images = pipe(class_labels=labels, seeds=[derive_seed(5, i) for i in range(40)], output_type="pt").images
    pixels = Mean()(eight_bits(images * 2 - 1)).features
    read = Blocks(tmp_path / "a" / "samples", 40).read().features
    assert np.abs(read - pixels.numpy()).max() < 0.01  # one level of 255 by rounding in another batch


def test_it_goes_on_where_it_stopped(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run = run(pipe, tmp_path / "whole", batch_size=8)
    calls = 0
    draw = Pipeline.__call__

    def stops(self: Pipeline, **settings: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return draw(self, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path / "two", batch_size=8)
    files = sorted(path.name for path in (tmp_path / "two" / "samples").iterdir())
    assert files == ["00000000.json", "00000000.safetensors"], "a block is whole or not there"
    again = run(pipe, tmp_path / "two", batch_size=8)
    assert calls == 4 + 3, "the first block is not drawn again"
    assert again.figures == whole_run.figures
    damaged = tmp_path / "two" / "samples" / "00000000.safetensors"
    intact = damaged.read_bytes()
    flipped = bytearray(intact)
    flipped[-5] ^= 4  # in the features: the file can be read as before
    for content in (b"half a file", b"", bytes(flipped)):
        damaged.write_bytes(content)
        assert run(pipe, tmp_path / "two", batch_size=8).figures == whole_run.figures
        assert damaged.read_bytes() == intact, "the damaged block is made again, the others are not"


def test_another_setting_is_refused_by_name(pipe: Pipeline, tmp_path: Path) -> None:
    run(pipe, tmp_path)
    for change, named in (
        ({"guidance_scale": 3.0}, "request.guidance_scale: 1.5"),
        ({"num": 41}, "num: 40"),
        ({"seed": 1}, "request.seed: 0"),
        ({"features": Mean("other")}, "features.name: 'mean'"),
        ({"real": Memory(60, seed=2)}, "real.sha256"),
    ):
        with pytest.raises(UsageError, match=f"^{named}"):
            run(pipe, tmp_path, **change)
    for name in ("class_labels", "seeds"):
        with pytest.raises(UsageError, match=name):
            run(pipe, tmp_path, **{name: (1,)})
    moved = Memory(60, seed=1)
    moved.root = tmp_path  # type: ignore[attr-defined]
    run(pipe, tmp_path, real=moved)  # the same images elsewhere


def test_a_field_that_an_earlier_version_did_not_know_is_at_its_default(pipe: Pipeline, tmp_path: Path) -> None:
    first = run(pipe, tmp_path)
    path = tmp_path / "settings.json"
    stored = json.loads(path.read_text())
    del stored["request"]["temperature"], stored["request"]["guidance_power"]
    path.write_text(json.dumps(stored))
    assert run(pipe, tmp_path).figures == first.figures
    with pytest.raises(UsageError, match=r"^request.temperature: 1.0 in .*, 0.9 now"):
        run(pipe, tmp_path, temperature=0.9)
    for damaged in ("[]", "{}", '{"request": 1}', "{"):
        path.write_text(damaged)
        with pytest.raises(UsageError, match=r"is not JSON|not a mapping|lacks the request"):
            run(pipe, tmp_path)


def test_an_evaluation_of_release_0_1_is_not_gone_on_with(pipe: Pipeline, tmp_path: Path) -> None:
    """Its seeds stood for other random numbers, which is what the refusal says, whatever else differs in the file."""
    run(pipe, tmp_path)
    path = tmp_path / "settings.json"
    stored = json.loads(path.read_text())
    del stored["request"]["random_numbers"]
    stored["request"] |= {"top_k": None, **stored["request"].pop("head_options")}
    path.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=r"^request.random_numbers: 1 in .*, 2 now; .* choose another folder$"):
        run(pipe, tmp_path)


# --- what is said -------------------------------------------------------------------------------------------------


def test_results_say_everything(pipe: Pipeline, tmp_path: Path) -> None:
    done = run(pipe, tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    names = {"FD", "KD", "precision", "recall", "IS", "accuracy", "diversity", "nearest"}
    assert report["figures"].keys() == {f"{name}[mean]" for name in names}, "no FID without Inception"
    for figure in report["figures"].values():
        assert figure["error"] >= 0 and np.isfinite([figure["value"], figure["real"], figure["real_error"]]).all()
    settings = report["settings"]
    assert settings["num"] == 40 and settings["classes"] == NAMES and settings["model"]["sha256"] == "0" * 64
    assert settings["features"]["sha256"] == Mean().fingerprint() and len(settings["reference"]["sha256"]) == 64
    assert settings["request"]["guidance_scale"] == 1.5
    assert settings["request"]["head_options"] == {"num_diffusion_steps": 6}
    assert {"torch", "seriatim", "threads", "dtype"} <= report["versions"].keys()
    pixels = (Memory(90).images(torch.arange(90)).add(1) * 127.5).round().to(torch.uint8).numpy()
    digests = b"".join(hashlib.sha256(pixels[i : i + 16].tobytes()).digest() for i in range(0, 90, 16))
    assert report["pixels_sha256"]["reference"] == hashlib.sha256(digests).hexdigest(), "wherever the files are"
    assert f"{report['pixels_sha256']['reference'][:8]} |" in report["markdown"]
    assert len({*report["pixels_sha256"].values()}) == 3
    assert done.report["markdown"].splitlines()[2].startswith("| mine 00000000 | guidance 1.5, 5 steps | 40 (40) |")
    settings = done.report["settings"]
    request = {**settings["request"], "temperature": 0.9, "order": (1, 0), "solver": "ddim", "top_k": 5}
    row = markdown([{**done.report, "settings": {**settings, "request": request}}])
    assert "| guidance 1.5, 5 steps, temperature 0.9, order given, solver ddim, top_k 5 |" in row


def test_real_images_come_out_as_real(pipe: Pipeline, tmp_path: Path) -> None:
    """The comparison is of the reference's distribution: near it, copied nowhere, as diverse."""
    done = run(pipe, tmp_path, figures=["frechet", "nearest", "diversity", "manifold"])
    assert done.figures is not None and done.real is not None
    assert done.real["FD[mean]"].value < 0.01 < done.figures["FD[mean]"].value
    assert done.real["nearest[mean]"].value == pytest.approx(1, abs=0.3)
    assert done.real["diversity[mean]"].value == pytest.approx(1, abs=0.3)
    assert done.real["precision[mean]"].value > 0.7


def test_what_nearest_is_near_to_is_said(pipe: Pipeline, tmp_path: Path) -> None:
    """Its ratio tells of copies only where the reference is all that the model was trained on."""
    said = run(pipe, tmp_path / "a").report["nearest_to"]
    assert said == "90 images, not known to be those of training: copies of others are not seen"
    pipe.bundle.provenance["data"] = {"count": 90, "fingerprint": Memory(90).fingerprint()}
    assert run(pipe, tmp_path / "a").report["nearest_to"] == "all 90 training images"
    assert run(pipe, tmp_path / "b", real=None).report["nearest_to"].startswith("45 of 90 training images: copies of")


def test_fewer_real_images_than_samples(pipe: Pipeline, tmp_path: Path) -> None:
    """Then samples are measured at that number too: a Frechet distance depends on it."""
    done = run(pipe, tmp_path, real=Memory(30, seed=1))
    assert done.num_real == 30 and done.as_many is not None
    assert "as_many" in done.report["figures"]["FD[mean]"]


def test_few_images_of_many_classes(tmp_path: Path) -> None:
    """What can't be seen is left out, not an error after all the work."""
    bundle = make_bundle(classes=10)
    bundle.class_names = names = [str(c) for c in range(10)]
    settings = {"num": 20, "features": Mean(), "quiet": True, "figures": ["diversity", "kernel"]}
    done = evaluate(Pipeline(bundle), Memory(50, names), tmp_path, real=Memory(30, names), **settings)  # type: ignore[arg-type]
    assert done.figures is not None and list(done.figures) == ["KD[mean]"]


def test_without_other_images_the_data_is_halved(pipe: Pipeline, tmp_path: Path) -> None:
    done = run(pipe, tmp_path, real=None)
    assert done.settings["reference"]["images"] == 45 and done.settings["real"]["images"] == 40


def test_one_cache_serves_several(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pipe, tmp_path / "a", cache=tmp_path / "cache")

    def never(*_: object) -> Tensor:
        raise AssertionError("real images are read once")

    monkeypatch.setattr(Memory, "images", never)
    run(pipe, tmp_path / "b", cache=tmp_path / "cache", seed=1)


# --- which real images --------------------------------------------------------------------------------------------


def test_halves_and_as_many_are_balanced_and_apart() -> None:
    part = whole(Memory(91), 3, NAMES)
    first, second = halves(part)
    assert len(first) == 46 and len(second) == 45 and not set(first.index.tolist()) & set(second.index.tolist())
    assert first.labels is not None
    assert np.bincount(first.labels).tolist() == [16, 15, 15], "the first has the odd one"
    some = as_many(second, 40, 3)
    wanted = balanced(40, 3)
    assert some.labels is not None and wanted is not None and np.array_equal(some.labels, wanted)
    assert len(set(some.index.tolist())) == 40
    assert len(as_many(first, 100, 3)) == 45, "as many as every class allows"
    assert balanced(5, 0) is None and len(as_many(whole(Memory(9, []), 0, []), 5, 0)) == 5


def test_classes_are_matched_by_name() -> None:
    turned = Memory(9, ["horse", "cat", "dog"])
    for names, order in ((NAMES, [2, 0, 1]), ([], [0, 1, 2])):  # for a model without names, by number
        labels = whole(turned, 3, names).labels
        assert labels is not None and labels.tolist() == order * 3
    assert whole(Memory(9, []), 3, NAMES).labels is None


@pytest.mark.parametrize("names", [["cat", "dog", "cow"], ["cat", "dog"], ["cat", "dog", "horse", "cow"]])
def test_classes_that_do_not_match_are_refused(pipe: Pipeline, tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"classes: the model has 3, the data \d; (the data|the model) lacks '(horse|cow)'"
    ):
        run(pipe, tmp_path, real=Memory(60, names))


def test_bad_input_is_one_line(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"num: 40 images are too few for the 64 features of 'pixels'.*at least 65"):
        run(pipe, tmp_path, features=PixelFeatures((8, 8), 1))
    with pytest.raises(DataError, match="data: 60 images are too few for the 64"):
        evaluate(pipe, Memory(60), tmp_path, num=70, features=PixelFeatures((8, 8), 1), real=Memory(90), quiet=True)
    with pytest.raises(DataError, match="num: 5 images are too few for any figure"):
        run(pipe, tmp_path, num=5)
    with pytest.raises(UsageError, match="figures: 'kernal' is not known; did you mean 'kernel'"):
        run(pipe, tmp_path, figures=["kernal"])
    other = Memory(60)
    other.size = (9, 9)
    with pytest.raises(UsageError, match="real_data: images are"):
        run(pipe, tmp_path, real=other)
    with pytest.raises(UsageError, match="num: 0"):
        run(pipe, tmp_path, num=0)
    assert not any(tmp_path.iterdir()), "all of it before anything is written"


def test_figures_that_cannot_be_had_are_refused_where_they_are_named(pipe: Pipeline, tmp_path: Path) -> None:
    """All figures without a name are those that can be had."""
    plain = PixelFeatures((8, 8), 1)
    for figure, words in (
        ("score", "score needs class probabilities, which 'pixels' has not"),
        ("accuracy", "accuracy needs an extractor that knows the model's classes, 'pixels' does not"),
    ):
        with pytest.raises(UsageError, match=f"^figures: {words}"):
            run(pipe, tmp_path, num=70, features=plain, figures=["kernel", figure])
    with pytest.raises(UsageError, match=r"^figures: diversity needs classes"):
        evaluate(pipe, Memory(90, []), tmp_path, num=40, features=Mean(), figures=["diversity"], quiet=True)
    mean, cov = np.zeros(2), np.eye(2)
    np.savez(tmp_path / "ref.npz", mu=mean, sigma=cov)
    known = Mean("inception")
    known.standard = True
    with pytest.raises(UsageError, match=r"^figures: manifold needs images, which .*ref.npz has not"):
        evaluate(
            pipe, read_statistics(tmp_path / "ref.npz"), tmp_path / "out", num=40, features=known, real=Memory(60),
            figures=["manifold"], quiet=True,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [torch.zeros(16, 3), Features(torch.zeros(16, 3)), Features(torch.zeros(2))])
def test_an_extractor_that_breaks_the_contract_is_one_line(pipe: Pipeline, tmp_path: Path, given: object) -> None:
    class Wrong(Mean):
        @override
        def forward(self, images: Tensor) -> Features:
            return given  # type: ignore[return-value]

    with pytest.raises(UsageError, match=r"^features: mean gives .*\(16, 2\); its forward and its dim must agree"):
        run(pipe, tmp_path, features=Wrong())


def test_features_that_are_not_finite_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    class Broken(Mean):
        def forward(self, images: Tensor) -> Features:
            given = super().forward(images).features.clone()
            given[3] = float("nan")
            return Features(given)

    with pytest.raises(NumericsError, match="features: mean gives features that are not finite for image 3"):
        run(pipe, tmp_path, features=Broken())


# --- extractors ---------------------------------------------------------------------------------------------------


def test_open_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = open_features("pixels", size=(4, 4), channels=3)
    assert pixels.dim == 48 and pixels.name == "pixels"
    found = pixels(torch.full((2, 3, 4, 4), -1.0))
    assert found.features.shape == (2, 48) and found.logits is None and float(found.features.max()) == 0
    assert pixels.fingerprint() != open_features("pixels", size=(4, 5), channels=3).fingerprint()
    for bad in ("pixel", "pixels:weights.pth", "no/such/folder"):
        with pytest.raises(UsageError, match="features: "):
            open_features(bad, size=(4, 4), channels=3)
    monkeypatch.setitem(FEATURES, "mean", Mean)
    assert open_features("mean", size=(4, 4), channels=3).dim == 2, "one that a user registers"
    with pytest.raises(UsageError, match="mean takes no path"):
        open_features(f"mean:{tmp_path}", size=(4, 4), channels=3)


def test_a_figure_is_named_by_what_made_it(pipe: Pipeline, tmp_path: Path) -> None:
    class Known(Mean):
        standard = True

    done = run(pipe, tmp_path, features=Known("inception"))
    assert done.figures is not None
    assert {"FID", "KID", "IS", "precision", "recall"} <= done.figures.keys()
    assert "accuracy" not in done.figures, "its classes are others"


# --- reference files ----------------------------------------------------------------------------------------------


def test_reference_file(pipe: Pipeline, tmp_path: Path) -> None:
    class Known(Mean):
        standard = True

    mean, cov = np.array([0.0, 0.3], dtype=np.float32), np.diag([0.01, 0.01]).astype(np.float32)
    np.savez(tmp_path / "ref.npz", mu=mean, sigma=cov)
    statistics = read_statistics(tmp_path / "ref.npz")
    assert statistics.pool is not None and statistics.pool[0].dtype == np.float64 and statistics.images is None
    settings = {"num": 40, "real": Memory(60), "quiet": True}
    done = evaluate(pipe, statistics, tmp_path / "a", features=Known("inception"), **settings)  # type: ignore[arg-type]
    assert done.figures is not None and done.figures.keys() == {"FID", "IS"}, "no images: no neighbours"
    assert done.settings["reference"]["file_sha256"] == statistics.sha256
    with pytest.raises(UsageError, match="statistics of Inception's features and no images"):
        evaluate(pipe, statistics, tmp_path / "b", features=Mean(), **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="real_data: is required"):
        evaluate(pipe, statistics, tmp_path / "b", num=40, features=Known("inception"), quiet=True)
    arrays = np.random.default_rng(0).integers(0, 255, (50, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", mu=mean, sigma=cov, mu_s=mean, sigma_s=cov, arr_0=arrays)
    statistics = read_statistics(tmp_path / "images.npz")
    assert isinstance(statistics.images, ArrayImages) and statistics.spatial is not None
    done = evaluate(pipe, statistics, tmp_path / "c", features=Mean(), **settings)  # type: ignore[arg-type]
    assert done.figures is not None and "precision[mean]" in done.figures and "diversity[mean]" not in done.figures


def test_reference_files_that_are_refused(tmp_path: Path) -> None:
    def check(message: str, **arrays: object) -> None:
        np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message):
            read_statistics(tmp_path / "x.npz")

    check("neither mu and sigma nor arr_0", other=np.zeros(3))
    check("only one of mu and sigma", mu=np.zeros(3))
    check("don't fit", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    check("not finite", mu=np.full(2, np.nan), sigma=np.eye(2))
    check("not uint8", arr_0=np.zeros((2, 4, 4, 3)))
    check("not a readable .npz file", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(2))
    (tmp_path / "y.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="not a readable"):
        read_statistics(tmp_path / "y.npz")
    np.savez_compressed(tmp_path / "w.npz", mu=np.random.default_rng(0).normal(size=2000), sigma=np.eye(2000))
    whole_file = (tmp_path / "w.npz").read_bytes()
    for first in (60, 200, 5000):  # an array's header, its numbers
        (tmp_path / "w.npz").write_bytes(whole_file[:first] + bytes(30) + whole_file[first + 30 :])
        with pytest.raises(DataError, match="not a readable"):
            read_statistics(tmp_path / "w.npz")
    with pytest.raises(UsageError, match="is no file"):
        read_statistics(tmp_path / "z.npz")


# --- the verb -----------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(["evaluate", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = make_bundle(classes=10)
    bundle.class_names = [str(i) for i in range(10)]
    save_bundle(bundle, tmp_path / "model")
    common = ["model", "--data", "digits", "--real-data", "{kind: digits, held_out: true}", "--num", "100"]
    common += ["--features", "pixels", "--figures", "frechet", "--batch-size", "128"]
    common += ["--num-diffusion-steps", "1", "--num-inference-steps", "1", "--set", "solver=ddim"]
    code, out, err = command(capsys, *common, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert report["settings"]["request"]["head_options"]["solver"] == "ddim"
    assert list(report["figures"]) == ["FD[pixels]"]
    code, out, _ = command(capsys, *common)
    assert code == 0 and out.splitlines()[1].startswith("FD[pixels]") and "| FD[pixels] |" in out
    for arguments, exit_code, words in (
        (["--guidance-scale", "3"], 2, ["request.guidance_scale: 1.5", "settings.json"]),
        (["--shard", "2/2"], 2, ["shard: '2/2'"]),
        (["--set", "guidance_scal=2"], 2, ["guidance_scal", "did you mean 'guidance_scale'?"]),
        (["--noise", "0.1"], 2, ["noise: has no meaning in the evaluation of a model"]),
        (["--features", "no.pth"], 2, ["features: 'no.pth'"]),
        (["--real-data", "x.npz"], 2, ["x.npz is no file"]),
    ):
        code, _, err = command(capsys, *common, *arguments)
        assert code == exit_code and err.count("\n") == 1 and all(word in err for word in words), err


def test_an_inception_score_is_the_mean_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score of few images is lower; published ones are of 5000 each, whatever their number."""
    monkeypatch.setattr(figures, "SPLIT", 100)
    logits = np.random.default_rng(0).normal(size=(1000, 20)) * 3

    def score(x: np.ndarray) -> Figure:
        return figures_of(Set(Vectors(x[:, :2], x)), Reference(None), Mean(), ["score"])["IS[mean]"]

    tenths = [inception_score(part) for part in logits.reshape(10, 100, 20)]
    found = score(logits)
    assert found.value == pytest.approx(np.mean(tenths), rel=0.03) and found.value < 0.99 * inception_score(logits)
    assert found.error == pytest.approx(np.std(tenths) / 10**0.5, rel=0.7)
    assert score(logits[:140]).value == inception_score(logits[:140]), "of one part"


@pytest.mark.parametrize(
    ("features", "num", "data", "exit_code", "words"),
    [
        ("pixels", "40", "digits", 3, "num: 40 images are too few for the 64 features"),
        ("broken", "40", "digits", 5, "features: mean gives features that are not finite for image 0"),
        ("pixels", "100", "photos", 3, "classes: the model has 10, the data 1; the data lacks '0'"),
        ("other.pth", "100", "digits", 4, "other.pth: its sha256 begins with d9298a10"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: str,
    num: str,
    data: str,
    exit_code: int,
    words: str,
) -> None:
    class Broken(Mean):
        def forward(self, images: Tensor) -> Features:
            return Features(super().forward(images).features * float("nan"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FEATURES, "broken", Broken)
    bundle = make_bundle(classes=10)
    bundle.class_names = [str(i) for i in range(10)]
    save_bundle(bundle, tmp_path / "model")
    (tmp_path / "other.pth").write_bytes(b"other")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "photos" / "cat" / "1.png")
    code, _, err = command(capsys, "model", "--data", data, "--num", num, "--features", features)
    assert code == exit_code and err.count("\n") == 1 and err.startswith(f"error: {words}"), err


def test_a_table_is_not_cut_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    names = [f"precision[classifier-{i}]" for i in range(9)]
    print_table(names, [["0.1234 ± 0.01"] * 9])
    heads, cells = capsys.readouterr().out.splitlines()
    assert heads.split() == names and cells.count("0.1234 ± 0.01") == 9


@pytest.mark.parametrize("most", [5000, 100])
def test_error_of_a_kernel_distance(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The spread over sets drawn anew, whether of all pairs or of subsets."""
    monkeypatch.setattr(figures, "WHOLE", most)
    monkeypatch.setattr(figures, "SUBSET", 60)
    random = np.random.default_rng(0)
    x = [random.normal(size=(240, 3)) + 0.3 for _ in range(16)]
    real = random.normal(size=(500, 3))
    found = [figures_of(Set(Vectors(some)), Reference(Vectors(real)), Mean(), ["kernel"])["KD[mean]"] for some in x]
    for some, figure in zip(x, found, strict=True):
        assert figure.value == pytest.approx(discrepancy(some, real), rel=1e-9 if most == 5000 else 0.6)
    anew = np.std([figure.value for figure in found])
    assert np.mean([figure.error for figure in found]) == pytest.approx(anew, rel=0.6)


def test_every_figure_can_be_asked_for() -> None:
    assert list(FIGURES) == ["frechet", "kernel", "manifold", "score", "accuracy", "diversity", "nearest"]
