"""Data sets read as they come: the same images, an order that resumes, rows that can't be used."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data.test_hub_datasets import image_folder, parquet, picture, pixels, webdataset
from helpers import signal_in_step
from torch import Tensor
from training.test_resume import weights

from seriatim.core.errors import ConfigError, DataError, Stopped, UsageError
from seriatim.data.base import Position
from seriatim.data.hub_datasets import HuggingFaceStream
from seriatim.data.loader import Batch, Loader, StreamBatches, batches_of
from seriatim.data.sources import build_data
from seriatim.training.config import Recipe, read_recipe
from seriatim.training.loop import train

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("default")  # the library's own warnings are not ours


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after each pass over parquet
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries: there is no network in tests
    datasets.disable_progress_bars()


def numbered(root: Path, rows: int, bad: tuple[int, ...] = ()) -> HuggingFaceStream:
    """A parquet file of `rows` pictures in two classes, streamed; rows in `bad` are no pictures."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": b"no image" if i in bad else picture(i), "path": None} for i in range(rows)]
    table = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(rows)]}, features=features)
    table.to_parquet(str(root / "rows.parquet"))
    return HuggingFaceStream("parquet", 8, data_files=str(root / "rows.parquet"), buffer=7, flip=False, max_bad=0.5)


def key(image: Tensor) -> bytes:
    return image.numpy().tobytes()


@pytest.mark.parametrize(
    ("make", "extra"), [(image_folder, {}), (parquet, {}), (webdataset, {"classes": ["cat", "dog"]})]
)
def test_a_pass_holds_every_image_once_with_its_class(tmp_path: Path, make: Any, extra: dict[str, Any]) -> None:
    data = build_data({"kind": "hf-stream", "size": 8, "flip": False, **make(tmp_path), **extra})
    assert data.class_names == ["cat", "dog"]
    batches = list(Loader(batches_of(data, 0, 0, 12, 4), 0))
    images, labels = (
        torch.cat([b.images for b in batches]),
        torch.cat([b.labels for b in batches if b.labels is not None]),
    )
    expected = {key(pixels(i)): i // 3 for i in range(6)}
    for half in (slice(0, 6), slice(6, 12)):
        drawn = {key(image): int(label) for image, label in zip(images[half], labels[half], strict=True)}
        assert drawn == expected
    assert batches[-1].after == Position(1, 6)
    assert sum(len(part) for part in data.some(100, 4)) == 6


def test_the_order_depends_on_seed_and_pass(tmp_path: Path) -> None:
    data = numbered(tmp_path, 30)

    def order(seed: int, begin: Position, length: int) -> list[bytes]:
        rows = data.rows(seed, begin)
        return [next(rows).pixels.tobytes() for _ in range(length)]

    first = order(0, Position(), 60)
    assert first == order(0, Position(), 60) and first[:30] != order(1, Position(), 30)
    assert first[:30] != first[30:] and Counter(first[:30]) == Counter(first[30:])
    assert first[11:] == order(0, Position(0, 11), 49) and first[42:] == order(0, Position(1, 12), 18)
    assert first[:30] != [pixels(i).numpy().tobytes() for i in range(30)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_go_on_where_they_stopped(tmp_path: Path, workers: int) -> None:
    data = numbered(tmp_path, 20, bad=(3, 11))
    whole: list[Batch] = list(Loader(StreamBatches(data, 5, 0, 50, 8), workers))
    assert [len(b) for b in whole] == [8] * 6 + [2] and sum(len(b.left_out) for b in whole) >= 4
    assert sorted(set(data.bad.values()))[0].startswith("not a ")
    for cut in (1, 3, 5):
        rest = list(Loader(StreamBatches(data, 5, cut * 8, 50, 8, whole[cut - 1].after), workers))
        for ours, theirs in zip(whole[cut:], rest, strict=True):
            assert torch.equal(ours.images, theirs.images) and torch.equal(ours.index, theirs.index)
            assert ours.names == theirs.names and ours.after == theirs.after and ours.labels is not None
            assert theirs.labels is not None and torch.equal(ours.labels, theirs.labels)


def test_mirroring_depends_on_the_number_in_the_run(tmp_path: Path) -> None:
    data = numbered(tmp_path, 20)
    plain = torch.cat([b.images for b in Loader(StreamBatches(data, 5, 0, 200, 50), 0)])
    data.flips = True
    flipped = torch.cat([b.images for b in Loader(StreamBatches(data, 5, 0, 200, 50), 0)])
    sides = [(key(a) == key(b), key(a.flip(-1)) == key(b)) for a, b in zip(plain, flipped, strict=True)]
    assert all(one != other for one, other in sides) and 70 < sum(other for _, other in sides) < 130
    again = torch.cat([b.images for b in Loader(StreamBatches(data, 5, 0, 200, 8), 0)])
    assert torch.equal(flipped, again)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_rows_are_an_error_of_one_line(tmp_path: Path, workers: int) -> None:
    data = numbered(tmp_path, 40, bad=tuple(range(0, 40, 4)))
    data.max_bad = 0.1
    with pytest.raises(DataError, match=r"rows can't be used .* more than data.max_bad=0.1") as caught:
        list(Loader(StreamBatches(data, 0, 0, 400, 8), workers))
    assert str(caught.value).startswith("data: ") and "\n" not in str(caught.value)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    where = {"kind": "hf-stream", "size": 8, **webdataset(tmp_path)}
    with pytest.raises(UsageError, match=r"column 'cls' has no class names.* data\.classes"):
        build_data(where)
    assert build_data({**where, "label": "none"}).class_names == []
    with pytest.raises(UsageError, match="buffer: 0 is not allowed"):
        build_data({**where, "buffer": 0})
    with pytest.raises(UsageError, match=r"max_bad: 2\.0 is not allowed"):
        build_data({**where, "max_bad": 2})
    with pytest.raises(DataError, match="can't be loaded"):
        build_data({"kind": "hf-stream", "path": "parquet", "data_files": str(tmp_path / "missing.parquet")})
    with pytest.raises(ConfigError, match=r"training\.workers: 2 is not allowed"):
        Loader(StreamBatches(numbered(tmp_path, 4), 0, 0, 4, 4), 2)
    few = build_data({**where, "classes": ["cat"]})
    assert isinstance(few, HuggingFaceStream)
    reasons = [row.why for row, _ in zip(few.rows(0, Position()), range(6), strict=False)]
    assert Counter(reasons) == {None: 3, "class 1 is none of the 1 classes": 3}


def recipe(root: Path, *settings: str) -> Recipe:
    source = f"data={{kind: hf-stream, size: 8, path: parquet, data_files: {root / 'rows.parquet'}, buffer: 7}}"
    small = ["model.width=32", "model.depth=1", "training.images=160", "training.batch_size=8", "training.threads=1"]
    fixed = ["training.dtype=float32", "training.log_images=40", "training.sample_images=0", "training.workers=1"]
    fixed += ["sampling.num_inference_steps=4"]
    return read_recipe("mar-cifar10-tiny", [source, "data.max_bad=0.5", *small, *fixed, *settings])


def test_resuming_on_a_stream_is_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(tmp_path, 20, bad=(4,))
    train(recipe(tmp_path), tmp_path / "whole", device="cpu", quiet=True)
    signal_in_step(monkeypatch, 7)
    with pytest.raises(Stopped):
        train(recipe(tmp_path), tmp_path / "parts", device="cpu", quiet=True)
    train(recipe(tmp_path), tmp_path / "parts", device="cpu", quiet=True, resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert "a stream" in (tmp_path / "whole" / "model" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.buffer: 7 in .*, 8 now"):
        train(recipe(tmp_path, "data.buffer=8"), tmp_path / "parts", device="cpu", quiet=True, resume=True)
