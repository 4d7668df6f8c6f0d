"""Weights of another dtype: those that float32 stands for are cast, all others are refused by name, at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_bundle
from safetensors.torch import load_file, save_file

from seriatim.checkpoints.native import CONFIG, MODEL, TOKENIZER, load_bundle, save_bundle
from seriatim.core.errors import CheckpointError
from seriatim.core.files import write_manifest
from seriatim.pipeline import Pipeline
from seriatim.tokenizers.kmeans import KMeans

FILES = (CONFIG, MODEL, TOKENIZER)


def recast(folder: Path, dtype: torch.dtype, file: str = MODEL, only: str | None = None) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / file)
    cast = {k: v.to(dtype) if only in (None, k) else v for k, v in tensors.items()}
    save_file(cast, folder / file)
    write_manifest(folder, FILES)
    return cast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_are_cast(model_folder: Path, dtype: torch.dtype) -> None:
    stored = recast(model_folder, dtype)
    recast(model_folder, dtype, TOKENIZER)
    bundle = load_bundle(model_folder)
    for name, tensor in bundle.model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name].float()), name
    assert Pipeline(bundle)(class_labels=["cat"], seed=1, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
     torch.float8_e5m2],
)  # fmt: skip
@pytest.mark.parametrize("only", [None, "no_class"])
def test_all_else_is_refused(model_folder: Path, dtype: torch.dtype, only: str | None) -> None:
    recast(model_folder, dtype, only=only)
    with pytest.raises(CheckpointError) as caught:
        load_bundle(model_folder)
    text = str(caught.value)
    assert str(dtype).removeprefix("torch.") in text and "save it as float32" in text and str(model_folder) in text


def test_float64_that_float32_cannot_hold_is_refused(model_folder: Path) -> None:
    tensors = {k: v.double() for k, v in load_file(model_folder / MODEL).items()}
    tensors["no_class"][0, 0] = 1e300
    save_file(tensors, model_folder / MODEL)
    write_manifest(model_folder, FILES)
    with pytest.raises(CheckpointError, match="'no_class' has values that are not finite"):
        load_bundle(model_folder)


def test_a_flag_stays_a_flag(tmp_path: Path) -> None:
    bundle = make_bundle()
    bundle.tokenizer = KMeans(8, patch=2, channels=1, vocab=4)
    folder = save_bundle(bundle, tmp_path / "m")
    recast(folder, torch.int64, TOKENIZER, "measured")
    with pytest.raises(CheckpointError, match=r"'measured' is int64; save it as bool$"):
        load_bundle(folder)
