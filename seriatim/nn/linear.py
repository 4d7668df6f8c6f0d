"""The Linear layer that all networks here are made of: `nn.Linear`, and an activation in the same call.

It is plain autograd, so jvp, vmap and double backward work. `nn/prepare.py` replaces it by one that is laid out for
sampling, `nn/onednn_training.py` by one that trains faster on some CPUs; both are called in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # the exact one
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
}


class Linear(nn.Linear):
    """x (..., I) -> (..., O)."""

    replaceable = True  # by a layer of other weights in memory and the same numbers

    def forward(self, x: Tensor, then: str = "none") -> Tensor:
        """The product, and then the activation of that name in ACTIVATIONS."""
        y = F.linear(x, self.weight, self.bias)
        return y if then == "none" else ACTIVATIONS[then](y)
