"""The README's words, run as they stand: commands in order in an empty folder, then Python; the demo shortened."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked import Fork, command_line, in_fork
from helpers import read_picture

from seriatim.zoo import PRESETS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHORTER = {"demo": ["--images", "1280"], "train": ["training.images=640"]}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def run(arguments: Sequence[str], cwd: Path) -> None:
    """Run `seriatim` with these arguments, which must succeed."""
    done = in_fork(command_line, arguments, cwd=cwd, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run, shortened, over what a demo left that was killed."""
    folder = tmp_path_factory.mktemp("readme")
    end = time.monotonic() + 60
    with Fork(command_line, ["demo", "--images", "1000000"], cwd=folder) as killed:
        while not (folder / "demo" / "metrics.jsonl").exists():
            assert time.monotonic() < end and killed.poll() is None
            time.sleep(0.05)
    run(["demo", *SHORTER["demo"]], folder)
    return folder


def test_readme_has_the_two_commands() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines[:2] == ["pip install . && seriatim demo", 'pip install ".[dev]" && pytest']


def test_readme_demo_leaves_what_it_promises(folder: Path) -> None:
    demo = folder / "demo"
    report = json.loads((demo / "report.json").read_text())
    for key in ("seconds", "recognised", "frechet", "frechet_real", "images_per_second", "within_class_variance"):
        assert isinstance(report[key], float), key
    assert report["samples"] == 160 and report["training_images"] == 1280
    assert 0.0 <= report["recognised"] <= 1.0 < report["recognised_real"] + 0.1
    assert 0 < report["frechet_real"] < report["frechet"], (
        "a model that has seen 1280 images is no match for real digits"
    )
    assert read_picture(demo / "grid.png").size[0] > 16 * 40
    assert read_picture(demo / "training.png").size[0] > 300
    assert (demo / "index.html").read_text(encoding="utf-8").count("data:image/png;base64,") >= 2
    assert (demo / "model" / "model.safetensors").exists()


def test_readme_demo_leaves_nothing_of_the_one_before(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if "demo" in path.name] == ["demo"]


def test_readme_demo_can_be_run_again(folder: Path, tmp_path: Path) -> None:
    """A finished one is replaced, and ends with about the same loss."""
    shutil.copytree(folder / "demo", tmp_path / "demo")
    run(["demo", *SHORTER["demo"], "--json"], tmp_path)
    first, again = (json.loads((where / "demo" / "report.json").read_text()) for where in (folder, tmp_path))
    assert again["loss"] == pytest.approx(first["loss"], rel=0.2) and again["seconds"] != first["seconds"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_readme_demo_does_not_replace_a_run(folder: Path, tmp_path: Path) -> None:
    """A run that looks like a demo, and a demo that was trained longer, are the user's own."""
    small = ["model.width=32", "training.images=64", "training.threads=1"]
    run(["train", "mar-digits", *small, "--out", "run"], tmp_path)
    shutil.copytree(folder / "demo", tmp_path / "longer")
    recipe = tmp_path / "longer" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("images: 1280", "images: 1281"))
    for name in ("run", "longer"):
        before = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        done = in_fork(command_line, ["demo", "--images", "64", "--out", name], cwd=tmp_path)
        assert done.returncode == 2 and "which is not the demo's" in done.stderr and done.stderr.count("\n") == 1
        assert before == {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}


def test_readme_commands(folder: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("seriatim ")]
    assert len(commands) >= 5
    for command in commands:
        verb, *rest = shlex.split(command)[1:]
        run([verb, *rest, *SHORTER.get(verb, [])], folder)
    assert len(list((folder / "sevens").glob("*-7.png"))) == 8
    assert (folder / "runs" / "digits" / "model").is_dir()


def test_readme_python(folder: Path) -> None:
    """Each block as a program of its own, in one new interpreter, where a warning is an error."""
    programs = "for block in " + repr(blocks("python")) + ": exec(block, {'__name__': '__main__'})"
    command = [sys.executable, "-W", "error", "-c", programs]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "three.png").exists() and (folder / "five.png").exists()


def test_readme_table_is_that_of_the_presets() -> None:
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `([\w-]+)` \| .*$", README, flags=re.M)}
    for name, preset in PRESETS.items():
        assert f"| {preset.parameters:,} | {preset.tokens} |" in rows[name], name
        published = preset.published or {}
        assert ", ".join(f"{k} {v}" for k, v in published.items() if k in ("FID", "IS")) in rows[name], name
        assert "; ".join(preset.proven) in rows[name], name


def test_readme_links_and_pictures_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_recipe_keys_are_all_there() -> None:
    """docs/recipes.md lists every key of a recipe and none that doesn't exist."""
    from seriatim.backbones.causal_transformer import Causal
    from seriatim.backbones.masked_transformer import Masked
    from seriatim.core.construct import arguments
    from seriatim.evaluation.residual_net import ResNet
    from seriatim.heads.categorical import Categorical
    from seriatim.heads.diffusion import Diffusion
    from seriatim.heads.energy import Energy
    from seriatim.heads.flow import Flow
    from seriatim.heads.mixture import Mixture
    from seriatim.models.causal_model import CausalModel
    from seriatim.models.masked_model import MaskedModel
    from seriatim.tokenizers.kinds import TOKENIZERS
    from seriatim.training.config import ClassifierTraining, Training
    from seriatim.training.optim import OPTIMISERS, SHARED

    text = (ROOT / "docs" / "recipes.md").read_text()
    listed = set(re.findall(r"`((?:training|model)\.[a-z0-9_.]+)`", text)) - {"training.png"}
    derived = {"tokens", "dim", "vocab", "classes", "channels", "backbone", "head", "z_dim", "conditioner"}
    expected = {f"training.{key}" for cls in (Training, ClassifierTraining) for key in cls.model_fields}
    expected |= {"model.kind", "model.head.kind", "model.conditioner"}
    expected |= {f"training.optimiser.{key}" for make in OPTIMISERS.values() for key in list(arguments(make))[SHARED:]}
    expected |= {
        f"model.{key}"
        for cls in (Masked, MaskedModel, Causal, CausalModel, ResNet)
        for key in arguments(cls)
        if key not in derived
    }
    heads = (Categorical, Diffusion, Energy, Flow, Mixture)
    expected |= {f"model.head.{key}" for cls in heads for key in arguments(cls) if key not in derived}
    assert listed == expected

    listed = set(re.findall(r"`(tokenizer\.[a-z0-9_]+)`", text))
    derived = {"size", "channels", "autoencoder"}
    expected = {"tokenizer.kind", "tokenizer.from"}
    expected |= {f"tokenizer.{key}" for cls in TOKENIZERS.values() for key in arguments(cls) if key not in derived}
    assert listed == expected
