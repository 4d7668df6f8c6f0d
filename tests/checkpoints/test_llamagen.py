"""Official LlamaGen files: all their forms, mapped strictly, written back exactly; the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import official_tensors, randomise
from safetensors.torch import save_file
from torch import Tensor

import seriatim
from seriatim.checkpoints.llamagen import (
    CLASSES,
    ENTRIES,
    NAMES,
    TABLE,
    infer,
    llamagen_tensors,
    model_from_llamagen,
)
from seriatim.checkpoints.native import Bundle, save_bundle
from seriatim.checkpoints.official import read_official
from seriatim.checkpoints.shapes import named_preset
from seriatim.cli.main import run
from seriatim.conditions.captions import CaptionEmbedder, Captions
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.models.build import build_model, model_config, seeded
from seriatim.models.causal_model import CausalModel
from seriatim.tokenizers.base import Tokenizer
from seriatim.tokenizers.kinds import TOKENIZERS
from seriatim.tokenizers.vq import VQ
from seriatim.zoo import PRESETS

CONFIG: dict[str, Any] = {
    "kind": "causal", "tokens": 9, "vocab": 20, "width": 32, "depth": 2, "heads": 2, "hidden": 48, "classes": 5,
    "rotate_prefix": False, "dropout": 0.1, "head": {"kind": "categorical", "bias": False},
}  # fmt: skip
TEXT = {**CONFIG, "classes": 0, "caption_dim": 6, "caption_tokens": 4}


def small_model(seed: int = 0, **options: Any) -> CausalModel:
    with seeded(seed):
        model = build_model({**CONFIG, **options})
    randomise(model, seed)
    assert isinstance(model, CausalModel)
    return model.eval()


def tensors(seed: int = 0, **options: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in llamagen_tensors(small_model(seed, **options)).items()}


def load(path: Path, which: str | None = None, **options: Any) -> CausalModel:
    file = read_official(path, which=which, entries=ENTRIES)
    model = model_from_llamagen(file, **{"tokens": 9, "heads": 2, **options})
    assert isinstance(model, CausalModel)
    return model


def equal(a: CausalModel, b: CausalModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["model", "ema", "module", "state_dict", None])
def test_all_forms_of_a_torch_file(entry: str | None, tmp_path: Path) -> None:
    content: dict[str, Any] = tensors() if entry is None else {entry: tensors(), "steps": 3}
    torch.save(content, tmp_path / "c2i.pt")
    assert equal(load(tmp_path / "c2i.pt"), small_model())


def test_last_weights_unless_the_average_is_asked_for(tmp_path: Path) -> None:
    torch.save({"ema": tensors(1), "model": tensors(0)}, tmp_path / "c2i.pt")
    assert equal(load(tmp_path / "c2i.pt"), small_model(0)), "as the official samplers do"
    assert equal(load(tmp_path / "c2i.pt", "ema"), small_model(1))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_safetensors_file_in_half_precision(prefix: str, tmp_path: Path) -> None:
    save_file({prefix + k: v.bfloat16().contiguous() for k, v in tensors().items()}, tmp_path / "c2i.safetensors")
    model = load(tmp_path / "c2i.safetensors")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.conditioner.get_parameter("no_class")[0], tensors()[CLASSES][-1].bfloat16().float())


def test_what_is_no_weight_is_left_out(tmp_path: Path) -> None:
    more = {"freqs_cis": torch.zeros(10, 8, 2), "layers.1.attention.kv_cache.k_cache": torch.zeros(2, 2, 16, 16)}
    torch.save({"model": tensors() | more}, tmp_path / "c2i.pt")
    assert equal(load(tmp_path / "c2i.pt"), small_model())
    with pytest.raises(CheckpointError, match="was made for 9 tokens, the tokenizer makes 16"):
        load(tmp_path / "c2i.pt", tokens=16)


def test_the_training_scripts_arguments_tell_the_size_of_images(tmp_path: Path) -> None:
    for size in (48, 384):
        args = argparse.Namespace(gpt_model="GPT-B", image_size=size, downsample_size=16, dropout_p=0.2)
        torch.save({"model": tensors(), "args": args}, tmp_path / f"{size}.pt")
    assert load(tmp_path / "48.pt").backbone.dropout == 0.2
    with pytest.raises(CheckpointError, match=r"was made for 576 tokens, the tokenizer makes 9; give one for .*--size"):
        load(tmp_path / "384.pt")


def test_sizes_follow_from_shapes(tmp_path: Path) -> None:
    torch.save({"model": tensors()}, tmp_path / "c2i.pt")
    assert model_config(load(tmp_path / "c2i.pt")) == model_config(small_model())
    torch.save({"model": tensors(**TEXT)}, tmp_path / "t2i.pt")
    text = load(tmp_path / "t2i.pt")
    assert model_config(text) == model_config(small_model(**TEXT)) and isinstance(text.conditioner, CaptionEmbedder)
    captions = Captions(torch.randn(1, 4, 6), torch.tensor([[False, True, True, True]]))
    drawn = []
    for model in (text, small_model(**TEXT)):
        condition = model.condition(captions, 1)
        null, settings = model.null(1, like=condition), Settings(guidance_scale=2.0)
        drawn.append(model.sample(condition, null, Keys.of_seeds([0]), settings))
    assert torch.equal(*drawn)


def test_heads_come_from_the_preset_or_the_caller(tmp_path: Path) -> None:
    torch.save({"model": tensors()}, tmp_path / "c2i.pt")
    with pytest.raises(UsageError, match=r"heads: .*2 blocks of width 32, which is no preset's"):
        load(tmp_path / "c2i.pt", heads=None)
    with pytest.raises(CheckpointError, match="2 blocks of width 32, which is not llamagen-b"):
        load(tmp_path / "c2i.pt", preset="llamagen-b")
    with pytest.raises(CheckpointError, match=r"its shapes make no model .*heads: 5 does not divide"):
        load(tmp_path / "c2i.pt", heads=5)
    for name in NAMES:
        with torch.device("meta"):
            official = llamagen_tensors(build_model(PRESETS[name].original()))
        found = named_preset(infer(official, name), None, name, NAMES)
        assert found is not None and found.name == name


def missing(t: dict[str, Tensor]) -> None:
    del t["layers.1.attention.wo.weight"]


def missing_block(t: dict[str, Tensor]) -> None:
    for name in [n for n in t if n.startswith("layers.0.") and "w1" not in n]:
        del t[name]


def missing_classes(t: dict[str, Tensor]) -> None:
    del t[CLASSES]


def extra(t: dict[str, Tensor]) -> None:
    t["layers.1.attention.q_norm.weight"] = torch.ones(8)


def many_blocks(t: dict[str, Tensor]) -> None:
    t.update({f"layers.{i}.x": torch.ones(1) for i in range(600)})


def long_number(t: dict[str, Tensor]) -> None:
    t[f"layers.{'9' * 5000}.x"] = torch.ones(1)


def shape(t: dict[str, Tensor]) -> None:
    t["norm.weight"] = torch.zeros(33)


def not_finite(t: dict[str, Tensor]) -> None:
    t[CLASSES][5, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, "lacks tensor 'layers.1.attention.wo.weight'"),
        (missing_block, "lacks tensor 'layers.0.attention"),
        (missing_classes, f"lacks tensor '{CLASSES}'"),
        (extra, "has an unknown tensor 'layers.1.attention.q_norm.weight'"),
        (many_blocks, "has 600 blocks under the name 'layers'; at most 512 are built"),
        (long_number, "lacks tensor 'layers.2.*'"),
        (shape, "tensor 'norm.weight' has shape (33,), not (32,)"),
        (not_finite, f"'{CLASSES}, its last row' has values that are not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    damaged = tensors()
    change(damaged)
    torch.save({"model": damaged}, tmp_path / "c2i.pt")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "c2i.pt")
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, TEXT], ids=["classes", "text"])
def test_the_round_trip_is_exact(config: dict[str, Any], tmp_path: Path) -> None:
    before = tensors(**config)
    torch.save({"model": before}, tmp_path / "gpt.pt")
    back = llamagen_tensors(load(tmp_path / "gpt.pt"))
    assert back.keys() == before.keys() and all(torch.equal(back[name], before[name]) for name in back)
    assert len(TABLE) == len(set(TABLE.values()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rotate_prefix": True}, "rotate_prefix is False, not True"),
        ({"order": "random"}, "order is 'raster', not 'random'"),
        ({"head": {"kind": "categorical"}}, "head.bias is False, not True"),
        ({"norm": "layer"}, "norm is 'rms', not 'layer'"),
        ({"classes": 0}, "it has neither"),
    ],
)
def test_another_form_is_not_written(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        llamagen_tensors(small_model(**options))


# --- the command line ---------------------------------------------------------------------------------------------


class Nine(Tokenizer):
    """Nine grey squares of 20 levels."""

    def __init__(self, size: Any = (3, 3), vocab: int = 20) -> None:
        super().__init__()
        self.size = self.grid = (int(size[0]), int(size[1]))
        self.channels, self.levels, self.dim, self.vocab = 1, 256, 1, vocab
        self.config = {"size": list(self.size), "vocab": vocab}

    def decode(self, tokens: Tensor) -> Tensor:
        return (tokens / 19 * 2 - 1).view(-1, 1, *self.size)


@pytest.fixture
def vq(tmp_path: Path) -> Iterator[Path]:
    TOKENIZERS["nine"] = Nine
    yield save_bundle(Bundle(small_model(), Nine(), []), tmp_path / "vq")
    del TOKENIZERS["nine"]


def test_weights_in_images_out_weights_back(vq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": tensors()}, tmp_path / "c2i.pt")
    files = [str(tmp_path / "c2i.pt"), str(tmp_path / "out"), "--vq", str(vq)]
    assert run(["convert", "llamagen", *files]) == 2
    assert "no preset's" in capsys.readouterr().err
    assert run(["convert", "llamagen", *files, "--heads", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weights"], found["classes"], found["tokens"], found["preset"]) == ("model", 5, 9, None)
    pipe = seriatim.load(tmp_path / "out", device="cpu")
    result = pipe(class_labels=[1, "none"], guidance_scale=2.0, top_k=5, seed=0)
    assert result.images[0].size == (3, 3) and result.request.guidance_schedule == "constant"
    out = tmp_path / "back.pt"
    assert run(["export", "llamagen", str(tmp_path / "out"), str(out)]) == 0
    back = torch.load(out, weights_only=True)["model"]
    assert back.keys() == tensors().keys() and all(torch.equal(back[name], t) for name, t in tensors().items())
    capsys.readouterr()
    assert run(["convert", "llamagen", *files[:1], str(tmp_path / "x"), "--vq", str(tmp_path / "no")]) == 2
    assert "vq: there is no " in capsys.readouterr().err
    assert run(["convert", "llamagen", *files, "--preset", "llamagen-c"]) == 2
    assert "is not one of LlamaGen's" in capsys.readouterr().err


def test_a_tokenizer_of_another_vocabulary_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], vq: Path
) -> None:
    torch.save({"model": tensors(vocab=21)}, tmp_path / "c2i.pt")
    files = [str(tmp_path / "c2i.pt"), str(tmp_path / "out"), "--vq", str(vq), "--heads", "2"]
    assert run(["convert", "llamagen", *files]) == 2
    error = capsys.readouterr().err
    assert "vq: makes 9 tokens (codes of a vocabulary of 20) from 3x3 pixels, the model takes 9 (codes of" in error


def test_the_tokenizer_may_be_an_official_file(tmp_path: Path) -> None:
    with seeded(0):
        tokenizer = VQ(6, vocab=20, code_dim=4, latent_channels=32, block_out_channels=(32, 32), layers_per_block=1)
    torch.save({"model": official_tensors(tokenizer)}, tmp_path / "vq.pt")
    torch.save({"model": tensors()}, tmp_path / "c2i.pt")
    files = [str(tmp_path / "c2i.pt"), str(tmp_path / "out"), "--vq", str(tmp_path / "vq.pt"), "--heads", "2"]
    assert run(["convert", "llamagen", *files, "--size", "6"]) == 0
    pipe = seriatim.load(tmp_path / "out", device="cpu")
    assert pipe(class_labels=[1], seed=0).images[0].size == (6, 6)
    assert run(["convert", "llamagen", *files[:3], str(tmp_path / "vq.pt"), "--overwrite", "--size", "8"]) == 2
