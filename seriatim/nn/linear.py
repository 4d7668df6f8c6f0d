"""The Linear layer of all networks here: an `nn.Linear` that can apply an activation in the same call.

It is plain autograd, so jvp, vmap and double backward work. `nn/prepare.py` replaces it by a faster layer for sampling,
and `nn/onednn_training.py` by one that trains faster on some CPUs; both are called in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # the exact GELU
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
}


class Linear(nn.Linear):
    """A linear map with an optional activation: x (..., I) -> (..., O)."""

    replaceable = True  # a layer that computes the same numbers from other memory may replace this one

    def forward(self, x: Tensor, then: str = "none") -> Tensor:
        """x W^T + b, (..., O), followed by the activation that `then` names in ACTIVATIONS."""
        y = F.linear(x, self.weight, self.bias)
        return y if then == "none" else ACTIVATIONS[then](y)


def at_least_float32(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x in the dtype of `like`, or in its own, but never in less than float32.

    A model that is cast to float64 computes its loss in float64, and one that runs in half precision in float32.
    """
    return x.to(torch.promote_types((x if like is None else like).dtype, torch.float32))
