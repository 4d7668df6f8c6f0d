"""Official MAR files: read safely, mapped strictly, written back exactly."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomise
from safetensors.torch import save_file
from torch import Tensor

from seriatim.backbones.masked_transformer import Masked
from seriatim.checkpoints.mar import (
    ENTRIES,
    NAMES,
    TABLE,
    infer,
    mar_tensors,
    model_from_mar,
    official_name,
    patch_of,
)
from seriatim.checkpoints.official import one_file, read_official
from seriatim.checkpoints.shapes import named_preset
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.heads.diffusion import Diffusion
from seriatim.models.build import build_model, model_config, seeded
from seriatim.models.masked_model import MaskedModel
from seriatim.zoo import PRESETS


def small_model(seed: int = 0) -> MaskedModel:
    """Every size different, so that no two can be mistaken for each other."""
    with seeded(seed):
        backbone = Masked(16, 12, width=(32, 24), depth=(2, 1), heads=(4, 3), buffer=5, mlp_ratio=2.0, dropout=0.0)
        model = MaskedModel(backbone, Diffusion(12, 40, 3), classes=7)
    randomise(model, seed)
    return model


def arguments() -> argparse.Namespace:
    return argparse.Namespace(model="mar_tiny", diffusion_batch_mul=2, proj_dropout=0.0, label_drop_prob=0.2, cfg=2.5)


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    """A training checkpoint as the official script writes it: two state dicts, an optimiser, its arguments."""
    last, average = mar_tensors(small_model(0)), mar_tensors(small_model(1))
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    content = {
        "model": last,
        "model_ema": average,
        "optimizer": optimiser.state_dict(),
        "epoch": 3,
        "args": arguments(),
    }
    torch.save(content, tmp_path / "checkpoint-last.pth")
    return tmp_path / "checkpoint-last.pth"


def load(path: Path, which: str | None = None) -> MaskedModel:
    model = model_from_mar(read_official(path, which=which, entries=ENTRIES), heads=(4, 3))
    assert isinstance(model, MaskedModel)
    return model


def equal(a: MaskedModel, b: MaskedModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- reading ------------------------------------------------------------------------------------------------------


def test_average_or_last_weights(pth: Path) -> None:
    assert equal(load(pth), small_model(1)) and equal(load(pth, "model_ema"), small_model(1))
    assert equal(load(pth, "model"), small_model(0)) and not equal(load(pth, "model"), small_model(1))
    with pytest.raises(UsageError, match="holds no 'ema'; it holds 'model_ema', 'model'"):
        load(pth, "ema")


def test_what_the_script_was_told_comes_along(pth: Path) -> None:
    config = model_config(load(pth))
    assert config["head"]["draws"] == 2 and config["label_dropout"] == 0.2 and config["dropout"] == 0.0
    assert (config["width"], config["depth"], config["heads"]) == ([32, 24], [2, 1], [4, 3])
    assert (config["tokens"], config["dim"], config["buffer"], config["classes"]) == (16, 12, 5, 7)
    assert config["mlp_ratio"] == 2.0 and (config["head"]["width"], config["head"]["depth"]) == (40, 3)


@pytest.mark.parametrize("zipped", [True, False])
def test_old_and_new_torch_files(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(mar_tensors(small_model()), path, _use_new_zipfile_serialization=zipped)
    assert equal(load(path), small_model())


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_one_safetensors_file(tmp_path: Path, prefix: str) -> None:
    save_file({prefix + k: v.contiguous() for k, v in mar_tensors(small_model()).items()}, tmp_path / "mar.safetensors")
    assert equal(load(tmp_path / "mar.safetensors"), small_model())
    assert equal(load(tmp_path / "mar.safetensors", "model_ema"), small_model())  # one nameless state dict


def test_two_state_dicts_in_one_safetensors_file(tmp_path: Path) -> None:
    both = {"model": small_model(0), "model_ema": small_model(1)}
    named = {f"{entry}.{k}": v.contiguous() for entry, m in both.items() for k, v in mar_tensors(m).items()}
    save_file(named, tmp_path / "mar.safetensors")
    assert equal(load(tmp_path / "mar.safetensors"), small_model(1))
    assert equal(load(tmp_path / "mar.safetensors", "model"), small_model(0))


def test_a_folder_with_one_file_for_each_size(tmp_path: Path) -> None:
    for i, name in enumerate(("mar-base", "mar-large", "mar-huge")):
        save_file({k: v.contiguous() for k, v in mar_tensors(small_model(i)).items()}, tmp_path / f"{name}.safetensors")
    assert equal(load(one_file(tmp_path, "mar-large")), small_model(1))
    with pytest.raises(UsageError, match="holds mar-base, mar-huge, mar-large; name one"):
        one_file(tmp_path, None)
    assert one_file(tmp_path / "mar-base.safetensors", None).name == "mar-base.safetensors"


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    half = {k: v.half().contiguous() for k, v in mar_tensors(small_model()).items()}
    save_file(half, tmp_path / "mar.safetensors")
    model = load(tmp_path / "mar.safetensors")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    ours, theirs = (m.conditioner.get_parameter("no_class") for m in (model, small_model()))
    assert torch.equal(ours, theirs.half().float())


def wrapped(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in mar_tensors(small_model()).items()}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "module.module._orig_mod._orig_mod.",
        "model._orig_mod.module.",
        "module._fsdp_wrapped_module.",
    ],
)
def test_names_of_wrappers_are_left_out(tmp_path: Path, prefix: str, suffix: str) -> None:
    """Data-parallel training, torch.compile and FSDP may be nested in any order."""
    path = tmp_path / f"mar.{suffix}"
    tensors = {name: tensor.contiguous() for name, tensor in wrapped(prefix).items()}
    if suffix == "pth":
        torch.save({"model": tensors}, path)
    else:
        save_file(tensors, path)
    assert equal(load(path), small_model())


def test_a_part_that_was_compiled_alone(tmp_path: Path) -> None:
    tensors = {name.replace("encoder_blocks.1.", "encoder_blocks.1._orig_mod."): t for name, t in wrapped("").items()}
    torch.save({"model": tensors}, tmp_path / "mar.pth")
    assert equal(load(tmp_path / "mar.pth"), small_model())
    tensors["encoder_blocks.1.norm1.bias"] = torch.zeros(32)  # it would be the same name
    torch.save({"model": tensors}, tmp_path / "mar.pth")
    with pytest.raises(CheckpointError, match=r"lacks tensor 'encoder_blocks\.1\."):
        load(tmp_path / "mar.pth")


@pytest.mark.parametrize("entry", ["model_ema", "ema", "ema_state_dict", "vq", "vq_ema", "net"])
def test_the_only_weights_are_taken_whatever_their_entry_is_called(tmp_path: Path, entry: str) -> None:
    content = {"epoch": 3, entry: wrapped("module."), "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, tmp_path / "mar.pth")
    assert equal(load(tmp_path / "mar.pth"), small_model())
    assert read_official(tmp_path / "mar.pth").which == entry


def test_among_unknown_entries_the_average_comes_first(tmp_path: Path) -> None:
    torch.save({"vq": mar_tensors(small_model(0)), "vq_ema": mar_tensors(small_model(1))}, tmp_path / "mar.pth")
    assert equal(load(tmp_path / "mar.pth"), small_model(1)) and equal(load(tmp_path / "mar.pth", "vq"), small_model(0))


def test_scalars_beside_weights_are_left_out(tmp_path: Path) -> None:
    beside = {"epoch": 3, "loss": np.float64(0.3), "steps": np.int64(7), "time": 1.5, "name": "mar", "none": None}
    more = {"decay": torch.tensor(0.999), "num_updates": torch.tensor(4)}
    for content in ({"model": wrapped(""), **beside}, wrapped("module.") | beside, {"model": wrapped("") | more}):
        torch.save(content, tmp_path / "mar.pth")
        assert equal(load(tmp_path / "mar.pth"), small_model())


# --- what must not happen -----------------------------------------------------------------------------------------


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["entry", "argument", "whole"])
def test_no_pickle_is_run(tmp_path: Path, where: str, zipped: bool) -> None:
    canary = Canary(tmp_path / "ran")
    state = {k: v for k, v in mar_tensors(small_model()).items()}
    content: Any = {
        "entry": {"model": state, "extra": canary},
        "argument": {"model": state, "args": argparse.Namespace(hook=canary)},
        "whole": canary,
    }[where]
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"more than tensors .*mkdir.* nothing of it was run") as caught:
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(canary))
    assert (tmp_path / "ran").exists(), "the canary would have sung"


def test_the_allow_list_is_not_left_open(pth: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    load(pth)
    assert set(torch.serialization.get_safe_globals()) == before and argparse.Namespace not in before


def damaged(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = {k: v.contiguous().clone() for k, v in mar_tensors(small_model()).items()}
    change(tensors)
    save_file(tensors, path)
    return path


def missing(t: dict[str, Tensor]) -> None:
    del t["encoder_blocks.1.attn.qkv.bias"]


def missing_embedding(t: dict[str, Tensor]) -> None:
    del t["z_proj.weight"]


def missing_block(t: dict[str, Tensor]) -> None:
    for name in [n for n in t if n.startswith("encoder_blocks.0.") and "fc1" not in n]:
        del t[name]


def extra(t: dict[str, Tensor]) -> None:
    t["encoder_blocks.1.attn.q_norm.weight"] = torch.ones(8)


def many_blocks(t: dict[str, Tensor]) -> None:
    t.update({f"diffloss.net.res_blocks.{i}.x": torch.ones(1) for i in range(600)})


def long_number(t: dict[str, Tensor]) -> None:
    t[f"encoder_blocks.{'9' * 5000}.x"] = torch.ones(1)


def shape(t: dict[str, Tensor]) -> None:
    t["decoder_norm.bias"] = torch.zeros(25)


def not_finite(t: dict[str, Tensor]) -> None:
    t["diffloss.net.input_proj.bias"][3] = float("nan")


def few_positions(t: dict[str, Tensor]) -> None:
    t["encoder_pos_embed_learned"] = torch.zeros(1, 16, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, "lacks tensor 'encoder_blocks.1.attn.qkv.bias'"),
        (missing_embedding, "lacks tensor 'z_proj.weight'"),
        (missing_block, "lacks tensor 'encoder_blocks.0."),
        (extra, "has an unknown tensor 'encoder_blocks.1.attn.q_norm.weight'"),
        (many_blocks, "has 600 blocks under the name 'diffloss.net.res_blocks'; at most 512 are built"),
        (long_number, "lacks tensor 'encoder_blocks."),
        (shape, "tensor 'decoder_norm.bias' has shape (25,), not (24,)"),
        (not_finite, "tensor 'diffloss.net.input_proj.bias' has values that are not finite"),
        (few_positions, "'encoder_pos_embed_learned' has 16 rows for 16 tokens"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    path = damaged(tmp_path / "mar.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path, pth: Path) -> None:
    with pytest.raises(UsageError, match="is no file"):
        read_official(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("Not found")
    (tmp_path / "cut.pth").write_bytes(pth.read_bytes()[:-5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("Not found")
    for name in ("text.pth", "cut.pth", "empty.pth", "text.safetensors"):
        with pytest.raises(CheckpointError) as caught:
            read_official(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value), name
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds list, not a mapping"):
        read_official(tmp_path / "list.pth")
    torch.save({"model": {"weight": 3}}, tmp_path / "number.pth")
    with pytest.raises(CheckpointError, match="entry 'weight' is int, not a tensor"):
        read_official(tmp_path / "number.pth")


def test_heads_come_from_the_preset_or_the_caller(pth: Path) -> None:
    file = read_official(pth, entries=ENTRIES)
    with pytest.raises(UsageError, match=r"heads: .*2\+1 blocks of width 32, which is no preset's"):
        model_from_mar(file)
    with pytest.raises(CheckpointError, match=r"2 blocks of width 32, which is not mar-b"):
        model_from_mar(file, preset="mar-b")
    with pytest.raises(CheckpointError, match=r"its shapes make no model .*heads: 5 does not divide"):
        model_from_mar(file, heads=5)


def test_a_preset_that_is_not_mars_lends_no_heads(tmp_path: Path) -> None:
    """mar-digits has this trunk, but nobody says that these weights are its."""
    with seeded(0):
        model = MaskedModel(Masked(16, 4, width=128, depth=2, heads=2, buffer=4), Diffusion(4, 16, 1), classes=3)
    save_file({k: v.contiguous() for k, v in mar_tensors(model).items()}, tmp_path / "mine.safetensors")
    with pytest.raises(UsageError, match=r"heads: .*no preset's"):
        model_from_mar(read_official(tmp_path / "mine.safetensors", entries=ENTRIES))


def test_sizes_of_a_preset_are_recognised() -> None:
    for name in ("mar-b", "mar-l", "mar-h"):
        with torch.device("meta"):
            tensors = mar_tensors(build_model(PRESETS[name].model))
        found = named_preset(infer(tensors, name), None, name, NAMES)
        assert found is not None and found.name == name


# --- writing ------------------------------------------------------------------------------------------------------


def test_the_round_trip_is_exact(pth: Path) -> None:
    file = read_official(pth, entries=ENTRIES)
    back = mar_tensors(load(pth))
    assert back.keys() == file.tensors.keys()
    assert all(torch.equal(back[name], file.tensors[name]) for name in back)
    assert len({official_name(name) for name in load(pth).state_dict()}) == len(back)
    assert len(TABLE) == len(set(TABLE.values()))


def test_only_masked_models_with_a_diffusion_head_are_written() -> None:
    class Other(MaskedModel):
        pass

    model = small_model()
    other = Other(model.backbone, Diffusion(12, 40, 3), classes=7)
    with pytest.raises(UsageError, match="Other can't be written as MAR"):
        mar_tensors(other)
    model.register_parameter("surplus", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(UsageError, match="'surplus' has no counterpart"):
        mar_tensors(model)


def test_patches_of_latents() -> None:
    assert patch_of(16, 16) == 1 and patch_of(16, 4) == 2 and patch_of(64, 16) == 2
    with pytest.raises(UsageError, match="tokens of 24 features are no patches"):
        patch_of(24, 4)


def test_a_state_dict_under_its_usual_other_name(tmp_path: Path) -> None:
    torch.save({"state_dict": mar_tensors(small_model()), "epoch": 3}, tmp_path / "last.ckpt")
    assert equal(load(tmp_path / "last.ckpt"), small_model())
    assert equal(load(tmp_path / "last.ckpt", "model"), small_model())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("diffusion_batch_mul", "abc", "argument diffusion_batch_mul is 'abc', not a number"),
        ("diffusion_batch_mul", 0, "argument diffusion_batch_mul is 0; it must be from 1"),
        ("proj_dropout", None, "argument proj_dropout is None, not a number"),
        ("proj_dropout", 7, "argument proj_dropout is 7; it must be from 0 to 1"),
        ("label_drop_prob", float("nan"), "argument label_drop_prob is nan, not a number"),
    ],
)
def test_odd_arguments_are_named(tmp_path: Path, name: str, value: Any, words: str) -> None:
    told = arguments()
    setattr(told, name, value)
    torch.save({"model": mar_tensors(small_model()), "args": told}, tmp_path / "mar.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "mar.pth")
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["sparse", "complex", "integer", "too large"])
def test_only_plain_numbers_are_read(tmp_path: Path, kind: str) -> None:
    tensors = {k: v.clone() for k, v in mar_tensors(small_model()).items()}
    weight = tensors["decoder_embed.weight"]
    tensors["decoder_embed.weight"] = {
        "sparse": weight.to_sparse(), "complex": weight.to(torch.complex64), "integer": weight.long(),
        "too large": weight.double() * 1e300,
    }[kind]  # fmt: skip
    torch.save(tensors, tmp_path / "mar.pth")
    with pytest.raises(CheckpointError, match=r"tensor 'decoder_embed\.weight'"):
        load(tmp_path / "mar.pth")


def test_a_bare_pickle_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps({"model": Canary(tmp_path / "ran")}, protocol=4))
    with pytest.raises(CheckpointError, match="more than tensors"):  # and no warning, which would be an error here
        load(tmp_path / "bare.ckpt")
    assert not (tmp_path / "ran").exists()


def test_flipped_bits_are_told(tmp_path: Path, pth: Path) -> None:
    """Wherever a bit flips in the part that says what the file is, it loads or it is one line."""
    whole, random = pth.read_bytes(), torch.Generator().manual_seed(0)
    start = whole.index(b"data.pkl")
    for _ in range(150):
        damaged_file = bytearray(whole)
        place = start + int(torch.randint(2000, (), generator=random))
        damaged_file[place] ^= 1 << int(torch.randint(8, (), generator=random))
        (tmp_path / "flipped.pth").write_bytes(damaged_file)
        try:
            load(tmp_path / "flipped.pth")
        except (CheckpointError, UsageError) as error:
            assert "\n" not in str(error)
