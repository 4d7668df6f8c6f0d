"""The product of oneDNN in training: the same numbers and gradients as `nn.Linear`, where it is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.nn import linear
from seriatim.nn.linear import Linear
from seriatim.nn.packed import packs

pytestmark = pytest.mark.skipif(not packs(torch.float32), reason="this build of torch has no oneDNN products")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WORTHWHILE", 1)
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: True)


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = Linear(24, 40, bias=bias), torch.randn(*shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 40).transpose(0, -2).contiguous().transpose(0, -2)  # not contiguous
    inputs = [x, *layer.parameters()]
    ours, usual = layer(x), F.linear(x, layer.weight, layer.bias)
    assert type(ours.grad_fn).__name__ == "ProductBackward" and torch.allclose(ours, usual, atol=1e-5)
    expected = torch.autograd.grad(usual, inputs, grad)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_only_what_is_asked_for() -> None:
    layer, x = Linear(24, 40), torch.randn(5, 24)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and x.grad is None
    frozen = Linear(24, 40).requires_grad_(False)
    y = torch.randn(5, 24, requires_grad=True)
    frozen(y).sum().backward()
    assert y.grad is not None and frozen.weight.grad is None


def uses(layer: Linear, x: Tensor) -> bool:
    return type(layer(x).grad_fn).__name__ == "ProductBackward"


def test_elsewhere_it_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(24, 40), torch.randn(5, 24)
    assert uses(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not uses(layer, x)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not uses(layer.double(), x.double())
    monkeypatch.setattr(linear, "WORTHWHILE", 1 << 30)
    assert not uses(Linear(24, 40), x)
