"""What several processes share at the start of a run: the check of the images, initial weights, frozen parameters."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import command, together
from safetensors.torch import load_file

from seriatim.checkpoints.unfinished import all_checkpoints
from seriatim.data import folder as folder_module

pytestmark = pytest.mark.fresh_process

TRAIN = [
    "train", "mar-digits", "model.width=16", "model.depth=2", "model.heads=2", "model.head.width=16",
    "model.head.depth=1", "model.dropout=0", "training.images=48", "training.batch_size=8", "training.log_images=16",
    "training.save_images=16", "training.sample_images=0", "training.dtype=float32", "training.threads=1",
]  # fmt: skip


def photos(folder: Path) -> Path:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), (i * 9, i, 99 if label == "cat" else 20)).save(folder / label / f"{i}.png")
    (folder / "dog" / "broken.png").write_bytes(b"no picture")
    return folder


def counted(notes: Path, *words: str) -> tuple[int, list[str]]:
    """Run a command and note each file that is hashed or decoded for the check of the images."""
    true = folder_module.sha256

    def noted(path: Path | str) -> str:
        with open(notes, "a", encoding="utf-8") as file:
            file.write(Path(path).name + "\n")
        return true(path)

    folder_module.sha256 = noted
    return command(*words)


def test_images_are_checked_once_for_all_processes(tmp_path: Path) -> None:
    data = [f"data={{kind: folder, path: {photos(tmp_path / 'photos')}, size: 16, max_bad: 0.5}}", "tokenizer.patch=4"]
    words = [*TRAIN, *data, "--out", str(tmp_path / "run")]
    found = together(2, partial(counted, tmp_path / "hashed", *words), tmp_path / "found")
    assert [code for code, _ in found] == [0, 0], found
    assert len((tmp_path / "hashed").read_text().split()) == 17
    said = [line for _, lines in found for line in lines if "broken" in line or "left out" in line]
    assert len(said) == 1, said
    assert list(json.loads((tmp_path / "run" / "data.json").read_text())["left_out"]) == ["dog/broken.png"]
    resumed = ["training.images=64", "--resume"]
    found = together(2, partial(counted, tmp_path / "again", *words, *resumed), tmp_path / "resumed")
    assert [code for code, _ in found] == [0, 0] and not (tmp_path / "again").exists()
    (tmp_path / "photos" / "cat" / "1.png").write_bytes((tmp_path / "photos" / "cat" / "2.png").read_bytes())
    found = together(2, lambda: command(*words, "training.images=80", "--resume"), tmp_path / "refused")
    assert [code for code, _ in found] == [3, 3]
    assert len([line for _, lines in found for line in lines if "contents of files differ" in line]) == 1


def test_frozen_initial_weights_and_trackers(tmp_path: Path) -> None:
    """Two processes that begin with another model's weights, of which some are frozen, train as one alone."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = [*TRAIN, "seed=5", "training.images=8", "--out", str(tmp_path / "first")]
    assert together(1, lambda: command(*first), tmp_path / "0")[0][0] == 0
    words = [*TRAIN, f"training.init_from={tmp_path / 'first'}", "training.freeze=['backbone.encoder*', '*.bias']",
             "training.trackers=[tensorboard]"]  # fmt: skip
    assert together(1, lambda: command(*words, "--out", str(tmp_path / "alone")), tmp_path / "1")[0][0] == 0
    run = [*words, "--out", str(tmp_path / "run")]
    for more in (["training.images=32"], ["training.shard=true", "--resume"]):
        found = together(2, partial(command, *run, *more), tmp_path / more[0])
        assert [code for code, _ in found] == [0, 0], found
    before = load_file(tmp_path / "first" / "model" / "model.safetensors")
    ends = [all_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("alone", "run")]
    one, other = (load_file(path / "model.safetensors") for path in ends)
    moments = [load_file(path / "optimiser.safetensors").keys() for path in ends]
    assert moments[0] == moments[1] and not any(".bias" in name for name in moments[1])
    frozen = [name for name in before if name.startswith("backbone.encoder") or name.endswith(".bias")]
    assert frozen and all(torch.equal(other[name], before[name]) for name in frozen)
    for name, tensor in one.items():
        assert float((tensor - other[name]).norm()) <= 1e-4 * float(tensor.norm()) + 1e-7, name
    assert any(not torch.equal(other[name], before[name]) for name in before)
    files = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(files) == 2  # one of each start, none of the other process
    points = accumulator.EventAccumulator(str(files[0].parent)).Reload().Scalars("loss")
    assert [point.step for point in points] == [16, 32, 48]


def test_what_is_wrong_is_one_line_from_all(tmp_path: Path) -> None:
    for number, setting in enumerate(
        ("training.init_from=nowhere/at/all", "training.freeze=[nothing.*]", "training.trackers=[wonder]")
    ):
        found = together(2, partial(command, *TRAIN, setting, "--out", str(tmp_path / "run")), tmp_path / str(number))
        assert {code for code, _ in found} <= {2, 4} and len({code for code, _ in found}) == 1
        said = [line for _, lines in found for line in lines]
        assert len(said) == 1 and (setting.split("=")[0] in said[0] or "nowhere/at/all" in said[0]), said
        assert not (tmp_path / "run").exists()
