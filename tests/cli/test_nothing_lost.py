"""No verb and no function that writes touches what somebody keeps: each is tried on folders full of their files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from helpers import make_bundle
from PIL import Image

import seriatim
from seriatim.bench import race
from seriatim.checkpoints.kl16 import kl16_from_tokenizer
from seriatim.checkpoints.mar import mar_tensors
from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.checkpoints.renames import FORMAT
from seriatim.checkpoints.tokenizer import save_tokenizer
from seriatim.cli.app import app
from seriatim.cli.demo import is_demo
from seriatim.cli.main import run
from seriatim.core.errors import SeriatimError, UsageError
from seriatim.core.ownership import owned
from seriatim.data.base import Digits
from seriatim.data.caching import LOCK, is_cache, write_cache
from seriatim.evaluation.compare import compare
from seriatim.evaluation.features import PixelFeatures
from seriatim.evaluation.identity import check_folders, is_comparison, is_sweep
from seriatim.evaluation.residual_net import ResNet, TrainedClassifier, save_classifier
from seriatim.evaluation.run import evaluate
from seriatim.evaluation.sweep import sweep
from seriatim.models.build import seeded
from seriatim.pipeline.animation import save_animation
from seriatim.pipeline.samples_folder import check_samples_folder
from seriatim.tokenizers.kl import KL
from seriatim.tokenizers.pixels import Pixels
from seriatim.training.classifier import train_classifier
from seriatim.training.config import read_any, read_recipe
from seriatim.training.loop import train
from seriatim.training.measure import measure_latents
from seriatim.training.run_folder import check_out
from seriatim.training.setup import build_inputs

# Every name that we write anywhere, with what somebody else might keep under it.
THEIRS: dict[str, str | bytes] = {
    "thesis.txt": "ten years", "recipe.yaml": "cake: [flour, eggs]\n", "data.json": '{"images": ["a.png"]}',
    "environment.json": '{"PATH": "/bin"}', "metrics.jsonl": '{"images": 5, "loss": 1.0}\n', "training.png": b"a plot",
    "accuracy.png": b"another plot", "results.json": '{"figures": {}}', "report.json": '{"recognised": 1}',
    "plan.txt": "a plan", "tokenizer.png": b"a coin", "guidance.png": b"x", "grid.png": b"a grid",
    "animation.gif": b"GIF89a", "0000.png": b"no picture", "0000-image.png": b"no picture",
    "0000-cat.png": b"no picture", "0000-0.png": b"no picture", "samples.npy": b"\x93NUMPY",
    "samples.json": '{"request": 1}',
    "settings.json": '{"num": 5, "block": 3}', "sweep.json": '{"fields": {}}', "sweep.md": "| |", "curves.png": b"x",
    "neighbours.json": "[]", "neighbours.png": b"x", "timeline.png": b"x", "config.json": '{"format": 1}',
    "manifest.json": '{"name": "a web page"}', "README.md": "# mine", "model.safetensors": b"weights",
    "tokenizer.safetensors": b"weights", "classifier.safetensors": b"weights", "cache.json": '{"images": 3}',
    "sources.json": '{"names": []}', "shard-000000.json": '{"images": 3}', "shard-000000.safetensors": b"rows",
    ".lock": "held by nobody", ".cache.lock": "mine", ".demo": "{}", ".training.original.png": b"x",
    "model/config.json": "{}", "model/model.safetensors": b"x", ".model.previous/config.json": "{}",
    "checkpoints/000000000064/model.safetensors": b"x", "checkpoints/000000000064/state.json": '{"loss": 0.1}',
    "checkpoints/precious.txt": "mine", "samples/000000000064.png": b"x", "samples/00000000.safetensors": b"x",
    "tensorboard/events.out.tfevents.1": b"x", "real/0123456789abcdef/00000000.safetensors": b"x", "real/me.png": b"x",
    "reconstructions/00000000.safetensors": b"x", "guidance_scale=1/settings.json": '{"num": 5}',
    "compare.json": '{"a": 1}', "compare.md": "| |", "compare.png": b"x", "compare.seeds.json": '{"key": 1}',
    "a-0/settings.json": '{"num": 5}',
}  # fmt: skip


def fill(folder: Path, names: Any = THEIRS) -> Path:
    for name in names:
        path, content = folder / name, THEIRS[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """All that is below a folder: the bytes and the time of each file, the names of folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (what, stat.st_mode, stat.st_mtime_ns if path.is_file() else None)
    return found


TINY = ["model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16", "model.head.depth=1",
        "training.images=64", "training.batch_size=16", "training.dtype=float32", "training.threads=1"]  # fmt: skip
KL_SETTINGS = {"latent_channels": 2, "block_out_channels": (32, 32), "layers_per_block": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the verbs read: a model, tokenizers, official weights, pictures."""
    made = tmp_path_factory.mktemp("made")
    bundle = make_bundle()
    save_bundle(bundle, made / "model")
    save_tokenizer(Pixels(size=8, patch=2, channels=1), made / "pixels")
    chance = np.random.default_rng(0)
    for name in ("cat", "dog", "horse"):
        (made / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(chance.integers(0, 256, (8, 8), dtype=np.uint8)).save(made / "photos" / name / f"{i}.png")
    Image.new("L", (8, 8), 90).save(made / "image.png")
    Image.new("L", (8, 8), 255).save(made / "mask.png")
    torch.save({"model": mar_tensors(bundle.model)}, made / "mar.pth")
    with seeded(0):
        kl = KL(16, patch=1, **KL_SETTINGS)  # type: ignore[arg-type]
    torch.save({"model": kl16_from_tokenizer(kl)}, made / "kl16.ckpt")
    save_tokenizer(kl, made / "kl")
    return made


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, beside which the inputs lie in `made`, which no verb may change either."""
    (tmp_path / "work").mkdir()
    (tmp_path / "made").symlink_to(made)
    monkeypatch.chdir(tmp_path / "work")
    before = contents(made)
    yield tmp_path / "work"
    assert contents(made) == before


MEASURE = [
    "measure-latents",
    "mar-cifar10-tiny",
    "data.path=../made/photos",
    "data.size=16",
    "tokenizer={from: ../made/kl}",
]
TOKENS = ["--data", "../made/photos", "--features", "none", "--num", "4"]
EVALUATE = ["--data", "../made/photos", "--features", "pixels", "--num", "12", "--figures", "nearest"]
SWEEP = ["sweep", "../made/model", "guidance_scale=1,2"]
COMPARE = ["compare", "../made/model", "../made/model"]
VAE = ["--vae", "../made/kl16.ckpt"]
FEW = ["--num-inference-steps", "2", "--num-diffusion-steps", "2"]
EDIT = ["edit", "../made/model", "../made/image.png", "--mask", "../made/mask.png", *FEW]
CLASSIFIER = ["train", "classifier-cifar10-tiny", "data.path=../made/photos"]

# verb -> its words, in which OUT stands for the folder, and the folder where none is given
WRITES: dict[str, tuple[list[str], str | None]] = {
    "demo": (["demo", "--images", "64", "--out", "OUT"], "demo"),
    "train": (["train", "mar-digits", *TINY, "--out", "OUT"], "runs/mar-digits"),
    "train (classifier)": ([*CLASSIFIER, "--out", "OUT"], "runs/classifier-cifar10-tiny"),
    "cache": (["cache", "mar-cifar10-tiny", "data.path=../made/photos", "data.size=8", "--out", "OUT"], None),
    "sample": (["sample", "../made/model", *FEW, "--out", "OUT"], "samples"),
    "edit": ([*EDIT, "--out", "OUT"], "edited"),
    "evaluate": (["evaluate", "../made/model", *EVALUATE, "--out", "OUT"], "evaluation"),
    "evaluate --cache": (["evaluate", "../made/model", *EVALUATE, "--out", "fresh", "--cache", "OUT"], None),
    "evaluate (tokenizer)": (["evaluate", "../made/pixels", *TOKENS, "--out", "OUT"], "evaluation"),
    "sweep": ([*SWEEP, *EVALUATE, "--out", "OUT"], "sweep"),
    "sweep --cache": ([*SWEEP, *EVALUATE, "--out", "fresh", "--cache", "OUT"], None),
    "compare": ([*COMPARE, *EVALUATE, "--out", "OUT"], "compare"),
    "measure-latents": ([*MEASURE, "--out", "OUT"], None),
    "convert mar": (["convert", "mar", "../made/mar.pth", "OUT", *VAE], None),
    "convert kl16": (["convert", "kl16", "../made/kl16.ckpt", "OUT"], None),
    "convert llamagen": (["convert", "llamagen", "../made/mar.pth", "OUT", "--vq", "../made/kl16.ckpt"], None),
    "convert llamagen-vq": (["convert", "llamagen-vq", "../made/kl16.ckpt", "OUT"], None),
    "convert detok": (["convert", "detok", "../made/kl16.ckpt", "OUT", "--stats", "measure"], None),
    "convert arinar": (["convert", "arinar", "../made/mar.pth", "OUT", *VAE], None),
    "convert ear": (["convert", "ear", "../made/mar.pth", "OUT", *VAE], None),
    "export half": (["export", "half", "../made/model", "OUT"], None),
}  # fmt: skip
FILES: dict[str, list[str]] = {  # those that write one file, named OUT
    "export mar": ["export", "mar", "../made/model", "OUT"],
    "export kl16": ["export", "kl16", "../made/kl", "OUT"],
    "export llamagen": ["export", "llamagen", "../made/model", "OUT"],
    "export arinar": ["export", "arinar", "../made/model", "OUT"],
    "recipes copy": ["recipes", "copy", "mar-digits", "OUT"],
}
READS: dict[str, list[str]] = {
    "bench": ["bench", "../made/model", "--repetitions", "1", *FEW],
    "models": ["models"],
    "doctor": ["doctor"],
    "recipes list": ["recipes", "list"],
    "recipes show": ["recipes", "show", "mar-digits"],
}
REPLACES = ["train", "train (classifier)", "sample", "edit", "measure-latents", *(v for v in WRITES if "convert" in v)]


def words_of(words: list[str], out: str) -> list[str]:
    return [out if word == "OUT" else word for word in words]


def without_out(words: list[str]) -> list[str]:
    return words[: words.index("OUT") - 1] + words[words.index("OUT") + 1 :]


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert run(words) == code, capsys.readouterr().err
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not printed.out, printed
    return lines[0]


def test_every_verb_is_here() -> None:
    """A verb that is added has to say here whether it writes."""

    def verbs(command: Any, name: str = "") -> Iterator[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name.strip()
        for word, part in (inner or {}).items():
            yield from verbs(part, f"{name} {word}")

    there = set(verbs(typer.main.get_command(app)))
    assert there == {name.split(" (")[0].split(" --")[0] for name in (*WRITES, *FILES, *READS)}


# --- folders full of somebody's files -------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", WRITES)
def test_a_folder_of_somebody_else_is_refused_by_every_verb(
    verb: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(work / "theirs")
    before = contents(work)
    line = refused(words_of(WRITES[verb][0], "theirs"), capsys)
    assert "theirs" in line and ("choose" in line or "name" in line)
    assert contents(work) == before


@pytest.mark.parametrize("verb", REPLACES)
def test_overwrite_replaces_nothing_that_is_not_ours(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(work / "theirs")
    before = contents(work)
    assert "theirs" in refused([*words_of(WRITES[verb][0], "theirs"), "--overwrite"], capsys)
    assert contents(work) == before


@pytest.mark.parametrize("verb", [verb for verb, (_, default) in WRITES.items() if default])
def test_the_default_folder_is_refused_too(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, default = WRITES[verb]
    fill(work / str(default))
    before = contents(work)
    assert str(default) in refused(without_out(words), capsys)
    assert contents(work) == before


@pytest.mark.parametrize("verb", ["train", "train (classifier)"])
@pytest.mark.parametrize("out", ["theirs", "nowhere", "empty", "."])
def test_resuming_what_is_no_run_is_refused(
    verb: str, out: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if out in ("theirs", "."):
        fill(work / out, [name for name in THEIRS if name != "recipe.yaml"])
    (work / "empty").mkdir()
    before = contents(work)
    line = refused([*words_of(WRITES[verb][0], out), "--resume"], capsys)
    assert ("has no recipe.yaml" if out in ("theirs", ".") else "no run to resume") in line
    assert contents(work) == before


@pytest.mark.parametrize("verb", FILES)
def test_a_file_that_is_there_is_refused(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "out.pth").write_text("mine")
    (work / "link.pth").symlink_to("nowhere.pth")
    (work / "folder.pth" / "out.pth").mkdir(parents=True)
    before = contents(work)
    for out in ("out.pth", "link.pth"):
        line = refused(words_of(FILES[verb], out), capsys)
        assert f"{out} exists already" in line or "model" in line  # where the model can't be written in that form
    if verb != "recipes copy":
        refused([*words_of(FILES[verb], "folder.pth"), "--overwrite"], capsys)
    assert contents(work) == before


@pytest.mark.parametrize("verb", READS)
def test_what_only_reads_leaves_everything(
    verb: str, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "matrix_peak", lambda _dtype, _device: 1e11)
    monkeypatch.setattr(race, "memory_of", race.child)  # in this process
    fill(work)
    before = contents(work)
    assert run(READS[verb]) == 0, capsys.readouterr().err
    assert contents(work) == before


CHECKS: dict[str, Callable[[Path], object]] = {
    "train": lambda out: check_out(out, resume=False, overwrite=False),
    "train --overwrite": lambda out: check_out(out, resume=False, overwrite=True),
    "train --resume": lambda out: check_out(out, resume=True, overwrite=False),
    "demo": is_demo,
    "cache": lambda out: owned(out, "cache", is_cache, begun={LOCK}),
    "sample": lambda out: check_samples_folder(out, [out / "grid.png"], overwrite=False),
    "sample --overwrite": lambda out: check_samples_folder(out, [out / "grid.png"], overwrite=True),
    "evaluate": lambda out: check_folders(out, None),
    "evaluate --cache": lambda out: check_folders(out.parent / "fresh", out),
    "sweep": lambda out: owned(out, "sweep", is_sweep),
    "compare": lambda out: owned(out, "comparison", is_comparison),
}  # fmt: skip


@pytest.mark.parametrize("verb", CHECKS)
def test_one_file_of_somebody_else_is_enough(verb: str, tmp_path: Path) -> None:
    """A folder with a single file is refused, whatever of our names that has."""
    for number, name in enumerate(THEIRS):
        if (verb, name) == ("cache", ".cache.lock"):
            continue  # a lock file is not written to
        folder = fill(tmp_path / str(number), [name])
        before = contents(folder)
        with pytest.raises(SeriatimError, match=str(folder)):
            CHECKS[verb](folder)
        assert contents(folder) == before, name


def test_links_and_droppings(tmp_path: Path) -> None:
    """A link is somebody's, wherever it leads; what file managers leave everywhere is nobody's."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"holds 'data' and is no run that Seriatim wrote"):
        check_out(tmp_path / "linked", resume=False, overwrite=False)
    (tmp_path / "seen" / "inner").mkdir(parents=True)
    (tmp_path / "seen" / ".DS_Store").write_bytes(b"x")
    check_out(tmp_path / "seen", resume=False, overwrite=False)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="name a folder"):
        check_out(tmp_path / "dangling", resume=False, overwrite=False)


# --- from Python ----------------------------------------------------------------------------------------------------


def python_writers(work: Path, out: Path) -> dict[str, Callable[[], object]]:
    pipe = seriatim.load(work.parent / "made" / "model", device="cpu")
    result = pipe(class_labels=[0], seed=0, num_inference_steps=1, num_diffusion_steps=1)
    data, tokenizer = build_inputs(read_recipe("mar-digits"))
    with seeded(0):
        net = ResNet(classes=3, channels=1, widths=(8, 8), depth=(0, 1))
    classifier = TrainedClassifier(net, "small", (8, 8), ["a", "b", "c"])
    small = {"num": 12, "features": PixelFeatures((8, 8), 1), "figures": ["nearest"], "quiet": True}
    measured = read_recipe("mar-cifar10-tiny", MEASURE[2:])
    judge = read_any("classifier-cifar10-tiny", CLASSIFIER[2:])
    return {
        "result.save": lambda: result.save(out),
        "result.save overwrite": lambda: result.save(out, overwrite=True),
        "pipe.save": lambda: pipe.save(out),
        "save_tokenizer": lambda: save_tokenizer(tokenizer, out),
        "save_classifier": lambda: save_classifier(classifier, out),
        "save_animation": lambda: save_animation(result.images, out / "animation.gif"),
        "train": lambda: train(read_recipe("mar-digits", TINY), out, quiet=True),
        "train overwrite": lambda: train(read_recipe("mar-digits", TINY), out, overwrite=True, quiet=True),
        "train_classifier": lambda: train_classifier(judge, out, quiet=True),  # type: ignore[arg-type]
        "write_cache": lambda: write_cache(data, tokenizer, out, quiet=True),
        "measure_latents": lambda: measure_latents(measured, out, quiet=True),
        "evaluate": lambda: evaluate(pipe, Digits(), out, **small),  # type: ignore[arg-type]
        "sweep": lambda: sweep(pipe, Digits(), out, {"guidance_scale": [1]}, **small),
        "compare": lambda: compare(pipe, pipe, Digits(), out, **small),  # type: ignore[arg-type]
    }


def test_every_function_that_writes_refuses_a_folder_of_somebody_else(work: Path) -> None:
    out = fill(work / "theirs")
    before = contents(work)
    for name, write in python_writers(work, out).items():
        with pytest.raises(UsageError) as caught:
            write()
        assert str(out) in str(caught.value) and "\n" not in str(caught.value), name
        assert contents(work) == before, name


def test_samples_are_replaced_only_on_request(work: Path) -> None:
    pipe = seriatim.load(work.parent / "made" / "model", device="cpu")
    few: dict[str, Any] = {"num_inference_steps": 1, "num_diffusion_steps": 1}
    first = pipe(class_labels=["cat", "dog"], seed=0, **few)
    second = pipe(class_labels=["cat", "dog"], seed=1, **few)
    first.save(work / "out")
    before = contents(work)
    with pytest.raises(UsageError, match=r"0000-cat\.png exists already; choose another folder or pass --overwrite"):
        second.save(work / "out")
    assert contents(work) == before
    pipe(class_labels=["horse"], seed=2, **few).save(work / "out")  # other names, in a folder of samples
    assert {path.name for path in (work / "out").iterdir()} == {"0000-cat.png", "0001-dog.png", "0000-horse.png"}
    second.save(work / "out", overwrite=True)
    assert (work / "out" / "0000-cat.png").read_bytes() != before["out/0000-cat.png"][0]
    (work / "out" / "0001-dog.png").write_bytes(b"painted by hand")
    before = contents(work)
    with pytest.raises(UsageError, match=r"0001-dog\.png is not a sample that Seriatim wrote and would be lost"):
        first.save(work / "out", overwrite=True)
    assert contents(work) == before


# --- and what is ours is taken --------------------------------------------------------------------------------------


AGAIN = ["cache", "evaluate", "evaluate --cache", "evaluate (tokenizer)", "sweep", "sweep --cache", "compare"]


@pytest.mark.parametrize("verb", AGAIN)
def test_the_same_command_goes_on_in_its_own_folder(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folders carry no mark but their own files, so that those of earlier releases are known too."""
    words = words_of(WRITES[verb][0], "ours")
    assert run(words) == 0, capsys.readouterr().err
    assert run(words) == 0, capsys.readouterr().err
    fill(work / "ours", ["thesis.txt"])
    assert run(words) == (2 if verb == "cache" else 0)
    assert (work / "ours" / "thesis.txt").read_text() == "ten years"


@pytest.mark.usefixtures("work")
def test_overwrite_says_what_it_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    sample = [*words_of(WRITES["sample"][0], "out"), "--seed", "0"]
    convert = words_of(WRITES["convert kl16"][0], "kl16")
    export = words_of(FILES["export kl16"], "kl16.ckpt")
    for words, says in (
        (sample, f"replacing {Path('out/0000-cat.png')} and 3 more"),
        (convert, "replacing kl16, which is kept until the new one is whole"),
        (export, "replacing kl16.ckpt, which is kept until the new one is whole"),
    ):
        assert run(words) == 0, capsys.readouterr().err
        refused(words, capsys)
        assert run([*words, "--overwrite"]) == 0
        assert says in capsys.readouterr().err.splitlines()


def test_a_model_over_other_json_files_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    """A folder with a config.json and a manifest.json, as web pages and other libraries have them, is not ours."""
    fill(tmp_path / "page", ["config.json", "manifest.json", "README.md"])
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="exists and is not a model folder"):
        save_bundle(bundle, tmp_path / "page")
    assert contents(tmp_path) == before
    save_bundle(bundle, tmp_path / "ours")
    (tmp_path / "ours" / "manifest.json").write_text("damaged")
    save_bundle(bundle, tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text("damaged")
    save_bundle(bundle, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["format"] == FORMAT
