"""Nothing from outside decides how much is done: numbers are refused before any work, wherever they stand."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_bundle
from torch import nn

from seriatim.checkpoints.native import CONFIG, MODEL, TOKENIZER, load_bundle, save_bundle
from seriatim.checkpoints.official import read_official
from seriatim.cli.main import run
from seriatim.core import construct as building
from seriatim.core.construct import MOST_THREADS, check_room, check_sizes, construct
from seriatim.core.errors import CheckpointError, ConfigError, DataError, ResourceError, SeriatimError, UsageError
from seriatim.core.files import write_manifest
from seriatim.data.array_file import ArrayData
from seriatim.evaluation.reference import read_statistics
from seriatim.evaluation.sweep import sweep
from seriatim.models.build import build_model
from seriatim.pipeline.pipeline import Pipeline
from seriatim.training.config import read_recipe
from seriatim.training.setup import build

RECIPES = [  # an override, and what the refusal names
    ("training.threads=0", "training.threads"),
    ("training.threads=-1", "training.threads"),
    ("training.threads=1000000", "from 1 to 1024"),
    ("training.threads=true", "training.threads"),
    ("training.workers=100000", "training.workers"),
    ("training.batch_size=1000000000000000", "training.batch_size"),
    ("training.images=1000000000000000", "training.images"),
    ("training.accumulate=1000000000", "training.accumulate"),
    ("training.save_images=100000000000000000", "training.save_images"),
    ("training.weight_decay=1.0e+300", "training.weight_decay"),
    ("training.images=" + "9" * 5000, "training.images"),
    ("name=" + "[" * 5000, "nested deeper"),
    ("description=&a [*a]", "holds itself"),
    ("model.width=1000000000", "model.width"),
    ("model.width='1e9'", "model.width"),
    ("model.depth=1000000000", "model.depth"),
    ("model.depth=[300, 300]", "at most 512 layers"),
    ("model.heads=1000000000", "model.heads"),
    ("model.buffer=1000000000", "model.buffer"),
    ("model.tokens=1000000000", "model.tokens"),
    ("model.vocab=1000000000", "model.vocab"),
    ("model.classes=1000000000", "model.classes"),
    ("model.mlp_ratio=1.0e+30", "model.mlp_ratio"),
    ("model.head.width=1000000000", "model.head.width"),
    ("model.head.depth=100000", "model.head.depth"),
    ("model.head.draws=1000000000", "model.head.draws"),
    ("model.head.train_steps=1000000000", "model.head.train_steps"),
    ("model.head={kind: mixture, components: 10000000}", "model.head.components"),
    ("model.head={kind: bins, bins: 10000000}", "model.head.bins"),
    ("tokenizer.patch=1000000000", "tokenizer.patch"),
    ("tokenizer.patch=-1", "tokenizer.patch"),
    ("tokenizer.levels=1000000000", "tokenizer.levels"),
    ("tokenizer.levels=0", "tokenizer.levels"),
    ("tokenizer.components=1000000000", "tokenizer.components"),
    ("tokenizer.size=1000000000", "tokenizer.size"),
    ("tokenizer={kind: kmeans, vocab: 1000000000}", "tokenizer.vocab"),
    ("tokenizer={kind: vq, layers_per_block: 100}", "tokenizer.layers_per_block"),
    ("tokenizer={kind: kl, block_out_channels: [1000000000]}", "tokenizer.block_out_channels"),
    ("tokenizer={kind: kl, block_out_channels: [" + "32, " * 20 + "32]}", "at most 16 levels"),
    ("tokenizer={kind: pretrained, autoencoder: {num_encoder_blocks: [1000000]}}", "num_encoder_blocks"),
    ("data={kind: folder, path: nosuch, size: 1000000000}", "data.size"),
    ("data={kind: hf-stream, path: nosuch, buffer: 1000000000}", "data.buffer"),
    ("sampling.num_diffusion_steps=1000000000", "num_diffusion_steps"),
    ("sampling.num_images_per_label=1000000000", "num_images_per_label"),
    ("sampling.guidance_scale=1.0e+300", "guidance_scale"),
]


@pytest.mark.parametrize(("override", "words"), RECIPES, ids=[override[:40] for override, _ in RECIPES])
def test_numbers_of_a_recipe(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(read_recipe("mar-digits", [override]))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_weights_that_no_machine_holds_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"model: its weights take [\d,.]+ GiB, this machine has"):
        build(read_recipe("mar-digits", ["model.head.width=131072"]))
    monkeypatch.setattr(building, "machine_memory", lambda: 1 << 30)
    with pytest.raises(ResourceError, match="tokenizer: its weights take"):
        build(read_recipe("mar-digits", ["tokenizer={kind: kmeans, patch: 8, vocab: 16000000}"]))


def test_room_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "machine_memory", lambda: 4 * 999_999)
    big = {"width": 1 << 17}
    with pytest.raises(ResourceError, match="thing: its weights take"):
        check_room(lambda: nn.Linear(1000, 1000, bias=False), big, "thing")
    check_room(lambda: nn.Linear(999, 1000, bias=False), big, "thing")


STORED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c["model"].update(width=10**9), "model.width"),
    (lambda c: c["model"].update(depth=10**9), "model.depth"),
    (lambda c: c["model"].update(depth="1000000000"), "model.depth"),
    (lambda c: c["model"].update(tokens=10**9), "model.tokens"),
    (lambda c: c["model"].update(buffer=10**9), "model.buffer"),
    (lambda c: c["model"].update(classes=10**9), "model.classes"),
    (lambda c: c["model"].update(vocab=10**9), "model.vocab"),
    (lambda c: c["model"].update(width=100_000, heads=1), MODEL),
    (lambda c: c["model"]["head"].update(depth=10**9), "model.head.depth"),
    (lambda c: c["model"]["head"].update(width=10**9), "model.head.width"),
    (lambda c: c["model"]["head"].update(train_steps=10**9), "model.head.train_steps"),
    (lambda c: c["tokenizer"].update(patch=10**9), "tokenizer.patch"),
    (lambda c: c["tokenizer"].update(size=[10**9, 8]), "tokenizer.size"),
    (lambda c: c["tokenizer"].update(size=[8, 8, 8]), "tokenizer.size"),
    (lambda c: c["tokenizer"].update(components=10**9), "tokenizer.components"),
    (lambda c: c.update(class_names={"cat": 0, "dog": 1, "horse": 2}), "class_names"),
    (lambda c: c.update(class_names=["cat", "dog"]), "class_names: 2 given for 3 classes"),
    (lambda c: c.update(class_names=["cat", "dog", "cat"]), "class_names: 'cat' is given twice"),
    (lambda c: c.update(class_names=["cat", "dog", 5]), "class_names"),
    (lambda c: c.update(sampling=[["a", 1]]), "sampling"),
    (lambda c: c.update(provenance="x"), "provenance"),
    (lambda c: c.update(tokenizer={"kind": "pretrained", "path": "somebody/vae", "size": 8}), "tokenizer.path"),
    (lambda c: c.update(tokenizer={"kind": "pretrained", "path": "/tmp", "size": 8}), "outside of the folder"),
    (lambda c: c.update(tokenizer={"kind": "pretrained", "subfolder": "../x", "size": 8}), "tokenizer.subfolder"),
]


@pytest.mark.parametrize(("change", "words"), STORED, ids=[words for _, words in STORED])
def test_numbers_and_places_of_a_stored_config(
    change: Callable[[dict[str, Any]], Any], words: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(*_: Any, **__: Any) -> None:
        raise AssertionError("a model folder sent its reader to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nowhere)
    config = json.loads((model_folder / CONFIG).read_text())
    change(config)
    (model_folder / CONFIG).write_text(json.dumps(config))
    write_manifest(model_folder, (CONFIG, MODEL, TOKENIZER))
    with pytest.raises(CheckpointError) as caught:
        load_bundle(model_folder)
    assert words in str(caught.value) and str(model_folder) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_stored_can_be_loaded(tmp_path: Path) -> None:
    bundle = make_bundle()
    bundle.class_names = ["cat", "cat", "dog"]
    with pytest.raises(UsageError, match="'cat' is given twice"):
        save_bundle(bundle, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    bundle.class_names = []
    save_bundle(bundle, tmp_path / "m")
    assert load_bundle(tmp_path / "m").sha256 == bundle.sha256 != ""


def test_check_sizes_looks_everywhere() -> None:
    check_sizes({"width": 64, "seed": 2**62, "note": "1e99", "heads": [2, 2], "head": {"depth": 3}}, "model")
    for config in ({"a": {"b": [{"width": 10**9}]}}, {"depth": [200, 400]}, {"x": {"depth": 300}, "depth": 300}):
        with pytest.raises(ConfigError):
            check_sizes(config, "model")


# --- files ---------------------------------------------------------------------------------------------------------


def packed(path: Path, **members: tuple[str, str, int]) -> Path:
    """An .npz of zeros: name -> (dtype, shape as it says, bytes that follow)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (dtype, shape, size) in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = (
                    f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
                )
                member.write(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header)
                for _ in range(0, size, 1 << 20):
                    member.write(b"\0" * min(size, 1 << 20))
    return path


def test_a_reference_is_refused_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("read before it was refused")

    monkeypatch.setattr(np, "load", never)
    for members, words in (
        ({"mu": ("<f8", "(20000,)", 160_000), "sigma": ("<f8", "(20000, 20000)", 0)}, "at most 4,096 features"),
        ({"arr_0": ("|u1", "(1048576, 8, 16, 1)", 128 << 20)}, "times its size in the file"),
        ({"arr_0": ("|u1", f"({2**42}, 8, 8, 3)", 10)}, "is not the array"),
        ({"arr_0": ("|u1", "(2, 4, 4, 3)", 1 << 20)}, "is not the array"),
        ({"arr_0": ("|O", "(2, 4, 4, 3)", 768)}, "is not a readable .npz"),
    ):
        with pytest.raises(DataError, match=words):
            read_statistics(packed(tmp_path / "r.npz", **members))


def test_a_torch_file_is_no_larger_than_its_file(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1 << 20)}}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as given, zipfile.ZipFile(tmp_path / "p.pth", "w", 8) as archive:
        for entry in given.infolist():
            archive.writestr(entry.filename, given.read(entry))
    assert (tmp_path / "p.pth").stat().st_size < 1 << 17
    with pytest.raises(CheckpointError, match="parts are packed"):
        read_official(tmp_path / "p.pth")
    torch.save({"model": {"w": torch.zeros(1).expand(1 << 20, 1 << 20)}}, tmp_path / "e.pth")
    with pytest.raises(CheckpointError, match="larger than what the file holds"):
        read_official(tmp_path / "e.pth")


def test_an_old_torch_file_says_no_size_that_it_does_not_hold(tmp_path: Path) -> None:
    """Torch allots what such a file says, and reads only the memories that a list at its end names."""
    file = io.BytesIO()
    torch.save({"w": torch.zeros(77, dtype=torch.uint8)}, file, _use_new_zipfile_serialization=False)
    raw = file.getvalue()
    said = pickle.dumps(1 << 20, protocol=2)[2:-1]
    longer = raw.replace(b"K\x4dN", said + b"N").replace(b"K\x4d\x85", said + b"\x85")
    assert len(longer) == len(raw) + 2 * (len(said) - 2), "the numbers of bytes and of elements were both replaced"
    at = longer.rindex(b"\x80\x02]")
    (tmp_path / "e.pth").write_bytes(longer[:at] + pickle.dumps([], protocol=2))
    with pytest.raises(CheckpointError, match="tensor 'w' says that it is larger than what the file holds"):
        read_official(tmp_path / "e.pth")


def test_labels_of_arrays_are_no_count_of_classes(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((2, 3, 4), np.float32))
    np.save(tmp_path / "l.npy", np.array([0, 10**12]))
    with pytest.raises(DataError, match="the label 1000000000000"):
        ArrayData(str(tmp_path / "t.npy"), str(tmp_path / "l.npy"))


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "MODEL", "--label", "9" * 5000], "class_labels"),
        (["sample", "MODEL", "--label", "-" + "9" * 5000], "class_labels"),
        (["sample", "MODEL", "--threads", "1000000"], "threads"),
        (["sample", "MODEL", "--order", "9" * 5000], "order"),
        (["sample", "MODEL", "--num-images-per-label", "1000000000"], "num_images_per_label"),
        (["sample", "MODEL", "--num-inference-steps", "1000000000"], "num_inference_steps"),
        (["sample", "MODEL", "--num-diffusion-steps", "1000000000"], "num_diffusion_steps"),
        (["sample", "MODEL", "--seed", "9" * 5000], "seed"),
        (["evaluate", "MODEL", "--data", "digits", "--num", "4", "--shard", "0/" + "9" * 5000], "shard"),
        (["evaluate", "MODEL", "--data", "digits", "--num", "4", "--set", "min_tokens=" + "[" * 5000], "nested deeper"),
        (["evaluate", "MODEL", "--data", "{a: &a [*a]}", "--num", "4", "--features", "pixels"], "holds itself"),
        (["bench", "MODEL", "--threads", str(MOST_THREADS + 1)], "threads"),
        (["bench", "MODEL", "--batch", "1000000000000"], "batch"),
        (["cache", "mar-digits", "--out", "OUT", "--workers", "100000"], "workers"),
    ],
)
def test_numbers_on_the_command_line(
    arguments: list[str], words: str, model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(model_folder), "OUT": str(tmp_path / "out")}
    assert run([places.get(text, text) for text in arguments]) == 2
    said = capfd.readouterr().err
    assert words.replace("_", "-") in said.replace("_", "-") and len(said.splitlines()) == 1 and len(said) < 2500


def test_points_of_a_sweep(tmp_path: Path) -> None:
    pipe = Pipeline(make_bundle(), device="cpu")
    values = [float(i) for i in range(200)]
    with pytest.raises(UsageError, match="40,000 points"):
        sweep(pipe, None, tmp_path / "s", {"guidance_scale": values, "temperature": values}, num=4)  # type: ignore[arg-type]


LARGE = [2**63, 2**64, 10**400]
INNER = {"kind": "causal", "width": 8, "depth": 1, "heads": 1}
NESTED = {"kind": "nested", "split": {"kind": "features"}, "backbone": INNER, "head": {"kind": "bins", "bins": 8}}
OPTIONS: list[tuple[dict[str, Any], str, list[Any]]] = [  # a head, its option, and values that it refuses
    ({"kind": "diffusion", "width": 16, "depth": 1}, "num_diffusion_steps", [0, -1, 10_001, *LARGE, True, "3", 2.5]),
    ({"kind": "diffusion", "width": 16, "depth": 1}, "num_diffusion_steps_last", [0, 101, 10_001, *LARGE, True, "3"]),
    ({"kind": "diffusion", "width": 16, "depth": 1}, "start_timestep", [-1, 1000, *LARGE, "x", 2.5]),
    ({"kind": "diffusion", "width": 16, "depth": 1}, "timesteps", [[], [-1], [1000], [3, 2], [2**64], 5]),
    ({"kind": "flow", "width": 16, "depth": 1}, "num_diffusion_steps", [0, -1, 10_001, *LARGE, True, "3", 2.5]),
    ({"kind": "bins", "bins": 8}, "top_k", [0, -1, *LARGE, True, "3", 2.5]),
    ({"kind": "bins", "bins": 8}, "top_p", [0, -0.5, 1.5, float("nan"), float("inf"), True, "0.5"]),
    (NESTED, "top_k", [0, -1, *LARGE, True, "3", 2.5]),
    (NESTED, "feature_schedule", ["lineer", 1, True]),
    ({"kind": "mixture", "components": 2}, "top_p", [0, -0.5, 1.5, float("nan"), *LARGE, True, "0.5"]),
    ({"kind": "mixture", "components": 2}, "guidance_mode", ["exactly", 3, True]),
]


@pytest.mark.parametrize(("head", "name", "values"), OPTIONS, ids=[f"{h['kind']} {name}" for h, name, _ in OPTIONS])
@pytest.mark.parametrize("flat", [True, False])
def test_numbers_of_a_heads_options(head: dict[str, Any], name: str, values: list[Any], flat: bool) -> None:
    bundle = make_bundle()
    config = {"kind": "masked", "tokens": 16, "dim": 4, "width": 16, "depth": 1, "heads": 2, "classes": 3}
    bundle.model = build_model({**config, "head": head}).eval()
    pipe = Pipeline(bundle, device="cpu")
    for value in values:
        given = {name: value} if flat or name.endswith("_last") else {"head_options": {name: value}}
        with pytest.raises(UsageError) as caught:
            pipe.request(**given)
        told = str(caught.value)
        assert name in told and "\n" not in told and len(told) < 500, value


# --- what fails while it is built ----------------------------------------------------------------------------------


def no_memory() -> Any:
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


class Mine(nn.Module):
    def __init__(self, fault: str = "type") -> None:
        super().__init__()
        faults: dict[str, Callable[[], Any]] = {
            "type": lambda: len(5),  # type: ignore[arg-type]
            "key": lambda: dict[str, int]()["x"],
            "attribute": lambda: self.nosuch,
            "memory": no_memory,
        }
        faults[fault]()


@pytest.mark.parametrize("fault", ["type", "key", "attribute"])
def test_a_fault_of_a_users_class_is_no_wrong_value(fault: str) -> None:
    with pytest.raises(ConfigError, match=r"thing: Mine failed with \w+Error") as caught:
        construct(Mine, {"fault": fault}, "thing")
    assert "check its values" not in str(caught.value) and caught.value.__cause__ is not None


def test_no_memory_is_no_wrong_value() -> None:
    with pytest.raises(SeriatimError, match=r"thing: .*memory") as caught:
        construct(Mine, {"fault": "memory"}, "thing")
    assert caught.value.exit_code == 6
