"""The loss of fixed recipes is what it was, step by step, and a run of release 0.1 goes on from where it was.

The figures are hexadecimal floats. On the machine that wrote them they are the same to the last bit; elsewhere sums are
made in another order, and they agree within a tolerance. `python tests/training/test_golden_loss.py` writes them anew,
which is right only after a change that is meant to change what training computes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import metrics
from safetensors.torch import load_file

import seriatim
from seriatim.training.config import read_recipe
from seriatim.training.loop import train

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RELEASE = FIXTURES / "release-0.1"
GOLDEN = FIXTURES / "losses.json"
TOLERANCE = 1e-4  # relative, after twenty updates on another processor; a wrong formula is off by far more

SMALL = [
    "model.width=16", "model.depth=1", "model.heads=2", "model.dropout=0.1", "training.batch_size=16",
    "training.log_images=16", "training.dtype=float32", "training.threads=1", "training.warmup_images=64",
    "training.images=320", "training.save_images=0",
]  # fmt: skip
RECIPES = {
    "mar-digits": [*SMALL, "model.head.width=16", "model.head.depth=1", "training.accumulate=2"],
    "gpt-digits": SMALL,
}


def machine() -> str:
    """Torch and what the processor says of itself: where it is the same, so is every bit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "cache size")
    says = sorted({line for line in lines if line.split("\t")[0].strip() in wanted})
    return hashlib.sha256("\n".join([torch.__version__, *says]).encode()).hexdigest()[:16]


def losses(name: str, folder: Path) -> list[float]:
    train(read_recipe(name, RECIPES[name]), folder, device="cpu", quiet=True)
    return [row["loss"] for row in metrics(folder)]


def compare(found: list[float], wanted: list[str], where: str) -> None:
    expected = [float.fromhex(text) for text in wanted]
    assert len(found) == len(expected)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        same = ours == theirs if where == machine() else math.isclose(ours, theirs, rel_tol=TOLERANCE)
        assert same, f"step {step}: {ours.hex()}, it was {theirs.hex()}"


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_is_what_it_was(name: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    compare(losses(name, tmp_path), golden["losses"][name], golden["machine"])


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """A momentum that is a little smaller is noticed, even within the tolerance of another processor."""
    golden = json.loads(GOLDEN.read_text())
    recipe = read_recipe("gpt-digits", [*RECIPES["gpt-digits"], "training.betas=[0.85, 0.95]"])
    train(recipe, tmp_path, device="cpu", quiet=True)
    with pytest.raises(AssertionError, match=r"it was 0x1\."):
        compare([row["loss"] for row in metrics(tmp_path)], golden["losses"]["gpt-digits"], "another")


def resumed(folder: Path) -> list[float]:
    """The run of release 0.1 goes on in a copy: the losses of the four updates that follow."""
    shutil.copytree(RELEASE / "run", folder)
    before = metrics(folder)
    result = train(read_recipe(str(folder / "recipe.yaml")), folder, device="cpu", resume=True, quiet=True)
    assert result.images == 128 and metrics(folder)[:4] == before
    return [row["loss"] for row in metrics(folder)[4:]]


def test_a_run_of_release_0_1_goes_on(tmp_path: Path) -> None:
    """Its checkpoint after 64 images is read. What it drew is drawn otherwise since, so the losses are today's."""
    golden = json.loads(GOLDEN.read_text())
    compare(resumed(tmp_path / "run"), golden["release 0.1 resumed"], golden["machine"])


def test_a_model_of_release_0_1_is_loaded_and_draws() -> None:
    pipe = seriatim.load(RELEASE / "model", device="cpu")
    weights = load_file(RELEASE / "model" / "model.safetensors")
    assert torch.equal(pipe.bundle.model.conditioner.get_parameter("class_embedding"), weights["class_embedding"])
    result = pipe(class_labels=["3"], seed=0, num_inference_steps=2, num_diffusion_steps=4, output_type="pt")
    assert result.images.shape == (1, 1, 8, 8) and result.images.isfinite().all()


def write() -> None:
    """Write the losses of today."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: [x.hex() for x in losses(name, Path(folder) / name)] for name in RECIPES}
        after = [x.hex() for x in resumed(Path(folder) / "run")]
    golden = {"machine": machine(), "losses": found, "release 0.1 resumed": after}
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")


if __name__ == "__main__":
    write()
