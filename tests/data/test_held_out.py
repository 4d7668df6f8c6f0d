"""Which images are held out is decided by their names or contents alone, and nobody trains on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from seriatim.core.errors import ConfigError, DataError
from seriatim.data.base import ImageData
from seriatim.data.caching import write_cache
from seriatim.data.held_out import build_divided, held_out
from seriatim.data.sources import build_data
from seriatim.training import setup
from seriatim.training.config import read_recipe


def pictures(folder: Path, classes: dict[str, range], side: int = 8) -> Path:
    for name, numbers in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in numbers:
            pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pets", {"cat": range(60), "dog": range(60, 120)})


def config(path: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "folder", "path": str(path), "size": 8, **more}


def names(data: ImageData | None) -> set[str]:
    assert data is not None
    return {data.name(i) for i in range(data.count)}


def test_a_share_is_held_out_and_the_rest_trained_on(folder: Path) -> None:
    data = build_divided(config(folder, validation=0.2))
    whole = build_data(config(folder))
    assert data.held_out is not None and 10 <= data.held_out.count <= 40
    assert names(data) | names(data.held_out) == names(whole) and not names(data) & names(data.held_out)
    for part in (data, data.held_out):
        index = torch.arange(part.count)
        places = torch.tensor([sorted(names(whole)).index(part.name(i)) for i in range(part.count)])
        assert torch.equal(part.images(index), whole.images(places))
        labels, wanted = part.labels(index), whole.labels(places)
        assert labels is not None and wanted is not None and torch.equal(labels, wanted)
        assert part.class_names == ["cat", "dog"] and part.flips
        chosen = index % 2 == 0
        assert torch.equal(part.mirrored(index, chosen), whole.mirrored(places, chosen))


def test_other_images_change_nothing_for_these(folder: Path, tmp_path: Path) -> None:
    """More images, another order and another place: the same are held out."""
    first = names(build_divided(config(folder, validation=0.2)).held_out)
    pictures(folder, {"ant": range(200, 240), "cat": range(300, 340)})
    moved = shutil.copytree(folder, tmp_path / "moved")
    again = names(build_divided(config(moved, validation=0.2)).held_out)
    assert {name for name in again if name in names(build_data(config(folder)))} == again
    assert first == {name for name in again if int(Path(name).stem) < 120}
    larger = names(build_divided(config(moved, validation=0.4)).held_out)
    assert again < larger, "a larger share holds out more, and all that a smaller one does"


class Shuffled(ImageData):
    """Images without names, in an order of one's own."""

    def __init__(self, order: torch.Tensor) -> None:
        self.order, self.count, self.size, self.channels, self.class_names = order, len(order), (4, 4), 1, []

    def images(self, index: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.full((1, 4, 4), int(i), dtype=torch.uint8) for i in self.order[index]])


def test_without_names_contents_decide() -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    plain, mixed = held_out(Shuffled(torch.arange(200)), 0.3), held_out(Shuffled(order), 0.3)
    assert torch.equal(plain[order], mixed) and 30 < int(plain.sum()) < 90


def test_the_share_is_about_what_was_asked_for() -> None:
    data = Shuffled(torch.arange(20_000))
    data.named = True
    for share in (0.05, 0.5):
        assert abs(int(held_out(data, share).sum()) / 20_000 - share) < 0.01


def test_a_cache_holds_out_the_same_images(folder: Path, tmp_path: Path) -> None:
    words = [f"data.path={folder}", "data.size=8", "model.width=32", "sampling.num_inference_steps=4"]
    data, tokenizer = setup.build_inputs(read_recipe("mar-cifar10-tiny", words))
    write_cache(data, tokenizer, tmp_path / "cache", quiet=True)
    cached = build_divided({"kind": "latents", "path": str(tmp_path / "cache"), "validation": 0.2})
    assert names(cached.held_out) == names(build_divided(config(folder, validation=0.2)).held_out)
    assert cached.cached and cached.held_out is not None and cached.held_out.cached


def test_another_folder(folder: Path, tmp_path: Path) -> None:
    """Its classes are matched by name, and it may have only some of them."""
    other = pictures(tmp_path / "other", {"dog": range(500, 505)})
    data = build_divided(config(folder, validation=str(other)))
    assert data.count == 120 and data.held_out is not None and data.held_out.count == 5
    labels = data.held_out.labels(torch.arange(5))
    assert labels is not None and labels.tolist() == [1] * 5
    plain = build_data(config(folder))
    assert data.fingerprint() == plain.fingerprint(), "what is trained on is the same"


def test_arrays_and_digits(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).standard_normal((50, 6, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", tokens)
    np.save(tmp_path / "b.npy", tokens[::-1])
    divided = [build_divided({"kind": "arrays", "path": str(tmp_path / f"{x}.npy"), "validation": 0.3}) for x in "ab"]
    held = [part.held_out.images(torch.arange(part.held_out.count)) for part in divided if part.held_out is not None]
    assert torch.equal(held[0], held[1].flip(0)), "the order of rows does not matter"
    digits = build_divided({"kind": "digits", "validation": 0.1})
    assert digits.held_out is not None and digits.count + digits.held_out.count == 1437


def saved(path: Path, array: Any) -> str:
    np.save(path, array)
    return str(path)


def rows(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 6, 3)).astype(np.float32)


def test_labels_of_other_arrays_are_their_own(tmp_path: Path) -> None:
    """The labels in a file of their own belong to the rows of data.path, even if there are as many other rows."""
    more = {"kind": "arrays", "path": saved(tmp_path / "t.npy", rows(30, 0))}
    other = saved(tmp_path / "v.npy", rows(30, 1))
    unlabelled = build_divided({**more, "validation": other}).held_out
    assert unlabelled is not None and unlabelled.labels(torch.arange(30)) is None
    more["labels"] = saved(tmp_path / "labels.npy", np.arange(30) % 3)
    with pytest.raises(DataError, match=r"data\.validation: .*v\.npy has no labels, .*; give a share, such as 0\.05"):
        build_divided({**more, "validation": other})
    own = tmp_path / "v.safetensors"
    save_file({"tokens": torch.from_numpy(rows(5, 1)), "labels": torch.tensor([2, 0, 1, 2, 2])}, own)
    held = build_divided({**more, "validation": str(own)}).held_out
    labels = None if held is None else held.labels(torch.arange(5))
    assert labels is not None and labels.tolist() == [2, 0, 1, 2, 2]


def test_images_of_both_folders_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever their names: a few are said, and if most are trained on, the figure would be one of training."""
    other = pictures(tmp_path / "other", {"dog": range(500, 510)})
    build_divided(config(folder, validation=str(other)))
    assert "images of data.path too" not in capsys.readouterr().err
    for i in range(5):
        shutil.copy(folder / "cat" / f"{i:03d}.png", other / "dog" / f"renamed{i}.png")
    data = build_divided(config(folder, validation=str(other)))
    assert data.held_out is not None and data.held_out.count == 15
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data.validation: ")]
    assert len(said) == 1 and f"5 of 15 images in {other} are images of data.path too" in said[0]
    nearly = shutil.copytree(folder, tmp_path / "nearly")
    (nearly / "cat" / "000.png").unlink()
    for check in (True, False):
        with pytest.raises(DataError, match=r"data\.validation: 119 of 119 images in .*nearly .*; name images that"):
            build_divided(config(folder, check=check, validation=str(nearly)))


def test_rows_of_both_arrays_are_counted(tmp_path: Path) -> None:
    path, tokens = saved(tmp_path / "t.npy", rows(30, 0)), rows(30, 0)[5:]
    with pytest.raises(DataError, match=r"data\.validation: 25 of 25 images in .*v\.npy are images of data\.path too"):
        build_divided({"kind": "arrays", "path": path, "validation": saved(tmp_path / "v.npy", tokens)})
    codes = np.arange(40).reshape(20, 2) % 4  # rows of a few codes are equal by chance
    path = saved(tmp_path / "codes.npy", codes)
    build_divided({"kind": "arrays", "path": path, "validation": saved(tmp_path / "others.npy", codes[:9])})


def test_a_class_without_images_to_train_on_is_refused(tmp_path: Path) -> None:
    """A share of which all images of a class are held out would leave a class that the model never sees."""
    many = pictures(tmp_path / "few", {"cat": range(40)})
    lone = {f"rare{i}": range(100 + i, 101 + i) for i in range(9)}
    pictures(many, lone)
    with pytest.raises(DataError, match=r"share of 0\.6 holds out all images of \d of 10 classes \(.rare.*; give"):
        build_divided(config(many, validation=0.6))
    data = build_divided(config(many, validation=0.01))
    labels = data.labels(torch.arange(data.count))
    assert labels is not None and set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("value", [0, 1, 1.0, 0.0, -0.1, 1.5, True, [0.1], float("nan"), {"share": 0.1}])
def test_shares_that_are_none(folder: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation: .* is not allowed; give a share between 0 and 1"):
        build_divided(config(folder, validation=value))


def test_what_can_not_be_held_out_is_one_line(folder: Path, tmp_path: Path) -> None:
    few = pictures(tmp_path / "few", {"cat": range(3)})
    with pytest.raises(DataError, match=r"data\.validation: a share of 1e-06 holds out 0 of 3 images, and leaves 3;"):
        build_divided(config(few, validation=1e-6))
    with pytest.raises(DataError, match="holds out 3 of 3 images, and leaves 0; give a smaller share"):
        build_divided(config(few, validation=0.999999))
    with pytest.raises(DataError, match=r"data\.validation: .*nowhere is not a folder"):
        build_divided(config(folder, validation=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"data\.validation: .* holds the images of data\.path"):
        build_divided(config(folder, validation=str(folder)))
    with pytest.raises(ConfigError, match=r"data\.validation: data of kind 'digits' has no path; give a share"):
        build_divided({"kind": "digits", "validation": "photos"})
    with pytest.raises(DataError, match=r"data\.validation: class 'cow' is none of those of data\.path"):
        build_divided(config(folder, validation=str(pictures(tmp_path / "cows", {"cow": range(2)}))))
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(folder / "cat" / "000.png", flat)
    with pytest.raises(DataError, match=r"data\.validation: has no classes, those of data\.path have"):
        build_divided(config(folder, validation=str(flat)))
