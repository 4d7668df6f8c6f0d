"""Linear layers for sampling, whose weights are packed once for the CPU's kernels (oneDNN), or cast once elsewhere.

These layers have no gradients. On a CPU the usual product uses MKL, which packs the weights again at each call and
leaves half of the vector units of some processors idle. With few rows, as in a head, that takes most of the time
(docs/log.md has the figures).

N rows, I features in, O features out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from typing_extensions import override

from seriatim.core.errors import UsageError
from seriatim.nn.linear import Linear

UNPACKED = "use seriatim.load(..., prepare=False).model"
SMALLEST = 1 << 12  # layers with fewer weights are left as they are, because the call itself takes most of their time


class PackedLinear(nn.Module):
    """An `nn.Linear` with packed weights, which computes in their dtype: x (..., I) -> (..., O)."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = dtype or layer.weight.dtype
        self.exact = self.dtype == layer.weight.dtype
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(self.dtype), None)
        self.offset = None if layer.bias is None else layer.bias.detach().to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """An unpacked copy of the weights: (O, I)."""
        return self.packed.to_dense()

    @property
    def bias(self) -> Tensor | None:
        return self.offset

    @property
    def held(self) -> int:
        """The number of weights and biases, which are not torch parameters any more."""
        return self.in_features * self.out_features + (0 if self.offset is None else self.out_features)

    def forward(self, x: Tensor, then: str = "none") -> Tensor:
        """x (..., I) -> (..., O), followed by the activation `then`, which is fused into the same kernel.

        `then` is "none", "gelu" (exact), "gelu-tanh" or "swish" (SiLU).
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise UsageError(f"model: its weights are packed for sampling and have no gradients; {UNPACKED}")
        then, _, form = then.partition("-")
        form = form or "none" if then == "gelu" else ""  # the approximation of the GELU
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.offset, then, [], form)

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.exact:
            raise UsageError(rounded(prefix, self.dtype))
        destination[prefix + "weight"] = self.weight
        if self.offset is not None:
            destination[prefix + "bias"] = self.offset

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        raise UsageError(f"{prefix}weight: is packed for sampling and takes no other values; {UNPACKED}")

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        probe = fn(torch.empty(0, dtype=torch.float32, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise UsageError("device: weights packed for this CPU can't be moved or cast; load the model again instead")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return self  # a packed layer is immutable, so a copy may share it

    def __reduce__(self) -> tuple[Any, ...]:
        return repacked, (self.weight, self.offset, self.exact)


class CastLinear(Linear):
    """A `Linear` that computes as under autocast, but whose weights were cast only once."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor, then: str = "none") -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise UsageError(f"model: its weights are cast for sampling and have no gradients; {UNPACKED}")
        return super().forward(x.to(self.weight.dtype), then)

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise UsageError(rounded(prefix, self.weight.dtype))


def rounded(prefix: str, dtype: torch.dtype) -> str:
    """The error message for saving weights that were rounded to `dtype`."""
    return (
        f"{prefix}weight: was rounded to {str(dtype).removeprefix('torch.')} for sampling; "
        "load the model with dtype=float32 to save it"
    )


def repacked(weight: Tensor, bias: Tensor | None, exact: bool) -> PackedLinear:
    """The packed layer of unpickled weights (O, I) and bias (O,)."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    layer = PackedLinear(plain)
    layer.exact = exact
    return layer


@torch.no_grad()
def agrees(dtype: torch.dtype) -> bool:
    """True if a product with packed weights in `dtype` agrees with the usual product."""
    cpu: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    layer = nn.Linear(64, 64, **cpu)
    layer.weight.copy_(torch.linspace(-1, 1, 64 * 64, **cpu).reshape(64, 64))
    layer.bias.copy_(torch.linspace(-1, 1, 64, **cpu))
    x = torch.linspace(-1, 1, 3 * 64, **cpu).reshape(3, 64)
    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-4  # for values up to 20
    with torch.autocast("cpu", enabled=False):
        return bool(torch.allclose(PackedLinear(layer, dtype)(x).float(), layer(x), rtol=0, atol=tolerance))


@lru_cache(maxsize=2)
def packs(dtype: torch.dtype) -> bool:
    """True if this build of torch has the oneDNN kernels, and they agree with the usual product."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    try:
        return agrees(dtype)
    except (RuntimeError, AttributeError):  # this version of torch lacks the kernels or has other signatures
        return False


def prepare(module: nn.Module, dtype: torch.dtype = torch.float32, keep: tuple[str, ...] = ()) -> None:
    """Prepare every large Linear inside `module` for sampling in `dtype`; layers named in `keep` stay in float32.

    On a CPU the weights are packed, elsewhere they are cast. The module is changed in place, layer by layer, so that
    the weights are never in memory twice. A layer that does more than `nn.Linear` (a subclass, hooks, a
    parametrisation) is not changed.
    """
    found = False
    for name, child in module.named_modules():
        for key, layer in list(child.named_children()):
            if not usual(layer) or layer.weight.numel() < SMALLEST or layer.weight.dtype != torch.float32:
                continue
            wanted = torch.float32 if f"{name}.{key}".lstrip(".") in keep else dtype
            if layer.weight.device.type != "cpu":
                if wanted != torch.float32:
                    setattr(child, key, CastLinear(layer, wanted))
            elif packs(wanted):
                setattr(child, key, PackedLinear(layer, wanted))
                found = True
    if found:  # the remaining tensors may be mapped from a file of all weights; copying them lets that memory go
        for tensor in module.parameters():
            tensor.data = tensor.data.clone()


def usual(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """True if a layer is a plain `nn.Linear`, or a subclass marked as replaceable, without hooks."""
    kind = type(layer)
    plain = kind is nn.Linear or "replaceable" in vars(kind)
    return plain and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
