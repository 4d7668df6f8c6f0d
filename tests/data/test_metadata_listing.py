"""metadata.jsonl names the classes of pictures, as `imagefolder` data sets have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seriatim.core.errors import ConfigError, DataError
from seriatim.data.metadata_listing import class_column, has_metadata, list_metadata, read_metadata
from seriatim.data.sources import build_data


def make(folder: Path, rows: list[dict[str, Any]], files: int = 6) -> Path:
    (folder / "images").mkdir(parents=True)
    for i in range(files):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / "images" / f"{i}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(i: int, **columns: Any) -> dict[str, Any]:
    return {"file_name": f"images/{i}.png", **columns}


def test_a_column_gives_the_classes(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [row(i, kind="dog" if i % 2 else "cat", number=i) for i in range(5)])
    data = build_data({"kind": "folder", "path": str(root), "size": 8, "classes": "kind"})
    assert (data.count, data.class_names) == (5, ["cat", "dog"])
    assert data.labels(torch.arange(5)).tolist() == [0, 0, 0, 1, 1]  # type: ignore[union-attr]
    assert [data.name(i) for i in range(5)] == [f"images/{i}.png" for i in (0, 2, 4, 1, 3)]
    assert data.passed_over == {"images/5.png": "not in metadata.jsonl"}
    assert data.images(torch.tensor([3]))[0, 0, 0, 0] == 40, "the label belongs to its picture"
    numbered = build_data({"kind": "folder", "path": str(root), "size": 8, "classes": "number"})
    assert numbered.class_names == ["0", "1", "2", "3", "4"]
    assert data.fingerprint() != numbered.fingerprint()


def test_what_has_no_class_is_passed_over(tmp_path: Path) -> None:
    rows = [row(0, kind="cat"), row(1, kind=None), row(2, kind=["a"]), row(3, kind=""), row(9, kind="dog"), row(4)]
    found = list_metadata(make(tmp_path / "data", rows), "kind")
    assert [entry.path for entry in found.entries] == ["images/0.png"] and found.class_names == ["cat"]
    assert found.passed_over["images/9.png"] == "named in metadata.jsonl, but not a picture in the folder"
    assert {found.passed_over[f"images/{i}.png"] for i in (1, 2, 3, 4)} == {"no class in metadata.jsonl"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "line 2 holds"),
        ("{", "line 2 is not JSON"),
        ('{"kind": "cat"}', "line 2 has no 'file_name'"),
        ('{"file_name": "../secret.png"}', "line 2 has no 'file_name' of a file in the folder"),
        ('{"file_name": "/etc/passwd"}', "line 2 has no 'file_name' of a file in the folder"),
        ('{"file_name": 3}', "line 2 has no 'file_name'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    root = make(tmp_path / "data", [row(0, kind="cat")])
    with open(root / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl: ") as caught:
        list_metadata(root, "kind")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [row(0, category="cat")])
    with pytest.raises(DataError, match="has no column 'categroy'; did you mean 'category'"):
        build_data({"kind": "folder", "path": str(root), "size": 8, "classes": "categroy"})
    with pytest.raises(DataError, match=r"metadata\.jsonl is a folder|metadata\.jsonl .*;"):
        build_data({"kind": "folder", "path": str(root / "images"), "size": 8, "classes": "kind"})
    with pytest.raises(ConfigError, match="data"):
        build_data({"kind": "folder", "path": str(root), "size": 8, "classes": 3})


def test_the_column_that_sorts_best() -> None:
    rows = [row(i, text=f"picture {i}", group=f"g{i % 9}", half=f"h{i % 2}", same="x", rare="r" if i else "q",
                some="a" if i < 50 else None) for i in range(90)]  # fmt: skip
    assert class_column(rows) == "half"
    assert class_column([{**each, "category": each["group"]} for each in rows]) == "category", "a usual name"
    assert class_column([row(i, text=f"picture {i}") for i in range(90)]) is None
    assert class_column([]) is None


def test_all_pictures_without_classes(tmp_path: Path) -> None:
    root = make(tmp_path / "data", [])
    (root / "more" / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "more" / "deep" / "x.png")
    Image.new("RGB", (8, 8)).save(root / "top.png")
    data = build_data({"kind": "folder", "path": str(root), "size": 8, "classes": False})
    assert data.count == 8 and data.class_names == [] and data.labels(torch.arange(8)) is None
    assert has_metadata(root) and not has_metadata(root / "images") and read_metadata(root) == []
