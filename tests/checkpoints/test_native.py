"""Model folders: what is read is what was written, or one line names the file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_bundle
from safetensors.torch import load_file, save_file

from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.native import CONFIG, MODEL, TOKENIZER, Bundle, load_bundle, save_bundle, write_tensors
from seriatim.core.errors import CheckpointError, NumericsError, UsageError
from seriatim.core.files import MANIFEST, atomic_write, write_manifest
from seriatim.heads.diffusion import Diffusion
from seriatim.models.masked_model import MaskedModel
from seriatim.pipeline.loading import load
from seriatim.pipeline.pipeline import Pipeline
from seriatim.tokenizers.pixels import Pixels

FILES = (CONFIG, MODEL, TOKENIZER)


def test_round_trip_is_exact(tmp_path: Path, bundle: Bundle) -> None:
    bundle.tokenizer.fit([torch.rand(20, 1, 8, 8)])
    loaded = load_bundle(save_bundle(bundle, tmp_path / "m"))
    for ours, theirs in ((bundle.model, loaded.model), (bundle.tokenizer, loaded.tokenizer)):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert loaded.class_names == bundle.class_names and loaded.sampling == bundle.sampling
    assert len(loaded.sha256) == 64 and not loaded.model.training
    assert {p.name for p in (tmp_path / "m").iterdir()} == {*FILES, MANIFEST}
    assert all(p.requires_grad for p in loaded.model.parameters()), "a loaded model can be trained further"


def test_a_saved_model_is_replaced_whole(tmp_path: Path, bundle: Bundle) -> None:
    save_bundle(bundle, tmp_path / "m")
    other = make_bundle(classes=2)
    save_bundle(other, tmp_path / "m")
    assert load_bundle(tmp_path / "m").model.classes == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_run_folder_holds_a_model(tmp_path: Path, bundle: Bundle) -> None:
    save_bundle(bundle, tmp_path / "run" / "model")
    assert load_bundle(tmp_path / "run").model.classes == 3


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_named(model_folder: Path, name: str) -> None:
    path, chance = model_folder / name, random.Random(0)
    whole = path.read_bytes()
    for _ in range(25):
        broken = bytearray(whole)
        broken[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(CheckpointError) as caught:
            load_bundle(model_folder)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_truncated_or_missing_file_is_named(model_folder: Path, name: str) -> None:
    path = model_folder / name
    whole = path.read_bytes()
    for keep in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=name):
            load_bundle(model_folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        load_bundle(model_folder)


def rewrite_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / MODEL)
        change(tensors)
        save_file(tensors, folder / MODEL)

    return apply


def rewrite_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return apply


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["conditioner.no_class"]


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conditioner.no_class"][0, 0] = float("nan")


MISMATCHES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing": (
        rewrite_tensors(lose),
        (MODEL, "lacks tensor 'conditioner.no_class'"),
    ),
    "extra": (rewrite_tensors(lambda t: t.update(x=torch.ones(1))), (MODEL, "unknown tensor 'x'")),
    "shape": (
        rewrite_tensors(lambda t: t.update({"conditioner.no_class": torch.ones(1, 5)})),
        (MODEL, "'conditioner.no_class'", "(1, 5)", "(1, 32)"),
    ),
    "nan": (rewrite_tensors(poison), (MODEL, "'conditioner.no_class'", "not finite")),
    "path": (rewrite_tensors(lambda t: t.update({"../../etc/x": torch.ones(1)})), (MODEL, "unknown tensor")),
    "width": (rewrite_config(lambda c: c["model"].update(width=64)), (MODEL, "the config says")),
    "kind": (rewrite_config(lambda c: c["model"].update(kind="nosuch")), (CONFIG, "model.kind", "'nosuch'")),
    "key": (rewrite_config(lambda c: c.pop("tokenizer")), (CONFIG, "tokenizer")),
    "format": (rewrite_config(lambda c: c.update(format=99)), (CONFIG, "format 99")),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_files_that_do_not_fit_are_named(model_folder: Path, case: str) -> None:
    """The manifest is made anew, so that what is wrong is what the files say, not their hash."""
    change, words = MISMATCHES[case]
    change(model_folder)
    write_manifest(model_folder, FILES)
    with pytest.raises(CheckpointError) as caught:
        load_bundle(model_folder)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_file_of_another_model_is_named(tmp_path: Path, model_folder: Path) -> None:
    other = save_bundle(make_bundle(width=64), tmp_path / "other")
    shutil.copy(other / MODEL, model_folder / MODEL)
    with pytest.raises(CheckpointError, match=MODEL):
        load_bundle(model_folder)


def test_hostile_weights_are_refused_without_reading_them(model_folder: Path) -> None:
    for header in (b"\xff" * 8 + b"{}", (2**40).to_bytes(8, "little") + b"{", b"\x80\x04" + b"pickle" * 10):
        (model_folder / MODEL).write_bytes(header)
        write_manifest(model_folder, FILES)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load_bundle(model_folder)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, bundle: Bundle) -> None:
    save_bundle(bundle, tmp_path / "m")
    with torch.no_grad():
        bundle.model.conditioner.get_parameter("no_class")[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"no_class' has values that are not finite; nothing was written"):
        save_bundle(bundle, tmp_path / "m")
    load_bundle(tmp_path / "m")


def test_only_a_model_folder_is_replaced(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="is not a model folder"):
        save_bundle(bundle, tmp_path / "mine")
    save_bundle(bundle, tmp_path / "m", card="# card")
    (tmp_path / "m" / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds 'notes\.txt'"):
        save_bundle(bundle, tmp_path / "m")
    assert (tmp_path / "mine" / "thesis.txt").exists() and (tmp_path / "m" / "notes.txt").exists()
    assert (tmp_path / "m" / "README.md").read_text() == "# card"


@pytest.mark.parametrize(("size", "channels", "classes"), [((6, 10), 3, 0), ((5, 7), 1, 2), (9, 3, 1)])
def test_unusual_models_come_back(tmp_path: Path, size: Any, channels: int, classes: int) -> None:
    """Rectangles, sides that a patch does not divide, colour, no classes: saved, loaded, the same images."""
    tokenizer = Pixels(size, 2, channels)
    backbone = Masked(tokenizer.count, tokenizer.dim, width=200, depth=(1, 2), buffer=1)
    model = MaskedModel(backbone, Diffusion(tokenizer.dim, 16, 1), classes=classes)
    pipe = Pipeline(Bundle(model, tokenizer, sampling={"num_inference_steps": 3, "num_diffusion_steps": 4}))
    again = load(pipe.save(tmp_path / "m"), device="cpu")
    labels = list(range(classes)) or None
    one, two = (p(labels, seed=5, output_type="np").images for p in (pipe, again))
    assert one.shape == (max(1, classes), *tokenizer.size, channels) and (one == two).all()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_weights_can_be_read_by_whom_other_files_can(umask: int, mode: int, tmp_path: Path) -> None:
    """Someone else on the machine may use a model folder or a cache of latents: safetensors' own files are private."""
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "new.safetensors", {"a": torch.zeros(3)})
        atomic_write(tmp_path / "shard.safetensors", lambda file: write_tensors(file, {"a": torch.zeros(3)}))
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [mode, mode]
