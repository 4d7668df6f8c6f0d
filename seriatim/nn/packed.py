"""Weights laid out once for the CPU's matrix kernels (oneDNN), for sampling: the same numbers, no gradients.

The usual product goes through MKL, which packs the weights again at each call and leaves half of the vector units of
some processors idle. With few rows, as in a head, that is most of the time (docs/log.md has the figures).

N rows, I and O features in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from seriatim.core.errors import UsageError

SMALLEST = 1 << 12  # weights from which packing pays: below, the call itself is most of the time


class PackedLinear(nn.Module):
    """What the `nn.Linear` gives, in the dtype of the packed weights: x (..., I) -> (..., O)."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = dtype or layer.weight.dtype
        self.exact = self.dtype == layer.weight.dtype
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(self.dtype), None)
        self.offset = None if layer.bias is None else layer.bias.detach().to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """(O, I), unpacked: a copy."""
        return self.packed.to_dense()

    @property
    def bias(self) -> Tensor | None:
        return self.offset

    def forward(self, x: Tensor, then: str = "none") -> Tensor:
        """`then` is "none", "gelu" (the exact one) or "swish" (SiLU), in the same pass over the memory."""
        assert not (torch.is_grad_enabled() and x.requires_grad), "packed weights have no gradients: for sampling only"
        form = "none" if then == "gelu" else ""  # of the GELU: not tanh's
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.offset, then, [], form)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.exact:
            raise UsageError(
                f"{prefix}weight: was rounded to {str(self.dtype).removeprefix('torch.')} for sampling; "
                "load the model with dtype=float32 to save it"
            )
        destination[prefix + "weight"] = self.weight
        if self.offset is not None:
            destination[prefix + "bias"] = self.offset

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        probe = fn(torch.empty(0, dtype=torch.float32))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise UsageError("device: weights packed for this CPU can't be moved or cast; load the model anew for that")
        return self


@lru_cache(maxsize=2)
def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the kernels, and they agree with the usual product."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    layer = nn.Linear(64, 64, device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 64 * 64).reshape(64, 64))
        layer.bias.copy_(torch.linspace(-1, 1, 64))
        x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)
        try:
            ours = PackedLinear(layer, dtype)(x).float()
        except (RuntimeError, AttributeError):  # not built in, or of another form in this version
            return False
        return bool(torch.allclose(ours, layer(x), rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0.05))


def prepare(module: nn.Module, dtype: torch.dtype = torch.float32, keep: tuple[str, ...] = ()) -> None:
    """Every large Linear inside `module`: packed on a CPU, and in `dtype`; those named in `keep` in float32.

    In place, layer by layer, so that weights are never held twice: for a module of one's own, for sampling only.
    """
    for name, child in module.named_modules():
        for key, layer in list(child.named_children()):
            if not isinstance(layer, nn.Linear) or layer.weight.numel() < SMALLEST:
                continue
            wanted = torch.float32 if f"{name}.{key}".lstrip(".") in keep else dtype
            if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and packs(wanted):
                setattr(child, key, PackedLinear(layer, wanted))


def version(module: nn.Module) -> tuple[int, ...]:
    """Changes when a weight does: for what is computed from weights alone and kept."""
    numbers: list[int] = []
    for tensor in module.parameters():
        numbers += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return (*numbers, *(id(m) for m in module.modules() if isinstance(m, PackedLinear)))
