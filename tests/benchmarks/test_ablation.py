"""The cells, tiny: trained, judged, stopped, resumed, reported; what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_picture
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ablation
import ablation_cifar
import known_density
from ablation_cells import CELLS, COMPARED
from ablation_tables import Pictures, less, with_interval

from seriatim.checkpoints.native import load_bundle
from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.core.errors import NumericsError
from seriatim.core.progress import Progress
from seriatim.evaluation.residual_net import ResNet, TrainedClassifier, save_classifier
from seriatim.models.build import seeded

TINY = ["--images", "64", "--seconds", "0.01", "--samples", "16", "--guidance", "1.5", "--side", "8", "--codes", "8",
        "--width", "16", "--depth", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options: class folders of images of 8x8, and a classifier that was never trained."""
    root, g = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for part, count in (("train", 24), ("test", 12)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = (torch.rand(8, 8, 3, generator=g) * 150 + 100 * label).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{i}.png")
    with seeded(0):
        net = ResNet(2, widths=[4], depth=[0]).eval()
    save_classifier(TrainedClassifier(net, "small", (8, 8), ["cat", "dog"], {}, {}), root / "classifier")
    return ["--data", str(root / "train"), "--real-data", str(root / "test"), "--classifier", str(root / "classifier")]


def test_the_cells_are_those_of_the_paper() -> None:
    assert len(CELLS) == 8 and len({cell.training for cell in CELLS.values()}) == 6
    assert {CELLS[name].steps(64) for name in CELLS if name.startswith("several")} == {16}
    assert len(set(COMPARED)) == 10 and ("masked-diffusion", "masked-ce") in COMPARED
    assert ("several-ce", "masked-ce") in COMPARED and ("random-ce", "raster-ce") in COMPARED


def test_pictures_end_to_end(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--tasks", "cifar", "--cells", "masked-ce", "several-ce", "--out", str(tmp_path), *folders, *TINY]
    assert ablation.main(command) == 0
    said = capsys.readouterr().out
    assert "1/1 cifar, masked-ce, seed 0" in said, "both cells are of one training"
    assert "at this budget: 64 images, one seed; guidance 1.5, 16 samples" in said
    assert "several-ce less masked-ce" in said and "these as codes, decoded" in said and "FD[small]" in said
    assert (tmp_path / "tables.md").read_text().strip() == said[said.index("**CIFAR") :].strip()
    width, height = read_picture(tmp_path / "cifar-images-1.5.png").size
    assert width > 1000 and height > 100
    row = json.loads((tmp_path / "cifar" / "several-ce-0-images-1.5.json").read_text())
    assert row["images"] == 64 and row["updates"] == 2 and row["settings"]["sampling"] == {"num_inference_steps": 1}

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cifar").rglob("*") if path.is_file()}
    (tmp_path / "cifar" / "several-ce-0-images-1.5.json").unlink()
    assert ablation.main(command) == 0  # sampled again, not trained
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {path.relative_to(tmp_path / "cifar").parts[0] for path in before if before[path] != after[path]}
    assert changed <= {"several-ce-0-images-1.5.json", "pictures", "judged"}
    assert ablation.main([*command, "--width", "32"]) == 3
    assert "was made with width 16, not 32; choose another folder" in capsys.readouterr().err


def test_a_training_goes_on_where_it_was_stopped(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(name: str) -> Any:
        options = ["--tasks", "cifar", "--out", str(tmp_path / name), *folders, *TINY, "--images", "160"]
        a = ablation.arguments(options)  # five updates
        task = ablation.task_of(a)
        ablation_cifar.prepare(task)
        return ablation_cifar.CifarWork(task, "random-diffusion", 0, ())

    whole, stopped = work("whole"), work("stopped")
    monkeypatch.setattr(ablation_cifar, "SAVE_SECONDS", 0.0)
    ablation_cifar.train(whole, ["images"])
    advance, calls = Progress.advance, iter(range(100))

    def interrupted(self: Progress, count: int = 1, note: str = "") -> None:
        if self.what.startswith("training") and next(calls) == 3:
            raise KeyboardInterrupt
        advance(self, count, note)

    monkeypatch.setattr(Progress, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablation_cifar.train(stopped, ["images"])
    assert [p.name for p in all_checkpoints(stopped.folder / "checkpoints")] == [f"{96:012d}"]
    ablation_cifar.train(stopped, ["images"])
    assert not (stopped.folder / "checkpoints").exists()
    ours, theirs = (load_bundle(each.folder / "images") for each in (whole, stopped))
    assert ours.sha256 == theirs.sha256, "bitwise"
    assert ours.provenance["images"] == theirs.provenance["images"] == 160


def test_known_density_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_density, "TRUTH", 300)
    monkeypatch.setattr(ablation.ablation_known, "CODES", 8)
    command = ["--tasks", "known", "--processes", "mixture", "--cells", "masked-diffusion", "several-diffusion",
               "--seeds", "0", "1", "--known-images", "48", "--known-seconds", "0.001", "--known-samples", "12",
               "--out", str(tmp_path)]  # fmt: skip
    assert ablation.main(command) == 0
    said = capsys.readouterr().out
    assert "2/2 mixture, masked-diffusion, seed 1" in said and "at this budget: 48 images, 2 seeds" in said
    assert "several-diffusion less masked-diffusion" in said and "| truth-codes8 |" in said
    assert (tmp_path / "known.png").exists()
    assert ablation.main(command) == 0
    assert "1/" not in capsys.readouterr().out, "nothing is done again"
    assert ablation.main([*command, "--report"]) == 0
    assert ablation.main([*command, "--known-images", "96"]) == 3


def test_one_that_fails_stops_no_other(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any) -> None:
        if self.seed == 0:
            raise NumericsError("the loss is not finite")

    monkeypatch.setattr(ablation.KnownWork, "run", run)
    works = [ablation.KnownWork("mixture", "raster-ce", seed, (), 1, 1.0, 8, Path()) for seed in (0, 1)]
    assert ablation.carry_out(works, 1) == ["mixture, raster-ce, seed 0: the loss is not finite"]
    assert "2/2 mixture, raster-ce, seed 1" in capsys.readouterr().out


def row(value: float, error: float, seed: int = 0, name: str = "a") -> dict[str, Any]:
    scores: dict[str, Any] = {"scores": {"FD": value}, "errors": {"FD": error}}
    return {**scores, "seed": seed, "name": name, "budget": "images", "guidance": 1.0}


def test_ten_groups_have_nine_degrees_of_freedom() -> None:
    a, b = row(5.0, 0.3), row(7.0, 0.4)
    assert with_interval([a], "FD") == (5.0, pytest.approx(2.262157 * 0.3))
    found = less(with_interval([a], "FD"), with_interval([b], "FD"))
    assert found is not None and found[0] == -2.0 and found[1] == pytest.approx(2.262157 * 0.5)
    assert with_interval([a], "KD") is None and less(None, found) is None


def test_several_seeds_count_by_the_variance_between_them() -> None:
    """However sure each is of itself. Differences are taken seed by seed, as those of the known densities."""
    rows = [row(5.0, 0.01, 0), row(7.0, 0.01, 1), row(9.0, 0.01, 2)]
    others = [row(6.0, 0.01, 0, "b"), row(8.1, 0.01, 1, "b"), row(10.2, 0.01, 2, "b")]
    mean = with_interval(rows, "FD")
    assert mean is not None and mean[0] == 7.0 and mean[1] == pytest.approx(4.302653 * 2 / 3**0.5)
    found = Pictures([*rows, *others]).difference("b", "a", "images", 1.0, "FD")
    half = 4.302653 * 0.1 / 3**0.5
    assert found is not None and found[0] == pytest.approx(1.1) and found[1] == pytest.approx(half)
    alone = Pictures([rows[0], *others]).difference("b", "a", "images", 1.0, "FD")
    assert alone is not None and alone[1] is not None and alone[1] > half


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "cifr"], "tasks: 'cifr' is not known; did you mean 'cifar'?"),
        (["--cells", "raster-cd"], "cells: 'raster-cd' is not known; did you mean 'raster-ce'?"),
        (["--tasks", "cifar"], "data: is missing, the task cifar needs a folder; or give --tasks known"),
        (["--tasks", "cifar", "--data", "nowhere"], "data: nowhere is not a folder"),
        (["--tasks", "known", "--known-samples", "3"], "known-samples: 3 is not allowed; it must be at least 8"),
        (["--tasks", "known", "--seconds", "nan"], "seconds: nan is not allowed; it must be above 0"),
        (["--tasks", "known", "--side", "30"], "side: 30 is not allowed; it must be a multiple of 4"),
        (["--tasks", "known", "--report", "--out", "nowhere"], "out: nowhere has no results of these"),
    ],
)
def test_what_is_refused(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablation.main(options) in (2, 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
