"""Weights packed for sampling: the same products, saved unpacked, refused where they can't be right."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_bundle, make_masked
from torch import nn

import seriatim
from seriatim.checkpoints.native import load_bundle, save_bundle
from seriatim.core.errors import UsageError
from seriatim.core.keys import Keys
from seriatim.core.settings import Settings
from seriatim.models.base import SequenceModel
from seriatim.models.build import parameter_count
from seriatim.nn import prepare as packed
from seriatim.nn.block import MLP
from seriatim.nn.linear import Linear
from seriatim.nn.prepare import PackedLinear, packs, prepare

pytestmark = pytest.mark.skipif(not packs(torch.float32), reason="this build of torch has no oneDNN products")


@pytest.fixture(autouse=True)
def pack_small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 1)


def prepare_model(model: SequenceModel, dtype: torch.dtype = torch.float32) -> None:
    prepare(model.backbone, dtype, keep=("token_embed",))
    prepare(model.head)


@pytest.mark.parametrize("rows", [(1,), (2,), (7,), (2, 33), (640,)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_same_product(rows: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(96, 130, bias=bias)
    x = torch.randn(*rows, 96)
    ours = PackedLinear(layer)
    assert torch.allclose(ours(x), layer(x), atol=1e-5)
    assert torch.equal(ours.weight, layer.weight), "unpacked exactly"
    assert torch.allclose(ours(x, then="gelu"), nn.functional.gelu(layer(x)), atol=1e-5)
    assert torch.allclose(ours(x, then="swish"), nn.functional.silu(layer(x)), atol=1e-5)
    if not packs(torch.bfloat16):
        return  # this processor has no such product
    half = PackedLinear(layer, torch.bfloat16)(x)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), layer(x), atol=0.05)


@torch.no_grad()
def test_an_mlp_is_packed_in_place() -> None:
    mlp: Any = MLP(32)
    x = torch.randn(5, 32)
    expected, plain = mlp(x), copy.deepcopy(mlp.state_dict())
    prepare(mlp)
    assert isinstance(mlp.fc1, PackedLinear) and isinstance(mlp.fc2, PackedLinear)
    assert torch.allclose(mlp(x), expected, atol=1e-5)
    assert all(torch.equal(value, plain[name]) for name, value in mlp.state_dict().items())
    assert mlp.state_dict().keys() == plain.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_draws_the_same(dtype: torch.dtype) -> None:
    if not packs(dtype):
        pytest.skip(f"this processor has no packed products in {dtype}")
    model = make_masked()
    settings = Settings(num_inference_steps=6, guidance_scale=2.0, head_options={"num_diffusion_steps": 8})

    def draw() -> torch.Tensor:
        condition = model.condition(torch.tensor([0, 2, -1]), 3)
        *_, last = model.steps(condition, model.null(3), Keys.of_seeds([1, 2, 3]), settings, dtype=dtype)
        return last.tokens

    plain = draw()
    prepare_model(model, dtype)
    assert isinstance(model.backbone.get_submodule("decoder.0.mlp.fc1"), PackedLinear)
    embed, head = model.backbone.token_embed, model.head.x_embed
    assert isinstance(embed, PackedLinear) and embed.dtype == torch.float32, "what meets tokens is not rounded"
    assert isinstance(head, PackedLinear) and head.dtype == torch.float32
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert torch.allclose(draw(), plain, atol=tolerance * float(plain.abs().max()))


def test_what_was_rounded_is_not_saved(tmp_path: Path) -> None:
    bundle = make_bundle()
    weights = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    prepare_model(bundle.model)
    again = load_bundle(save_bundle(bundle, tmp_path / "exact")).model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    if not packs(torch.bfloat16):
        return  # this processor rounds no weights
    rounded = make_bundle()
    prepare_model(rounded.model, torch.bfloat16)
    with pytest.raises(UsageError, match=r"was rounded to bfloat16 .* dtype=float32 to save it"):
        save_bundle(rounded, tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()


def test_it_is_for_sampling_on_this_cpu_only() -> None:
    layer = PackedLinear(nn.Linear(8, 8))
    with pytest.raises(UsageError, match=r"packed for sampling and have no gradients; .*prepare=False"):
        layer(torch.randn(2, 8, requires_grad=True))
    with pytest.raises(UsageError, match=r"is packed for sampling and takes no other values; .*prepare=False"):
        nn.Sequential(layer).load_state_dict({"0.weight": torch.zeros(8, 8), "0.bias": torch.zeros(8)})
    for move in (lambda: layer.to("meta"), lambda: layer.double()):
        with pytest.raises(UsageError, match="can't be moved or cast; load the model again"):
            move()
    assert layer.to("cpu") is layer and layer.float() is layer


def test_without_the_kernels_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "packs", lambda _dtype: False)
    mlp = MLP(32)
    prepare(mlp, torch.bfloat16)
    assert isinstance(mlp.fc1, nn.Linear) and mlp.fc1.weight.dtype == torch.float32


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_does_more_stays_as_it_is() -> None:
    watched = nn.Linear(8, 8)
    watched.register_forward_hook(lambda *_: None)
    normed = nn.utils.parametrizations.weight_norm(Linear(8, 8))
    layers = nn.Sequential(Doubled(8, 8), watched, normed, nn.Linear(8, 8), Linear(8, 8))
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = layers(x)
        prepare(layers)
        assert [isinstance(layer, PackedLinear) for layer in layers] == [False, False, False, True, True]
        assert torch.allclose(layers(x), expected, atol=1e-5)


def test_a_packed_model_counts_and_copies_as_before() -> None:
    bundle = make_bundle()
    count = parameter_count(bundle.model)
    prepare_model(bundle.model)
    assert parameter_count(bundle.model) == count
    decoder: Any = bundle.model.backbone.decoder
    sent = pickle.loads(pickle.dumps(decoder))  # what a process that is spawned receives
    for other in (copy.deepcopy(decoder), sent):
        x = torch.randn(2, 5, 32)
        with torch.no_grad():
            assert torch.equal(other[0](x), decoder[0](x))


def test_load_without_preparing_gives_a_model_to_train(tmp_path: Path) -> None:
    folder = save_bundle(make_bundle(), tmp_path / "m")
    plain, ready = seriatim.load(folder, device="cpu", prepare=False), seriatim.load(folder, device="cpu")
    assert isinstance(ready.model.backbone.token_embed, PackedLinear)
    tokens = torch.randn(2, 16, 4)
    plain.model(tokens, torch.tensor([0, 1])).mean.backward()
    assert plain.model.backbone.get_parameter("token_embed.weight").grad is not None
    with pytest.raises(UsageError, match="prepare=False"):
        ready.model(tokens, torch.tensor([0, 1])).mean.backward()
