"""Sources that Hugging Face `datasets` loads: folders, parquet, WebDataset tars; the same care as with files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seriatim.core.errors import DataError, UsageError
from seriatim.data.base import Position
from seriatim.data.held_out import build_divided
from seriatim.data.hub_datasets import HuggingFaceStream
from seriatim.data.sources import build_data
from seriatim.training.config import read_recipe
from seriatim.training.loop import train

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("default")  # the library's own warnings are not ours


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries: there is no network in tests
    datasets.disable_progress_bars()


def picture(seed: int, size: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels(seed: int) -> torch.Tensor:
    with Image.open(io.BytesIO(picture(seed))) as image:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def image_folder(root: Path) -> dict[str, Any]:
    for i in range(6):
        path = root / "data" / ("cat" if i < 3 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return {"path": "imagefolder", "data_dir": str(root / "data")}


def parquet(root: Path) -> dict[str, Any]:
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"picture": [{"bytes": picture(i), "path": None} for i in range(6)], "label": [0, 0, 0, 1, 1, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(root / "data.parquet"))
    return {"path": "parquet", "data_files": str(root / "data.parquet")}


def webdataset(root: Path) -> dict[str, Any]:
    with tarfile.open(root / "data.tar", "w") as tar:
        for i in range(6):
            for name, data in ((f"{i:04d}.png", picture(i)), (f"{i:04d}.cls", str(i // 3).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {"path": "webdataset", "data_files": str(root / "data.tar")}


@pytest.mark.parametrize("check", [True, False])
def test_validation_images_that_are_trained_on_are_found(tmp_path: Path, check: bool) -> None:
    """By the sha256 of each image, so that another name or place hides nothing."""
    train, other = (Path(image_folder(tmp_path / name)["data_dir"]) for name in ("a", "b"))
    (other / "cat" / "0.png").write_bytes(picture(50))
    with pytest.raises(DataError, match=r"data\.validation: 5 of 6 images in .* are images of data\.path too"):
        build_divided({"kind": "hf", "size": 8, "path": str(train), "check": check, "validation": str(other)})


@pytest.mark.parametrize(
    ("make", "names"), [(image_folder, ["cat", "dog"]), (parquet, ["cat", "dog"]), (webdataset, ["0", "1"])]
)
def test_images_and_classes(tmp_path: Path, make: Any, names: list[str]) -> None:
    data = build_data({"kind": "hf", "size": 8, **make(tmp_path)})
    assert data.count == 6 and data.class_names == names
    index = torch.tensor([5, 0, 3])
    assert torch.equal(data.images(index), torch.stack([pixels(5), pixels(0), pixels(3)]))
    labels = data.labels(index)
    assert labels is not None and labels.tolist() == [1, 0, 1]


def test_a_bad_row_is_left_out(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": picture(i) if i != 1 else b"no image", "path": None} for i in range(4)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data.parquet"))
    where = {"kind": "hf", "path": "parquet", "data_files": str(tmp_path / "data.parquet"), "size": 8}
    data = build_data({**where, "max_bad": 0.5})
    assert data.count == 3 and list(data.bad) == ["row 1"] and data.class_names == []
    assert torch.equal(data.images(torch.tensor([1]))[0], pixels(2))
    with pytest.raises(DataError, match="1 of 4 files can't be used"):
        build_data(where)


def labelled(root: Path, labels: list[Any], feature: Any) -> dict[str, Any]:
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(root / "data.parquet"))
    return {"path": "parquet", "data_files": str(root / "data.parquet"), "size": 8}


def test_rows_without_a_class(tmp_path: Path) -> None:
    """-1 and nothing at all are how data sets say it; such images train without a class, read at once or streamed."""
    named = labelled(tmp_path, [0, -1, None, 1], datasets.ClassLabel(names=["cat", "dog"]))
    labels = build_data({"kind": "hf", **named}).labels(torch.arange(4))
    assert labels is not None and labels.tolist() == [0, -1, -1, 1]
    streamed = build_data({"kind": "hf-stream", "buffer": 1, **named})
    assert isinstance(streamed, HuggingFaceStream)
    rows = streamed.rows(0, Position())
    assert sorted(next(rows).label for _ in range(4)) == [-1, -1, 0, 1]
    text = build_data({"kind": "hf", **labelled(tmp_path, ["b", None, "a"], datasets.Value("string"))})
    labels = text.labels(torch.arange(3))
    assert text.class_names == ["a", "b"] and labels is not None and labels.tolist() == [1, -1, 0]
    with pytest.raises(UsageError, match=r"label: column 'label' has \[1, 2\] in row 0"):
        build_data({"kind": "hf", **labelled(tmp_path, [[1, 2]], datasets.Sequence(datasets.Value("int64")))})


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    where = {"kind": "hf", "size": 8, **image_folder(tmp_path)}
    with pytest.raises(DataError, match=r"data\.path: 'imagefolder' can't be loaded"):
        build_data({**where, "split": "nosuch"})
    with pytest.raises(UsageError, match="'lable' is not a column; did you mean 'label'"):
        build_data({**where, "label": "lable"})
    with pytest.raises(UsageError, match="'img' is not a column of images"):
        build_data({**where, "image": "img"})
    with pytest.raises(DataError, match="can't be loaded"):
        build_data({"kind": "hf", "path": "nobody/nothing-at-all"})


def test_it_trains_with_tensorboard(tmp_path: Path) -> None:
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    where = image_folder(tmp_path)
    settings = [f"data={{kind: hf, size: 8, path: {where['path']}, data_dir: {where['data_dir']}}}", "model.width=32"]
    settings += ["training.images=64", "training.log_images=32", "training.batch_size=16", "training.tensorboard=true"]
    train(
        read_recipe("mar-cifar10-tiny", [*settings, "training.sample_images=0", "sampling.num_inference_steps=4"]),
        tmp_path / "run",
        quiet=True,
    )
    events = board.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [32, 64]
    assert {"loss_mse", "loss_vb", "learning_rate", "images_per_second"} <= set(events.Tags()["scalars"])
