"""Every script of benchmarks/ runs at toy size. A script without a toy run fails here."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from forked import in_fork
from forked import script as program
from helpers import make_bundle, randomise, read_picture
from PIL import Image

from seriatim.backbones.masked_transformer import Masked
from seriatim.bench import official_mar as bench_mar
from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.cli.main import run
from seriatim.heads.mixture import Mixture
from seriatim.models.build import seeded
from seriatim.models.masked_model import MaskedModel
from seriatim.models.registry import HEADS
from seriatim.tokenizers.pixels import Pixels
from seriatim.training import periodic
from seriatim.zoo import PRESETS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
sys.path.append(str(FOLDER))

# These are run by files of their own, which have more to say about them: script -> test.
ELSEWHERE = {
    "ablation": "test_ablation.py::test_pictures_end_to_end",
    "known_density": "test_known_density.py::test_it_trains_judges_and_goes_on",
    "random_numbers": "test_random_numbers.py::test_every_draw_is_timed",
}
TINY = ["model.width=16", "model.depth=1", "model.heads=2", "model.head.width=16", "model.head.depth=1"]


class Toy:
    """What a toy run is given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def main(self, script: str, *arguments: object) -> str:
        """Call the script's `main`; returns what it printed."""
        importlib.import_module(script).main([str(argument) for argument in arguments])
        return self.capsys.readouterr().out

    def model(self) -> Path:
        return save_bundle(make_bundle(), self.folder / "model")

    def pictures(self, size: int, name: str = "pictures") -> Path:
        """A folder of three classes with four random pictures each."""
        random = np.random.default_rng(0)
        for label in ("cat", "dog", "horse"):
            (self.folder / name / label).mkdir(parents=True)
            for i in range(4):
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(self.folder / name / label / f"{i}.png")
        return self.folder / name

    def judged(self) -> list[object]:
        """Options that name pictures, others to compare with, and a classifier of them."""
        pictures, real = self.pictures(32), self.pictures(32, "real")
        small = ["model.widths=[8]", "model.depth=[0]", "training.images=12", "training.batch_size=6"]
        small += ["training.threads=1", "training.dtype=float32", f"data.path={pictures}", f"data.test_path={real}"]
        assert run(["train", "classifier-cifar10-tiny", *small, "--out", str(self.folder / "c"), "--json"]) == 0
        self.capsys.readouterr()
        return ["--data", pictures, "--real-data", real, "--classifier", self.folder / "c"]

    def few_steps(self) -> None:
        """Time few steps where a script asks how many it can take in so many minutes."""
        for name in ("WARM", "PROBED", "ROUNDS"):
            self.monkeypatch.setattr(importlib.import_module("equal_minutes"), name, 1)

    def double(self, name: str) -> Path:
        """A checkout of the double of an original."""
        source = ROOT / "tests" / "bench" / name
        self.monkeypatch.setitem(sys.modules, "torchvision", None)
        return shutil.copytree(source, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def arinar_head(toy: Toy) -> None:
    """At the preset's form, but narrow."""
    preset = PRESETS["arinar-b"]
    head = {**preset.model["head"], "model": {**preset.model["head"]["model"], "width": 32}}
    small = replace(preset, model={**preset.model, "tokens": 16, "width": 32, "heads": 2, "head": head})
    toy.monkeypatch.setitem(PRESETS, "arinar-b", small)
    printed = toy.main("arinar_head", "--tokens", 1, "--repetitions", 1, "--official", toy.double("arinar"), "--json")
    found = json.loads(printed)["seconds_and_ratios"]["1"]
    assert {"official, free", "official, guided", "free, packed", "ratio: guided, exact"} <= found.keys()
    assert all(value > 0 for value in found.values())


def bf16_memory(toy: Toy) -> None:
    """All trainings, here and one after the other, and the table of what they printed."""
    script: Any = importlib.import_module("bf16_memory")
    script.pictures(toy.folder / "pictures", count=8)
    toy.monkeypatch.setattr(script, "BATCH", 4)
    toy.monkeypatch.setattr(periodic, "return_heap", periodic.return_heap)  # the script replaces it
    toy.monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    toy.monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    measured = {}
    for bound in script.BOUNDS:
        words, log = [*TINY, "tokenizer.patch=8"], toy.folder / "log.jsonl"
        script.train_and_measure(bound, toy.folder, "bfloat16", 4, 1, "mar-cifar10-tiny", words, log)
        measured[bound] = [json.loads(line) for line in toy.capsys.readouterr().out.splitlines()]
        assert [line["step"] for line in measured[bound][:-1]] == [1, 2, 3, 4]
        assert all(line["resident"] > 10 for line in measured[bound][:-1]) and measured[bound][-1]["largest"] > 10
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "1024"
    assert [row.split()[0] for row in script.table(measured).splitlines()] == ["start", *script.BOUNDS]
    logged = [json.loads(line) for line in (toy.folder / "log.jsonl").read_text().splitlines()]
    assert [(line["bound"], line["step"]) for line in logged] == [(b, s) for b in script.BOUNDS for s in (1, 2, 3, 4)]


def budget(toy: Toy) -> None:
    """Three contestants, of which one diverges; a stopped call goes on, and the last one does nothing again."""
    script: Any = importlib.import_module("budget")
    table, sizes = script.CONTESTANTS, {"width": 16, "depth": 1, "heads": 2, "head.width": 16, "head.depth": 1}
    narrow = {f"model.{key}": value for key, value in sizes.items()}
    toy.monkeypatch.setitem(table, "base", replace(table["base"], changes=narrow))
    toy.monkeypatch.setitem(table, "diverging", replace(table["base"], changes={"training.learning_rate": 1e34}))
    network = {"model.width": 16, "model.head.widths": [8, 8], "model.head.attention": [1], "model.head.layers": 1}
    toy.monkeypatch.setitem(table, "unet", replace(table["unet"], changes=table["unet"].changes | network))
    out, names = toy.folder / "o", ["base+muon", "unet", "base+diverging"]
    sizes_of_work = [
        "--minutes",
        0.0001,
        "--samples",
        12,
        "--confirm",
        13,
        "--dtype",
        "float32",
        "training.batch_size=4",
    ]
    sampling = ["--sampling", "{num_diffusion_steps: 2}", "--guidance", 1.5, "3:linear", "3:interval:0.2:1"]
    arguments = [*toy.judged(), "--out", out, "--only", *names, *sampling, *sizes_of_work]
    with toy.monkeypatch.context() as patch:
        patch.setattr(script, "draw", Mock(side_effect=KeyboardInterrupt))  # after the first training and judgement
        assert script.main([str(word) for word in arguments]) == 130
    made = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    said = toy.main("budget", *arguments)
    assert made and all(file.stat().st_mtime_ns == time for file, time in made.items()), "nothing is done twice"
    assert said == toy.main("budget", *arguments) == toy.main("budget", "--report", "--out", out)
    assert said == (out / "tables.md").read_text()
    assert said.splitlines()[-1].startswith("base+diverging, seed 0, failed: ")
    judged = {(row["name"], row["point"].split("+")[0]): row for row in script.rows_of(out) if not row["confirming"]}
    points = {"1.5", "3-linear", "3-interval-0.2-1"}
    # A UNet, which draws all pixels together, has no schedule over tokens.
    assert judged.keys() == {("base+muon", point) for point in points} | {("unet", p) for p in points - {"3-linear"}}
    assert all(row["figures"]["accuracy"][0] >= 0 and row["sample_seconds"] > 0 for row in judged.values())
    assert {row["samples"] for row in script.rows_of(out) if row["confirming"]} == {13}
    assert read_picture(out / "pictures" / "unet-0-1.5+num_diffusion_steps=2.png").size == (662, 200)
    assert read_picture(out / "curves.png").size[0] > 1000
    assert "muon-0.012" in toy.main("budget", "--list") and "unet" not in HEADS
    for wrong in ("four", "4:intervall:0:1", "4:interval:1", "4:linear:2"):  # found before any work
        assert script.main(["--report", "--out", str(out), "--guidance", wrong]) == 2
        assert toy.capsys.readouterr().err.startswith("error: guidance")


def continuous_or_quantised(toy: Toy) -> None:
    """Both kinds, one codebook; the second call does nothing again."""
    recipes = ["--kl", "kl-32-tiny", "--vq", "vq-32-tiny", "--vocabs", 8, "--minutes", 0.0001]
    toy.few_steps()
    arguments = [*toy.judged(), *recipes, "--out", toy.folder / "o", "tokenizer.width=4", "training.batch_size=4"]
    said = toy.main("continuous_or_quantised", *arguments).splitlines()
    assert said == toy.main("continuous_or_quantised", *arguments).splitlines()
    assert [line.split("|")[1].strip() for line in said[2:]] == ["kl", "vq-8", "the images themselves"]
    assert "nan" not in "".join(said)


def editing_pictures(toy: Toy) -> None:
    said = toy.main("editing_pictures", toy.model(), toy.pictures(8), toy.folder / "out.png", "--classes", "dog")
    assert said == "row 1: dog, then four as dog, four as horse\n"
    assert read_picture(toy.folder / "out.png").size[0] > 640


def entropy_pictures(toy: Toy) -> None:
    with seeded(0):
        backbone = Masked(tokens=16, dim=4, width=32, depth=1, heads=2, buffer=3)
        model = MaskedModel(backbone, Mixture(4, components=2, depth=0), classes=2)
    randomise(model, scale=0.05)
    bundle = Bundle(model.eval(), Pixels(8, 2, 1), ["cat", "dog"], {"num_inference_steps": 3})
    path = save_bundle(bundle, toy.folder / "mixture")
    said = toy.main("entropy_pictures", path, toy.folder / "out.png", "--classes", "dog", "--per-class", 1)
    assert said.startswith("1 images; mean ") and "nan" not in said
    assert read_picture(toy.folder / "out.png").size[0] > 200


def folder_start(toy: Toy) -> None:
    """Its two processes are forks."""

    def forked(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-c"]
        file = toy.folder / "program.py"
        file.write_text(command[2])
        return in_fork(program, [str(file), *command[3:]], env=env)

    toy.monkeypatch.setattr(subprocess, "run", forked)
    first, second = toy.main("folder_start", "--files", 12, "--classes", 3, "--side", 8).splitlines()
    assert first.startswith("12 files, first start: ") and second.startswith("12 files, second start: ")


def hops(toy: Toy) -> None:
    said = toy.main("hops").splitlines()
    assert "pipeline/pipeline.py: " in "\n".join(said) and said[-1].endswith(" in all")


def known_mixture(toy: Toy) -> None:
    script: Any = importlib.import_module("known_mixture")
    small = {"STEPS": (2, 3), "SEEDS": (0, 1), "WIDTH": 16, "DEPTH": 1, "BATCH": 16, "SAMPLES": 128, "TRUTH": 500}
    for name, value in small.items():
        toy.monkeypatch.setattr(script, name, value)
    said = toy.main("known_mixture", "--out", toy.folder / "out", "--updates", 2)
    assert "nan" not in said and all(solver in said for solver in script.SOLVERS)
    assert (toy.folder / "out" / "solvers.png").stat().st_size > 1000


def mar_end_to_end(toy: Toy) -> None:
    """The commands run in this process."""
    script: Any = importlib.import_module("mar_end_to_end")

    def measured(what: str, command: list[str], folder: Path) -> None:
        toy.monkeypatch.chdir(folder)
        assert command[:3] == [sys.executable, "-m", "seriatim"]
        assert run(command[3:]) == 0, what
        toy.monkeypatch.chdir(toy.folder)

    toy.monkeypatch.setattr(script, "measured", measured)
    toy.main("mar_end_to_end", toy.pictures(8), "--images", 6, "--steps", 2, "--toy")


def mar_training_step(toy: Toy) -> None:
    arguments = [toy.double("checkout"), "--model", toy.model(), "--batch", 2, "--threads", 1, "--repetitions", 1]
    *_, last = toy.main("mar_training_step", *arguments).splitlines()
    found = json.loads(last)
    for dtype in ("float32", "bfloat16"):
        seconds, theirs = found[dtype]["seconds"], found[dtype]["official_seconds"]
        assert found[dtype]["ratio"] == pytest.approx(theirs / seconds) and seconds > 0 < theirs


def optimisers(toy: Toy) -> None:
    """Both optimisers, one seed; the second call does nothing again."""
    folders = [*toy.judged(), "--out", toy.folder / "o"]
    arguments = [*TINY, "training.batch_size=4", *folders, "--minutes", "0.0001", "--samples", 12, "--seeds", 0]
    said = toy.main("optimisers", *arguments).splitlines()
    assert said == toy.main("optimisers", *arguments).splitlines()
    rows = [json.loads(line) for line in said[:2]]
    assert [row["optimiser"] for row in rows] == ["adamw", "muon"]
    assert all(row["updates"] >= 1 and row["loss"] > 0 and row["distance"] > 0 for row in rows)
    assert said[-1].startswith("| muon less adamw | | ")


def schedule_pictures(toy: Toy) -> None:
    said = toy.main("schedule_pictures", "--out", toy.folder).split()
    assert [Path(path).name for path in said] == ["orders.png", "guidance.png", "tokens-per-step.png"]
    assert all(read_picture(Path(path)).size[0] > 500 for path in said)


def tokens_for_generators(toy: Toy) -> None:
    """Patches of pixels, and a trained tokenizer whose latents are cached; the second call does nothing again."""
    small = ["training.images=8", "tokenizer.width=4", "training.batch_size=4", "training.threads=1"]
    toy.few_steps()
    script: Any = importlib.import_module("tokens_for_generators")
    toy.monkeypatch.setitem(script.TRAINING, "batch_size", 4)
    judged = toy.judged()
    tokenizer = toy.folder / "kl"
    assert run(["train", "kl-32-tiny", f"data.path={judged[1]}", *small, "--out", str(tokenizer), "--json"]) == 0
    sizes = ["--minutes", 0.0001, "--samples", 12, "--sampling", "{num_diffusion_steps: 2}", "--out", toy.folder / "o"]
    only = ["--only", "raster-kl", "masked-pixels", "--tokenizer", f"kl={{from: {tokenizer}}}"]
    arguments = [*TINY, *judged, *sizes, *only]
    toy.capsys.readouterr()
    said = toy.main("tokens_for_generators", *arguments).splitlines()
    assert said == toy.main("tokens_for_generators", *arguments).splitlines()
    assert [line.split("|")[1:3] for line in said[2:]] == [[" raster ", " kl "], [" masked ", " pixels "]]
    assert read_picture(toy.folder / "o" / "raster-kl-0-4.png").size[0] > 500


def training_throughput(toy: Toy) -> None:
    arguments = ["mar-cifar10-tiny", f"data.path={toy.pictures(32)}", *TINY, "training.batch_size=4"]
    sizes = ["--images", 8, "--repetitions", 1, "--dtypes", "float32", "--threads", 1]
    said = toy.main("training_throughput", *arguments, *sizes)
    assert said.startswith("float32, 1 threads: ") and "ratio" in said


TOYS: dict[str, Callable[[Toy], None]] = {
    function.__name__: function
    for function in (
        arinar_head,
        bf16_memory,
        budget,
        continuous_or_quantised,
        editing_pictures,
        entropy_pictures,
        folder_start,
        hops,
        known_mixture,
        mar_end_to_end,
        mar_training_step,
        optimisers,
        schedule_pictures,
        tokens_for_generators,
        training_throughput,
    )
}


@pytest.mark.parametrize("script", TOYS)
def test_it_runs_at_toy_size(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, modules = torch.get_num_threads(), set(sys.modules)
    try:
        TOYS[script](Toy(tmp_path, monkeypatch, capsys))
    finally:
        torch.set_num_threads(before)
        for name in set(sys.modules) - modules:  # the doubles' own
            if name.split(".")[0] in bench_mar.MODULES:
                del sys.modules[name]


def is_script(path: Path) -> bool:
    return any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in ast.parse(path.read_text()).body
    )


def test_every_script_has_a_toy_run() -> None:
    """A file that is no script is a part of one: some other file imports it."""
    files = sorted(FOLDER.rglob("*.py"))
    scripts = {path.stem for path in files if is_script(path)}
    assert scripts == TOYS.keys() | ELSEWHERE.keys()
    imported = {
        name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert {path.stem for path in files} - scripts <= imported


@pytest.mark.parametrize("script", ELSEWHERE)
def test_the_runs_of_other_files_are_there(script: str) -> None:
    file, name = ELSEWHERE[script].split("::")
    tree = ast.parse((Path(__file__).parent / file).read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    names = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
             if alias.name == script}  # fmt: skip
    assert any(f"{module}.main(" in ast.unparse(found) for module in names)
