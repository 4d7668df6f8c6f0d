"""A pickle can run a program when it is read. None is run, whatever reads it (row 9 of the page)."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import EVALUATE, FEW, TRAIN, begin, command, inside

from seriatim.core.errors import SeriatimError
from seriatim.core.files import write_manifest


class Canary:
    """Unpickled, it makes the folder `ran`."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder / "ran")

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


def torch_zip(canary: Any, path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(1)}, "hook": canary}, path)


def torch_old(canary: Any, path: Path) -> None:
    torch.save(canary, path, _use_new_zipfile_serialization=False)


def namespace(canary: Any, path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(1)}, "args": argparse.Namespace(hook=canary)}, path)


def bare(canary: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(canary))


def npy(canary: Any, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array([canary], dtype=object), allow_pickle=True)


def npz(canary: Any, path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=True, mu=np.array([canary], dtype=object), sigma=np.array([canary], dtype=object))


def zipped(canary: Any, path: Path) -> None:
    """What torch's exported programs and checkpoints of several processes look like: a pickle among other files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("archive/data.pkl", ".metadata", "models/model.json"):
            archive.writestr(name, pickle.dumps(canary))
        archive.writestr("archive/version", "3")


def yaml(canary: Any, path: Path) -> None:
    path.write_text(f"name: x\ndata: !!python/object/apply:os.mkdir ['{canary.folder}']\n")


KINDS: list[Callable[[Any, Path], None]] = [torch_zip, torch_old, namespace, bare, npy, npz, zipped, yaml]

# Every way in for a file: words of a command line in which FILE is the canary, FOLDER a folder that holds it.
ENTRIES: dict[str, list[str]] = {
    "convert mar": ["convert", "mar", "FILE", "out"],
    "convert mar, vae": ["convert", "mar", "FILE", "out", "--vae", "FILE"],
    "convert arinar": ["convert", "arinar", "FILE", "out"],
    "convert kl16": ["convert", "kl16", "FILE", "out"],
    "convert llamagen": ["convert", "llamagen", "FILE", "out"],
    "convert llamagen-vq": ["convert", "llamagen-vq", "FILE", "out"],
    "sample": ["sample", "FOLDER", "--out", "out"],
    "sample, repeated": ["sample", "model", "--from", "FILE", "--out", "out"],
    "edit": ["edit", "model", "FILE", "--mask", "FILE", "--out", "out"],
    "train, recipe": ["train", "FILE", "--out", "out"],
    "train, begun": ["train", "mar-digits", *TRAIN, "training.init_from=FOLDER", "--out", "out"],
    "train, tokenizer": ["train", "mar-digits", *TRAIN, "tokenizer={from: FOLDER}", "--out", "out"],
    "train, arrays": ["train", "mar-waves", "data.path=FILE", "--out", "out"],
    "train, latents": ["train", "mar-cifar10-tiny", "data={kind: latents, path: FOLDER}", "--out", "out"],
    "train, pictures": ["train", "mar-cifar10-tiny", "data.path=PICTURES", "--out", "out"],
    "cache": ["cache", "FILE", "--out", "out"],
    "evaluate, reference": ["evaluate", "model", "--reference", "FILE", *EVALUATE, *FEW, "--out", "out"],
    "evaluate, features": ["evaluate", "model", *EVALUATE[:-1], "FOLDER", *FEW, "--out", "out"],
    "evaluate, inception": ["evaluate", "model", *EVALUATE[:-1], "inception:FILE", *FEW, "--out", "out"],
}
SUFFIXES = {
    "convert": (".pth", ".safetensors"),
    "sample": (".png",),
    "edit": (".png",),
    "train, arrays": (".npy", ".safetensors"),
    "train, recipe": (".yaml",),
    "cache": (".yaml",),
    "evaluate, reference": (".npz",),
    "evaluate, inception": (".pth",),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    begin(folder)
    return folder


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_pickle_is_run(entry: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight kinds of file under every suffix that this way in takes: one line, an exit code of a user's mistake."""
    canary = Canary(tmp_path)
    suffixes = next((found for name, found in SUFFIXES.items() if entry.startswith(name)), (".safetensors",))
    for kind in KINDS:
        for suffix in suffixes:
            work = tmp_path / f"{kind.__name__}{suffix}"
            shutil.copytree(source, work)
            kind(canary, work / f"evil{suffix}")
            folder = work / "evil"  # a model folder whose every file is the canary, with a manifest that is right
            folder.mkdir()
            names = (
                "config.json",
                "model.safetensors",
                "tokenizer.safetensors",
                "cache.json",
                "classifier.safetensors",
            )
            for name in names:
                kind(canary, folder / name)
            write_manifest(folder, names)
            (work / "pictures" / "cat").mkdir(parents=True)
            kind(canary, work / "pictures" / "cat" / "1.png")
            replaced = {"FILE": f"evil{suffix}", "FOLDER": "evil", "PICTURES": "pictures"}
            words = [w if w not in replaced else replaced[w] for w in ENTRIES[entry]]
            words = [
                w.replace("FOLDER", "evil").replace("FILE", f"evil{suffix}").replace("PICTURES", "pictures")
                for w in words
            ]
            with inside(work):
                code, lines = command(words, capsys)
            assert not (tmp_path / "ran").exists(), (entry, kind.__name__, suffix)
            assert code in (2, 3, 4) and len(lines) == 1, (entry, kind.__name__, suffix, code, lines)
            assert "a bug" not in lines[0] and "Traceback" not in lines[0], lines
            shutil.rmtree(work)


def test_the_canary_can_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path)))
    assert (tmp_path / "ran").exists()


def test_a_checkpoint_of_pickles_is_passed_over(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a run's own files, such as a state of random numbers, and in their place."""
    shutil.copytree(source, tmp_path / "work")
    with inside(tmp_path / "work"):
        words = ["train", "mar-digits", *TRAIN, "--out", "run"]
        assert command(words, capsys)[0] == 0
        newest = sorted(path for path in Path("run/checkpoints").iterdir() if path.is_dir())[-1]
        bare(Canary(tmp_path), newest / "rng_state.pth")
        bare(Canary(tmp_path), newest / ".metadata")
        bare(Canary(tmp_path), newest / "optimiser.safetensors")
        assert command([*words, "--resume"], capsys)[0] == 0
    assert not (tmp_path / "ran").exists()


def test_a_config_names_no_code(source: Path, tmp_path: Path) -> None:
    """A configuration that asks for a class or a module by its path in Python is refused, not imported."""
    from seriatim.checkpoints.native import load_bundle

    for part, value in (
        ("model", {"kind": "os.mkdir"}),
        ("model", {"_target_": "os.mkdir", "path": str(tmp_path / "ran")}),
        ("tokenizer", {"kind": "__import__('os').mkdir"}),
        ("tokenizer", {"auto_map": {"AutoModel": "evil.py"}, "kind": "pixels"}),
    ):
        folder = tmp_path / "model"
        shutil.copytree(source / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        config[part] = value
        (folder / "config.json").write_text(json.dumps(config))
        write_manifest(folder, ("config.json", "model.safetensors", "tokenizer.safetensors"))
        with pytest.raises(SeriatimError) as caught:
            load_bundle(folder)
        assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
        shutil.rmtree(folder)
