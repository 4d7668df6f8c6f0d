"""Trains in float32 with the products of oneDNN, on CPUs of which MKL uses only half of the vector units.

On such CPUs the usual product takes about twice as long as oneDNN's (docs/log.md), forward and backward. Weights, names
and results are those of `Linear`, except for rounding. Unlike `Linear`, it has no forward-mode derivative.

N rows, I features in, O features out.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seriatim.nn.linear import ACTIVATIONS, Linear
from seriatim.nn.prepare import packs

WORTHWHILE = 1 << 27  # for products of fewer multiplications, packing costs more time than it saves


class OneDNNLinear(Linear):
    """A `Linear` that computes large products by oneDNN; it shares the parameters of `layer`."""

    replaceable = True

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor, then: str = "none") -> Tensor:
        if (
            torch.is_grad_enabled()
            and x.dtype == self.weight.dtype == torch.float32
            and x.device.type == "cpu"
            and x.numel() * self.out_features >= WORTHWHILE
            and not torch.is_autocast_enabled("cpu")
        ):
            y = Product.apply(x, self.weight, self.bias)
            return y if then == "none" else ACTIVATIONS[then](y)
        return super().forward(x, then)


def prepare_training(model: nn.Module) -> None:
    """Replace each Linear of a model by one that trains faster, if this machine's CPU benefits from it.

    The parameters stay the same tensors, so this may be called before or after the optimiser is built. The model must
    be on the CPU.
    """
    if not mkl_is_slow():
        return
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is Linear:
                setattr(module, name, OneDNNLinear(layer))


class Product(torch.autograd.Function):
    """x W^T + b and its gradients, computed by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (N, O)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if of_x else None,
            product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if of_weight else None,  # (O, N) x (I, N)^T
            rows.sum(dim=0) if of_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., O), from x (..., I) and the weight (O, I), computed by oneDNN."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


@lru_cache(maxsize=1)
def mkl_is_slow() -> bool:
    """True if MKL uses only half of this processor's vector units: on AMD processors with AVX-512, under Linux."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in info and "avx512f" in info and packs(torch.float32)
