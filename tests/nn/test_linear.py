"""The product of oneDNN in training: the same numbers and gradients as `nn.Linear`, where it is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.core.errors import UsageError
from seriatim.nn import onednn_training
from seriatim.nn.block import MLP
from seriatim.nn.linear import ACTIVATIONS, Linear
from seriatim.nn.onednn_training import OneDNNLinear, prepare_training
from seriatim.nn.prepare import CastLinear, PackedLinear, packs

pytestmark = pytest.mark.skipif(not packs(torch.float32), reason="this build of torch has no oneDNN products")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_training, "WORTHWHILE", 1)
    monkeypatch.setattr(onednn_training, "mkl_is_slow", lambda: True)


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = OneDNNLinear(Linear(24, 40, bias=bias)), torch.randn(*shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 40).transpose(0, -2).contiguous().transpose(0, -2)  # not contiguous
    inputs = [x, *layer.parameters()]
    ours, usual = layer(x), F.linear(x, layer.weight, layer.bias)
    assert type(ours.grad_fn).__name__ == "ProductBackward" and torch.allclose(ours, usual, atol=1e-5)
    expected = torch.autograd.grad(usual, inputs, grad)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_only_what_is_asked_for() -> None:
    layer, x = OneDNNLinear(Linear(24, 40)), torch.randn(5, 24)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and x.grad is None
    frozen = OneDNNLinear(Linear(24, 40)).requires_grad_(False)
    y = torch.randn(5, 24, requires_grad=True)
    frozen(y).sum().backward()
    assert y.grad is not None and frozen.weight.grad is None


def uses(layer: Linear, x: Tensor) -> bool:
    return type(layer(x).grad_fn).__name__ == "ProductBackward"


def test_elsewhere_it_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = OneDNNLinear(Linear(24, 40)), torch.randn(5, 24)
    assert uses(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not uses(layer, x)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not uses(layer.double(), x.double())
    monkeypatch.setattr(onednn_training, "WORTHWHILE", 1 << 30)
    assert not uses(OneDNNLinear(Linear(24, 40)), x)


@pytest.mark.parametrize("then", ACTIVATIONS)
def test_an_activation_in_the_same_call(then: str) -> None:
    plain = Linear(24, 40)
    x = torch.randn(5, 24)
    expected = ACTIVATIONS[then](F.linear(x, plain.weight, plain.bias))
    for layer in (plain, OneDNNLinear(plain), PackedLinear(plain), CastLinear(plain, torch.float32)):
        with torch.no_grad():
            assert torch.allclose(layer(x, then=then), expected, atol=1e-5), type(layer).__name__


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, inside its jvp
def test_the_default_has_every_derivative() -> None:
    layer, x = Linear(24, 40), torch.randn(24)
    tangent = torch.func.jvp(layer, (x,), (torch.ones(24),))[1]
    assert torch.allclose(tangent, layer.weight.sum(dim=1), atol=1e-5)
    assert torch.func.vmap(layer)(torch.randn(3, 24)).shape == (3, 40)


def test_a_model_trains_with_its_own_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP(8)
    before, names = list(model.parameters()), list(model.state_dict())
    prepare_training(model)
    assert isinstance(model.fc1, OneDNNLinear) and list(model.state_dict()) == names
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True)), "an optimiser holds these"
    monkeypatch.setattr(onednn_training, "mkl_is_slow", lambda: False)
    other = MLP(8)
    prepare_training(other)
    assert type(other.fc1) is Linear


def test_weights_are_cast_once() -> None:
    """What autocast gives, with weights that it need not cast at every call."""
    layer, x = Linear(64, 80), torch.randn(5, 64)
    cast = CastLinear(layer, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cast(x, then="gelu"), layer(x, then="gelu"))
    assert cast.weight.dtype == torch.bfloat16 and not cast.weight.requires_grad
    with pytest.raises(UsageError, match="was rounded to bfloat16 for sampling"):
        cast.state_dict()
    with pytest.raises(UsageError, match="cast for sampling and have no gradients"):
        cast(x.requires_grad_())
