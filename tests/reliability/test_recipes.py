"""Mistakes in a recipe are named before anything is done (row 30 of the page)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from faults import TRAIN, command, inside

ROOT = Path(__file__).resolve().parents[2]

# What is wrong in `seriatim train mar-digits`, and what the one line must hold.
OWN = {  # keys of the recipe itself: no part of a model is built, and torch is not imported
    "training.imgaes=5": "did you mean 'images'",
    "trainng.images=5": "did you mean 'training'",
    "training.images=lots": "training.images",
    "training.images=-1": "training.images",
    "training.images=1.5": "training.images",
    "training.batch_size=0": "training.batch_size",
    "training.learning_rate=.inf": "training.learning_rate",
    "training.betas=[0.9]": "training.betas",
    "training.dtype=float8": "training.dtype",
    "training.on_blow_up=explode": "training.on_blow_up",
    "training.keep=none": "training.keep",
    "training=5": "training",
    "seed=-1": "seed",
    "name=../elsewhere": "name",
}
PARTS = {
    "model.dpeth=1": "did you mean 'depth'",
    "model.kind=maskd": "did you mean 'masked'",
    "model.heads=7": "heads",
    "model.head.kind=difusion": "did you mean 'diffusion'",
    "model.head.width=wide": "model.head.width",
    "tokenizer.patch=0": "tokenizer.patch",
    "data.kind=digts": "did you mean 'digits'",
    "data.held_uot=true": "did you mean 'held_out'",
    "sampling.guidance_scal=2": "did you mean 'guidance_scale'",
    "sampling.num_inference_steps=0": "num_inference_steps",
}


@pytest.mark.parametrize("mistake", [*OWN, *PARTS])
def test_a_mistake_is_one_line_that_names_it(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with inside(tmp_path):
        code, lines = command(["train", "mar-digits", *TRAIN, mistake, "--out", "run"], capsys)
    words = {**OWN, **PARTS}[mistake]
    assert code == 2 and len(lines) == 1 and words in lines[0], (code, lines)
    assert not list(tmp_path.iterdir()), "nothing was begun"


ALL_OWN = """
import sys
from seriatim.cli.main import run
codes = [run(["train", "mar-digits", mistake, "--out", "run"]) for mistake in sys.argv[1:]]
print(set(codes), [name for name in ("torch", "diffusers", "matplotlib", "sklearn") if name in sys.modules])
"""


def test_mistakes_of_a_recipe_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    command_line = [sys.executable, "-c", ALL_OWN, *OWN]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "{2} []\n" and len(done.stderr.splitlines()) == len(OWN), done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
