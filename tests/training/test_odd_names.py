"""Names that are not UTF-8, everywhere at once: data, classes, files, run, cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import seriatim
from seriatim.cli.main import run
from seriatim.core.reading import parse_yaml
from seriatim.data.sources import build_data
from seriatim.training.config import dump, read_any, read_recipe

ODD = os.fsdecode(b"caf\xe9")
TINY = [
    "data.flip=true", "model.width=16", "model.depth=1", "model.heads=1", "model.head.width=16", "model.head.depth=1",
    "training.batch_size=8", "training.sample_images=0", "training.threads=1", "training.dtype=float32",
]  # fmt: skip
FEW = ["--num-inference-steps", "1", "--num-diffusion-steps", "1", "--seed", "1"]


def test_a_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (ODD, "a\nb\x1b[31m", "tea"):
        folder = tmp_path / f"data-{ODD}" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 20 * i, dtype=np.uint8)).save(folder / f"{ODD}{i}.png")
    (tmp_path / f"data-{ODD}" / "tea" / f"{ODD}.png").write_bytes(b"broken")
    data = f"data={{kind: folder, path: data-{ODD}, size: 8, channels: 1, max_bad: 0.5}}"
    train = ["train", "mar-digits", data, *TINY, "--out", f"run-{ODD}"]
    assert run([*train, "training.images=8", "training.save_images=8"]) == 0
    assert run([*train, "training.images=16", "training.save_images=8", "--resume", "--json"]) == 0
    recorded = json.loads((tmp_path / f"run-{ODD}" / "data.json").read_bytes())
    assert recorded["classes"] == ["a\nb\x1b[31m", "caf\\xe9", "tea"] and f"tea/{ODD}.png" in recorded["left_out"]
    assert read_any(os.path.join(f"run-{ODD}", "recipe.yaml")).data["path"] == f"data-{ODD}"
    assert run(["sample", f"run-{ODD}", "--label", ODD, *FEW, "--out", f"out-{ODD}"]) == 0
    assert run(["sample", f"run-{ODD}", "--from", f"out-{ODD}/0000-caf_xe9.png", "--out", "again"]) == 0
    picture = f"data-{ODD}/tea/{ODD}0.png"
    (tmp_path / f"mask-{ODD}.png").write_bytes((tmp_path / f"data-{ODD}" / "tea" / f"{ODD}1.png").read_bytes())
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(f"mask-{ODD}.png")
    assert run(["edit", f"run-{ODD}", picture, "--mask", f"mask-{ODD}.png", *FEW, "--out", f"edited-{ODD}"]) == 0
    assert run(["cache", "mar-digits", data, *TINY, "--out", f"cache-{ODD}"]) == 0
    cached = build_data({"kind": "latents", "path": f"cache-{ODD}"})
    assert cached.count == 12 and cached.name(4) == f"{ODD}/{ODD}0.png"
    assert seriatim.load(f"run-{ODD}").class_names == recorded["classes"]
    assert run(["sample", f"run-{ODD}", "--label", f"nope{ODD}\n"]) == 2
    said = capfd.readouterr()
    assert "\x1b" not in said.err and "bug" not in said.err
    assert said.err.splitlines()[-1].startswith("error: class_labels: ")


def test_yaml_keeps_what_it_would_refuse() -> None:
    assert parse_yaml(f"{{a: [{ODD}, 1], b: {{{ODD}: null}}}}") == {"a": [ODD, 1], "b": {ODD: None}}
    assert parse_yaml("3") == 3 and parse_yaml("\U000fdce9") == "\U000fdce9"
    recipe = read_recipe("mar-small", [f"data.path={ODD}", f"training.init_from={ODD}"])
    assert recipe.data["path"] == recipe.training.init_from == ODD
    assert dump(recipe).encode()
