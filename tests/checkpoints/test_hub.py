"""What is a repository of the hub and what is a mistyped path; a fetch takes a model's own files and no others."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import pytest

from seriatim.checkpoints.hub import located
from seriatim.checkpoints.native import CONFIG, MODEL, TOKENIZER, load_bundle
from seriatim.core.errors import CheckpointError
from seriatim.core.files import MANIFEST
from seriatim.core.hub import Repository, repository
from seriatim.tokenizers.pretrained import read as read_autoencoder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("owner/name", Repository("owner/name")),
        ("hf://owner/name", Repository("owner/name")),
        ("hf://runs/photos", Repository("runs/photos")),
        ("hf://owner/name@v1.0", Repository("owner/name", "v1.0")),
        ("some-owner/a.b_c-1", Repository("some-owner/a.b_c-1")),
    ],
)
def test_names_of_repositories(name: str, found: Repository) -> None:
    assert repository(name, "model") == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/phtos", "there is no folder runs/phtos in runs; did you mean 'photos'"),
        ("runs/zzz", "write hf://runs/zzz"),
        ("./owner/name", "no folder"),
        ("../owner/name", "no folder"),
        ("/owner/name", "no folder"),
        ("a/b/c", "no folder"),
        ("owner/name@v1", "no folder"),
        ("~/name", "no folder"),
        ("owner/", "no folder"),
        ("owner/..", "no folder"),
        ("hf://", "hf://owner/name"),
        ("hf://a/b/c", "hf://owner/name"),
        ("hf://../x", "hf://owner/name"),
        ("hf://owner/name@a/b", "hf://owner/name"),
        ("owner/na\x1b[31mme", "no folder"),
    ],
)
def test_a_mistyped_path_never_goes_to_the_hub(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: Any, **__: Any) -> None:
        raise AssertionError("it was asked for at the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nowhere)
    for read in (located, lambda text: read_autoencoder(text, None)):
        with pytest.raises(CheckpointError) as caught:
            read(name)
        assert words in str(caught.value) and str(caught.value).isprintable()


def test_only_a_models_own_files_are_fetched(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert located("hf://owner/name@abc") == model_folder
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc")

    def fetched(path: str) -> bool:
        return any(fnmatch.fnmatch(path, pattern) for pattern in asked["allow_patterns"])

    assert all(map(fetched, (CONFIG, MODEL, TOKENIZER, MANIFEST)))
    others = ("training.json", "huge.safetensors", f"other/{CONFIG}", f"a/b/{MODEL}", "model.bin", "setup.py")
    assert not any(map(fetched, others))


def test_files_that_are_links(here: Path, model_folder: Path) -> None:
    secret = here / "secret" / MODEL
    secret.parent.mkdir()
    shutil.move(model_folder / MODEL, secret)
    (model_folder / MODEL).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret.*, outside of its folder"):
        load_bundle(model_folder)
    (model_folder / MODEL).unlink()
    shutil.move(secret, model_folder / "weights")
    (model_folder / MODEL).symlink_to("weights")
    load_bundle(model_folder)  # a link inside of the folder
    (here / "link").symlink_to(model_folder)
    load_bundle(here / "link")  # a link to the folder


def test_the_hubs_cache_is_made_of_links(here: Path, model_folder: Path) -> None:
    snapshot, blobs = here / "models--a--b" / "snapshots" / "abc", here / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model_folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_bundle(snapshot).model.classes == 3
